"""Copies from each kind of source and to each kind of store, with real images: judged by qemu-img compare."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from snapchain.destination.records import DiskRecord
from snapchain.errors import Conflict, Unavailable, Unsupported
from snapchain.host.channel import Channel
from snapchain.host.retry import RetryPolicy
from snapchain.model.events import Event, Notice
from snapchain.model.guest_state import GuestChange, TakenDisk, Transition, Vouched
from snapchain.model.retention import DropPoints
from snapchain.objects import open_store
from snapchain.objects.store import Data, Refused, StoreWrapper
from snapchain.ops.copy.plan import plan
from snapchain.ops.copy.request import CopyRequest
from snapchain.ops.copy.run import run
from snapchain.ops.failover.request import FailoverRequest
from snapchain.ops.failover.run import Failover
from snapchain.ops.guest_points import GuestView, fault_of, guest_named
from snapchain.ops.guest_records import read_record
from snapchain.ops.other_destinations import Reach
from snapchain.replica import copying
from snapchain.replica.destination import ReplicaDestination
from snapchain.replica.endpoint import DirectoryEndpoint
from snapchain.repository.destination import RepositoryDestination
from snapchain.repository.points_merge import RepositoryMerge
from snapchain.repository.repository import Repository
from tests.ops.guest_points import GUEST, Guest
from tests.ops.shipping import DISK, MiB, delivery, local, random_stack, restore, ship
from tests.ops.stacks import Layer, build, flat, qemu_img, write
from tests.replica.conftest import BentEndpoint, Place
from tests.repository.synthetic import again, repository
from tests.servers import S3Server

KiB = 1 << 10


def check_restores(shown: dict[int, Path], to: Repository, scratch: Path, disk: str = DISK) -> None:
    """Each point restores to the bytes of its moment, says qemu-img."""
    scratch.mkdir(exist_ok=True)
    for number, path in shown.items():
        restore(to, scratch / f"{number}.out.qcow2", number, disk=disk)
        qemu_img("compare", "-f", "raw", "-F", "qcow2", path, scratch / f"{number}.out.qcow2")


def contents(records: tuple[DiskRecord, ...]) -> dict[tuple[str, int], str]:
    return {(disk.name, point.point): point.content_id for disk in records for point in disk.points}


@pytest.mark.parametrize("seed", [0, *(pytest.param(n, marks=pytest.mark.soak) for n in range(1, 12))])
def test_a_replica_is_copied_into_a_repository(tmp_path: Path, seed: int) -> None:
    """All of its points, some of them first: over one connection for those that follow on each other."""
    stack = random_stack(tmp_path / "stack", seed, layers=5)
    source = ReplicaDestination(DirectoryEndpoint(tmp_path / "replica"))
    to = repository()
    for place in (1, 4):
        with delivery(source, stack.files[place], DISK, each_layer=True) as work:
            work.run()
        report = run(CopyRequest(), source, RepositoryDestination(again(to)))
        assert report.ok
    copied = RepositoryDestination(again(to)).disks()
    assert contents(copied) == contents(source.disks())
    check_restores(dict(enumerate(stack.shown, 1)), to, tmp_path)
    assert run(CopyRequest(), source, RepositoryDestination(again(to))).points == 0
    assert plan(CopyRequest(), source, RepositoryDestination(repository())).points == 5


def test_a_replica_whose_file_was_changed_gives_no_later_point(tmp_path: Path) -> None:
    stack = random_stack(tmp_path / "stack", 4, layers=3)
    root = tmp_path / "replica"
    source, to = ReplicaDestination(DirectoryEndpoint(root)), repository()
    with delivery(source, stack.files[-1], DISK, each_layer=True) as work:
        work.run()
    damaged = sorted(path for path in root.rglob("*.qcow2"))[1]
    damaged.chmod(0o644)
    write(damaged, "write -P 77 0 512")
    report = run(CopyRequest(), source, RepositoryDestination(again(to)))
    (disk,) = report.disks
    assert [point.point for point in disk.points] == [1]
    assert [(each.point, each.kind) for each in disk.refused] == [(2, "corrupt"), (3, "corrupt")]
    assert "recorded is" in disk.refused[0].message


class MergedMeanwhile(DirectoryEndpoint):
    """Points 1 and 2 are dropped when it is connected to for the nth time."""

    def __init__(self, directory: Path, number: int) -> None:
        super().__init__(directory)
        self._left, self._there = number, directory

    @contextmanager
    def connect(self) -> Iterator[Channel]:
        self._left -= 1
        if not self._left:
            there = ReplicaDestination(DirectoryEndpoint(self._there))
            there.merging(DISK, DropPoints(frozenset({1, 2}))).run()
        with super().connect() as channel:
            yield channel


def test_a_replica_that_merges_meanwhile_is_looked_at_again(tmp_path: Path) -> None:
    stack = random_stack(tmp_path / "stack", 5, layers=3)
    root, to = tmp_path / "replica", repository()
    with delivery(ReplicaDestination(DirectoryEndpoint(root)), stack.files[-1], DISK, each_layer=True) as work:
        work.run()
    # After two lists of its points, and the maps of its layers.
    source = ReplicaDestination(MergedMeanwhile(root, 4))
    report = run(CopyRequest(), source, RepositoryDestination(again(to)))
    assert (report.ok, [point.point for point in report.disks[0].points]) == (True, [3])
    check_restores({3: stack.shown[2]}, to, tmp_path)


def test_a_lost_connection_is_opened_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Noise, so that there are many frames; each connection carries so many bytes and is cut."""
    monkeypatch.setattr(copying, "_POLICY", RetryPolicy(first=0.001))
    noise = tmp_path / "noise"
    noise.write_bytes(random.Random(1).randbytes(9 * MiB))
    layers = [
        Layer(12 * MiB, [f"write -s {noise} 1M 9M"]),
        Layer(11 * MiB, [f"write -s {noise} 3M 2M", "write -z 0 2M"]),
    ]
    files = build(tmp_path / "chain", layers)
    place = Place(tmp_path / "replica")
    with delivery(ReplicaDestination(DirectoryEndpoint(place.root)), files[-1], DISK, each_layer=True) as work:
        work.run()
    connections: list[int] = []

    def cut(at: int, data: bytes) -> bytes | None:
        if not at:
            connections.append(0)
        return data if at < 3 * MiB or len(connections) > 8 else None

    heard: list[Event] = []
    to = repository()
    source = ReplicaDestination(BentEndpoint(place, back=cut))
    assert run(CopyRequest(), source, RepositoryDestination(again(to)), on_event=heard.append).ok
    assert any("trying again" in each.message for each in heard if isinstance(each, Notice))
    shown = {n: flat(path, tmp_path / f"{n}.raw") for n, path in enumerate(files, 1)}
    check_restores(shown, to, tmp_path / "out")


