"""Holds on the files of a chain: a file that is held stays as it is, whatever a rule says."""

from __future__ import annotations

from pathlib import Path

from snapchain.errors import Conflict
from snapchain.host.terminal import shell_line
from snapchain.image import ImageChain
from snapchain.source.lineage import note_of
from snapchain.source.notes import LET_THEM, Hold, Notes


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
