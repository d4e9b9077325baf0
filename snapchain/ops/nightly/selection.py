"""Which images are disks, and what they are called.

A pattern matches layers as well.  The backing file of another image is no disk, unless it was one before; nor is a file
that was a layer when it was last seen, even if the image above it is gone.  A layer that no image uses any more, since
only its top was restored, is recognised by its note, or by its number beside a newer image.  What cannot be decided
stays in the list with its fault, so that it is reported and no other disk suffers.
"""

from __future__ import annotations

import glob
import os
import re
import stat
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from datetime import datetime
from fnmatch import fnmatch, fnmatchcase
from pathlib import Path

from snapchain.errors import Conflict, InvalidInput, NotFound, SnapchainError, Unsupported
from snapchain.host.path_resolution import place_to_change, real_path
from snapchain.image.references import children
from snapchain.ops.nightly.config import Disks, Nightly
from snapchain.ops.nightly.plan import order
from snapchain.ops.nightly.state import State
from snapchain.ops.nightly.values import disk_name
from snapchain.source.notes import Notes

_NUMBERED = re.compile(r"(.+)\.[0-9]+(\.[^.]+)")
"""A sealed file's name, as `snapshot` gives it: vda.3.qcow2 beside vda.qcow2."""


@dataclass(frozen=True, slots=True)
class SelectedDisk:
    """An image to work on. settings: what the configuration says of it; fault: why it cannot be worked on."""

    name: str
    image: Path
    settings: Disks
    fault: SnapchainError | None = None


@dataclass(frozen=True, slots=True)
class Selection:
    """disks: in the order of the configuration; layers: matched files that are none; leftovers: those of them that
    no image uses; faults: of patterns
    """

    disks: tuple[SelectedDisk, ...]
    layers: tuple[Path, ...]
    faults: tuple[SnapchainError, ...]
    leftovers: tuple[Path, ...] = ()


def select(config: Nightly, *, known: Collection[Path] = (), sealed: Collection[Path] = ()) -> Selection:
    """Look which images there are.

    known: images that earlier runs have worked on as disks; sealed: real paths of files that they have seen below them
    """
    named = {_name_of(each.path) for each in config.disks if each.path is not None}
    found: list[SelectedDisk] = []
    layers: list[Path] = []
    leftovers: list[Path] = []
    notes = Notes()
    faults: list[SnapchainError] = []
    taken: dict[str, str] = {}
    for settings in config.disks:
        images = (
            [settings.path] if settings.path is not None else list(_matches(settings, named | taken.keys(), faults))
        )
        if not images and settings.path is None:
            faults.append(
                NotFound("the pattern finds no image", subject=settings.glob, hint="is the directory mounted?")
            )
        under = _under_others(images, faults)
        for image in images:
            others, real = under.get(image), _name_of(image)
            if settings.glob is not None and image not in known:
                if others or Path(real) in sealed:
                    layers.append(image)
                    continue
                if _is_leftover(Path(real), notes):
                    layers.append(image)
                    leftovers.append(image)
                    continue
            if settings.glob is not None and real in taken:  # a link beside the image itself
                continue
            disk = _disk(image, settings, others)
            found.append(_twice(disk, taken[real]) if real in taken else disk)
            taken.setdefault(real, disk.name)
    counts = Counter(disk.name for disk in found)
    return Selection(
        disks=tuple(_ambiguous(disk) if counts[disk.name] > 1 else disk for disk in found),
        layers=tuple(layers),
        faults=tuple(faults),
        leftovers=tuple(leftovers),
    )


def _is_leftover(path: Path, notes: Notes) -> bool:
    """Whether a file that no image uses was sealed, and not written to since.

    path: a real path. Decided by the note of its sealing, while it has the name that it had then: a renamed file is in
    use again. Without a note, by the number that `snapshot` gives, beside an image under the plain name that was
    written later.
    """
    try:
        status = path.stat()
    except OSError:
        return False
    note = notes.of(path)
    if note.sealed is not None:
        mark = (note.sealed.file.size, note.sealed.file.mtime_ns)
        return note.name == path.name and mark == (status.st_size, status.st_mtime_ns)
    numbered = _NUMBERED.fullmatch(path.name)
    if numbered is None:
        return False
    try:
        top = path.with_name(numbered[1] + numbered[2]).stat()
    except OSError:
        return False
    return stat.S_ISREG(top.st_mode) and top.st_mtime_ns > status.st_mtime_ns


