"""A repository as a destination that takes layers (destination/writing.py): leases, damage, publishing.

Damage: a layer that names blobs in packs that were found damaged, or are missing, is not built on.  From the lowest
such layer up the image's files are stored again, each as a layer of its own, and older points are moved to the new
layers where the content id is the same.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from itertools import takewhile
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self, TypeVar

from snapchain.destination.writing import (
    DiskLook,
    Finished,
    HeldLayer,
    LayerWriter,
    Moment,
    NewLayer,
    Opening,
    Result,
    Traffic,
)
from snapchain.errors import Conflict, Corrupt, Unsupported
from snapchain.image.view import View, read_pieces
from snapchain.model.content import LEAF_BYTES, Hashes
from snapchain.model.events import Notice, OnEvent
from snapchain.model.extents import Extents, Int64s, rounded
from snapchain.model.guest_checks import GuestCheck, GuestChecks
from snapchain.model.guest_state import GuestChange, GuestStanding
from snapchain.objects.reserve import fill as fill_reserve
from snapchain.repository import guest_states
from snapchain.repository.catalogue import Catalogue, Disk, Point, needed_layers
from snapchain.repository.guest_states import check_epoch
from snapchain.repository.layer_writer import LayerUpload, Origin
from snapchain.repository.layers import StoredLayer, bounded_ranges, leaves_shown
from snapchain.repository.leases import Lease, Mode
from snapchain.repository.repository import Repository
from snapchain.repository.soundness import damaged_points, is_whole

if TYPE_CHECKING:
    from snapchain.destination.copying import CopyWriter

_ATTEMPTS = 8
"""Retries of publishing a point when another writer was faster."""
_LOOKS = 3
"""Restarts of a shipment when damage is found."""


WriterT = TypeVar("WriterT", bound="DiskWriter")


class RepositoryWriting:
    """Implements `destination.writing.Writing` for an opened repository."""

    def __init__(self, repository: Repository) -> None:
        self.repository = repository

    @property
    def url(self) -> str:
        """For people."""
        return self.repository.store.url

    @contextmanager
    def look(self, opening: Opening, *, on_event: OnEvent) -> Iterator[DiskLook]:
        """See `Writing`. Takes no lease."""
        yield _Look(self.repository, opening, on_event)

    def write(self, opening: Opening, work: Callable[[LayerWriter], Result], *, on_event: OnEvent) -> Result:
        """See `Writing`. Begins again when damage comes to light, so that it can be made good.

        Raises Conflict when the disk was changed by others meanwhile, Corrupt for damage that cannot be made good.
        """
        return self._write(f"ship {opening.disk}", opening, DiskWriter, work, on_event)

    def write_copy(
        self, opening: Opening, owner: str | None, work: Callable[[CopyWriter], Result], *, on_event: OnEvent
    ) -> Result:
        """See `Writing`. Otherwise as `write`."""
        from snapchain.repository.copying import RepositoryCopyWriter

        make = partial(RepositoryCopyWriter, owner=owner)
        return self._write(f"copy {opening.disk}", opening, make, work, on_event)

    def _write(
        self,
        words: str,
        opening: Opening,
        make: Callable[[Repository, Opening, Lease, list[int], OnEvent], WriterT],
        work: Callable[[WriterT], Result],
        on_event: OnEvent,
    ) -> Result:
        with self.repository.lease(
            Mode.WRITE, words, on_wait=lambda words: on_event(Notice(words)), disks=[opening.disk]
        ) as lease:
            points: list[int] = []
            for attempt in range(_LOOKS):
                try:
                    with make(self.repository, opening, lease, points, on_event) as writer:
                        result = work(writer)
                except Corrupt:
                    lease.check()  # after a collection meanwhile, a missing object is no damage
                    # What lies below turned out to be damaged: from now on that is known, and can be made good.
                    if not self.repository.record_damage() or attempt == _LOOKS - 1:
                        raise
                else:
                    fill_reserve(self.repository.store)
                    return result
        raise AssertionError("the loop returns or raises")

    def guest_state(self, guest: str) -> GuestStanding:
        """See `TakesLayers`."""
        return guest_states.look(self.repository, guest)

    def change_guest(self, change: GuestChange) -> tuple[GuestStanding, Mapping[str, Path]]:
        """See `Writing`."""
        return guest_states.change(self.repository, change), {}

    def guest_checks(self, guest: str) -> GuestChecks:
        """See `ReadableDestination`."""
        return guest_states.checks(self.repository, guest)

    def note_check(self, check: GuestCheck) -> None:
        """See `ReadableDestination`."""
        guest_states.note_check(self.repository, check)


class _Look:
    """A disk as it stands; implements `DiskLook`."""

    branches, believed = True, True

    def __init__(self, repository: Repository, opening: Opening, on_event: OnEvent) -> None:
        """Raises Conflict for an older epoch than the disk's, and for a disk that was renamed."""
        self._repository, self._on_event = repository, on_event
        self._disk: Disk = repository.disk(opening.disk)
        self._epoch = opening.epoch
        self._current = self._disk.read()
        self._check_epoch()
        self._layers = self._stored()
        self._base_count = len(self._layers)
        self.mends = False

    @property
    def held(self) -> Sequence[HeldLayer]:
        return [held_layer(layer) for layer in self._layers]

    def leaves(self) -> _NewestLeaves:
        """See `LayerWriter`."""
        return _NewestLeaves(self._layers)

    def fitted(self, layer: NewLayer) -> NewLayer:
        """See `LayerWriter`: its map as it is, whole leaves to read."""
        return replace(layer, amount=rounded(layer.extents, LEAF_BYTES).data_bytes)

    def _check_epoch(self) -> None:
        if self._current is not None:
            self._current[0].check_not_renamed()
            check_epoch(self._repository, self._current[0], self._epoch)

    def _stored(self) -> list[StoredLayer]:
        """The layers of the newest point, from the root up to the first whose record is lost."""
        if self._current is None or self._current[0].latest is None:
            return []
        catalogue = self._current[0]
        try:
            return self._repository.chain(catalogue, self._current[0].latest.layer)
        except Corrupt:
            found: list[StoredLayer] = []
            with suppress(Corrupt):
                found.extend(self._repository.layer(layer) for layer in self._latest_chain())
            return found

    def _latest_chain(self) -> tuple[str, ...]:
        """The newest point's layers as the catalogue names them, root first; without a whole chain, its top."""
        latest = self._current[0].latest if self._current else None
        if self._current is None or latest is None:
            return ()
        try:
            return self._current[0].chain(latest.layer)
        except Corrupt:
            return (latest.layer,)


