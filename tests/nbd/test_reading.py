"""What an export gives is what the disk shows, for stacks of layers of all kinds; damage is an error of its range."""

from __future__ import annotations

import threading
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from snapchain.destination.reading import BlobDisk, Part
from snapchain.errors import Corrupt, SnapchainError, Unavailable
from snapchain.model.extents import DATA, Extents
from snapchain.nbd import reading as module
from snapchain.nbd.cache import BlockCache, Loader
from snapchain.nbd.protocol import Piece
from snapchain.nbd.reading import BlobReading, FileReading, Reading
from snapchain.objects.memory import MemoryStore
from snapchain.objects.store import ObjectStore, StoreWrapper
from snapchain.repository.chain import ChainView
from snapchain.repository.first_reads import StoredFirstReads
from snapchain.repository.format import pack_name
from snapchain.repository.lost_maps import LostMap
from snapchain.repository.reader import WholePoint
from tests.nbd.serving import BLOCK, KiB, Loaders, MadeDisk, MiB, reading_of, shown
from tests.repository.synthetic import Drawn, Run, Shipped, again, drawn, ship, stacks
from tests.waiting import HANG, wait_until


def whole(shipped: Shipped, store: ObjectStore | None = None) -> WholePoint:
    """The top of a stack, through a repository opened afresh."""
    fresh = again(shipped.repository, store)
    view = ChainView([fresh.layer(layer.id) for layer in shipped.layers], fresh.blobs)
    return WholePoint(view, view.extents.owned_by(0), StoredFirstReads(fresh.store, fresh.keys, "web1/vda"))


def pieces_of(reading: Reading, offset: int, length: int) -> bytes | None:
    found = reading.ready(offset, length)
    return None if found is None else b"".join(bytes(some) if data is None else data for _, some, data in found)


