"""Objects as files below one directory.

An object appears whole: it is written and synced under `tmp/`, then renamed (`put`) or hard-linked (`create`, which
fails when the name is taken) into place, then the directory is synced.  So a killed writer leaves at most a file in
`tmp/`, which no listing shows and which a later writer sweeps after a day.
"""

from __future__ import annotations

import ctypes
import errno
import os
import secrets
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

from snapchain.errors import Corrupt, NotFound, Unsupported
from snapchain.host.batches import batches, rest
from snapchain.host.file_systems import network_file_system
from snapchain.objects.reserve import Reserve
from snapchain.objects.rooted import Rooted, from_os_error
from snapchain.objects.store import (
    Data,
    ObjectInfo,
    Properties,
    buffers,
    check_size,
    directory_prefix,
    valid_name,
    valid_prefix,
    valid_range,
)

TEMPORARY_LIFE = 86400.0
"""Seconds after which an unfinished file is held to be left behind by a dead writer."""

_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


class LocalStore:
    """An ObjectStore in a directory of this machine (or one that is mounted here)."""

    def __init__(self, root: str | os.PathLike[str], *, make: bool = False) -> None:
        """`make` creates the directory and its parents.  Raises NotFound when it is not there."""
        self.root = Path(root).absolute()
        self.url = str(self.root)
        self.warnings: tuple[str, ...] = ()
        self._rooted = Rooted(self.root, make=make)
        self.properties = Properties(
            conditional_put=True,
            description=f"directory {self.root}",
            stale_through=network_file_system(self.root),
        )
        self._reserve = Reserve(shared=self._rooted.is_shared)

    def put(self, name: str, data: Data) -> None:
        self._place(name, data, _replace)

    def create(self, name: str, data: Data) -> bool:
        if self.size(name) is not None:  # saves writing what would be thrown away; the link decides
            return False
        return self._place(name, data, _link)

    def spending(self) -> AbstractContextManager[None]:
        """See objects/reserve.py."""
        return self._reserve.spent(self._rooted.descriptor())

    def get(self, name: str, *, offset: int = 0, length: int | None = None) -> bytes:
        valid_name(name)
        valid_range(name, offset, length)
        with self._reading(name) as (fd, size):
            wanted = check_size(
                name, max(0, size - offset) if length is None else length, subject=self._rooted.path(name)
            )
            if offset + wanted > size:
                raise Corrupt(
                    f"object has {size} bytes, bytes {offset} to {offset + wanted} were asked for",
                    subject=self._rooted.path(name),
                )
            body = _read_exactly(fd, wanted, offset)
        if len(body) != wanted:
            raise Corrupt("object became shorter while it was read", subject=self._rooted.path(name))
        return body

    def size(self, name: str) -> int | None:
        valid_name(name)
        try:
            with self._reading(name) as (_, size):
                return size
        except NotFound:
            return None

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        folder, _, start = valid_prefix(prefix).rpartition("/")
        return self._below(folder, start)

    def list_dirs(self, prefix: str) -> Iterator[str]:
        folder = directory_prefix(prefix)
        entries = self._rooted.entries(folder.rstrip("/"))
        return (
            entry
            for entry in sorted(name for name, is_folder in entries if is_folder)
            if next(self._below(folder + entry, ""), None) is not None
        )

    def top_names(self) -> Sequence[str]:
        """All names in the directory, ours or not, but for the `lost+found` that a new filesystem has."""
        return [name for name in self._rooted.all_names() if name != "lost+found"]

    def delete(self, name: str) -> None:
        """Idempotent.  Not synced: after a power failure a deleted object may be there again."""
        valid_name(name)
        try:
            with self._rooted.folder(name, make=False) as (folder, leaf):
                os.unlink(leaf, dir_fd=folder)
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return
        except OSError as error:
            raise from_os_error(error, self._rooted.path(name)) from error

    def settle(self, name: str) -> None:
        """As Settles: the file was synced before it had its name, so what is left is the name."""
        try:
            with self._rooted.folder(valid_name(name), make=False) as (folder, _):
                os.fsync(folder)
        except (FileNotFoundError, NotADirectoryError):
            return
        except OSError as error:
            raise from_os_error(error, self._rooted.path(name)) from error

    def close(self) -> None:
        self._rooted.close()

    def sweep_temporary(self, older_than: float = TEMPORARY_LIFE) -> int:
        """Delete the unfinished files that nobody touched for `older_than` seconds; gives how many."""
        try:
            return self._rooted.sweep_temporary(older_than)
        except OSError as error:
            raise from_os_error(error, self.root) from error

    def _place(self, name: str, data: Data, finish: Callable[[int, str, int, str], bool]) -> bool:
        """Write `data` under a temporary name, and give it its final one by `finish`; what that says."""
        valid_name(name)
        views = buffers(data)
        while True:
            try:
                with self._written(name, views) as (tmp, temporary, folder, leaf):
                    return finish(tmp, temporary, folder, leaf)
            except OSError as error:
                if not self._reserve.give_up(self._rooted.descriptor(), error):
                    raise from_os_error(error, self._rooted.path(name)) from error

    @contextmanager
    def _written(self, name: str, views: Sequence[memoryview]) -> Iterator[tuple[int, str, int, str]]:
        """`views` durable under a temporary name: (tmp descriptor, its name, directory descriptor, last segment).

        An error of the sync is final: the kernel reports lost pages once, so the file is thrown away, never re-synced.
        """
        temporary = f"{os.getpid()}-{secrets.token_hex(8)}"
        tmp = self._rooted.temporary(TEMPORARY_LIFE)
        with self._rooted.folder(name, make=True) as (folder, leaf):
            try:
                fd = self._rooted.new_file(temporary, folder=tmp)
                try:
                    _write_all(fd, views)
                    os.fsync(fd)
                finally:
                    os.close(fd)
                yield tmp, temporary, folder, leaf
            finally:
                with suppress(FileNotFoundError):  # it has its final name
                    os.unlink(temporary, dir_fd=tmp)

    @contextmanager
    def _reading(self, name: str) -> Iterator[tuple[int, int]]:
        """(descriptor, size in bytes) of an object.  Raises NotFound; Unsupported for what is no regular file."""
        try:
            with self._rooted.folder(name, make=False) as (folder, leaf):
                fd = os.open(leaf, _READ, dir_fd=folder)
            try:
                found = os.fstat(fd)
                if stat.S_ISDIR(found.st_mode):
                    raise NotFound("no such object", subject=self._rooted.path(name))
                if not stat.S_ISREG(found.st_mode):
                    raise Unsupported("not a regular file", subject=self._rooted.path(name))
                yield fd, found.st_size
            finally:
                os.close(fd)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise NotFound("no such object", subject=self._rooted.path(name)) from error
        except OSError as error:
            raise from_os_error(error, self._rooted.path(name)) from error

    def _below(self, folder: str, start: str) -> Iterator[ObjectInfo]:
        """Objects under `folder` whose first segment begins with `start`, ascending by name."""
        for entry, found in self._rooted.listing(folder, start):
            name = f"{folder}/{entry}" if folder else entry
            if found is None:
                yield from self._below(name, "")
            elif stat.S_ISREG(found.st_mode):
                yield ObjectInfo(name, found.st_size, found.st_mtime)


