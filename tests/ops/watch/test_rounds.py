"""The decision of a watch's rounds, against a small model of a guest and of destinations that come and go."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

from hypothesis import given, settings, strategies as st

from snapchain.ops.watch.rounds import DiskSight, Range, Round, Rules, Sight, TargetSight, next_round, retry_pause

EVERY = 300.0
MiB = 1 << 20


@dataclass
class Place:
    """A destination of the model. held: sealed files from the root on; reads_whole: how often it had to."""

    is_up: bool = True
    held: int = 0
    newest: float | None = None
    failures: int = 0
    retry_at: float = 0.0
    reads_whole: int = 0


@dataclass
class World:
    """One disk of a guest that overwrites the same again and again: of merged files the largest size is left."""

    rules: Rules
    places: dict[str, Place]
    now: float = 1_000_000.0
    sealed: list[int] = field(default_factory=list)
    active: int = 0
    snapshots: list[float] = field(default_factory=list)
    merge_fails: bool = False
    merge_at: float = 0.0

    def sight(self) -> Sight:
        newest = self.snapshots[-1] if self.snapshots else None
        held = {name: place.held for name, place in self.places.items()}
        targets = tuple(
            TargetSight(
                name=name,
                is_current=newest is not None and place.newest == newest,
                failures=place.failures,
                retry_at=place.retry_at,
            )
            for name, place in self.places.items()
        )
        disk = DiskSight(name="vda", sealed=tuple(self.sealed), active=self.active, held=held)
        return Sight(snapshot_at=newest, disks=(disk,), targets=targets, merge_at=self.merge_at)

    def do(self, todo: Round) -> None:
        if self.merge_fails and (todo.squeeze or todo.settle):
            self.merge_at = self.now + self.rules.every
        for each in reversed(todo.squeeze):
            if not self.merge_fails:
                self.merge(each.first, each.last)
        if todo.snapshot:
            self.sealed.append(self.active)
            self.active = 0
            self.snapshots.append(self.now)
        for name in todo.ship_to:
            place = self.places[name]
            if place.is_up:
                place.held, place.newest, place.failures, place.retry_at = len(self.sealed), self.snapshots[-1], 0, 0.0
            else:
                place.failures += 1
                place.retry_at = self.now + retry_pause(place.failures, self.rules)
        if todo.settle and not self.merge_fails:
            count = min(p.held for name, p in self.places.items() if name not in todo.left_behind)
            ((_, most),) = todo.settle
            while count > 2 and len(self.sealed) + 1 > most:
                self.merge(count - 2, count - 1)
                count -= 1

    def merge(self, first: int, last: int) -> None:
        assert 1 <= first < last < len(self.sealed)
        self.sealed[first : last + 1] = [max(self.sealed[first : last + 1])]
        gone = last - first
        for place in self.places.values():
            if place.held > last:
                place.held -= gone
            elif place.held > first:  # its newest layer became part of another one
                place.held, place.reads_whole = first, place.reads_whole + 1

    def round(self) -> Round:
        todo = next_round(self.sight(), self.rules, self.now)
        self.do(todo)
        self.now += todo.wait
        return todo

    def until(self, end: float) -> list[Round]:
        """Rounds up to this time. Two rounds in a row without a wait may do different things, but not for ever."""
        found: list[Round] = []
        at_once = 0
        while self.now < end:
            found.append(self.round())
            at_once = 0 if found[-1].wait else at_once + 1
            assert at_once < 10, found[-10:]
        return found


def world(*names: str, limit: int | None = None, merge_above: int = 8) -> World:
    rules = Rules(every=EVERY, merge_above=merge_above, space_limit=limit)
    return World(rules, {name: Place() for name in names or ("vault",)})


def test_each_interval_has_one_snapshot_which_is_shipped_at_once() -> None:
    here = world()
    here.until(here.now + 10 * EVERY)
    begun = here.snapshots[0]
    assert here.snapshots == [begun + number * EVERY for number in range(10)]
    assert here.places["vault"].newest == here.snapshots[-1]


def test_a_chain_stays_as_short_as_asked_and_no_destination_reads_whole() -> None:
    here = world("vault", "kvm2", merge_above=5)
    for _ in range(40):
        here.until(here.now + EVERY)
        assert len(here.sealed) + 1 <= 5
    assert not any(place.reads_whole for place in here.places.values())


def test_a_dead_destination_is_tried_again_with_growing_pauses_and_catches_up() -> None:
    here = world()
    here.until(here.now + 2 * EVERY)
    vault = here.places["vault"]
    vault.is_up = False
    begun, tries = here.now, []
    while here.now < begun + 20 * EVERY:
        if here.round().ship_to:
            tries.append(here.now)
            assert len(tries) < 100
    pauses = [later - earlier for earlier, later in pairwise(tries)]
    assert pauses[:4] == [15.0, 30.0, 60.0, 120.0]
    assert max(pauses) <= EVERY
    vault.is_up = True
    here.until(here.now + EVERY + 1)
    assert vault.newest == here.snapshots[-1]
    assert vault.reads_whole == 0


def test_a_full_limit_merges_what_waits_and_then_holds_snapshots_back() -> None:
    here = world(limit=10 * MiB)
    here.until(here.now + 3 * EVERY)
    here.places["vault"].is_up = False
    said = []
    for _ in range(12):
        here.active = 4 * MiB
        said += here.until(here.now + EVERY)
        assert sum(here.sealed[here.places["vault"].held :]) <= 10 * MiB
    assert any(todo.squeeze for todo in said)
    held_back = {todo.held_back for todo in said if todo.held_back}
    assert not held_back, "merging made room each time: the guest writes the same again and again"
    assert here.places["vault"].reads_whole == 0
    here.active = 8 * MiB
    said = here.until(here.now + 3 * EVERY)
    assert not any(todo.snapshot for todo in said)
    assert any("the limit is 10485760" in (todo.held_back or "") for todo in said)
    here.places["vault"].is_up = True
    here.until(here.now + 2 * EVERY)
    assert here.places["vault"].newest == here.snapshots[-1]
    assert here.active == 0


def test_where_another_destination_answers_a_dead_one_is_left_behind_and_not_the_guest() -> None:
    here = world("vault", "kvm2", limit=5 * MiB, merge_above=6)
    here.until(here.now + EVERY)
    here.places["kvm2"].is_up = False
    left = []
    for number in range(30):
        here.active = (4 + number % 3) * MiB
        left += [todo.left_behind for todo in here.until(here.now + EVERY)]
        assert here.places["vault"].newest == here.snapshots[-1]
        assert len(here.sealed) + 1 <= 6
    assert len(here.snapshots) >= 31
    assert frozenset({"kvm2"}) in left
    assert here.places["vault"].reads_whole == 0
    here.places["kvm2"].is_up = True
    here.until(here.now + 2 * EVERY)
    assert here.places["kvm2"].newest == here.snapshots[-1]


def test_a_merge_that_fails_is_not_tried_again_at_once() -> None:
    here = world(merge_above=4)
    here.merge_fails = True
    tried = [todo for todo in here.until(here.now + 20 * EVERY) if todo.settle or todo.squeeze]
    assert 10 <= len(tried) <= 20
    assert len(here.snapshots) == 20


def test_a_snapshot_dated_in_the_future_does_not_stop_the_watch() -> None:
    here = world()
    here.snapshots = [here.now + 365 * 86400.0]
    here.sealed = [0, 0]
    assert here.round().snapshot


def test_a_range_never_takes_the_root_nor_crosses_a_border() -> None:
    disk = DiskSight(name="vda", sealed=(9, 1, 1, 1, 1, 1, 1), active=1, held={"a": 2, "b": 4})
    targets = (
        TargetSight(name="a", is_current=False, failures=1, retry_at=9e9),
        TargetSight(name="b", is_current=True),
    )
    rules = Rules(every=EVERY, merge_above=4)
    todo = next_round(Sight(snapshot_at=1000.0, disks=(disk,), targets=targets), rules, 1001.0)
    assert todo.squeeze == (Range("vda", 2, 3), Range("vda", 4, 6))


@settings(max_examples=60)
@given(data=st.data())
def test_any_weather(data: st.DataObject) -> None:
    """Interval, limit and progress hold whatever the guest writes and whichever destination is away when."""
    names = data.draw(st.sampled_from([("a",), ("a", "b"), ("a", "b", "c")]))
    limit = data.draw(st.sampled_from([None, 6 * MiB, 20 * MiB]))
    here = world(*names, limit=limit, merge_above=data.draw(st.integers(4, 9)))
    for _ in range(data.draw(st.integers(1, 25))):
        for place in here.places.values():
            place.is_up = data.draw(st.booleans())
        here.active = max(here.active, data.draw(st.integers(0, 12)) * MiB)
        here.until(here.now + data.draw(st.sampled_from([20.0, 300.0, 1000.0])))
        if limit is not None:
            best = max(place.held for place in here.places.values())
            waiting = here.sealed[max(best, 1) :]
            assert sum(waiting) <= limit or sum(size > 0 for size in waiting) == 1
    assert all(later - earlier >= EVERY for earlier, later in pairwise(here.snapshots))
    for place in here.places.values():
        place.is_up = True
    here.active = MiB
    here.until(here.now + 3 * EVERY)
    assert all(place.newest == here.snapshots[-1] for place in here.places.values())
    assert len(here.sealed) + 1 <= here.rules.merge_above
