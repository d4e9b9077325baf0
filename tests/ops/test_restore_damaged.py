"""restore of a damaged point: an error that names the range, or with --allow-damaged zeroes there, and only there."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from snapchain.destination.protocol import Destination
from snapchain.errors import Corrupt, InvalidInput, Unavailable
from snapchain.model.content import leaf_hash
from snapchain.model.events import Event, Progress
from snapchain.objects.memory import MemoryStore
from snapchain.ops.restore import output
from snapchain.ops.restore.damage import DamagedRange
from snapchain.ops.restore.run import Restoration
from snapchain.ops.restore.stream import StreamedRestoration
from snapchain.ops.restore.target import RestoreReport
from snapchain.repository import layers as records, replay
from snapchain.repository.crypto import NONE
from snapchain.repository.destination import RepositoryDestination
from snapchain.repository.format import pack_name
from snapchain.repository.ingest import store_page_body
from snapchain.repository.layers import page_location
from snapchain.repository.packer import Packer
from snapchain.repository.pages import Page
from snapchain.repository.repository import Repository
from snapchain.testing.faults import Fault, FaultStore, On
from tests.ops.shipping import DISK, MiB, ship
from tests.ops.stacks import Layer, build, flat, names
from tests.ops.test_restore import damage
from tests.ops.test_restore_targets import LAYERS, delivered, looped
from tests.repository.synthetic import again, repository

LEAF = 64 * 1024
SIZE = 4 * MiB + 512
LOST = MiB + 5 * LEAF
"""In the middle; blobs are of 64 KiB."""


@dataclass(frozen=True)
class World:
    """A point of which one leaf is lost. shown: its bytes, with zeroes there"""

    repo: Repository
    shown: bytes
    pack: str

    @property
    def destination(self) -> Destination:
        return RepositoryDestination(again(self.repo))


@pytest.fixture
def world(tmp_path: Path) -> World:
    """The disk has holes, a last leaf of 512 bytes, and leaves that differ."""
    writes = [f"write -P {n + 1} {n * 64}k 64k" for n in range(32)]
    (image,) = build(tmp_path / "c", [Layer(SIZE, [*writes, f"write -P 77 {4 * MiB} 512"])])
    repo = repository(MemoryStore(), suite=NONE, block_size=LEAF)
    ship(image, repo)
    shown = bytearray(flat(image, tmp_path / "shown").read_bytes())
    assert any(shown[LOST : LOST + LEAF])
    shown[LOST : LOST + LEAF] = bytes(LEAF)
    return World(repo, bytes(shown), damage(repo, 1, LOST))


def check(world: World, report: RestoreReport, out: bytes) -> None:
    assert out[:SIZE] == world.shown
    assert [(each.offset, each.length) for each in report.damaged] == [(LOST, LEAF)]
    assert world.pack in report.damaged[0].reason
    assert report.content_id != world.repo.catalogue(DISK).points[0].content_id


def to_file(world: World, place: Path, *, allowed: bool) -> tuple[RestoreReport, bytes]:
    out = place / "out.raw"
    report = Restoration(world.destination, DISK, out, allow_damaged=allowed).run()
    return report, out.read_bytes()


def to_qcow2(world: World, place: Path, *, allowed: bool) -> tuple[RestoreReport, bytes]:
    out = place / "out.qcow2"
    report = Restoration(world.destination, DISK, out, allow_damaged=allowed).run()
    return report, flat(out, place / "flat").read_bytes()


def to_stream(world: World, _: Path, *, allowed: bool) -> tuple[RestoreReport, bytes]:
    written = bytearray()
    return StreamedRestoration(world.destination, DISK, allow_damaged=allowed).run(written.extend), bytes(written)


WAYS = [to_file, to_qcow2, to_stream]


@pytest.mark.parametrize("way", WAYS)
def test_what_is_lost_is_zero_and_listed_where_that_is_allowed(
    world: World, tmp_path: Path, way: Callable[..., tuple[RestoreReport, bytes]]
) -> None:
    place = tmp_path / "d"
    place.mkdir()
    check(world, *way(world, place, allowed=True))


@pytest.mark.parametrize("way", WAYS)
def test_otherwise_it_is_an_error(world: World, tmp_path: Path, way: Callable[..., object]) -> None:
    place = tmp_path / "d"
    place.mkdir()
    with pytest.raises(Corrupt, match=f"guest bytes {LOST} to {LOST + LEAF} are lost") as raised:
        way(world, place, allowed=False)
    assert "--allow-damaged" in str(raised.value.hint)
    assert names(place) == []


@pytest.fixture
def crossed(tmp_path: Path) -> Destination:
    """The map names another blob for leaf 1, which is whole: neither its tag nor its id tells, only the leaf."""
    (image,) = build(tmp_path / "c", [Layer(4 * LEAF, [f"write -P {n + 1} {n * 64}k 64k" for n in range(4)])])
    repo = repository(MemoryStore(), block_size=LEAF)
    ship(image, repo)
    layer = again(repo).layer(repo.catalogue(DISK).points[0].layer)
    (page,) = layer.pages(0, layer.size)
    runs = page.runs.copy()
    for column in ("id", "pack", "offset", "stored", "raw"):
        runs[column][1] = runs[column][2]
    with Packer(repo.store, repo.keys, repo.index()) as packer:
        row = store_page_body(0, layer.size, Page(runs, page.leaves, page.packs), keys=repo.keys, packer=packer)
        packer.flush()
    records.write(repo.store, repo.keys, layer.header, row)
    return RepositoryDestination(again(repo))


CROSSED = f"guest bytes {LEAF} to {2 * LEAF} are lost: the bytes are not those that were shipped"


@pytest.mark.parametrize("name", ["out.raw", "out.qcow2"])
def test_a_map_that_names_another_blob_is_found_when_the_file_is_read_back(
    crossed: Destination, tmp_path: Path, name: str
) -> None:
    place = tmp_path / "d"
    place.mkdir()
    with pytest.raises(Corrupt, match=CROSSED):
        Restoration(crossed, DISK, place / name).run()
    assert names(place) == []


def test_a_map_that_names_another_blob_is_found_before_a_stream_gets_it(crossed: Destination) -> None:
    written = bytearray()
    with pytest.raises(Corrupt, match=CROSSED):
        StreamedRestoration(crossed, DISK).run(written.extend)
    assert not written.strip(b"\1")


@pytest.mark.root
def test_a_device_gets_zeroes_there_and_nothing_of_its_old_bytes(world: World, tmp_path: Path) -> None:
    backing = tmp_path / "device"
    backing.write_bytes(b"\xee" * 6 * MiB)
    with ExitStack() as stack:
        device = stack.enter_context(looped(backing))
        report = Restoration(world.destination, DISK, device, force=True, allow_damaged=True).run()
        with device.open("rb") as file:
            check(world, report, file.read())
            file.seek(SIZE)
            assert file.read(512) == b"\xee" * 512


def test_the_stream_ends_before_what_is_lost(world: World) -> None:
    written = bytearray()
    with pytest.raises(Corrupt, match=f"guest bytes {LOST} to"):
        StreamedRestoration(world.destination, DISK).run(written.extend)
    assert len(written) <= LOST
    assert written == world.shown[: len(written)]


def test_bytes_that_are_not_as_recorded_are_zero_too(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A blob whose tag fits, of other bytes than the record's leaf: only the hash tells."""
    other = world.shown[LOST + LEAF : LOST + 2 * LEAF]
    monkeypatch.setattr(replay, "leaf_hash", lambda leaf: bytes(32) if bytes(leaf) == other else leaf_hash(leaf))
    report, out = to_stream(world, Path(), allowed=True)
    shown = bytearray(world.shown)
    shown[LOST + LEAF : LOST + 2 * LEAF] = bytes(LEAF)
    assert out[:SIZE] == shown
    assert [(each.offset, each.length) for each in report.damaged] == [(LOST, 2 * LEAF)]


