"""What merging a run of neighbouring files of a local chain would do, decided before anything is touched.

    root <- a <- b <- c <- top        merge from a to c        root <- c' <- top

The result takes the path of the uppermost input, so the link of the file above stays true, and one rename is the
switch.  The inputs below it go, unless another image stands on them.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict

from snapchain.errors import Conflict, InvalidInput, NotFound, Unsupported
from snapchain.host.files import free_bytes
from snapchain.image import ImageChain, ImageFile, scan
from snapchain.image.qemu_img import BackingLink, Format
from snapchain.image.references import children
from snapchain.model.extents import ABSENT, DATA, ZERO, Extents, fold, rounded
from snapchain.ops.merge_journal import MergeJournal, unsettled

_DEFAULT_CLUSTER = 64 << 10
_METADATA_SHARE = 128
"""An L2 entry is 1/8192 of its cluster at 64 KiB, and 1/64 at 512 bytes; tables come whole."""


class Strategy(Enum):
    """How the result is made; see `merge_image`."""

    NOTHING = "nothing"
    REBASE = "rebase"
    CONVERT = "convert"


class KeptFile(BaseModel):
    """An input that stays, and why."""

    model_config = ConfigDict(frozen=True)

    path: Path
    reason: str


class MergePlan(BaseModel):
    """What `merge_image.run` will do. Sizes in bytes.

    first, last: numbers of the lowest and uppermost input, the root is 0; result: the path that the merged file takes
    backing: the link that it records (None: it is the root); bytes_to_move: what the result will hold;
    needs_bytes: room that it takes while the inputs are still there; shadowed_bytes: overwritten data that goes
    kept_as: a second name for the uppermost input; unfinished: results of killed merges, which are settled first
    """

    model_config = ConfigDict(frozen=True)

    image: Path
    image_format: str | None
    image_dirs: tuple[Path, ...]
    strategy: Strategy
    chain: tuple[Path, ...]
    first: int
    last: int
    result: Path
    backing: BackingLink | None
    virtual_size: int
    cluster_size: int
    extended_l2: bool
    layers_before: int
    layers_after: int
    bytes_to_move: int
    needs_bytes: int
    free_bytes: int
    shadowed_bytes: int
    remove: tuple[Path, ...]
    keep: tuple[KeptFile, ...]
    kept_as: Path | None
    keep_inputs: bool
    drop_bitmaps: bool
    unfinished: tuple[Path, ...]


def plan(
    image: Path,
    *,
    flatten: bool = False,
    from_layer: str | None = None,
    to_layer: str | None = None,
    keep_inputs: bool = False,
    drop_bitmaps: bool = False,
    image_format: str | None = None,
    image_dirs: Sequence[Path] = (),
) -> MergePlan:
    """Look at the chain and decide; changes nothing.

    Everything above the root by default; flatten: the root too; from_layer, to_layer: file names or paths of the
    lowest and the uppermost input; keep_inputs: remove nothing; drop_bitmaps: persistent bitmaps of inputs may go.

    Raises Unsupported for inputs that would lose something (bitmaps, internal snapshots), NotFound for a layer that
    is not in the chain, InvalidInput for a range that is none; what `scan` raises for refused images.
    """
    if flatten and from_layer is not None:
        raise InvalidInput("--flatten begins at the root; it cannot be combined with --from")
    asked = Asked(image, flatten, from_layer, to_layer, keep_inputs, drop_bitmaps, image_format, tuple(image_dirs))
    with scan(image, format=image_format, image_dirs=image_dirs) as chain:
        return decide(chain, asked)


@dataclass(frozen=True, slots=True)
class Asked:
    """What the caller of `plan` said."""

    image: Path
    flatten: bool
    from_layer: str | None
    to_layer: str | None
    keep_inputs: bool
    drop_bitmaps: bool
    image_format: str | None
    image_dirs: tuple[Path, ...]


def decide(chain: ImageChain, asked: Asked) -> MergePlan:
    """The plan for an opened chain; errors as `plan`."""
    journals = unsettled(file.real_path for file in chain.files)
    first, last = _range(chain, asked, journals)
    inputs = chain.files[first : last + 1]
    upper = inputs[-1]
    strategy = Strategy.NOTHING
    moved = needs = shadowed = 0
    cluster = upper.cluster_size or _DEFAULT_CLUSTER
    kept_as = None
    if len(inputs) > 1:
        strategy = Strategy.REBASE if first else Strategy.CONVERT
        _check(inputs, asked, journals)
        moved, needs = _bytes(fold(file.extents for file in inputs), cluster)
        shadowed = sum(file.extents.data_bytes for file in inputs) - moved
        kept_as = _second_name(upper.real_path, journals) if asked.keep_inputs else None
    remove, keep = _fate(chain, first, last, asked, journals)
    return MergePlan(
        image=asked.image,
        image_format=asked.image_format,
        image_dirs=asked.image_dirs,
        strategy=strategy,
        chain=tuple(file.path for file in chain.files),
        first=first,
        last=last,
        result=upper.real_path,
        backing=_link(chain, first, upper),
        virtual_size=upper.size,
        cluster_size=cluster,
        extended_l2=bool(upper.header and upper.header.extended_l2),
        layers_before=len(chain.files),
        layers_after=len(chain.files) - (last - first),
        bytes_to_move=moved,
        needs_bytes=needs,
        free_bytes=free_bytes(upper.real_path.parent),
        shadowed_bytes=shadowed,
        remove=remove,
        keep=keep,
        kept_as=kept_as,
        keep_inputs=asked.keep_inputs,
        drop_bitmaps=asked.drop_bitmaps,
        unfinished=tuple(journal.replaced.path for journal in journals),
    )


def search_directories(chain: ImageChain, image_dirs: Sequence[Path]) -> tuple[Path, ...]:
    """Where images are looked for that stand on a file of the chain."""
    own = [directory for file in chain.files for directory in (file.path.parent, file.real_path.parent)]
    return tuple(dict.fromkeys([*own, *image_dirs]))


def _range(chain: ImageChain, asked: Asked, journals: Sequence[MergeJournal]) -> tuple[int, int]:
    top = len(chain.files) - 1
    last = top if asked.to_layer is None else _number(chain, asked.to_layer, journals)
    if asked.from_layer is not None:
        first = _number(chain, asked.from_layer, journals)
    else:
        first = 0 if asked.flatten else min(1, last)
    if first > last:
        raise InvalidInput(
            f"{asked.from_layer} lies above {asked.to_layer or 'the top'}",
            subject=chain.top.path,
            hint="swap --from and --to",
        )
    return first, last


def _number(chain: ImageChain, layer: str, journals: Sequence[MergeJournal]) -> int:
    """The file of the chain that the user means by a path, or by a bare name."""
    whole = Path(os.path.realpath(layer))
    bare = "/" not in layer
    found = [number for number, file in enumerate(chain.files) if file.real_path == whole]
    if not found and bare:
        found = [number for number, file in enumerate(chain.files) if layer in (file.path.name, file.real_path.name)]
    if len(found) > 1:
        raise InvalidInput("more than one layer has this name", subject=layer, hint="give its path")
    if found:
        return found[0]
    # The same command again, after one that was killed past its switch: the layer is part of that merge's result.
    for journal in journals:
        gone = [entry.path for entry in journal.remove if entry.path == whole or (bare and entry.path.name == layer)]
        if gone and journal.switched:
            return [file.real_path for file in chain.files].index(journal.replaced.path)
    names = ", ".join(file.path.name for file in chain.files)
    raise NotFound(f"no such layer in the chain of {chain.top.path}", subject=layer, hint=f"it holds: {names}")


def _check(inputs: Sequence[ImageFile], asked: Asked, journals: Sequence[MergeJournal]) -> None:
    for file in inputs:
        if file.header is not None and file.header.snapshots:
            raise Unsupported(
                f"it holds {file.header.snapshots} internal snapshots, which a merge would lose",
                subject=file.path,
                hint="`qemu-img snapshot -l` lists them, `-d` deletes one",
            )
        if file.header is not None and file.header.bitmaps and not asked.drop_bitmaps:
            names = ", ".join(bitmap.name for bitmap in file.header.bitmaps)
            raise Unsupported(
                f"it holds persistent bitmaps ({names}), which would be wrong after a merge",
                subject=file.path,
                hint="--drop-bitmaps merges without them; the next incremental backup must then read everything",
            )
        status = file.real_path.stat()
        # A second name that a killed merge gave goes when that is settled.
        ours = sum(
            journal.replaced.path == file.real_path
            and journal.kept_as is not None
            and journal.replaced.still(journal.kept_as)
            for journal in journals
        )
        if stat.S_ISREG(status.st_mode) and status.st_nlink > 1 + ours and not asked.keep_inputs:
            raise Unsupported(
                "it has further hard links, whose users would lose what they stand on",
                subject=file.path,
                hint="remove the other names (`find -samefile`), or say --keep-inputs",
            )
    upper = inputs[-1]
    if not upper.real_path.is_file():
        raise Unsupported("the merged image cannot take the place of a device", subject=upper.path)


def _bytes(merged: Extents, cluster: int) -> tuple[int, int]:
    """What the inputs hold together, and what a new file of it takes: whole clusters, and its tables."""
    data = merged.mapped(np.where(merged.val >= DATA, DATA, ABSENT))
    zero = merged.val == ZERO
    edges = int((merged.at[zero] % cluster > 0).sum() + (merged.ends[zero] % cluster > 0).sum())
    clusters = rounded(data, cluster).data_bytes + edges * cluster
    tables = -(-merged.size // cluster) * 8 if cluster < 4096 else clusters // _METADATA_SHARE
    return data.data_bytes, clusters + tables + 16 * cluster + (1 << 20)


def _fate(
    chain: ImageChain, first: int, last: int, asked: Asked, journals: Sequence[MergeJournal]
) -> tuple[tuple[Path, ...], tuple[KeptFile, ...]]:
    """Which of the inputs below the uppermost go, uppermost first, and which stay."""
    lower = [file.real_path for file in chain.files[first:last]][::-1]
    if asked.keep_inputs:
        return (), tuple(KeptFile(path=path, reason="asked for") for path in lower)
    besides = {file.device for file in chain.files}
    for journal in journals:
        with suppress(FileNotFoundError):
            status = journal.temporary.lstat()
            besides.add((status.st_dev, status.st_ino))
    found = children(search_directories(chain, asked.image_dirs), of=lower, besides=besides)
    remove: list[Path] = []
    keep: list[KeptFile] = []
    for path in lower:
        if path in found:
            names = ", ".join(entry.name for entry in found[path][:3])
            keep.append(KeptFile(path=path, reason=f"{names} stands on it"))
        elif keep:
            keep.append(KeptFile(path=path, reason=f"{keep[-1].path.name} stands on it"))
        elif path.is_block_device():
            keep.append(KeptFile(path=path, reason="it is a device"))
        else:
            remove.append(path)
    return tuple(remove), tuple(keep)


def _link(chain: ImageChain, first: int, upper: ImageFile) -> BackingLink | None:
    """The lowest input's backing link, for the place of the uppermost one."""
    if first == 0:
        return None
    lowest, below = chain.files[first], chain.files[first - 1]
    assert lowest.backing is not None
    below_format: Format = below.format
    name = lowest.backing.name
    if not name.startswith("/") and lowest.path.parent != upper.path.parent:
        name = os.path.relpath(below.real_path, upper.real_path.parent)
    return BackingLink(name, below_format)


def _second_name(path: Path, journals: Sequence[MergeJournal]) -> Path:
    """A free name; one that a killed merge has taken is free again once that is undone."""
    free_again = {journal.kept_as for journal in journals if not journal.switched}
    for number in range(1, 1_000_000):
        candidate = path.with_name(f"{path.stem}.unmerged-{number}{path.suffix}")
        if candidate in free_again or not os.path.lexists(candidate):
            return candidate
    raise Conflict("no name is left for the old file", subject=path)
