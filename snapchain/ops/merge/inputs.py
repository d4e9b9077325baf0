"""What may be merged, and what becomes of each input: which go, and which somebody else still needs."""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from snapchain.errors import Conflict, Unsupported
from snapchain.host.os_errors import os_errors
from snapchain.image import ImageChain, ImageFile
from snapchain.image.backing import is_layer_below_active
from snapchain.image.references import children, reason
from snapchain.ops.merge.journal import MergeJournal, leftover_ids
from snapchain.ops.notes import Notes
from snapchain.ops.ownership import check_not_given


class KeptFile(BaseModel):
    """An input that stays, and why."""

    model_config = ConfigDict(frozen=True)

    path: Path
    reason: str


def check(inputs: Sequence[ImageFile], journals: Sequence[MergeJournal], *, keep_inputs: bool) -> None:
    """Raises Unsupported for inputs that a merge would take something from that no copy of their data gives back."""
    for file in inputs:
        if file.header is not None and file.header.snapshots:
            raise Unsupported(
                f"it holds {file.header.snapshots} internal snapshots, which a merge would lose",
                subject=file.path,
                hint="`qemu-img snapshot -l` lists them, `-d` deletes one",
            )
        with os_errors(file.path):  # another merge may just have removed it
            status = file.real_path.stat()
        # A second name that a killed merge gave goes when that is settled.
        ours = sum(
            journal.replaced.path == file.real_path
            and journal.kept_as is not None
            and journal.replaced.still(journal.kept_as)
            for journal in journals
        )
        if stat.S_ISREG(status.st_mode) and status.st_nlink > 1 + ours and not keep_inputs:
            raise Unsupported(
                "it has further hard links, whose users would lose what they stand on",
                subject=file.path,
                hint="remove the other names (`find -samefile`), or say --keep-inputs",
            )
    upper = inputs[-1]
    if not upper.real_path.is_file():
        raise Unsupported("the merged image cannot take the place of a device", subject=upper.path)


def check_holds(chain: ImageChain, first: int, last: int) -> None:
    """Raises Conflict for an input that is held, and what reading the notes raises: one may be a hold."""
    notes = Notes()
    paths = [file.real_path for file in chain.files[first : last + 1]]
    for fault in notes.faults(paths):
        raise fault
    if any(notes.of(path).holds for path in paths):
        from snapchain.ops.hold import check_range, held_layers

        check_range(chain, first, last, held_layers(chain, notes))


def check_still_allowed(chain: ImageChain, first: int, last: int) -> None:
    """At the switch, which may come hours after the decision: a disk given away or a layer held since then stays.

    Raises Conflict, and what reading the notes raises.
    """
    check_not_given(chain)
    check_holds(chain, first, last)


def bitmaps(files: Sequence[ImageFile]) -> list[tuple[ImageFile, str]]:
    """The files that hold persistent bitmaps, each with their names."""
    return [
        (file, ", ".join(bitmap.name for bitmap in file.header.bitmaps))
        for file in files
        if file.header is not None and file.header.bitmaps
    ]


def search_directories(chain: ImageChain, image_dirs: Sequence[Path]) -> tuple[Path, ...]:
    """Where images are looked for that stand on a file of the chain."""
    own = [directory for file in chain.files for directory in (file.path.parent, file.real_path.parent)]
    return tuple(dict.fromkeys([*own, *image_dirs]))


def fate(
    chain: ImageChain, first: int, last: int, *, keep_inputs: bool, image_dirs: Sequence[Path]
) -> tuple[tuple[Path, ...], tuple[KeptFile, ...]]:
    """Which of the inputs below the uppermost go, uppermost first, and which stay."""
    lower = [file.real_path for file in chain.files[first:last]][::-1]
    if keep_inputs:
        return (), tuple(KeptFile(path=path, reason="asked for") for path in lower)
    besides = {file.device for file in chain.files} | leftover_ids(file.real_path.parent for file in chain.files)
    found = children(search_directories(chain, image_dirs), of=lower, besides=besides)
    remove: list[Path] = []
    keep: list[KeptFile] = []
    for path in lower:
        if path in found:
            keep.append(KeptFile(path=path, reason=reason(found[path])))
        elif keep:
            keep.append(KeptFile(path=path, reason=f"{keep[-1].path.name} stands on it"))
        elif is_layer_below_active(path, chain.top.real_path):
            keep.append(KeptFile(path=path, reason="it is a layer of a replica"))
        elif path.is_block_device():
            keep.append(KeptFile(path=path, reason="it is a device"))
        else:
            remove.append(path)
    return tuple(remove), tuple(keep)


def second_name(path: Path, journals: Sequence[MergeJournal]) -> Path:
    """A free name; one that a killed merge has taken is free again once that is undone."""
    free_again = {journal.kept_as for journal in journals if not journal.result.still(journal.replaced.path)}
    for number in range(1, 1_000_000):
        candidate = path.with_name(f"{path.stem}.unmerged-{number}{path.suffix}")
        if candidate in free_again or not os.path.lexists(candidate):
            return candidate
    raise Conflict("no name is left for the old file", subject=path)
