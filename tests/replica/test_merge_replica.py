"""Merging at a replica: every kept point reads as before, its sender goes on as before, and little is moved."""

from __future__ import annotations

import os
import random
import subprocess
from pathlib import Path

import pytest

from snapchain.errors import Busy, Conflict, InvalidInput, NotFound
from snapchain.host.locks import ImageLock, LockMode
from snapchain.merge import run as merge_run, step as merge_plan
from snapchain.merge.request import MergeRequest
from snapchain.model.events import Event, Notice, Progress
from snapchain.model.retention import Policy, parse_duration
from snapchain.ops.ship.run import Divergence, ShipRequest
from snapchain.replica.points_merge import ReplicaMerge
from snapchain.replica.store import open_replica
from snapchain.source.sealing import plan as plan_snapshot, run as run_snapshot
from tests.image.mounts import mounted
from tests.ops.shipping import MiB
from tests.ops.stacks import Layer, build, flat, qemu_img, same, write
from tests.replica.conftest import DISK, Place
from tests.replica.merging import Pointed, endpoint
from tests.replica.sending import send_to_replica
from tests.servers import qemu_nbd

NOBODY = 65534


@pytest.fixture
def chain(tmp_path: Path) -> list[Path]:
    return six(tmp_path / "c")


def six(directory: Path) -> list[Path]:
    return build(directory, [Layer(4 * MiB, [f"write -P {n} {n * 64}k 512k"]) for n in range(1, 7)])


@pytest.fixture
def pointed(place: Place, tmp_path: Path) -> Pointed:
    return Pointed(place, tmp_path / "shots")


@pytest.fixture
def sent(pointed: Pointed, chain: list[Path]) -> Pointed:
    """Six points of six files, for tests in which their sender goes on."""
    return sent_of(pointed, chain)


def sent_of(pointed: Pointed, chain: list[Path]) -> Pointed:
    for path in chain:
        pointed.send(path, labels=[f"at-{path.stem}"])
    return pointed


@pytest.fixture(scope="module")
def once(tmp_path_factory: pytest.TempPathFactory) -> Pointed:
    directory = tmp_path_factory.mktemp("once")
    return sent_of(Pointed(Place(directory / "replica"), directory / "shots"), six(directory / "c"))


@pytest.fixture
def there(once: Pointed, place: Place) -> Pointed:
    """The same, for tests in which their sender does nothing more."""
    subprocess.run(["cp", "-a", str(once.place.root), str(place.root)], check=True)
    return Pointed(place, once.shots, once.shown)


def test_kept_points_read_as_before(there: Pointed) -> None:
    report = there.merge(last=2, labels=frozenset(["at-1"]))
    assert (report.points_kept, report.points_dropped) == ((2, 5, 6), (1, 3, 4))
    assert (report.layers_before, report.layers_after) == (6, 3)
    assert report.merges == (("0.qcow2", "1.qcow2"), ("2.qcow2", "3.qcow2", "4.qcow2"))
    assert report.bytes_freed > 0
    there.check(kept=[2, 5, 6])
    assert [file.name for file in there.place.files()] == ["1.qcow2", "4.qcow2", "disk.qcow2"]


def test_down_to_one_file_and_again(there: Pointed) -> None:
    before = there.place.catalogue()["layers"][-1]
    assert there.merge(last=1).layers_after == 1
    there.check(kept=[6])
    (layer,) = there.place.catalogue()["layers"]
    for field in ("id", "file", "size", "content_id", "content_sum"):
        assert layer[field] == before[field]
    assert len(layer["sources"]) == 6
    assert layer["data_bytes"] == 5 * 64 * 1024 + 512 * 1024
    generation = there.place.catalogue()["generation"]
    again = there.merge(last=1)
    assert (again.strategy, again.merges, again.points_dropped) == ("nothing", (), ())
    assert there.place.catalogue()["generation"] == generation


def test_a_dry_run_changes_nothing_and_is_right(there: Pointed) -> None:
    before = sorted((path, path.stat().st_mtime_ns, path.stat().st_mode) for path in there.place.root.rglob("*"))
    plan = there.plan(last=2)
    assert [point.kept for point in plan.points] == [False] * 4 + [True] * 2
    assert plan.points[0].reasons == ("not among the last 2",)
    assert (
        sorted((path, path.stat().st_mtime_ns, path.stat().st_mode) for path in there.place.root.rglob("*")) == before
    )
    report = there.merge(last=2)
    assert (plan.merges, plan.strategy, plan.layers_after) == (report.merges, report.strategy, report.layers_after)
    assert plan.bytes_to_move == report.bytes_moved


