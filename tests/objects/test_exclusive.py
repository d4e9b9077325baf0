"""Creating exclusively on stores that cannot: no acknowledged create is ever lost."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import pytest

from snapchain.errors import Conflict, SnapchainError, Unavailable
from snapchain.objects import open_store
from snapchain.objects.exclusive import CLAIM_LIFE, LONGEST_STALL, PATIENCE, Clockwork, create_exclusively, is_claim
from snapchain.objects.memory import MemoryStore
from snapchain.objects.store import Data, ObjectStore, StoreWrapper
from snapchain.testing.faults import Crash, Fault, FaultStore, On, crash_points
from tests.servers import S3Server
from tests.waiting import HANG

OTHER = "point.claim.0000000000000000"


class Overwriting(StoreWrapper):
    """A store whose create is a put, as rclone's; `jitter` makes its threads interleave in every way."""

    def __init__(self, inner: ObjectStore, *, jitter: bool = False) -> None:
        super().__init__(inner)
        self._jitter = jitter
        self.writes: list[tuple[str, bytes]] = []

    def put(self, name: str, data: Data) -> None:
        self._pause()
        self.inner.put(name, data)
        self.writes.append((name, self.inner.get(name)))
        self._pause()

    def create(self, name: str, data: Data) -> bool:
        self.put(name, data)
        return True

    def size(self, name: str) -> int | None:
        self._pause()
        return self.inner.size(name)

    def _pause(self) -> None:
        if self._jitter and random.random() < 0.5:
            time.sleep(random.random() * 0.003)


