"""Reading a destination: what disks it has, the bytes of a point, what is wrong with it, and letting go of points."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import UTC, datetime, tzinfo
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, TypeVar, runtime_checkable

from snapchain.destination.traits import Traits
from snapchain.errors import Corrupt
from snapchain.model.content import Hashes
from snapchain.model.events import OnEvent, ignore
from snapchain.model.extents import Extents, Int64s
from snapchain.model.first_reads import FirstReads
from snapchain.model.guest_checks import GuestCheck, GuestChecks

if TYPE_CHECKING:
    from snapchain.destination.copying import CopyReader
    from snapchain.destination.records import (
        DiskRecord,
        GcLimits,
        GcPlan,
        GcReport,
        HoldRecord,
        PointRecord,
        PointsMergePlan,
        PointsMergeReport,
        RenamePlan,
        RenameReport,
        RepairPlan,
        RepairReport,
        VerifyReport,
    )
    from snapchain.destination.summary import DiskSummary
    from snapchain.destination.usage import StoredUsage
    from snapchain.host.shared_cache import SharedCache
    from snapchain.model.retention import Rules
    from snapchain.model.traffic import Traffic

PlanT_co = TypeVar("PlanT_co", covariant=True)
ReportT_co = TypeVar("ReportT_co", covariant=True)


def leave(offset: int, length: int) -> None:
    """Zeroes in a new file: it reads as zeroes already."""


@dataclass(frozen=True, slots=True)
class Sink:
    """Where DATA goes; may be called from several threads, in any order.

    write: (offset, guest bytes) of some pieces, ascending
    zero: (offset, length) of ranges among the DATA that are all zero
    lost: (start, stop, error) of guest ranges that are damaged, in guest order: they are zeroed instead. None: the
    first one ends the copy with its error
    is_proven: whether the caller reads back all that it was given, and compares its content id with the one that the
    copy returns: then nothing needs proof before it is given
    """

    write: Callable[[Sequence[tuple[int, memoryview]]], None]
    zero: Callable[[int, int], None] = leave
    lost: Callable[[int, int, Corrupt], None] | None = None
    is_proven: bool = False


@dataclass(frozen=True, slots=True)
class ReadingCost:
    """What reading a layer takes. requests, stored_bytes: to fetch its data into a file

    seconds: as long as the beginning took, for all of it; None where the beginning cannot be read, or is not
    """

    requests: int
    stored_bytes: int
    seconds: float | None


class LayerReader(Protocol):
    """A layer of a point, or the whole point as one layer.

    peer: who says what it holds, where that is not proven as it is read
    id: the same at each reading; name: for people; format: of the file that it was
    extents: which ranges it has as DATA, which as ZERO
    """

    @property
    def peer(self) -> str | None: ...

    @property
    def id(self) -> str: ...

    @property
    def name(self) -> str: ...

    @property
    def format(self) -> Literal["qcow2", "raw"]: ...

    @property
    def cluster_size(self) -> int: ...

    @property
    def extended_l2(self) -> bool: ...

    @property
    def extents(self) -> Extents: ...

    def copy(self, sink: Sink, *, start: int = 0, on_copied: Callable[[int, int], None]) -> str:
        """Give all DATA at or above guest offset `start` to the sink; the content id that the chain up to here has.

        on_copied: called in guest order with (offset below which everything was given, bytes since the last call)
        Where the sink takes what is lost, the id is that of the content with zeroes there.
        Raises Corrupt, naming the guest range that is lost; Unsupported for such a sink, where `names_damage` is False.
        """
        ...

    def cost(self, *, samples: bool = True) -> ReadingCost | None:
        """What reading all of it will take, by its map and a look at its beginning; None where that is not known.

        samples: whether the beginning is read, which tells the seconds
        """
        ...


class PointReader(Protocol):
    """A point that is being read. data_bytes: DATA of all layers."""

    @property
    def point(self) -> PointRecord: ...

    @property
    def data_bytes(self) -> int: ...

    def layers(self) -> Iterator[LayerReader]:
        """The layers, root first; each must be copied before the next is asked for, unless only maps are read."""
        ...


class PointLeaves(Protocol):
    """A point, for comparing: its size, the maps of its layers, and the hashes of its leaves.

    parts: (identity, map) of its layers, root first
    """

    @property
    def name(self) -> str: ...

    @property
    def size(self) -> int: ...

    def parts(self) -> Sequence[tuple[object, Extents]]: ...

    def leaves(self, first: int, stop: int) -> tuple[Int64s, Hashes]:
        """Numbers and hashes of the leaves of [first, stop) that are not all zero, ascending.

        Asked for in guest order, each range once.
        """
        ...


class LeafSource(Protocol):
    """A place that may still have data that a destination has lost. Content decides: leaves are asked for by hash.

    name: for people
    """

    @property
    def name(self) -> str: ...

    def locate(self, wanted: Collection[bytes]) -> Collection[bytes]:
        """The hashes, of those wanted, of which this place has a leaf. Remembers where."""
        ...

    def read(self, located: Collection[bytes]) -> Iterator[tuple[bytes, bytes]]:
        """(hash, the 65,536 bytes) of leaves that `locate` found, in any order; without those that cannot be read."""
        ...

    def whole(self, size: int, content_id: str) -> WholeDisk | None:
        """A disk here that shows this content as a whole, None where there is none that can be read at any offset."""
        ...


class WholeDisk(Protocol):
    """A disk that can be read at any offset. extents: its map, DATA where it may hold data, ZERO elsewhere."""

    @property
    def size(self) -> int: ...

    @property
    def extents(self) -> Extents: ...

    def read_into(self, offset: int, buffer: memoryview, /) -> None: ...


class PointDisk(WholeDisk, Protocol):
    """A point as a WholeDisk. content_id: as it is recorded"""

    @property
    def content_id(self) -> str: ...


class StoredBlob(NamedTuple):
    """Bytes that a destination stores once, whatever refers to them. size: bytes unpacked

    where: the object that holds it, its offset there, its stored bytes; what follows is for the destination alone
    """

    id: bytes
    size: int
    where: tuple[str, int, int, *tuple[Any, ...]]


class Part(NamedTuple):
    """Guest bytes [start, stop): those of a blob from `skip` on; zeroes where there is none. lost: why they are lost"""

    start: int
    stop: int
    blob: StoredBlob | None = None
    skip: int = 0
    lost: Corrupt | None = None


@runtime_checkable
class BlobDisk(Protocol):
    """A WholeDisk whose bytes are those of blobs, so that a reader can keep the unpacked blobs. Thread-safe."""

    def parts(self, start: int, stop: int, /) -> Sequence[Part]:
        """The parts that give the bytes of [start, stop), ascending, without a gap. Raises Corrupt, Unavailable."""
        ...

    def load(self, blobs: Sequence[StoredBlob], /) -> Iterator[tuple[StoredBlob, bytes]]:
        """Each blob with its bytes, in any order; blobs of any disk of the destination. Raises Corrupt, Unavailable."""
        ...


@runtime_checkable
class SharesBlobs(Protocol):
    """A BlobDisk that can read through a cache of this host."""

    def load_shared(self, blobs: Sequence[StoredBlob], cache: SharedCache, /) -> Iterator[tuple[StoredBlob, bytes]]:
        """As `load`. What is found in the cache is proven like what comes from the destination."""
        ...


@runtime_checkable
class RecordsFirstReads(Protocol):
    """A WholeDisk that remembers what clients read first of any point of its disk. Nothing but speed depends on it."""

    def first_reads(self) -> FirstReads:
        """As it was recorded last; nothing where it was not. Raises Corrupt, Unsupported, Unavailable."""
        ...

    def note_first_reads(self, reads: FirstReads, /) -> None:
        """Record it in the place of what was. Whoever may read may do so. Raises what the store refuses."""
        ...


class Work(Protocol[PlanT_co, ReportT_co]):
    """A change that was prepared: what it would do, and doing it."""

    def plan(self) -> PlanT_co:
        """What `run` will do; changes nothing."""
        ...

    def run(self, *, on_event: OnEvent = ignore) -> ReportT_co:
        """Do it. What an error leaves half done is as good as not begun, or the next run finishes it."""
        ...


class ReadableDestination(Protocol):
    """Points of disks, at one place, as far as they are read and kept.

    url: for people; notices: what its user should know; encryption: the name of its cipher, or none
    id: by which it is known whatever its address, None for a kind that has none
    """

    @property
    def url(self) -> str: ...

    @property
    def traits(self) -> Traits: ...

    @property
    def notices(self) -> Sequence[str]: ...

    @property
    def encryption(self) -> str: ...

    @property
    def traffic(self) -> Traffic | None:
        """What was asked of its store so far, None where that is not counted: a directory, a replica."""
        ...

    @property
    def id(self) -> str | None: ...

    def disks(self, disk: str | None = None) -> tuple[DiskRecord, ...]:
        """All disks by name, or one, with their points. Raises NotFound."""
        ...

    def summaries(self, disk: str | None = None, *, now: datetime | None = None) -> tuple[DiskSummary, ...]:
        """All disks by name, or one, at a glance. now: the clock that says which points are of the future

        Of all disks, one that cannot be read is a summary with its trouble. Raises NotFound, and what keeps the
        destination from answering at all.
        """
        ...

    def usage(self, disk: str | None = None, *, on_event: OnEvent = ignore) -> StoredUsage:
        """What is stored, by disk. disk: of which each point is listed, with what it added

        Raises NotFound, and Unsupported for a peer that is too old.
        """
        ...

    def reader(
        self,
        disk: str,
        point: str | None = None,
        *,
        chain: bool = False,
        clusters: bool = True,
        maps_only: bool = False,
        first: tuple[int, int] = (0, 0),
        damaged: bool = False,
        on_event: OnEvent = ignore,
    ) -> AbstractContextManager[PointReader]:
        """Read a point: one layer that shows all of it, or with `chain` the layers that it is made of.

        point: the text after '@' of an address
        clusters: maps are rounded to whole clusters, as a qcow2 file needs them; maps_only: no data is read
        first: number of the layer, from 0, and guest offset from which on data are wanted; layers below give none
        damaged: where a part of the map is lost, the layer is read too, and `copy` tells the sink; not with `chain`
        Raises NotFound, Corrupt, Unavailable, and Unsupported for a peer that cannot begin in the middle.
        """
        ...

    def leaves(
        self, disk: str, point: str | None = None, *, on_event: OnEvent = ignore
    ) -> AbstractContextManager[PointLeaves]:
        """A point, for comparing. Raises NotFound."""
        ...

    def copying(
        self, disk: str, points: Sequence[int] | None = None, *, on_event: OnEvent = ignore
    ) -> AbstractContextManager[CopyReader]:
        """Read points of a disk, to copy them to another destination. points: their numbers; None: records only

        Raises NotFound, and Conflict where they were dropped and collected meanwhile.
        """
        ...

    def whole(
        self, disk: str, point: str | None = None, *, damaged: bool = False, on_event: OnEvent = ignore
    ) -> AbstractContextManager[PointDisk]:
        """A point that can be read at any offset. What it needs stays for as long as it is open.

        damaged: where a part of the map is lost, the rest can be read
        Raises NotFound, Unsupported where points are read in one go.
        """
        ...

    def verify(
        self,
        disk: str | None = None,
        *,
        share: float = 0.0,
        since: datetime | None = None,
        on_event: OnEvent = ignore,
    ) -> VerifyReport:
        """Check the records, and a share (0 to 1) of the data. Findings are values, not errors.

        since: data that was read and found good at this time or later is not read again
        Raises NotFound, and InvalidInput for a share, or a time, that this kind of destination does not allow.
        """
        ...

    def guest_checks(self, guest: str) -> GuestChecks:
        """What came of the last checks of a guest, as they were recorded here. Raises Unsupported as `note_check`."""
        ...

    def note_check(self, check: GuestCheck) -> None:
        """Record a check, in the place of the last one of its kind. Whoever may read the guest may do so.

        Raises NotFound where there is no such guest, Unsupported for a peer that is too old.
        """
        ...

    def merging(
        self, disk: str, rules: Rules, *, zone: tzinfo = UTC, now: datetime | None = None
    ) -> Work[PointsMergePlan, PointsMergeReport]:
        """Keep the points that the rules name, and merge the layers that they do not need.

        rules: a policy, or the points that go by their numbers
        now: the clock of this run, where the destination takes it from here
        Raises NotFound, Unsupported for a peer that is too old.
        """
        ...

    def renaming(self, old: str, new: str) -> Work[RenamePlan, RenameReport]:
        """Give a disk, or a guest, another name. Points, holds, epochs and next numbers go along.

        The old name is refused from then on. Raises NotFound, InvalidInput for a name that is taken, Unsupported for
        one disk of a guest, a guest whose state is recorded, and a kind that cannot do it.
        """
        ...

    def hold(
        self,
        disk: str,
        point: str,
        tag: str,
        *,
        reason: str = "",
        dry_run: bool = False,
        on_event: OnEvent = ignore,
    ) -> tuple[int, tuple[HoldRecord, ...]]:
        """Keep a point whatever the rules say; its number, and all holds that it has then.

        A tag that it has already keeps its date and gets this reason. dry_run: change nothing.
        Raises NotFound, InvalidInput for a bad tag, Unsupported for a peer that is too old.
        """
        ...

    def release(
        self, disk: str, point: str, tag: str, *, dry_run: bool = False, on_event: OnEvent = ignore
    ) -> tuple[int, tuple[HoldRecord, ...]]:
        """Take a hold off a point; as `hold`. Raises NotFound when the point has none of this tag."""
        ...

    def repairing(self, sources: Sequence[LeafSource], *, read_data: bool = False) -> Work[RepairPlan, RepairReport]:
        """Store again what is lost, from places that still have it.

        read_data: read everything first, to find damage that nobody has met yet
        Raises InvalidInput where this kind of destination is made good in another way.
        """
        ...

    def collecting(self, limits: GcLimits | None = None) -> Work[GcPlan, GcReport]:
        """Give back the space of what no point needs. Raises Unsupported where the traits need no collecting."""
        ...
