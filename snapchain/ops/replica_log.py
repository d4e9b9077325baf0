"""log of a replica: its disks and points, in the report of a repository's."""

from __future__ import annotations

from datetime import UTC, datetime

from snapchain.model.retention import is_future
from snapchain.ops.log import DiskReport, LogReport, PointReport
from snapchain.replica.client import Disk, points_at
from snapchain.replica.endpoint import Endpoint

NOT_ENCRYPTED = "none"


def log_replica(endpoint: Endpoint, disk: str | None = None) -> LogReport:
    """All disks of a replica, or one. Raises NotFound for a disk that is not there, Unavailable when the link breaks.

    Changes nothing over there, and waits for nobody.
    """
    found = points_at(endpoint, disk)
    return LogReport(destination=endpoint.url, encryption=NOT_ENCRYPTED, disks=tuple(map(_disk, found)))


def _disk(disk: Disk) -> DiskReport:
    points = tuple(
        PointReport(
            point=point.point,
            time=point.time,
            labels=point.labels,
            virtual_size=point.size,
            content_id=point.content_id,
            layers=point.layers,
            of_the_future=is_future(point.time, datetime.now(UTC)),
        )
        for point in disk.points
    )
    return DiskReport(name=disk.name, epoch=disk.epoch, points=points)