def test_progress_ends_with_the_whole(there: Pointed) -> None:
    events: list[Event] = []
    report = there.merging(last=3).run(on_event=events.append)
    told = [event for event in events if isinstance(event, Progress)]
    assert {event.total for event in told} == {report.bytes_moved}
    assert told[-1].done == report.bytes_moved
    assert [event.done for event in told] == sorted(event.done for event in told)


def test_a_time_zone_and_all_rules_cross(there: Pointed) -> None:
    rules = {"hourly": 1, "daily": -1, "weekly": 1, "monthly": 2, "yearly": 1, "within": parse_duration("1y5m7d2h")}
    merge = ReplicaMerge(endpoint(there.place.root), DISK, Policy(**rules), zone="Europe/Berlin")
    assert all(point.kept for point in merge.plan().points)
    with pytest.raises(InvalidInput, match="no time zone"):
        ReplicaMerge(endpoint(there.place.root), DISK, Policy(last=1), zone="../../etc/passwd").plan()


def test_many_points_come_in_several_frames(there: Pointed) -> None:
    disk = open_replica(there.place.root).disk(DISK)
    catalogue = disk.read()
    assert catalogue is not None
    last = catalogue.points[-1]
    points = tuple(last.model_copy(update={"point": number}) for number in range(6, 606))
    disk.write(catalogue.after(points=(*catalogue.points[:5], *points), next_point=606))
    assert len(there.plan(last=3).points) == 605
    report = there.merge(last=3)
    assert (report.points_kept, len(report.points_dropped), report.layers_after) == ((603, 604, 605), 602, 1)
    assert there.points() == [603, 604, 605]


def test_what_is_not_there(there: Pointed, tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="no replica"):
        ReplicaMerge(endpoint(tmp_path / "nowhere"), DISK, Policy(last=1), zone="UTC").run()
    with pytest.raises(NotFound, match="no disk 'gone'"):
        ReplicaMerge(endpoint(there.place.root), "gone", Policy(last=1), zone="UTC").run()
    with pytest.raises(InvalidInput, match="no rule"):
        there.merge()
    assert sorted(entry.name for entry in there.place.root.iterdir()) == ["snapchain-replica.json", "web1%2Fvda"]


def test_an_older_epoch_is_refused(sent: Pointed, chain: list[Path]) -> None:
    sent.send(chain[-1], epoch=3)
    for work in (merge := ReplicaMerge(endpoint(sent.place.root), DISK, Policy(last=1), zone="UTC", epoch=2),):
        with pytest.raises(Conflict, match="epoch"):
            work.run()
        with pytest.raises(Conflict, match="epoch"):
            work.plan()
    assert merge is not None
    sent.merge(last=1)
    assert sent.place.catalogue()["epoch"] == 3
    sent.check(kept=[7])


# ---- the sender afterwards


def test_a_sender_whose_files_are_apart(sent: Pointed, chain: list[Path]) -> None:
    sent.merge(last=1)
    report = sent.send(chain[-1])
    assert (report.layers_sent, report.layers_present) == (0, 6)
    seal(chain[-1], "write -P 77 2M 64k")
    report = sent.send(chain[-1])
    assert (report.layers_sent, report.data_bytes) == (1, 64 * 1024)
    sent.check(kept=[6, 7, 8])


@pytest.mark.parametrize(("keep", "first"), [(1, "0.qcow2"), (2, "1.qcow2"), (2, "3.qcow2"), (4, "1.qcow2")])
def test_a_sender_that_merged(sent: Pointed, chain: list[Path], keep: int, first: str) -> None:
    """The same layers, or others, up to the last one sent, and then beyond it: only what is new travels."""
    sent.merge(last=keep)
    merge_here(chain[-1], first)
    report = sent.send(chain[-1])
    assert report.layers_sent == 0
    seal(chain[-1], "write -P 77 2M 64k")
    assert (again := sent.send(chain[-1])).layers_sent == 1
    assert again.data_bytes == 64 * 1024
    sent.check()


