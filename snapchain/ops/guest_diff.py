"""diff of two guest points: which disks differ, by how much, and which came or went."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

from snapchain.destination.address import in_full
from snapchain.destination.reading import ReadableDestination
from snapchain.model.events import OnEvent, ignore
from snapchain.ops.diff import DiffReport, diff
from snapchain.ops.guest_points import GuestPoint, GuestView


class DiskDiff(BaseModel):
    """A disk of two guest points. only_in: the side that has it alone; difference: None there."""

    model_config = ConfigDict(frozen=True)

    disk: str
    only_in: Literal["old", "new"] | None = None
    difference: DiffReport | None = None


class GuestDiffReport(BaseModel):
    """How two guest points differ. identical: all disks, none came or went; changed_bytes: of the disks of both."""

    model_config = ConfigDict(frozen=True)

    old: str
    new: str
    identical: bool
    changed_bytes: int
    disks: tuple[DiskDiff, ...]


def diff_guests(
    old: tuple[ReadableDestination, GuestView, str | None],
    new: tuple[ReadableDestination, GuestView, str | None],
    *,
    on_event: OnEvent = ignore,
) -> GuestDiffReport:
    """Compare two guest points, of one guest or two. Each: where it is, the guest, and the text after '@'.

    Disks are the same by what follows the guest's name. Raises NotFound, and as `diff`.
    """
    (here, _, _), (there, _, _) = old, new
    first, second = _point(old), _point(new)
    mine, theirs = _by_name(first), _by_name(second)
    found = []
    for name in sorted(mine.keys() | theirs.keys()):
        if name not in mine or name not in theirs:
            found.append(DiskDiff(disk=name, only_in="old" if name in mine else "new"))
            continue
        one, other = mine[name], theirs[name]
        with (
            here.leaves(*one, on_event=on_event) as left,
            there.leaves(*other, on_event=on_event) as right,
        ):
            found.append(DiskDiff(disk=name, difference=diff(left, right)))
    changes = [each.difference for each in found if each.difference is not None]
    return GuestDiffReport(
        old=f"{here.url}::{first.guest}@{first.point}",
        new=f"{there.url}::{second.guest}@{second.point}",
        identical=len(changes) == len(found) and all(each.identical for each in changes),
        changed_bytes=sum(each.changed_bytes for each in changes),
        disks=tuple(found),
    )


def _point(side: tuple[ReadableDestination, GuestView, str | None]) -> GuestPoint:
    _, view, wanted = side
    return view.point(in_full(wanted))


def _by_name(point: GuestPoint) -> dict[str, tuple[str, str]]:
    """name of a disk in the guest -> its name at the destination, and its point's number"""
    return {disk.removeprefix(f"{point.guest}/"): (disk, str(part.point)) for disk, part in point.disks.items()}
