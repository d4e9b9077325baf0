"""Opening the file system that a user means: which volume of the disk it is, and in which state."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime

from snapchain.errors import InvalidInput, NotFound, Unsupported
from snapchain.files.records import Entry, VolumeSaid
from snapchain.files.session import PATIENCE, Session
from snapchain.files.volumes import READABLE, Content
from snapchain.model.events import Notice, OnEvent, ignore
from snapchain.ops.files.source import Moment, Source

_LEAST = 1 << 30
_SIZES = 4
MOST_HELD = 4 << 30
"""Bytes of memory, about, for what is listed."""
_ROW = 600
_NOT_HERE = "serve the point (`snapchain serve`), and mount it in a guest of your own"


@dataclass(frozen=True, slots=True)
class Opened:
    """A file system that is open. volume: its name"""

    session: Session
    volume: VolumeSaid


@dataclass(frozen=True, slots=True)
class Limits:
    """most_bytes: that files may have together, None for four times the disk's size; patience: seconds"""

    most_bytes: int | None = None
    patience: float = PATIENCE


DEFAULT = Limits()


class Held:
    """What a command keeps in memory of the files that it was told of. A guest can have any number of long paths."""

    def __init__(self, subject: str) -> None:
        self._subject, self._bytes = subject, 0

    def add(self, path: Sequence[str]) -> None:
        """Raises InvalidInput where it becomes too much."""
        self._bytes += _ROW + sum(map(len, path)) + len(path)
        if self._bytes > MOST_HELD:
            raise InvalidInput(
                f"a list of so many files takes more than {MOST_HELD >> 20} MiB of memory",
                subject=self._subject,
                hint="name a directory further down, or a narrower pattern",
            )


@contextmanager
def reader_of(source: Source, moment: Moment, limits: Limits = DEFAULT) -> Iterator[Session]:
    """The child that reads a moment's disk. Raises what keeps it from being opened."""
    with source.opened(moment) as disk:
        most = limits.most_bytes if limits.most_bytes is not None else max(_LEAST, _SIZES * disk.size)
        with Session(disk, subject=moment.name, most_bytes=most, patience=limits.patience) as session:
            yield session


@contextmanager
def file_system(
    source: Source, moment: Moment, volume: str | None, *, limits: Limits = DEFAULT, on_event: OnEvent = ignore
) -> Iterator[Opened]:
    """The file system of a volume; of the only one that has any, where none is named. Raises as `chosen`."""
    with reader_of(source, moment, limits) as session:
        found = chosen(session.volumes(), volume, subject=moment.name)
        opened = session.open(found.name)
        if opened.dirty or (found.content is Content.XFS and not moment.is_clean):
            on_event(Notice(_journal(moment, certain=opened.dirty)))
        yield Opened(session, found)


def _journal(moment: Moment, *, certain: bool) -> str:
    state = "has" if certain else "may have"
    return (
        f"{moment.name}: the file system {state} changes in its journal, which snapchain does not replay: files that "
        "changed in the last seconds before the point may be missing, or old. A guest that mounts it sees them."
    )


def chosen(volumes: Sequence[VolumeSaid], name: str | None, *, subject: str) -> VolumeSaid:
    """The volume of that name, or the only one with a file system that can be read.

    Raises NotFound, InvalidInput where several could be meant, Unsupported for what cannot be read.
    """
    usable = [each for each in volumes if each.content in READABLE and each.trouble is None]
    if name is not None:
        named = next((each for each in volumes if each.name == name), None)
        if named is None:
            raise NotFound(f"the disk has no volume {name!a}", subject=subject, hint=f"it has {_names(volumes)}")
        if named not in usable:
            raise Unsupported(f"volume {name}: {named.trouble}", subject=subject, hint=_NOT_HERE)
        return named
    if len(usable) > 1:
        raise InvalidInput(
            "several volumes have a file system", subject=subject, hint=f"say --volume, and one of {_names(usable)}"
        )
    if not usable:
        reasons = "; ".join(f"{each.name}: {each.trouble}" for each in volumes)
        raise Unsupported(f"no volume has files that can be read: {reasons}", subject=subject, hint=_NOT_HERE)
    return usable[0]


def _names(volumes: Sequence[VolumeSaid]) -> str:
    return ", ".join(each.name for each in volumes) or "none"


def names_of(path: str) -> list[str]:
    """The names of a path in a guest; it begins at the root, with or without a slash."""
    return [each for each in path.split("/") if each]


def time_of(nanoseconds: int | None) -> datetime | None:
    """In UTC; None where it is not recorded, or beyond the calendar."""
    if nanoseconds is None:
        return None
    try:
        seconds, rest = divmod(nanoseconds, 1_000_000_000)
        return datetime.fromtimestamp(seconds, UTC).replace(microsecond=rest // 1000)
    except (ValueError, OverflowError, OSError):
        return None


@dataclass(frozen=True, slots=True)
class FileRow:
    """A file of a guest. path: from the root of its file system; mode: its permissions; target: where a link leads

    mode, uid, gid: None where its file system has none
    """

    path: str
    kind: str
    size: int
    mode: int | None
    uid: int | None
    gid: int | None
    links: int
    modified: datetime | None
    target: str | None

    @classmethod
    def of(cls, entry: Entry, above: Sequence[str]) -> FileRow:
        """above: the names from which the entry's path begins"""
        return cls(
            path="/" + "/".join([*above, *entry.path]),
            kind=entry.kind,
            size=entry.size,
            mode=entry.mode,
            uid=entry.uid,
            gid=entry.gid,
            links=entry.links,
            modified=time_of(entry.mtime),
            target=entry.target,
        )


@dataclass(frozen=True, slots=True)
class Skipped:
    """What was left out, and why. path: from the root of the file system"""

    path: str
    reason: str


def skipped_of(session: Session, above: Sequence[str]) -> tuple[Skipped, ...]:
    """What the session could not read."""
    rows = [Skipped("/" + "/".join([*above, *each.path]), each.words) for each in session.problems]
    if session.dropped_problems:
        rows.append(Skipped("", f"and {session.dropped_problems} more"))
    return tuple(rows)
