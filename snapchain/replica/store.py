"""A replica on disk: a directory, in it one for each disk, in that plain qcow2 files.

ROOT/snapchain-replica.json          what makes it a replica
ROOT/web1%2Fvda/catalogue.json       points, layers, epoch
ROOT/web1%2Fvda/base.qcow2 ...       layers, read-only; each names the one below it by its name alone
ROOT/web1%2Fvda/.lock                held by who changes the disk; in it a word for what they do
ROOT/web1%2Fvda/.incoming.*          a layer that is arriving, and how much of it is durable
ROOT/web1%2Fvda/.merging.json        layers that are being made one, or were when their merge was killed
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from enum import StrEnum
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from snapchain.errors import Busy, Conflict, Corrupt, InvalidInput, NotFound
from snapchain.host.files import fsync_dir
from snapchain.host.os_errors import os_errors
from snapchain.replica import names
from snapchain.replica.catalogue import Catalogue, Layer, read_record, write_record


class Marker(BaseModel):
    """What ROOT/snapchain-replica.json says."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal[1] = 1
    kind: Literal["snapchain replica"] = "snapchain replica"


class Work(StrEnum):
    """What somebody does who holds a disk."""

    TRANSFER = "transfer"
    MERGE = "merge"


class _Begun(BaseModel):
    """Of what progress.py notes about a layer that is arriving."""

    finished: Layer | None = None


class ReplicaDisk:
    """One disk's directory. What changes it happens inside `locked`."""

    def __init__(self, root: Path, name: str) -> None:
        """Touches nothing. Raises InvalidInput for a bad name."""
        self.name = name
        self.directory = root / names.directory_of(name)

    def path(self, file: str) -> Path:
        """Of one of its files."""
        return self.directory / file

    def read(self) -> Catalogue | None:
        """The newest generation; None when the disk has none. Raises Corrupt, also where layers lie without one."""
        found = self._catalogue()
        layers = [] if found else [name for name in layers_in(self.directory) if name != self._finished()]
        if layers:
            # A first layer becomes part of the disk just now: then the catalogue was there before its note went.
            found = self._catalogue()
        if found is None and layers:
            raise Corrupt(
                f"its catalogue is gone, and {len(layers)} layers are here, such as {layers[0]!a}",
                subject=self.path(names.CATALOGUE),
                hint="put the catalogue back; or move those files elsewhere, and send the disk anew",
            )
        if found is not None and found.disk != self.name:
            raise Conflict(f"this is the disk {found.disk!r}, not {self.name!r}", subject=self.directory)
        return found

    def _catalogue(self) -> Catalogue | None:
        return read_record(Catalogue, self.path(names.CATALOGUE))

    def _finished(self) -> str | None:
        """The file of a first layer whose arrival was cut off in its last steps: it has no catalogue yet."""
        begun = read_record(_Begun, self.path(names.PROGRESS))
        return None if begun is None or begun.finished is None else begun.finished.file

    def write(self, catalogue: Catalogue) -> None:
        """Put a generation in place, durably. Only under the lock."""
        write_record(self.path(names.CATALOGUE), catalogue)

    @contextmanager
    def locked(self, *, make: bool, work: Work = Work.TRANSFER) -> Iterator[None]:
        """Hold the disk against other writers. make: the directory too. Raises Busy at once, NotFound.

        work: told to those who find it held; `replica.waiting` waits for some of it
        """
        with os_errors(self.directory):
            if make and not self.directory.is_dir():
                with suppress(FileExistsError):
                    self.directory.mkdir(mode=0o755)
                fsync_dir(self.directory.parent)
            fd = os.open(self.path(names.LOCK), os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise Busy(
                    "another snapchain is changing this disk", subject=self.directory, hint="wait for it to end"
                ) from error
            with suppress(OSError):  # a full disk: those who come take it for a transfer
                if os.fstat(fd).st_size:
                    os.ftruncate(fd, 0)
                if work is not Work.TRANSFER:
                    os.pwrite(fd, f"{work.value}\n".encode(), 0)
            yield
        finally:
            # Said, not left to the close: a child that was just forked may have a copy of the descriptor.
            with suppress(OSError):
                fcntl.flock(fd, fcntl.LOCK_UN)
            os.close(fd)

    def held_for(self) -> Work:
        """What who holds the disk does, as they have said; meaningless while nobody does."""
        try:
            return Work(self.path(names.LOCK).read_text().strip())
        except (OSError, ValueError):
            return Work.TRANSFER


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
            entries = list(self.root.iterdir())
            places = [entry.name for entry in entries if os.path.lexists(entry / names.CATALOGUE) or layers_in(entry)]
        found = (names.disk_of(place) for place in places)
        return [ReplicaDisk(self.root, name) for name in sorted(name for name in found if name is not None)]


def layers_in(directory: Path) -> list[str]:
    """Files that may be layers, by name; none where there is no such directory."""
    try:
        entries = sorted(entry.name for entry in directory.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    return [name for name in entries if name.endswith(names.SUFFIX) and not name.startswith(".")]


def open_replica(root: Path, *, make: bool = False) -> Replica:
    """The replica in a directory. make: where there is nothing yet, begin one.

    Raises NotFound, and InvalidInput for a directory that holds other things.
    """
    root = root.absolute()
    marker = root / names.MARKER
    if read_record(Marker, marker) is not None:
        return Replica(root)
    if not make:
        raise NotFound("there is no replica here", subject=root)
    with os_errors(root), suppress(FileExistsError):
        root.mkdir(mode=0o755)
    check_free(root)
    write_record(marker, Marker())
    fsync_dir(root.parent)
    return Replica(root)


def check_free(root: Path) -> None:
    """Raises InvalidInput for a directory that holds other things, where no replica can begin."""
    with os_errors(root):
        entries = [entry.name for entry in root.iterdir()] if root.is_dir() else []
    strange = [entry for entry in entries if not entry.startswith(f".{names.MARKER}")]
    if strange and not (root / names.MARKER).exists():
        raise InvalidInput(
            "this directory holds other things and is no replica",
            subject=root,
            hint="name a directory that is empty or does not exist yet",
        )
