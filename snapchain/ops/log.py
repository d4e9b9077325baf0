"""log: which disks and points a destination has."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from snapchain.destination.reading import ReadableDestination
from snapchain.destination.records import DiskRecord


class LogReport(BaseModel):
    """All disks, by name. encryption: the name of the cipher, or none."""

    model_config = ConfigDict(frozen=True)

    destination: str
    encryption: str
    disks: tuple[DiskRecord, ...]


def log(destination: ReadableDestination, disk: str | None = None) -> LogReport:
    """All disks, or one. Raises NotFound for a disk that is not there."""
    disks = destination.disks(disk)
    return LogReport(destination=destination.url, encryption=destination.encryption, disks=disks)
