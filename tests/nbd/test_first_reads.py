"""What clients read first: what is recorded, when it is stored, and what is fetched ahead the next time."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest

from snapchain.destination.reading import StoredBlob
from snapchain.errors import Corrupt, InvalidInput, SnapchainError, Unavailable
from snapchain.model import first_reads as limits
from snapchain.model.extents import ABSENT, DATA, Extents
from snapchain.model.first_reads import FirstReads
from snapchain.nbd import first_reads as module
from snapchain.nbd.first_reads import Recorder, first_reads
from snapchain.nbd.reading import BlobReading
from tests.nbd.serving import Client, KiB, Loaders, MadeDisk, MiB, reading_of, served, threads
from tests.waiting import HANG, wait_until

LEAF = 64 * KiB
NAME = "web1/vda"


class Kept:
    """Where a record lies. error: what reading and writing it raise; stored: each time it was"""

    def __init__(self, reads: FirstReads = (), *, error: SnapchainError | None = None) -> None:
        self.reads, self.error = reads, error
        self.stored: list[FirstReads] = []

    def first_reads(self) -> FirstReads:
        if self.error is not None:
            raise self.error
        return self.reads

    def note_first_reads(self, reads: FirstReads, /) -> None:
        self.stored.append(reads)
        if self.error is not None:
            raise self.error


def recorded(reading: BlobReading, kept: Kept, path: Path, *steps: tuple[int, int], asks_map: bool = False) -> None:
    """A client reads these (offset, length) of an export."""
    with first_reads(kept, reading), served(path, {NAME: reading}) as server, Client(server.path).go(NAME) as client:
        if asks_map:
            client.request(7, 0, 512)
            client.chunks()
        for offset, length in steps:
            client.read(offset, length)


def test_what_is_read_is_recorded_in_its_order_each_leaf_once(loaders: Loaders, tmp_path: Path) -> None:
    disk, kept = MadeDisk(40), Kept()
    steps = [(9 * LEAF + 5, 10), (10 * LEAF, LEAF), (2 * LEAF - 1, 2), (9 * LEAF, 4 * KiB), (30 * LEAF, 1)]
    recorded(reading_of(disk, loaders(disk)), kept, tmp_path / "s", *steps)
    assert kept.stored == [((9, 2), (1, 2), (30, 1))]
    wait_until(lambda: not [name for name in threads() if name == "nbd first reads"])


def test_a_copy_is_not_recorded(loaders: Loaders, tmp_path: Path) -> None:
    disk, kept = MadeDisk(8), Kept()
    recorded(reading_of(disk, loaders(disk)), kept, tmp_path / "s", (0, disk.size), asks_map=True)
    assert kept.stored == []


def test_what_is_recorded_is_fetched_before_it_is_asked_for(loaders: Loaders) -> None:
    disk = MadeDisk(200)
    loader = loaders(disk)
    reading = reading_of(disk, loader)
    kept = Kept(((150, 3), (7, 40), (60, 1), (1000, 5), (199, 9)))
    with first_reads(kept, reading):
        wanted = [150, 151, 152, *range(7, 47), 60, 199]
        blobs = [loader.blob(disk.blob(number)) for number in range(200)]
        wait_until(lambda: all(blobs[number].data is not None for number in wanted))
        assert [number for number in range(200) if blobs[number].data is not None] == sorted(wanted)
        assert reading.ready(150 * LEAF, 3 * LEAF) is not None
    assert kept.stored == [], "nobody has read anything"


def test_no_more_than_half_of_the_cache_is_fetched(loaders: Loaders) -> None:
    disk = MadeDisk(200)
    loader = loaders(disk, limit=40 * disk.unit)
    with first_reads(Kept(((0, 200),)), reading_of(disk, loader)):
        blobs = [loader.blob(disk.blob(number)) for number in range(200)]
        wait_until(lambda: loader.cache.held >= 20 * disk.unit and not loader._later)
        assert loader.cache.held == 20 * disk.unit
        assert all(blob.data is not None for blob in blobs[:20])


def test_who_waits_is_served_while_all_that_is_fetched_ahead_hangs(loaders: Loaders) -> None:
    """There are threads that fetch nothing ahead."""
    gate, too_many, hanging = threading.Event(), threading.Event(), threading.Semaphore(3)

    class Hangs(MadeDisk):
        def load(self, blobs: Sequence[StoredBlob], /) -> Iterator[tuple[StoredBlob, bytes]]:
            if blobs[0].where[3] != 3:
                if not hanging.acquire(blocking=False):
                    too_many.set()
                gate.wait(HANG)
            return super().load(blobs)

    loader = loaders(disk := Hangs(200), workers=4)
    with ExitStack() as stack:
        stack.enter_context(first_reads(Kept(tuple((leaf, 1) for leaf in range(20, 200, 4))), reading_of(disk, loader)))
        stack.callback(gate.set)
        # As many as there are threads for it, each with a request of its own, since the leaves are apart.
        wait_until(lambda: hanging._value == 1 or too_many.is_set())
        too_many.wait(0.1)
        blob = loader.blob(disk.blob(3))
        assert loader.bytes_of(blob, timeout=5)[0] == 4


@pytest.mark.parametrize(
    "error", [Corrupt("damaged"), Unavailable("away"), InvalidInput("read-only")], ids=["damaged", "away", "read-only"]
)
def test_a_record_that_cannot_be_read_or_stored_changes_nothing(
    error: SnapchainError, loaders: Loaders, tmp_path: Path
) -> None:
    disk, kept = MadeDisk(8), Kept(error=error)
    recorded(reading_of(disk, loaders(disk)), kept, tmp_path / "s", (0, LEAF))
    assert kept.stored == [((0, 1),)]
    recorded(reading_of(disk, loaders(disk)), kept, tmp_path / "s", (LEAF, LEAF))
    assert kept.stored == [((0, 1),), ((1, 1),)]


def test_a_store_that_hangs_delays_the_end_by_seconds_only(loaders: Loaders, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PATIENCE", 0.01)
    gate = threading.Event()

    class Hangs(Kept):
        def note_first_reads(self, reads: FirstReads, /) -> None:
            gate.wait(HANG)
            super().note_first_reads(reads)

    disk, kept = MadeDisk(8), Hangs()
    reading = reading_of(disk, loaders(disk))
    with ExitStack() as stack:
        stack.callback(gate.set)
        with first_reads(kept, reading):
            assert reading.recorder is not None
            reading.recorder.note(0, 1)
        assert kept.stored == []
    wait_until(lambda: kept.stored)


def test_it_is_stored_while_clients_read_on(loaders: Loaders) -> None:
    disk, kept = MadeDisk(8), Kept()
    reading = reading_of(disk, loaders(disk))
    with first_reads(kept, reading, seconds=0):
        assert reading.recorder is not None
        reading.recorder.note(5 * LEAF, 1)
        wait_until(lambda: kept.stored == [((5, 1),)])
        assert not reading.recorder.is_open


def test_a_recording_is_bounded_and_has_data_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_LEAVES", 5)
    recorder = Recorder(Extents.from_starts(1000 * LEAF, [0, 2 * LEAF, 4 * LEAF], [DATA, ABSENT, DATA]))
    recorder.note(0, 0)
    recorder.note(0, 1000 * LEAF)
    assert recorder.wait(0) == ((0, 2), (4, 3))
    assert not recorder.is_open
    recorder.note(900 * LEAF, 1)
    assert recorder.wait(0) == ((0, 2), (4, 3))
    assert 256 * MiB // LEAF == limits.MOST_LEAVES
