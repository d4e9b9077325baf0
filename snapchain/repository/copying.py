"""Points of a repository that go to another destination, and points of another one that come here.

A point becomes one layer: what its chain shows beyond the base, whatever number of layers that is here.  So what is
damaged and hidden by a later layer keeps no later point from being copied.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal

from snapchain.destination.records import PointRecord
from snapchain.destination.writing import HeldLayer, Opening
from snapchain.errors import Conflict, Corrupt
from snapchain.image.view import View
from snapchain.model.events import Notice, OnEvent
from snapchain.model.extents import Extents, fold, over
from snapchain.model.fingerprint import Fingerprint
from snapchain.repository.catalogue import Catalogue, Hold, Point
from snapchain.repository.chain import ChainView
from snapchain.repository.disk_writer import DiskWriter, held_layer
from snapchain.repository.envelope import made_by
from snapchain.repository.layers import StoredLayer
from snapchain.repository.leases import Lease
from snapchain.repository.repository import Repository, check_agrees
from snapchain.repository.soundness import is_whole


@dataclass(frozen=True, slots=True)
class _ReadLayer:
    """A ReadLayer. shown: the chain up to it; own: the layers that it is made of, lowest first."""

    shown: ChainView
    own: Sequence[StoredLayer]
    extents: Extents

    @property
    def name(self) -> str:
        return self.own[-1].header.name

    @property
    def image_format(self) -> Literal["qcow2", "raw"]:
        return self.own[-1].header.image_format

    @property
    def cluster_size(self) -> int:
        return self.own[-1].header.cluster_size

    @property
    def sources(self) -> tuple[Fingerprint, ...]:
        return tuple(source for layer in self.own for source in layer.header.sources)

    def view(self, below: Callable[[], View] | None) -> View:
        """See `ReadLayer`. What lies below is read here, too."""
        _ = below
        return self.shown

    def finish(self) -> None:
        """See `ReadLayer`. Each blob was checked as it was read."""


class RepositoryCopyReader:
    """Implements `CopyReader`. Layer records are read once, maps as far as they are needed."""

    def __init__(self, repository: Repository, catalogue: Catalogue) -> None:
        self._repository, self._catalogue = repository, catalogue
        self._points = {point.point: point for point in catalogue.points}
        self._given_by: dict[str, list[int]] = {}
        for point in catalogue.points:
            self._given_by.setdefault(point.layer, []).append(point.point)
        self._breaks = catalogue.breaks()
        self._layers: dict[str, StoredLayer] = {}
        self._asked: set[str] = set()
        self._composed: tuple[tuple[str, ...], Extents] | None = None

    @property
    def owner(self) -> str | None:
        return self._catalogue.owner

    def on_chain(self, point: int) -> Iterator[int]:
        """See `CopyReader`."""
        at: str | None = self._point(point).layer
        self._catalogue.check_chain(self._point(point).layer, self._breaks)
        while at is not None:
            yield from reversed(self._given_by.get(at, ()))
            at = self._catalogue.parents[at]

    def data_bytes(self, base: int | None, point: int) -> int:
        """See `CopyReader`."""
        return sum(layer.header.data_bytes for layer in self._parts(base, point)[1])

    def layers(self, base: int | None, point: int) -> Iterator[_ReadLayer]:
        """See `CopyReader`."""
        chain, own = self._parts(base, point)
        check_agrees(self._catalogue.disk, self._point(point), chain[-1])
        if own:
            extents = fold(layer.extents() for layer in own)
            shown = ChainView(chain, self._repository.blobs, self._resolved(chain))
            yield _ReadLayer(shown, own, extents)

    def check_there(self) -> None:
        """See `CopyReader`."""
        self._repository.check_there({self._catalogue.disk: self._asked})

    def _parts(self, base: int | None, point: int) -> tuple[list[StoredLayer], list[StoredLayer]]:
        """The chain of a point, root first, and the layers of it above the base."""
        ids = self._catalogue.chain(self._point(point).layer)
        self._asked.update(ids)
        self._layers |= self._repository.layers([each for each in ids if each not in self._layers])
        chain = [self._layers[each] for each in ids]
        first = 0 if base is None else ids.index(self._point(base).layer) + 1
        return chain, chain[first:]

    def _resolved(self, chain: Sequence[StoredLayer]) -> Extents:
        """The composed map of a chain, on that of the last one where that is a part of it."""
        ids = tuple(layer.id for layer in chain)
        known, lower = self._composed or ((), None)
        if lower is None or ids[: len(known)] != known:
            known, lower = (), None
        for place, layer in enumerate(chain[len(known) :], len(known)):
            mine = layer.extents().owned_by(place)
            lower = mine if lower is None else over(lower, mine)
        assert lower is not None, "a chain has a root"
        self._composed = ids, lower
        return lower

    def _point(self, point: int) -> Point:
        if point not in self._points:
            raise Conflict(f"point {point} was dropped meanwhile", subject=self._catalogue.disk, hint="run it again")
        return self._points[point]


@contextmanager
def read_copies(
    repository: Repository, disk: str, points: Sequence[int] | None, *, on_event: OnEvent
) -> Iterator[RepositoryCopyReader]:
    """As `ReadableDestination.copying`."""
    catalogue = repository.catalogue(disk)
    reader = RepositoryCopyReader(repository, catalogue)
    if points is None:
        with repository.as_of(catalogue):
            yield reader
        return
    layers: dict[str, None] = {}
    for point in catalogue.points:
        if point.point in points:
            try:
                layers |= dict.fromkeys(catalogue.chain(point.layer))
            except Corrupt:  # that is found again, and told, when the point is read
                continue
    with repository.reading({disk: list(layers)}, f"copy {disk}", on_wait=lambda words: on_event(Notice(words))):
        yield reader


class RepositoryCopyWriter(DiskWriter):
    """Implements `CopyWriter`. owner: who may write the disk in the epoch of the source."""

    def __init__(
        self,
        repository: Repository,
        opening: Opening,
        lease: Lease,
        points: list[int],
        on_event: OnEvent,
        *,
        owner: str | None,
    ) -> None:
        super().__init__(repository, opening, lease, points, on_event)
        self._source_owner = owner

    def _owner(self) -> str | None:
        """Who the source says may write the disk: it is not this host that copies it."""
        return self._source_owner

    def showing(self, size: int, content_id: str) -> HeldLayer | None:
        """See `CopyWriter`."""
        added = next((each for each in self._layers if (each.size, each.header.content_id) == (size, content_id)), None)
        if added is not None and added.id == self._layers[-1].id:
            return held_layer(added)
        catalogue = self._current[0] if self._current else None
        tried: set[str] = set()
        for point in reversed(catalogue.points if catalogue else ()):
            if (point.size, point.content_id) != (size, content_id) or point.layer in tried:
                continue
            assert catalogue is not None
            tried.add(point.layer)
            chain = self._whole_chain(catalogue, point)
            if chain is not None:
                self._layers, self._base_count = chain, len(chain)
                return held_layer(chain[-1])
        return None

    def _whole_chain(self, catalogue: Catalogue, point: Point) -> list[StoredLayer] | None:
        try:
            chain = self._repository.chain_of(catalogue, point)
        except Corrupt:
            return None
        index = self._deposit.index
        return None if index.avoid and not all(is_whole(layer, index) for layer in chain) else chain

    def view_of(self, layer: HeldLayer) -> View:
        """See `CopyWriter`."""
        return ChainView(self._below(layer), self._repository.blobs)

    def publish_copy(self, top: HeldLayer, point: PointRecord, *, keeps_number: bool) -> int:
        """See `CopyWriter`."""

        def made(catalogue: Catalogue | None) -> Point:
            number = point.point if keeps_number else catalogue.next_point if catalogue else 1
            there = () if catalogue is None else catalogue.points
            if any(each.point == number or _is_copy(each, point) for each in there):
                raise Conflict(
                    f"point {number} was published there meanwhile", subject=self._disk.name, hint="run it again"
                )
            return Point(
                point=number,
                time=point.time,
                labels=point.labels,
                layer=top.id,
                size=top.size,
                content_id=top.content_id,
                holds=tuple(Hold(tag=hold.tag, since=hold.since, reason=hold.reason) for hold in point.holds),
                instant=point.instant,
                consistency=point.consistency,
                made_by=made_by(),
            )

        return self._publish(top, made)

    def take_epoch(self) -> None:
        """See `CopyWriter`."""
        if self._current is None or not self._newer_epoch(self._current[0]):
            return
        self._disk.update(
            lambda found: self._newer_epoch(found) or None, time=datetime.now(UTC), check=self._lease.check
        )
        self._current = self._disk.read()


def _is_copy(found: Point, point: PointRecord) -> bool:
    """Whether a point here is that one of the source: another copy was faster."""
    mine = found.time, found.size, found.content_id, found.instant
    return mine == (point.time, point.virtual_size, point.content_id, point.instant)
