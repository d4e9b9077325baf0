"""Keeps a local chain short: of the layers that every destination is found to hold, what gains most within the budget.

What may be merged, and what that brings, is decided as for `merge IMAGE --max-layers --at`: a night is that
command for each disk, with what is left of the night's budget.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from snapchain.merge import plan as planning
from snapchain.merge.plan import MergePlan
from snapchain.merge.request import At, MergeRequest
from snapchain.ops.nightly.config import Disks

_REASONS = 4
"""So many layers are told with why they stay."""


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


def why_longer(planned: MergePlan, settings: Disks) -> str | None:
    """Why the chain will have more files than it should."""
    assert settings.merge_above is not None
    if planned.layers_after <= settings.merge_above:
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
