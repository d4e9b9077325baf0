"""inspect: what each layer of a chain holds, and how much of it the layers above hide. Reads no guest data."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from snapchain.errors import Busy
from snapchain.host.locks import ImageLock, LockMode
from snapchain.host.terminal import counted
from snapchain.image import ImageChain, ImageFile, scan
from snapchain.model.chain import Chain, Layer, LayerUse
from snapchain.model.events import OnEvent, ignore
from snapchain.model.extents import ABSENT, DATA, ZERO, Extents, fold, pairwise
from snapchain.source import NOTE_PREFIX

if TYPE_CHECKING:
    from snapchain.destination.reading import ReadableDestination
    from snapchain.source.notes import Hold

STRIP_CELLS = 48


@dataclass(frozen=True, slots=True)
class LayerReport:
    """One layer, in guest bytes. shadowed_bytes: its DATA that layers above hide; strip: see ops/inspect.py.

    file_bytes: what the file occupies (None at a destination); snapshots, bitmaps: inside the file
    holds: why it is not merged away
    """

    path: str
    format: str
    virtual_size: int
    cluster_size: int
    file_bytes: int | None
    data_bytes: int
    zero_bytes: int
    shadowed_bytes: int
    shadowed_zero_bytes: int
    snapshots: int
    bitmaps: tuple[str, ...]
    holds: tuple[Hold, ...]
    strip: str


@dataclass(frozen=True, slots=True)
class InspectReport:
    """A chain, root first. content_id: of what the top shows, where a record tells it."""

    address: str
    virtual_size: int
    content_id: str | None
    layers: tuple[LayerReport, ...]
    findings: tuple[str, ...]


def inspect_image(
    path: Path,
    *,
    format: str | None = None,
    image_dirs: Sequence[Path] = (),
    on_event: OnEvent = ignore,
) -> InspectReport:
    """A chain of files. Works while a guest runs, as far as the files are whole; raises what `scan` raises."""
    _ = on_event
    with scan(path, format=format, image_dirs=image_dirs) as chain:
        holds, sentences = _noted(chain)
        drawn = strips([file.extents for file in chain.files], STRIP_CELLS)
        layers = tuple(
            LayerReport(
                path=str(file.path),
                format=file.format,
                virtual_size=file.size,
                cluster_size=file.cluster_size,
                file_bytes=file.path.stat().st_blocks * 512,
                data_bytes=use.data_bytes,
                zero_bytes=use.zero_bytes,
                shadowed_bytes=use.shadowed_bytes,
                shadowed_zero_bytes=use.shadowed_zero_bytes,
                snapshots=file.header.snapshots if file.header else 0,
                bitmaps=tuple(bitmap.name for bitmap in file.header.bitmaps) if file.header else (),
                holds=held,
                strip=strip,
            )
            for file, use, held, strip in zip(
                chain.files, usage([file.extents for file in chain.files]), holds, drawn, strict=True
            )
        )
        return InspectReport(
            address=str(path),
            virtual_size=chain.size,
            content_id=None,
            layers=layers,
            findings=(*_findings(chain), *sentences),
        )


def _noted(chain: ImageChain) -> tuple[Sequence[tuple[Hold, ...]], Sequence[str]]:
    """The holds of each file, root first, and what the notes beside the files say of the chain.

    What reads notes takes as long to load as all else here, so it is loaded only where there is a note.
    """
    if not any(map(_may_have_notes, {file.resolved.real.parent for file in chain.files})):
        return [()] * len(chain.files), ()
    from snapchain.source.lineage import note_of
    from snapchain.source.notes import Notes
    from snapchain.source.ownership import describe_gift, mark_of

    notes = Notes()
    mark = mark_of(chain, notes)
    files = [file.resolved for file in chain.files]
    sentences = [] if mark is None else [describe_gift(mark)]
    sentences += [*map(str, notes.faults(files)), *notes.ignored(files)]
    return [note_of(file, notes).holds for file in chain.files], sentences


def _may_have_notes(directory: Path) -> bool:
    try:
        return any(name.startswith(NOTE_PREFIX) for name in os.listdir(directory))  # noqa: PTH208 - names alone
    except OSError:
        return True  # reading the notes tells what is wrong with the directory


def inspect_point(destination: ReadableDestination, disk: str, *, point: str | None = None) -> InspectReport:
    """The chain of a point as a destination has it. Reads no data. Raises NotFound."""
    with destination.reader(disk, point, chain=True, clusters=False, maps_only=True) as reader:
        found = reader.point
        chain = [(layer.name, layer.format, layer.cluster_size, layer.extents) for layer in reader.layers()]
    maps = [extents for *_, extents in chain]
    layers = tuple(
        LayerReport(
            path=name,
            format=kind,
            virtual_size=extents.size,
            cluster_size=cluster_size,
            file_bytes=None,
            data_bytes=use.data_bytes,
            zero_bytes=use.zero_bytes,
            shadowed_bytes=use.shadowed_bytes,
            shadowed_zero_bytes=use.shadowed_zero_bytes,
            snapshots=0,
            bitmaps=(),
            holds=(),
            strip=strip,
        )
        for (name, kind, cluster_size, extents), use, strip in zip(
            chain, usage(maps), strips(maps, STRIP_CELLS), strict=True
        )
    )
    return InspectReport(
        address=f"{destination.url}::{disk}@{found.point}",
        virtual_size=found.virtual_size,
        content_id=found.content_id,
        layers=layers,
        findings=(),
    )


def usage(maps: Sequence[Extents]) -> Sequence[LayerUse]:
    """What each layer of a chain holds, and how much of it the layers above hide. maps: root first."""
    ids = [str(number) for number in range(len(maps))]
    parents = [None, *ids]
    layers = [Layer(name, extents, parent) for name, extents, parent in zip(ids, maps, parents, strict=False)]
    return Chain(layers).usage()


def _findings(chain: ImageChain) -> Iterator[str]:
    """What is no error and may surprise."""
    try:
        ImageLock(chain.top.path, LockMode.READ).release()
    except Busy as busy:
        yield f"{busy}: the numbers are those of this moment"
    for lower, upper in zip(chain.files, chain.files[1:], strict=False):
        if lower.size < upper.size:
            yield f"{lower.path} is shorter than {upper.path.name}: past its end nothing below it shows"
        if lower.size > upper.size:
            yield f"{lower.path} is longer than {upper.path.name}: its end is hidden"
    for file in chain.files:
        yield from _file_findings(file)


def _file_findings(file: ImageFile) -> Iterator[str]:
    if file.header is None:
        return
    if file.header.snapshots:
        yield f"{file.path} holds {counted(file.header.snapshots, 'internal snapshot')}, not shipped with it"
    if file.header.bitmaps:
        yield f"{file.path} holds dirty bitmaps: {', '.join(bitmap.name for bitmap in file.header.bitmaps)}"
    if file.header.version == 2:
        yield f"{file.path} is qcow2 version 2 (compat=0.10): a discard in it brings old data back"


# --- A layer as a strip of characters, one for each equal share of the disk: the chain drawn to scale.
#
#     .  ABSENT: nothing here, the layer below answers
#     0  ZERO
#     #  DATA that a reader of the whole chain sees
#     +  DATA that a layer above hides
#
# A cell shows what fills most of it, but anything beats an absence: a lone cluster on a terabyte is seen.

Float64s = npt.NDArray[np.float64]


def shares(extents: Extents, chosen: npt.NDArray[np.bool_], cells: int) -> Float64s:
    """float64[cells], 0 to 1: how much of each of `cells` equal parts of the map the chosen runs fill.

    chosen: bool, one for each run.
    """
    edges = np.arange(cells + 1, dtype=np.int64) * extents.size // cells
    before = np.concatenate([[0], np.cumsum(np.where(chosen, extents.lengths, 0))])
    run = np.clip(np.searchsorted(extents.at, edges, side="right") - 1, 0, len(extents) - 1)
    filled = before[run] + np.where(chosen[run], edges - extents.at[run], 0)
    return np.diff(filled) / np.maximum(np.diff(edges), 1)


def strips(layers: Sequence[Extents], cells: int) -> list[str]:
    """One strip for each layer, root first, each `cells` long and drawn to the largest layer's size."""
    size = max((layer.size for layer in layers), default=0)
    if size == 0:
        return ["." * cells for _ in layers]
    view = fold(layer.owned_by(place) for place, layer in enumerate(layers)).resized(size, ABSENT)
    return [_strip(layer.resized(size, ABSENT), view, place, cells) for place, layer in enumerate(layers)]


def _strip(layer: Extents, view: Extents, place: int, cells: int) -> str:
    at, own, seen = pairwise(layer, view)
    cut = Extents(layer.size, at, own)
    filled = np.stack(
        [
            shares(cut, (own >= DATA) & (seen == place), cells),
            shares(cut, (own >= DATA) & (seen != place), cells),
            shares(cut, own == ZERO, cells),
        ]
    )
    letters = np.array(list("#+0"))[filled.argmax(axis=0)]
    return "".join(np.where(filled.max(axis=0) > 0, letters, "."))
