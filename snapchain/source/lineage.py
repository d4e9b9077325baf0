"""Which files a merged file was made of: by that a shipment recognises what a destination holds in parts.

    before   a  b  c       shipped: the destination knows a, b, c by their fingerprints
    merge    abc           its note records: made of a, b, c
    ship     abc  d        a, b, c are there: only d is read

That is right only for the very files that were merged: `record` takes files that were opened before the merge and were
not modified up to its end.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path

from snapchain.errors import Conflict, SnapchainError
from snapchain.host.files import open_file
from snapchain.host.os_errors import os_errors
from snapchain.host.terminal import shell_line
from snapchain.image import ImageChain, ImageFile
from snapchain.image.file import settle
from snapchain.model.events import Notice, OnEvent
from snapchain.model.fingerprint import Fingerprint
from snapchain.model.inventory import Wanted
from snapchain.source.notes import LET_THEM, MOST_PARTS, Hold, LayerNote, MergedFile, Notes, Sealed

_Key = tuple[int, int, int, int]
"""Of `Fingerprint.content_key`."""
_LATEST = 32_503_680_000.0
"""The year 3000, in seconds since 1970."""


def note_of(file: ImageFile, notes: Notes) -> LayerNote:
    """The note of an opened file, also when a merge has taken its name."""
    return notes.of(file.resolved, inode=file.device[1])


def lineage(chain: ImageChain, notes: Notes) -> tuple[Wanted, ...]:
    """The merged files of a chain, each with what it was made of, as its note records."""
    known = [each for file in chain.files for each in note_of(file, notes).merged]
    return wanted([file.fingerprint for file in chain.files], known)


def noted_lineage(chain: ImageChain, on_event: OnEvent) -> tuple[Wanted, ...]:
    """As `lineage`; a note that cannot be read costs no more than reading a file again."""
    notes = Notes()
    try:
        known = lineage(chain, notes)
        faults = notes.faults(file.resolved for file in chain.files)
    except SnapchainError as error:
        known, faults = (), [error]
    for fault in faults:
        on_event(Notice(str(fault), about=fault.subject or ""))
    return known


def wanted(present: Sequence[Fingerprint], known: Iterable[MergedFile]) -> tuple[Wanted, ...]:
    """The merged files among those of a chain, each with what it was made of, as deep as is known."""
    parts_of: dict[_Key, tuple[Fingerprint, ...]] = {}
    empty_of: dict[_Key, tuple[Fingerprint, ...]] = {}
    for each in known:
        made = each.made.content_key
        if _is_unchanged(each):
            empty_of[made] = tuple(part for part in each.of if part.content_key != made)
        else:
            parts_of[made] = each.of

    def built_up(source: Fingerprint) -> Wanted:
        # Not recursive: a file that a nightly merge has grown for years is nested as deep. A file is part of one
        # other at most, so each comes after the one that it is part of.
        order = {source.content_key: source}
        pending = [source]
        for each in pending:
            key = each.content_key
            parts = [part for part in (*parts_of.get(key, ()), *empty_of.get(key, ())) if part.content_key not in order]
            order.update((part.content_key, part) for part in parts)
            pending += parts
        built: dict[_Key, Wanted] = {}

        def made_of(parts: Iterable[Fingerprint]) -> tuple[Wanted, ...]:
            return tuple(built.get(part.content_key) or Wanted(part) for part in parts)

        for key, each in reversed(order.items()):
            built[key] = Wanted(each, made_of(parts_of.get(key, ())), made_of(empty_of.get(key, ())))
        return built[source.content_key]

    return tuple(
        built_up(source) for source in present if source.content_key in parts_of or source.content_key in empty_of
    )


def _is_unchanged(merged: MergedFile) -> bool:
    """Whether the result is one of the files it was made of: the others held nothing, so nothing was written to it."""
    return any(part.content_key == merged.made.content_key for part in merged.of)


def sealed_at(file: ImageFile, note: LayerNote) -> tuple[datetime, tuple[str, ...]]:
    """When a sealed file was sealed, and its labels: by its note if nobody wrote to it since, else by its mtime."""
    mark = file.fingerprint
    # The ctime does not count: the rename that sealed it has moved that, and a lost label may cost a view.
    if note.sealed is not None and (note.sealed.file.size, note.sealed.file.mtime_ns) == (mark.size, mark.mtime_ns):
        return note.sealed.time, note.sealed.labels
    return written_at(mark), ()


def written_at(mark: Fingerprint) -> datetime:
    """When a file was last written to."""
    # Some filesystems hold times beyond the calendar of datetime.
    return datetime.fromtimestamp(min(max(mark.mtime_ns / 1e9, 0.0), _LATEST), UTC)


def record(inputs: Sequence[ImageFile], result: Path, *, is_top: bool) -> None:
    """Note of a merge's result what it was made of, and when its view was sealed.

    inputs: lowest first, opened before the merge, and not modified since
    result: a real path, in its place; is_top: of its chain, so that its view is not sealed
    Raises what writing a small file raises.
    """
    notes = Notes()
    parts = [note_of(file, notes) for file in inputs]
    view = None if is_top else sealed_at(inputs[-1], parts[-1])
    _record(notes, parts, tuple(file.fingerprint for file in inputs), result, view=view)


def record_live(
    inputs: Sequence[Path],
    sources: Sequence[Fingerprint],
    result: Path,
    *,
    view: tuple[datetime, tuple[str, ...]] | None,
) -> None:
    """As `record`, for a result that is one of its inputs, which was written to since.

    inputs: real paths; sources: the inputs' fingerprints before that
    view: when the uppermost was sealed, and its labels; None for an active layer
    """
    notes = Notes()
    _record(notes, [notes.of(path) for path in inputs], tuple(sources), result, view=view)


def _record(
    notes: Notes,
    parts: Sequence[LayerNote],
    sources: tuple[Fingerprint, ...],
    result: Path,
    *,
    view: tuple[datetime, tuple[str, ...]] | None,
) -> None:
    made = _look(result)
    merged = merged_files(made, sources, [each for note in parts for each in note.merged])
    sealed = None if view is None else Sealed(time=view[0], labels=view[1], file=made)
    epoch = max(note.epoch for note in parts)
    notes.change(result, lambda note: note.model_copy(update={"merged": merged, "sealed": sealed, "epoch": epoch}))
    notes.sweep(result.parent)


def seal(path: Path, *, labels: Sequence[str], time: datetime) -> None:
    """Note of a file (a real path) that it is sealed from now on."""
    sealed = Sealed(time=time, labels=tuple(labels), file=_look(path))
    Notes().change(path, lambda note: note.model_copy(update={"sealed": sealed}))


def merged_files(
    made: Fingerprint, sources: Sequence[Fingerprint], known: Iterable[MergedFile]
) -> tuple[MergedFile, ...]:
    """What to note of a merge: how its result was made, then how its parts were, and theirs.

    known: as the notes of the inputs have it; what was written to since does not count
    """
    entries: dict[_Key, list[MergedFile]] = {}
    for each in known:
        entries.setdefault(each.made.content_key, []).append(each)
    found: list[MergedFile] = []
    pending = list(sources)
    for source in pending:
        for entry in entries.pop(source.content_key, ()):
            found.append(entry)
            pending += entry.of
    result = MergedFile(made=made, of=tuple(sources))
    if _is_unchanged(result):
        earlier = next((each for each in found if each.made.same_content_as(made) and _is_unchanged(each)), None)
        if earlier is not None:  # an idle guest, merged before
            added = [source for source in sources if not source.same_content_as(made)]
            found.remove(earlier)
            result = MergedFile(made=made, of=tuple([*earlier.of, *added][:MOST_PARTS]))
    return (result, *found)


def _look(path: Path) -> Fingerprint:
    fd = open_file(path)
    try:
        with os_errors(path):
            return settle(fd)
    finally:
        os.close(fd)


# --- Holds on the files of a chain: a file that is held stays as it is, whatever a rule says.


def held_layers(chain: ImageChain, notes: Notes) -> dict[int, tuple[Hold, ...]]:
    """The places of a chain, 0 for the root, whose files are held, with their holds."""
    found = ((place, note_of(file, notes).holds) for place, file in enumerate(chain.files))
    return {place: holds for place, holds in found if holds}


def check_range(chain: ImageChain, first: int, last: int, holds: dict[int, tuple[Hold, ...]]) -> None:
    """Raises Conflict when a merge of layers `first` to `last` would take a file that is held."""
    for place in range(first, last + 1):
        if place in holds:
            hold, path = holds[place][0], chain.files[place].path
            if hold.word_of is not None:
                raise held_by_another(hold, path)
            why = f" ({hold.reason})" if hold.reason else ""
            release = ("snapchain", "release", path, "--tag", hold.tag)
            raise Conflict(
                f"it is held under {hold.tag!r} since {hold.since:%Y-%m-%d}{why}, so it cannot be merged",
                subject=path,
                hint=f"{shell_line(release)}, or merge layers on one side of it (--from, --to)",
            )


def held_by_another(hold: Hold, path: Path) -> Conflict:
    """The error for a file that only another user's note holds."""
    assert hold.word_of is not None
    return Conflict(
        f"a note of user {hold.word_of.user} says that it is held, so it cannot be changed",
        subject=path,
        hint=f"if that is wrong, remove {hold.word_of.note}; else {LET_THEM}",
    )
