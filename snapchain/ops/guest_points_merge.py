"""merge and forget DEST::GUEST: a guest point is kept or goes whole, with the points of all its disks.

The rules are applied to the guest points.  Then each disk keeps the points of the guest points that stay:

    web1/.guest   1 2 3       the policy keeps 1 and 3
    web1/vda      1 2 3 4     2 goes; 4 has no record, and is newer than 3: a shipment is under way, it stays
    web1/vdb      a 1 2 3     a belongs to no guest point: the policy is applied to such points on their own

Guest points that are named go alone: points of no guest point and leftovers stay, unless all points go.

The record's point goes first.  So a guest point that was dropped in part is never shown as one, and the next run drops
the rest of it: points with an instant and no record, older than the newest guest point.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, tzinfo

from snapchain.destination.guest_record import guest_of
from snapchain.destination.reading import ReadableDestination
from snapchain.destination.records import (
    DiskRecord,
    Finding,
    PointDecision,
    PointRecord,
    PointsMergePlan,
    PointsMergeReport,
    Record,
)
from snapchain.errors import InvalidInput, NotFound, SnapchainError
from snapchain.host.terminal import shell_word
from snapchain.model.events import Notice, OnEvent, ignore
from snapchain.model.holds import hold_reasons
from snapchain.model.retention import (
    Decision,
    DropAll,
    DropPoints,
    GuestRules,
    Policy,
    decide,
    decide_by,
    is_future,
)
from snapchain.ops.guest_points import GuestPoint, GuestView, guest_named, records_of


@dataclass(frozen=True, slots=True)
class GuestDecision:
    """What becomes of the points of a guest.

    points: of each guest point, by number; drop: of each disk, the numbers of the points that go, its records' too
    leftovers: how many instants without a record go; newest: disks of which the last point goes, too
    """

    points: tuple[Decision[GuestPoint], ...]
    drop: Mapping[str, frozenset[int]]
    leftovers: int
    newest: frozenset[str] = frozenset()

    def rules_of(self, disk: str, numbers: frozenset[int]) -> DropPoints:
        """What a disk's destination is asked for. numbers: of its points that go"""
        return DropPoints(numbers, newest=disk in self.newest)


class FailedDisk(Record):
    """A disk of which the points could not be dropped; the next run does it. kind, message: of the error."""

    disk: str
    kind: str
    message: str


class GuestPointsMergePlan(Record):
    """What `run` would do. points: the guest points; leftovers: interrupted ones that go; disks: records first."""

    destination: str
    guest: str
    points: tuple[PointDecision, ...]
    leftovers: int
    disks: tuple[PointsMergePlan, ...]
    layers_before: int
    layers_after: int


class GuestPointsMergeReport(Record):
    """What was done. Numbers of points are those of guest points; sizes are sums over all disks, in bytes.

    leftovers: interrupted guest points that went; disks: records first; failed: disks that the next run finishes
    """

    destination: str
    guest: str
    points_kept: tuple[int, ...]
    points_dropped: tuple[int, ...]
    points_of_the_future: tuple[int, ...] = ()
    leftovers: int
    disks: tuple[PointsMergeReport, ...]
    failed: tuple[FailedDisk, ...] = ()
    layers_before: int
    layers_after: int
    bytes_moved: int
    bytes_freed: int
    bytes_dropped: int
    strategy: str
    findings: tuple[Finding, ...] = ()


def decide_guest(
    view: GuestView, disks: Sequence[DiskRecord], rules: GuestRules, *, zone: tzinfo, now: datetime | None = None
) -> GuestDecision:
    """Which points of a guest's disks go. Pure.

    disks: those of the guest, with the one of its records
    rules: a policy for guest points, or numbers of guest points, or all that the disks have
    A guest point is held when its record's point or any of its disks' points is.
    """
    decisions = _decide_points(view, rules, zone=zone, now=now)
    stays = {(disk, point.point) for each in decisions if each.kept for disk, point in each.point.disks.items()}
    stays |= {(view.record_disk, each.point.record.point) for each in decisions if each.kept}
    known = {point.instant for point in view.points}
    newest = max(view.points, key=lambda each: each.point, default=None)
    drop: dict[str, frozenset[int]] = {}
    leftovers: set[str] = set()
    for disk in disks:
        alone = [point for point in disk.points if point.instant is None]
        gone = _gone_alone(alone, rules, zone=zone, now=now)
        for point in disk.points:
            if point.instant is None or (disk.name, point.point) in stays:
                continue
            if point.instant in known:
                gone.add(point.point)  # of a guest point that goes, or published once more under its instant
            elif _is_leftover(disk.name, point, newest, rules):
                gone.add(point.point)
                leftovers.add(point.instant)
        drop[disk.name] = frozenset(gone)
    last = {disk.name for disk in disks if disk.points and disk.points[-1].point in drop[disk.name]}
    return GuestDecision(decisions, drop, len(leftovers), frozenset() if isinstance(rules, Policy) else frozenset(last))


