"""forget DEST::DISK@POINT, DEST::DISK --all-points, DEST --keep-...: which points go, of one disk or of many.

What is chosen are disks and guests, each with the rules that its destination carries out as a merge:

    DEST::web1/vda@3         the disk, by the number of its point
    DEST::web1@2             the guest: guest point 2 goes with the points of all its disks
    DEST --keep-daily 7      each guest as one, each other disk by itself

A guest's points are never torn apart: a point that belongs to a guest point goes with that, or not at all.  What was
named and is held is refused before anything is changed; rules go around it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, tzinfo
from fnmatch import fnmatchcase
from typing import TypeVar

from snapchain.destination.address import in_full
from snapchain.destination.reading import ReadableDestination
from snapchain.destination.records import DiskRecord, Finding, PointRecord, PointsMergePlan, PointsMergeReport, Record
from snapchain.destination.summary import possible_guest
from snapchain.errors import Conflict, InvalidInput, NotFound, SnapchainError
from snapchain.host.terminal import shell_word
from snapchain.model.events import Notice, OnEvent, ignore
from snapchain.model.points import LATEST, chosen_point
from snapchain.model.retention import DropAll, DropPoints, GuestRules, Policy
from snapchain.ops import guest_points_merge
from snapchain.ops.guest_points import GuestPoint, GuestView, guest_named, guests_of, records_of
from snapchain.ops.guest_points_merge import FailedDisk, GuestPointsMergePlan, GuestPointsMergeReport

P = TypeVar("P", PointRecord, GuestPoint)
_MOST_SHOWN = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class ForgetRequest:
    """Which points of one destination go.

    targets: disks and guests, each with the text after '@' of its address; none for the whole destination
    patterns: which disks and guests of the whole destination, as a shell matches names; none for all
    policy: rules for the points that stay; all_points: in its place, all points go, the newest too
    """

    targets: tuple[tuple[str, str | None], ...] = ()
    patterns: tuple[str, ...] = ()
    policy: Policy = field(default_factory=Policy)
    all_points: bool = False
    zone: tzinfo = UTC


@dataclass(frozen=True, slots=True)
class Chosen:
    """A disk, or a guest, and which of its points go."""

    name: str
    is_guest: bool
    rules: GuestRules


class StayingPoint(Record):
    """A point that was named and stays, since it was held meanwhile."""

    name: str
    point: int


class ForgetPlan(Record):
    """What `run` would do. points_dropped: of disks, and guest points; bytes_dropped: DATA of whole layers that go."""

    destination: str
    disks: tuple[PointsMergePlan, ...]
    guests: tuple[GuestPointsMergePlan, ...]
    points_dropped: int
    bytes_dropped: int


class ForgetReport(Record):
    """What was done. Sizes in bytes.

    points_dropped: of disks, and guest points; staying: those that were named, and held meanwhile
    failed: disks and guests of which nothing, or not all, was dropped; running it again does the rest
    bytes_freed: of the destination's storage; bytes_dropped: guest bytes that are unreferenced now
    needs_collecting: whether their space is only freed by a collection
    findings: damage because of which layers were not merged
    """

    destination: str
    disks: tuple[PointsMergeReport, ...]
    guests: tuple[GuestPointsMergeReport, ...]
    staying: tuple[StayingPoint, ...] = ()
    failed: tuple[FailedDisk, ...] = ()
    points_dropped: int
    bytes_freed: int
    bytes_dropped: int
    needs_collecting: bool
    findings: tuple[Finding, ...] = ()


def choose(url: str, disks: Sequence[DiskRecord], request: ForgetRequest) -> tuple[Chosen, ...]:
    """Which points of which disks and guests go, by name. Pure.

    disks: all of the destination, or at least those that are named, with all disks of their guests
    Raises InvalidInput for a request that says too little or too much, or would tear a guest point apart; NotFound for
    what is not there; Conflict for a held point that was named.
    """
    _check(request)
    chosen = _named(url, disks, request) if request.targets else _of_all(url, disks, request)
    if request.policy.is_empty:
        _check_unheld(url, disks, chosen)
    return chosen


def _check(request: ForgetRequest) -> None:
    by_point = [f"{name}@{point}" for name, point in request.targets if point is not None]
    by_rule = not request.policy.is_empty
    if by_rule and request.all_points:
        raise InvalidInput("--all-points leaves nothing for a rule to keep", hint="leave out one of them")
    if by_point and (by_rule or request.all_points):
        raise InvalidInput(
            "a point is named, and so are rules or --all-points",
            subject=by_point[0],
            hint="name the disk without a point, or leave the rules out",
        )
    if by_point and len(by_point) < len(request.targets):
        raise InvalidInput(
            "no point of it is named, but points of others are",
            subject=next(name for name, point in request.targets if point is None),
            hint="forget whole disks in a command of their own, with --all-points",
        )
    if request.patterns and request.targets:
        raise InvalidInput("--disks chooses among all disks, and one is named", hint="name DEST alone, or leave it out")
    if not by_point and not by_rule and not request.all_points:
        raise InvalidInput(
            "nothing says which points go",
            subject=request.targets[0][0] if request.targets else None,
            hint="name a point (DEST::DISK@3), the rules of those that stay (--keep-last 7), or --all-points",
        )
    if request.all_points and not request.targets and not request.patterns:
        raise InvalidInput(
            "this would drop every point of every disk",
            hint="name the disks, or say --disks '*' if that is what you want",
        )


def _of_all(url: str, disks: Sequence[DiskRecord], request: ForgetRequest) -> tuple[Chosen, ...]:
    """Guests, and the disks that belong to none, that the patterns match."""
    guests = guests_of(disks)
    of_guests = {name for guest in guests for name in (*guest.disks, guest.record_disk)}
    rules = DropAll() if request.all_points else request.policy
    wanted = request.patterns or ("*",)
    matched: set[str] = set()

    def matches(name: str) -> bool:
        hits = [pattern for pattern in wanted if fnmatchcase(name, pattern)]
        matched.update(hits)
        return bool(hits)

    found = [Chosen(guest.name, True, rules) for guest in guests if _takes(guest, matches)]
    alone = [disk for disk in disks if disk.name not in of_guests]
    found += [Chosen(disk.name, False, _for_disk(disk, rules)) for disk in alone if matches(disk.name)]
    missed = [pattern for pattern in request.patterns if pattern not in matched]
    if missed:
        raise NotFound(
            "no disk or guest has such a name", subject=missed[0], hint=f"`snapchain log {shell_word(url)}` lists them"
        )
    return tuple(sorted(found, key=lambda each: each.name))


def _takes(guest: GuestView, matches: Callable[[str], bool]) -> bool:
    """Whether the patterns choose a guest. Raises InvalidInput where they choose a part of its disks."""
    as_a_whole = matches(guest.name)
    parts = [name for name in guest.disks if matches(name)]
    if parts and not as_a_whole and len(parts) < len(guest.disks):
        rest = next(name for name in guest.disks if name not in parts)
        raise InvalidInput(
            f"the pattern takes {parts[0]} and not {rest}; points of a guest are kept or dropped as a whole",
            subject=guest.name,
            hint=f"--disks {shell_word(guest.name)} takes the guest",
        )
    return as_a_whole or bool(parts)


def _for_disk(disk: DiskRecord, rules: GuestRules) -> GuestRules:
    """What `Destination.merging` is asked for."""
    if not isinstance(rules, DropAll):
        return rules
    return DropPoints(frozenset(point.point for point in disk.points), newest=True)


def _named(url: str, disks: Sequence[DiskRecord], request: ForgetRequest) -> tuple[Chosen, ...]:
    known = {disk.name: disk for disk in disks}
    wanted: dict[str, list[str]] = {}
    for name, point in request.targets:
        wanted.setdefault(name, []).extend([] if point is None else [point])
    found = []
    for name, texts in wanted.items():
        if name in known:
            _check_of_no_guest(known[name], disks, texts)
            rules: GuestRules = _dropped(name, known[name].points, texts) if texts else _whole(request)
            found.append(Chosen(name, False, _for_disk(known[name], rules)))
        else:
            if not any(disk.name.startswith(f"{name}/") for disk in disks):
                raise NotFound(
                    "there is no disk or guest of that name",
                    subject=f"{url}::{name}",
                    hint=f"`snapchain log {shell_word(url)}` lists them",
                )
            view = guest_points_merge.guest_in(url, disks, name)
            found.append(Chosen(name, True, _dropped(name, view.points, texts) if texts else _whole(request)))
    return tuple(found)


def _whole(request: ForgetRequest) -> GuestRules:
    return DropAll() if request.all_points else request.policy


def _dropped(name: str, points: Sequence[P], texts: Sequence[str]) -> DropPoints:
    """The points of a disk or a guest that are named. Raises NotFound, and InvalidInput for a newest that is not."""
    numbers = set()
    for text in texts:
        wanted = in_full(text)
        point = chosen_point(name, points, wanted)
        if point is points[-1] and not _is_name(point, wanted):
            raise InvalidInput(
                f"{text} means point {point.point}, which is the newest",
                subject=name,
                hint=f"the newest point goes only by its number, its label, or as @{LATEST}",
            )
        numbers.add(point.point)
    return DropPoints(frozenset(numbers), newest=points[-1].point in numbers)


def _is_name(point: PointRecord | GuestPoint, wanted: str | None) -> bool:
    """Whether a text is a name of that point: all but a time, which means the newest point not after it."""
    return wanted is not None and (wanted == LATEST or wanted.isdecimal() or wanted in point.labels)


def _check_of_no_guest(disk: DiskRecord, disks: Sequence[DiskRecord], texts: Sequence[str]) -> None:
    """Raises InvalidInput where points would go that belong to points of a guest."""
    guest, _, _ = disk.name.rpartition("/")
    points = [chosen_point(disk.name, disk.points, in_full(text)) for text in texts] or disk.points
    torn = next((point for point in points if point.instant is not None), None)
    if torn is None and disk.record_of is None:
        return
    view = guest_named(disks, guest)
    whole = next((each for each in view.points if torn and each.instant == torn.instant), None) if view else None
    at = f"@{whole.point}" if whole and texts else ""
    raise InvalidInput(
        f"point {torn.point} belongs to a point of a guest, which is kept or dropped as a whole"
        if torn
        else "this disk holds the records of a guest, which go with its points",
        subject=disk.name,
        hint=f"name the guest: DEST::{guest}{at}",
    )


def _check_unheld(url: str, disks: Sequence[DiskRecord], chosen: Sequence[Chosen]) -> None:
    """Raises Conflict where points that were named are held."""
    found = [(f"{name}@{number}", tags) for each in chosen for name, number, tags in _held(disks, each)]
    if not found:
        return
    shown = ", ".join(f"{name} ({', '.join(tags)})" for name, tags in found[:_MOST_SHOWN])
    more = f" and {len(found) - _MOST_SHOWN} more" if len(found) > _MOST_SHOWN else ""
    name, tags = found[0]
    place = f"{url}::{name}"
    raise Conflict(
        f"held points are never forgotten: {shown}{more}",
        subject=chosen[0].name if len(chosen) == 1 else None,
        hint=f"release them first: snapchain release {shell_word(place)} --tag {shell_word(tags[0])}",
    )


def _held(disks: Sequence[DiskRecord], chosen: Chosen) -> Iterator[tuple[str, int, Sequence[str]]]:
    """Points that are held and were named: of which disk or guest, its number, the tags."""
    view = guest_named(disks, chosen.name) if chosen.is_guest else None
    in_guest: set[tuple[str, int]] = set()
    for point in view.points if view is not None else ():
        parts = {view.record_disk: point.record, **point.disks} if view is not None else {}
        in_guest |= {(name, part.point) for name, part in parts.items()}
        tags = dict.fromkeys(hold.tag for part in parts.values() for hold in part.holds)
        if tags and _goes(point.point, chosen.rules):
            yield chosen.name, point.point, list(tags)
    if view is not None and not isinstance(chosen.rules, DropAll):
        return
    names = {chosen.name} if view is None else {*view.disks, view.record_disk}
    for disk in disks:
        for each in disk.points if disk.name in names else ():
            if each.holds and (disk.name, each.point) not in in_guest and _goes(each.point, chosen.rules):
                yield disk.name, each.point, [hold.tag for hold in each.holds]


def _goes(number: int, rules: GuestRules) -> bool:
    return isinstance(rules, DropAll) or (isinstance(rules, DropPoints) and number in rules.numbers)


def plan(destination: ReadableDestination, request: ForgetRequest, *, now: datetime | None = None) -> ForgetPlan:
    """What `run` would do. Raises as `choose`, and what keeps a disk from being looked at."""
    now = now or datetime.now(UTC)
    disks: list[PointsMergePlan] = []
    guests: list[GuestPointsMergePlan] = []
    for each in choose(destination.url, _listed(destination, request), request):
        if each.is_guest:
            guests.append(guest_points_merge.plan(destination, each.name, each.rules, zone=request.zone, now=now))
        else:
            assert not isinstance(each.rules, DropAll)
            disks.append(destination.merging(each.name, each.rules, zone=request.zone, now=now).plan())
    decided_points = [*(disk.points for disk in disks), *(guest.points for guest in guests)]
    parts = [*disks, *(disk for guest in guests for disk in guest.disks)]
    return ForgetPlan(
        destination=destination.url,
        disks=tuple(disks),
        guests=tuple(guests),
        points_dropped=sum(not point.kept for decided in decided_points for point in decided),
        bytes_dropped=sum(part.bytes_dropped for part in parts),
    )


def run(
    destination: ReadableDestination, request: ForgetRequest, *, now: datetime | None = None, on_event: OnEvent = ignore
) -> ForgetReport:
    """Drop the points, and merge or drop the layers that no other point needs. A run that was killed is run again.

    What is published or held after the look stays. Of several disks and guests, one that fails is reported, and the
    others are done. Raises as `choose`, and what the only one meets.
    """
    now = now or datetime.now(UTC)
    chosen = choose(destination.url, _listed(destination, request), request)
    disks: list[PointsMergeReport] = []
    guests: list[GuestPointsMergeReport] = []
    failed: list[FailedDisk] = []
    staying: list[StayingPoint] = []
    for each in chosen:
        try:
            done = _forget(destination, each, request, now, on_event)
        except SnapchainError as error:
            if len(chosen) == 1:
                raise
            failed.append(FailedDisk(disk=each.name, kind=error.kind, message=str(error)))
            on_event(Notice.of(each.name, f"its points were not dropped: {error}"))
            continue
        if isinstance(done, GuestPointsMergeReport):
            guests.append(done)
        else:
            disks.append(done)
        if isinstance(each.rules, DropPoints):
            kept = sorted(each.rules.numbers & {*done.points_kept})
            staying += [StayingPoint(name=each.name, point=number) for number in kept]
    failed += [part for guest in guests for part in guest.failed]
    found: list[PointsMergeReport | GuestPointsMergeReport] = [*disks, *guests]
    return ForgetReport(
        destination=destination.url,
        disks=tuple(disks),
        guests=tuple(guests),
        staying=tuple(staying),
        failed=tuple(failed),
        points_dropped=sum(len(one.points_dropped) for one in found),
        bytes_freed=sum(one.bytes_freed for one in found),
        bytes_dropped=sum(one.bytes_dropped for one in found),
        needs_collecting=destination.traits.needs_collecting,
        findings=tuple(finding for one in found for finding in one.findings),
    )


def _forget(
    destination: ReadableDestination, chosen: Chosen, request: ForgetRequest, now: datetime, on_event: OnEvent
) -> PointsMergeReport | GuestPointsMergeReport:
    if chosen.is_guest:
        return guest_points_merge.run(
            destination, chosen.name, chosen.rules, zone=request.zone, now=now, on_event=on_event
        )
    assert not isinstance(chosen.rules, DropAll)
    return destination.merging(chosen.name, chosen.rules, zone=request.zone, now=now).run(on_event=on_event)


def _listed(destination: ReadableDestination, request: ForgetRequest) -> Sequence[DiskRecord]:
    """All disks; of named ones and of guests these alone, with all disks of their guests, perhaps among others."""
    if not request.targets:
        return destination.disks()
    found: list[DiskRecord] = []
    guests: dict[str, NotFound] = {}
    for name in dict.fromkeys(name for name, _ in request.targets):
        try:
            found += destination.disks(name)
        except NotFound as error:
            guests[name] = error
    of_guests = {guest for disk in found if (guest := possible_guest(disk.name)) is not None and _is_of_guest(disk)}
    if not guests and not of_guests:
        return found
    members = records_of(destination, {*guests, *of_guests})
    for name, missing in guests.items():
        if not any(disk.name.startswith(f"{name}/") for disk in members):
            raise missing  # it says more: that the disk was renamed
    return sorted({disk.name: disk for disk in (*found, *members)}.values(), key=lambda disk: disk.name)


def _is_of_guest(disk: DiskRecord) -> bool:
    return disk.record_of is not None or any(point.instant for point in disk.points)
