"""hold and release: keep a layer or a point whatever a rule says, until its holds are released.

an image's layer   its file stays byte for byte: no merge takes it, neither to write to it nor to replace it
a point            retention never drops it

A hold bears a tag, so that several people or programs may each have their reason, and release only their own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict

from snapchain.errors import InvalidInput, NotFound, Unsupported
from snapchain.host.directory import place_to_change
from snapchain.model.events import OnEvent, ignore
from snapchain.model.holds import check_tag
from snapchain.source.lineage import held_by_another
from snapchain.source.notes import Hold, LayerNote, Notes

if TYPE_CHECKING:
    from snapchain.destination.reading import ReadableDestination
    from snapchain.destination.records import HoldRecord


class HoldReport(BaseModel):
    """What is held now. address: the file or the point; holds: all that it has."""

    model_config = ConfigDict(frozen=True)

    address: str
    holds: tuple[Hold, ...]


def hold_image(path: Path, tag: str, *, reason: str = "", dry_run: bool = False) -> HoldReport:
    """Hold a layer's file. If it has the tag already, only the reason changes.

    dry_run: change nothing, and tell which holds it would have.
    Raises NotFound, InvalidInput for a bad tag, Unsupported for what is no regular file.
    """
    check_tag(tag)
    file = _file(path)

    def held(note: LayerNote) -> LayerNote:
        before = next((each for each in note.holds if each.tag == tag), None)
        hold = Hold(tag=tag, since=before.since if before else datetime.now(UTC), reason=reason)
        return note.model_copy(update={"holds": (*(each for each in note.holds if each.tag != tag), hold)})

    return HoldReport(address=str(file), holds=_changed(file, held, dry_run=dry_run).holds)


def release_image(path: Path, tag: str, *, dry_run: bool = False) -> HoldReport:
    """Take a hold off a layer's file; dry_run: as `hold_image`. Raises NotFound when it has none of this tag.

    Raises Conflict for a hold in a note of another user.
    A file that is gone may have left its holds behind; they are released by its name.
    """
    file = _file(path, may_be_gone=True)
    held = {hold.tag: hold for hold in Notes().of(file).holds}
    if tag in held and held[tag].word_of is not None:
        raise held_by_another(held[tag], file)

    def released(note: LayerNote) -> LayerNote:
        left = tuple(each for each in note.holds if each.tag != tag)
        if len(left) == len(note.holds):
            tags = ", ".join(each.tag for each in note.holds)
            raise NotFound(
                f"it is not held under {tag!r}",
                subject=file,
                hint=f"its holds: {tags}" if tags else "it is not held at all",
            )
        return note.model_copy(update={"holds": left})

    return HoldReport(address=str(file), holds=_changed(file, released, dry_run=dry_run).holds)


def _changed(file: Path, change: Callable[[LayerNote], LayerNote], *, dry_run: bool) -> LayerNote:
    return Notes().changed(file, change) if dry_run else Notes().change(file, change)


def hold_point(
    destination: ReadableDestination,
    disk: str,
    tag: str,
    *,
    point: str | None,
    reason: str = "",
    dry_run: bool = False,
    on_event: OnEvent = ignore,
) -> HoldReport:
    """Keep a point whatever the rules say. point: the text after '@' of an address; dry_run: as `hold_image`.

    Raises NotFound, InvalidInput, Unsupported for a peer that is too old.
    """
    wanted = _named(destination, disk, point)
    number, holds = destination.hold(disk, wanted, tag, reason=reason, dry_run=dry_run, on_event=on_event)
    return _of_point(destination, disk, number, holds)


def release_point(
    destination: ReadableDestination,
    disk: str,
    tag: str,
    *,
    point: str | None,
    dry_run: bool = False,
    on_event: OnEvent = ignore,
) -> HoldReport:
    """Take a hold off a point; dry_run: as `hold_image`. Raises NotFound when it has none of this tag."""
    wanted = _named(destination, disk, point)
    number, holds = destination.release(disk, wanted, tag, dry_run=dry_run, on_event=on_event)
    return _of_point(destination, disk, number, holds)


def _named(destination: ReadableDestination, disk: str, point: str | None) -> str:
    """Raises InvalidInput where no point is named: the latest is another one tomorrow."""
    if point is None:
        address = f"{destination.url}::{disk}"
        raise InvalidInput(
            "a hold is on one point, and none is named", subject=address, hint=f"such as {address}@latest"
        )
    return point


def _of_point(destination: ReadableDestination, disk: str, number: int, holds: Sequence[HoldRecord]) -> HoldReport:
    shown = tuple(Hold(tag=each.tag, since=each.since, reason=each.reason) for each in holds)
    return HoldReport(address=f"{destination.url}::{disk}@{number}", holds=shown)


def _file(path: Path, *, may_be_gone: bool = False) -> Path:
    found = place_to_change(path, strict=not may_be_gone)
    if found.exists() and not found.is_file():
        raise Unsupported(
            "only a layer that is a regular file can be held", subject=path, hint="a device is never merged away"
        )
    return found