def _decide_points(
    view: GuestView, rules: GuestRules, *, zone: tzinfo, now: datetime | None
) -> tuple[Decision[GuestPoint], ...]:
    if isinstance(rules, Policy):
        return decide(view.points, rules, zone=zone, now=now, holds=guest_hold_reasons)
    if isinstance(rules, DropAll):
        rules = DropPoints(frozenset(each.point for each in view.points), newest=True)
    return decide_by(view.points, rules, disk=view.name, zone=zone, now=now, holds=guest_hold_reasons)


def _gone_alone(alone: Sequence[PointRecord], rules: GuestRules, *, zone: tzinfo, now: datetime | None) -> set[int]:
    """Numbers of a disk's points that go, of those that belong to no guest point."""
    if isinstance(rules, Policy):
        return {each.point.point for each in decide(alone, rules, zone=zone, now=now, holds=_held) if not each.kept}
    return {point.point for point in alone if not point.holds} if isinstance(rules, DropAll) else set()


def _is_leftover(disk: str, point: PointRecord, newest: GuestPoint | None, rules: GuestRules) -> bool:
    """Whether a point without a record goes. newest: of the guest points"""
    if isinstance(rules, DropAll):
        return not point.holds
    return isinstance(rules, Policy) and newest is not None and _is_older(disk, point, newest)


def _is_older(disk: str, point: PointRecord, newest: GuestPoint) -> bool:
    """Whether a point without a record was published before the newest guest point, so that none will follow."""
    after = newest.disks.get(disk)
    return point.time < newest.time if after is None else point.point < after.point


def _held(point: PointRecord) -> Sequence[str]:
    return hold_reasons(point)


def guest_hold_reasons(point: GuestPoint) -> Sequence[str]:
    """Why a guest point stays: its record's point is held, or one of its disks' points is."""
    return tuple(dict.fromkeys(why for each in (point.record, *point.disks.values()) for why in hold_reasons(each)))


def guest_at(destination: ReadableDestination, name: str) -> GuestView:
    """The guest of this name at a destination. Raises NotFound, also where a disk has the very name."""
    return guest_in(destination.url, records_of(destination, [name]), name)


def guest_in(url: str, disks: Sequence[DiskRecord], name: str) -> GuestView:
    """The guest of this name among the disks of a destination. Raises NotFound, also where a disk has the very name."""
    view = guest_named(disks, name)
    if view is not None:
        return view
    if any(disk.name.startswith(f"{name}/") for disk in disks):
        raise NotFound(
            "it has no guest point: its disks came one by one",
            subject=f"{url}::{name}",
            hint="`snapchain ship --domain` or `--qmp` sends the guest as a whole",
        )
    raise NotFound(
        "there is no such guest",
        subject=f"{url}::{name}",
        hint=f"`snapchain log {shell_word(url)}` lists the guests",
    )


def plan(
    destination: ReadableDestination, guest: str, rules: GuestRules, *, zone: tzinfo = UTC, now: datetime | None = None
) -> GuestPointsMergePlan:
    """What `run` would do. Raises as `run`."""
    now = now or datetime.now(UTC)
    view, decided = _decided(destination, guest, rules, zone=zone, now=now)
    plans = tuple(
        destination.merging(disk, decided.rules_of(disk, numbers), zone=zone, now=now).plan()
        for disk, numbers in _records_first(view, decided)
    )
    return GuestPointsMergePlan(
        destination=destination.url,
        guest=guest,
        points=tuple(
            PointDecision(
                point=each.point.point,
                time=each.point.time,
                labels=each.point.labels,
                kept=each.kept,
                reasons=each.reasons,
                of_the_future=is_future(each.point.time, now),
            )
            for each in decided.points
        ),
        leftovers=decided.leftovers,
        disks=plans,
        layers_before=sum(each.layers_before for each in plans),
        layers_after=sum(each.layers_after for each in plans),
    )


