"""log: what a repository holds."""

from __future__ import annotations

from datetime import UTC, datetime

from pydantic import BaseModel, ConfigDict

from snapchain.model.retention import is_future
from snapchain.repository.catalogue import Catalogue, Hold
from snapchain.repository.repository import Repository


class PointReport(BaseModel):
    """A point. layers: length of the chain that gives it; holds: why it stays whatever the rules say.

    of_the_future: dated later than this host's clock
    """

    model_config = ConfigDict(frozen=True)

    point: int
    time: datetime
    labels: tuple[str, ...]
    virtual_size: int
    content_id: str
    layers: int
    holds: tuple[Hold, ...] = ()
    of_the_future: bool = False


class DiskReport(BaseModel):
    """A disk and its points, oldest first."""

    model_config = ConfigDict(frozen=True)

    name: str
    epoch: int
    points: tuple[PointReport, ...]


class LogReport(BaseModel):
    """All disks, by name."""

    model_config = ConfigDict(frozen=True)

    destination: str
    encryption: str
    disks: tuple[DiskReport, ...]


def log(repository: Repository, disk: str | None = None) -> LogReport:
    """All disks of a repository, or one. Raises NotFound for a disk that is not there."""
    found = repository.catalogues() if disk is None else [repository.catalogue(disk)]
    return LogReport(
        destination=repository.store.url,
        encryption=repository.config.encryption,
        disks=tuple(_disk(catalogue) for catalogue in found),
    )


def _disk(catalogue: Catalogue) -> DiskReport:
    lengths = catalogue.lengths()
    points = tuple(
        PointReport(
            point=point.point,
            time=point.time,
            labels=point.labels,
            virtual_size=point.size,
            content_id=point.content_id,
            layers=lengths.get(point.layer) or len(catalogue.chain(point.layer)),
            holds=point.holds,
            of_the_future=is_future(point.time, datetime.now(UTC)),
        )
        for point in catalogue.points
    )
    return DiskReport(name=catalogue.disk, epoch=catalogue.epoch, points=points)
