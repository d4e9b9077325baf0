"""Which images are disks, and what they are called.

A pattern finds layers as well: a file on which another image stands is no disk, unless it was one before.  What cannot
be sorted out stays in the list with its fault, so that it is reported and no other disk suffers.
"""

from __future__ import annotations

import glob
import os
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path

from snapchain.errors import Conflict, InvalidInput, NotFound, SnapchainError
from snapchain.image.references import children
from snapchain.ops.nightly.config import Disks, Nightly
from snapchain.ops.nightly.naming import disk_name


@dataclass(frozen=True, slots=True)
class SelectedDisk:
    """An image to work on. settings: what the configuration says of it; fault: why it cannot be worked on."""

    name: str
    image: Path
    settings: Disks
    fault: SnapchainError | None = None


@dataclass(frozen=True, slots=True)
class Selection:
    """disks: in the order of the configuration; layers: matched files that others stand on; faults: of patterns."""

    disks: tuple[SelectedDisk, ...]
    layers: tuple[Path, ...]
    faults: tuple[SnapchainError, ...]


def select(config: Nightly, *, known: Collection[Path] = ()) -> Selection:
    """Look which images there are. known: images that earlier runs have worked on as disks."""
    named = {os.path.realpath(each.path) for each in config.disks if each.path is not None}
    found: list[SelectedDisk] = []
    layers: list[Path] = []
    faults: list[SnapchainError] = []
    taken: set[str] = set()
    for settings in config.disks:
        images = [settings.path] if settings.path is not None else list(_matches(settings, named | taken))
        if not images and settings.path is None:
            faults.append(
                NotFound("the pattern finds no image", subject=settings.glob, hint="is the directory mounted?")
            )
        under = _under_others(images)
        for image in images:
            taken.add(os.path.realpath(image))
            others = under.get(image)
            if others and settings.glob is not None and image not in known:
                layers.append(image)
                continue
            found.append(_disk(image, settings, others))
    counts = Counter(disk.name for disk in found)
    return Selection(
        disks=tuple(_ambiguous(disk) if counts[disk.name] > 1 else disk for disk in found),
        layers=tuple(layers),
        faults=tuple(faults),
    )


def _matches(settings: Disks, elsewhere: Collection[str]) -> Iterator[Path]:
    assert settings.glob is not None
    for match in sorted(glob.glob(settings.glob, recursive=True)):  # noqa: PTH207 -- the pattern is absolute
        excluded = any(fnmatch(match, pattern) for pattern in settings.exclude)
        if not excluded and Path(match).is_file() and os.path.realpath(match) not in elsewhere:
            yield Path(match)


def _under_others(images: Collection[Path]) -> dict[Path, list[Path]]:
    directories = {Path(os.path.realpath(image)).parent for image in images} | {image.parent for image in images}
    return children([each for each in sorted(directories) if each.is_dir()], of=images)


def _disk(image: Path, settings: Disks, others: list[Path] | None) -> SelectedDisk:
    try:
        name = disk_name(settings.name, image)
    except InvalidInput as error:
        return SelectedDisk(str(image), image, settings, error)
    fault = None
    if others and settings.snapshot:
        # An overlay in its place would change what the other image stands on with the guest's first write.
        names = ", ".join(other.name for other in others[:3])
        fault = Conflict(
            f"{names} stands on it, so it cannot be snapshotted",
            subject=image,
            hint="name the upper image; or snapshot = false ships this one as it is",
        )
    return SelectedDisk(name, image, settings, fault)


def _ambiguous(disk: SelectedDisk) -> SelectedDisk:
    message = f"more than one image is called {disk.name}"
    hint = 'tell them apart by their names: name = "{parent}/{stem}"'
    # Its own name would mix it up with the others in the state and the metrics.
    return replace(disk, name=str(disk.image), fault=InvalidInput(message, subject=disk.image, hint=hint))
