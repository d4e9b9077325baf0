"""Points of a replica that go to another destination: their layers are fetched in order, over one connection.

Data come in guest order and once.  A layer is stored in leaves, and what it leaves of a leaf to the layers below is
read from there: from the copy of those that was written just before.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Literal, TypeVar

from snapchain.errors import Busy, Conflict, Corrupt, Unavailable
from snapchain.host.retry import Lasting, RetryPolicy, retry
from snapchain.image.view import View
from snapchain.model.content import LEAF_BYTES
from snapchain.model.events import Notice, OnEvent
from snapchain.model.extents import ABSENT, DATA, ZERO, Extents
from snapchain.model.fingerprint import Fingerprint
from snapchain.replica.fetch_client import FetchedLayer, Piece

if TYPE_CHECKING:
    from snapchain.destination.records import DiskRecord
    from snapchain.replica.destination import ReplicaDestination, ReplicaLayer

T = TypeVar("T")
_POLICY = RetryPolicy()


class _ComingView:
    """A layer that is being fetched, and what it lies on. Each leaf is read once, and in about the order of the guest.

    Whoever needs what has not come yet fetches it, and keeps for the others what comes before: no more than lies
    between the readers, since nothing is fetched that nobody waits for.
    """

    def __init__(
        self, layer: FetchedLayer, below: Callable[[], View] | None, reader: ReplicaCopyReader, number: int
    ) -> None:
        """number: of the layer in its chain, from 0"""
        self._layer, self._below, self._reader, self._number = layer, below, reader, number
        self._lower: View | None = None
        self._batches: Iterator[list[Piece]] | None = layer.batches()
        self._lock = threading.Lock()
        self._come: list[Piece] = []  # ascending
        self._reached = 0
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
        with self._lock:
            if self._lower is None and self._below is not None:
                self._lower = self._below()
        inside = 0 if self._lower is None else max(0, min(len(buffer), self._lower.size - offset))
        if self._lower is not None and inside:
            self._lower.read_into(offset, buffer[:inside])
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
        while not self._ended and (stop is None or self._reached < stop):
            batch = self._reader.trying(self._next, lambda: self._reached)
            if batch is None:
                self._ended = True
                return
            for each in batch:
                low, high = max(each.offset, self._reached), each.offset + each.length
                if low < high:  # else it came before the connection was lost
                    self._come.append(_cut(each, low, high))
            self._reached = max(self._reached, self._layer.position)

    def _next(self) -> list[Piece] | None:
        """The next data, over a new connection where the last one was lost; None at the end."""
        if self._batches is None:
            again = self._reader.opened(self._number, self._reached)
            if again.id != self._layer.id:
                raise Conflict("its layers were merged meanwhile", subject=again.peer, hint="run it again")
            self._layer, self._batches = again, again.batches()
        try:
            return next(self._batches, None)
        except Corrupt as error:
            self._reader.damage = error
            raise
        except (Unavailable, Busy):
            self._batches = None
            raise


def _cut(piece: Piece, start: int, stop: int) -> Piece:
    """A part of a piece, with bytes of its own: those of a batch are valid until the next one comes."""
    data = None if piece.data is None else memoryview(bytes(piece.data[start - piece.offset : stop - piece.offset]))
    return Piece(start, stop - start, data)


class _ReadLayer:
    """A ReadLayer."""

    def __init__(self, layer: FetchedLayer, reader: ReplicaCopyReader, number: int) -> None:
        self._layer, self._reader, self._number = layer, reader, number
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

    def view(self, below: Callable[[], View] | None) -> View:
        """See `ReadLayer`."""
        self._view = _ComingView(self._layer, below, self._reader, self._number)
        return self._view

    def finish(self) -> None:
        """See `ReadLayer`."""
        if self._view is not None:
            self._view.finish()


class ReplicaCopyReader:
    """Implements `CopyReader`. All points of a disk lie on one chain, so the layers of the newest give all of them.

    damage: what was found; each point above needs it, so no more comes after it
    """

    owner: str | None = None

    def __init__(
        self, destination: ReplicaDestination, disk: DiskRecord, points: Sequence[int] | None, on_event: OnEvent
    ) -> None:
        self.damage: Corrupt | None = None
        self._destination, self._disk, self._on_event = destination, disk, on_event
        self._points = {point.point: point for point in disk.points}
        self._highest = sorted(disk.points, key=lambda each: (each.layers, each.point), reverse=True)
        self._newest = max(points or self._points)
        self._connection = ExitStack()
        self._coming: Iterator[ReplicaLayer] | None = None
        self._place = 0  # layers that have come
        self._ended = threading.Event()
        self._amounts: list[int] | None = None

    def on_chain(self, point: int) -> Iterator[int]:
        """See `CopyReader`."""
        height = self._height(point)
        return (each.point for each in self._highest if each.layers <= height)

    def data_bytes(self, base: int | None, point: int) -> int:
        """See `CopyReader`. The maps of all layers cross the link once."""
        if self._amounts is None:
            newest = str(self._disk.points[-1].point)
            with self._destination.reader(self._disk.name, newest, chain=True, maps_only=True) as reader:
                self._amounts = [layer.extents.data_bytes for layer in reader.layers()]
        return sum(self._amounts[self._height(base) : self._height(point)])

    def layers(self, base: int | None, point: int) -> Iterator[_ReadLayer]:
        """See `CopyReader`."""
        for number in range(self._height(base), self._height(point)):
            if self.damage is not None:
                raise self.damage
            try:
                layer = self.trying(partial(self._next, number), lambda: 0)
            except Corrupt as error:
                self.damage = error
                raise
            yield _ReadLayer(layer, self, number)

    def check_there(self) -> None:
        """See `CopyReader`. Files that are read are locked, so nothing is taken away."""

    def trying(self, attempt: Callable[[], T], progress: Callable[[], int]) -> T:
        """What an attempt gives, which is repeated when the connection was lost."""
        return retry(
            attempt,
            policy=_POLICY,
            progress=progress,
            on_retry=lambda each: self._on_event(Notice(str(each))),
            sleep=self._wait,
        )

    def opened(self, number: int, offset: int) -> FetchedLayer:
        """A layer, over a new connection; data come from the leaf of a guest offset on, or earlier."""
        if self._ended.is_set():  # Ctrl-C, while a thread was waiting to try again
            raise Lasting("the copy has ended", subject=self._destination.url)
        self._connection.close()
        self._coming = None
        start = offset // LEAF_BYTES * LEAF_BYTES
        reader = self._connection.enter_context(
            self._destination.reader(self._disk.name, str(self._newest), chain=True, first=(number, start))
        )
        expected = self._points[self._newest]
        if (reader.point.layers, reader.point.content_id) != (expected.layers, expected.content_id):
            raise Conflict("its layers were merged meanwhile", subject=self._disk.name, hint="run it again")
        coming = reader.layers()
        for _ in range(number):
            for _ in next(coming).fetched.batches():
                pass  # an older side gives the data of these, too
        found = next(coming).fetched
        self._coming, self._place = coming, number + 1
        return found

    def close(self) -> None:
        """End the connection, and what waits for another one."""
        self._ended.set()
        self._connection.close()

    def _wait(self, seconds: float) -> None:
        self._ended.wait(seconds)

    def _next(self, number: int) -> FetchedLayer:
        if self._coming is None or self._place != number:
            return self.opened(number, 0)
        try:
            found = next(self._coming).fetched
        except (Unavailable, Busy):
            self._coming = None
            raise
        self._place += 1
        return found

    def _height(self, point: int | None) -> int:
        """How many layers give a point."""
        if point is None:
            return 0
        if point not in self._points:
            raise Conflict(f"point {point} was dropped meanwhile", subject=self._disk.name, hint="run it again")
        return self._points[point].layers


@contextmanager
def read_copies(
    destination: ReplicaDestination, disk: str, points: Sequence[int] | None, *, on_event: OnEvent
) -> Iterator[ReplicaCopyReader]:
    """As `ReadableDestination.copying`."""
    (record,) = destination.disks(disk)
    reader = ReplicaCopyReader(destination, record, points, on_event)
    try:
        yield reader
    finally:
        reader.close()
