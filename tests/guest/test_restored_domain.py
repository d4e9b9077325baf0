"""A restored guest point is defined in a real libvirtd, never in the place of another domain, and starts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest

from snapchain.errors import Conflict, ToolFailed
from snapchain.ops.guest_points_merge import guest_at
from snapchain.ops.restore import define
from snapchain.ops.restore.guest import GuestRestoration, GuestRestoreReport, GuestRestoreRequest
from snapchain.replica.destination import ReplicaDestination
from snapchain.replica.endpoint import DirectoryEndpoint
from tests.guest.libvirt import Domain, definition
from tests.libvirtd import LibvirtHost, libvirtd
from tests.ops.guest_points import GUEST, Guest

pytestmark = pytest.mark.root


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LibvirtHost]:
    with libvirtd(tmp_path_factory.mktemp("libvirt") / "host") as found:
        yield found


@pytest.fixture
def destination(tmp_path: Path) -> ReplicaDestination:
    return ReplicaDestination(DirectoryEndpoint(tmp_path / "replica"))


def stored(host: LibvirtHost, destination: ReplicaDestination, folder: Path) -> Guest:
    """A guest point of a domain that libvirt defines, and that is gone again."""
    guest = Guest(folder)
    xml = folder / "domain.xml"
    mac = "<interface type='user'><mac address='52:54:00:00:00:01'/></interface>"
    xml.write_text(definition(GUEST, guest.images, more=mac))
    host.virsh("define", xml)
    inactive = host.virsh("dumpxml", "--inactive", GUEST)
    guest.point(destination, 1, inactive=inactive, live=None, uuid=host.virsh("domuuid", GUEST).strip())
    return guest


def restored(host: LibvirtHost, destination: ReplicaDestination, directory: Path, **asked: Any) -> GuestRestoreReport:
    request = GuestRestoreRequest(directory=directory, defines=True, **{"connect": host.uri, **asked})
    return GuestRestoration(destination, guest_at(destination, GUEST), request).run()


def domains(host: LibvirtHost) -> set[str]:
    return set(host.virsh("list", "--all", "--name").split())


def test_it_is_defined_and_starts(
    host: LibvirtHost, destination: ReplicaDestination, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored(host, destination, tmp_path / "g")
    try:
        for asked in ({}, {"new_identity": True}):
            with pytest.raises(Conflict, match="of this name") as refused:
                restored(host, destination, tmp_path / "out", **asked)
            assert "--new-name" in str(refused.value.hint)
        assert not (tmp_path / "out").exists(), "it is refused before anything is restored"

        report = restored(host, destination, tmp_path / "clone", new_name="web2")
        assert (report.defined, domains(host)) == ("web2", {"web1", "web2"})
        inactive = ET.fromstring(host.virsh("dumpxml", "--inactive", "web2"))
        assert inactive.findtext("uuid") != host.virsh("domuuid", "web1").strip()
        assert [mac.get("address") for mac in inactive.iter("mac")] != ["52:54:00:00:00:01"]
        # The other direction: the old name is free, the UUID is not.
        host.virsh("domrename", "web1", "web9")
        with pytest.raises(Conflict, match="with the UUID"):
            restored(host, destination, tmp_path / "out")
        host.virsh("undefine", "web9")

        # Killed right after it was defined: the next run is none that finds a stranger there.
        real = define.define

        def killed(*args: Any, **more: Any) -> str:
            real(*args, **more)
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(define, "define", killed)
            with pytest.raises(KeyboardInterrupt):
                restored(host, destination, tmp_path / "out")
        report = restored(host, destination, tmp_path / "out")
        assert (report.defined, report.bytes_written) == ("web1", 0)
        for name, pattern in (("web1", 1), ("web2", 1)):
            host.virsh("start", name)
            domain = Domain(host, name)
            folder = tmp_path / ("out" if name == "web1" else "clone")
            assert domain.source("vda") == folder / "vda.qcow2"
            assert domain.reads("vda", 64 << 10, 96 << 10, pattern)
            domain.write("vdb", 0, 4096, 9)
    finally:
        for name in domains(host):
            if name in host.virsh("list", "--name").split():
                host.virsh("destroy", name)
            host.virsh("undefine", name)


def test_what_libvirt_refuses_stays_as_files(
    host: LibvirtHost, destination: ReplicaDestination, tmp_path: Path
) -> None:
    guest = Guest(tmp_path / "g", names=("vda",))
    xml = definition(GUEST, guest.images).replace("machine='q35'", "machine='no-such-machine'")
    guest.point(destination, 1, inactive=xml, live=None, uuid=None)
    with pytest.raises(ToolFailed) as refused:
        restored(host, destination, tmp_path / "out")
    assert refused.value.subject == GUEST
    assert f"{host.uri}' define {tmp_path}/out/web1.xml" in str(refused.value.hint)
    assert (tmp_path / "out" / "vda.qcow2").exists()
    assert domains(host) == set()


def test_a_domain_without_a_definition_that_lasts(
    host: LibvirtHost, destination: ReplicaDestination, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a transient domain there is the live XML only, with all that libvirt adds to it while it runs.

    It is defined by the daemon that the environment names, as every other command does.
    """
    guest = Guest(tmp_path / "g")
    domain = Domain.started(host, tmp_path / "d", guest.images, transient=True)
    live = domain.virsh("dumpxml")
    domain.virsh("destroy")
    assert "<backingStore" in live
    guest.point(destination, 1, inactive=None, live=live)
    monkeypatch.setenv("LIBVIRT_DEFAULT_URI", host.uri)
    restored(host, destination, tmp_path / "out", connect=None)
    try:
        host.virsh("start", GUEST)
        assert domain.source("vdb") == tmp_path / "out" / "vdb.qcow2"
        assert domain.reads("vda", 64 << 10, 96 << 10, 1)
    finally:
        host.virsh("destroy", GUEST)
        host.virsh("undefine", GUEST)