def test_neighbours_are_one_range_and_others_are_not(world: World) -> None:
    damage(world.repo, 1, LOST + LEAF)
    damage(world.repo, 1, LOST + 4 * LEAF)
    report, _ = to_stream(world, Path(), allowed=True)
    found = [(each.offset, each.length) for each in report.damaged]
    assert found == [(LOST, 2 * LEAF), (LOST + 4 * LEAF, LEAF)]


MAPS = {
    # which layer's map is lost: what is lost of the point, which has leaf 0 and 1 from the root, 1 and 2 from the top
    0: [(0, LEAF)],
    1: [(LEAF, 2 * LEAF)],
}


@pytest.mark.parametrize("number", MAPS)
def test_a_lost_map_is_a_lost_range_but_for_what_lies_above(tmp_path: Path, number: int) -> None:
    layers = [Layer(MiB, ["write -P 1 0 128k"]), Layer(MiB, ["write -P 2 64k 128k"])]
    files = build(tmp_path / "c", layers)
    repo = repository(MemoryStore(), suite=NONE, block_size=LEAF)
    ship(files[-1], repo, each_layer=True)
    layer = again(repo).layer(repo.catalogue(DISK).points[number].layer)
    (row,) = layer.table
    where = page_location(row)
    name = pack_name(where.pack)
    body = bytearray(repo.store.get(name))
    body[where.offset] ^= 1
    repo.store.put(name, bytes(body))
    with pytest.raises(Corrupt, match="because the map of that range is damaged"):
        Restoration(RepositoryDestination(again(repo)), DISK, tmp_path / "out.raw").run()
    work = Restoration(RepositoryDestination(again(repo)), DISK, tmp_path / "out.raw", allow_damaged=True)
    assert work.plan().virtual_size == MiB
    report = work.run()
    assert [(each.offset, each.length) for each in report.damaged] == MAPS[number]
    expected = bytearray(b"\1" * LEAF + b"\2" * 2 * LEAF + bytes(MiB - 3 * LEAF))
    for offset, length in MAPS[number]:
        expected[offset : offset + length] = bytes(length)
    assert (tmp_path / "out.raw").read_bytes() == expected