def test_a_replica_takes_no_copies(tmp_path: Path) -> None:
    source = repository()
    with pytest.raises(Unsupported, match="points are copied to repositories, and this is a replica"):
        run(
            CopyRequest(),
            RepositoryDestination(source),
            ReplicaDestination(DirectoryEndpoint(tmp_path / "replica")),
        )


def test_after_a_merge_in_the_source_only_the_new_data_is_read(tmp_path: Path) -> None:
    size = 4 * MiB
    layers = [Layer(size, ["write -P 1 0 4M"])]
    layers += [Layer(size, [f"write -P {n} {n * 128}k 64k", f"write -P {n} {n}k 512"]) for n in range(2, 7)]
    files = build(tmp_path / "chain", layers)
    source, to = local(tmp_path / "source"), repository()
    read: list[int] = []
    for number, path in enumerate(files):
        ship(path, source)
        if number == 3:
            RepositoryMerge(again(source), DISK, DropPoints(frozenset({2, 3}))).run()
        if number % 2:
            report = run(CopyRequest(), RepositoryDestination(again(source)), RepositoryDestination(again(to)))
            assert report.ok
            read.append(report.bytes_read)
    assert read == [4 * MiB + 2 * 64 * KiB, 4 * 64 * KiB, 4 * 64 * KiB]
    assert RepositoryDestination(again(to)).disks(DISK)[0].layers == 5
    check_restores({4: flat(files[3], tmp_path / "shown")}, to, tmp_path)