@pytest.mark.parametrize(
    ("keep", "first"), [(1, "0.qcow2"), (1, "1.qcow2"), (1, "4.qcow2"), (2, "1.qcow2"), (4, "0.qcow2"), (4, "4.qcow2")]
)
def test_a_sender_that_merged_beyond_what_the_replica_has(
    sent: Pointed, chain: list[Path], keep: int, first: str
) -> None:
    sent.merge(last=keep)
    seal(chain[-1], "write -P 77 2M 64k")
    merge_here(chain[-1], first)
    assert sent.send(chain[-1]).layers_sent == 1
    sent.check()
    # What it has now is known as a part of that layer: nothing has to be read again to tell.
    events: list[Event] = []
    again = send_to_replica(ShipRequest(image=chain[-1], disk=DISK), endpoint(sent.place.root), on_event=events.append)
    assert again.layers_sent == 0
    assert not [event for event in events if isinstance(event, Notice) and "does not know" in str(event)]
    seal(chain[-1], "write -P 78 3M 64k")
    assert sent.send(chain[-1]).data_bytes == 64 * 1024
    sent.merge(last=1)
    assert sent.send(chain[-1]).layers_sent == 0


@pytest.mark.parametrize("keep", [1, 3])
def test_sources_that_are_too_many_for_one_message(
    sent: Pointed, chain: list[Path], monkeypatch: pytest.MonkeyPatch, keep: int
) -> None:
    """The older ones are told by a hash each: nothing has to be read to know them again."""
    from snapchain.replica import catalogue as source_keys

    monkeypatch.setattr(source_keys, "MAX_LAYERS", 1)  # of 2 sources
    sent.merge(last=keep)
    lowest = sent.place.catalogue()["layers"][0]
    assert (len(lowest["sources"]), len(lowest["older"])) == (2, 16 * (4 - keep + 1))
    assert not_known(sent, chain[-1]) == []
    for number in range(4):
        seal(chain[-1], f"write -P {77 + number} {number * 128}k 64k")
        assert sent.send(chain[-1]).data_bytes == 64 * 1024
        if number == 2:
            merge_here(chain[-1], "1.qcow2")
        sent.merge(last=keep)
        sent.check()
    assert not_known(sent, chain[-1]) == []
    lowest = sent.place.catalogue()["layers"][0]
    assert len(lowest["older"]) // 16 + len(lowest["sources"]) == 10 - keep + 1


@pytest.mark.parametrize("limit", ["none are left", "an old sender"])
def test_sources_that_nobody_can_be_told(
    sent: Pointed, chain: list[Path], monkeypatch: pytest.MonkeyPatch, limit: str
) -> None:
    from snapchain.replica import catalogue as source_keys
    from snapchain.replica.stream import session as opening

    monkeypatch.setattr(source_keys, "MAX_LAYERS", 1)
    if limit == "none are left":
        monkeypatch.setattr(source_keys, "MOST_OLDER", 5)
        sent.merge(last=1)
        assert (lowest := sent.place.catalogue()["layers"][0])["sources"] == []
        assert "older" not in lowest
    else:
        sent.merge(last=1)
        monkeypatch.setattr(opening, "FEATURES", ("active", "ask", "epoch"))
    assert not_known(sent, chain[-1])
    seal(chain[-1], "write -P 77 2M 64k")
    assert sent.send(chain[-1]).data_bytes == 64 * 1024
    sent.check()


def not_known(pointed: Pointed, image: Path) -> list[Event]:
    """What a sender that has nothing new says about files that it has to read to know them again."""
    events: list[Event] = []
    report = send_to_replica(ShipRequest(image=image, disk=DISK), endpoint(pointed.place.root), on_event=events.append)
    assert report.layers_sent == 0
    pointed.shown[report.point or 0] = flat(image, pointed.shots / f"{report.point}.raw")
    return [event for event in events if isinstance(event, Notice) and "does not know" in str(event)]