def run(
    destination: ReadableDestination,
    guest: str,
    rules: GuestRules,
    *,
    zone: tzinfo = UTC,
    now: datetime | None = None,
    on_event: OnEvent = ignore,
) -> GuestPointsMergeReport:
    """Drop what the rules let go, and merge the layers that no point needs. A run that was killed is run again.

    What is published or held after the look stays. A disk that cannot be merged now is reported, and the next run does
    it; but where the last point of a disk goes and a file of its layer is in use, nothing is dropped.
    Raises NotFound for a guest that is not there, InvalidInput without a rule, and what the records' disk meets.
    """
    now = now or datetime.now(UTC)
    view, decided = _decided(destination, guest, rules, zone=zone, now=now)
    for disk in sorted(decided.newest):
        destination.merging(disk, decided.rules_of(disk, decided.drop[disk]), zone=zone, now=now).plan()
    reports: list[PointsMergeReport] = []
    failed: list[FailedDisk] = []
    staying: set[str] = set()
    for disk, numbers in _records_first(view, decided):
        is_record = guest_of(disk) is not None
        wanted = numbers - _points_of(view, staying, disk)
        try:
            work = destination.merging(disk, decided.rules_of(disk, wanted), zone=zone, now=now)
            report = work.run(on_event=on_event)
        except SnapchainError as error:
            if is_record:
                raise
            failed.append(FailedDisk(disk=disk, kind=error.kind, message=str(error)))
            on_event(Notice.of(disk, f"its points were not dropped: {error}"))
            continue
        if is_record:  # one that was held since the look keeps its disks' points
            staying = {each.instant for each in view.points if each.point in report.points_kept}
        reports.append(report)
    dropped = [each.point for each in decided.points if not each.kept and each.point.instant not in staying]
    kept = [each.point for each in decided.points if each.point not in dropped]
    return GuestPointsMergeReport(
        destination=destination.url,
        guest=guest,
        points_kept=tuple(each.point for each in kept),
        points_dropped=tuple(each.point for each in dropped),
        points_of_the_future=tuple(each.point for each in kept if is_future(each.time, now)),
        leftovers=decided.leftovers,
        disks=tuple(reports),
        failed=tuple(failed),
        layers_before=sum(each.layers_before for each in reports),
        layers_after=sum(each.layers_after for each in reports),
        bytes_moved=sum(each.bytes_moved for each in reports),
        bytes_freed=sum(each.bytes_freed for each in reports),
        bytes_dropped=sum(each.bytes_dropped for each in reports),
        strategy="+".join(dict.fromkeys(word for each in reports for word in each.strategy.split("+"))),
        findings=tuple(finding for each in reports for finding in each.findings),
    )


def _decided(
    destination: ReadableDestination, guest: str, rules: GuestRules, *, zone: tzinfo, now: datetime
) -> tuple[GuestView, GuestDecision]:
    if isinstance(rules, Policy) and rules.is_empty:
        raise InvalidInput("no rule says which points to keep", subject=guest, hint="such as --keep-last 7")
    disks = records_of(destination, [guest])
    view = guest_in(destination.url, disks, guest)
    names = {*view.disks, view.record_disk}
    own = [disk for disk in disks if disk.name in names]
    return view, decide_guest(view, own, rules, zone=zone, now=now)


def _records_first(view: GuestView, decided: GuestDecision) -> list[tuple[str, frozenset[int]]]:
    return sorted(decided.drop.items(), key=lambda each: (each[0] != view.record_disk, each[0]))


def _points_of(view: GuestView, instants: set[str], disk: str) -> frozenset[int]:
    """Numbers of a disk's points in some guest points."""
    return frozenset(each.disks[disk].point for each in view.points if each.instant in instants and disk in each.disks)
