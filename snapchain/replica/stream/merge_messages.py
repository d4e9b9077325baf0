"""What is said of merging layers at a replica: which points to keep, what becomes of each, and what came of it all."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, StringConstraints

from snapchain.model.epoch import LARGEST_EPOCH
from snapchain.replica.stream.messages import (
    LARGEST_DISK,
    MAX_LAYERS,
    POINTS_AT_ONCE,
    FileName,
    Label,
    Moment,
    PointNumber,
    Said,
)

_Count = Annotated[int, Field(ge=-1, le=1 << 31)]
_LARGEST = MAX_LAYERS * LARGEST_DISK
Reason = Annotated[str, StringConstraints(max_length=1000)]


class Merge(Said):
    """Merge the layers of a disk that no kept point needs. dry_run: only say what that would do.

    last .. labels: the rules (model/retention/policy.py), of which there is one at least; within: as 1y5m7d2h
    zone: whose calendar says what a day is; epoch: an older one than the disk's is refused, none is in all
    """

    disk: str = Field(min_length=1, max_length=250)
    replica: str | None = Field(default=None, max_length=4096)
    last: _Count = 0
    hourly: _Count = 0
    daily: _Count = 0
    weekly: _Count = 0
    monthly: _Count = 0
    yearly: _Count = 0
    within: str | None = Field(default=None, max_length=40)
    labels: tuple[Label, ...] = Field(default=(), max_length=100)
    zone: str = Field(min_length=1, max_length=100)
    epoch: int | None = Field(default=None, ge=1, le=LARGEST_EPOCH)
    dry_run: bool = False


class DecidedPoint(Said):
    """What becomes of one point, and why."""

    point: PointNumber
    time: Moment
    labels: tuple[Label, ...] = Field(max_length=100)
    kept: bool
    reasons: tuple[Reason, ...] = Field(max_length=120)


class Staying(Said):
    """A layer that no kept point needs, and why it stays all the same."""

    file: FileName
    reason: Reason


class Outcome(Said):
    """What was done, or would be. Sizes in bytes.

    merges: files that become one, lowest first, each; strategy: of all merges, joined by '+', or none
    bytes_freed: allocated by the files less what they allocate afterwards; of a dry run, overwritten data that goes
    needs_bytes: room beside the layers, at most; free_bytes: room that there was
    """

    done: bool
    layers_before: int = Field(ge=0, le=MAX_LAYERS)
    layers_after: int = Field(ge=0, le=MAX_LAYERS)
    merges: tuple[tuple[FileName, ...], ...] = Field(max_length=MAX_LAYERS)
    staying: tuple[Staying, ...] = Field(max_length=MAX_LAYERS)
    strategy: Annotated[str, StringConstraints(pattern=r"^[a-z+-]{1,100}$")]
    bytes_moved: int = Field(ge=0, le=_LARGEST)
    bytes_freed: int = Field(ge=-_LARGEST, le=_LARGEST)
    needs_bytes: int = Field(ge=0, le=_LARGEST)
    free_bytes: int = Field(ge=0, le=1 << 63)


class Merged(Said):
    """Some points, ascending; the rest comes in the next such frame, and with the last the outcome."""

    disk: str = Field(min_length=1, max_length=250)
    points: tuple[DecidedPoint, ...] = Field(max_length=POINTS_AT_ONCE)
    outcome: Outcome | None = None
