"""Keeps a local chain short: merges sealed layers that every destination is found to hold."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from snapchain.errors import Conflict
from snapchain.model.inventory import Wanted
from snapchain.ops import merge_image
from snapchain.ops.events import OnEvent
from snapchain.ops.merge_image import MergePlan, MergeReport
from snapchain.ops.nightly.config import Disks
from snapchain.ops.nightly.look import ImageFacts, look
from snapchain.ops.nightly.place import Place
from snapchain.ops.nightly.plan import MergeRange, to_merge
from snapchain.ops.nightly.state import DiskState
from snapchain.ops.ship import shipment


@dataclass(frozen=True, slots=True)
class Sealed:
    """The chain that is shipped: the file `path` and what is below. beyond: 1 when the image's top is above it."""

    path: Path
    format: str | None
    beyond: int


def present_at(
    place: Place, disk: str, sealed: Sealed, *, lineage: Sequence[Wanted], image_dirs: Sequence[Path]
) -> int:
    """How many files of the sealed chain, from the root on, the destination holds: told from its catalogue."""
    with (
        place.turn() as repository,
        shipment(sealed.path, repository, disk, lineage=lineage, format=sealed.format, image_dirs=image_dirs) as work,
    ):
        return work.plan().layers_present


def choose(facts: ImageFacts, settings: Disks, *, present: Sequence[int], beyond: int) -> MergeRange | str:
    """Which layers to merge, or why none. facts: of the sealed chain; present: what each destination holds of it."""
    assert settings.merge_above is not None
    held = {
        place
        for place, file in enumerate(facts.files)
        if any(fnmatch.fnmatch(file.path.name, pattern) for pattern in settings.hold)
    }
    count = len(facts.files) + beyond
    return to_merge(count=count, cap=settings.merge_above, present=present, held=held, gains=facts.gains)


def plan(image: Path, settings: Disks, facts: ImageFacts, chosen: MergeRange) -> MergePlan | str:
    """The merge of these layers, or why it is not worth it. Raises Conflict when the chain is another one by now."""
    first, last = facts.files[chosen.first], facts.files[chosen.last]
    planned = merge_image.plan(
        image,
        from_layer=str(first.real_path),
        to_layer=str(last.real_path),
        image_format=settings.format,
        image_dirs=(*settings.image_dirs, image.parent),
    )
    wanted = [file.real_path for file in facts.files[chosen.first : chosen.last + 1]]
    if [path.resolve() for path in planned.chain[planned.first : planned.last + 1]] != wanted:
        raise Conflict("its chain was changed meanwhile", subject=image, hint="the next run merges it")
    if planned.keep:
        return f"{planned.keep[0].path.name} would stay: {planned.keep[0].reason}"
    return planned


def run(
    planned: MergePlan, facts: ImageFacts, chosen: MergeRange, state: DiskState, sealed: Sealed, *, on_event: OnEvent
) -> tuple[MergeReport, DiskState, ImageFacts]:
    """Merge. Gives the report, the state that knows what the new file was made of, and the sealed chain as it is."""
    report = merge_image.run(planned, on_event=on_event)
    now = look(sealed.path, format=sealed.format, image_dirs=planned.image_dirs, on_event=on_event)
    made = now.files[chosen.first].source
    parts = [file.source for file in facts.files[chosen.first : chosen.last + 1]]
    return report, state.with_merge(made, parts, present=[file.source for file in now.files]), now
