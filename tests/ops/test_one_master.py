"""One master of a disk: runs that get in each other's way, hosts further on, files that are not the disk's alone."""

from __future__ import annotations

import json
import os
import shutil
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from snapchain.errors import Conflict, Corrupt, InvalidInput, NotFound, SnapchainError, Unsupported
from snapchain.host.files import set_mode
from snapchain.image import scan
from snapchain.merge import plan as merge_set, run as merge_run, step as merge_plan
from snapchain.merge.request import MergeRequest
from snapchain.ops.migrate import run as module
from snapchain.ops.migrate.run import MigrateReport, MigrateRequest, Move, migrate, take_back
from snapchain.ops.nightly.local_chain import look
from snapchain.ops.sync.run import SyncRequest, sealed_request, sync_set
from snapchain.replica import guest_handover
from snapchain.replica.client import ask_for_handover
from snapchain.replica.endpoint import DirectoryEndpoint
from snapchain.replica.stream.guest_messages import Handed, HandedDisk, Step
from snapchain.replica.stream.messages import Active
from snapchain.source import ownership, sealing as snapshot
from snapchain.source.notes import Notes
from snapchain.source.ownership import epoch_of
from tests.ops.stacks import Layer, MiB, build, flat, qemu_img, same, write
from tests.ops.test_migrate import VDA, VDB, Host
from tests.replica.conftest import send


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


def move(image: Path, replica: Path, disk: str = VDA, **options: Any) -> MigrateReport:
    return migrate(MigrateRequest(moves=[Move(image, disk)], **options), DirectoryEndpoint(replica))


def overlay(report: MigrateReport) -> Path:
    return Path(report.disks[0].overlay)


def is_master(replica: Path, disk: str = VDA) -> bool:
    catalogue = replica / disk.replace("/", "%2F") / "catalogue.json"
    return catalogue.exists() and json.loads(catalogue.read_text())["handover"] is not None


def clone_of(host: Host) -> Path:
    """An overlay of which only the top is its own."""
    clone = host.vda.with_name("clone.qcow2")
    qemu_img("create", "-q", "-f", "qcow2", "-b", "0.qcow2", "-F", "qcow2", clone)
    return clone


def meanwhile(monkeypatch: pytest.MonkeyPatch, step: str, nth: int, other: Callable[[], object]) -> list[object]:
    """Before that step of the next migration something else is done, once; what it said."""
    real, calls = getattr(module, step), iter(range(1, 1000))
    said: list[object] = []

    def wrapped(*arguments: Any, **options: Any) -> Any:
        if next(calls) == nth:
            monkeypatch.setattr(module, step, real)
            try:
                said.append(other())
            except SnapchainError as error:
                said.append(error)
        return real(*arguments, **options)

    monkeypatch.setattr(module, step, wrapped)
    return said


# ---- runs at once


@pytest.mark.parametrize("paused", [False, True])
def test_two_destinations_at_once(host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, paused: bool) -> None:
    """Both are ready; the second one comes to its marks when the first one is done."""
    meanwhile(monkeypatch, "_lock", 1, lambda: move(host.vda, tmp_path / "other", paused=paused))
    with pytest.raises(Conflict, match=r"was given to .*other"):
        move(host.vda, host.place.root, paused=paused)
    assert is_master(tmp_path / "other")
    assert not is_master(host.place.root)


@pytest.mark.parametrize("other", [Host.migrate, Host.take_back])
def test_another_run_between_the_marks(
    host: Host, monkeypatch: pytest.MonkeyPatch, other: Callable[[Host], object]
) -> None:
    """It finds the first disk marked and the second not, as after a kill; but that run lives."""
    said = meanwhile(monkeypatch, "_fence", 2, lambda: other(host))
    with pytest.raises(Conflict, match="another host has taken it over since"):
        host.migrate()
    assert len(said) == 1
    assert host.masters() == {f"{VDA} here", f"{VDB} here"}
    host.check_here()


