"""How much of the source is read for each point: what it shows beyond one that is there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from snapchain.destination.copying import CopyReader
from snapchain.destination.records import DiskRecord, PointRecord
from snapchain.errors import Corrupt, SnapchainError
from snapchain.ops.copy.request import RefusedPoint


def read_amounts(
    reader: CopyReader, record: DiskRecord, there: DiskRecord | None, points: Sequence[PointRecord]
) -> Iterator[tuple[PointRecord, int | Corrupt]]:
    """Each point with the bytes to be read for it, at most, or why it cannot be read. record: the disk in the source"""
    shown = {content_of(point) for point in (() if there is None else there.points)}
    contents = {point.point: content_of(point) for point in record.points}
    for point in points:
        try:
            base = next((each for each in reader.on_chain(point.point) if contents.get(each) in shown), None)
            amount = reader.data_bytes(base, point.point)
        except Corrupt as error:
            yield point, error
            continue
        shown.add(content_of(point))
        yield point, amount


def content_of(point: PointRecord) -> tuple[int, str]:
    """Equal for points that show the same."""
    return point.virtual_size, point.content_id


def refusal(point: PointRecord, error: SnapchainError) -> RefusedPoint:
    """Why a point is not copied."""
    return RefusedPoint(point=point.point, kind=error.kind, message=str(error))
