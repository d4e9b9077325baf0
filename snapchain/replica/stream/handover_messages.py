"""What is said when a disk changes its master: HANDOVER, and HANDED in answer."""

from __future__ import annotations

from enum import StrEnum
from typing import Self

from pydantic import Field, model_validator

from snapchain.model.epoch import LARGEST_EPOCH
from snapchain.replica.stream.messages import Active, Epoch, LayerId, Said

MOST_DISKS = 64
"""Of one guest: as many as virtio-scsi or a long row of virtio-blk has in earnest."""


class Step(StrEnum):
    """What is asked for."""

    GIVE = "give"
    """From now on the replica's host is the master of these disks."""
    BACK = "back"
    """It shall not be; refused where a guest has written there."""
    LOOK = "look"
    """Whether it is."""


class HandedDisk(Said):
    """A disk of a handover.

    epoch: in which its master will write it then; overlay: what must stand ready for that; it names the newest layer
    """

    disk: str = Field(min_length=1, max_length=250)
    epoch: int = Field(ge=2, le=LARGEST_EPOCH)
    overlay: Active


class Handover(Said):
    """All disks of a guest, all or none. token: of this handover, the same whenever it is asked for again."""

    step: Step
    token: LayerId
    disks: tuple[HandedDisk, ...] = Field(min_length=1, max_length=MOST_DISKS)
    replica: str | None = Field(default=None, max_length=4096)

    @model_validator(mode="after")
    def _each_once(self) -> Self:
        if len({each.disk for each in self.disks}) < len(self.disks):
            raise ValueError("a disk is named twice")
        return self


class Standing(Said):
    """How one disk stands after it. given: whether it was, by this token; epoch: of the disk; overlay: whole path."""

    disk: str = Field(min_length=1, max_length=250)
    given: bool
    epoch: Epoch
    overlay: str = Field(min_length=1, max_length=4500)


class Handed(Said):
    """In the order of the question."""

    disks: tuple[Standing, ...] = Field(max_length=MOST_DISKS)
