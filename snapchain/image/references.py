"""Which other images stand on a file: linked clones that a merge must not pull the ground from.

Looks at the headers of all files in some directories, and leniently: an image that snapchain would refuse (dirty,
encrypted, in use) is somebody's disk all the same.  One that may not even be read may stand on anything.  Only what
lies in those directories can be found.
"""

from __future__ import annotations

import os
import stat
import struct
from collections.abc import Collection, Iterable, Iterator, Sequence
from enum import Enum
from pathlib import Path

from snapchain.host.os_errors import os_errors
from snapchain.image.qcow2.format import MAGIC, MAX_BACKING_NAME_BYTES

_HEAD_BYTES = 64 << 10
_BACKING = struct.Struct(">4sIQI")


class Unread(Enum):
    """What a file means that cannot be read: another user's disk, perhaps."""

    MAY_STAND_ON_ALL = "may stand on all"
    PASSED_OVER = "passed over"


def children(
    directories: Iterable[Path],
    *,
    of: Collection[Path],
    besides: Collection[tuple[int, int]] = (),
    unread: Unread = Unread.MAY_STAND_ON_ALL,
) -> dict[Path, list[Path]]:
    """For each of the files `of`, the images in `directories` that record it as their backing file, or may.

    besides: (device, inode) of images that do not count. Files without such images have no entry.
    """
    wanted = {os.path.realpath(path): path for path in of}
    found: dict[Path, list[Path]] = {}
    for entry in _images(directories, besides):
        try:
            recorded = _backing_name(entry)
        except OSError:
            if unread is Unread.MAY_STAND_ON_ALL:
                for path in of:
                    found.setdefault(path, []).append(entry)
            continue
        if recorded is not None:
            for path in _meant(entry, recorded, wanted):
                found.setdefault(path, []).append(entry)
    return found


def reason(standing: Sequence[Path]) -> str:
    """Why a file with these images on it must stay."""
    names = ", ".join(entry.name for entry in standing[:3])
    if all(os.access(entry, os.R_OK, effective_ids=True) for entry in standing):
        return f"{names} stands on it"
    return f"{names} cannot be read, and may stand on it"


def _images(directories: Iterable[Path], besides: Collection[tuple[int, int]]) -> Iterator[Path]:
    for directory in dict.fromkeys(Path(os.path.realpath(directory)) for directory in directories):
        with os_errors(directory):
            entries = sorted(directory.iterdir())
        for entry in entries:
            try:
                status = entry.stat()
            except OSError:  # a dangling link, or gone meanwhile
                continue
            # Nothing smaller than a header is an image.
            if (
                stat.S_ISREG(status.st_mode)
                and status.st_size >= _BACKING.size
                and (status.st_dev, status.st_ino) not in besides
            ):
                yield entry


def _backing_name(path: Path) -> str | None:
    """What a qcow2 header records, however broken the image is otherwise. Raises OSError for one that is not read."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:  # gone meanwhile
        return None
    try:
        head = os.pread(fd, _HEAD_BYTES, 0)
    finally:
        os.close(fd)
    if len(head) < _BACKING.size or not head.startswith(MAGIC):
        return None
    _, _, offset, length = _BACKING.unpack_from(head)
    name = head[offset : offset + length] if 0 < length <= MAX_BACKING_NAME_BYTES else b""
    return os.fsdecode(name) or None


def _meant(entry: Path, recorded: str, wanted: dict[str, Path]) -> list[Path]:
    if ":" in recorded.split("/", 1)[0]:
        # `json:` and protocols may name a file in many ways: one that holds its name is taken to mean it.
        return [path for path in wanted.values() if path.name in recorded]
    if "\0" in recorded:
        return []
    # An image behind a symbolic link may be opened by either path.
    directories = {entry.parent, Path(os.path.realpath(entry)).parent}
    places = {os.path.realpath(directory / recorded) for directory in directories}
    return [path for place, path in wanted.items() if place in places]