def test_a_store_that_does_not_answer_has_lost_nothing(world: World, tmp_path: Path) -> None:
    store = FaultStore(world.repo.store, [On(nth, Fault.UNAVAILABLE, "get", "packs/") for nth in range(2, 9)])
    place = RepositoryDestination(again(world.repo, store))
    with pytest.raises(Unavailable, match="the server is overloaded"):
        Restoration(place, DISK, tmp_path / "out.raw", allow_damaged=True).run()
    assert not (tmp_path / "out.raw").exists()


def test_an_unfinished_file_is_not_continued(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run that began it may have met damage, of which nobody would hear."""
    monkeypatch.setattr(output, "WORTH", 1)

    def cut(event: Event) -> None:
        if isinstance(event, Progress) and event.done:  # past what is lost
            raise KeyboardInterrupt

    out = tmp_path / "d" / "out.raw"
    out.parent.mkdir()
    with pytest.raises(KeyboardInterrupt):
        Restoration(world.destination, DISK, out, allow_damaged=True).run(on_event=cut)
    report = Restoration(world.destination, DISK, out, allow_damaged=True).run()
    check(world, report, out.read_bytes())
    assert report.bytes_resumed == 0


def test_where_damage_cannot_be_named_it_is_refused(tmp_path: Path) -> None:
    replica = delivered("replica", tmp_path, LAYERS[:1])
    for refused in (
        lambda: Restoration(replica.destination, DISK, tmp_path / "x.raw", allow_damaged=True),
        lambda: StreamedRestoration(replica.destination, DISK, allow_damaged=True),
    ):
        with pytest.raises(InvalidInput, match="a replica does not name the ranges that are damaged"):
            refused()


def test_a_chain_of_files_is_restored_whole_or_not(world: World, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="--allow-damaged writes one file"):
        Restoration(world.destination, DISK, tmp_path / "x.qcow2", whole_chain=True, allow_damaged=True)


def test_a_report_has_ranges_in_bytes() -> None:
    row = DamagedRange(offset=1, length=2, reason="gone").model_dump()
    assert row == {"offset": 1, "length": 2, "reason": "gone"}