class DiskWriter(_Look):
    """Implements `LayerWriter`: a disk opened for one shipment, under a lease; a context manager."""

    def __init__(
        self, repository: Repository, opening: Opening, lease: Lease, points: list[int], on_event: OnEvent
    ) -> None:
        """points: numbers that this shipment has published already; it grows. Raises Conflict for an older epoch."""
        super().__init__(repository, opening, on_event)
        self._lease = lease
        self._arrival = _Arrival()
        self._deposit = LayerUpload(repository, on_durable=self._arrival.show)
        self._arrival.deposit = self._deposit
        self._points = points
        self._moves_points = False

    def __enter__(self) -> Self:
        self._deposit.__enter__()
        try:
            self._avoid_damage()
        except BaseException as error:
            self._deposit.__exit__(type(error), error, error.__traceback__)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._deposit.__exit__(kind, error, trace)

    @property
    def traffic(self) -> Traffic:
        deposit = self._deposit
        read, stored = deposit.bytes_read, deposit.bytes_stored
        return Traffic(read=read, stored=stored, sent=stored, data=read, carried=stored)

    def add(
        self, layer: NewLayer, parent: HeldLayer | None, *, confirm: Callable[[], None], on_bytes: Callable[[int], None]
    ) -> HeldLayer:
        """See `LayerWriter`. Bytes have arrived when they are in the store: bytes read, less bytes that wait."""
        below = self._below(parent)
        self._arrival.on_bytes = on_bytes
        self._arrival.show()
        origin = Origin(
            name=layer.name,
            image_format=layer.image_format,
            cluster_size=max(512, layer.cluster_size),
            sources=layer.sources,
        )
        added = self._deposit.add(
            _Composed(layer.extents, layer.view), below, origin, on_bytes=self._arrival.read, confirm=confirm
        )
        self._layers, self._base_count = [*below, added], min(self._base_count, len(below))
        self._arrival.show()
        return held_layer(added)

    def cut(self, _keep: str | None) -> None:
        """Raises Unsupported: points of one disk may lie on different chains, so nothing stands in the way."""
        raise Unsupported(
            "a repository keeps every chain of a disk, so there is nothing to cut off", hint="leave out --cut-replica"
        )

    def publish(self, top: HeldLayer, *, time: datetime, labels: Sequence[str], moment: Moment | None = None) -> None:
        """See `LayerWriter`. Raises Conflict also where this run stood still so long that others took it for dead.

        A newer epoch becomes the disk's with the point: older ones are refused from then on.
        """

        def made(catalogue: Catalogue | None) -> Point:
            return Point(
                point=catalogue.next_point if catalogue else 1,
                time=time,
                labels=tuple(labels),
                layer=top.id,
                size=top.size,
                content_id=top.content_id,
                instant=moment and moment.instant,
                consistency=moment and moment.consistency,
            )

        self._publish(top, made)

    def _publish(self, top: HeldLayer, made: Callable[[Catalogue | None], Point]) -> int:
        """Publish what `made` makes of the newest catalogue, called anew when another writer was faster; its number."""
        chain = self._below(top)
        base = [layer.id for layer in chain[: self._base_count]]
        links = _links(chain)
        for attempt in range(_ATTEMPTS):
            catalogue = self._current[0] if self._current else None
            self._check_epoch()
            if catalogue is not None:
                _check_base(catalogue, base, links)
            point = made(catalogue)
            # Before each attempt: the faster one may have been a collector that took this run for dead.
            self._lease.check()
            points = (*(catalogue.points if catalogue else ()), point)
            parents = {**(catalogue.parents if catalogue else {}), **links}
            if self._moves_points:
                points, parents = _mended(points, parents, chain)
            try:
                self._current = self._disk.advance(
                    self._current,
                    time=datetime.now(UTC),
                    next_point=max(catalogue.next_point if catalogue else 1, point.point + 1),
                    points=tuple(sorted(points, key=lambda each: each.point)),
                    parents=parents,
                    **self._newer_epoch(catalogue),
                )
            except Conflict:
                if attempt == _ATTEMPTS - 1:
                    raise
                self._current = self._disk.read()
                continue
            self._points.append(point.point)
            return point.point
        raise AssertionError("the loop returns or raises")

    def _newer_epoch(self, catalogue: Catalogue | None) -> dict[str, object]:
        """The fields of the next generation by which an epoch that is newer here becomes the disk's."""
        if self._epoch <= max(1, 0 if catalogue is None else catalogue.epoch):
            return {}
        return {"epoch": self._epoch, "owner": self._owner()}

    def _owner(self) -> str | None:
        """Who may write the disk in a newer epoch: this host."""
        return socket.gethostname()

    def finish(self) -> Finished:
        """See `LayerWriter`; with the points that stay damaged, since the image no longer has their bytes."""
        if not self._moves_points or self._current is None:
            return Finished(tuple(self._points))
        damaged = damaged_points(self._repository, self._current[0], self._deposit.index)
        if damaged:
            numbers = ", ".join(map(str, damaged))
            words = f"points that stay damaged, since the image no longer has their data: {numbers}"
            self._on_event(Notice(f"disk {self._disk.name}: {words}"))
        return Finished(tuple(self._points), damaged)

    def _below(self, parent: HeldLayer | None) -> list[StoredLayer]:
        """The chain that ends in a layer."""
        if parent is None:
            return []
        return self._layers[: [layer.id for layer in self._layers].index(parent.id) + 1]

    def _avoid_damage(self) -> None:
        """Build on nothing whose blobs lie in damaged packs."""
        index = self._deposit.index
        for error in index.unreadable:
            self._on_event(Notice(f"{error}: the blobs that it lists are stored again"))
        whole = self._layers
        if index.avoid:
            self._lease.check()
            self._repository.record_damage()
            whole = list(takewhile(lambda layer: is_whole(layer, index), whole))
        self.mends = len(whole) < len(self._latest_chain())
        self._moves_points = self.mends or bool(index.avoid)
        if self.mends:
            self._on_event(
                Notice(f"disk {self._disk.name} is damaged: the data that the image still has is stored again")
            )
            self._layers, self._base_count = whole, len(whole)