def test_taken_back_before_the_guest_is_started(host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    meanwhile(monkeypatch, "_confirm", 1, host.take_back)
    with pytest.raises(Conflict, match="taken back meanwhile"):
        host.migrate(start_hook=["touch", str(tmp_path / "started")])
    assert not (tmp_path / "started").exists()
    assert host.masters() == {f"{VDA} here", f"{VDB} here"}


def test_marks_that_cannot_be_set_go_again(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the destination was asked, an error leaves the source as it was: notes, modes, epoch."""

    def fail(path: Path, mode: int) -> None:
        monkeypatch.setattr(ownership, "set_mode", set_mode)
        set_mode(path, mode)
        raise Unsupported("no room")

    meanwhile(monkeypatch, "_fence", 2, lambda: monkeypatch.setattr(ownership, "set_mode", fail))
    with pytest.raises(Unsupported, match="no room"):
        host.migrate()
    monkeypatch.undo()
    assert host.masters() == {f"{VDA} here", f"{VDB} here"}
    host.check_here()
    with scan(host.vda) as chain:
        assert epoch_of(chain, Notes()) == 1


# ---- further on, and back


def test_not_taken_back_from_who_has_given_it_on(host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here -> there -> a third host, and no guest has written a byte on the way."""
    names = {"here": "a", "there": "b"}

    def hostname() -> str:
        return names["there" if threading.current_thread().name == "receiver" else "here"]

    monkeypatch.setattr(socket, "gethostname", hostname)
    move(host.vda, host.place.root)
    third = tmp_path / "third"
    names.update(here="b", there="c")
    move(host.overlay(VDA), third)
    names.update(here="a", there="b")
    with pytest.raises(Conflict, match="has gone on from there"):
        move(host.vda, host.place.root, start_hook=["touch", str(tmp_path / "started")])
    assert not (tmp_path / "started").exists()
    with pytest.raises(Conflict, match=r"has taken the guest web1 over by a move: epoch 3"):
        take_back(MigrateRequest(moves=[Move(host.vda, VDA)]), host.endpoint)
    assert not host.may_write(host.vda)
    assert is_master(third)
    # Step by step it goes.
    names.update(here="b", there="c")
    take_back(MigrateRequest(moves=[Move(host.overlay(VDA), VDA)]), DirectoryEndpoint(third))
    names.update(here="a", there="b")
    take_back(MigrateRequest(moves=[Move(host.vda, VDA)]), host.endpoint)
    assert host.may_write(host.vda)
    assert not is_master(third)
    assert not is_master(host.place.root)


@pytest.mark.parametrize("writes", [True, False])
def test_what_comes_back_is_written_again(host: Host, tmp_path: Path, writes: bool) -> None:
    """There -> here -> there: the marks that the replica's host set when it gave the disk away say no more."""
    move(host.vda, host.place.root)
    there = host.overlay(VDA)
    if writes:
        write(there, "write -P 6 0 256k")
    here = overlay(move(there, tmp_path / "home"))
    write(here, "write -P 7 0 64k")
    if writes:
        there.rename(tmp_path / "old.qcow2")
    again = move(here, host.place.root)
    assert again.disks[0].epoch == 4
    assert same(overlay(again), flat(here, tmp_path / "truth.raw"))
    write(overlay(again), "write -P 8 0 64k")
    snapshot.run(snapshot.plan(overlay(again)))
    assert move(overlay(again), tmp_path / "third").disks[0].epoch == 5


def test_a_merge_of_the_guests_overlay_leaves_the_replica_whole(host: Host, tmp_path: Path) -> None:
    move(host.vda, host.place.root)
    top = host.overlay(VDA)
    for number in range(3):
        write(top, f"write -P {number + 9} {number * 64}k 64k")
        snapshot.run(snapshot.plan(top))
    truth = flat(top, tmp_path / "truth.raw")
    merge_run.run_step(merge_plan.plan_step(MergeRequest(image=top)))
    assert same(top, truth)
    assert all(file.exists() for file in host.place.files())
    third = move(top, tmp_path / "third")
    assert third.disks[0].epoch == 3
    assert same(overlay(third), truth)


def test_a_replicas_layer_is_neither_sealed_nor_merged_by_its_name(host: Host) -> None:
    move(host.vda, host.place.root)
    layer = host.place.files()[-1]
    with pytest.raises(Unsupported, match="layer of a replica"):
        snapshot.plan(layer)
    with pytest.raises(Unsupported, match="layer of a replica"):
        merge_set.plan(MergeRequest(image=layer, flatten=True))
    with pytest.raises(Unsupported, match="layer of a replica"):
        merge_set.plan(MergeRequest(image=host.overlay(VDA), from_layer="0.qcow2", to_layer=layer.name))


# ---- files that are not the disk's alone


def test_a_golden_base_elsewhere_is_not_this_disks(tmp_path: Path) -> None:
    """Who stands on it in a tree that nobody has named cannot be found."""
    base = build(tmp_path / "golden", [Layer(MiB, ["write -P 1 0 64k"])], names=["base.qcow2"])[0]
    tops = [tmp_path / guest / "disk.qcow2" for guest in ("web1", "web2")]
    for top in tops:
        top.parent.mkdir()
        qemu_img("create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", top)
        write(top, "write -P 2 64k 64k")
    report = move(tops[0], tmp_path / "replica", image_dirs=[base.parent])
    assert report.disks[0].fenced == (str(tops[0]), str(tops[0].with_name("disk.1.qcow2")))
    snapshot.plan(tops[1], image_dirs=[base.parent])
    # One that lies beside the disk is marked, and who stands on it elsewhere is told so.
    tops[1].rename(tmp_path / "web1" / "other.qcow2")
    (tmp_path / "store").mkdir()
    own = build(tmp_path / "store" / "own", [Layer(MiB), Layer(MiB)])
    far = tmp_path / "far.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-b", own[0], "-F", "qcow2", far)
    move(own[1], tmp_path / "replica", "own/vda")
    with pytest.raises(Conflict, match="belongs to a disk that was given away"):
        snapshot.plan(far, image_dirs=[own[0].parent])
    with pytest.raises(NotFound, match="not given away"):
        take_back(
            MigrateRequest(moves=[Move(far, "own/vda")], image_dirs=[own[0].parent]),
            DirectoryEndpoint(tmp_path / "replica"),
        )


def test_what_is_sealed_of_a_given_disk_is_not_sent(host: Host, tmp_path: Path) -> None:
    clone = clone_of(host)
    assert move(clone, host.place.root).disks[0].fenced == (str(clone),)
    request = SyncRequest(send=sealed_request(clone, VDA))
    with pytest.raises(Conflict, match="was given") as error:
        sync_set([request], DirectoryEndpoint(tmp_path / "third"))
    assert f"migrate {clone} " in (error.value.hint or "")


def test_the_epoch_of_a_top_counts_for_what_is_sealed_below(host: Host, tmp_path: Path) -> None:
    clone = clone_of(host)
    move(clone, host.place.root)
    take_back(MigrateRequest(moves=[Move(clone, VDA)]), host.endpoint)
    assert move(clone, host.place.root).disks[0].epoch == 4
    third = tmp_path / "third"
    sync_set([SyncRequest(send=sealed_request(host.overlay(VDA), VDA))], DirectoryEndpoint(third))
    assert json.loads((third / "web1%2Fvda" / "catalogue.json").read_text())["epoch"] == 4


def test_a_name_elsewhere_would_not_bear_the_mark(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    raw = tmp_path / "a" / "disk.raw"
    raw.write_bytes(b"\x05" * 65536)
    os.link(raw, tmp_path / "a" / "same.raw")
    with pytest.raises(InvalidInput, match="named twice"):
        migrate(
            MigrateRequest(moves=[Move(raw, VDA), Move(raw.with_name("same.raw"), VDB)]),
            DirectoryEndpoint(tmp_path / "replica"),
        )
    os.link(raw, tmp_path / "b" / "disk.raw")
    with pytest.raises(Unsupported, match="has no other name"):
        move(raw, tmp_path / "replica")
    assert not (tmp_path / "replica").exists()
    (tmp_path / "b" / "disk.raw").unlink()
    move(raw, tmp_path / "replica")
    with pytest.raises(Conflict, match="given"):
        move(raw.with_name("same.raw"), tmp_path / "third")


def test_a_hook_that_is_not_there_is_told_before(host: Host) -> None:
    with pytest.raises(NotFound, match="no such program"):
        host.migrate(start_hook=["/no/such/hook"])
    assert not host.place.root.exists()


# ---- what the other side says


@pytest.mark.parametrize("epoch", [1, 4, 10**40])
def test_the_destination_must_say_the_epoch(host: Host, monkeypatch: pytest.MonkeyPatch, epoch: int) -> None:
    real = guest_handover.hand_over

    def lying(*asked: Any) -> Handed:
        said = real(*asked)
        return Handed(disks=tuple(each.model_copy(update={"epoch": epoch}) for each in said.disks))

    monkeypatch.setattr(guest_handover, "hand_over", lying)
    with pytest.raises(Corrupt, match=r"it did not do what was requested|epoch: Input should be less than"):
        host.migrate()
    monkeypatch.undo()
    host.take_back()
    assert host.masters() == {f"{VDA} here", f"{VDB} here"}


def test_a_question_makes_no_disk(host: Host) -> None:
    host.migrate()
    (host.place.root / "foo").mkdir()
    mark = Active(
        name="disk.qcow2", size=MiB, cluster_size=65536, extended_l2=False, on="a" * 32, make=False, prove=False
    )
    for step in Step:
        with pytest.raises(NotFound, match="no disk"):
            ask_for_handover(host.endpoint, step, [HandedDisk(disk="foo", epoch=2, overlay=mark)], token="f" * 32)
    assert not (host.place.root / "foo" / "catalogue.json").exists()


def test_back_is_only_what_was_taken_back_by_this_handover(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy of the image was given and taken back by another host: that is in the very epoch, and not ours."""
    send(host.vda, host.endpoint, VDA)
    copy = host.directory / "copy"
    shutil.copytree(host.vda.parent, copy)
    monkeypatch.setattr(module, "_give", _dies)
    with pytest.raises(KeyboardInterrupt):
        move(host.vda, host.place.root)
    monkeypatch.undo()
    move(copy / "disk.qcow2", host.place.root)
    take_back(MigrateRequest(moves=[Move(copy / "disk.qcow2", VDA)]), host.endpoint)
    with pytest.raises(Conflict, match="another host has taken it over"):
        take_back(MigrateRequest(moves=[Move(host.vda, VDA)]), host.endpoint)
    assert not host.may_write(host.vda)


def _dies(*_arguments: Any) -> Any:
    raise KeyboardInterrupt


def test_the_hints_make_no_second_master(host: Host) -> None:
    move(host.vda, host.place.root)
    move(host.vdb, host.place.root, VDB)
    for note in host.vda.parent.glob(".snapchain-layer-*"):
        note.write_text("rubbish")
    with pytest.raises(Corrupt, match="may have said that this disk was given") as error:
        snapshot.plan(host.vda)
    assert "no other host" in (error.value.hint or "")
    shutil.rmtree(host.place.root)
    with pytest.raises(NotFound, match="there is no replica here") as gone:
        host.take_back(moves=[Move(host.vdb, VDB)])
    assert "--destination-is-gone" in (gone.value.hint or "")


def test_a_night_passes_over_what_was_given(host: Host) -> None:
    clone = clone_of(host)
    move(clone, host.place.root)
    with pytest.raises(Conflict, match="was given"):
        look(clone)
