"""Reading a point of a repository: as one layer that shows all of it, or as the layers that it is made of."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from typing import Literal

import numpy as np

from snapchain.destination.reading import Part, ReadingCost, Sink, StoredBlob
from snapchain.destination.records import HoldRecord, PointRecord
from snapchain.errors import Corrupt
from snapchain.host.shared_cache import SharedCache
from snapchain.image.qcow2.aligned import aligned
from snapchain.model.content import Hashes
from snapchain.model.events import Notice, OnEvent, ignore
from snapchain.model.extents import Extents, Int64s, covering, over
from snapchain.model.first_reads import FirstReads
from snapchain.repository.catalogue import Point, find_point
from snapchain.repository.chain import ChainView
from snapchain.repository.filling import Filling
from snapchain.repository.first_reads import StoredFirstReads
from snapchain.repository.layers import StoredLayer, leaves_shown
from snapchain.repository.lost_maps import LostMap, tolerant
from snapchain.repository.replay import Replay
from snapchain.repository.repository import Repository


@dataclass(frozen=True, slots=True)
class RepositoryLayer:
    """A LayerReader. layers: root first, the last is this one; below: those of them whose data it leaves out.

    lost: ranges of which the map is lost; `extents` has zeroes there
    """

    view: ChainView
    extents: Extents
    below: Sequence[StoredLayer]
    format: Literal["qcow2", "raw"]
    lost: Sequence[LostMap] = ()

    extended_l2 = False
    peer = None

    @property
    def id(self) -> str:
        return self.view.layers[-1].id

    @property
    def name(self) -> str:
        return self.id

    @property
    def cluster_size(self) -> int:
        return self.view.layers[-1].header.cluster_size

    def copy(self, sink: Sink, *, start: int = 0, on_copied: Callable[[int, int], None]) -> str:
        """As LayerReader. Each leaf is proven against its record before the sink gets it, unless the sink is proven."""
        if sink.is_proven and sink.lost is None:
            filling = Filling(self.view, self.extents, start=start)
            try:
                filling.run(sink, on_copied)
            except Corrupt:  # of which guest range, the replay finds out
                start = filling.done
            else:
                return self.view.layers[-1].header.content_id
        return Replay(self.view, self.extents, sink, lost=self.lost).on(self.below).run(on_copied, start=start)

    def cost(self, *, samples: bool = True) -> ReadingCost:
        """As LayerReader."""
        requests, stored = Filling(self.view, self.extents).cost()
        seconds = Replay(self.view, self.extents).on(self.below).seconds() if samples else None
        return ReadingCost(requests, stored, seconds)


@dataclass(frozen=True, slots=True)
class RepositoryPoint:
    """A PointReader."""

    point: PointRecord
    read: Sequence[RepositoryLayer]

    @property
    def data_bytes(self) -> int:
        return sum(layer.extents.data_bytes for layer in self.read)

    def layers(self) -> Iterator[RepositoryLayer]:
        """Root first."""
        return iter(self.read)


@dataclass(frozen=True, slots=True)
class RecordedLeaves:
    """A PointLeaves that answers from records, without reading data."""

    name: str
    stored: Sequence[StoredLayer]

    @property
    def size(self) -> int:
        return self.stored[-1].size

    def parts(self) -> Sequence[tuple[object, Extents]]:
        """(identity, map) of the layers, root first."""
        return [(layer.id, layer.extents()) for layer in self.stored]

    def leaves(self, first: int, stop: int) -> tuple[Int64s, Hashes]:
        """As PointLeaves."""
        return leaves_shown(self.stored, first, min(stop, self.size))


@dataclass(frozen=True, slots=True)
class WholePoint:
    """A PointDisk. What it gives is what its blobs hold: only who takes all of it can prove its content.

    extents: DATA where the map is lost, too: nobody knows that it is zero
    reads: what clients of this disk read first; lost: these ranges, ascending and apart
    """

    view: ChainView
    extents: Extents
    reads: StoredFirstReads
    lost: Sequence[LostMap] = ()

    @property
    def size(self) -> int:
        return self.view.size

    @property
    def content_id(self) -> str:
        return self.view.layers[-1].header.content_id

    def read_into(self, offset: int, buffer: memoryview, /) -> None:
        """As WholeDisk. Raises Corrupt."""
        for gone in self.lost:
            if gone.start < offset + len(buffer) and offset < gone.stop:
                raise gone.error.detached()
        self.view.read_into(offset, buffer)

    def parts(self, start: int, stop: int, /) -> Sequence[Part]:
        """As BlobDisk."""
        found: list[Part] = []
        for gone in self.lost:
            if gone.start >= stop or gone.stop <= start:
                continue
            if gone.start > start:
                found += self.view.parts(start, gone.start)
            found.append(Part(max(start, gone.start), min(stop, gone.stop), lost=gone.error))
            start = min(stop, gone.stop)
        return [*found, *self.view.parts(start, stop)] if start < stop else found

    def load(self, blobs: Sequence[StoredBlob], /) -> Iterator[tuple[StoredBlob, bytes]]:
        """As BlobDisk."""
        return self.view.load(blobs)

    def load_shared(self, blobs: Sequence[StoredBlob], cache: SharedCache, /) -> Iterator[tuple[StoredBlob, bytes]]:
        """As SharesBlobs."""
        return self.view.load_shared(blobs, cache)

    def first_reads(self) -> FirstReads:
        """As RecordsFirstReads."""
        return self.reads.read()

    def note_first_reads(self, reads: FirstReads, /) -> None:
        """As RecordsFirstReads."""
        self.reads.write(reads)


def point_record(point: Point, layers: int) -> PointRecord:
    """layers: length of its chain."""
    from snapchain.model.retention import is_future

    return PointRecord(
        point=point.point,
        time=point.time,
        labels=point.labels,
        virtual_size=point.size,
        content_id=point.content_id,
        layers=layers,
        holds=tuple(HoldRecord(tag=hold.tag, since=hold.since, reason=hold.reason) for hold in point.holds),
        of_the_future=is_future(point.time, datetime.now(UTC)),
        instant=point.instant,
        consistency=point.consistency,
    )


@contextmanager
def read_point(
    repository: Repository,
    disk: str,
    wanted: str | None,
    *,
    chain: bool,
    clusters: bool,
    maps_only: bool,
    damaged: bool,
    on_event: OnEvent,
) -> Iterator[RepositoryPoint]:
    """As ReadableDestination.reader. While data are read, no collector takes them away."""
    catalogue = repository.catalogue(disk)
    point = find_point(catalogue, wanted)
    layers = repository.chain_of(catalogue, point)
    reading = partial(
        repository.reading,
        {disk: [layer.id for layer in layers]},
        f"restore {disk}",
        on_wait=lambda words: on_event(Notice(words)),
    )
    if damaged:
        # What a collector takes away meanwhile would look like damage.
        with nullcontext() if maps_only else reading():
            kept, lost = tolerant(layers)
            whole = replace(_whole(repository, kept, clusters=clusters), lost=lost)
            yield RepositoryPoint(point_record(point, len(layers)), (whole,))
        return
    with repository.as_of(catalogue):
        read = (
            tuple(_each(repository, layers, clusters=clusters))
            if chain
            else (_whole(repository, layers, clusters=clusters),)
        )
    opened = RepositoryPoint(point_record(point, len(layers)), read)
    if maps_only:
        yield opened
        return
    with reading():
        yield opened


@contextmanager
def whole_point(
    repository: Repository, disk: str, wanted: str | None, *, damaged: bool = False, on_event: OnEvent = ignore
) -> Iterator[WholePoint]:
    """As ReadableDestination.whole; while it is open, no collector takes its data away."""
    catalogue = repository.catalogue(disk)
    layers = repository.chain_of(catalogue, find_point(catalogue, wanted))
    lease = repository.reading(
        {disk: [layer.id for layer in layers]}, f"read {disk}", on_wait=lambda words: on_event(Notice(words))
    )
    with lease:
        lost: Sequence[LostMap] = ()
        try:
            view = ChainView(layers, repository.blobs)
        except Corrupt:
            if not damaged:
                raise
            layers, lost = tolerant(layers)
            view = ChainView(layers, repository.blobs)
        shown = view.extents.owned_by(0)
        if lost:
            first, stop = np.array([(each.start, each.stop) for each in lost], np.int64).T
            shown = over(shown, covering(shown.size, first, stop))
        yield WholePoint(view, shown, StoredFirstReads(repository.store, repository.keys, disk), lost)


@contextmanager
def point_leaves(repository: Repository, disk: str, wanted: str | None) -> Iterator[RecordedLeaves]:
    """A point, for comparing. Raises NotFound."""
    catalogue = repository.catalogue(disk)
    point = find_point(catalogue, wanted)
    layers = repository.chain_of(catalogue, point)
    with repository.reading({disk: [layer.id for layer in layers]}, f"diff {disk}"):
        yield RecordedLeaves(f"{repository.store.url}::{disk}@{point.point}", layers)


def _whole(repository: Repository, layers: Sequence[StoredLayer], *, clusters: bool) -> RepositoryLayer:
    view = ChainView(layers, repository.blobs)
    shown = view.extents.owned_by(0)
    size = layers[-1].header.cluster_size
    return RepositoryLayer(view, aligned(shown, shown, cluster_size=size) if clusters else shown, (), "qcow2")


def _each(repository: Repository, layers: Sequence[StoredLayer], *, clusters: bool) -> Iterator[RepositoryLayer]:
    for at, layer in enumerate(layers):
        kind: Literal["qcow2", "raw"] = "qcow2" if at else layer.header.image_format
        view = ChainView(layers[: at + 1], repository.blobs)
        own = layer.extents()
        if clusters and kind == "qcow2":
            own = aligned(own, view.extents.owned_by(0), cluster_size=layer.header.cluster_size)
        yield RepositoryLayer(view, own, layers[:at], kind)
