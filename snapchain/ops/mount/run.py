"""mount DEST DIR: every point of a destination as a raw file, read-only, as long as this program runs.

    plan     which disks and points
    run      mounts, and serves until it is stopped, or until somebody unmounts it

A point is opened, with its lease, while a program has its file open. Points that come later are seen later: the list is
read again when a directory is looked at, at most so often that listing takes a small share of the time.
"""

from __future__ import annotations

import errno
import itertools
import stat
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from snapchain.destination.reading import ReadableDestination
from snapchain.destination.records import DiskRecord
from snapchain.errors import NotFound, SnapchainError, Unavailable
from snapchain.host.fuse import Mount, Status, check_mountable
from snapchain.host.path_resolution import place_to_change
from snapchain.model.events import OnEvent, ignore
from snapchain.nbd.exports import Exports, OpenedExport
from snapchain.nbd.read_ahead import ReadAhead
from snapchain.nbd.reading import SHIFT
from snapchain.ops.guest_points import guest_named
from snapchain.ops.mount.tree import Entry, Files, Link, PointFile, files_of, find
from snapchain.ops.readings import CACHE_BYTES, PATIENCE, PointReadings, ReadLog, check_cache

LISTED_SECONDS = 10.0
_LISTING_SHARE = 20
"""Listing is done again after so many times as long as it took."""
_WAIT_SECONDS = 2.0
"""For which a program waits for a new list: a store may be away."""


@dataclass(frozen=True, slots=True)
class MountRequest:
    """directory: an empty one; disk: one disk or guest instead of all disks; cache: bytes; patience: seconds

    for_others: other users of this host may read it
    """

    directory: Path
    disk: str | None = None
    cache: int = CACHE_BYTES
    patience: float = PATIENCE
    for_others: bool = False


@dataclass(frozen=True, slots=True)
class MountPlan:
    """What is shown. disks, points: how many files there are; left_out: what has none, as sentences; cache: bytes"""

    destination: str
    directory: str
    disks: int
    points: int
    left_out: tuple[str, ...]
    for_others: bool
    cache: int


@dataclass(frozen=True, slots=True)
class MountReport:
    """What was done. opened: files; failed_reads: that ended with an error"""

    destination: str
    directory: str
    opened: int
    reads: int
    bytes_read: int
    failed_reads: int
    seconds: float


class Mounting:
    """A destination, and a directory."""

    def __init__(self, destination: ReadableDestination, request: MountRequest) -> None:
        """Looks up the points. Raises NotFound, and as `whole` and `check_mountable`."""
        check_cache(request.cache)
        self._destination, self._request = destination, request
        try:
            self._directory = place_to_change(request.directory.absolute())
        except Unavailable:
            check_mountable(request.directory)  # has words for a mount whose program has ended: it cannot be entered
            raise
        check_mountable(self._directory)
        self._files = files_of(_listed(destination, request.disk))
        for newest in _points(self._files.root):
            destination.whole(newest.disk, str(newest.record.point))  # is not entered: raises where it cannot be done
            break

    def plan(self) -> MountPlan:
        """What `run` will show; nothing is opened."""
        return MountPlan(
            destination=self._destination.url,
            directory=str(self._directory),
            disks=self._files.disks,
            points=self._files.points,
            left_out=self._files.left_out,
            for_others=self._request.for_others,
            cache=self._request.cache,
        )

    def run(self, on_ready: Callable[[MountPlan], None], *, on_event: OnEvent = ignore) -> MountReport:
        """Show the files until SIGTERM, Ctrl-C, or until somebody unmounts them. on_ready: called when they are there

        Raises as `Mount`.
        """
        began = time.monotonic()
        log = ReadLog(on_event)
        for words in self._files.left_out:
            log.note(words)
        with PointReadings(cache=self._request.cache, patience=self._request.patience, on_event=on_event) as readings:
            tree = PointTree(self._destination, self._request.disk, self._files, readings, log)
            shown = Mount(tree, self._directory, for_others=self._request.for_others)
            with suppress(KeyboardInterrupt), shown:
                on_ready(self.plan())
                shown.wait()
        return MountReport(
            destination=self._destination.url,
            directory=str(self._directory),
            opened=tree.tally.opened,
            reads=tree.tally.reads,
            bytes_read=tree.tally.bytes_read,
            failed_reads=tree.tally.failed,
            seconds=time.monotonic() - began,
        )