class _Composed:
    """Some neighbouring files of a chain as the source of one layer (repository.ingest.LayerSource)."""

    def __init__(self, extents: Extents, view: View) -> None:
        self.extents, self._view = extents, view
        self.size = view.size

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """See `LayerSource`."""
        self._view.read_into(offset, buffer)

    def read_pieces(self, pieces: Sequence[tuple[int, memoryview]]) -> None:
        """See `ReadsPieces`."""
        read_pieces(self._view, pieces)


class _NewestLeaves:
    """See destination.writing.NewestLeaves: from the records of the layers."""

    def __init__(self, layers: Sequence[StoredLayer]) -> None:
        self._layers = layers

    def portions(self) -> Iterator[tuple[int, Int64s, Hashes]]:
        """See `NewestLeaves`."""
        for first, stop in bounded_ranges(self._layers, 0, self._layers[-1].size):
            yield (stop, *leaves_shown(self._layers, first, stop))


class _Arrival:
    """How much has arrived: bytes read, less bytes that wait to be sent. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._read = self._shown = 0
        self.deposit: LayerUpload | None = None
        self.on_bytes: Callable[[int], None] = lambda _count: None

    def read(self, count: int) -> None:
        """So many guest bytes more were read."""
        with self._lock:
            self._read += count
        self.show()

    def show(self) -> None:
        """Report the bytes that have arrived."""
        if self.deposit is None:
            return
        with self._lock:
            # Workers read ahead of the count: then less is reported than has arrived.
            self._shown = max(self._shown, self._read - self.deposit.bytes_pending)
            self.on_bytes(self._shown)


def held_layer(layer: StoredLayer) -> HeldLayer:
    """A layer as use cases see it."""
    header = layer.header
    return HeldLayer(
        id=layer.id,
        name=header.name,
        size=layer.size,
        sources=header.sources,
        content_id=header.content_id,
        total=header.sum(),
        image_format=header.image_format,
    )


def _links(chain: Sequence[StoredLayer]) -> dict[str, str | None]:
    """layer -> the one below it."""
    return {upper.id: lower.id if lower else None for lower, upper in zip([None, *chain], chain, strict=False)}


def _mended(
    points: Sequence[Point], parents: dict[str, str | None], chain: Sequence[StoredLayer]
) -> tuple[tuple[Point, ...], dict[str, str | None]]:
    """Points and links of a disk, where each point with the content of a layer of `chain` is given by that layer.

    Layers that no point needs any more go: the damaged ones among them.
    """
    fresh = {(layer.size, layer.header.content_id): layer.id for layer in chain}
    mended = tuple(
        point.model_copy(update={"layer": fresh.get((point.size, point.content_id), point.layer)}) for point in points
    )
    gone = needed_layers(points, parents) - needed_layers(mended, parents)
    return mended, {layer: below for layer, below in parents.items() if layer not in gone}


def _check_base(catalogue: Catalogue, base: Sequence[str], links: dict[str, str | None]) -> None:
    for layer in base:
        if layer not in catalogue.parents or catalogue.parents[layer] != links[layer]:
            raise Conflict(
                "layers that this shipment builds on were merged away meanwhile",
                subject=catalogue.disk,
                hint="run it again: what was sent is not sent twice",
            )