def test_a_layer_that_was_arriving_goes_on(pointed: Pointed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from snapchain.errors import Unavailable
    from snapchain.replica import sender
    from tests.replica.conftest import BentEndpoint, send

    monkeypatch.setattr(sender, "MARK_BYTES", MiB)
    paths = build(tmp_path / "n", [Layer(24 * MiB) for _ in range(4)])
    noise = tmp_path / "noise"
    for number, path in enumerate(paths):
        noise.write_bytes(random.Random(number).randbytes((1 if number < 3 else 12) * MiB))
        write(path, f"write -s {noise} {number}M {1 if number < 3 else 12}M")
    for path in paths[:3]:
        pointed.send(path)
    cut = BentEndpoint(pointed.place, there=lambda at, data: data if at < 8 * MiB else None)
    with pytest.raises(Unavailable, match=r"the stream ends|closed by the other side"):
        send(paths[3], cut)
    left = sorted(path.name for path in pointed.place.directory.glob(".incoming*"))
    assert left == [".incoming.json", ".incoming.qcow2"]
    assert pointed.merge(last=1).layers_after == 1
    pointed.check(kept=[3], besides=left)
    report = pointed.send(paths[3])
    assert report.resumed
    assert report.bytes_sent < 8 * MiB
    pointed.check(kept=[3, 4])


def test_layers_of_a_transfer_that_has_not_ended_stay(pointed: Pointed, chain: list[Path]) -> None:
    for path in chain[:3]:
        pointed.send(path)
    disk = open_replica(pointed.place.root).disk(DISK)
    catalogue = disk.read()
    assert catalogue is not None
    disk.write(catalogue.after(points=catalogue.points[:1]))
    assert pointed.merge(last=1).merges == ()
    assert len(pointed.place.files()) == 3


def test_a_cut_after_a_merge(sent: Pointed, chain: list[Path], tmp_path: Path) -> None:
    sent.merge(last=2)
    other = build(tmp_path / "other", [Layer(4 * MiB, ["write -P 99 0 1M"])])[0]
    report = sent.send(other, divergence=Divergence.CUT_REPLICA)
    assert report.layers_sent == 1
    sent.check(kept=[7])


def test_other_geometries(pointed: Pointed, tmp_path: Path) -> None:
    layers = [
        Layer(3 * MiB, ["write -P 1 0 2M"], "cluster_size=4k"),
        Layer(5 * MiB, ["write -P 2 1M 64k", "write -z 0 64k"], "extended_l2=on,cluster_size=128k"),
        Layer(2 * MiB + 512, ["write -P 3 1M 4k"], compress=True),
        Layer(6 * MiB, ["discard 0 1M", "write -P 4 2M 512k"], "cluster_size=1M"),
        Layer(6 * MiB, ["write -P 5 5M 1M"], "compat=0.10"),
    ]
    for path in build(tmp_path / "g", layers):
        pointed.send(path)
    assert pointed.merge(last=2).layers_after == 2
    pointed.check(kept=[4, 5])
    pointed.merge(last=1)
    pointed.check(kept=[5])


# ---- what others use


def test_layers_that_are_open_stay(there: Pointed) -> None:
    with qemu_nbd(there.place.directory / "2.qcow2", "-r"):
        report = there.merge(last=1)
        assert report.merges == (("3.qcow2", "4.qcow2", "disk.qcow2"),)
        assert [each.file for each in report.staying] == ["0.qcow2", "1.qcow2", "2.qcow2"]
        assert "qemu-nbd" in report.staying[0].reason
    there.check(kept=[6])
    assert there.merge(last=1).layers_after == 1
    there.check(kept=[6])


def test_a_lock_on_one_layer(there: Pointed) -> None:
    with ImageLock(there.place.directory / "2.qcow2", LockMode.READ):
        report = there.merge(last=1)
    assert report.merges == (("0.qcow2", "1.qcow2"), ("3.qcow2", "4.qcow2", "disk.qcow2"))
    assert [each.file for each in report.staying] == ["2.qcow2", "1.qcow2"]
    there.check(kept=[6])


def test_a_reader_of_the_newest_layer_stops_it_all(there: Pointed) -> None:
    with qemu_nbd(there.place.directory / "disk.qcow2", "-r"):
        report = there.merge(last=1)
        assert (report.merges, report.strategy, report.points_dropped) == ((), "nothing", (1, 2, 3, 4, 5))
        assert len(report.staying) == 5
    there.check(kept=[6])


def test_a_guest_has_written_to_an_overlay_on_the_newest_layer(there: Pointed, tmp_path: Path) -> None:
    overlay = guest_on(there, "disk.qcow2")
    shown = flat(overlay, tmp_path / "guest.raw")
    assert there.merge(last=1).layers_after == 1
    assert same(overlay, shown)
    there.check(kept=[6], besides=["active"])


def test_a_guest_stands_on_an_older_layer(there: Pointed, tmp_path: Path) -> None:
    overlay = guest_on(there, "2.qcow2")
    shown = flat(overlay, tmp_path / "guest.raw")
    report = there.merge(last=1)
    assert report.merges == (("0.qcow2", "1.qcow2", "2.qcow2"), ("3.qcow2", "4.qcow2", "disk.qcow2"))
    assert [(each.file, each.reason) for each in report.staying] == [("2.qcow2", f"{overlay} depends on it")]
    assert same(overlay, shown)
    there.check(kept=[6], besides=["active"])


def test_a_file_with_a_second_name_stays(there: Pointed) -> None:
    os.link(there.place.directory / "1.qcow2", there.place.root / "mine")
    report = there.merge(last=2)
    assert report.merges == ()
    assert "hard links" in report.staying[0].reason
    there.check(kept=[5, 6])
    (there.place.root / "mine").unlink()
    assert there.merge(last=2).layers_after == 2


def test_another_that_changes_the_disk(there: Pointed, monkeypatch: pytest.MonkeyPatch) -> None:
    from snapchain.replica import store, store as waiting

    monkeypatch.setattr(waiting, "LIMITS", {})
    disk = store.open_replica(there.place.root).disk(DISK)
    with disk.locked(make=False), pytest.raises(Busy, match=r"a transfer"):
        there.merge(last=1)
    with disk.locked(make=False, work=store.Work.MERGE), pytest.raises(Busy, match=r"a merge"):
        there.merge(last=1)
    there.check(kept=[1, 2, 3, 4, 5, 6])


# ---- what it costs


@pytest.mark.root
@pytest.mark.parametrize("kind", ["ext4", "xfs"])
def test_a_small_overlay_does_not_rewrite_a_big_root(kind: str, tmp_path: Path) -> None:
    with mounted(kind, tmp_path) as there:
        pointed = Pointed(Place(there / "replica"), tmp_path / "shots")
        paths = build(tmp_path / "c", [Layer(96 * MiB) for _ in range(3)])
        noise = tmp_path / "noise"
        noise.write_bytes(random.Random(1).randbytes(64 * MiB))
        write(paths[0], f"write -s {noise} 0 64M")
        for number, path in enumerate(paths[1:]):
            write(path, f"write -P {number + 3} {8 * number}M 256k")
        for path in paths:
            pointed.send(path)
        before = written()
        report = pointed.merge(last=1)
        moved = written() - before
        pointed.check(kept=[3])
        if kind == "ext4":
            assert report.strategy == "commit"
            assert report.bytes_moved == 2 * 256 * 1024
            assert moved < 4 * MiB
        else:
            assert report.strategy == "new-file"  # shared, not copied
            assert moved < 8 * MiB
        assert report.bytes_freed > 0


def written() -> int:
    """Bytes that this process has given to write calls and their kin."""
    said = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(said["write_bytes"])


@pytest.mark.root
def test_a_user_who_is_not_root(there: Pointed, tmp_path: Path) -> None:
    """Layers are read-only: their owner writes into them all the same where that moves least."""
    other = Place(tmp_path / "other")
    subprocess.run(["cp", "-a", str(there.place.root), str(other.root)], check=True)
    foreseen = Pointed(other, there.shots, there.shown).merge(last=2)  # and all is imported that a user may not read
    subprocess.run(["chown", "-R", f"{NOBODY}:{NOBODY}", str(there.place.root)], check=True)
    for path in (tmp_path, *tmp_path.parents):
        if path.stat().st_mode & 0o055 == 0:  # pytest's own
            path.chmod(0o755)
    said, say = os.pipe()
    if not (child := os.fork()):
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
        try:
            os.write(say, f"{there.plan(last=2).strategy} {there.merge(last=2).strategy}".encode())
        finally:
            os._exit(0)
    os.close(say)
    with os.fdopen(said) as heard:
        words = heard.read().split()
    os.waitpid(child, 0)
    assert words == [foreseen.strategy] * 2
    there.check(kept=[5, 6])
    assert all(path.stat().st_uid == NOBODY for path in there.place.files())


# ----


def seal(image: Path, *writes: str) -> None:
    """A snapshot, and then the guest goes on writing."""
    run_snapshot(plan_snapshot(image))
    write(image, *writes)


def merge_here(image: Path, first: str) -> None:
    merge_run.run_step(merge_plan.plan_step(MergeRequest(image=image, from_layer=first)))


def guest_on(pointed: Pointed, layer: str) -> Path:
    active = pointed.place.directory / "active"
    active.mkdir()
    overlay = active / "guest.qcow2"
    backing = pointed.place.directory / layer
    qemu_img("create", "-q", "-f", "qcow2", "-b", str(backing), "-F", "qcow2", str(overlay))
    write(overlay, "write -P 99 1M 128k")
    return overlay
