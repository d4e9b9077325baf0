"""The cache never holds more than its size, a blob is fetched once, and an error goes to those who wait for it."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given, strategies as st

from snapchain.destination.reading import StoredBlob
from snapchain.errors import Corrupt, Unavailable
from snapchain.nbd.cache import Blob, BlockCache, neighbours
from tests.nbd.serving import KiB, Loaders, MadeDisk
from tests.waiting import HANG, wait_until


@given(st.lists(st.tuples(st.integers(0, 9), st.booleans()), max_size=80), st.integers(0, 5))
def test_it_holds_no_more_than_its_size_and_counts_what_it_holds(steps: list[tuple[int, bool]], room: int) -> None:
    disk = MadeDisk(10, unit=4)
    cache = BlockCache(room * 4)
    blobs = [Blob(disk.blob(number)) for number in range(10)]
    for number, used in steps:
        cache.keep(blobs[number], b"data")
        blobs[number].used = used
        assert cache.held == sum(len(blob.data) for blob in blobs if blob.data is not None) <= cache.limit


def test_what_is_used_stays_longer_than_what_is_not() -> None:
    disk = MadeDisk(100, unit=4)
    cache = BlockCache(16)
    hot = Blob(disk.blob(99))
    cache.keep(hot, b"data")
    for number in range(50):
        hot.used = True
        cache.keep(Blob(disk.blob(number)), b"data")
        assert hot.data is not None


def test_a_blob_is_fetched_once_however_many_wait_for_it(loaders: Loaders) -> None:
    gate = threading.Event()
    disk = MadeDisk(3, gate=lambda: gate.wait(HANG))
    loader = loaders(disk)
    blob = loader.blob(disk.blob(1))
    assert loader.blob(disk.blob(1)) is blob
    with ThreadPoolExecutor(8) as pool:
        waiting = [pool.submit(loader.bytes_of, blob, timeout=HANG) for _ in range(8)]
        wait_until(lambda: disk.loads)
        gate.set()
        assert {each.result() for each in waiting} == {b"\x02" * disk.unit}
    assert disk.loads == [[1]]


def test_neighbours_come_together_and_the_damaged_one_fails_alone(loaders: Loaders) -> None:
    gate = threading.Event()
    disk = MadeDisk(6, bad={2, 4}, gate=lambda: gate.wait(HANG))
    loader = loaders(disk, workers=1)
    blobs = [loader.blob(disk.blob(number)) for number in range(6)]
    loader.fetch(reversed(blobs))
    waiting = [blob.loading for blob in blobs]
    gate.set()
    for number, each in enumerate(waiting):
        assert each is not None
        if number in disk.bad:
            with pytest.raises(Corrupt, match=f"blob {number}: damaged"):
                each.result(HANG)
        else:
            assert each.result(HANG)[0] == number + 1
    assert disk.loads[0] == [0, 1, 2, 3, 4, 5], "in the order in which they are stored"


def test_a_store_that_is_away_fails_those_who_wait_and_not_those_who_come_later(loaders: Loaders) -> None:
    away = True

    def gate() -> None:
        if away:
            raise Unavailable("nobody answers")

    disk = MadeDisk(2, gate=gate)
    loader = loaders(disk)
    blobs = [loader.blob(disk.blob(number)) for number in range(2)]
    for blob in blobs:
        with pytest.raises(Unavailable, match="nobody answers"):
            loader.bytes_of(blob, timeout=HANG)
    away = False
    assert loader.bytes_of(blobs[0], timeout=HANG)[0] == 1


def test_a_fault_of_the_program_reaches_who_waits(loaders: Loaders) -> None:
    disk = MadeDisk(1, gate=lambda: 1 // 0)
    loader = loaders(disk)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            loader.bytes_of(loader.blob(disk.blob(0)), timeout=HANG)


def test_a_blob_of_another_length_is_damage(loaders: Loaders) -> None:
    disk = MadeDisk(1)
    loader = loaders(disk)
    blob = loader.blob(disk.blob(0)._replace(size=disk.unit + 1))
    with pytest.raises(Corrupt, match="contradicts itself"):
        loader.bytes_of(blob, timeout=HANG)


def test_what_is_fetched_ahead_is_bounded_and_comes_last(loaders: Loaders) -> None:
    gate = threading.Event()
    disk = MadeDisk(200, gate=lambda: gate.wait(HANG))
    loader = loaders(disk, limit=40 * disk.unit, workers=1)
    blobs = [loader.blob(disk.blob(number)) for number in range(200)]
    loader.fetch(blobs[:100], ahead=True)
    wait_until(lambda: disk.loads)
    loader.fetch(blobs[100:200], ahead=True)
    assert sum(blob.loading is not None for blob in blobs) == 10, "a quarter of the cache"
    with ThreadPoolExecutor(1) as pool:
        urgent = pool.submit(loader.bytes_of, blobs[150], timeout=HANG)
        gate.set()
        assert urgent.result()[0] == 151
    wait_until(lambda: all(blob.loading is None for blob in blobs))
    loader.fetch(blobs[100:104], ahead=True)
    wait_until(lambda: all(blob.data is not None for blob in blobs[100:104]))


def test_what_was_fetched_ahead_comes_first_when_somebody_waits_for_it(loaders: Loaders) -> None:
    gate = threading.Event()
    disk = MadeDisk(9, gate=lambda: gate.wait(HANG))
    loader = loaders(disk, workers=1)
    blobs = [loader.blob(disk.blob(number)) for number in range(9)]
    loader.fetch(blobs[:1])
    wait_until(lambda: disk.loads)
    loader.fetch(blobs[1:], ahead=True)
    loader.fetch([blobs[5], blobs[8], blobs[6]])
    gate.set()
    for blob in blobs:
        loader.bytes_of(blob, timeout=HANG)
    assert disk.loads == [[0], [5, 6, 8], [1, 2, 3, 4, 7]]
    wait_until(lambda: loader._ahead == 0)


def test_neighbours_are_those_that_one_request_fetches() -> None:
    def blob(place: str, offset: int, size: int = 1) -> Blob:
        return Blob(StoredBlob(f"{place}{offset}".encode(), size * KiB, (place, offset * KiB, size * KiB)))

    first = blob("a", 1000)
    near, far = [blob("a", 1100), blob("a", 1200), blob("a", 900)], [blob("a", 1400), blob("a", 700), blob("b", 1001)]
    assert neighbours([first, *far, *near]) == [near[2], first, near[0], near[1]]
    large = [blob("a", 1001, 3000), blob("a", 4001, 2000)]
    assert neighbours([first, *large]) == [first, large[0]]
    assert neighbours([]) == []


def test_an_end_leaves_nobody_waiting(loaders: Loaders) -> None:
    gate = threading.Event()
    disk = MadeDisk(2, gate=lambda: gate.wait(HANG))
    loader = loaders(disk, workers=1)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(loader.bytes_of, loader.blob(disk.blob(0)), timeout=HANG)
        wait_until(lambda: disk.loads)
        loader.close()
        with pytest.raises(Unavailable, match="the server ends"):
            waiting.result()
    with pytest.raises(Unavailable, match="the server ends"):
        loader.bytes_of(loader.blob(disk.blob(1)), timeout=HANG)
    gate.set()


def test_a_store_that_hangs_is_given_up_in_time(loaders: Loaders) -> None:
    gate = threading.Event()
    disk = MadeDisk(1, unit=KiB, gate=lambda: gate.wait(HANG))
    loader = loaders(disk)
    with pytest.raises(Unavailable, match="did not answer"):
        loader.bytes_of(loader.blob(disk.blob(0)), timeout=0.01)
    gate.set()
