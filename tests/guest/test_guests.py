"""`snapchain guests`: domains and bare QEMUs, what protects them, what is in the way, and who is silent."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from snapchain.cli import main
from snapchain.destination.guest_record import record_disk
from snapchain.destination.records import DiskRecord, PointRecord
from snapchain.errors import NotFound, Unavailable
from snapchain.guest import journal
from snapchain.guest.address import GuestAddress
from snapchain.guest.libvirt_guest import LibvirtGuest
from snapchain.host.qemu_processes import QemuProcess, qemu_processes
from snapchain.model.consistency import Consistency
from snapchain.ops import guests as ops
from tests.guest.libvirt import Domain
from tests.guest.machine import Machine
from tests.libvirtd import LibvirtHost
from tests.ops.stacks import Layer, MiB, build

pytestmark = pytest.mark.root


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch, libvirt_host: LibvirtHost, tmp_path: Path) -> None:
    """Only QEMUs that have a file of this test open are on this host, and only the libvirt of the test."""

    def of_this_test() -> list[QemuProcess]:
        return [each for each in qemu_processes() if any(str(tmp_path) in word for word in each.argv)]

    monkeypatch.setattr(ops, "qemu_processes", of_this_test)
    monkeypatch.setenv("LIBVIRT_DEFAULT_URI", libvirt_host.uri)
    monkeypatch.setenv("COLUMNS", "80")


@pytest.fixture
def domain(own: None, libvirt_host: LibvirtHost, tmp_path: Path) -> Iterator[Domain]:
    top = build(tmp_path / "images", [Layer(8 * MiB, ["write -P 1 0 1M"]), Layer(8 * MiB)])[-1]
    more = "<disk type='file' device='cdrom'><target dev='sda' bus='sata'/><readonly/></disk>"
    found = Domain.started(libvirt_host, tmp_path / "domain", {"vda": top}, name="shop", more=more)
    yield found
    found.remove()


def row(name: str, **more: Any) -> ops.GuestRow:
    (found,) = ops.guests(name, **more).guests
    return found


def test_domains_and_bare_qemus_are_listed_side_by_side(
    domain: Domain, libvirt_host: LibvirtHost, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (bare_top,) = build(tmp_path / "bare images", [Layer(4 * MiB)])
    off = Domain.started(libvirt_host, tmp_path / "off", {"vda": bare_top}, name="archive", off=True)
    second = build(tmp_path / "third", [Layer(4 * MiB)])[0]
    mute_argv = ["-blockdev", f"driver=qcow2,node-name=x,file.driver=file,file.filename={second}"]
    with (
        Machine(tmp_path / "m", disks={"vda": bare_top}, name="cash desk") as machine,
        Machine(tmp_path / "mute", name="mute", argv=mute_argv) as mute,
    ):
        report = ops.guests()
        assert [guest.name for guest in report.guests] == ["cash desk", "mute", "shop", "archive"]
        assert report.faults == ()
        bare, other, shop, archive = report.guests
        assert (bare.kind, bare.state, bare.pid) == ("qemu", "running", machine.process.pid)
        assert bare.option == f"--qmp {machine.qmp}"
        assert [(disk.name, disk.path, disk.layers) for disk in bare.disks] == [("vda", str(bare_top), 1)]
        assert other.pid == mute.process.pid
        assert (shop.kind, shop.state, shop.option, shop.pid) == ("libvirt", "running", "--domain shop", domain.pid)
        vda, sda = shop.disks
        assert (vda.layers, vda.virtual_size, vda.format, vda.obstacle) == (2, 8 * MiB, "qcow2", None)
        assert vda.file_bytes == sum(Path(path).stat().st_blocks * 512 for path in vda.chain)
        assert (sda.left_out, sda.layers) == ("CD-ROM", 0)
        assert (shop.agent, shop.in_the_way, shop.owed) == ("none", (), ())
        assert (archive.state, archive.pid) == ("off", None)
        capsys.readouterr()
        assert main(["guests", "--json"]) == 0
        shown = json.loads(capsys.readouterr().out)
        assert [guest["name"] for guest in shown["guests"]] == [guest.name for guest in report.guests]
        assert main(["guests"]) == 0
        text = capsys.readouterr().out
        assert "shop: running, libvirt" in text
        assert "left out: CD-ROM" in text
    off.remove()


def test_a_qemu_without_a_qmp_socket_is_shown_with_what_to_add(
    own: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Machine(tmp_path / "m", name="deaf") as machine:
        hidden = [word for word in machine.argv if not word.startswith("unix:")]
        process = QemuProcess(machine.process.pid, 1, tuple(hidden), ops_parse(hidden), None)
        monkeypatch.setattr(ops, "qemu_processes", lambda: [process])
        found = row("deaf")
    assert (found.state, found.option, found.disks) == ("unknown", None, ())
    assert "-qmp unix:PATH,server=on,wait=off" in str(found.fault)


def test_another_daemons_guest_of_the_same_name_is_shown(
    domain: Domain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (mine,) = (each for each in qemu_processes() if each.pid == domain.pid)
    foreign = replace(mine, pid=1, arguments=replace(mine.arguments, uuid="1b4e28ba-2fa1-11d2-883f-0016d3cca427"))
    monkeypatch.setattr(ops, "qemu_processes", lambda: [mine, foreign])
    shown = {each.pid: each.fault for each in ops.guests("shop").guests}
    assert shown.keys() == {domain.pid, 1}
    assert "Another libvirt daemon manages it" in str(shown[1])


def ops_parse(argv: list[str]) -> Any:
    from snapchain.host.qemu_processes import parse

    return parse(argv)


def test_what_is_in_the_way_and_what_is_owed(domain: Domain, tmp_path: Path) -> None:
    chain = [Path(path) for path in row("shop").disks[0].chain]
    domain.write("vda", 0, 4 * MiB, 7)
    domain.virsh("blockcommit", "--path", "vda", "--base", chain[0], "--active", "--bandwidth", "1", "--bytes")
    found = row("shop")
    assert found.in_the_way == ("a block job of another program works on vda: active-commit",)
    assert found.activities == found.in_the_way
    domain.virsh("blockjob", "--path", "vda", "--abort")
    record = journal.begun(LibvirtGuest(domain.address), "thaw")
    journal.write(record.model_copy(update={"writer": (1 << 22, 1)}))
    found = row("shop")
    assert (found.in_the_way, found.owed) == ((), ("an interrupted thaw",))


class Shelf:
    """A destination, as far as it is asked here."""

    def __init__(self, *disks: DiskRecord) -> None:
        self._disks = disks

    def disks(self) -> tuple[DiskRecord, ...]:
        return self._disks


def a_point(number: int, time: datetime, instant: str) -> PointRecord:
    return PointRecord(
        point=number, time=time, virtual_size=MiB, layers=1, content_id="0" * 64, labels=(), instant=instant,
        consistency=Consistency.FILESYSTEM,
    )  # fmt: skip


def test_what_protects_a_guest_and_how_old_it_is(domain: Domain) -> None:
    time = datetime(2026, 11, 30, 12, tzinfo=UTC)
    instants = ["a" * 32, "b" * 32]
    points = tuple(a_point(n + 1, time + timedelta(hours=n), each) for n, each in enumerate(instants))
    there = Shelf(
        DiskRecord(name="shop/vda", points=points, epoch=1),
        DiskRecord(name=record_disk("shop"), points=points, epoch=1),
        DiskRecord(name="other/vda", points=points, epoch=1),
    )
    alone = Shelf(DiskRecord(name="shop/vda", points=points[:1], epoch=1))

    def broken() -> Any:
        raise Unavailable("no answer", subject="s3://bucket")

    at: dict[str, Any] = {"/a": lambda: there, "/b": Shelf, "/c": lambda: alone, "s3://bucket": broken}
    full, empty, torn, silent = row("shop", at=at, now=time + timedelta(hours=3)).protected
    assert (full.guest_point, full.age_seconds, full.consistency) == (2, 7200.0, Consistency.FILESYSTEM)
    assert full.disks == ("shop/vda",)
    assert (empty.guest_point, empty.disks) == (None, ())
    assert (torn.guest_point, torn.disks) == (None, ("shop/vda",))
    assert silent.fault == "s3://bucket: no answer"


def test_a_daemon_that_hangs_is_a_line(
    domain: Domain, libvirt_host: LibvirtHost, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ops, "_LIST_SECONDS", 0.5)
    os.kill(libvirt_host.pid, signal.SIGSTOP)
    try:
        report = ops.guests()
        assert main(["guests"]) == 0
    finally:
        os.kill(libvirt_host.pid, signal.SIGCONT)
    assert "did not answer" in report.faults[0]
    (shop,) = report.guests  # its QEMU is seen all the same
    assert (shop.name, shop.state, shop.kind) == ("shop", "unknown", "libvirt")
    said = capsys.readouterr()
    assert "not all guests are shown" in said.err


def test_a_name_that_no_guest_has(own: None) -> None:
    with pytest.raises(NotFound, match="no guest of this host"):
        ops.guests("nobody")
    assert main(["guests", "nobody"]) == 3


def test_a_monitor_that_another_program_uses_is_left_alone(tmp_path: Path) -> None:
    """A second connection would wait, and take the place of its client as soon as that connects anew."""
    top = build(tmp_path / "images", [Layer(MiB)])[-1]
    with Machine(tmp_path / "m", disks={"vda": top}) as machine:
        found = ops._Found("web1", "qemu", (GuestAddress(qmp=machine.qmp),))
        code = "import socket,sys; s=socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]); print(s.recv(9)); input()"
        argv = [sys.executable, "-c", code, str(machine.qmp)]
        with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as client:
            assert client.stdout is not None
            assert client.stdout.readline()
            seen = ops._look(found, ())
            assert (seen.state, seen.option) == ("unknown", f"--qmp {machine.qmp}")
            assert f"{machine.qmp} is in use by" in (seen.fault or "")
            assert f"(pid {client.pid})" in (seen.fault or "")
            client.communicate(b"\n")
        assert ops._look(found, ()).state == "running"


@pytest.mark.parametrize("address", ["foo://x", "s3://", "dir:"])
def test_an_address_of_no_destination_is_refused(own: None, address: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["guests", "--at", address]) == 2
    assert capsys.readouterr().err
