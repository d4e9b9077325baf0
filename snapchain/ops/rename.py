"""rename DEST::OLD DEST::NEW: a disk gets another name, with all its points."""

from __future__ import annotations

from snapchain.destination.reading import ReadableDestination, Work
from snapchain.destination.records import RenamePlan, RenameReport
from snapchain.errors import NotFound, Unsupported
from snapchain.ops.guest_points import is_guest


def renaming(destination: ReadableDestination, old: str, new: str) -> Work[RenamePlan, RenameReport]:
    """The work of a renaming, whose `plan` and `run` raise as `ReadableDestination.renaming`.

    Raises NotFound where there is no such disk, Unsupported for a guest.
    """
    work = destination.renaming(old, new)
    try:
        work.plan()
    except NotFound:
        if not is_guest(destination, old):
            raise
        raise Unsupported(
            "a guest cannot be renamed: its records name its disks",
            subject=f"{destination.url}::{old}",
            hint="ship the guest under its new name, and forget the old one later",
        ) from None
    return work
