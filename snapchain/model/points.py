"""Which point of a disk is meant: `latest`, a number, a label, or an RFC 3339 time. The same at every destination."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Protocol, TypeVar

from snapchain.errors import NotFound

LATEST = "latest"


class Moment(Protocol):
    """A point, as far as it may be asked for."""

    @property
    def point(self) -> int: ...

    @property
    def time(self) -> datetime: ...

    @property
    def labels(self) -> tuple[str, ...]: ...


P = TypeVar("P", bound=Moment)


def chosen_point(disk: str, points: Sequence[P], wanted: str | None) -> P:
    """The point meant by the text after '@' of an address; None means the latest. points: ascending by number.

    A label names the newest point that bears it; a time, the newest point not after it (UTC where it names no zone).
    Raises NotFound.
    """
    if not points:
        raise NotFound("the disk has no point", subject=disk)
    if wanted is None or wanted == LATEST:
        return points[-1]
    if wanted.isascii() and wanted.isdecimal():
        number = wanted.lstrip("0")  # as text: there is no end to what a user may type
        for point in points:
            if str(point.point) == number:
                return point
        numbers = f"{points[0].point} to {points[-1].point}"
        raise NotFound(f"the disk has no point {wanted[:40]}", subject=disk, hint=f"its points lie in {numbers}")
    labelled = [point for point in points if wanted in point.labels]
    if labelled:
        return labelled[-1]
    moment = _moment(wanted)
    if moment is None:
        raise NotFound(
            f"{wanted!r} is no label of this disk, no number and no RFC 3339 time",
            subject=disk,
            hint="latest, a number, a label, or a time such as 2026-01-31T22:00:00Z",
        )
    before = [point for point in points if point.time <= moment]
    if not before:
        raise NotFound(f"the disk has no point as old as {moment.isoformat()}", subject=disk)
    return max(before, key=lambda point: (point.time, point.point))


def _moment(text: str) -> datetime | None:
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        return None
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)
