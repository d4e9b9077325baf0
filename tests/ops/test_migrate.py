"""migrate --offline: one master at every instant, whoever dies when; all disks or none; and the way back."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import pytest

from snapchain.errors import Busy, Conflict, InvalidInput, NotFound, ToolFailed, Unavailable
from snapchain.host.retry import RetryPolicy
from snapchain.image import scan
from snapchain.merge import step as merge_plan
from snapchain.merge.request import MergeRequest
from snapchain.model.events import Progress
from snapchain.ops.inspect import inspect_image
from snapchain.ops.log import log
from snapchain.ops.migrate import run as module
from snapchain.ops.migrate.run import MigrateReport, MigrateRequest, Move, migrate, plan, take_back
from snapchain.replica.client import ask_for_handover
from snapchain.replica.destination import ReplicaDestination
from snapchain.replica.endpoint import DirectoryEndpoint, Endpoint
from snapchain.replica.stream.guest_messages import HandedDisk, Step
from snapchain.replica.stream.messages import Active
from snapchain.source import sealing as snapshot
from snapchain.source.notes import Notes
from snapchain.source.ownership import epoch_of
from tests.exhaustive import some
from tests.ops.killing import killed_at_every_step
from tests.ops.stacks import Layer, MiB, build, clean, flat, same, write
from tests.replica.conftest import BentEndpoint, Place, send
from tests.waiting import HANG

VDA, VDB = "web1/vda", "web1/vdb"


class Host:
    """A source with the two disks of a guest, and a replica."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.place = Place(directory / "replica")
        self.vda = build(
            directory / "a", [Layer(2 * MiB, ["write -P 1 0 1M"]), Layer(2 * MiB, ["write -P 2 512k 256k"])]
        )[-1]
        self.vdb = build(directory / "b", [Layer(MiB, ["write -P 3 0 128k"])], names=["data.qcow2"])[-1]
        self.truth = {
            VDA: flat(self.vda, directory / "vda.raw"),
            VDB: flat(self.vdb, directory / "vdb.raw"),
        }

    @property
    def endpoint(self) -> DirectoryEndpoint:
        return DirectoryEndpoint(self.place.root)

    @property
    def moves(self) -> list[Move]:
        return [Move(self.vda, VDA), Move(self.vdb, VDB)]

    def migrate(self, endpoint: Endpoint | None = None, **options: Any) -> MigrateReport:
        on_event = options.pop("on_event", lambda _event: None)
        request = MigrateRequest(moves=options.pop("moves", self.moves), **options)
        return migrate(request, endpoint or self.endpoint, on_event=on_event)

    def take_back(self, **options: Any) -> Any:
        moves = options.pop("moves", self.moves)
        return take_back(MigrateRequest(moves=moves), self.endpoint, **options)

    def masters(self) -> set[str]:
        """Who may write, disk by disk: this host by its marks, the replica's by its catalogue."""
        found = set()
        for move in self.moves:
            if self.may_write(move.image):
                found.add(f"{move.disk} here")
        for disk in log(ReplicaDestination(self.endpoint)).disks if self.place.root.exists() else ():
            if self.catalogue(disk.name)["handover"] is not None:
                found.add(f"{disk.name} there")
        return found

    def may_write(self, image: Path) -> bool:
        try:
            snapshot.plan(image)
        except Conflict:
            return False
        return True

    def catalogue(self, disk: str) -> dict[str, Any]:
        return Place(self.place.root).catalogue() if disk == VDA else _json(self.directory_of(disk) / "catalogue.json")

    def directory_of(self, disk: str) -> Path:
        return self.place.root / disk.replace("/", "%2F")

    def overlay(self, disk: str) -> Path:
        return next(entry for entry in (self.directory_of(disk) / "active").iterdir() if entry.suffix == ".qcow2")

    def check_there(self) -> None:
        """What the destination's guest will see is what this one saw; every file is sound."""
        for disk in (VDA, VDB):
            assert same(self.overlay(disk), self.truth[disk])
            for file in self.directory_of(disk).glob("*.qcow2"):
                assert clean(file)

    def check_here(self) -> None:
        for move in self.moves:
            assert same(move.image, self.truth[move.disk])
            with scan(move.image) as chain:
                assert all(file.path.stat().st_mode & 0o200 for file in chain.files)


def _json(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text())
    return found


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_HANDOVER", RetryPolicy(give_up_after=0.2, first=0.05))


