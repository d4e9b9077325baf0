"""Points of a replica that go to another destination: their layers are fetched in order, over one connection.

Data come in guest order and once.  A layer is stored in leaves, and what it leaves of a leaf to the layers below is
read from there: from the copy of those that was written just before.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Literal

from snapchain.errors import Conflict, Corrupt
from snapchain.image.view import View
from snapchain.model.extents import ABSENT, DATA, ZERO, Extents
from snapchain.model.fingerprint import Fingerprint
from snapchain.replica.fetch_client import FetchedLayer, Piece

if TYPE_CHECKING:
    from snapchain.destination.records import DiskRecord
    from snapchain.replica.destination import ReplicaDestination


class _ComingView:
    """A layer that is being fetched, and what it lies on. Each leaf is read once, and in about the order of the guest.

    Whoever needs what has not come yet fetches it, and keeps for the others what comes before: no more than lies
    between the readers, since nothing is fetched that nobody waits for.
    """

    def __init__(self, layer: FetchedLayer, below: View | None, on_damage: Callable[[Corrupt], None]) -> None:
        self._layer, self._below, self._on_damage = layer, below, on_damage
        self._batches = layer.batches()
        self._lock = threading.Lock()
        self._come: list[Piece] = []  # ascending
        self._ended = False

    @property
    def size(self) -> int:
        """Virtual size, bytes."""
        return self._layer.extents.size

    def resolve(self) -> Extents:
        """The layer's own map: what is below is known to its reader."""
        return self._layer.extents

    def read_into(self, offset: int, buffer: memoryview, /) -> None:
        """See `View`."""
        window = self._layer.extents.window(offset, offset + len(buffer))
        start, end = window.at + offset, window.ends + offset
        if bool((window.val == ABSENT).any()):
            self._read_below(offset, buffer)
        for low, high in zip(start[window.val == ZERO].tolist(), end[window.val == ZERO].tolist(), strict=True):
            buffer[low - offset : high - offset] = bytes(high - low)
        data = window.val >= DATA
        if data.any():
            for piece in self._take(int(start[data][0]), int(end[data][-1])):
                at = piece.offset - offset
                buffer[at : at + piece.length] = bytes(piece.length) if piece.data is None else piece.data

    def finish(self) -> None:
        """Read to the end: only then the other side has said that the layer was as it is recorded."""
        with self._lock:
            self._fetch(None)

    def _read_below(self, offset: int, buffer: memoryview) -> None:
        inside = 0 if self._below is None else max(0, min(len(buffer), self._below.size - offset))
        if self._below is not None and inside:
            self._below.read_into(offset, buffer[:inside])
        buffer[inside:] = bytes(len(buffer) - inside)

    def _take(self, start: int, stop: int) -> list[Piece]:
        """The pieces of [start, stop), cut there; they are the caller's."""
        with self._lock:
            self._fetch(stop)
            taken: list[Piece] = []
            left: list[Piece] = []
            for piece in self._come:
                end = piece.offset + piece.length
                low, high = max(piece.offset, start), min(end, stop)
                if low >= high:
                    left.append(piece)
                    continue
                left += [_cut(piece, at, to) for at, to in ((piece.offset, low), (high, end)) if at < to]
                taken.append(_cut(piece, low, high))
            self._come = left
        return taken

    def _fetch(self, stop: int | None) -> None:
        """Until all below `stop` has come, or all there is."""
        while not self._ended and (stop is None or self._layer.position < stop):
            try:
                batch = next(self._batches, None)
            except Corrupt as error:
                self._on_damage(error)
                raise
            if batch is None:
                self._ended = True
                return
            # A batch is valid until the next one comes.
            self._come += [
                Piece(each.offset, each.length, None if each.data is None else memoryview(bytes(each.data)))
                for each in batch
            ]


def _cut(piece: Piece, start: int, stop: int) -> Piece:
    data = None if piece.data is None else piece.data[start - piece.offset : stop - piece.offset]
    return Piece(start, stop - start, data)


