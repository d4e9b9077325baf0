"""A domain of a real libvirtd is shipped while it runs and when it is off, and comes back from its guest points."""

from __future__ import annotations

from pathlib import Path

import pytest

from snapchain.destination.guest_record import decode, record_disk
from snapchain.guest.address import open_guest
from snapchain.model.consistency import Consistency
from snapchain.ops.guest_merge import guest_at
from snapchain.ops.restore.guest import GuestRestoration, GuestRestoreRequest
from snapchain.ops.restore.run import Restoration
from snapchain.ops.ship import guest as ops
from snapchain.ops.ship.guest import GuestShipReport, GuestShipRequest
from snapchain.repository.destination import RepositoryDestination
from snapchain.repository.opening import create_repository, open_repository
from tests.guest.libvirt import Domain
from tests.libvirtd import LibvirtHost
from tests.ops.stacks import Layer, build, same

pytestmark = pytest.mark.root

MiB = 1 << 20
NAMES = ("vda", "vdb", "vdc")


def test_a_domain_is_shipped_and_comes_back(
    libvirt_host: LibvirtHost, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    disks = {name: build(tmp_path / name, [Layer(8 * MiB)], names=[f"{name}.qcow2"])[0] for name in NAMES}
    url = str(tmp_path / "repository")
    create_repository(url, passphrase=lambda: "correct horse")
    vnc = f"<graphics type='vnc' socket='{tmp_path}/vnc' passwd='tellno'/>"
    domain = Domain.started(libvirt_host, tmp_path / "domain", disks, name="shipped", more=vnc)
    content = {name: bytearray(8 * MiB) for name in NAMES}
    shown: dict[int, dict[str, bytes]] = {}

    def write(number: int) -> None:
        for n, name in enumerate(NAMES, 1):
            domain.write(name, number * MiB, 65536, 10 * number + n)
            content[name][number * MiB : number * MiB + 65536] = bytes([10 * number + n]) * 65536

    def opened() -> RepositoryDestination:
        return RepositoryDestination(open_repository(url, passphrase=lambda: "correct horse", writing=True))

    def ship() -> GuestShipReport:
        with open_guest(domain.address) as guest:
            report = ops.run(guest, GuestShipRequest(), opened())
        shown[report.guest_point] = {name: bytes(each) for name, each in content.items()}
        return report

    try:
        reports = []
        for number in range(2):
            write(number)
            reports.append(ship())
        assert [domain.source(name) for name in NAMES] == [tmp_path / name / f"{name}.2.qcow2" for name in NAMES]
        assert [domain.source(name, "--inactive") for name in NAMES] == [domain.source(name) for name in NAMES]
        write(2)
        assert domain.state() == "running"
        for name in NAMES:
            domain.io(name, "flush")
        domain.kill()
        reports += [ship(), ship()]
        assert [each.consistency for each in reports] == [Consistency.CRASH] * 2 + [Consistency.OFFLINE] * 2
        assert [each.data_bytes for each in reports[3].disks] == [0, 0, 0]
        place = opened()
        for point in guest_at(place, "shipped").points:
            for name in NAMES:
                out, wanted = tmp_path / "out.qcow2", tmp_path / "wanted.raw"
                out.unlink(missing_ok=True)
                wanted.write_bytes(shown[point.point][name])
                Restoration(place, f"shipped/{name}", out, point=str(point.disks[f"shipped/{name}"].point)).run()
                assert same(out, wanted), (point.point, name)
        Restoration(place, record_disk("shipped"), tmp_path / "record.raw", point="2").run()
        record = decode((tmp_path / "record.raw").read_bytes(), subject="record")
        assert record.live is not None
        assert "passwd='tellno'" in record.live
        assert all(f"'{each.path}'" in record.live for each in record.disks), "as the definition names them"
        uuid = domain.virsh("domuuid").strip()
        assert (record.uuid, record.kind) == (uuid, "libvirt")
        domain.remove()
        request = GuestRestoreRequest(directory=tmp_path / "back", defines=True, connect=libvirt_host.uri)
        back = GuestRestoration(place, guest_at(place, "shipped"), request).run()
        assert back.defined == "shipped"
        domain.virsh("start")
        assert domain.source("vda") == tmp_path / "back" / "vda.qcow2"
        assert all(domain.reads(name, 2 * MiB, 65536, 20 + n) for n, name in enumerate(NAMES, 1))
        assert domain.virsh("domuuid").strip() == uuid
    finally:
        domain.remove()
