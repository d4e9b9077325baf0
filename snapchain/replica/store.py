"""A replica on disk: a directory, in it one for each disk, in that plain qcow2 files.

ROOT/snapchain-replica.json          what makes it a replica
ROOT/web1%2Fvda/catalogue.json       points, layers, epoch
ROOT/web1%2Fvda/base.qcow2 ...       layers, read-only; each names the one below it by its name alone
ROOT/web1%2Fvda/.lock                locked by the process that changes the disk; names its work
ROOT/web1%2Fvda/.incoming.*          a layer that is arriving, and how much of it is durable
ROOT/web1%2Fvda/.merging.json        layers that are being made one, or were when their merge was killed
ROOT/web1%2Fvda/.cutting.json        files of layers that are being dropped, or were when that was killed
"""

from __future__ import annotations

import fcntl
import os
import stat
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from enum import StrEnum
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from snapchain.errors import Busy, Conflict, Corrupt, InvalidInput, NotFound, SnapchainError
from snapchain.host.directory import Directory
from snapchain.host.files import fsync_dir, read_small
from snapchain.host.os_errors import os_errors
from snapchain.host.rights import DeniedToOther
from snapchain.replica import names
from snapchain.replica.access import Access, share, tighten, tighten_root
from snapchain.replica.catalogue import Catalogue, Layer, M, read_record, write_record


class Marker(BaseModel):
    """What ROOT/snapchain-replica.json says."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal[1] = 1
    kind: Literal["snapchain replica"] = "snapchain replica"


class Work(StrEnum):
    """The work of the process that holds the lock of a disk."""

    TRANSFER = "transfer"
    MERGE = "merge"


class _Begun(BaseModel):
    """Of what progress.py notes about a layer that is arriving."""

    finished: Layer | None = None


class ReplicaDisk:
    """One disk's directory. What changes it happens inside `locked`."""

    def __init__(self, root: Path, name: str, access: Access | None = None) -> None:
        """Touches nothing. access: of the replica, as its directory says it unless given.

        Raises InvalidInput for a bad name.
        """
        self.name = name
        self.root = root
        self.directory = root / names.directory_of(name)
        self._access = access

    @property
    def access(self) -> Access:
        """Who may read files that are made here."""
        if self._access is None:
            with os_errors(self.root):
                self._access = Access.of(self.root.stat())
        return self._access

    def path(self, file: str) -> Path:
        """Of one of its files."""
        return self.directory / file

    def read(self) -> Catalogue | None:
        """The newest generation; None when the disk has none. Raises Corrupt, also where layers lie without one."""
        found = self.record(Catalogue, names.CATALOGUE)
        layers = [] if found else [name for name in layers_in(self.directory) if name != self._finished()]
        if layers:
            # A first layer becomes part of the disk just now: then the catalogue was there before its note went.
            found = self.record(Catalogue, names.CATALOGUE)
        if found is None and layers:
            raise Corrupt(
                f"its catalogue is gone, and {len(layers)} layers are here, such as {layers[0]!a}",
                subject=self.path(names.CATALOGUE),
                hint="put the catalogue back; or move those files elsewhere, and send the disk anew",
            )
        if found is not None and found.disk != self.name:
            raise Conflict(f"this is the disk {found.disk!r}, not {self.name!r}", subject=self.directory)
        return found

    def _finished(self) -> str | None:
        """The file of a first layer whose arrival was cut off in its last steps: it has no catalogue yet."""
        begun = self.record(_Begun, names.PROGRESS)
        return None if begun is None or begun.finished is None else begun.finished.file

    def record(self, shape: type[M], name: str) -> M | None:
        """One of the disk's records; None where it has none. Raises as `read_record`."""
        return read_record(shape, self.path(name))

    def put(self, name: str, record: BaseModel) -> None:
        """Put one of its records in place, durably. Only under the lock. Raises as `write_record`."""
        write_record(self.path(name), record, access=self.access)

    def write(self, catalogue: Catalogue, *, reserve: int = 0) -> None:
        """Put a generation in place, durably. Only under the lock. reserve and errors: as `write_record`."""
        write_record(self.path(names.CATALOGUE), catalogue, access=self.access, reserve=reserve)

    @contextmanager
    def locked(self, *, make: bool, work: Work = Work.TRANSFER) -> Iterator[None]:
        """Hold the disk against other writers. make: the directory too.

        work: written into the lock, for processes that find it locked; `in_turn` waits for some kinds
        Raises Busy at once, NotFound, InvalidInput for a name that no new disk can have, Conflict where the directory
        is a replica.
        """
        if make:
            self._make()
        with os_errors(self.directory), Directory.open(self.directory) as here:
            fd = opened_lock(here, names.LOCK)
            try:
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError as error:
                    raise Busy(
                        "another snapchain is changing this disk", subject=self.directory, hint="wait for it to end"
                    ) from error
                self._tighten(here)
            except BaseException:
                os.close(fd)
                raise
        try:
            with suppress(OSError):  # a full disk: others assume a transfer
                if os.fstat(fd).st_size:
                    os.ftruncate(fd, 0)
                if work is not Work.TRANSFER:
                    os.pwrite(fd, f"{work.value}\n".encode(), 0)
            yield
        finally:
            # Message, not left to the close: a child that was just forked may have a copy of the descriptor.
            with suppress(OSError):
                fcntl.flock(fd, fcntl.LOCK_UN)
            os.close(fd)

    def _make(self) -> None:
        name = self.directory.name
        with os_errors(self.directory), Directory.open(self.root) as root:
            if not self.directory.is_dir():
                names.check_new_disk(self.name)
                with suppress(FileExistsError):
                    root.make_directory(name)
                root.sync()
        with os_errors(self.directory), Directory.open(self.directory) as here:
            if here.has(names.MARKER) and not here.has(names.CATALOGUE):
                raise Conflict(
                    "this directory is a replica of its own, and cannot be a disk's",
                    subject=self.directory,
                    hint="send under another disk name, or to that replica",
                )

    def _tighten(self, here: Directory) -> None:
        """Older versions let everybody read. Where a guest may run on these files as another user, it still must."""
        if self.has_overlays():
            return
        files = here.names()
        layers = tuple(name for name in files if is_layer_file(name))
        records = tuple(
            name for name in (names.CATALOGUE, names.PROGRESS, names.MERGING, names.CUTTING) if name in files
        )
        tighten(here, self.access, layers=layers, records=records)

    def has_overlays(self) -> bool:
        """Whether there are overlays on which guests may run."""
        return bool(layers_in(self.path(names.ACTIVE)))

    def layer_mode(self) -> int:
        """Of a layer's file. Where a guest may run as another user, what it lies on must stay readable as it was."""
        mode = self.access.layer
        if self.has_overlays():
            for name in layers_in(self.directory):
                with suppress(OSError):
                    mode |= self.path(name).stat().st_mode & stat.S_IROTH
        return mode

    def held_for(self) -> Work:
        """The work of the lock's holder, as it has recorded it; meaningless while the lock is free."""
        try:
            return Work(read_small(self.path(names.LOCK), cap=100).decode().strip())
        except (SnapchainError, ValueError):
            return Work.TRANSFER


