"""Archives: a tar stream (POSIX pax, as GNU tar reads it) or a zip file, written from front to back.

Programs that unpack it may follow links: nothing in it is below a symbolic link of it, or has the name of one.

A file up to 16 MiB is read whole before its header is written, so that one which cannot be read is left out.  Where
a larger one fails in the middle the archive is cut short, with an error: nothing is made up for the rest.
"""

from __future__ import annotations

import errno
import stat
import tarfile
import time
import zipfile
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

from snapchain.errors import Corrupt
from snapchain.files.records import Entry
from snapchain.files.session import Found, Unreadable

_WHOLE = 16 << 20
_ZEROES = bytes(1 << 20)
_FIRST_YEAR, _LAST_YEAR = 1980, 2107
"""Of times in a zip file."""


class _Links:
    """The symbolic links of an archive, by hash: a guest may have millions."""

    def __init__(self) -> None:
        self._seen: set[int] = set()

    def add(self, path: Sequence[str]) -> None:
        self._seen.add(hash(tuple(path)))

    def check(self, path: Sequence[str]) -> None:
        """Raises FileExistsError for a path that is one of them, or leads through one."""
        if self._seen and any(hash(tuple(path[:end])) in self._seen for end in range(len(path) + 1)):
            raise FileExistsError(errno.EEXIST, "a symbolic link has its name, or that of a directory above it")


class TarWriter:
    """See `Writer`. name: of the top, in the archive; keep: extended attributes too"""

    def __init__(self, file: Any, name: str, *, keep: bool) -> None:
        self.not_kept: set[str] = set()
        self._file, self._name, self._keep, self._written = file, name, keep, 0
        self._links = _Links()

    def directory(self, path: Sequence[str], entry: Entry) -> None:
        self._add(path, entry, tarfile.DIRTYPE)

    def file(self, path: Sequence[str], found: Found) -> None:
        self._links.check(path)
        content = _begun(found)
        self._add(path, found.entry, tarfile.REGTYPE, size=found.entry.size)
        try:
            for data in content:
                self._write(data)
        except Unreadable as error:
            raise _cut_short(error) from error
        self._write(bytes(-found.entry.size % tarfile.BLOCKSIZE))

    def link(self, path: Sequence[str], first: Sequence[str], entry: Entry) -> None:
        self._links.check(first)
        self._add(path, entry, tarfile.LNKTYPE, target="/".join([self._name, *first]))

    def symlink(self, path: Sequence[str], target: str, entry: Entry) -> None:
        self._add(path, entry, tarfile.SYMTYPE, target=target)
        self._links.add(path)

    def finish(self) -> None:
        self._write(bytes(2 * tarfile.BLOCKSIZE))
        self._write(bytes(-self._written % tarfile.RECORDSIZE))

    def _add(self, path: Sequence[str], entry: Entry, kind: bytes, *, size: int = 0, target: str = "") -> None:
        self._links.check(path)
        info = tarfile.TarInfo("/".join([self._name, *path]))
        info.type, info.size, info.linkname = kind, size, target
        info.mode = entry.mode if entry.mode is not None else 0o755 if kind == tarfile.DIRTYPE else 0o644
        info.uid, info.gid = entry.uid or 0, entry.gid or 0
        info.mtime = (entry.mtime or 0) / 1_000_000_000
        if self._keep:
            info.pax_headers = {
                f"SCHILY.xattr.{name}": bytes.fromhex(value).decode("utf-8", "surrogateescape")
                for name, value in (entry.attributes or {}).items()
            }
        self._write(info.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape"))

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._written += len(data)


class ZipWriter:
    """See `Writer`. name: of the top, in the archive. A further name of a file is left out: zip has no hard links."""

    def __init__(self, file: Any, name: str, *, keep: bool) -> None:
        _ = keep
        self.not_kept: set[str] = set()
        self._name = name
        self._links = _Links()
        self._zip = zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, strict_timestamps=False)

    def directory(self, path: Sequence[str], entry: Entry) -> None:
        info = self._info([*path, ""], entry, stat.S_IFDIR | 0o755)
        info.external_attr |= 0x10  # a directory, for DOS
        self._zip.writestr(info, b"")

    def file(self, path: Sequence[str], found: Found) -> None:
        info = self._info(path, found.entry, stat.S_IFREG | 0o644)
        content = _begun(found)
        with self._zip.open(info, "w", force_zip64=True) as file:
            try:
                for data in content:
                    file.write(data)
            except Unreadable as error:
                raise _cut_short(error) from error

    def link(self, path: Sequence[str], first: Sequence[str], entry: Entry) -> None:
        raise NotImplementedError  # a zip archive asks for no links

    def symlink(self, path: Sequence[str], target: str, entry: Entry) -> None:
        self._zip.writestr(
            self._info(path, entry, stat.S_IFLNK | 0o777, keep_mode=False), target.encode("utf-8", "surrogateescape")
        )
        self._links.add(path)

    def finish(self) -> None:
        self._zip.close()

    def _info(self, path: Sequence[str], entry: Entry, mode: int, *, keep_mode: bool = True) -> zipfile.ZipInfo:
        name = "/".join([self._name, *path])
        name.encode()  # raises UnicodeEncodeError for a name that is no text
        self._links.check(path)
        if ".." in name.replace("\\", "/").split("/"):
            raise OSError(errno.EINVAL, "Windows would take this name for a path that leads outside")
        if name in self._zip.NameToInfo:
            raise FileExistsError(errno.EEXIST, "the archive has this name already")
        info = zipfile.ZipInfo(name, _zip_time(entry.mtime))
        info.compress_type, info.create_system = zipfile.ZIP_DEFLATED, 3
        if keep_mode and entry.mode is not None:
            mode = stat.S_IFMT(mode) | entry.mode & 0o777
        info.external_attr = mode << 16
        return info


def _cut_short(error: Unreadable) -> Corrupt:
    return Corrupt(
        f"the archive is cut short: {error.message}",
        subject=error.subject,
        hint="get it into a directory: there a file that cannot be read is left out",
    )


def _begun(found: Found) -> Iterator[bytes]:
    """The bytes of a file; of a small one all are read by now. Raises Unreadable."""
    pieces = _plain(found.content)
    if found.entry.size > _WHOLE:
        first = next(pieces, b"")
        return chain([first], pieces)
    return iter([*pieces])


def _plain(content: Iterator[bytes | int]) -> Iterator[bytes]:
    for piece in content:
        if isinstance(piece, bytes):
            yield piece
        else:
            for at in range(0, piece, len(_ZEROES)):
                yield _ZEROES[: piece - at]


def _zip_time(nanoseconds: int | None) -> tuple[int, int, int, int, int, int]:
    try:
        year, *rest = time.gmtime((nanoseconds or 0) // 1_000_000_000)[:6]
    except (ValueError, OverflowError, OSError):
        year = 0
    if not _FIRST_YEAR <= year <= _LAST_YEAR:
        return (_FIRST_YEAR, 1, 1, 0, 0, 0)
    return (year, rest[0], rest[1], rest[2], rest[3], rest[4])
