"""Writing to a destination: what a disk's newest point is made of there, new layers on it, and points.

    with destination.look(opening) as writer: ...                      a plan: nothing is written
    destination.write(opening, work)                                   work(writer), again as the kind's policy says

Every kind implements `Writing` and `LayerWriter` in its own folder. Leases, avoidance of damage, epochs, resumed
transfers, throttling and retries stay behind them: a use case names the layers and the points, and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol, TypeVar

from snapchain.image.leaves import LeafTable
from snapchain.image.view import View
from snapchain.model.consistency import Consistency
from snapchain.model.content import Hashes, Sum
from snapchain.model.events import OnEvent
from snapchain.model.extents import Extents, Int64s
from snapchain.model.fingerprint import Fingerprint
from snapchain.model.guest_state import GuestChange, GuestStanding

if TYPE_CHECKING:
    from snapchain.destination.copying import CopyWriter

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True, kw_only=True)
class Opening:
    """Which disk is written.

    epoch: in which this host writes it; epoch_named: whether its user named that epoch
    limit_rate: bytes a second to the destination, where its kind limits each transfer
    of_guest: points with a moment will be published; then the other side must support them, which is asked first
    """

    disk: str
    epoch: int = 1
    epoch_named: bool = False
    limit_rate: int | None = None
    of_guest: bool = False


@dataclass(frozen=True, slots=True)
class Moment:
    """The guest point that a disk's point belongs to. instant: 32 hex digits, one for all its disks."""

    instant: str
    consistency: Consistency


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class HeldLayer:
    """A layer of the disk's newest chain, as the destination records it.

    name: of its file there, or of the file that it was read from; size: virtual, bytes
    sources: keys of the files that it was made of, lowest first; empty where they are not known
    content_id, total: of the chain up to it; image_format: of the uppermost file, None where it is not recorded
    """

    id: str
    name: str
    size: int
    sources: tuple[Hashable, ...]
    content_id: str
    total: Sum
    image_format: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class NewLayer:
    """A layer to be written.

    name: of the uppermost of the files that it is made of; image_format: of that file
    cluster_size, grain: of the file that can hold it, bytes; finer than a cluster only by its subclusters
    sources: keys of those files, lowest first
    extents: its map, of the view's size: DATA are bytes that `view` shows there
    view: the disk up to this layer; below: what it lies on, None for a root
    below_sum: the content sum of that; same_below: whether the destination shows there what `below` does
    amount: bytes that `LayerWriter.add` counts until the layer has arrived
    """

    name: str
    image_format: Literal["qcow2", "raw"]
    cluster_size: int
    grain: int
    sources: tuple[Fingerprint, ...]
    extents: Extents
    view: View
    below: View | LeafTable | None
    below_sum: Sum
    same_below: bool = True
    amount: int = 0


@dataclass(frozen=True, slots=True)
class Traffic:
    """What a writer has moved so far, bytes.

    read: from the source; stored: new at the destination; sent: on the wire; data: DATA of the layers' maps
    carried: those of them that travelled, before compression; resumed: whether an earlier transfer was continued
    """

    read: int = 0
    stored: int = 0
    sent: int = 0
    data: int = 0
    carried: int = 0
    resumed: bool = False


@dataclass(frozen=True, slots=True)
class Finished:
    """What became of the points. points: their numbers; None where nobody answers. damaged: as `ShipReport` has it."""

    points: tuple[int, ...] | None
    damaged: tuple[int, ...] = ()


class NewestLeaves(Protocol):
    """The leaf hashes of the newest content, in portions of bounded size."""

    def portions(self) -> Iterator[tuple[int, Int64s, Hashes]]:
        """(where the portion ends, leaf numbers, hashes) in guest order; only leaves that are not all zero.

        The ends are guest offsets at multiples of a leaf, but for the last, which is the size of the disk.
        """
        ...


class DiskLook(Protocol):
    """One disk of a destination as it stands.

    held: the newest point's chain, root first, as far up as new layers can lie on it
    branches: whether points of one disk may lie on different chains
    believed: whether content sums there are this user's own records, which need not be counted again here
    mends: whether layers that are there already are written again, since they are damaged: each file as one layer
    """

    @property
    def held(self) -> Sequence[HeldLayer]: ...

    @property
    def branches(self) -> bool: ...

    @property
    def believed(self) -> bool: ...

    @property
    def mends(self) -> bool: ...

    def leaves(self) -> NewestLeaves:
        """What the newest chain shows, for comparing. Raises Unsupported where the other side is too old for it."""
        ...

    def fitted(self, layer: NewLayer) -> NewLayer:
        """The layer as this kind holds it: its map, and the amount that `LayerWriter.add` will count."""
        ...


class LayerWriter(DiskLook, Protocol):
    """One disk of a destination, opened for one shipment."""

    @property
    def traffic(self) -> Traffic: ...

    def cut(self, keep: str | None, /) -> None:
        """Drop all layers above `keep` (None: all there are), and the points that they give."""
        ...

    def add(
        self, layer: NewLayer, parent: HeldLayer | None, *, confirm: Callable[[], None], on_bytes: Callable[[int], None]
    ) -> HeldLayer:
        """Write one fitted layer on top of `parent`.

        confirm: called when all is read and before the layer counts; raises where the source was modified
        on_bytes: called in any thread with how many bytes of all amounts together have arrived by now
        """
        ...

    def publish(self, top: HeldLayer, *, time: datetime, labels: Sequence[str], moment: Moment | None = None) -> None:
        """Make a point of the chain that ends in `top`. moment: of the guest point that it belongs to.

        Raises Conflict where its base was merged away meanwhile, Unsupported where the other side is too old for
        points with a moment.
        """
        ...

    def finish(self) -> Finished:
        """Wait until everything is durable."""
        ...


class TakesLayers(Protocol):
    """What layers can be written to. url: for people."""

    @property
    def url(self) -> str: ...

    def write(self, opening: Opening, work: Callable[[LayerWriter], Result], *, on_event: OnEvent) -> Result:
        """Call `work` with a writer, and again with a new one as long as this kind's policy says that it helps.

        Raises Busy, Conflict and Unavailable as the kind does, and what `work` raises.
        """
        ...

    def guest_state(self, guest: str) -> GuestStanding:
        """How a guest stands: who may run it, and in which epoch; protected where nothing is recorded.

        Raises NotFound where there is no such guest, Unsupported for a peer that is too old.
        """
        ...


class Writing(TakesLayers, Protocol):
    """The part of a destination that takes layers, shows what it has of them, and records who may write them."""

    def look(self, opening: Opening, *, on_event: OnEvent) -> AbstractContextManager[DiskLook]:
        """Open a disk to see what it holds; nothing is written."""
        ...

    def write_copy(
        self, opening: Opening, owner: str | None, work: Callable[[CopyWriter], Result], *, on_event: OnEvent
    ) -> Result:
        """As `write`, for points of another destination. owner: who may write the disk in the epoch of `opening`.

        Raises Unsupported where the traits have no `branches`.
        """
        ...

    def change_guest(self, change: GuestChange) -> tuple[GuestStanding, Mapping[str, Path]]:
        """Take one step to another state: the epochs of all disks are raised with it, or none. May be repeated.

        Returns how the guest stands then, and for PROMOTE, where the traits have `bootable_files`, a writable overlay
        on the point of each disk, by the disk's name.
        Raises Conflict for a step that is not legal or comes too late, NotFound, Busy, and Unavailable where it is not
        known whether it was taken.
        """
        ...