def _replace(tmp: int, temporary: str, folder: int, leaf: str) -> bool:
    os.rename(temporary, leaf, src_dir_fd=tmp, dst_dir_fd=folder)
    os.fsync(folder)
    return True


def _link(tmp: int, temporary: str, folder: int, leaf: str) -> bool:
    made = link_once(tmp, temporary, folder, leaf)
    if not made and stat.S_ISDIR(os.stat(leaf, dir_fd=folder, follow_symlinks=False).st_mode):
        raise OSError(errno.EISDIR, os.strerror(errno.EISDIR))
    os.fsync(folder)  # also for another writer's object: after False the caller relies on it
    return made


def _write_all(fd: int, views: Sequence[memoryview]) -> None:
    """Write all views by writev, without joining them; goes on after short writes."""
    for batch in batches(views):
        left = batch
        while left:
            left = rest(left, os.writev(fd, left))


def _read_exactly(fd: int, length: int, offset: int) -> bytes:
    """`length` bytes at `offset`, or fewer at the end of the file."""
    body = os.pread(fd, length, offset)
    if len(body) == length or not body:
        return body
    parts = [body]  # Linux cuts a read at 2 GiB, and some network file systems earlier
    done = len(body)
    while done < length and (body := os.pread(fd, length - done, offset + done)):
        parts.append(body)
        done += len(body)
    return b"".join(parts)


# --- Give a finished file its final name, unless that name is taken: atomically.
#
# link(2) does it on every POSIX file system.  Where hard links are unknown (FAT, exFAT, some FUSE and CIFS mounts) it
# is renameat2(2) with RENAME_NOREPLACE, and where that is unknown too, nothing: a check before a rename would be a
# race.

RENAME_NOREPLACE = 1
"""linux/fs.h"""
_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}
_NO_RENAMEAT2 = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP}


def link_once(source_folder: int, source: str, folder: int, name: str) -> bool:
    """True: the file `source` is now (also) `name`.  False: `name` exists, and nothing changed.

    Folders are descriptors.  Raises Unsupported where the file system can do neither; OSError as it comes.
    """
    try:
        os.link(source, name, src_dir_fd=source_folder, dst_dir_fd=folder, follow_symlinks=False)
    except FileExistsError:
        # NFS may repeat a request whose reply was lost: then the name that is in the way is our own.
        return os.stat(source, dir_fd=source_folder, follow_symlinks=False).st_nlink == 2
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        return rename_once(source_folder, source, folder, name)
    return True


def rename_once(source_folder: int, source: str, folder: int, name: str) -> bool:
    """As link_once, by renameat2(RENAME_NOREPLACE); `source` is gone afterwards when it is True."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    number = errno.ENOSYS
    if renameat2 is not None:
        if renameat2(source_folder, os.fsencode(source), folder, os.fsencode(name), RENAME_NOREPLACE) == 0:
            return True
        number = ctypes.get_errno()
    if number == errno.EEXIST:
        return False
    if number in _NO_RENAMEAT2:
        raise Unsupported(
            "this file system can neither link nor rename without replacing",
            subject=name,
            hint="put the repository on a file system with hard links (ext4, XFS, btrfs, ZFS, NFS)",
        )
    raise OSError(number, os.strerror(number))
