"""What arrives at a replica is the chain, whatever the chain is, and whatever is there already."""

from __future__ import annotations

import os
import random
import shutil
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from fixtures.qcow2_bytes import l2_entry, put_u64, u64
from snapchain.errors import Busy, Conflict, Corrupt, Diverged, InvalidInput, Unsupported
from snapchain.host.batches import Buffer
from snapchain.host.channel import Channel
from snapchain.host.locks import ImageLock, LockMode
from snapchain.image import scan
from snapchain.image.qcow2.write import Qcow2Writer
from snapchain.model.events import Event, Progress
from snapchain.model.inventory import Wanted
from snapchain.ops.ship.run import Divergence, Files, Scope, ShipRequest, send_blindly
from snapchain.replica import arrival, sender
from snapchain.replica.endpoint import DirectoryEndpoint
from snapchain.replica.send_queue import SendQueue
from snapchain.replica.stream import session
from snapchain.replica.stream.frames import Kind
from tests.hostile.wire import Frame, meddling, pass_on
from tests.ops.shipping import MiB, random_stack
from tests.ops.stacks import Layer, build, flat, qemu_img, same, write
from tests.replica.conftest import DISK, Place
from tests.replica.sending import plan_send, send_to_replica
from tests.waiting import HANG


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 1 << 32), files=st.sampled_from(Files), one_by_one=st.booleans())
def test_random_stacks_arrive(
    tmp_path_factory: pytest.TempPathFactory, seed: int, files: Files, one_by_one: bool
) -> None:
    directory = tmp_path_factory.mktemp("stack")
    stack = random_stack(directory / "source", seed)
    place = Place(directory / "replica")
    for file, shown in zip(stack.files, stack.shown, strict=True):
        if one_by_one or file == stack.files[-1]:
            place.send(file, files=files)
            place.check(shown)