class _ReadLayer:
    """A ReadLayer."""

    def __init__(self, layer: FetchedLayer, on_damage: Callable[[Corrupt], None]) -> None:
        self._layer, self._on_damage = layer, on_damage
        self._view: _ComingView | None = None

    @property
    def name(self) -> str:
        return self._layer.offer.name

    @property
    def image_format(self) -> Literal["qcow2"]:
        return "qcow2"

    @property
    def cluster_size(self) -> int:
        return self._layer.offer.cluster_size

    @property
    def sources(self) -> tuple[Fingerprint, ...]:
        return self._layer.offer.sources

    @property
    def extents(self) -> Extents:
        return self._layer.extents

    def view(self, below: View | None) -> View:
        """See `ReadLayer`."""
        self._view = _ComingView(self._layer, below, self._on_damage)
        return self._view

    def finish(self) -> None:
        """See `ReadLayer`."""
        if self._view is not None:
            self._view.finish()


class ReplicaCopyReader:
    """Implements `CopyReader`. All points of a disk lie on one chain, so the layers of the newest give all of them."""

    owner: str | None = None

    def __init__(self, destination: ReplicaDestination, disk: DiskRecord, points: Sequence[int] | None) -> None:
        self._destination, self._disk, self._wanted = destination, disk, points
        self._points = {point.point: point for point in disk.points}
        self._stack = ExitStack()
        self._coming: Iterator[_ReadLayer] | None = None
        self._place = 0  # layers that have come
        self._damage: Corrupt | None = None
        self._amounts: list[int] | None = None

    def on_chain(self, point: int) -> Sequence[int]:
        """See `CopyReader`."""
        height = self._height(point)
        found = [each for each in self._disk.points if each.layers <= height]
        return [each.point for each in sorted(found, key=lambda each: (each.layers, each.point), reverse=True)]

    def data_bytes(self, base: int | None, point: int) -> int:
        """See `CopyReader`. The maps of all layers cross the link once."""
        if self._amounts is None:
            newest = self._disk.points[-1].point
            with self._destination.reader(self._disk.name, str(newest), chain=True, maps_only=True) as reader:
                self._amounts = [layer.extents.data_bytes for layer in reader.layers()]
        return sum(self._amounts[self._height(base) : self._height(point)])

    def layers(self, base: int | None, point: int) -> Iterator[_ReadLayer]:
        """See `CopyReader`. After damage no more comes: each point above needs it."""
        first, stop = self._height(base), self._height(point)
        if first == stop:
            return
        if self._damage is not None:
            raise self._damage
        try:
            if self._coming is None or self._place != first:
                self._begin(first)
            assert self._coming is not None
            while self._place < stop:
                layer = next(self._coming)
                self._place += 1
                yield layer
        except Corrupt as error:
            self._note(error)
            raise

    def _note(self, error: Corrupt) -> None:
        self._damage = error

    def check_there(self) -> None:
        """See `CopyReader`. Files that are read are locked, so nothing is taken away."""

    def close(self) -> None:
        """End the connection."""
        self._coming = None
        self._stack.close()

    def _begin(self, first: int) -> None:
        self.close()
        newest = str(max(self._wanted or self._points))
        reader = self._stack.enter_context(
            self._destination.reader(self._disk.name, newest, chain=True, first=(first, 0))
        )
        expected = self._points[int(newest)]
        if (reader.point.layers, reader.point.content_id) != (expected.layers, expected.content_id):
            raise Conflict("its layers were merged meanwhile", subject=self._disk.name, hint="run it again")
        layers = reader.layers()
        for _ in range(first):
            for _ in next(layers).fetched.batches():
                pass  # an older side gives the data of these, too
        self._coming, self._place = (_ReadLayer(layer.fetched, self._note) for layer in layers), first

    def _height(self, point: int | None) -> int:
        """How many layers give a point."""
        if point is None:
            return 0
        if point not in self._points:
            raise Conflict(f"point {point} was dropped meanwhile", subject=self._disk.name, hint="run it again")
        return self._points[point].layers


@contextmanager
def read_copies(
    destination: ReplicaDestination, disk: str, points: Sequence[int] | None
) -> Iterator[ReplicaCopyReader]:
    """As `ReadableDestination.copying`."""
    (record,) = destination.disks(disk)
    reader = ReplicaCopyReader(destination, record, points)
    try:
        yield reader
    finally:
        reader.close()
