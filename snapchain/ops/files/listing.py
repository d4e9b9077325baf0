"""Looking: the volumes of a disk, what a directory holds, and the bytes of one file."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime

from snapchain.errors import InvalidInput
from snapchain.model.events import OnEvent, ignore
from snapchain.ops.files.opening import (
    DEFAULT,
    FileRow,
    Held,
    Limits,
    Skipped,
    file_system,
    names_of,
    reader_of,
    skipped_of,
)
from snapchain.ops.files.source import Source

_ALL = 1 << 20
_HOLE = 1 << 20


@dataclass(frozen=True, slots=True)
class VolumeRow:
    """A volume. content: what it holds; trouble: why its files cannot be read, None where they can"""

    name: str
    size: int
    content: str
    trouble: str | None


@dataclass(frozen=True, slots=True)
class VolumeList:
    """The volumes of a disk. point, time: None of an image"""

    source: str
    point: int | None
    time: datetime | None
    volumes: tuple[VolumeRow, ...]


@dataclass(frozen=True, slots=True)
class FileList:
    """What a directory holds, or one file. skipped: what could not be read"""

    source: str
    point: int | None
    time: datetime | None
    volume: str
    path: str
    files: tuple[FileRow, ...]
    skipped: tuple[Skipped, ...]


@dataclass(frozen=True, slots=True)
class FileShown:
    """A file whose bytes were given. sha256: of them"""

    source: str
    point: int | None
    time: datetime | None
    volume: str
    file: FileRow
    sha256: str


def list_volumes(source: Source, *, limits: Limits = DEFAULT) -> VolumeList:
    """The volumes of the disk. Raises what keeps it from being read."""
    (moment,) = source.moments()
    with reader_of(source, moment, limits) as session:
        rows = [VolumeRow(each.name, each.size, each.content.value, each.trouble) for each in session.volumes()]
    return VolumeList(source.name, moment.point, moment.time, tuple(rows))


def list_files(
    source: Source,
    path: str,
    *,
    volume: str | None = None,
    recursive: bool = False,
    limits: Limits = DEFAULT,
    on_event: OnEvent = ignore,
) -> FileList:
    """The entries of a directory by name, with `recursive` all below it, or one file. Raises as `Session.walk`."""
    (moment,) = source.moments()
    names = names_of(path)
    with file_system(source, moment, volume, limits=limits, on_event=on_event) as opened:
        rows, held = [], Held(moment.name)
        with opened.session.walk(names, depth=_ALL if recursive else 1) as entries:
            for found in entries:
                if found.entry.path or found.entry.kind != "directory":
                    held.add(found.entry.path)
                    rows.append(FileRow.of(found.entry, names))
        skipped = skipped_of(opened.session, names)
    rows.sort(key=lambda row: row.path)
    shown = "/" + "/".join(names)
    return FileList(source.name, moment.point, moment.time, opened.volume.name, shown, tuple(rows), skipped)


def show_file(
    source: Source,
    path: str,
    write: Callable[[memoryview], None],
    *,
    volume: str | None = None,
    limits: Limits = DEFAULT,
    on_event: OnEvent = ignore,
) -> FileShown:
    """Give the bytes of a file. Raises NotFound, InvalidInput for what is no file, Corrupt where it cannot be read."""
    (moment,) = source.moments()
    names = names_of(path)
    digest = hashlib.sha256()
    row = None
    with (
        file_system(source, moment, volume, limits=limits, on_event=on_event) as opened,
        opened.session.walk(names, depth=0, contents=True) as entries,
    ):
        for found in entries:
            row = FileRow.of(found.entry, names)
            if row.kind != "file":
                raise InvalidInput(f"{row.path} is a {row.kind}, not a file", subject=moment.name)
            for piece in found.content:
                for some in _bytes(piece):
                    digest.update(some)
                    write(memoryview(some))
    if row is None:
        raise opened.session.unread(names)
    return FileShown(source.name, moment.point, moment.time, opened.volume.name, row, digest.hexdigest())


def _bytes(piece: bytes | int) -> list[bytes] | map[bytes]:
    if isinstance(piece, bytes):
        return [piece]
    return map(bytes, (min(_HOLE, piece - at) for at in range(0, piece, _HOLE)))