@pytest.mark.parametrize("seed", range(4))
def test_what_was_read_while_data_came_is_not_read_again(
    tmp_path: Path, place: Place, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    stack = random_stack(tmp_path / "source", seed)

    def again(*_: object, **__: object) -> None:
        pytest.fail("the tables were not taken for what they are")

    monkeypatch.setattr(arrival, "counted", again)
    monkeypatch.setattr(sender, "MARK_BYTES", 1)
    place.send(stack.files[-1], files=Files.EACH)
    place.check(stack.shown[-1])


@pytest.mark.parametrize("marks", [1, 1 << 30])
def test_bytes_that_change_on_the_disk_are_seen(
    tmp_path: Path, place: Place, monkeypatch: pytest.MonkeyPatch, marks: int
) -> None:
    (path,) = build(tmp_path / "c", [Layer(8 * MiB, ["write -P 1 0 8M"])])
    write = Qcow2Writer.write_pieces

    def bent(self: Qcow2Writer, pieces: Sequence[tuple[int, Buffer]]) -> None:
        write(self, [(at, bytes(data)[:-1] + b"x" if at == 4 * MiB else data) for at, data in pieces])

    monkeypatch.setattr(sender, "MARK_BYTES", marks)
    monkeypatch.setattr(Qcow2Writer, "write_pieces", bent)
    with pytest.raises(Corrupt, match="thrown away"):
        place.send(path)
    monkeypatch.setattr(Qcow2Writer, "write_pieces", write)
    assert not (place.directory / ".incoming.qcow2").exists()
    assert place.send(path).layers_sent == 1


def test_tables_that_lead_elsewhere_are_not_published(
    tmp_path: Path, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All bytes arrived and were counted by the layout; the file's own tables show them in other places."""
    (path,) = build(tmp_path / "c", [Layer(MiB, ["write -P 1 0 64k", "write -P 2 64k 64k"])])
    finish = Qcow2Writer.finish

    def swapped(self: Qcow2Writer) -> None:
        finish(self)
        incoming = place.directory / ".incoming.qcow2"
        first, second = l2_entry(incoming), l2_entry(incoming, 1)
        values = u64(incoming, first), u64(incoming, second)
        put_u64(incoming, first, values[1])
        put_u64(incoming, second, values[0])

    with monkeypatch.context() as patch:
        patch.setattr(Qcow2Writer, "finish", swapped)
        with pytest.raises(Corrupt, match=r"what arrived shows the content [0-9a-f]{64}, announced was .* thrown away"):
            place.send(path)
    assert {entry.name for entry in place.directory.iterdir()} == {".lock"}
    assert place.send(path).layers_sent == 1


def test_each_file_keeps_its_name_and_its_link(tmp_path: Path, place: Place) -> None:
    paths = build(tmp_path / "c", [Layer(MiB, ["write -P 1 0 64k"]), Layer(MiB), Layer(2 * MiB, ["write -P 2 64k 4k"])])
    report = place.send(paths[-1], files=Files.EACH, labels=["first"])
    assert [file.name for file in place.files()] == ["0.qcow2", "1.qcow2", "disk.qcow2"]
    with scan(place.files()[-1]) as chain:
        assert [file.backing.name if file.backing else None for file in chain.files] == [None, "0.qcow2", "1.qcow2"]
        assert [file.backing.format if file.backing else None for file in chain.files] == [None, "qcow2", "qcow2"]
        assert [file.size for file in chain.files] == [MiB, MiB, 2 * MiB]
    (point,) = place.catalogue()["points"]
    assert (point["labels"], point["content_id"], point["point"]) == (["first"], report.content_id, report.point)


def test_pending_overlays_travel_as_one_layer_without_what_they_overwrote(tmp_path: Path, place: Place) -> None:
    layers = [Layer(4 * MiB, [f"write -P {n} 0 2M"]) for n in range(1, 6)]
    paths = build(tmp_path / "c", layers)
    report = place.send(paths[-1])
    assert (report.layers_sent, report.data_bytes) == (2, 2 * 2 * MiB), "the root, and what the top has left of them"
    place.check(flat(paths[-1], tmp_path / "flat"))


def test_root_and_top_travel_apart_unless_much_of_them_is_overwritten(tmp_path: Path, place: Place) -> None:
    rewrites = ["write -P 1 0 256M", "write -P 2 3M 32M", "write -P 3 8M 32M", "write -P 4 250M 8M"]
    paths = build(tmp_path / "c", [Layer(512 * MiB, [one]) for one in rewrites])
    report = place.send(paths[-1])
    assert (report.layers_sent, report.data_bytes) == (2, (256 + 8) * MiB), "6 MiB of the top's are below it too"
    assert place.send(paths[-1]).layers_sent == 0
    place.check(flat(paths[-1], tmp_path / "flat"))


def test_a_top_that_nobody_has_sealed_takes_nothing_with_it_when_it_is_written_to(tmp_path: Path, place: Place) -> None:
    rewrites = ["write -P 1 0 128M", "write -P 2 0 32M", "write -P 3 0 32M"]
    paths = build(tmp_path / "c", [Layer(512 * MiB, [one]) for one in rewrites])
    first = place.send(paths[-1])
    assert (first.layers_sent, first.data_bytes) == (2, (128 + 32) * MiB)
    write(paths[-1], "write -P 4 40M 64k")
    again = place.send(paths[-1])
    assert (again.layers_sent, again.data_bytes, again.layers_present) == (1, 65536, 1)
    place.check(flat(paths[-1], tmp_path / "flat"))
    assert place.send(paths[-1]).layers_sent == 0
    write(paths[-1], "write -P 5 50M 64k")
    cut = place.send(paths[-1], divergence=Divergence.CUT_REPLICA)
    assert (cut.layers_sent, cut.data_bytes) == (1, 32 * MiB + 2 * 65536), "its user wants the chain as it is here"
    place.check(flat(paths[-1], tmp_path / "flat"))


def test_a_top_that_went_with_others_and_was_written_to_since_is_compared(tmp_path: Path, place: Place) -> None:
    paths = build(tmp_path / "c", [Layer(512 * MiB, ["write -P 1 0 64M"]), Layer(512 * MiB, ["write -P 2 0 64M"])])
    assert place.send(paths[-1]).layers_sent == 1
    write(paths[-1], "write -P 4 40M 64k")
    again = place.send(paths[-1])
    assert (again.layers_sent, again.data_bytes) == (1, 65536)
    place.check(flat(paths[-1], tmp_path / "flat"))


def test_a_replica_that_is_too_old_for_a_comparison_refuses_the_plan_and_the_run(
    tmp_path: Path, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = build(tmp_path / "c", [Layer(MiB, ["write -P 1 0 64k"])])
    place.send(paths[-1])
    before = place.catalogue()
    write(paths[-1], "write -P 2 0 64k")
    monkeypatch.setattr(session, "FEATURES", tuple(each for each in session.FEATURES if each != "leaves"))
    request = ShipRequest(image=paths[-1], disk=DISK)
    for attempt in (plan_send, send_to_replica):
        with pytest.raises(Unsupported, match="does not support 'leaves'") as caught:
            attempt(request, DirectoryEndpoint(place.root))
        assert caught.value.hint == "upgrade it there"
    assert place.catalogue() == before
    place.send(paths[-1], divergence=Divergence.CUT_REPLICA)
    place.check(flat(paths[-1], tmp_path / "flat"))


def test_bytes_that_were_written_again_do_not_travel(tmp_path: Path, place: Place) -> None:
    noise = tmp_path / "noise"
    noise.write_bytes(random.Random(1).randbytes(2 * MiB))
    paths = build(tmp_path / "c", [Layer(4 * MiB), Layer(4 * MiB)])
    write(paths[0], f"write -s {noise} 0 2M")
    place.send(paths[0])
    write(paths[1], f"write -s {noise} 0 2M", "write -P 7 1M 4k", "write -P 0 3M 64k", "write -P 9 192k 512")
    report = place.send(paths[1])
    assert report.data_bytes == 2 * MiB + 65536
    assert report.carried_bytes == 2 * 4096
    assert report.bytes_sent < 10_000
    place.check(flat(paths[1], tmp_path / "flat"))


def test_a_second_run_sends_nothing(tmp_path: Path, place: Place) -> None:
    paths = build(tmp_path / "c", [Layer(MiB, ["write -P 1 0 1M"]), Layer(MiB, ["write -P 2 0 64k"]), Layer(MiB)])
    place.send(paths[-1])
    report = place.send(paths[-1])
    assert (report.layers_sent, report.data_bytes, report.point) == (0, 0, 2)
    assert report.bytes_sent < 2000


def test_the_sealed_part_alone(tmp_path: Path, place: Place) -> None:
    paths = build(tmp_path / "c", [Layer(MiB, ["write -P 1 0 1M"]), Layer(MiB, ["write -P 2 0 64k"])])
    shown = flat(paths[0], tmp_path / "flat")
    place.send(paths[-1], scope=Scope.SEALED)
    place.check(shown)
    write(paths[-1], "write -P 3 0 4k")
    assert place.send(paths[-1], scope=Scope.SEALED).layers_sent == 0


def test_behind_by_a_merge(tmp_path: Path, place: Place) -> None:
    paths = build(tmp_path / "c", [Layer(MiB, [f"write -P {n} {n * 64}k 128k"]) for n in range(1, 5)])
    for path in paths[:3]:
        place.send(path)
    with scan(paths[-1]) as chain:
        old = [Wanted(file.fingerprint) for file in chain.files]
    qemu_img("rebase", "-q", "-f", "qcow2", "-b", paths[0].name, "-F", "qcow2", paths[2])
    qemu_img("rebase", "-u", "-q", "-f", "qcow2", "-b", paths[2].name, "-F", "qcow2", paths[3])
    with scan(paths[-1]) as chain:
        merged, top = chain.files[1:]
        lineage = [Wanted(merged.fingerprint, tuple(old[1:3])), Wanted(top.fingerprint, (old[3],))]
    report = place.send(paths[-1], lineage=lineage)
    assert (report.layers_present, report.layers_sent) == (2, 1)
    place.check(flat(paths[-1], tmp_path / "flat"))
    assert [point["point"] for point in place.catalogue()["points"]] == [1, 2, 3, 4]


def test_the_replica_holds_a_part_of_what_was_merged(tmp_path: Path, place: Place) -> None:
    paths = build(tmp_path / "c", [Layer(MiB, [f"write -P {n} {n * 64}k 128k"]) for n in range(1, 4)])
    place.send(paths[1])
    with scan(paths[-1]) as chain:
        old = [Wanted(file.fingerprint) for file in chain.files]
    qemu_img("rebase", "-q", "-f", "qcow2", "-b", paths[0].name, "-F", "qcow2", paths[2])
    with scan(paths[-1]) as chain:
        lineage = [Wanted(chain.files[1].fingerprint, tuple(old[1:]))]
    assert place.send(paths[-1], lineage=lineage).layers_sent == 1
    place.check(flat(paths[-1], tmp_path / "flat"))


def test_files_with_new_identities_are_known_by_what_they_show(tmp_path: Path, place: Place) -> None:
    paths = build(tmp_path / "c", [Layer(MiB, [f"write -P {n} {n * 64}k 128k"]) for n in range(1, 5)])
    for path in paths[:3]:
        place.send(path)
    qemu_img("rebase", "-q", "-f", "qcow2", "-b", paths[0].name, "-F", "qcow2", paths[2])
    qemu_img("rebase", "-u", "-q", "-f", "qcow2", "-b", paths[2].name, "-F", "qcow2", paths[3])
    paths[1].unlink()
    report = place.send(paths[-1])
    assert (report.layers_present, report.layers_sent) == (2, 1)
    place.check(flat(paths[-1], tmp_path / "flat"))
    copies = tmp_path / "copies"
    shutil.copytree(tmp_path / "c", copies)
    report = place.send(copies / paths[-1].name)
    assert (report.layers_sent, report.data_bytes) == (0, 0)


def test_two_ways_are_told_and_nothing_is_overwritten(tmp_path: Path, place: Place) -> None:
    base = [Layer(MiB, ["write -P 1 0 1M"]), Layer(MiB, ["write -P 2 0 64k"])]
    paths = build(tmp_path / "c", base, names=["base.qcow2", "left.qcow2"])
    place.send(paths[-1])
    before = place.catalogue()
    right = tmp_path / "c" / "right.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", right)
    write(right, "write -P 3 0 64k")
    with pytest.raises(Diverged, match=r"both sides have gone on from base.qcow2") as caught:
        place.send(right)
    assert "base.qcow2: here right.qcow2, at the replica left.qcow2" in caught.value.message
    assert place.catalogue() == before
    place.send(right, disk="web1/right")
    place.send(right, divergence=Divergence.CUT_REPLICA)
    place.check(flat(right, tmp_path / "flat"))
    assert [file.name for file in place.files()] == ["base.qcow2", "right.qcow2"]
    assert [point["point"] for point in place.catalogue()["points"]] == [2]


def test_the_replica_is_ahead(tmp_path: Path, place: Place) -> None:
    paths = build(tmp_path / "c", [Layer(MiB, ["write -P 1 0 1M"]), Layer(MiB, ["write -P 2 0 64k"])])
    place.send(paths[-1])
    with pytest.raises(Diverged, match=r"the replica is ahead: it holds disk\.qcow2"):
        place.send(paths[0])


def test_what_is_in_use_is_not_cut_off(tmp_path: Path, place: Place) -> None:
    one, other = (build(tmp_path / name, [Layer(MiB, [f"write -P {ord(name)} 0 1M"])])[0] for name in "ab")
    place.send(one)
    with ImageLock(place.files()[0], LockMode.READ), pytest.raises(Busy, match=r"somebody .* has it open for reading"):
        place.send(other, divergence=Divergence.CUT_REPLICA)
    guest = place.directory / "guest.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-b", place.files()[0].name, "-F", "qcow2", guest)
    with pytest.raises(Conflict, match=r"guest\.qcow2 depends on it"):
        place.send(other, divergence=Divergence.CUT_REPLICA)
    guest.unlink()
    place.check(flat(one, tmp_path / "flat"))


def test_names_are_made_safe_and_unique(tmp_path: Path, place: Place) -> None:
    paths = build(tmp_path / "c", [Layer(MiB, ["write -P 1 0 64k"]), Layer(MiB)], names=["r+ ot é.qcow2", "top.qcow2"])
    place.send(paths[0])
    (place.directory / "top.qcow2").write_bytes(b"somebody's")
    write(paths[1], "write -P 2 0 64k")
    place.send(paths[1])
    first, second = (file.name for file in place.files())
    assert first == "r+_ot___.qcow2"
    assert second.startswith("top-")
    assert (place.directory / "top.qcow2").read_bytes() == b"somebody's"


def test_a_directory_of_other_things_is_no_replica(tmp_path: Path) -> None:
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "thesis.tex").write_text("")
    image = build(tmp_path / "c", [Layer(MiB)])[0]
    with pytest.raises(InvalidInput, match="holds other things"):
        Place(tmp_path / "r").send(image)