def test_a_host_that_ships_to_the_copy_from_now_on_sends_only_what_is_new(tmp_path: Path) -> None:
    """After the move to another bucket the image is recognised there, by each file of its chain."""
    layers = [Layer(2 * MiB, [f"write -P {n + 1} {n * 128}k 64k"]) for n in range(4)]
    files = build(tmp_path / "chain", layers)
    source, to = local(tmp_path / "source"), repository()
    for path in (files[0], files[2]):  # the second layer is made of two files
        ship(path, source)
    assert run(CopyRequest(), RepositoryDestination(again(source)), RepositoryDestination(again(to))).ok
    assert ship(files[2], to).layers_sent == 0
    report = ship(files[3], to)
    assert (report.layers_sent, report.layers_present, report.bytes_read) == (1, 3, 64 * KiB)


# --- guests


def the_guest(at: Repository) -> GuestView:
    view = guest_named(RepositoryDestination(again(at)).disks(), GUEST)
    assert view is not None
    return view


def test_guest_points_are_copied_whole(tmp_path: Path) -> None:
    source, to = local(tmp_path / "source"), repository()
    guest = Guest(tmp_path / "images")
    for number in (1, 2):
        guest.point(RepositoryDestination(again(source)), number, labels=[f"p{number}"])
    there = RepositoryDestination(again(to))
    report = run(CopyRequest(names=[GUEST], newest=True), RepositoryDestination(again(source)), there)
    assert (report.ok, [len(disk.points) for disk in report.disks]) == (True, [1, 1, 1])
    assert [point.labels for point in the_guest(to).points] == [("p2",)]
    report = run(CopyRequest(), RepositoryDestination(again(source)), there)
    assert report.ok
    view = the_guest(to)
    assert [(point.point, point.instant, point.labels) for point in view.points] == [
        (point.point, point.instant, point.labels) for point in the_guest(source).points
    ]
    assert (view.disks, view.leftovers) == (("web1/vda", "web1/vdb"), ())
    for point in view.points:
        record = read_record(RepositoryDestination(again(to)), point, disk=view.record_disk)
        assert all(fault_of(point, disk, subject=view.name) is None for disk in record.disks)
    for name in guest.names:
        shown = {n: guest.shown[f"{n:032x}", name] for n in (1, 2)}
        check_restores(shown, to, tmp_path / name, disk=guest.disk(name))
    # The copy knows where the guest comes from, so that a failover there asks first; the source is not told.
    assert [place.id for place in there.guest_state(GUEST).others] == [source.config.id]
    assert RepositoryDestination(again(source)).guest_state(GUEST).others == ()


def test_a_failover_at_a_copy_asks_the_source_first(tmp_path: Path) -> None:
    """kvm2 has taken the guest over at the source after the last copy, of which the copy knows nothing."""
    source, to = local(tmp_path / "source"), local(tmp_path / "copy")
    guest = Guest(tmp_path / "images")
    origin = RepositoryDestination(again(source))
    guest.point(origin, 1)
    assert run(CopyRequest(), origin, RepositoryDestination(again(to))).ok
    taken = tuple(TakenDisk(disk=guest.disk(name), point=1) for name in guest.names)
    change = GuestChange(
        guest=GUEST,
        transition=Transition.PROMOTE,
        seen=0,
        token="1" * 32,
        by="kvm2",
        host="kvm2",
        vouched=Vouched(how="person", who="root@kvm2"),
        disks=taken,
    )
    origin.change_guest(change)

    def failover(opens: Callable[[str], RepositoryDestination]) -> Failover:
        request = FailoverRequest(directory=tmp_path / "out", host="kvm3", fence=["true"], reach=Reach(opens=opens))
        return Failover(RepositoryDestination(again(to)), GUEST, request)

    def silent(url: str) -> RepositoryDestination:
        raise Unavailable("it does not answer", subject=url)

    with pytest.raises(Unavailable, match="does not answer"):
        failover(silent).run()
    assert failover(lambda _: RepositoryDestination(again(source))).plan().master == "kvm2"
    # The next copy brings the epoch, and nothing of the host that was replaced is taken there any more.
    assert run(CopyRequest(), origin, RepositoryDestination(again(to))).ok
    assert {disk.epoch for disk in RepositoryDestination(again(to)).disks()} == {2}
    with pytest.raises(Conflict, match=r"in epoch 2: another host has taken it over"):
        guest.point(RepositoryDestination(again(to)), 2)


