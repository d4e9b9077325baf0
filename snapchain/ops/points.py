"""Which point of a disk is meant: `latest`, a number, a label, or an RFC 3339 time."""

from __future__ import annotations

from datetime import UTC, datetime

from snapchain.errors import NotFound
from snapchain.repository.catalogue import Catalogue, Point

LATEST = "latest"


def find_point(catalogue: Catalogue, wanted: str | None) -> Point:
    """The point meant by the text after '@' of an address; None means the latest.

    A label names the newest point that bears it; a time, the newest point not after it (UTC where it names no zone).
    Raises NotFound.
    """
    where = catalogue.disk
    latest = catalogue.latest
    if latest is None:
        raise NotFound("the disk has no point", subject=where)
    if wanted in (None, LATEST):
        return latest
    assert wanted is not None
    if wanted.isascii() and wanted.isdecimal():
        number = wanted.lstrip("0")  # as text: there is no end to what a user may type
        for point in catalogue.points:
            if str(point.point) == number:
                return point
        numbers = f"{catalogue.points[0].point} to {latest.point}"
        raise NotFound(f"the disk has no point {wanted[:40]}", subject=where, hint=f"its points lie in {numbers}")
    labelled = [point for point in catalogue.points if wanted in point.labels]
    if labelled:
        return labelled[-1]
    moment = _moment(wanted)
    if moment is None:
        raise NotFound(
            f"{wanted!r} is no label of this disk, no number and no RFC 3339 time",
            subject=where,
            hint="latest, a number, a label, or a time such as 2026-01-31T22:00:00Z",
        )
    before = [point for point in catalogue.points if point.time <= moment]
    if not before:
        raise NotFound(f"the disk has no point as old as {moment.isoformat()}", subject=where)
    return max(before, key=lambda point: (point.time, point.point))


def _moment(text: str) -> datetime | None:
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        return None
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)
