"""inspect: what each layer of a chain holds, and how much of it the layers above hide. Reads no guest data."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from snapchain.errors import Busy
from snapchain.host.locks import ImageLock, LockMode
from snapchain.image import ImageChain, ImageFile, scan
from snapchain.model.chain import Chain, Layer, LayerUse
from snapchain.model.events import OnEvent, ignore
from snapchain.model.extents import Extents
from snapchain.model.strip import strips
from snapchain.ops.points import find_point
from snapchain.repository.repository import Repository
from snapchain.source.lineage import note_of
from snapchain.source.notes import Hold, Notes
from snapchain.source.ownership import mark_of, told

STRIP_CELLS = 48


class LayerReport(BaseModel):
    """One layer, in guest bytes. shadowed_bytes: its DATA that layers above hide; strip: see model/strip.py.

    file_bytes: what the file occupies (None in a repository); snapshots, bitmaps: inside the file
    holds: why it is not merged away
    """

    model_config = ConfigDict(frozen=True)

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
    holds: tuple[Hold, ...] = ()
    strip: str


class InspectReport(BaseModel):
    """A chain, root first. content_id: of what the top shows, where a record tells it."""

    model_config = ConfigDict(frozen=True)

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
        notes = Notes()
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
                holds=note_of(file, notes).holds,
                strip=strip,
            )
            for file, use, strip in zip(chain.files, usage([file.extents for file in chain.files]), drawn, strict=True)
        )
        return InspectReport(
            address=str(path),
            virtual_size=chain.size,
            content_id=None,
            layers=layers,
            findings=(
                *_findings(chain),
                *_given(chain, notes),
                *map(str, notes.faults(file.resolved for file in chain.files)),
                *notes.ignored(file.resolved for file in chain.files),
            ),
        )


def _given(chain: ImageChain, notes: Notes) -> Iterator[str]:
    mark = mark_of(chain, notes)
    if mark is not None:
        yield told(mark)


def inspect_point(repository: Repository, disk: str, *, point: str | None = None) -> InspectReport:
    """The chain of a point as the repository holds it. Raises NotFound."""
    catalogue = repository.catalogue(disk)
    found = find_point(catalogue, point)
    chain = repository.chain_of(catalogue, found)
    maps = [layer.extents() for layer in chain]
    layers = tuple(
        LayerReport(
            path=layer.id,
            format=layer.header.image_format,
            virtual_size=layer.size,
            cluster_size=layer.header.cluster_size,
            file_bytes=None,
            data_bytes=use.data_bytes,
            zero_bytes=use.zero_bytes,
            shadowed_bytes=use.shadowed_bytes,
            shadowed_zero_bytes=use.shadowed_zero_bytes,
            snapshots=0,
            bitmaps=(),
            strip=strip,
        )
        for layer, use, strip in zip(chain, usage(maps), strips(maps, STRIP_CELLS), strict=True)
    )
    return InspectReport(
        address=f"{repository.store.url}::{disk}@{found.point}",
        virtual_size=found.size,
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
        yield f"{file.path} holds {file.header.snapshots} internal snapshots, which are not shipped"
    if file.header.bitmaps:
        yield f"{file.path} holds dirty bitmaps: {', '.join(bitmap.name for bitmap in file.header.bitmaps)}"
    if file.header.version == 2:
        yield f"{file.path} is qcow2 version 2 (compat=0.10): a discard in it brings old data back"
