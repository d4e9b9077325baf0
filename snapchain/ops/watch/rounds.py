"""What the next round of a watch does, and when: one pure function of what is there and what time it is.

    chain of a disk     root  a  b | c  d | e  f   active
                                   |      |
                 held by all ------+      +------ held by no destination yet
                                   held by some: another one does not answer

Layers between two of these borders may become one: no destination loses the layer on which its next shipment builds.
What all destinations hold is merged by rules and costs, as nightly does it; what some lack is merged when the chain is
too long, or when it takes too much room.  Points that were never shipped go with that, and nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise

_FIRST_PAUSE = 15.0
"""Seconds before a destination that failed is tried again; twice as long after each further failure."""
_LONGEST_PAUSE = 900.0
_LEAST_SETTLED = 2
"""Of the layers that all destinations hold, so many are left by merges at least: the root, which stays, and one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """What was asked for.

    every: seconds between two snapshots; merge_above: files of a local chain
    space_limit: bytes of sealed layers that are not shipped, of all disks; None: no limit
    """

    every: float
    merge_above: int
    space_limit: int | None = None

    @property
    def fewer(self) -> int:
        """Files of a chain after a merge: so few that not every round has to merge."""
        return self.merge_above - self.merge_above // 4


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskSight:
    """The chain of a disk. sealed: bytes of each sealed file, root first; active: bytes of the active layer

    held: destination -> how many of the sealed files it holds, from the root on
    """

    name: str
    sealed: tuple[int, ...]
    active: int
    held: Mapping[str, int]

    @property
    def files(self) -> int:
        """Of the whole chain."""
        return len(self.sealed) + 1

    @property
    def borders(self) -> list[int]:
        """Where what one of the destinations holds ends, ascending, then the end of what is sealed."""
        return sorted({*self.held.values(), len(self.sealed)})

    def bytes_from(self, place: int) -> int:
        """Of the sealed files from this place on. The root counts for nothing: no snapshot has made it."""
        return sum(self.sealed[max(place, 1) :])


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetSight:
    """A destination. is_current: the newest snapshot is a guest point there

    failures: in a row; retry_at: seconds since 1970, before which it is not tried again
    """

    name: str
    is_current: bool
    failures: int = 0
    retry_at: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Sight:
    """What is there. snapshot_at: seconds since 1970 of the newest snapshot; None: of none that can still be shipped

    merge_at: before which no merge is tried, since the last one failed or changed nothing
    """

    snapshot_at: float | None
    disks: tuple[DiskSight, ...]
    targets: tuple[TargetSight, ...]
    merge_at: float = 0.0

    def lacking(self, target: str) -> int:
        """Bytes of sealed files that a destination lacks."""
        return sum(disk.bytes_from(disk.held.get(target, 0)) for disk in self.disks)

    @property
    def waiting(self) -> int:
        """Bytes of sealed files that no destination holds."""
        return sum(disk.bytes_from(max(disk.held.values(), default=0)) for disk in self.disks)

    @property
    def active(self) -> int:
        """Bytes of all active layers: what a snapshot would seal."""
        return sum(disk.active for disk in self.disks)


@dataclass(frozen=True, slots=True)
class Range:
    """Sealed files of a disk that become one: places `first` to `last`, 0 for the root."""

    disk: str
    first: int
    last: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """What to do, in this order. A round in which nothing is done only waits.

    squeeze: ranges of files that some destination lacks; snapshot: of the guest; ship_to: destinations
    settle: disks with how many files their chains shall have: rules merge of those that all destinations hold
    left_behind: destinations whose place in the chains is not kept by that: their next shipment reads the disk whole
    wait: seconds until the next round; held_back: why no snapshot is made although one is due
    """

    squeeze: tuple[Range, ...] = ()
    snapshot: bool = False
    ship_to: tuple[str, ...] = ()
    settle: tuple[tuple[str, int], ...] = ()
    left_behind: frozenset[str] = field(default_factory=frozenset)
    wait: float = 0.0
    held_back: str | None = None

    @property
    def does_something(self) -> bool:
        """Whether it is more than waiting."""
        return bool(self.squeeze or self.snapshot or self.ship_to or self.settle)


