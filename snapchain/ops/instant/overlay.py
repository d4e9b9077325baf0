"""The image of an instant restore: an empty overlay whose backing file is an export.

The header names the export by its URI. Without the server QEMU does not open the image; without that name it would
read zeroes where nothing was copied yet.  A bitmap in the image marks what is written to it by a guest: the copying
of its backing file is not marked.
"""

from __future__ import annotations

import os
from pathlib import Path

from snapchain.errors import Conflict, SnapchainError, Unsupported
from snapchain.host import files
from snapchain.host.directory import open_behind
from snapchain.host.files import Standing
from snapchain.host.os_errors import os_errors
from snapchain.host.processes import run
from snapchain.host.temporary_names import NEW, temporary_beside
from snapchain.image.qcow2.header import Backing, read_header
from snapchain.image.qcow2.write import write_overlay
from snapchain.ops.instant.record import InstantRecord

BITMAP = "snapchain-written"
_SECONDS = 60.0


def make_overlay(image: Path, record: InstantRecord, standing: Standing) -> None:
    """Make the image, or leave the one that is there, if it is of this record.

    Raises Conflict for another file of this name, and as writing a file.
    """
    if os.path.lexists(image):
        if depends_on(image, record):
            return
        raise Conflict(
            "it exists already, and is not the image of this instant restore",
            subject=image,
            hint="name another file, or remove this one",
        )
    new_overlay(image, record.virtual_size, record.backing_name, bitmap=record.bitmap, standing=standing)


def new_overlay(image: Path, size: int, backing_name: str, *, bitmap: str | None, standing: Standing) -> None:
    """Make a new image. size: of the export, in bytes; backing_name: its URI; bitmap: name of one, None for none

    Raises as writing a file.
    """
    files.remove_temporaries(image, purpose=NEW)
    with files.directory_of(image) as place:
        temporary = temporary_beside(image, purpose=NEW).name
        fd = place.create(temporary)
        try:
            write_overlay(
                fd,
                size,
                Backing(backing_name, "raw", is_uri=True),
                cluster_size=None,
                extended_l2=False,
                subject=image,
            )
            if bitmap is not None:
                run(["qemu-img", "bitmap", "--add", str(image.with_name(temporary)), bitmap], timeout=_SECONDS)
            files.give_standing(fd, standing, subject=image, directory=place)
            os.fsync(fd)
            place.give_name(fd, temporary, image.name, replacing=None)
            place.sync()
        finally:
            os.close(fd)
            place.remove(temporary)


def backing_of(image: Path) -> Backing | None:
    """What the image's header names, as our own parser reads it. Raises Corrupt, Unsupported, as opening a file."""
    with os_errors(image):
        fd = open_behind(image)
    try:
        return read_header(fd, subject=image).backing
    finally:
        os.close(fd)


def check_no_snapshots(image: Path) -> None:
    """Raises Unsupported for an image with internal snapshots: they would lose what they show of the backing file."""
    fd = open_behind(image)
    try:
        count = read_header(fd, subject=image).snapshots
    finally:
        os.close(fd)
    if count:
        raise Unsupported(
            f"it has {count} internal snapshots, which show parts of the point that are not in it: without its "
            "backing file they would read zeroes there",
            subject=image,
            hint="copy what you need of them (`qemu-img convert -l NAME`), delete them (`qemu-img snapshot -d NAME`), "
            "then run the command again; until then the image depends on the destination",
        )


def depends_on(image: Path, record: InstantRecord) -> bool:
    """Whether the image's header still names the export of the record."""
    try:
        found = backing_of(image)
    except SnapchainError:
        return False
    return found is not None and found.name == record.backing_name
