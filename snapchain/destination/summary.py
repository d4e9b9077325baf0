"""A disk at a glance: what `status` shows of thousands of disks, without reading all records of their points."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime

from snapchain.destination.guest_record import guest_of
from snapchain.destination.records import DiskRecord, Finding, Record
from snapchain.model.freshness import candidates


class PointSummary(Record):
    """A point. virtual_size: bytes"""

    point: int
    time: datetime
    virtual_size: int


class DiskSummary(Record):
    """A disk. points, layers: how many it has

    newest: the newest point that is not of the future, and the earliest of those that are (model/freshness.py)
    guest: the guest that it belongs to, None for a disk of its own
    verified: all data that it had then was read and found good at this time or later; None: not all, or not known
    renamed: whether nothing is left of it but its new name
    trouble: why nothing else is known of it; `name` is then the best that is known
    """

    name: str
    epoch: int = 0
    points: int = 0
    layers: int = 0
    newest: tuple[PointSummary, ...] = ()
    guest: str | None = None
    verified: datetime | None = None
    renamed: bool = False
    trouble: Finding | None = None


def possible_guest(disk: str) -> str | None:
    """The guest to which a disk of this name would belong, if there is such a guest."""
    return disk.rpartition("/")[0] or None


def summary_of(disk: DiskRecord, now: datetime, *, has_state: bool = False) -> DiskSummary:
    """Of a disk whose points are all at hand. has_state: whether a state of `possible_guest` is recorded"""
    of_guest = has_state or guest_of(disk.name) is not None or any(point.instant for point in disk.points)
    return DiskSummary(
        name=disk.name,
        epoch=disk.epoch,
        points=len(disk.points),
        layers=disk.layers,
        newest=tuple(
            PointSummary(point=each.point, time=each.time, virtual_size=each.virtual_size)
            for each in candidates(disk.points, now)
        ),
        guest=possible_guest(disk.name) if of_guest else None,
    )


def with_guests(disks: Iterable[DiskSummary]) -> tuple[DiskSummary, ...]:
    """The disks by name, each with its guest: a disk beside one that belongs to a guest belongs to it, too."""
    found = sorted(disks, key=lambda each: each.name)
    guests = {each.guest for each in found if each.guest is not None}
    return tuple(
        each.model_copy(update={"guest": above})
        if each.guest is None and (above := possible_guest(each.name)) in guests
        else each
        for each in found
    )
