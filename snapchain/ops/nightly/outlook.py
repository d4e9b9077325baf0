"""Which points the next run drops by the rules, and which rules keep the others.

The run itself adds a point before it asks the rules, so that point is counted here, too: with `keep = { last = 7 }` and
seven points, the oldest one goes tonight.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from datetime import datetime, tzinfo

from snapchain.destination.records import PointDecision, PointRecord
from snapchain.model.holds import hold_reasons
from snapchain.model.retention import Policy, decide, decide_by, is_future
from snapchain.ops.guest_points import GuestPoint, GuestView
from snapchain.ops.guest_points_merge import guest_hold_reasons


def of_disk(
    points: Sequence[PointRecord], policy: Policy, *, disk: str, labels: Collection[str], zone: tzinfo, now: datetime
) -> tuple[PointDecision, ...]:
    """A decision for each point that is there. labels: of the point to come.

    Raises InvalidInput for a disk with points of a guest.
    """
    after = [*points, _to_come(points, labels, now)]
    decided = decide_by(after, policy, disk=disk, zone=zone, now=now, holds=hold_reasons)
    return tuple(_decision(each.point, kept=each.kept, reasons=each.reasons, now=now) for each in decided[:-1])


def of_guest(
    view: GuestView, policy: Policy, *, labels: Collection[str], zone: tzinfo, now: datetime
) -> tuple[PointDecision, ...]:
    """The same of the guest points of a guest."""
    record = _to_come([each.record for each in view.points], labels, now)
    after = [*view.points, GuestPoint(view.name, "", record, {})]
    decided = decide(after, policy, zone=zone, now=now, holds=guest_hold_reasons)
    return tuple(_decision(each.point.record, kept=each.kept, reasons=each.reasons, now=now) for each in decided[:-1])


def _to_come(points: Sequence[PointRecord], labels: Collection[str], now: datetime) -> PointRecord:
    number = max((each.point for each in points), default=0) + 1
    return PointRecord(point=number, time=now, labels=tuple(labels), virtual_size=0, content_id="", layers=1)


def _decision(point: PointRecord, *, kept: bool, reasons: tuple[str, ...], now: datetime) -> PointDecision:
    return PointDecision(
        point=point.point,
        time=point.time,
        labels=point.labels,
        kept=kept,
        reasons=reasons,
        of_the_future=is_future(point.time, now),
    )