def opened_lock(here: Directory, name: str) -> int:
    """The file of a lock, made unless it is there. Raises InvalidInput for what is no file."""
    try:
        return here.open_file(name, writing=True)
    except FileNotFoundError:
        pass
    try:
        return here.create(name)
    except FileExistsError:  # another one was faster
        return here.open_file(name, writing=True)


class Replica:
    """A directory of disks."""

    def __init__(self, root: Path) -> None:
        """Use `open_replica`."""
        self.root = root

    def disk(self, name: str) -> ReplicaDisk:
        """A disk, whether or not it exists. Raises InvalidInput for a bad name."""
        return ReplicaDisk(self.root, name)

    def disks(self) -> list[ReplicaDisk]:
        """All that have a catalogue, sound or not, or layers that have lost it; by name."""
        with os_errors(self.root):
            with Directory.open(self.root) as here:
                entries = [self.root / name for name in here.names()]
            places = [entry.name for entry in entries if os.path.lexists(entry / names.CATALOGUE) or layers_in(entry)]
        found = (names.disk_of(place) for place in places)
        return [ReplicaDisk(self.root, name) for name in sorted(name for name in found if name is not None)]


def is_layer_file(name: str) -> bool:
    """Whether a file of a disk's directory may be a layer."""
    return name.endswith(names.SUFFIX) and not name.startswith(".")


def layers_in(directory: Path) -> list[str]:
    """Files that may be layers, by name; none where there is no such directory, or none that its owner may list."""
    try:
        with Directory.open(directory) as here:
            entries = here.names()
    except (FileNotFoundError, NotADirectoryError, DeniedToOther):
        return []
    return [name for name in entries if is_layer_file(name)]