@pytest.fixture(scope="module", autouse=True)
def _small_blocks() -> object:
    """The blocks of an export are smaller than those of the repository, and larger."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "SHIFT", 14)
        patch.setattr(module, "BLOCK", 1 << 14)
        patch.setattr(module, "PORTION", 3 << 14)
        patch.setattr(module, "_MOST_BLOCKS", 5)
        patch.setattr(module, "_FETCHED_TOGETHER", 2)
        yield


@settings(suppress_health_check=[HealthCheck.too_slow], max_examples=40)
@given(stacks(max_layers=3), st.data())
def test_any_range_reads_as_the_chain_shows_it(stack: list[Drawn], data: st.DataObject) -> None:
    content = stack[-1].shown
    if not content:
        return
    disk = whole(ship(stack))
    assert isinstance(disk, BlobDisk)
    loader = Loader(BlockCache(data.draw(st.sampled_from([0, 70 * KiB, MiB]))), disk.load, workers=1)
    try:
        reading = BlobReading(disk, disk, loader, patience=0)
        for _ in range(6):
            offset = data.draw(st.integers(0, len(content) - 1))
            length = data.draw(st.integers(1, len(content) - offset))
            wanted = content[offset : offset + length]
            at_once = pieces_of(reading, offset, length)
            assert at_once is None or at_once == wanted
            assert shown(reading, offset, length) == wanted
            at_once = pieces_of(reading, offset, length)
            assert at_once is None or at_once == wanted
            assert loader.cache.held <= loader.cache.limit
        parts = disk.parts(0, len(content))
        assert [part.start for part in parts] == [0, *(part.stop for part in parts[:-1])]
    finally:
        loader.close()


@given(stacks(max_layers=3))
@settings(max_examples=15)
def test_a_disk_without_blobs_is_read_as_it_is(stack: list[Drawn]) -> None:
    top = stack[-1]
    if not top.size:
        return
    disk = whole(ship(stack))
    reading = FileReading(disk)
    assert shown(reading, 0, top.size) == top.shown
    assert pieces_of(reading, top.size // 2, 1) == top.shown[top.size // 2 :][:1]
    assert reading.ready(0, module.PORTION + 1) is None


def test_what_is_in_the_cache_is_given_at_once(loaders: Loaders) -> None:
    disk = MadeDisk(8)
    reading = reading_of(disk, loaders(disk))
    assert reading.ready(0, 4 * KiB) is None
    assert shown(reading, 0, disk.size) == disk.content
    count = len(disk.loads)
    shown(reading, 3 * 64 * KiB, 20 * KiB)  # of the last blocks: few are remembered
    assert pieces_of(reading, 3 * 64 * KiB + 5, 9 * KiB) == disk.content[3 * 64 * KiB + 5 :][: 9 * KiB]
    assert len(disk.loads) == count


def test_only_the_damaged_range_fails_and_what_is_before_it_comes(loaders: Loaders) -> None:
    disk = MadeDisk(6, bad={3})
    reading = reading_of(disk, loaders(disk))
    bad = range(3 * disk.unit, 4 * disk.unit)
    for step in range(0, disk.size, 16 * KiB):
        if step in bad:
            with pytest.raises(Corrupt, match="blob 3: damaged"):
                shown(reading, step, 16 * KiB)
        else:
            assert shown(reading, step, 16 * KiB) == disk.content[step : step + 16 * KiB]
    got: list[Piece] = []
    with pytest.raises(Corrupt, match="blob 3"):
        got.extend(piece for pieces in reading.wait(1, disk.size - 1) for piece in pieces)
    assert 1 + sum(length for _, length, _ in got) == bad.start
    with pytest.raises(Corrupt, match="blob 3"):
        shown(reading, bad.start - 1, 2)
    with pytest.raises(Corrupt, match="blob 3"):
        shown(reading, bad.stop - 1, 2)
    assert reading.ready(bad.start, 1) is None


def test_one_altered_byte_of_a_pack_is_an_error_of_its_blob_alone(loaders: Loaders) -> None:
    """Byte for byte against what the stack shows: never zeroes, and never anything else."""
    stack = [drawn(512 * KiB, [Run(0, 512 * KiB, 2000)], b"")]
    shipped = ship(stack)
    disk = whole(shipped)
    (where,) = disk.view.locations([(256 * KiB, 1)])
    store = shipped.repository.store
    assert isinstance(store, MemoryStore)
    body = bytearray(store.get(pack_name(where.pack)))
    body[where.offset + where.stored // 2] ^= 1
    store.put(pack_name(where.pack), bytes(body))
    loader = Loader(BlockCache(MiB), disk.load, workers=1)
    loaders.made.append(loader)
    reading = BlobReading(disk, disk, loader, patience=0)
    failed = []
    for offset in range(0, 512 * KiB, 4 * KiB):
        try:
            assert shown(reading, offset, 4 * KiB) == stack[0].shown[offset : offset + 4 * KiB]
        except Corrupt:
            failed.append(offset)
    assert failed == list(range(256 * KiB, 320 * KiB, 4 * KiB)), "its block of 64 KiB"


def test_where_the_map_is_lost_the_rest_is_read(loaders: Loaders) -> None:
    stack = [drawn(256 * KiB, [Run(0, 256 * KiB, 7)], b"")]
    gone = LostMap(64 * KiB, 100 * KiB, Corrupt("the map of that range is damaged"))
    disk = replace(whole(ship(stack)), lost=(gone,))
    assert [(part.start, part.stop) for part in disk.parts(0, disk.size) if part.lost] == [gone[:2]]
    assert [part.lost is not None for part in disk.parts(80 * KiB, 90 * KiB)] == [True]
    loader = Loader(BlockCache(MiB), disk.load, workers=1)
    loaders.made.append(loader)
    reading = BlobReading(disk, disk, loader, patience=0)
    for step in range(0, disk.size, 4 * KiB):
        if gone.start <= step < gone.stop:
            for read in (
                lambda at: shown(reading, at, 4 * KiB),
                lambda at: disk.read_into(at, memoryview(bytearray(1))),
            ):
                with pytest.raises(Corrupt, match="the map of that range"):
                    read(step)
            assert reading.ready(step, 1) is None
        else:
            assert shown(reading, step, 4 * KiB) == stack[0].shown[step : step + 4 * KiB]


class Away(StoreWrapper):
    """Does not answer so many times. on_get: called before"""

    def __init__(self, inner: ObjectStore) -> None:
        super().__init__(inner)
        self.left = 0

    def get(self, name: str, *, offset: int = 0, length: int | None = None) -> bytes:
        if self.left:
            self.left -= 1
            raise Unavailable("nobody answers", subject=name)
        return super().get(name, offset=offset, length=length)


def test_a_read_waits_for_a_store_that_is_away_and_later_ones_work(
    loaders: Loaders, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_PAUSE", 0.001)
    stack = [drawn(256 * KiB, [Run(0, 256 * KiB, 2000)], b"")]
    shipped = ship(stack)
    away = Away(shipped.repository.store)
    disk = whole(shipped, away)
    loader = Loader(BlockCache(MiB), disk.load, workers=1)
    loaders.made.append(loader)
    patient = BlobReading(disk, disk, loader, patience=HANG)
    away.left = 3
    assert shown(patient, 0, 1000) == stack[0].shown[:1000]
    assert away.left == 0
    hasty = BlobReading(disk, disk, loader, patience=0)
    away.left = 10**6
    with pytest.raises(Unavailable, match="nobody answers"):
        shown(hasty, 128 * KiB, 1000)
    away.left = 0
    assert shown(hasty, 128 * KiB, 1000) == stack[0].shown[128 * KiB :][:1000]


def test_an_end_wakes_who_waits_for_a_store(loaders: Loaders) -> None:
    def gate() -> None:
        raise Unavailable("nobody answers")

    disk = MadeDisk(1, gate=gate)
    reading = reading_of(disk, loaders(disk), patience=10 * HANG)
    found: list[SnapchainError] = []

    def read() -> None:
        try:
            shown(reading, 0, 1)
        except SnapchainError as error:
            found.append(error)

    waiting = threading.Thread(target=read)
    waiting.start()
    wait_until(lambda: disk.loads)
    reading.end()
    waiting.join(HANG)
    assert found


def test_a_map_that_reaches_beyond_its_blob_gives_no_bytes(loaders: Loaders) -> None:
    class Forged(MadeDisk):
        def parts(self, start: int, stop: int, /) -> list[Part]:
            return [Part(start, stop, self.blob(0), 60 * KiB)]

    disk = Forged(1)
    disk.unit = 64 * KiB
    reading = reading_of(disk, loaders(disk))
    with pytest.raises(Corrupt, match="contradicts itself"):
        shown(reading, 0, 16 * KiB)
    assert reading.ready(0, 16 * KiB) is None


@pytest.mark.parametrize("cut", [(0, 10, 20, 64), (1, 64, 64, 64), (0, 40, 30, 64), (0, 40, 40, 63), (0, 40, 40, 65)])
def test_a_map_with_gaps_or_overlaps_is_damage(loaders: Loaders, cut: tuple[int, int, int, int]) -> None:
    """A reply with other bytes than it announces would be taken for the next reply."""

    class Forged(MadeDisk):
        def parts(self, start: int, stop: int, /) -> list[Part]:
            one, other, third, last = (start + each * (stop - start) // 64 for each in cut)
            return [Part(one, other), Part(third, last)]

    disk = Forged(1)
    reading = reading_of(disk, loaders(disk))
    with pytest.raises(Corrupt, match="contradicts itself at guest byte"):
        shown(reading, 0, 16 * KiB)
    assert reading.ready(0, 16 * KiB) is None


def test_blocks_ahead_are_fetched_without_being_waited_for(loaders: Loaders) -> None:
    disk = MadeDisk(8)
    reading = reading_of(disk, loaders(disk, workers=1))
    reading.ahead(0, 4)
    reading.ahead(10**6, 10**6 + 1)
    reading.ahead(3, 3)
    wait_until(lambda: pieces_of(reading, 0, 4 * module.BLOCK - 16 * KiB) is not None)
    assert disk.loads == [[0]], "four blocks of 16 KiB are one blob"


def test_a_sparse_disk_needs_no_blob() -> None:
    extents = Extents.from_starts(MiB, [0], [DATA - 1])
    assert np.array_equal(extents.at, [0])
    disk = MadeDisk(0)
    reading = FileReading(type("Sparse", (), {"size": MiB, "extents": extents, "read_into": disk.read_into})())
    assert reading.ready(0, BLOCK >> 8) == [(0, BLOCK >> 8, None)]