def test_a_disk_with_the_name_of_a_guest_is_refused(tmp_path: Path) -> None:
    source, to = local(tmp_path / "source"), repository()
    guest = Guest(tmp_path / "images")
    guest.point(RepositoryDestination(again(to)), 1)
    ship(guest.images["vda"], source, disk=GUEST)
    report = run(CopyRequest(), RepositoryDestination(again(source)), RepositoryDestination(again(to)))
    assert "is a guest there, and no disk" in str(report.disks[0].failed)


def test_a_guest_point_without_all_its_disks_is_left_out(tmp_path: Path) -> None:
    source, to = local(tmp_path / "source"), repository()
    guest = Guest(tmp_path / "images")
    guest.point(RepositoryDestination(again(source)), 1)
    guest.point(RepositoryDestination(again(source)), 2)
    lost = again(source).catalogue(guest.disk("vdb")).points[-1].layer
    source.store.delete(f"layers/{lost}")
    report = run(CopyRequest(), RepositoryDestination(again(source)), RepositoryDestination(again(to)))
    refused = {disk.disk: [(each.point, each.kind) for each in disk.refused] for disk in report.disks}
    assert refused == {"web1/.guest": [(2, "not-found")], "web1/vda": [], "web1/vdb": [(2, "corrupt")]}
    assert [point.point for point in the_guest(to).points] == [1]


# --- stores


def test_between_two_servers(tmp_path: Path, moto: S3Server, rclone_server: S3Server) -> None:
    stack = random_stack(tmp_path / "stack", 3, layers=2)
    source = repository(open_store(f"s3://{moto.new_bucket()}/here"))
    ship(stack.files[-1], source, each_layer=True)
    to = repository(open_store(f"s3://{rclone_server.new_bucket()}/there", endpoint=rclone_server.endpoint))
    to.conditional = False
    report = run(CopyRequest(), RepositoryDestination(again(source)), RepositoryDestination(again(to)))
    assert report.ok
    check_restores(dict(enumerate(stack.shown, 1)), to, tmp_path)


class ReadOnly(StoreWrapper):
    """What a key for reading alone allows."""

    def put(self, name: str, data: Data) -> None:
        _ = data
        raise Refused("access denied (AccessDenied)", subject=name)

    def create(self, name: str, data: Data) -> bool:
        _ = data
        raise Refused("access denied (AccessDenied)", subject=name)

    def delete(self, name: str) -> None:
        raise Refused("access denied (AccessDenied)", subject=name)


def test_a_key_that_can_only_read_the_source_is_enough(tmp_path: Path) -> None:
    source, to = local(tmp_path / "source"), repository()
    guest = Guest(tmp_path / "images")
    guest.point(RepositoryDestination(again(source)), 1)
    heard: list[Event] = []
    report = run(
        CopyRequest(),
        RepositoryDestination(again(source, ReadOnly(source.store))),
        RepositoryDestination(again(to)),
        on_event=heard.append,
    )
    assert report.ok
    assert report.points == 3
    assert any("reading without a lease" in each.message for each in heard if isinstance(each, Notice))
    check_restores({1: guest.shown[f"{1:032x}", "vda"]}, to, tmp_path, disk=guest.disk("vda"))