class Guest:
    """A program of QEMU that has an image open, as a guest has, and writes what it is told to."""

    def __init__(self, image: Path) -> None:
        self._process = subprocess.Popen(
            ["qemu-io", "-f", "qcow2", str(image)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self._wait()

    def does(self, command: str) -> None:
        """Returns when it is done."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{command}\n".encode())
        self._process.stdin.flush()
        self._wait()

    def _wait(self) -> None:
        assert self._process.stdout is not None
        said = b""
        while not said.endswith(b"qemu-io> "):
            said += (read := os.read(self._process.stdout.fileno(), 4096))
            assert read, "it has ended"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(HANG)
        self._process.stdout.close()


# ---- what it does


def test_the_disks_become_the_destinations(host: Host) -> None:
    planned = plan(MigrateRequest(moves=host.moves), host.endpoint)
    assert [(each.seals, each.given, each.in_use, each.epoch) for each in planned.disks] == [(True, False, None, 1)] * 2
    assert planned.bytes_to_send == 2 * MiB // 2 + 256 * 1024 + 128 * 1024
    assert not host.place.root.exists()

    report = host.migrate()
    assert [(each.disk, each.epoch) for each in report.disks] == [(VDA, 2), (VDB, 2)]
    assert [Path(each.overlay) for each in report.disks] == [host.overlay(VDA), host.overlay(VDB)]
    assert report.started is None
    assert report.course.value == "new"
    assert host.masters() == {f"{VDA} there", f"{VDB} there"}
    host.check_there()
    fenced = [Path(path) for each in report.disks for path in each.fenced]
    assert set(fenced) == {*host.vda.parent.glob("*.qcow2"), *host.vdb.parent.glob("*.qcow2")}
    assert all(path.stat().st_mode & 0o777 == 0o444 for path in fenced)
    assert all(same(move.image, host.truth[move.disk]) for move in host.moves)
    assert "was given" in inspect_image(host.vda).findings[-1]

    again = host.migrate()
    assert (again.course.value, again.token) == ("done", report.token)
    assert (again.disks[0].overlay, again.disks[0].fenced) == (report.disks[0].overlay, report.disks[0].fenced)


def test_nothing_here_writes_or_sends_it_any_more(host: Host, tmp_path: Path) -> None:
    host.migrate()
    other = DirectoryEndpoint(tmp_path / "elsewhere")
    refused: list[Callable[[], object]] = [
        lambda: snapshot.plan(host.vda),
        lambda: merge_plan.plan_step(MergeRequest(image=host.vda, flatten=True)),
        lambda: send(host.vda, host.endpoint, VDA),
        lambda: send(host.vda, other, "another/name"),
        lambda: host.migrate(other),
        lambda: host.migrate(moves=[Move(host.vda, "web2/vda"), Move(host.vdb, VDB)]),
    ]
    for attempt in refused:
        with pytest.raises(Conflict, match="was given"):
            attempt()
    assert not (tmp_path / "elsewhere").exists()
    with pytest.raises(Conflict, match="together with web1/vda, web1/vdb"):
        host.migrate(moves=[Move(host.vda, VDA)])


def test_the_destination_knows_it_too(host: Host) -> None:
    """Whoever lost the marks, or kept a copy of the image, is refused by the epoch."""
    copy = host.directory / "copy"
    shutil.copytree(host.vda.parent, copy)
    host.migrate()
    with pytest.raises(Conflict, match="has taken the guest web1 over by a move"):
        send(copy / "disk.qcow2", host.endpoint, VDA)
    with pytest.raises(Conflict, match="nothing here may write or send it any more"):
        send(copy / "disk.qcow2", host.endpoint, VDA, epoch=2)
    with pytest.raises(Conflict, match="nothing here may write or send it any more"):
        host.migrate(moves=[Move(copy / "disk.qcow2", VDA)])
    said = host.catalogue(VDA)["layers"][-1]
    active = Active(
        name="disk.qcow2",
        size=said["size"],
        cluster_size=65536,
        extended_l2=False,
        on=said["id"],
        make=False,
        prove=False,
    )
    for step, epoch in ((Step.GIVE, 2), (Step.BACK, 2)):
        asked = [HandedDisk(disk=VDA, epoch=epoch, overlay=active)]
        with pytest.raises(Conflict, match="is in epoch 2"):
            ask_for_handover(host.endpoint, step, asked, token="f" * 32)
    assert host.masters() == {f"{VDA} there", f"{VDB} there"}


def test_a_raw_image_goes_as_it_is(tmp_path: Path) -> None:
    raw = tmp_path / "disk.raw"
    raw.write_bytes(bytes(65536) + b"\x05" * 65536 + bytes(MiB - 2 * 65536))
    place = Place(tmp_path / "replica")
    report = migrate(MigrateRequest(moves=[Move(raw, VDA)]), DirectoryEndpoint(place.root))
    assert report.disks[0].sealed is None
    assert same(Path(report.disks[0].overlay), raw)
    assert raw.stat().st_mode & 0o222 == 0
    with pytest.raises(Conflict, match="was given"):
        send(raw, DirectoryEndpoint(tmp_path / "r2"), VDA)


def test_files_that_others_stand_on_stay_theirs(host: Host) -> None:
    clone = host.vda.with_name("clone.qcow2")
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-b", "0.qcow2", "-F", "qcow2", clone], check=True)
    report = host.migrate()
    assert Path(report.disks[0].fenced[0]) == host.vda
    assert str(host.vda.with_name("0.qcow2")) not in report.disks[0].fenced
    assert host.vda.with_name("0.qcow2").stat().st_mode & 0o200
    assert host.may_write(clone)


# ---- who must not be disturbed


def test_an_image_in_use_stops_all(host: Host) -> None:
    with Guest(host.vdb):
        planned = plan(MigrateRequest(moves=host.moves), host.endpoint)
        assert planned.disks[0].in_use is None
        assert "qemu-io" in (planned.disks[1].in_use or "")
        with pytest.raises(Busy, match=r"qemu-io .* has it open"):
            host.migrate()
    assert host.masters() == {f"{VDA} here", f"{VDB} here"}
    host.check_here()


def test_written_to_while_it_is_sent(host: Host) -> None:
    """The first disk's new overlay, while the second disk goes over."""

    def on_event(event: object) -> None:
        if isinstance(event, Progress) and host.directory_of(VDB).exists():
            write(host.vda, "write -P 9 0 64k")

    with pytest.raises(Conflict, match="written to while it was being migrated"):
        host.migrate(on_event=on_event)
    assert host.masters() == {f"{VDA} here", f"{VDB} here"}
    host.truth[VDA] = flat(host.vda, host.directory / "later.raw")
    host.check_here()
    host.migrate()
    host.check_there()


def test_a_destination_that_is_used_refuses(host: Host) -> None:
    """Somebody has the overlay open there when it comes to the handover: nothing has changed hands."""
    entered = []

    real = module._give

    def give(*args: Any) -> Any:
        with Guest(host.overlay(VDB)):
            entered.append(host.masters())
            return real(*args)

    module._give = give  # type: ignore[assignment]
    try:
        with pytest.raises(Busy, match=r"qemu-io .* has it open"):
            host.migrate()
    finally:
        module._give = real
    assert entered == [set()]
    assert host.masters() == {f"{VDA} here", f"{VDB} here"}
    host.check_here()
    host.migrate()
    host.check_there()
    assert host.masters() == {f"{VDA} there", f"{VDB} there"}


def test_a_paused_guest_has_it_open(host: Host) -> None:
    with Guest(host.vda) as guest:
        guest.does("write -P 7 64k 64k")
        guest.does("flush")  # as a pause does
        with pytest.raises(Busy, match=r"qemu-io .* has it open"):
            host.migrate(moves=[Move(host.vda, VDA)])
        report = host.migrate(moves=[Move(host.vda, VDA)], paused=True)
    assert report.disks[0].sealed is None
    assert not host.may_write(host.vda)
    assert same(host.overlay(VDA), flat(host.vda, host.directory / "paused.raw"))


def test_a_guest_that_was_not_paused_is_found(host: Host) -> None:
    """It writes while its disk is sent."""
    with Guest(host.vda) as guest:
        written: list[object] = []

        def on_event(event: object) -> None:
            if isinstance(event, Progress) and not written:
                guest.does("write -P 7 64k 64k")
                written.append(event)

        with pytest.raises(Conflict, match="written to"):
            host.migrate(moves=[Move(host.vda, VDA)], paused=True, on_event=on_event)
    assert host.may_write(host.vda)


# ---- the way back


def test_taken_back_as_long_as_no_guest_has_written(host: Host) -> None:
    host.migrate()
    report = host.take_back()
    assert report.epochs == (3, 3)
    assert host.masters() == {f"{VDA} here", f"{VDB} here"}
    host.check_here()
    with scan(host.vda) as chain:
        assert epoch_of(chain, Notes()) == 3
    write(host.vda, "write -P 8 0 64k")
    host.truth[VDA] = flat(host.vda, host.directory / "later.raw")
    send(host.vda, host.endpoint, VDA)
    assert host.migrate().disks[0].epoch == 4
    host.check_there()
    fresh = build(host.directory / "c", [Layer(MiB)])[0]
    with pytest.raises(NotFound, match="not given away"):
        host.take_back(moves=[Move(fresh, "c/vda")])


def test_not_taken_back_from_under_a_guest(host: Host) -> None:
    host.migrate()
    with Guest(host.overlay(VDB)), pytest.raises(Busy, match=r"qemu-io .* has it open"):
        host.take_back()
    assert host.masters() == {f"{VDA} there", f"{VDB} there"}
    write(host.overlay(VDB), "write -P 4 0 64k")
    with pytest.raises(Conflict, match="a guest has written to it"):
        host.take_back()
    assert host.masters() == {f"{VDA} there", f"{VDB} there"}
    host.take_back(unasked=True)
    assert f"{VDA} here" in host.masters()
    # What the destination's guest has is not overwritten; but it may send nothing to who has a newer epoch.
    send(host.vda, DirectoryEndpoint(host.directory / "third"), VDA)
    with pytest.raises(Conflict, match="epoch"):
        send(host.overlay(VDA), DirectoryEndpoint(host.directory / "third"), VDA)


def test_there_and_back_again(host: Host, tmp_path: Path) -> None:
    """The destination's guest writes, and is migrated back: to a replica at the first host."""
    host.migrate()
    write(host.overlay(VDA), "write -P 6 0 256k", "write -z 1M 64k")
    truth = flat(host.overlay(VDA), tmp_path / "truth.raw")
    home = DirectoryEndpoint(tmp_path / "home")
    back = migrate(MigrateRequest(moves=[Move(host.overlay(VDA), VDA)]), home)
    assert back.disks[0].epoch == 3
    assert same(Path(back.disks[0].overlay), truth)
    assert not host.may_write(host.overlay(VDA))
    # And a third time, from there to the second host's replica, which knows most of it, and still has the old overlay.
    write(Path(back.disks[0].overlay), "write -P 5 512k 64k")
    truth = flat(Path(back.disks[0].overlay), tmp_path / "truth2.raw")
    third = migrate(MigrateRequest(moves=[Move(Path(back.disks[0].overlay), VDA)]), host.endpoint)
    assert third.disks[0].epoch == 4
    assert same(Path(third.disks[0].overlay), truth)
    # Some of the layers there still bear the mark of when the disk went: it is over.
    assert host.may_write(Path(third.disks[0].overlay))
    assert not host.may_write(Path(back.disks[0].overlay))
    fourth = migrate(MigrateRequest(moves=[Move(Path(third.disks[0].overlay), VDA)]), DirectoryEndpoint(tmp_path / "x"))
    assert same(Path(fourth.disks[0].overlay), truth)


# ---- the start of the guest


def test_the_hook_is_told_all_and_run_once(host: Host, tmp_path: Path) -> None:
    told = tmp_path / "told"
    hook = tmp_path / "hook"
    hook.write_text(f"#!/bin/sh\nenv | grep SNAPCHAIN_ | sort >> {told}\ntest ! -e {tmp_path}/fails\n")
    hook.chmod(0o755)
    (tmp_path / "fails").touch()
    with pytest.raises(ToolFailed, match="the start hook"):
        host.migrate(start_hook=[str(hook)])
    assert host.masters() == {f"{VDA} there", f"{VDB} there"}
    (tmp_path / "fails").unlink()
    assert host.migrate(start_hook=[str(hook)]).started is True
    assert host.migrate(start_hook=[str(hook)]).started is True
    lines = told.read_text().splitlines()
    assert lines.count("SNAPCHAIN_HOOK=start") == 2
    assert lines.count(f"SNAPCHAIN_OVERLAY_2={host.overlay(VDB)}") == 2
    assert lines.count(f"SNAPCHAIN_OVERLAY={host.overlay(VDA)}") == 2
    assert lines.count("SNAPCHAIN_EPOCH_1=2") == 2


# ---- death


def _restore(host: Host, saved: Path) -> None:
    for name in ("a", "b", "replica"):
        shutil.rmtree(host.directory / name, ignore_errors=True)
        if (saved / name).exists():
            # -a keeps times, or every file would be new to the replica.
            subprocess.run(["cp", "-a", saved / name, host.directory / name], check=True)


@pytest.mark.sampled
@pytest.mark.parametrize("then", ["again", "back"])
def test_killed_at_every_step(host: Host, tmp_path: Path, then: str) -> None:
    """At no step two masters; the same command ends it, or the disks are taken back, and nothing is lost."""
    saved = tmp_path / "saved"
    saved.mkdir()
    host.migrate()
    host.take_back()  # what is killed below is a handover, not the first transfer
    for name in ("a", "b", "replica"):
        subprocess.run(["cp", "-a", host.directory / name, saved / name], check=True)
    seen = set()
    for step in killed_at_every_step(host.migrate, each=5 if then == "again" else 6):
        masters = host.masters()
        for disk in (VDA, VDB):
            assert not {f"{disk} here", f"{disk} there"} <= masters, step
        seen.add(tuple(sorted(masters)))
        if then == "again" or not _anything_given(host):
            host.migrate()
            assert host.masters() == {f"{VDA} there", f"{VDB} there"}
            host.check_there()
        else:
            host.take_back()
            assert host.masters() == {f"{VDA} here", f"{VDB} here"}
            host.check_here()
            write(host.vda, "write -P 1 0 64k")
            send(host.vda, host.endpoint, VDA)
        _restore(host, saved)
    assert len(seen) > 3
    assert () in seen


def _anything_given(host: Host) -> bool:
    return not all(host.may_write(move.image) for move in host.moves)


@pytest.mark.sampled
def test_a_take_back_that_is_killed_is_done_again(host: Host, tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    saved.mkdir()
    host.migrate()
    for name in ("a", "b", "replica"):
        subprocess.run(["cp", "-a", host.directory / name, saved / name], check=True)
    for step in killed_at_every_step(host.take_back, each=5):
        masters = host.masters()
        for disk in (VDA, VDB):
            assert not {f"{disk} here", f"{disk} there"} <= masters, step
        if _anything_given(host):
            host.take_back()
        assert host.masters() == {f"{VDA} here", f"{VDB} here"}
        host.check_here()
        _restore(host, saved)


@pytest.mark.sampled
@pytest.mark.parametrize("way", ["question", "answer"])
def test_a_line_that_is_cut_in_the_handover(host: Host, way: str) -> None:
    """Whether the question or its answer was lost nobody knows here: nothing here writes until that is known."""
    host.migrate()
    host.take_back()
    for at in some((0, 40, 200, 300, 600, 1200), each=2):
        bent = _cut_when_giving(host, way, at)
        try:
            report = host.migrate(bent)
        except Unavailable:
            assert host.masters() <= {f"{VDA} there", f"{VDB} there"}
            with pytest.raises(Conflict, match="is being given to"):
                snapshot.plan(host.vda)
            report = host.migrate(_named(host))
            assert report.course.value == "resumed"
        assert host.masters() == {f"{VDA} there", f"{VDB} there"}
        host.check_there()
        take_back(MigrateRequest(moves=host.moves), _named(host))


def _named(host: Host) -> BentEndpoint:
    return BentEndpoint(host.place)


def _cut_when_giving(host: Host, way: str, at: int) -> BentEndpoint:
    """A line that is cut at that byte once the images here bear their marks."""

    def bend(place: int, data: bytes) -> bytes | None:
        if _anything_given(host) and place + len(data) > at:
            return None
        return data

    return BentEndpoint(host.place, **{"there" if way == "question" else "back": bend})


# ---- what cannot be


def test_requests_that_mean_nothing(host: Host) -> None:
    with pytest.raises(InvalidInput, match="the image is named twice"):
        host.migrate(moves=[Move(host.vda, VDA), Move(host.vda, VDB)])
    with pytest.raises(InvalidInput, match="the disk is named twice"):
        host.migrate(moves=[Move(host.vda, VDA), Move(host.vdb, VDA)])
    with pytest.raises(InvalidInput, match="no disk"):
        host.migrate(moves=[])
    assert not host.place.root.exists()
