"""ship of a guest that runs: a real QEMU without an operating system, which goes on writing meanwhile."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from snapchain.cli import main
from snapchain.destination.guest_record import GuestRecord, decode, record_disk
from snapchain.destination.protocol import Destination
from snapchain.guest.address import GuestAddress, open_guest
from snapchain.model.consistency import Consistency
from snapchain.model.events import Event, OnEvent, Progress, ignore
from snapchain.ops.guest_points import GuestView, guests_of
from snapchain.ops.restore.run import Restoration
from snapchain.ops.ship import guest as ops
from snapchain.ops.ship.guest import GuestShipReport, GuestShipRequest
from snapchain.replica.destination import ReplicaDestination
from snapchain.replica.endpoint import DirectoryEndpoint
from snapchain.repository.destination import RepositoryDestination
from snapchain.repository.opening import create_repository, open_repository
from tests.guest.machine import Machine
from tests.ops.guest_points import missing_disks
from tests.ops.killing import killed_at_every_step
from tests.ops.stacks import Layer, build, same

KiB, MiB = 1 << 10, 1 << 20
SIZE = 8 * MiB
NAMES = ("vda", "vdb", "vdc")
REPOSITORY, REPLICA = "repository", "replica"


class Running:
    """A guest of three disks, its destination, and what each guest point must show, kept apart from both."""

    def __init__(self, folder: Path, kind: str) -> None:
        self.folder, self.kind = folder, kind
        self._content = {name: bytearray(SIZE) for name in NAMES}
        self.shown: dict[int, dict[str, bytes]] = {}
        self._written = 0
        disks = {
            name: build(folder / name, [Layer(SIZE), Layer(SIZE)], names=["root.qcow2", f"{name}.qcow2"])[-1]
            for name in NAMES
        }
        if kind == REPOSITORY:
            create_repository(self.url, passphrase=lambda: "correct horse")
        self.machine = Machine(folder / "machine", disks=disks)
        self.write(0, 256 * KiB)

    @property
    def url(self) -> str:
        return str(self.folder / REPOSITORY) if self.kind == REPOSITORY else f"dir:{self.folder / REPLICA}"

    def open(self) -> Destination:
        if self.kind == REPLICA:
            return ReplicaDestination(DirectoryEndpoint(self.folder / REPLICA))
        return RepositoryDestination(open_repository(self.url, passphrase=lambda: "correct horse", writing=True))

    def write(self, offset: int, length: int) -> None:
        """Each disk gets another value."""
        for name in NAMES:
            self._written = self._written % 255 + 1
            self.machine.write(name, offset, length, self._written)
            self._content[name][offset : offset + length] = bytes([self._written]) * length

    def now(self) -> dict[str, bytes]:
        return {name: bytes(content) for name, content in self._content.items()}

    def ship(self, on_event: OnEvent = ignore) -> GuestShipReport:
        expected = self.now()
        with open_guest(GuestAddress(qmp=self.machine.qmp)) as guest:
            report = ops.run(guest, GuestShipRequest(), self.open(), on_event=on_event)
        self.shown[report.guest_point] = expected
        return report

    def view(self) -> GuestView:
        (found,) = guests_of(self.open().disks())
        return found

    def record(self, point: int) -> GuestRecord:
        out = self.folder / "record.raw"
        out.unlink(missing_ok=True)
        Restoration(self.open(), record_disk("web1"), out, point=str(point)).run()
        return decode(out.read_bytes(), subject=out)

    def check(self, points: Sequence[int] | None = None) -> None:
        """All guest points are there, and sound at the destination; these of them are whole, and restore."""
        view = self.view()
        assert {point.point for point in view.points} == set(self.shown)
        for point in view.points if points is None else [each for each in view.points if each.point in points]:
            record = self.record(point.point)
            assert missing_disks(point, record) == ()
            for each in record.disks:
                out, wanted = self.folder / "out.qcow2", self.folder / "wanted.raw"
                out.unlink(missing_ok=True)
                wanted.write_bytes(self.shown[point.point][each.name])
                Restoration(self.open(), each.disk, out, point=str(point.disks[each.disk].point)).run()
                assert same(out, wanted), (point.point, each.name)
        report = self.open().verify(share=1.0)
        assert report.ok, report.findings
        assert self.machine.status() == "running"


@pytest.fixture(params=[REPOSITORY, REPLICA])
def running(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Running]:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("SNAPCHAIN_PASSWORD", "correct horse")
    found = Running(tmp_path, request.param)
    with found.machine:
        yield found


def test_the_points_of_a_guest_that_writes_all_the_time(running: Running) -> None:
    """What it writes after the snapshot, also while it is shipped, is in the next point and not in this one."""

    def writes(event: Event) -> None:
        if isinstance(event, Progress) and event.phase == "ship" and event.done:
            running.write(4 * MiB, 64 * KiB)

    reports = []
    for turn in range(3):
        running.write(turn * 512 * KiB, 128 * KiB)
        reports.append(running.ship(writes))
    assert [each.guest_point for each in reports] == [1, 2, 3]
    assert {each.consistency for each in reports} == {Consistency.CRASH}
    assert [shipped.layers_present for shipped in reports[1].disks] == [2, 2, 2]
    assert all(shipped.data_bytes <= 192 * KiB for shipped in reports[2].disks), "only what was written since"
    running.check()
    record = running.record(3)
    qemu = running.machine.argv[running.machine.argv.index("qemu-system-x86_64") :]
    assert (record.kind, record.guest, record.argv) == ("qmp", "web1", tuple(qemu))
    was = {each.name: each.path for each in record.disks}
    assert was == {name: str(running.folder / name / f"{name}.2.qcow2") for name in NAMES}, "when it was defined so"
    assert reports[2].starts_with == tuple(running.folder / name / f"{name}.3.qcow2" for name in NAMES)


def test_the_command_line(running: Running, capsys: pytest.CaptureFixture[str]) -> None:
    """JSON as documented; a dry run changes nothing."""

    def run(*words: str) -> Any:
        capsys.readouterr()
        assert main([*words, "--json"]) == 0, capsys.readouterr().err
        return json.loads(capsys.readouterr().out)

    qmp = str(running.machine.qmp)
    plan = run("ship", "--qmp", qmp, running.url, "--dry-run")["plan"]
    assert [each["disk"] for each in plan["disks"]] == [f"web1/{name}" for name in NAMES]
    assert [each["overlay"] for each in plan["snapshot"]["disks"]] == [
        str(running.folder / name / f"{name}.1.qcow2") for name in NAMES
    ]
    assert not (running.folder / "vda" / "vda.1.qcow2").exists()
    running.shown[1] = running.now()
    done = run("ship", "--qmp", qmp, running.url, "--label", "a", "--quiesce", "no")
    assert {"guest", "destination", "guest_point", "instant", "time", "consistency", "disks", "left_out"} <= set(done)
    assert (done["guest"], done["guest_point"], done["consistency"]) == ("web1", 1, "crash")
    (vda, _, _) = done["disks"]
    fields = {"disk", "point", "layers_sent", "bytes_read", "bytes_stored", "content_id", "data_bytes", "virtual_size"}
    assert fields <= set(vda)
    running.check([1])
    found = run("log", running.url)
    disks = {each["name"]: each for each in found["disks"]}
    assert {name: each["record_of"] for name, each in disks.items()} == {
        "web1/.guest": "web1", **{f"web1/{name}": None for name in NAMES},
    }  # fmt: skip
    assert {each["points"][0]["instant"] for each in disks.values()} == {done["instant"]}
    (guest,) = run("log", f"{running.url}::web1")["guests"]
    (point,) = guest["points"]
    assert (point["point"], point["consistency"], point["labels"]) == (1, "crash", ["a"])
    assert point["disks"] == {f"web1/{name}": 1 for name in NAMES}
    assert main(["log", running.url]) == 0
    shown = capsys.readouterr().out
    assert ".guest" not in shown
    assert "guest web1" in shown
    assert "crash" in shown
    other = run("ship", "--qmp", qmp, f"{running.url}::prod/web1", "--disk", "vdb")
    assert (other["guest"], [each["disk"] for each in other["disks"]]) == ("prod/web1", ["prod/web1/vdb"])
    assert [(each["disk"], each["reason"]) for each in other["left_out"]] == [
        ("vda", "not chosen"), ("vdc", "not chosen"),
    ]  # fmt: skip
    for words, message in (
        (("ship", "--qmp", qmp, running.url, "--each-layer"), "--each-layer is for an image"),
        (("ship", "--qmp", qmp, f"{running.url}::web1@3"), "a guest is wanted here"),
        (("ship", "--qmp", qmp), "no destination is named"),
        (("ship", str(running.folder / "vda" / "root.qcow2"), running.url, "--qmp", qmp), "are both given"),
        (("ship", str(running.folder / "vda" / "root.qcow2"), f"{running.url}::x", "--disk", "vda"), "and no guest"),
        (("ship", "--qmp", qmp, running.url, "--quiesce", "maybe"), "no way to quiesce"),
    ):
        status, said = main(words), capsys.readouterr().err
        assert (status, message in said) == (2, True), said


@pytest.mark.sampled
def test_killed_at_every_step(running: Running) -> None:
    """Earlier guest points are whole, and the next run completes; the guest runs on and sees no error."""
    now, deaths = running, 0
    now.ship()

    def job() -> None:
        with open_guest(GuestAddress(qmp=now.machine.qmp)) as guest:
            ops.run(guest, GuestShipRequest(), now.open())

    with ExitStack() as machines:
        for deaths, where in enumerate(killed_at_every_step(job, each=29), 1):
            for point in {point.point for point in now.view().points} - set(now.shown):
                now.shown[point] = now.now()  # it died after the record was published
            now.check([1])
            now.write(deaths * 16 * KiB % (4 * MiB), 16 * KiB)
            now.ship()
            now.check([max(now.shown)])
            assert now.machine.status() == "running", where
            if deaths % 8 == 0:  # each death may leave two layers: longer chains take longer
                now.check()
                now.machine.kill()
                folder = running.folder / f"after-{deaths}"
                folder.mkdir()
                now = Running(folder, running.kind)
                machines.callback(now.machine.kill)
                now.ship()
        assert deaths
        for point in {point.point for point in now.view().points} - set(now.shown):
            now.shown[point] = now.now()
        now.check()
        assert not list((running.folder / "state").rglob("record.raw"))