def next_round(sight: Sight, rules: Rules, now: float) -> Round:
    """The next round. now: seconds since 1970.

    Its `wait` counts from `now` for a round that does nothing, and is 0 for any other: then look again.
    """
    due = due_at(sight.snapshot_at, rules, now) <= now
    may_merge = sight.merge_at <= now
    limit = rules.space_limit
    room = limit is None or sight.waiting == 0 or sight.waiting + sight.active <= limit
    snapshot = due and room
    squeeze: tuple[Range, ...] = ()
    held_back = None
    if due and not room:
        squeeze = _waiting_ranges(sight) if may_merge else ()
        if not squeeze:
            assert limit is not None
            held_back = (
                f"{sight.waiting} bytes of sealed layers wait for a destination, the active layers have "
                f"{sight.active} more, and the limit is {limit}"
            )
    behind = _left_behind(sight, limit)
    long = [disk for disk in sight.disks if disk.files + snapshot > rules.merge_above] if may_merge else []
    settle = [(disk.name, rules.fewer) for disk in long if _spare(disk, behind)]
    if not squeeze:
        squeeze = tuple(
            each
            for disk in long
            if disk.files + snapshot - _spare(disk, behind) > rules.merge_above
            for each in _ranges(disk, behind)
        )
    if behind and may_merge:
        spare = [(disk, _spare(disk, behind)) for disk in sight.disks]
        settle = [(disk.name, disk.files + snapshot - count) for disk, count in spare if count]
    ship_to = tuple(
        each.name
        for each in sight.targets
        if each.retry_at <= now and (snapshot or (sight.snapshot_at is not None and not each.is_current))
    )
    done = Round(
        squeeze=squeeze,
        snapshot=snapshot,
        ship_to=ship_to,
        settle=tuple(settle),
        left_behind=behind if settle else frozenset(),
        held_back=held_back,
    )
    if done.does_something:
        return done
    return Round(wait=_wait(sight, rules, now, due=due), held_back=held_back)


def due_at(snapshot_at: float | None, rules: Rules, now: float) -> float:
    """When the next snapshot is due. One that was dated later than the clock counts as none."""
    if snapshot_at is None or snapshot_at > now + rules.every:
        return now
    return snapshot_at + rules.every


def retry_pause(failures: int, rules: Rules) -> float:
    """Seconds before a destination that failed so often in a row is tried again: not much longer than the interval."""
    longest = min(max(rules.every, 4 * _FIRST_PAUSE), _LONGEST_PAUSE)
    return min(_FIRST_PAUSE * 2.0 ** min(failures - 1, 30), longest)


def _settled(disk: DiskSight, behind: frozenset[str]) -> int:
    """How many files all destinations hold, but for those that are left behind."""
    return min((count for name, count in disk.held.items() if name not in behind), default=0)


def _spare(disk: DiskSight, behind: frozenset[str]) -> int:
    """How many files merges of these can spare."""
    return max(_settled(disk, behind) - _LEAST_SETTLED, 0)


def _ranges(disk: DiskSight, behind: frozenset[str]) -> list[Range]:
    """Files between two borders, above what all destinations hold; the root is none of them."""
    borders = [each for each in disk.borders if each >= _settled(disk, behind)]
    return [Range(disk.name, max(low, 1), high - 1) for low, high in pairwise(borders) if high - max(low, 1) > 1]


def _waiting_ranges(sight: Sight) -> tuple[Range, ...]:
    """Of each disk, the files that no destination holds."""
    found = []
    for disk in sight.disks:
        low = max(1, *disk.held.values()) if disk.held else 1
        if len(disk.sealed) - low > 1:
            found.append(Range(disk.name, low, len(disk.sealed) - 1))
    return tuple(found)


def _left_behind(sight: Sight, limit: int | None) -> frozenset[str]:
    """Destinations that fail, and for whose sake the others would be kept from what was asked for: room is spent."""
    if limit is None or not any(each.is_current for each in sight.targets):
        return frozenset()
    return frozenset(each.name for each in sight.targets if each.failures and sight.lacking(each.name) > limit)


def _wait(sight: Sight, rules: Rules, now: float, *, due: bool) -> float:
    """Seconds until something may be different: the next snapshot, or the next attempt with a destination."""
    times = [each.retry_at for each in sight.targets if sight.snapshot_at is not None and not each.is_current]
    if not due:
        times.append(due_at(sight.snapshot_at, rules, now))
    if sight.merge_at > now:
        times.append(sight.merge_at)
    later = [each - now for each in times if each > now]
    # A snapshot that is held back waits for a destination; the active layers change meanwhile.
    return min([*later, rules.every])