def _listed(destination: ReadableDestination, disk: str | None) -> tuple[DiskRecord, ...]:
    """All disks, one, or those of a guest. Raises NotFound."""
    try:
        return destination.disks(disk)
    except NotFound:
        every = destination.disks()
        guest = None if disk is None else guest_named(every, disk)
        if guest is None:
            raise
        return tuple(each for each in every if each.name.startswith(f"{guest.name}/"))


def _points(entry: Entry) -> Iterable[PointFile]:
    if isinstance(entry, PointFile):
        yield entry
    elif isinstance(entry, dict):
        for each in entry.values():
            yield from _points(each)


@dataclass(slots=True)
class Tally:
    """What was read so far."""

    opened: int = 0
    reads: int = 0
    bytes_read: int = 0
    failed: int = 0


@dataclass(slots=True)
class _Handle:
    """An open file. lock: of `ahead`, since a program may read from several threads."""

    name: str
    entry: PointFile
    opened: OpenedExport
    ahead: ReadAhead
    lock: threading.Lock = field(default_factory=threading.Lock)


_Key = tuple[str, int, str]


class PointTree:
    """The points of a destination, as a Tree of `host/fuse.py`. Thread-safe."""

    def __init__(
        self, destination: ReadableDestination, disk: str | None, files: Files, readings: PointReadings, log: ReadLog
    ) -> None:
        """files: of the first list"""
        self.tally = Tally()
        self._destination, self._disk, self._readings, self._log = destination, disk, readings, log
        self._files = files
        self._listed_at, self._fresh_seconds = time.monotonic(), LISTED_SECONDS
        self._listing: threading.Event | None = None
        self._lock = threading.Lock()
        self._exports: dict[_Key, Exports] = {}
        self._stored: dict[_Key, int] = {}
        self._handles: dict[int, _Handle] = {}
        self._numbers = itertools.count(1)
        self._has_ended = False

    def status(self, path: str) -> Status:
        """See `Tree`. A point has its time and size, and takes what its map has as data, once that was read."""
        try:
            entry = self._found(path)
        except FileNotFoundError:  # a point that was dropped is there for who has it open, as any file
            name = path.removeprefix("/")
            with self._lock:
                opened = next((each.entry for each in self._handles.values() if each.name == name), None)
            if opened is None:
                raise
            entry = opened
        if isinstance(entry, PointFile):
            record = entry.record
            stored = self._stored.get(_key(entry), record.virtual_size)
            return Status(stat.S_IFREG, record.virtual_size, int(record.time.timestamp() * 10**9), stored)
        if isinstance(entry, Link):
            return Status(stat.S_IFLNK, len(entry.target))
        return Status(stat.S_IFDIR)

    def names(self, path: str) -> Iterable[tuple[str, int]]:
        """See `Tree`."""
        self._look_again()
        entry = self._found(path)
        if not isinstance(entry, dict):
            raise NotADirectoryError(errno.ENOTDIR, path)
        return [(name, _kind(each)) for name, each in entry.items()]

    def target(self, path: str) -> str:
        """See `Tree`."""
        self._look_again()
        entry = self._found(path)
        if not isinstance(entry, Link):
            raise OSError(errno.EINVAL, path)
        return entry.target

    def open(self, path: str) -> int:
        """See `Tree`. What keeps a point from being opened is noted."""
        entry = self._found(path)
        if not isinstance(entry, PointFile):
            raise IsADirectoryError(errno.EISDIR, path)
        key = _key(entry)
        with self._lock:
            exports = self._exports.get(key)
            if exports is None:
                export = self._readings.export(path, self._destination, entry.disk, entry.record, stays=False)
                exports = self._exports[key] = Exports([export])
        try:
            opened = exports.open(path)
        except SnapchainError as error:
            self._log.note(f"{path.removeprefix('/')} could not be opened: {error}")
            raise OSError(errno.ENOENT if isinstance(error, NotFound) else errno.EIO, path) from error
        self._stored[key] = opened.reading.extents.data_bytes
        with self._lock:
            number = next(self._numbers)
            self._handles[number] = _Handle(path.removeprefix("/"), entry, opened, ReadAhead(opened.reading.most_ahead))
            self.tally.opened += 1
            if self._has_ended:
                exports.end()
        return number

    def read(self, handle: int, offset: int, length: int) -> bytes:
        """See `Tree`. What cannot be read is an error, and noted."""
        found = self._handles[handle]
        reading = found.opened.reading
        length = max(0, min(length, reading.size - offset))
        if not length:
            return b""
        self._read_ahead(found, offset, length)
        try:
            pieces = reading.ready(offset, length)
            if pieces is None:
                pieces = [piece for some in reading.wait(offset, length) for piece in some]
        except (SnapchainError, OSError) as error:
            self._log.fault(found.name, offset, length, error)
            self._count(failed=1)
            raise OSError(errno.EIO, found.name) from error
        data = b"".join(bytes(some) if held is None else held for _, some, held in pieces)
        if len(data) != length:  # the kernel would take the rest for zeroes
            raise OSError(errno.EIO, found.name)
        self._count(bytes_read=length)
        return data

    def close(self, handle: int) -> None:
        """See `Tree`."""
        with self._lock:
            found = self._handles.pop(handle)
        found.opened.leave()

    def end(self) -> None:
        """See `Tree`."""
        with self._lock:
            self._has_ended = True
            every = list(self._exports.values())
        for exports in every:
            exports.end()

    def _read_ahead(self, found: _Handle, offset: int, length: int) -> None:
        reading = found.opened.reading
        if not reading.most_ahead:
            return
        number = reading.data.number
        first, stop = number(offset >> SHIFT), number(((offset + length - 1) >> SHIFT) + 1)
        with found.lock:
            ahead = found.ahead.wanted(first, stop) if first < stop else None
        if ahead is not None:
            reading.ahead(*ahead)

    def _count(self, *, bytes_read: int = 0, failed: int = 0) -> None:
        with self._lock:
            self.tally.reads += 1
            self.tally.bytes_read += bytes_read
            self.tally.failed += failed

    # --- the list

    def _found(self, path: str) -> Entry:
        """Raises FileNotFoundError for a path that names nothing, also after another look."""
        found = find(self._files.root, path)
        if found is None:
            self._look_again()
            found = find(self._files.root, path)
        if found is None:
            raise FileNotFoundError(errno.ENOENT, path)
        return found

    def _look_again(self) -> None:
        """Begin to read the list anew where it is old, and wait a moment for it; the old one stays where that fails."""
        with self._lock:
            listing = self._listing
            if listing is None:
                if time.monotonic() - self._listed_at < self._fresh_seconds or self._has_ended:
                    return
                listing = self._listing = threading.Event()
                threading.Thread(target=self._list, args=(listing,), name="mount list", daemon=True).start()
        listing.wait(_WAIT_SECONDS)

    def _list(self, listing: threading.Event) -> None:
        began = time.monotonic()
        try:
            self._files = files_of(_listed(self._destination, self._disk))
            for words in self._files.left_out:
                self._log.note(words)
        except SnapchainError as error:
            self._log.note(f"the list of points is an old one, since a new one could not be read: {error}")
        finally:
            with self._lock:
                self._listed_at = time.monotonic()
                self._fresh_seconds = max(LISTED_SECONDS, _LISTING_SHARE * (self._listed_at - began))
                self._listing = None
            listing.set()


def _key(entry: PointFile) -> _Key:
    return entry.disk, entry.record.point, entry.record.content_id


def _kind(entry: Entry) -> int:
    if isinstance(entry, PointFile):
        return stat.S_IFREG
    return stat.S_IFLNK if isinstance(entry, Link) else stat.S_IFDIR