def _matches(settings: Disks, elsewhere: Collection[str], faults: list[SnapchainError]) -> Iterator[Path]:
    assert settings.glob is not None
    for match in sorted(glob.glob(settings.glob, recursive=True)):  # noqa: PTH207 -- the pattern is absolute
        if any(fnmatch(match, pattern) for pattern in settings.exclude) or _name_of(Path(match)) in elsewhere:
            continue
        if not match.isprintable():  # bytes that are no UTF-8, or a line feed: no report could name it
            shown = os.fsencode(match).decode("utf-8", "backslashreplace")
            shown = shown if shown.isprintable() else repr(shown)
            hint = "rename it, or leave it out by `exclude`"
            faults.append(Unsupported("its path is not printable text", subject=shown, hint=hint))
        elif _may_be_image(match):
            try:
                place_to_change(Path(match))  # not by a link of somebody else
            except SnapchainError as error:
                faults.append(error)
            else:
                yield Path(match)


def _name_of(path: Path) -> str:
    """The path without links, to compare images; unchanged if a link cannot be followed."""
    try:
        return str(real_path(path))
    except SnapchainError:
        return str(path)


def _may_be_image(path: str) -> bool:
    """Not a directory or a socket. A dangling link is an image that is gone: that is reported when it is its turn."""
    try:
        return stat.S_ISREG(os.stat(path).st_mode)  # noqa: PTH116
    except OSError:
        return True


def _under_others(images: Collection[Path], faults: list[SnapchainError]) -> dict[Path, list[Path]]:
    directories = {real_path(image).parent for image in images} | {image.parent for image in images}
    found: dict[Path, list[Path]] = {}
    for directory in sorted(directories):
        if not directory.is_dir():
            continue
        try:
            for image, others in children([directory], of=images).items():
                found.setdefault(image, []).extend(other for other in others if other not in found[image])
        except SnapchainError as error:  # a directory that cannot be listed: the images elsewhere are sound
            faults.append(error)
    return found


def _disk(image: Path, settings: Disks, others: list[Path] | None) -> SelectedDisk:
    try:
        name = disk_name(settings.name, image)
    except InvalidInput as error:
        return SelectedDisk(str(image), image, settings, error)
    fault = None
    if others and settings.snapshot:
        # With an overlay in its place, the guest's first write would change the other image's backing file.
        names = ", ".join(other.name for other in others[:3])
        fault = Conflict(
            f"{names} depends on it, so it cannot be snapshotted",
            subject=image,
            hint="name the upper image; or snapshot = false ships this one as it is",
        )
    return SelectedDisk(name, image, settings, fault)


def _twice(disk: SelectedDisk, other: str) -> SelectedDisk:
    message = f"this image is disk {other} already"
    return replace(disk, name=str(disk.image), fault=InvalidInput(message, subject=disk.image, hint="name it once"))


def _ambiguous(disk: SelectedDisk) -> SelectedDisk:
    message = f"more than one image is called {disk.name}"
    hint = 'tell them apart by their names: name = "{parent}/{stem}"'
    # Its own name would mix it up with the others in the state and the metrics.
    return replace(disk, name=str(disk.image), fault=InvalidInput(message, subject=disk.image, hint=hint))


# --- The disks of a run in the order of work, and what has become of those of earlier runs.
#
# A disk that was shipped once and is not selected any more would go unnoticed, were it not a fault: a directory may not
# be mounted, a pattern may be mistyped.  Only what `retired` names, and names that an image bore before, may be gone.


@dataclass(frozen=True, slots=True)
class DiskList:
    """disks: in the order of work; layers, leftovers: matched files that are none; gone: names that should be there

    former: names that nobody expects any more, and whose state is of no interest; faults: gone ones among them
    """

    disks: tuple[SelectedDisk, ...] = ()
    layers: tuple[Path, ...] = ()
    leftovers: tuple[Path, ...] = ()
    gone: tuple[str, ...] = ()
    former: frozenset[str] = frozenset()
    faults: tuple[SnapchainError, ...] = ()


def disk_list(config: Nightly, state: State, *, now: datetime | None = None) -> DiskList:
    """Look which images there are. now: by the clock of this run."""
    found = select(
        config,
        known={disk.image for disk in state.disks.values() if disk.destinations},
        sealed={path for disk in state.disks.values() for path in disk.layers},
    )
    turns = {name: turn for name, disk in state.disks.items() if (turn := disk.turn)}
    selected = {disk.image: disk.name for disk in found.disks}
    missed = {name: disk for name, disk in state.disks.items() if name not in selected.values()}
    former = {
        name
        for name, disk in missed.items()
        if disk.image in selected or any(fnmatchcase(name, pattern) for pattern in config.retired)
    }
    gone = tuple(name for name, disk in missed.items() if disk.destinations and name not in former)
    return DiskList(
        disks=tuple(order(found.disks, lambda disk: disk.name, turns, now=now)),
        layers=found.layers,
        leftovers=found.leftovers,
        gone=gone,
        former=frozenset(former),
        faults=(*found.faults, *([_gone(gone)] if gone else [])),
    )


def _gone(names: tuple[str, ...]) -> NotFound:
    return NotFound(
        "shipped by earlier runs, and no image is selected for it now",
        subject=", ".join(names),
        hint='is a directory not mounted? Disks that may be gone are named in the configuration: retired = ["..."]',
    )
