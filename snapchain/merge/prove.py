"""The proof of a merge: the result must read as its inputs did, stand where it should, and have sound counts."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from snapchain.errors import Conflict, Corrupt
from snapchain.image import ImageChain
from snapchain.image.backing import Allowed, Place
from snapchain.image.difference import first_difference, ranges_to_compare
from snapchain.image.file import ImageFile
from snapchain.image.physical import RunBudget
from snapchain.image.qcow2.refcounts import refcounts
from snapchain.image.qcow2.tables import ImageFd
from snapchain.merge.copying import reporting
from snapchain.model.events import OnEvent


def prove(old: ImageChain, new: ImageChain, *, shared: int, subject: Path, on_event: OnEvent) -> None:
    """Compare every guest byte that could differ, and the size.

    old: what was; new: the result, as it was read again; shared: how many of the lowest files are the same in both.
    Raises Corrupt with the range that differs.
    """
    if old.size != new.size:
        raise Corrupt(f"the merged file has {new.size} bytes, not {old.size}", subject=subject)
    found = ranges_to_compare(old, new, shared=shared)
    differs = first_difference(old, new, found, on_bytes=reporting("verify", found.bytes, on_event))
    if differs is not None:
        raise Corrupt(f"the merged file reads differently in bytes {differs.start} to {differs.stop}", subject=subject)


def check_unchanged(old: ImageChain, *, but: int | None = None) -> None:
    """Raises Conflict where a file was written to since it was scanned, in spite of the locks.

    but: number of the file that we write to ourselves
    """
    changed = [file for number, file in enumerate(old.files) if number != but and file.changed()]
    if changed:
        outcome = "nothing was changed" if but is None else "the chain reads as before"
        raise Conflict(
            f"the image was modified while it was being merged; {outcome}",
            subject=changed[0].path,
            hint="stop the program that writes to it, then run the command again",
        )


# --- A file that was just written, read again on files that are open already: as it is, not as it was planned.
#
# Nothing of the plan by which it was made is used, so a fault of the writer shows here, as a wrong map or link.


@contextmanager
def reread(path: Path, fd: int, below: Sequence[ImageFile]) -> Iterator[ImageChain]:
    """The chain of a qcow2 file and the open files `below` it (root first), whatever link it records.

    path: a real path; fd: of the file, which stays the caller's. Errors as `scan`.
    """
    file = ImageFile(Place(path, path), os.dup(fd), format="qcow2", budget=RunBudget())
    with file:
        yield ImageChain([*below, file], owned=False)


def check_link(chain: ImageChain, *, place: Path) -> None:
    """Raises Corrupt unless the top's recorded link, seen from `place`, means the file below it in the chain."""
    recorded = chain.top.backing
    below = chain.files[-2] if len(chain.files) > 1 else None
    if recorded is None or below is None:
        if recorded is not None or below is not None:
            raise Corrupt("the merged file records a wrong backing file", subject=place)
        return
    whole = Place.of(place)
    found = Allowed(whole, [below.real_path.parent]).place(recorded, overlay=whole.path)
    try:
        status = found.real.stat()
    except OSError as error:
        raise Corrupt("the merged file records a backing file that is not there", subject=place) from error
    if (status.st_dev, status.st_ino) != below.device or recorded.format != below.format:
        raise Corrupt("the merged file records a wrong backing file", subject=place)


def check_refcounts(file: ImageFile, *, leaks: bool = False) -> None:
    """Raises Corrupt where the reference counts of a qcow2 file are not what its tables say; `leaks` may be there."""
    assert file.header is not None
    size = os.fstat(file.fileno()).st_size
    counts = refcounts(ImageFd(file.fileno(), size, file.header, file.path))
    if counts.errors or (counts.leaks and not leaks):
        raise Corrupt(
            f"the merged file has {counts.errors} wrong reference counts and {counts.leaks} leaked clusters",
            subject=file.path,
        )