@pytest.mark.parametrize("disk", ["", "a@b", "a::b", "/a", "a/", "a//b", "a\n", "x" * 201])
def test_names_that_no_disk_has(tmp_path: Path, place: Place, disk: str) -> None:
    image = build(tmp_path / "c", [Layer(MiB)])[0]
    with pytest.raises(InvalidInput, match="cannot name a disk"):
        place.send(image, disk=disk)


@pytest.mark.parametrize("disk", ["..", ".", "../../etc", "-rf", "a b", "ä/%2F", "con.qcow2"])
def test_no_name_leaves_the_directory(tmp_path: Path, place: Place, disk: str) -> None:
    image = build(tmp_path / "c", [Layer(MiB, ["write -P 1 0 64k"])])[0]
    place.send(image, disk=disk)
    inside = [entry for entry in place.root.iterdir() if entry.is_dir()]
    assert len(inside) == 1
    assert (inside[0] / "catalogue.json").exists()
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["c", "replica"]


def test_two_senders_of_one_disk(tmp_path: Path, place: Place) -> None:
    from snapchain.replica.store import open_replica

    image = build(tmp_path / "c", [Layer(MiB)])[0]
    with (
        open_replica(place.root, make=True).disk("web1/vda").locked(make=True),
        pytest.raises(Busy, match="another snapchain is changing this disk"),
    ):
        place.send(image)
    place.send(image)


