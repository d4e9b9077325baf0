"""The chain of one image: what it is, and which of its layers to merge.

A night is `merge IMAGE --max-layers --at` for each disk, with the rest of the night's budget: of the layers that every
destination holds, it merges what gains most.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from snapchain.image import ImageChain
from snapchain.image.file import Format
from snapchain.merge import plan as planning
from snapchain.merge.plan import MergePlan
from snapchain.merge.request import At, MergeRequest
from snapchain.model.chain import Chain, Layer
from snapchain.model.events import OnEvent, ignore
from snapchain.model.extents import Extents
from snapchain.model.fingerprint import Fingerprint
from snapchain.ops.nightly.config import Disks
from snapchain.source.at_rest import ImageAtRest

_REASONS = 4
"""Layers whose reason to stay is given."""


@dataclass(frozen=True, slots=True)
class Sealed:
    """The chain that is shipped: the file `path` and what is below. beyond: 1 when the image's top is above it."""

    path: Path
    format: str | None
    beyond: int


def plan(image: Path, settings: Disks, *, at: Sequence[At], budget: int | None) -> MergePlan:
    """What brings the chain down to `merge_above` files, or nearest to that within `budget` bytes to be moved."""
    return planning.plan(_request(image, settings, at=at, budget=budget))


def moved(planned: MergePlan) -> int:
    """Bytes of the merges that the filesystem does not share."""
    return sum(0 if each.shares_extents else each.bytes_to_move for each in planned.steps)


def why_longer(planned: MergePlan, merge_above: int) -> str | None:
    """Why the chain will have more files than it should."""
    if planned.layers_after <= merge_above:
        return None
    reasons = [f"{layer.path.name} ({', '.join(layer.stays)})" for layer in planned.layers[1:] if layer.stays]
    more = f" and {len(reasons) - _REASONS} more" if len(reasons) > _REASONS else ""
    stay = f": what stays is {'; '.join(reasons[:_REASONS])}{more}" if reasons else ""
    return f"{planned.layers_after} files are as few as can be{stay}"


def outlook(image: Path, settings: Disks, *, present: dict[str, int], more: int) -> list[tuple[Path, ...]]:
    """The files of each merge that a run would do.

    present: what the destinations will hold by then of the files that are there now; more: files that the chain will
    have by then beside these
    """
    assert settings.merge_above is not None
    request = _request(image, settings, at=(), budget=None)
    return planning.outlook(replace(request, max_layers=max(settings.merge_above - more, 1)), present=present)


def _request(image: Path, settings: Disks, *, at: Sequence[At], budget: int | None) -> MergeRequest:
    return MergeRequest(
        image=image,
        image_format=settings.format,
        image_dirs=(*settings.image_dirs, image.parent),
        max_layers=settings.merge_above,
        budget_bytes=budget,
        at=tuple(at),
    )


# The chain is read under QEMU's read locks, so a running guest raises Busy.


@dataclass(frozen=True, slots=True)
class FileFacts:
    """One file of a chain. source: the key by which destinations know it."""

    path: Path
    real_path: Path
    format: Format
    source: Fingerprint


@dataclass(frozen=True, slots=True, eq=False)
class ImageFacts:
    """A chain, root first.

    fresh: its top says nothing that is not below it; shadowed_bytes: data hidden by layers above
    epoch: in which this host writes the disk
    """

    files: tuple[FileFacts, ...]
    fresh: bool
    shadowed_bytes: int
    epoch: int


def look(
    image: Path, *, format: str | None = None, image_dirs: Sequence[Path] = (), on_event: OnEvent = ignore
) -> ImageFacts:
    """Raises what `scan` raises for an image that is broken or refused, Busy when somebody writes to it, and Conflict
    for a disk that was given to another host.
    """
    source = ImageAtRest(image, format=format, image_dirs=image_dirs, on_event=on_event)
    with source.opened() as chain:
        source.check_not_given(chain)
        layers = Chain(tuple(_layers(chain)))
        return ImageFacts(
            files=tuple(
                FileFacts(path=file.path, real_path=file.real_path, format=file.format, source=file.fingerprint)
                for file in chain.files
            ),
            fresh=_is_fresh(chain),
            shadowed_bytes=int(layers.shadowed().data.sum()),
            epoch=source.epoch(chain),
        )


def _is_fresh(chain: ImageChain) -> bool:
    below = chain.files[-2] if len(chain.files) > 1 else None
    return below is not None and chain.top.extents == Extents.absent(below.size)


def _layers(chain: ImageChain) -> list[Layer]:
    places = range(len(chain.files))
    return [
        Layer(str(place), file.extents, str(place - 1) if place else None)
        for place, file in zip(places, chain.files, strict=True)
    ]
