"""Retry, throttle and faults: each keeps the contract, and does its one thing."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from snapchain.errors import InvalidInput, NotFound, Unavailable
from snapchain.objects.memory import MemoryStore
from snapchain.objects.retry import Backoff, RetryingStore
from snapchain.objects.store import ObjectInfo, ObjectStore, Properties, Refused, StoreWrapper, innermost
from snapchain.objects.throttle import BURST, ThrottledStore, TokenBucket
from snapchain.testing.faults import Crash, Fault, FaultStore, On, crash_points
from snapchain.testing.object_contract import ObjectStoreContract


class TestWrapped(ObjectStoreContract):
    """All wrappers around one another."""

    @pytest.fixture
    def store(self) -> ObjectStore:
        return RetryingStore(ThrottledStore(FaultStore(MemoryStore()), upload=1e12, download=1e12))


class TestRetriedThroughFaults(ObjectStoreContract):
    """Every second of the first 400 calls fails, in turn before and after its effect."""

    @pytest.fixture
    def store(self) -> ObjectStore:
        kinds = [Fault.UNAVAILABLE, Fault.LOST_REPLY]
        faults = [On(nth, kinds[nth // 2 % 2]) for nth in range(1, 400, 2)]
        return RetryingStore(FaultStore(MemoryStore(), faults), sleep=lambda _: None, backoff=Backoff(attempts=50))

    def test_create_never_replaces(self, store: ObjectStore) -> None:
        """Equal bytes are ours, whoever wrote them: all else is as in the contract."""
        assert store.create("a", b"first") is True
        assert store.create("a", b"second") is False
        assert store.get("a") == b"first"


def test_a_wrapper_passes_on_what_the_opener_sets() -> None:
    inner = MemoryStore()
    store = StoreWrapper(StoreWrapper(inner))
    store.properties = Properties(conditional_put=False, description="x")
    assert inner.properties is store.properties
    assert innermost(store) is inner
    assert innermost(inner) is inner


# ---- retry


class Pauses(list[float]):
    def __call__(self, seconds: float) -> None:
        self.append(seconds)


def flaky(faults: list[On], **backoff: float) -> tuple[RetryingStore, FaultStore, Pauses]:
    pauses = Pauses()
    faulty = FaultStore(MemoryStore(), faults)
    policy = Backoff(attempts=4, first=backoff.get("first", 1.0), longest=backoff.get("longest", 3.0))
    return RetryingStore(faulty, backoff=policy, sleep=pauses), faulty, pauses


def test_passing_failures_are_outlasted_with_growing_pauses() -> None:
    store, faulty, pauses = flaky([On(nth, Fault.UNAVAILABLE) for nth in (1, 2, 3)])
    store.put("a", b"x")
    assert len(faulty.calls) == 4
    for pause, whole in zip(pauses, [1.0, 2.0, 3.0], strict=True):
        assert whole / 2 <= pause <= whole


def test_the_last_failure_is_raised() -> None:
    store, faulty, pauses = flaky([On(nth, Fault.UNAVAILABLE) for nth in range(1, 9)])
    with pytest.raises(Unavailable, match="overloaded"):
        store.get("a")
    assert (len(faulty.calls), len(pauses)) == (4, 3)


def test_what_cannot_pass_is_not_tried_again() -> None:
    class Full(StoreWrapper):
        calls = 0

        def put(self, name: str, data: object) -> None:
            self.calls += 1
            raise Refused(f"no space for {data!r}", subject=name)

    inner = Full(MemoryStore())
    with pytest.raises(Refused, match="no space for"):
        RetryingStore(inner, sleep=lambda _: pytest.fail("slept")).put("a", b"")
    assert inner.calls == 1
    store, faulty, _ = flaky([])
    with pytest.raises(NotFound, match="no such object"):
        store.get("a")
    assert len(faulty.calls) == 1


def test_a_create_whose_reply_was_lost_is_ours() -> None:
    store, _, _ = flaky([On(1, Fault.LOST_REPLY, operation="create")])
    assert store.create("a", [b"my ", b"nonce"]) is True
    assert store.get("a") == b"my nonce"


def test_a_create_that_another_overtook_is_not_ours() -> None:
    store, faulty, _ = flaky([On(1, Fault.UNAVAILABLE, operation="create")])
    faulty.inner.put("a", b"theirs")
    assert store.create("a", b"mine") is False
    assert store.get("a") == b"theirs"


def test_a_listing_that_breaks_off_goes_on() -> None:
    class Breaking(StoreWrapper):
        listings = 0

        def list(self, prefix: str) -> Iterator[ObjectInfo]:
            self.listings += 1
            for number, info in enumerate(self.inner.list(prefix)):
                if number == 2 * self.listings:
                    raise Unavailable("broke off")
                yield info

    inner = Breaking(MemoryStore())
    names = [f"d/{number}" for number in range(9)]
    for name in names:
        inner.put(name, b"")
    store = RetryingStore(inner, backoff=Backoff(attempts=2), sleep=lambda _: None)
    assert [info.name for info in store.list("d/")] == names
    assert inner.listings == 5


def test_the_caller_hears_of_failures() -> None:
    heard: list[tuple[str, float]] = []
    faulty = FaultStore(MemoryStore(), [On(1, Fault.UNAVAILABLE)])
    pauses = Pauses()
    store = RetryingStore(faulty, sleep=pauses, told=lambda error, pause: heard.append((str(error), pause)))
    store.put("a", b"")
    assert [pause for _, pause in heard] == pauses
    assert "overloaded" in heard[0][0]


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
