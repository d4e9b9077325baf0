"""Throttle and faults: each keeps the contract, and does its one thing."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from snapchain.errors import InvalidInput, Unavailable
from snapchain.objects.memory import MemoryStore
from snapchain.objects.store import ObjectStore, Properties, StoreWrapper, innermost
from snapchain.objects.throttle import BURST, ThrottledStore, TokenBucket
from snapchain.testing.faults import Crash, Fault, FaultStore, On, crash_points
from snapchain.testing.object_contract import ObjectStoreContract


class TestWrapped(ObjectStoreContract):
    """All wrappers around one another."""

    @pytest.fixture
    def store(self) -> ObjectStore:
        return ThrottledStore(FaultStore(MemoryStore()), upload=1e12, download=1e12)


def test_a_wrapper_passes_on_what_the_opener_sets() -> None:
    inner = MemoryStore()
    store = StoreWrapper(StoreWrapper(inner))
    store.properties = Properties(conditional_put=False, description="x")
    assert inner.properties is store.properties
    assert innermost(store) is inner
    assert innermost(inner) is inner


class Pauses(list[float]):
    def __call__(self, seconds: float) -> None:
        self.append(seconds)


# ---- throttle


class Clock:
    """Time that passes only by sleeping."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def test_uploads_keep_to_the_rate() -> None:
    clock = Clock()
    store = ThrottledStore(MemoryStore(), upload=1000, clock=clock, sleep=clock.sleep)
    for number in range(10):
        store.put(f"p{number}", bytes(500))
        store.create(f"c{number}", [bytes(250), bytes(250)])
    passed = clock.now - 100
    assert 10_000 / 1000 - 500 / 1000 - BURST <= passed <= 10_000 / 1000
    before = clock.now
    assert store.get("p1") == bytes(500)
    assert clock.now == before, "downloads have no limit here"


def test_what_waits_for_the_rate_is_not_in_the_store_yet_and_holds_up_nothing_small() -> None:
    """An interrupted shipment lists what has arrived: it must know that at once, and its list must not wait behind."""
    clock, inner = Clock(), MemoryStore()
    waited_by_small: list[float] = []

    def sleep(seconds: float) -> None:
        assert inner.size("pack") is None, "what is there has been waited for"
        clock.now += seconds / 2
        if not waited_by_small:
            waited_by_small.append(clock.now)
            store.put("index", bytes(10))
            waited_by_small.append(clock.now)

    store = ThrottledStore(inner, upload=1000, clock=clock, sleep=sleep)
    store.put("pack", bytes(5000))
    assert inner.get("pack") == bytes(5000)
    assert waited_by_small[1] == waited_by_small[0], "its own bytes were saved up already"
    assert clock.now - 100 == pytest.approx(5010 / 1000 - BURST)


def test_downloads_keep_to_the_rate() -> None:
    clock = Clock()
    store = ThrottledStore(MemoryStore(), download=1000, clock=clock, sleep=clock.sleep)
    store.put("a", bytes(2000))
    assert clock.now == 100
    for _ in range(5):
        store.get("a", length=1000)
    assert 4 - BURST <= clock.now - 100 <= 5


def test_an_idle_bucket_saves_up_little() -> None:
    clock = Clock()
    bucket = TokenBucket(1000, clock=clock, sleep=clock.sleep)
    clock.now += 3600
    for _ in range(10):
        bucket.take(1000)
    assert clock.now - 3700 >= 9 - BURST


def test_threads_share_a_bucket() -> None:
    waits = Pauses()
    bucket = TokenBucket(1000, clock=lambda: 0.0, sleep=waits)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(bucket.take, [1000] * 8))
    assert sorted(waits) == pytest.approx([number - BURST for number in range(1, 8)])


@pytest.mark.parametrize("rate", [0, -1, float("nan")])
def test_a_rate_is_above_zero(rate: float) -> None:
    with pytest.raises(InvalidInput, match="must be above zero"):
        ThrottledStore(MemoryStore(), upload=rate)


# ---- faults


def test_each_fault_does_what_its_name_says() -> None:
    inner = MemoryStore()
    slept = Pauses()
    store = FaultStore(
        inner,
        [
            On(1, Fault.UNAVAILABLE, operation="put", prefix="a"),
            On(2, Fault.LOST_REPLY, operation="put"),
            On(1, Fault.TAKEN, operation="create"),
            On(1, Fault.TRUNCATED, operation="get"),
            On(2, Fault.BIT_FLIP, operation="get"),
            On(1, Fault.DELAY, operation="size", seconds=3.0),
            On(1, Fault.UNAVAILABLE, operation="list", prefix="x/"),
        ],
        sleep=slept,
    )
    with pytest.raises(Unavailable, match="injected"):
        store.put("a", b"1")
    assert inner.size("a") is None
    with pytest.raises(Unavailable, match="reply"):
        store.put("b", b"12345678")
    assert inner.get("b") == b"12345678"
    assert store.create("c", b"mine") is False
    assert inner.get("c") == b"mine"
    assert store.get("b") == b"1234"
    assert store.get("b") == b"1234%678"
    assert store.get("b") == b"12345678"
    assert store.size("b") == 8
    assert slept == [3.0]
    assert list(store.list(""))
    with pytest.raises(Unavailable, match="injected"):
        list(store.list("x/"))
    assert [call.operation for call in store.calls[:3]] == ["put", "put", "create"]


def test_a_crash_is_for_good_and_for_every_thread() -> None:
    inner = MemoryStore()
    store = FaultStore(inner, crash_at=1)
    with pytest.raises(Crash):
        store.put("a", b"1")  # moment 0 before it, moment 1 after it
    assert inner.get("a") == b"1"
    with pytest.raises(Crash):
        store.get("a")
    crashed: list[bool] = []

    def other() -> None:
        try:
            store.put("b", b"")
        except Crash:
            crashed.append(True)

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert crashed == [True]
    assert inner.size("b") is None


def test_every_crash_point_is_visited_once() -> None:
    def job(store: ObjectStore) -> None:
        store.put("data", b"d")
        store.create("point", b"p")
        store.delete("old")

    def begin() -> ObjectStore:
        store = MemoryStore()
        store.put("old", b"o")
        return store

    left = [(moment, [info.name for info in store.list("")]) for moment, store in crash_points(begin, job)]
    assert left == [
        (0, ["old"]),
        (1, ["data", "old"]),
        (2, ["data", "old"]),
        (3, ["data", "old", "point"]),
        (4, ["data", "old", "point"]),
        (5, ["data", "point"]),
    ]


def test_a_job_that_never_ends_is_noticed() -> None:
    def job(store: ObjectStore) -> None:
        for number in range(100):
            store.put(f"n{number}", b"")

    with pytest.raises(AssertionError, match="not done after 20"):
        list(crash_points(MemoryStore, job, limit=20))