@dataclass
class Clock:
    """Time that passes by sleeping, for us and for the store."""

    now: float = 1_000_000.0
    slept: list[float] = field(default_factory=list)

    def time(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds

    @property
    def work(self) -> Clockwork:
        return Clockwork(self.time, self.sleep)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(clock: Clock) -> MemoryStore:
    return MemoryStore(clock=clock.time)


def names(store: ObjectStore) -> list[str]:
    return [info.name for info in store.list("")]


def race(store: ObjectStore, rounds: int, racers: int) -> None:
    """Each round everybody wants one name. Who says True has written what is there, and only one says so."""
    start = threading.Barrier(racers)

    def run(racer: int) -> list[bool | None]:
        said: list[bool | None] = []
        for number in range(rounds):
            start.wait(HANG)
            try:
                said.append(
                    create_exclusively(store, f"points/{number:04}", b"%d of %d" % (racer, number), conditional=False)
                )
            except Conflict:
                said.append(None)
            except BaseException:
                start.abort()  # the others need not wait
                raise
        return said

    with ThreadPoolExecutor(racers) as pool:
        said = list(pool.map(run, range(racers)))
    for number in range(rounds):
        winners = [racer for racer in range(racers) if said[racer][number]]
        assert len(winners) == 1, (number, [row[number] for row in said])
        assert store.get(f"points/{number:04}") == b"%d of %d" % (winners[0], number)
    assert not [name for name in names(store) if is_claim(name)]


# ---- races


def test_racing_on_rclone(rclone: S3Server) -> None:
    store = open_store(f"s3://{rclone.new_bucket()}/repo")
    race(store, rounds=25, racers=6)
    store.close()


def test_racing_in_every_order() -> None:
    race(Overwriting(MemoryStore(), jitter=True), rounds=60, racers=4)


def test_the_race_itself_can_lose() -> None:
    """Without claims the same race loses writes: it is no empty test."""
    store = Overwriting(MemoryStore(), jitter=True)
    start = threading.Barrier(4)

    def run(racer: int) -> int:
        won = 0
        for number in range(40):
            start.wait(HANG)
            name = f"points/{number}"
            won += store.size(name) is None and store.create(name, b"%d" % racer)
        return won

    with ThreadPoolExecutor(4) as pool:
        assert sum(pool.map(run, range(4))) > 40


# ---- one at a time


def test_alone(store: MemoryStore) -> None:
    assert create_exclusively(store, "point", [b"mi", b"ne"], conditional=False) is True
    assert create_exclusively(store, "point", b"other", conditional=False) is False
    assert store.get("point") == b"mine"
    assert names(store) == ["point"]


def test_claims_are_recognised() -> None:
    assert is_claim(OTHER)
    assert not is_claim("points/0001")
    assert not is_claim("point.claim.xyz")


def test_a_conditional_store_needs_no_claims(store: MemoryStore) -> None:
    faulty = FaultStore(store)
    assert create_exclusively(faulty, "point", b"mine", conditional=True) is True
    assert create_exclusively(faulty, "point", b"other", conditional=True) is False
    assert [call.operation for call in faulty.calls] == ["create", "create"]


def test_a_conditional_create_without_a_reply_is_settled(store: MemoryStore) -> None:
    lost = FaultStore(store, [On(1, Fault.LOST_REPLY, operation="create")])
    assert create_exclusively(lost, "point", b"mine", conditional=True) is True
    failed = FaultStore(store, [On(1, Fault.UNAVAILABLE, operation="create")])
    assert create_exclusively(failed, "point", b"other", conditional=True) is False
    failed = FaultStore(store, [On(1, Fault.UNAVAILABLE, operation="create")])
    with pytest.raises(Unavailable, match="new: injected"):
        create_exclusively(failed, "new", b"mine", conditional=True)


def test_a_living_claim_keeps_others_away(store: MemoryStore, clock: Clock) -> None:
    for other in (OTHER, "point.claim.ffffffffffffffff"):
        store.put(other, b"")
        begun = clock.now
        with pytest.raises(Conflict, match="point: others hold claims") as caught:
            create_exclusively(store, "point", b"mine", conditional=False, clockwork=clock.work)
        assert caught.value.hint
        assert PATIENCE <= clock.now - begun < PATIENCE + 5
        assert names(store) == [other]
        store.delete(other)


def test_a_claim_that_goes_away_lets_us_in(store: MemoryStore, clock: Clock) -> None:
    store.put(OTHER, b"")

    def sleep(seconds: float) -> None:
        clock.sleep(seconds)
        if len(clock.slept) == 3:
            store.delete(OTHER)

    assert create_exclusively(store, "point", b"mine", conditional=False, clockwork=Clockwork(clock.time, sleep))
    assert names(store) == ["point"]


def test_a_dead_claim_is_removed(store: MemoryStore, clock: Clock) -> None:
    store.put(OTHER, b"")
    clock.now += CLAIM_LIFE - 1
    with pytest.raises(Conflict, match="would have waited"):
        create_exclusively(store, "point", b"a", conditional=False, clockwork=Clockwork(time.monotonic, one_look()))
    clock.now += 2
    assert create_exclusively(store, "point", b"b", conditional=False, clockwork=clock.work) is True
    assert names(store) == ["point"]


def one_look() -> Callable[[float], None]:
    """A sleep that ends the test's patience."""

    def sleep(seconds: float) -> None:
        raise Conflict(f"would have waited {seconds} s")

    return sleep


class StallsAfterClaiming(StoreWrapper):
    """The first claim is put, and then nothing happens for a while, in which others go on."""

    def __init__(self, inner: ObjectStore, clock: Clock, seconds: float) -> None:
        super().__init__(inner)
        self._clock = clock
        self._left = seconds

    def size(self, name: str) -> int | None:
        found = self.inner.size(name)
        if any(is_claim(info.name) for info in self.inner.list("")):  # the look just before the write
            self._clock.now += self._left
            self._left = 0.0
        return found


def test_who_stalled_gives_up_and_starts_again(store: MemoryStore, clock: Clock) -> None:
    faulty = FaultStore(StallsAfterClaiming(store, clock, LONGEST_STALL + 1))
    with pytest.raises(Conflict, match="point: others hold claims"):  # its patience is over as well
        create_exclusively(faulty, "point", b"mine", conditional=False, clockwork=clock.work)
    assert names(store) == []
    assert [call.name for call in faulty.calls if call.operation == "put" and not is_claim(call.name)] == []


def test_a_short_stall_does_not_matter(store: MemoryStore, clock: Clock) -> None:
    slow = StallsAfterClaiming(store, clock, LONGEST_STALL - 1)
    assert create_exclusively(slow, "point", b"mine", conditional=False, clockwork=clock.work) is True


def test_who_was_held_for_dead_does_not_write(store: MemoryStore, clock: Clock) -> None:
    class RemovesTheFirstClaim(StoreWrapper):
        removed = False

        def put(self, name: str, data: Data) -> None:
            self.inner.put(name, data)
            if is_claim(name) and not self.removed:
                self.removed = True
                self.inner.delete(name)

    assert create_exclusively(RemovesTheFirstClaim(store), "point", b"x", conditional=False, clockwork=clock.work)
    assert len(clock.slept) == 1


def test_a_name_that_appears_meanwhile_is_not_overwritten(store: MemoryStore, clock: Clock) -> None:
    class AppearsMeanwhile(StoreWrapper):
        def put(self, name: str, data: Data) -> None:
            self.inner.put(name, data)
            if is_claim(name):
                self.inner.put("point", b"theirs")

    assert not create_exclusively(AppearsMeanwhile(store), "point", b"x", conditional=False, clockwork=clock.work)
    assert store.get("point") == b"theirs"
    assert names(store) == ["point"]


def test_a_program_that_knows_no_claims_is_noticed(store: MemoryStore) -> None:
    class Overwritten(StoreWrapper):
        def put(self, name: str, data: Data) -> None:
            self.inner.put(name, data if is_claim(name) else b"theirs")

    with pytest.raises(Conflict, match="another program"):
        create_exclusively(Overwritten(store), "point", b"mine", conditional=False)
    assert names(store) == ["point"]


# ---- faults


def test_a_write_in_doubt_is_settled(store: MemoryStore) -> None:
    lost = FaultStore(store, [On(2, Fault.LOST_REPLY, operation="put")])
    assert create_exclusively(lost, "point", b"mine", conditional=False) is True
    assert names(store) == ["point"]


def test_a_write_in_doubt_keeps_its_claim(store: MemoryStore, clock: Clock) -> None:
    """It may land yet: until the claim is dead nobody else may write."""
    lost = FaultStore(store, [On(2, Fault.UNAVAILABLE, operation="put")])
    with pytest.raises(Unavailable, match=r"point: injected|injected: the server"):
        create_exclusively(lost, "point", b"mine", conditional=False)
    (left,) = names(store)
    assert is_claim(left)
    with pytest.raises(Conflict, match="point: others hold claims"):
        create_exclusively(store, "point", b"other", conditional=False, clockwork=clock.work)
    clock.now += CLAIM_LIFE
    assert create_exclusively(store, "point", b"other", conditional=False, clockwork=clock.work)


@pytest.mark.parametrize("nth", range(1, 9))
@pytest.mark.parametrize("fault", [Fault.UNAVAILABLE, Fault.LOST_REPLY])
def test_a_fault_at_any_call_loses_nothing(nth: int, fault: Fault, clock: Clock) -> None:
    store = MemoryStore(clock=clock.time)
    try:
        assert create_exclusively(FaultStore(store, [On(nth, fault)]), "point", b"mine", conditional=False)
    except SnapchainError:
        clock.now += CLAIM_LIFE + 1
        again = create_exclusively(store, "point", b"again", conditional=False, clockwork=clock.work)
        assert store.get("point") == (b"again" if again else b"mine")
    else:
        assert store.get("point") == b"mine"
    clock.now += CLAIM_LIFE + 1
    assert not create_exclusively(store, "point", b"later", conditional=False, clockwork=clock.work)


def test_a_death_at_any_moment_blocks_for_the_life_of_a_claim_only(clock: Clock) -> None:
    def job(store: ObjectStore) -> None:
        create_exclusively(store, "point", b"mine", conditional=False, clockwork=clock.work)

    deaths = 0
    for moment, left in crash_points(lambda: MemoryStore(clock=clock.time), job):
        deaths += 1
        before = left.get("point") if left.size("point") is not None else None
        clock.now += CLAIM_LIFE + 1
        said = create_exclusively(left, "point", b"other", conditional=False, clockwork=clock.work)
        assert said is (before is None), moment
        assert left.get("point") == (b"other" if said else before)
    assert deaths == 6  # before and after: the claim, the object, the claim's end


def test_a_crash_is_a_crash(store: MemoryStore) -> None:
    with pytest.raises(Crash):
        create_exclusively(FaultStore(store, crash_at=1), "point", b"mine", conditional=False)
