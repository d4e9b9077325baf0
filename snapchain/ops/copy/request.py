"""What is to be copied, and what came of it: values alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from pydantic import BaseModel, ConfigDict, computed_field

from snapchain.errors import InvalidInput


@dataclass(frozen=True, slots=True, kw_only=True)
class CopyRequest:
    """What is to be copied.

    names: disks, guests, and patterns such as web*; none: all disks
    newest: of each disk only the newest point, and the points of the newest guest point
    since: the text after '@' of an address: that point of each disk, and those after it
    newer: only points after the newest one that the destination has of the disk
    """

    names: Sequence[str] = ()
    newest: bool = False
    since: str | None = None
    newer: bool = False

    def check(self) -> None:
        """Raises InvalidInput for what contradicts itself."""
        if self.newest and self.since is not None:
            raise InvalidInput("--newest and --since are both given", hint="choose one of them")


class _Shown(BaseModel):
    model_config = ConfigDict(frozen=True, defer_build=True)


class RefusedPoint(_Shown):
    """A point that is not copied, and why. kind: of the error, as in all JSON"""

    point: int
    kind: str
    message: str


class PointToCopy(_Shown):
    """A point that would be copied. data_bytes: at most so much of the source is read"""

    point: int
    time: datetime
    labels: tuple[str, ...]
    data_bytes: int


class CopiedPoint(_Shown):
    """A point that was copied. point_there: its number at the destination"""

    point: int
    point_there: int
    time: datetime
    content_id: str


class DiskPlan(_Shown):
    """What would be copied of a disk.

    present: how many of the chosen points are there already; keeps_numbers: whether points get the same numbers there
    failed: why nothing of the disk can be copied; None where it can
    """

    disk: str
    points: tuple[PointToCopy, ...] = ()
    present: int = 0
    keeps_numbers: bool = True
    refused: tuple[RefusedPoint, ...] = ()
    failed: str | None = None


class CopyPlan(_Shown):
    """What `run` would do. data_bytes: to be read, at most; what is there already is not stored again."""

    source: str
    destination: str
    disks: tuple[DiskPlan, ...]
    points: int
    data_bytes: int

    @computed_field  # type: ignore[prop-decorator]
    @property
    def ok(self) -> bool:
        """Whether nothing that was chosen is left out."""
        return all(disk.failed is None and not disk.refused for disk in self.disks)


class DiskReport(_Shown):
    """What was copied of a disk. Sizes in bytes; fields as of DiskPlan, bytes as of ShipReport."""

    disk: str
    points: tuple[CopiedPoint, ...] = ()
    present: int = 0
    keeps_numbers: bool = True
    refused: tuple[RefusedPoint, ...] = ()
    failed: str | None = None
    bytes_read: int = 0
    bytes_stored: int = 0


class CopyReport(_Shown):
    """What was copied. Sizes in bytes. points: how many"""

    source: str
    destination: str
    disks: tuple[DiskReport, ...]
    points: int
    bytes_read: int
    bytes_stored: int
    seconds: float

    @computed_field  # type: ignore[prop-decorator]
    @property
    def ok(self) -> bool:
        """As of CopyPlan."""
        return all(disk.failed is None and not disk.refused for disk in self.disks)
