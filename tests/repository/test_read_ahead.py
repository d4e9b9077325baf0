"""Reading ahead changes how packs are asked for, and never what comes of it."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, strategies as st

from snapchain.errors import NotFound, Unavailable
from snapchain.objects.memory import MemoryStore
from snapchain.ops.restore.run import Restoration
from snapchain.repository import ingest, replay
from snapchain.repository.destination import RepositoryDestination
from snapchain.repository.packs import Location
from snapchain.repository.read_ahead import Range, ReadAhead, coalesced, within
from tests.ops.shipping import DISK, MiB, same_bytes, ship
from tests.ops.stacks import Layer, build, flat
from tests.repository.counting import CountingStore
from tests.repository.synthetic import again, repository
from tests.waiting import HANG

GAP, MOST = 8, 100
BLOBS = st.lists(
    st.builds(
        lambda pack, offset, stored: Location(pack, offset, stored, stored),
        st.sampled_from("ab"),
        st.integers(0, 1000),
        st.integers(1, 150),
    ),
    max_size=40,
)


@given(blobs=BLOBS)
def test_ranges_hold_all_blobs_and_little_else(blobs: list[Location]) -> None:
    ranges = coalesced(blobs, gap=GAP, most=MOST)
    assert ranges == sorted(ranges)
    for blob in blobs:
        stop = blob.offset + blob.stored
        assert any(each.pack == blob.pack and each.start <= blob.offset and stop <= each.stop for each in ranges), blob
    for each in ranges:
        inside = [blob for blob in blobs if blob.pack == each.pack and each.start <= blob.offset < each.stop]
        wanted = {at for blob in inside for at in range(blob.offset, blob.offset + blob.stored)}
        holes = "".join(" " if at in wanted else "x" for at in range(each.start, each.stop)).split()
        assert all(len(hole) <= GAP for hole in holes), "no hole is larger than the gap"
        largest = max(blob.stored for blob in inside)
        assert each.stop - each.start <= max(MOST, largest)
        assert {each.start, each.stop - 1} <= wanted, "a range begins and ends with what is wanted"


@given(blobs=BLOBS)
def test_blobs_that_do_not_overlap_are_fetched_once(blobs: list[Location]) -> None:
    apart = list[Location]()
    for blob in sorted(blobs, key=lambda each: (each.pack, each.offset)):
        if not apart or apart[-1].pack != blob.pack or apart[-1].offset + apart[-1].stored <= blob.offset:
            apart.append(blob)
    ranges = coalesced(apart, gap=GAP, most=MOST)
    for one, other in pairwise(ranges):
        assert one.pack != other.pack or one.stop <= other.start


def test_neighbours_are_one_range_up_to_the_gap_and_the_limit() -> None:
    def found(*blobs: tuple[int, int]) -> list[tuple[int, int]]:
        return [each[1:] for each in coalesced([Location("a", *blob, 9) for blob in blobs], gap=GAP, most=MOST)]

    assert found((0, 10), (10, 10)) == [(0, 20)]
    assert found((28, 10), (0, 20)) == [(0, 38)]
    assert found((0, 20), (29, 10)) == [(0, 20), (29, 39)]
    assert found((0, 60), (60, 60)) == [(0, 60), (60, 120)]
    assert found((0, 200), (200, 1)) == [(0, 200), (200, 201)]
    assert found((0, 50), (10, 10)) == [(0, 50)]


def test_no_more_is_held_than_was_allowed() -> None:
    ranges = [Range("a", 0, 60), Range("a", 70, 100), Range("b", 0, 20)]
    assert within(ranges, 100) == ranges[:2]
    assert within(ranges, 59) == []


BODY = bytes(range(100))


def reading(calls: list[tuple[int, int]], body: bytes = BODY) -> Callable[[str, int, int], bytes]:
    def read(_pack: str, offset: int, length: int) -> bytes:
        calls.append((offset, length))
        return body[offset : offset + length]

    return read


def test_what_was_fetched_is_not_read_again_until_it_is_dropped() -> None:
    calls: list[tuple[int, int]] = []
    with ReadAhead(reading(calls)) as ahead:
        ahead.fetch([Range("a", 10, 50)])
        assert bytes(ahead.get("a", 10, 40)) == BODY[10:50]
        assert bytes(ahead.get("a", 20, 5)) == BODY[20:25]
        assert calls == [(10, 40)]
        assert bytes(ahead.get("a", 49, 5)) == BODY[49:54]
        assert bytes(ahead.get("b", 10, 5)) == BODY[10:15]
        ahead.drop([Range("a", 10, 50)])
        assert bytes(ahead.get("a", 20, 5)) == BODY[20:25]
    assert calls == [(10, 40), (49, 5), (10, 5), (20, 5)]


def test_what_two_batches_need_is_held_until_both_are_done() -> None:
    calls: list[tuple[int, int]] = []
    with ReadAhead(reading(calls)) as ahead:
        for _ in range(2):
            ahead.fetch([Range("a", 10, 50)])
        ahead.drop([Range("a", 10, 50)])
        assert bytes(ahead.get("a", 20, 5)) == BODY[20:25]
        assert (20, 5) not in calls
        ahead.drop([Range("a", 10, 50), Range("b", 0, 5)])
        assert bytes(ahead.get("a", 20, 5)) == BODY[20:25]
        assert calls[-1] == (20, 5)


def test_a_pack_that_is_shorter_than_it_should_be_gives_what_it_has() -> None:
    calls: list[tuple[int, int]] = []
    with ReadAhead(reading(calls, BODY[:30])) as ahead:
        ahead.fetch([Range("a", 10, 50)])
        assert bytes(ahead.get("a", 10, 5)) == BODY[10:15]
        assert bytes(ahead.get("a", 25, 10)) == BODY[25:30]


@pytest.mark.parametrize(("error", "again_read"), [(NotFound, True), (Unavailable, False)])
def test_a_range_that_cannot_be_had_is_asked_for_in_parts_unless_nobody_answers(
    error: type[Exception], *, again_read: bool
) -> None:
    calls: list[int] = []

    def read(_pack: str, _offset: int, length: int) -> bytes:
        calls.append(length)
        if length > 5:
            raise error("whole")
        return b"part"

    with ReadAhead(read) as ahead:
        ahead.fetch([Range("a", 0, 50)])
        if again_read:
            assert ahead.get("a", 0, 4) == b"part"
        else:
            with pytest.raises(Unavailable, match="whole"):
                ahead.get("a", 0, 4)
    assert calls == [50, 4] if again_read else [50]


def test_the_end_waits_for_no_slow_store() -> None:
    slow = threading.Event()

    def read(_pack: str, _offset: int, _length: int) -> bytes:
        slow.wait(HANG)
        return b""

    with ReadAhead(read) as ahead:
        ahead.fetch([Range("a", at, at + 1) for at in range(20)])
    ahead.fetch([Range("a", 0, 1)])  # a planner that is late
    slow.set()


@pytest.fixture
def restored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[CountingStore, Path, Path]:
    """A disk of 40 MiB of which half is noise, in blobs of 64 KiB, restored in batches of 8 MiB."""
    monkeypatch.setattr(replay, "BATCH_BYTES", 8 * MiB)
    # One thread of the shipment: of several, one that has to wait puts its blobs into a later pack than its neighbours.
    monkeypatch.setattr(ingest, "ThreadPoolExecutor", lambda _workers, name: ThreadPoolExecutor(1, name))
    noise = tmp_path / "noise"
    noise.write_bytes(random.Random(5).randbytes(20 * MiB))
    (image,) = build(tmp_path / "c", [Layer(40 * MiB, [f"write -s {noise} 0 20M", "write -P 7 30M 4M"])])
    repo = repository(MemoryStore(), block_size=64 * 1024)
    ship(image, repo)
    store = CountingStore(repo.store)
    Restoration(RepositoryDestination(again(repo, store)), DISK, tmp_path / "out.raw").run()
    return store, flat(image, tmp_path / "flat"), tmp_path / "out.raw"


def test_a_restore_asks_for_each_stretch_of_a_pack_once(restored: tuple[CountingStore, Path, Path]) -> None:
    store, shown, out = restored
    assert same_bytes(shown, out)
    reads = store.of("get", "packs/")
    # Three batches of noise, each of one or two packs; the page; the blob of sevens.
    assert len(reads) <= 10
    assert store.bytes_of("get", "packs/") <= 20 * MiB + MiB
