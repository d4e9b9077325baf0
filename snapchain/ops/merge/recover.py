"""What a killed merge had come to, in words, and the rest of it: for the doctor."""

from __future__ import annotations

from pathlib import Path

from snapchain.ops.events import OnEvent
from snapchain.ops.merge.journal import MergeJournal
from snapchain.ops.merge.settle import settle, switched


def described(journal: MergeJournal) -> tuple[str, str]:
    """(what happened, what `recover` does)."""
    count = len(journal.remove)
    if switched(journal):
        return (
            f"a merge ({journal.stage}) whose result is in place; {count} merged files are still there",
            f"removes {', '.join(entry.path.name for entry in journal.remove) or 'nothing but the journal'}",
        )
    return (
        f"a merge ({journal.stage}) that was killed before its result took its place; the image reads as before",
        "undoes it",
    )


def recover(journal: MergeJournal, *, on_event: OnEvent) -> list[Path]:
    """Finish the merge, or undo it; the inputs that were removed now. Errors as `settle` and `merge_image.run`."""
    del on_event
    return settle(journal)