def test_four_disks_at_once(tmp_path: Path, place: Place) -> None:
    chains = [build(tmp_path / str(n), [Layer(8 * MiB, [f"write -P {n + 1} 0 8M"]), Layer(8 * MiB)]) for n in range(4)]
    with ThreadPoolExecutor(4) as pool:
        runs = [pool.submit(place.send, paths[-1], disk=f"web/{n}") for n, paths in enumerate(chains)]
        assert [run.result().layers_sent for run in runs] == [1] * 4
    for n, paths in enumerate(chains):
        file = place.root / f"web%2F{n}" / "0.qcow2"
        assert same(file, flat(paths[0], tmp_path / "flat"))


def test_a_limited_rate(tmp_path: Path, place: Place) -> None:
    noise = tmp_path / "noise"
    noise.write_bytes(random.Random(1).randbytes(4 * MiB))
    paths = build(tmp_path / "c", [Layer(4 * MiB)])
    write(paths[0], f"write -s {noise} 0 4M")
    report = place.send(paths[0], limit_rate=4 * MiB)
    # A quarter of a second's worth is saved up, and the last frame is waited for by nobody.
    assert 0.2 < report.seconds < 10
    place.check(flat(paths[0], tmp_path / "flat"))


def test_progress_counts_what_is_on_the_wire(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Frames that wait in the queue have not been sent: while the wire is held up, the bar stands still."""
    writes = [f"write -P {n + 1} {n}M 1M" for n in range(32)]
    image = build(tmp_path / "vm", [Layer(32 * MiB, writes)])[-1]
    shown: list[int] = []
    early: list[int] = []
    gate, given = threading.Event(), 0
    put = SendQueue.put

    class Held(Channel):
        def write(self, data: Buffer | Sequence[Buffer]) -> None:
            if threading.current_thread().name == "send queue":
                gate.wait()
            super().write(data)

    def counted(self: SendQueue, kind: Kind, *body: Buffer, **more: Any) -> int:
        nonlocal given
        given += kind is Kind.DATA
        if given == 3 and not gate.is_set():
            early.extend(shown)
            gate.set()
        return put(self, kind, *body, **more)

    monkeypatch.setattr(SendQueue, "put", counted)
    with (tmp_path / "stream").open("wb") as out:
        channel = Held(-1, os.dup(out.fileno()), peer="stdout")
        send_blindly(ShipRequest(image=image, disk="x"), channel, on_event=lambda event: shown.append(done_of(event)))
    assert given >= 3
    assert early
    assert set(early) == {0}, "two frames were given, and none was sent"
    assert shown == sorted(shown)
    assert shown[-1] == 32 * MiB


def done_of(event: Event) -> int:
    assert isinstance(event, Progress)
    return event.done


def test_a_point_that_was_not_published_is_no_success(place: Place, tmp_path: Path) -> None:
    (image,) = build(tmp_path / "c", [Layer(MiB, ["write -P 1 0 64k"])])

    def without_points(frames: Iterator[Frame]) -> Iterator[Frame | bytes]:
        return (frame for frame in frames if frame.kind != Kind.POINT)

    with (
        meddling(without_points, pass_on, patience=HANG),
        pytest.raises(Corrupt, match="published 0 points of the 1 that were sent") as caught,
    ):
        place.send(image)
    assert caught.value.subject == f"dir:{place.root}"
    assert not place.catalogue()["points"]
