"""A snapshot of all disks of a running guest at one instant."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from snapchain.guest.protocol import Guest
from snapchain.model.consistency import Consistency
from snapchain.model.events import OnEvent, ignore


class Quiesce(StrEnum):
    """Whether the guest agent freezes the filesystems."""

    AUTO = "auto"
    """If there is an agent that answers; else the point is crash-consistent."""
    REQUIRE = "require"
    NO = "no"


@dataclass(frozen=True, slots=True, kw_only=True)
class SnapshotRequest:
    """disks: names, empty for all that can be protected; labels: of the sealed files

    freeze_seconds: deadline for the freeze; bound_seconds: the longest that the guest may stay frozen, whatever happens
    pre_freeze, post_thaw: programs of this host, argument lists
    image_dirs: as `scan` takes them
    """

    disks: Sequence[str] = ()
    quiesce: Quiesce = Quiesce.AUTO
    labels: Sequence[str] = ()
    freeze_seconds: float = 10.0
    bound_seconds: float = 30.0
    pre_freeze: Sequence[str] = ()
    post_thaw: Sequence[str] = ()
    image_dirs: Sequence[Path] = ()


class _Shown(BaseModel):
    model_config = ConfigDict(frozen=True)


class DiskToSeal(_Shown):
    """sealed: the active layer, which keeps its path; overlay: what the guest will write to. Sizes in bytes."""

    disk: str
    sealed: Path
    sealed_format: str
    overlay: Path
    virtual_size: int
    layers: int


class LeftOut(_Shown):
    """A disk that is not taken, and why, in a word or a sentence."""

    disk: str
    reason: str


class GuestSnapshotPlan(_Shown):
    """What `run` will do. quiesces: whether a freeze will be tried; layers: of each chain afterwards."""

    guest: str
    option: str
    disks: tuple[DiskToSeal, ...]
    left_out: tuple[LeftOut, ...]
    quiesces: bool
    labels: tuple[str, ...]


class GuestSnapshot(_Shown):
    """What was done. instant: 32 hex digits, one for all disks; consistency: that was reached

    why_not: why it is not filesystem-consistent where that was tried; frozen_seconds: how long the guest was frozen
    """

    guest: str
    instant: str
    time: datetime
    consistency: Consistency
    why_not: str | None = None
    frozen_seconds: float | None = None
    disks: tuple[DiskToSeal, ...]
    left_out: tuple[LeftOut, ...] = ()


def plan(guest: Guest, request: SnapshotRequest) -> GuestSnapshotPlan:
    """Look and decide; changes nothing. Raises NotFound, Busy, Unsupported for a disk that cannot be taken."""
    raise NotImplementedError


def run(
    guest: Guest, planned: GuestSnapshotPlan, request: SnapshotRequest, *, on_event: OnEvent = ignore
) -> GuestSnapshot:
    """Do it. All disks or none. Raises Busy, Conflict, Unavailable."""
    raise NotImplementedError
