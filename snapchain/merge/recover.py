"""What a killed merge had come to, in words, and the rest of it: for the doctor."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from snapchain.merge.journal import MergeJournal
from snapchain.merge.run import run
from snapchain.merge.settle import Settled, settle, switched
from snapchain.merge.step import plan
from snapchain.model.events import OnEvent
from snapchain.model.merging import Strategy


def described(journal: MergeJournal) -> tuple[str, str]:
    """(what happened, what `recover` does)."""
    count = len(journal.remove)
    if switched(journal):
        return (
            f"a merge ({journal.stage}) whose result is in place; {count} merged files are still there",
            f"removes {', '.join(entry.path.name for entry in journal.remove) or 'nothing but the journal'}",
        )
    if journal.stage == "committing":
        return (
            f"a merge into {journal.lowest.name} that was killed; the chain reads as before, that file alone does not",
            "merges again, to the end",
        )
    return (
        f"a merge ({journal.stage}) that was killed before its result took its place; the image reads as before",
        "undoes it",
    )


def recover(
    journal: MergeJournal, *, image_dirs: Sequence[Path] = (), noted: bool = True, on_event: OnEvent
) -> Settled:
    """Finish the merge, or undo it. Errors as `settle` and `merge_image.run`.

    image_dirs: as of `settle`; noted: as of `merge_image.run`
    """
    if journal.stage != "committing" or switched(journal):
        return settle(journal, image_dirs=image_dirs)
    planned = plan(
        journal.replaced.path,
        from_layer=str(journal.lowest),
        strategy=Strategy.COMMIT,
        drop_bitmaps=True,
        image_format="qcow2",
        image_dirs=(*journal.search, *image_dirs),
        confirmed=journal.confirmed,
    )
    report = run(planned, noted=noted, on_event=on_event)
    return Settled(list(report.removed), report.kept, report.incomplete)
