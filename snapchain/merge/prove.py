"""No merge is believed: the result must read as its inputs did, stand where it should, and have sound counts."""

from __future__ import annotations

from pathlib import Path

from snapchain.errors import Conflict, Corrupt
from snapchain.image import ImageChain
from snapchain.image.difference import doubts, first_difference
from snapchain.model.events import OnEvent, Progress


def prove(old: ImageChain, new: ImageChain, *, shared: int, subject: Path, on_event: OnEvent) -> None:
    """Compare every guest byte that could differ, and the size.

    old: what was; new: the result, as it was read again; shared: how many of the lowest files are the same in both.
    Raises Corrupt with the range that differs.
    """
    if old.size != new.size:
        raise Corrupt(f"the merged file has {new.size} bytes, not {old.size}", subject=subject)
    found = doubts(old, new, shared=shared)
    total, done = found.bytes, 0

    def on_bytes(count: int) -> None:
        nonlocal done
        done += count
        on_event(Progress("verify", done, total))

    on_event(Progress("verify", 0, total))
    differs = first_difference(old, new, found, on_bytes=on_bytes)
    if differs is not None:
        raise Corrupt(f"the merged file reads differently in bytes {differs.start} to {differs.stop}", subject=subject)


def check_unchanged(old: ImageChain, *, but: int | None = None) -> None:
    """Raises Conflict where somebody has written to a file since it was scanned, whatever locks say.

    but: number of the file that we write to ourselves
    """
    changed = [file for number, file in enumerate(old.files) if number != but and file.changed()]
    if changed:
        outcome = "nothing was changed" if but is None else "the chain reads as before"
        raise Conflict(
            f"the image was modified while it was being merged; {outcome}",
            subject=changed[0].path,
            hint="stop the program that writes to it, then run the command again",
        )
