"""Copying points of a disk to another destination: how they are read in the one, and written in the other.

    with source.copying("web1/vda", [3, 4, 5]) as reader:
        destination.write_copy(opening, reader.owner, work)                 work(writer)

    for each point, oldest first:
        base     the uppermost point below it whose content the writer has:   reader.on_chain, writer.showing
        layers   what the point shows beyond that base:                       reader.layers -> writer.add
        publish  under the number, the time, the labels and the holds that it has in the source

Points are told by content: which layers give them there and here, and how a layer is stored, may differ.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Literal, Protocol

from snapchain.destination.records import PointRecord
from snapchain.destination.writing import HeldLayer, LayerWriter
from snapchain.errors import Corrupt
from snapchain.image.view import View, read_pieces
from snapchain.model.extents import Extents
from snapchain.model.fingerprint import Fingerprint


class ReadLayer(Protocol):
    """What a chain shows beyond a base of it, as one layer. Read once, within the reader.

    name, image_format, cluster_size, sources: of the uppermost of its files, as `NewLayer` has them
    extents: its map: DATA are bytes that the view shows; data_bytes: of it
    """

    @property
    def name(self) -> str: ...

    @property
    def image_format(self) -> Literal["qcow2", "raw"]: ...

    @property
    def cluster_size(self) -> int: ...

    @property
    def sources(self) -> tuple[Fingerprint, ...]: ...

    @property
    def extents(self) -> Extents: ...

    def view(self, below: Callable[[], View] | None) -> View:
        """The disk up to this layer, to be read within `extents`, rounded out to leaves.

        below: gives what it lies on, at the cost of all maps of that chain; None for a root
        """
        ...

    def finish(self) -> None:
        """All of it was read. Raises Corrupt where the source only now finds that it is not what it was."""
        ...


class CopyReader(Protocol):
    """Points of one disk that are read, so that nobody takes away what they need.

    owner: who may write the disk in its epoch, as far as the source records it
    """

    @property
    def owner(self) -> str | None: ...

    def on_chain(self, point: int) -> Iterator[int]:
        """The points whose layer is on the chain of this one, itself included, uppermost first. Raises Corrupt."""
        ...

    def data_bytes(self, base: int | None, point: int) -> int:
        """DATA of the layers above the base, at most what `layers` gives. Reads records. Raises Corrupt."""
        ...

    def layers(self, base: int | None, point: int) -> Iterator[ReadLayer]:
        """What a point shows beyond a point of its chain, or all of it: layers, lowest first; none where nothing is.

        Each must be read before the next. Raises Corrupt, and Conflict where it is gone: look again.
        """
        ...

    def check_there(self) -> None:
        """Raises Conflict where what is read was collected meanwhile: an error of reading it is no damage then."""
        ...


class CopyWriter(LayerWriter, Protocol):
    """One disk of a destination, opened for points of another one."""

    def showing(self, size: int, content_id: str) -> HeldLayer | None:
        """A whole chain of the disk that shows this content, None where there is none. New layers may lie on it."""
        ...

    def view_of(self, layer: HeldLayer) -> View:
        """What the chain up to a layer that `showing` or `add` has given shows."""
        ...

    def publish_copy(self, top: HeldLayer, point: PointRecord, *, keeps_number: bool) -> int:
        """Make the point here, with its time, labels, holds and moment; its number here.

        keeps_number: the number that it has in the source, which may be lower than others here; else the next one
        Raises Conflict where that number was given here meanwhile, or the base was merged away.
        """
        ...

    def take_epoch(self) -> None:
        """Make the epoch and the owner of the source those of the disk, where they are newer."""
        ...


class GuardedView:
    """A view of the source that remembers whether reading it failed: the other side may raise Corrupt as well."""

    def __init__(self, inner: View) -> None:
        self._inner = inner
        self.error: Corrupt | None = None

    @property
    def size(self) -> int:
        """See `View`."""
        return self._inner.size

    def resolve(self) -> Extents:
        """See `View`."""
        return self._inner.resolve()

    def read_into(self, offset: int, buffer: memoryview, /) -> None:
        """See `View`."""
        self.read_pieces([(offset, buffer)])

    def read_pieces(self, pieces: Sequence[tuple[int, memoryview]], /) -> None:
        """See `ReadsPieces`."""
        try:
            read_pieces(self._inner, pieces)
        except Corrupt as error:
            self.error = error
            raise