def _other_hint(root: Path) -> str:
    """What to do about a directory that holds no replica."""
    if (root / "config").is_file() and any((root / name).is_dir() for name in ("keys", "disks")):
        return f"this is a repository: its address is {root}, without dir: or ssh://"
    return "check the path; the first `snapchain ship IMAGE DEST::DISK` makes a replica"


def open_replica(root: Path, *, make: bool = False, group: int | None = None) -> Replica:
    """The replica in a directory. make: to write there; where there is nothing yet, begin one.

    group: that may read it from now on, where it is opened to write
    Raises NotFound, and InvalidInput for a directory that holds other things, is everybody's, or lies in a replica.
    """
    root = root.absolute()
    marker = root / names.MARKER
    known = read_record(Marker, marker) is not None
    if not make:
        if not known:
            raise NotFound("there is no replica here", subject=root, hint=_other_hint(root))
        return Replica(root)
    if not known:
        _begin(root)
    with os_errors(root), Directory.open(root) as here:
        if group is not None:
            share(here, group)
        tighten_root(here, guests=any(disk.has_overlays() for disk in Replica(root).disks()))
        access = Access.of(os.fstat(here.fd))
    if not known:
        write_record(marker, Marker(), access=access)
        fsync_dir(root.parent)
    return Replica(root)


def _begin(root: Path) -> None:
    """Make the directory of a replica, or take one that is empty."""
    _check_not_nested(root)
    with os_errors(root), Directory.open(root.parent) as above, suppress(FileExistsError):
        above.make_directory(root.name)
    check_free(root)
    with os_errors(root):
        if root.stat().st_mode & stat.S_ISVTX:
            raise InvalidInput(
                "everybody may make files in this directory", subject=root, hint="name a directory below it"
            )


def _check_not_nested(root: Path) -> None:
    """Raises InvalidInput for a directory in a replica: only its disks, and what belongs to them, are there."""
    for above in Path(os.path.realpath(root)).parents:
        try:
            marker, directory = (above / names.MARKER).lstat(), above.stat()
        except OSError:
            continue
        # A stranger's file of that name, as in /tmp, is no replica.
        if stat.S_ISREG(marker.st_mode) and marker.st_uid in (0, os.geteuid(), directory.st_uid):
            raise InvalidInput(
                f"this directory lies in the replica {above}", subject=root, hint="name a directory outside of it"
            )


def check_free(root: Path) -> None:
    """Raises InvalidInput for a directory that holds other things, where no replica can begin."""
    with os_errors(root):
        entries: list[str] = []
        if root.is_dir():
            with Directory.open(root) as here:
                entries = here.names()
    strange = [entry for entry in entries if not entry.startswith(f".{names.MARKER}")]
    if strange and not (root / names.MARKER).exists():
        raise InvalidInput(
            "this directory holds other things and is no replica",
            subject=root,
            hint="name a directory that is empty or does not exist yet",
        )


# --- Waiting for the lock: a transfer waits for a merge, which ends soon; a merge waits briefly for a transfer.
#
# Transfers do not wait for each other: the second would find a chain that its sender does not expect. While one side
# waits, BEAT frames keep the connection alive.

LIMITS = {(Work.TRANSFER, Work.MERGE): 900.0, (Work.MERGE, Work.TRANSFER): 60.0, (Work.MERGE, Work.MERGE): 60.0}
"""Seconds that one kind of work waits for another."""
GRACE = 2.0
"""For all others, and until a new lock holder has recorded its work."""
_POLL_SECONDS = 0.1


@contextmanager
def in_turn(disk: ReplicaDisk, work: Work, *, make: bool = False) -> Iterator[None]:
    """Hold the disk as `ReplicaDisk.locked` does, once its holder is done.

    Raises Busy when that takes too long.
    """
    began = time.monotonic()
    with ExitStack() as stack:
        while True:
            try:
                stack.enter_context(disk.locked(make=make, work=work))
                break
            except Busy as error:
                theirs = disk.held_for()
                limit = LIMITS.get((work, theirs), GRACE)
                if time.monotonic() - began >= limit:
                    raise Busy(
                        f"another snapchain is changing this disk (a {theirs.value})",
                        subject=disk.directory,
                        hint="wait for it to end",
                    ) from error
            time.sleep(_POLL_SECONDS)
        yield
