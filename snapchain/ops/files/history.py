"""find: which points hold a file of this name, and when it changed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime

from snapchain.errors import NotFound
from snapchain.files.session import Unreadable
from snapchain.model.events import OnEvent, ignore
from snapchain.ops.files.opening import DEFAULT, Held, Limits, Skipped, file_system, names_of, skipped_of, time_of
from snapchain.ops.files.source import Moment, Source

_ALL = 1 << 20
_ZEROES = bytes(1 << 20)


@dataclass(frozen=True, slots=True)
class Version:
    """A file in one point. change: how it differs from the point before: new, changed, same, gone; first of all: new

    sha256: of its bytes, None where it is no file, was not asked for, or cannot be read
    """

    point: int | None
    time: datetime | None
    change: str
    kind: str | None
    size: int | None
    modified: datetime | None
    sha256: str | None


@dataclass(frozen=True, slots=True)
class FileHistory:
    """A file through the points that were looked at, ascending, from the first that has it."""

    path: str
    versions: tuple[Version, ...]


@dataclass(frozen=True, slots=True)
class FindReport:
    """points: how many were looked at; skipped: what could not be read, with the point in front of its path"""

    source: str
    name: str
    points: int
    files: tuple[FileHistory, ...]
    skipped: tuple[Skipped, ...]


_Seen = tuple[str, int, int | None, str | None]
"""kind, size, mtime in ns, sha256"""


def find(
    source: Source,
    name: str,
    *,
    volume: str | None = None,
    hashes: bool = True,
    limits: Limits = DEFAULT,
    on_event: OnEvent = ignore,
) -> FindReport:
    """Look for a file in all moments of a source. name: a path if it has a slash, else a pattern of names

    Raises what keeps a point from being read.
    """
    moments = source.moments()
    seen: dict[str, dict[int, _Seen]] = {}
    skipped: list[Skipped] = []
    held = Held(source.name)
    for number, moment in enumerate(moments):
        for path, what in _look(source, moment, name, volume, hashes, limits, on_event, skipped):
            held.add((path,))
            seen.setdefault(path, {})[number] = what
    files = tuple(FileHistory(path, _versions(moments, seen[path])) for path in sorted(seen))
    return FindReport(source.name, name, len(moments), files, tuple(skipped))


def _look(
    source: Source,
    moment: Moment,
    name: str,
    volume: str | None,
    hashes: bool,  # noqa: FBT001 - passed on
    limits: Limits,
    on_event: OnEvent,
    skipped: list[Skipped],
) -> Iterator[tuple[str, _Seen]]:
    is_path = "/" in name
    above = names_of(name) if is_path else []
    with file_system(source, moment, volume, limits=limits, on_event=on_event) as opened:
        try:
            with opened.session.walk(
                above, depth=0 if is_path else _ALL, contents=hashes, match=None if is_path else name
            ) as entries:
                for found in entries:
                    path = "/" + "/".join([*above, *found.entry.path])
                    digest = None
                    if hashes and found.entry.kind == "file":
                        try:
                            digest = _hash(found.content)
                        except Unreadable as error:
                            skipped.append(Skipped(f"{moment.name}{path}", error.message))
                    yield path, (found.entry.kind, found.entry.size, found.entry.mtime, digest)
        except NotFound:
            return
        skipped += [Skipped(f"{moment.name}{each.path}", each.reason) for each in skipped_of(opened.session, above)]


def _hash(content: Iterator[bytes | int]) -> str:
    digest = hashlib.sha256()
    for piece in content:
        if isinstance(piece, bytes):
            digest.update(piece)
        else:
            for at in range(0, piece, len(_ZEROES)):
                digest.update(_ZEROES[: piece - at])
    return digest.hexdigest()


def _versions(moments: Sequence[Moment], seen: dict[int, _Seen]) -> tuple[Version, ...]:
    rows = []
    before: _Seen | None = None
    for number in range(min(seen), len(moments)):
        moment, now = moments[number], seen.get(number)
        if now is None:
            if before is not None:
                rows.append(Version(moment.point, moment.time, "gone", None, None, None, None))
        else:
            change = "new" if before is None else "same" if before == now else "changed"
            kind, size, mtime, digest = now
            rows.append(Version(moment.point, moment.time, change, kind, size, time_of(mtime), digest))
        before = now
    return tuple(rows)
