"""get: a file, or a directory with all that it holds, written to a new tree, a tar archive or a zip archive."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, Protocol, Self

from snapchain.errors import Conflict, Corrupt, InvalidInput
from snapchain.files.records import Entry
from snapchain.files.session import Found, Unreadable
from snapchain.host.files import directory_of
from snapchain.host.new_tree import SKIPPED, Marks, NewTree
from snapchain.host.os_errors import os_errors
from snapchain.host.temporary_names import NEW, temporary_beside
from snapchain.model.events import OnEvent, ignore
from snapchain.ops.files.archive import TarWriter, ZipWriter
from snapchain.ops.files.opening import DEFAULT, Limits, Opened, Skipped, file_system, names_of, skipped_of
from snapchain.ops.files.source import Moment, Source

_ALL = 1 << 20
_MOST_SKIPPED = 1000
Form = Literal["tree", "tar", "zip"]


@dataclass(frozen=True, slots=True)
class GetRequest:
    """path: in the guest; output: a new name, None for `write` of `Getting.run`; form: what is made

    keep: owners, modes, times, hard links and extended attributes of a tree, extended attributes of a tar archive
    """

    path: str
    output: Path | None
    form: Form = "tree"
    volume: str | None = None
    keep: bool = False
    limits: Limits = DEFAULT


@dataclass(frozen=True, slots=True)
class GetPlan:
    """What would be written. bytes: of files, holes included"""

    source: str
    point: int | None
    time: datetime | None
    volume: str
    path: str
    output: str
    form: str
    files: int
    directories: int
    links: int
    bytes: int
    skipped: tuple[Skipped, ...]


@dataclass(frozen=True, slots=True)
class GetReport:
    """What was written. not_kept: what the place where it was written could not keep: owner, mode, times, attributes

    left_out: devices, FIFOs and sockets, which are never made; skipped: what could not be read or written
    """

    source: str
    point: int | None
    time: datetime | None
    volume: str
    path: str
    output: str
    form: str
    files: int
    directories: int
    links: int
    bytes: int
    left_out: tuple[Skipped, ...]
    skipped: tuple[Skipped, ...]
    not_kept: tuple[str, ...]
    seconds: float


class Writer(Protocol):
    """Where entries go; directories come before what they hold. Methods raise OSError for one that cannot be had.

    not_kept: as of GetReport
    """

    not_kept: set[str]

    def directory(self, path: Sequence[str], entry: Entry) -> None: ...

    def file(self, path: Sequence[str], found: Found) -> None:
        """Raises Unreadable where it cannot be read; then it is not there."""
        ...

    def link(self, path: Sequence[str], first: Sequence[str], entry: Entry) -> None:
        """A further name of a file that was given."""
        ...

    def symlink(self, path: Sequence[str], target: str, entry: Entry) -> None: ...

    def finish(self) -> None: ...


class Getting:
    """One `get`. Raises InvalidInput for a request that makes no sense, Conflict for an output that exists."""

    def __init__(self, source: Source, request: GetRequest, *, on_event: OnEvent = ignore) -> None:
        (self._moment,) = source.moments()
        self._source, self._request, self._on_event = source, request, on_event
        self._names = names_of(request.path)
        if request.output is None and request.form == "tree":
            raise InvalidInput("a tree of files cannot be a stream", hint="say --tar or --zip, or name a new directory")
        if request.output is not None and request.output.name in {"", ".."}:
            raise InvalidInput("this is no name of its own", subject=request.output, hint="name what is to be made")
        if request.output is not None:
            with directory_of(request.output) as above:
                if above.has(request.output.name):
                    raise Conflict("it exists already", subject=request.output, hint="name a new file or directory")

    def plan(self) -> GetPlan:
        """What `run` would write; nothing is written. Raises as `Session.walk`."""
        counts = _Counts()
        with self._opened() as opened:
            with opened.session.walk(self._names, depth=_ALL, links=self._keeps_links) as entries:
                for found in entries:
                    counts.count(found.entry)
            skipped = skipped_of(opened.session, self._names)
        return GetPlan(
            **self._head(opened.volume.name),
            files=counts.files,
            directories=counts.directories,
            links=counts.links,
            bytes=counts.bytes,
            skipped=skipped,
        )

    def run(self, write: Callable[[memoryview], None] | None = None) -> GetReport:
        """Write it. write: takes the bytes of an archive, where no output is named

        An archive has its name when it is whole. Of a tree that is interrupted a part is left.
        Raises as `Session.walk`, and for the output as `os_errors`; NotFound where there is nothing at the path.
        """
        began = time.monotonic()
        counts = _Counts()
        own: list[Skipped] = []
        left_out: list[Skipped] = []
        with self._opened() as opened, self._writer(write) as writer:
            with opened.session.walk(
                self._names, depth=_ALL, contents=True, attributes=self._request.keep, links=self._keeps_links
            ) as entries:
                names = _Names()
                for found in entries:
                    self._take(found, writer, counts, own, left_out, names)
            skipped = (*skipped_of(opened.session, self._names), *own)
            if not counts.found:
                raise opened.session.unread(self._names)
            with os_errors(self._subject):
                writer.finish()
        return GetReport(
            **self._head(opened.volume.name),
            files=counts.files,
            directories=counts.directories,
            links=counts.links,
            bytes=counts.bytes,
            left_out=tuple(left_out),
            skipped=skipped,
            not_kept=tuple(sorted(writer.not_kept)),
            seconds=time.monotonic() - began,
        )

    @property
    def _keeps_links(self) -> bool:
        return self._request.keep or self._request.form == "tar"

    @property
    def _subject(self) -> object:
        return self._request.output or "standard output"

    def _head(self, volume: str) -> dict[str, Any]:
        moment: Moment = self._moment
        return {
            "source": self._source.name,
            "point": moment.point,
            "time": moment.time,
            "volume": volume,
            "path": "/" + "/".join(self._names),
            "output": "-" if self._request.output is None else str(self._request.output),
            "form": self._request.form,
        }

    def _opened(self) -> AbstractContextManager[Opened]:
        request = self._request
        return file_system(self._source, self._moment, request.volume, limits=request.limits, on_event=self._on_event)

    def _take(
        self,
        found: Found,
        writer: Writer,
        counts: _Counts,
        skipped: list[Skipped],
        left_out: list[Skipped],
        names: _Names,
    ) -> None:
        """Write one entry; nothing of one whose directory was skipped."""
        entry, path = found.entry, found.entry.path
        shown = "/" + "/".join([*self._names, *path])
        if not names.lies_in_directory(path):
            return
        try:
            names.take(path)
            with _one_name(self._subject):
                if entry.kind == "directory":
                    writer.directory(path, entry)
                elif entry.same_as is not None:
                    writer.link(path, entry.same_as, entry)
                elif entry.kind == "file":
                    writer.file(path, found)
                elif entry.kind == "symlink":
                    writer.symlink(path, entry.target or "", entry)
                else:
                    counts.found = True
                    _add(left_out, shown, f"a {entry.kind} is not made")
                    return
        except (Unreadable, _Refused) as error:
            if entry.kind == "directory":
                names.refuse(path)
            _add(skipped, shown, str(error) if isinstance(error, _Refused) else error.message)
        else:
            counts.count(entry)
            if entry.kind == "directory":
                names.enter(path)

    @contextmanager
    def _writer(self, write: Callable[[memoryview], None] | None) -> Iterator[Writer]:
        request, name = self._request, self._names[-1] if self._names else "root"
        if name in {".", ".."}:  # followed in the guest; in an archive it would lead outside
            name = "root"
        make = TarWriter if request.form == "tar" else ZipWriter
        if request.output is None:
            assert write is not None
            with _Stream(write) as stream:
                yield make(stream, name, keep=request.keep)
        elif request.form == "tree":
            with os_errors(request.output), ExitStack() as stack:
                yield _Tree(stack.enter_context(NewTree(request.output)), keep=request.keep)
        else:
            output = request.output
            with directory_of(output) as directory:
                temporary = temporary_beside(output, purpose=NEW).name
                fd = directory.create(temporary)
                try:
                    with os.fdopen(fd, "wb") as file:
                        with _Stream(file.write) as stream:
                            yield make(stream, name, keep=request.keep)
                        file.flush()
                        os.fsync(fd)
                        directory.give_name(fd, temporary, output.name, replacing=None)
                except BaseException:
                    with suppress(OSError):
                        directory.remove(temporary)
                    raise


class _Refused(Exception):
    """One name cannot be had where the files go."""


class _Names:
    """The directories above the entry at hand, each with the names that were met in it.

    An archive with a link, and then a directory or a file under the same name, would be unpacked where the link leads.
    """

    def __init__(self) -> None:
        self._path: tuple[str, ...] = ()
        self._met: list[set[str]] = []
        self._refused: tuple[str, ...] | None = None

    def lies_in_directory(self, path: Sequence[str]) -> bool:
        """Whether its directory was written, not refused. Raises Corrupt where there is no such directory."""
        refused = self._refused
        if refused is not None and len(path) > len(refused) and tuple(path[: len(refused)]) == refused:
            return False
        if path and (len(path) > len(self._met) or self._path[: len(path) - 1] != tuple(path[:-1])):
            raise Corrupt("the reader of its file system tells of a file below what is no directory", subject=path[-1])
        return True

    def take(self, path: Sequence[str]) -> None:
        """Raises _Refused for a name that was met before."""
        if not path:
            return
        del self._met[len(path) :]
        self._path = self._path[: len(path) - 1]
        if path[-1] in self._met[-1]:
            raise _Refused("its directory has another file of this name")
        self._met[-1].add(path[-1])

    def refuse(self, path: Sequence[str]) -> None:
        """It is a directory, and was not written: what is below it follows at once."""
        self._refused = tuple(path)

    def enter(self, path: Sequence[str]) -> None:
        """It is a directory, and was written."""
        self._path = tuple(path)
        self._met.append(set())


@contextmanager
def _one_name(subject: object) -> Iterator[None]:
    """Raises _Refused for what concerns one name, else as os_errors."""
    with os_errors(subject):
        try:
            yield
        except UnicodeEncodeError:
            raise _Refused("its name is no text") from None
        except OSError as error:
            if error.errno in SKIPPED:
                raise _Refused(f"it cannot be made: {error.strerror}") from None
            raise


def _add(rows: list[Skipped], path: str, reason: str) -> None:
    if len(rows) < _MOST_SKIPPED:
        rows.append(Skipped(path, reason))


class _Counts:
    def __init__(self) -> None:
        self.files = self.directories = self.links = self.bytes = 0
        self.found = False

    def count(self, entry: Entry) -> None:
        self.found = True
        if entry.kind == "directory":
            self.directories += 1
        elif entry.kind == "symlink" or entry.same_as is not None:
            self.links += 1
        elif entry.kind == "file":
            self.files += 1
            self.bytes += entry.size


class _Stream:
    """A function that takes bytes, as a file that is written to. A context manager.

    After an error nothing is written: an archive that is cut short must not get the end that makes it look whole.
    """

    def __init__(self, write: Callable[[memoryview], object]) -> None:
        self._write: Callable[[memoryview], object] = write

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._write = len

    def write(self, data: bytes) -> int:
        view = memoryview(data)
        self._write(view)
        return len(view)

    def flush(self) -> None:
        """What it writes to has its own."""


class _Tree:
    """A Writer to a NewTree."""

    def __init__(self, tree: NewTree, *, keep: bool) -> None:
        self._tree, self._keep = tree, keep
        self.not_kept = tree.not_kept

    def directory(self, path: Sequence[str], entry: Entry) -> None:
        self._tree.make_directory(path, self._marks(entry))

    def file(self, path: Sequence[str], found: Found) -> None:
        file = self._tree.create(path)
        try:
            file.write(found.content)
            file.finish(self._marks(found.entry))
        finally:
            file.remove()

    def link(self, path: Sequence[str], first: Sequence[str], entry: Entry) -> None:
        _ = entry
        try:
            self._tree.make_link(path, first)
        except FileNotFoundError:
            raise _Refused("the file of which it is another name was skipped") from None

    def symlink(self, path: Sequence[str], target: str, entry: Entry) -> None:
        if not target or "\0" in target:
            raise _Refused("the link leads nowhere")
        self._tree.make_symlink(path, target, self._marks(entry))

    def finish(self) -> None:
        self._tree.finish()

    def _marks(self, entry: Entry) -> Marks:
        if not self._keep:
            return Marks()
        if entry.mode is not None and entry.mode & 0o6000:
            self.not_kept.add("set-id bits")
        attributes = {name: bytes.fromhex(value) for name, value in (entry.attributes or {}).items()}
        if any(not name.startswith("user.") for name in attributes):
            self.not_kept.add("attributes")
        return Marks(
            mode=entry.mode,
            owner=None if entry.uid is None or entry.gid is None else (entry.uid, entry.gid),
            times=None if entry.mtime is None else (entry.mtime if entry.atime is None else entry.atime, entry.mtime),
            attributes=attributes,
        )
