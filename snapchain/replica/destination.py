"""A replica as a Destination: all that is asked of it goes over the stream, wherever it is.

What few commands do is loaded by those that do it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, tzinfo
from typing import TYPE_CHECKING, Literal
from zoneinfo import ZoneInfo

import numpy as np

from snapchain.destination.address import in_full
from snapchain.destination.reading import LeafSource, PointDisk, Sink, Work
from snapchain.destination.traits import REPLICA, Traits
from snapchain.errors import InvalidInput, NotFound, Unsupported
from snapchain.host.retry import RetryPolicy
from snapchain.model.content import LEAF_BYTES, ZERO_LEAF, Hashes, leaf_hash
from snapchain.model.events import OnEvent, ignore
from snapchain.model.extents import Extents, Int64s
from snapchain.model.holds import check_tag
from snapchain.replica.client import hold_at, points_at, release_at
from snapchain.replica.disk_writer import ReplicaWriting
from snapchain.replica.endpoint import Endpoint
from snapchain.replica.fetch_client import Answer, FetchedLayer, fetch
from snapchain.replica.stream.messages import HeldPoint, Hold

if TYPE_CHECKING:
    from snapchain.destination.copying import CopyReader
    from snapchain.destination.records import (
        DiskRecord,
        Finding,
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
    from snapchain.model.retention import Rules
    from snapchain.model.traffic import Traffic
    from snapchain.replica.stream.messages import BriefDisk

NOT_ENCRYPTED = "none"
MOST_RUNS = 1 << 23
"""Of all maps of a point together, 16 bytes each: a disk with more cannot be shown, and may be an attack."""


@dataclass(frozen=True, slots=True)
class ReplicaLayer:
    """A LayerReader over what is fetched."""

    fetched: FetchedLayer

    @property
    def peer(self) -> str:
        return self.fetched.peer

    @property
    def id(self) -> str:
        return self.fetched.id

    @property
    def name(self) -> str:
        return self.fetched.offer.name

    @property
    def format(self) -> Literal["qcow2"]:
        return "qcow2"

    @property
    def cluster_size(self) -> int:
        return self.fetched.offer.cluster_size

    @property
    def extended_l2(self) -> bool:
        return self.fetched.offer.extended_l2

    @property
    def extents(self) -> Extents:
        return self.fetched.extents

    def copy(self, sink: Sink, *, start: int = 0, on_copied: Callable[[int, int], None]) -> str:
        """As LayerReader. An older peer has not begun where it was asked to: what lies below `start` is passed over."""
        if sink.lost is not None:
            raise Unsupported("a replica does not name the ranges that are damaged", subject=self.peer)
        for batch in self.fetched.batches():
            wanted = [piece for piece in batch if piece.offset + piece.length > start]
            if not wanted:
                continue
            sink.write([(piece.offset, piece.data) for piece in wanted if piece.data is not None])
            for piece in wanted:
                if piece.data is None:
                    sink.zero(piece.offset, piece.length)
            on_copied(self.fetched.position, sum(piece.length for piece in wanted))
        return self.fetched.announced

    def cost(self, *, samples: bool = True) -> None:
        """As LayerReader: the files are read over there, and what crosses the link is known afterwards."""
        _ = samples


@dataclass(frozen=True, slots=True)
class ReplicaPoint:
    """A PointReader over the answer to FETCH."""

    answer: Answer
    point: PointRecord

    @property
    def data_bytes(self) -> int:
        return self.answer.data_bytes

    def layers(self) -> Iterator[ReplicaLayer]:
        """Root first. Raises Corrupt for an answer that contradicts itself, Unsupported for absurdly many extents."""
        runs = 0
        for layer in self.answer.layers():
            if self.answer.request.look:
                runs += len(layer.extents.at)
                if runs > MOST_RUNS:
                    raise Unsupported("its layers are cut into too many extents to be shown", subject=self.answer.peer)
                for _ in layer.batches():
                    raise AssertionError("no data comes where only maps were asked for")
            yield ReplicaLayer(layer)


class FetchedLeaves:
    """A PointLeaves: the point is fetched as it is compared, since a replica has no record of its leaves."""

    def __init__(self, name: str, layer: FetchedLayer) -> None:
        self.name, self._layer = name, layer
        self._found = self._hashed()
        self._next: tuple[int, bytes] | None = None

    @property
    def size(self) -> int:
        return self._layer.extents.size

    def parts(self) -> Sequence[tuple[object, Extents]]:
        """All as one layer."""
        return [(self._layer.id, self._layer.extents)]

    def leaves(self, first: int, stop: int) -> tuple[Int64s, Hashes]:
        """As PointLeaves."""
        index: list[int] = []
        hashes: list[bytes] = []
        while (found := self._next or next(self._found, None)) is not None:
            self._next = found
            if found[0] * LEAF_BYTES >= stop:
                break
            if found[0] * LEAF_BYTES >= first:
                index.append(found[0])
                hashes.append(found[1])
            self._next = None
        return np.array(index, np.int64), np.frombuffer(b"".join(hashes), np.uint8).reshape(-1, len(ZERO_LEAF))

    def finish(self) -> None:
        """Read what was not asked for: only then the other side has said that it all was as it is recorded."""
        for _ in self._found:
            pass

    def _hashed(self) -> Iterator[tuple[int, bytes]]:
        """(number, hash) of the leaves that are not all zero, ascending."""
        leaf, buffer = -1, bytearray()
        for batch in self._layer.batches():
            for piece in batch:
                at, stop = piece.offset, piece.offset + piece.length
                while at < stop:
                    if at // LEAF_BYTES != leaf:
                        yield from self._hash(leaf, buffer)
                        leaf, buffer = at // LEAF_BYTES, bytearray(LEAF_BYTES)
                    count = min(stop, (leaf + 1) * LEAF_BYTES) - at
                    if piece.data is not None:
                        skip = at - piece.offset
                        buffer[at % LEAF_BYTES : at % LEAF_BYTES + count] = piece.data[skip : skip + count]
                    at += count
        yield from self._hash(leaf, buffer)

    def _hash(self, leaf: int, buffer: bytearray) -> Iterator[tuple[int, bytes]]:
        digest = (
            leaf_hash(memoryview(buffer)[: min(LEAF_BYTES, self.size - leaf * LEAF_BYTES)]) if buffer else ZERO_LEAF
        )
        if digest != ZERO_LEAF:
            yield leaf, digest


class ReplicaDestination(ReplicaWriting):
    """See destination/protocol.py. limit_rate: bytes a second on the wire."""

    traits: Traits = REPLICA
    id: str | None = None
    encryption = NOT_ENCRYPTED
    traffic: Traffic | None = None

    def __init__(self, endpoint: Endpoint, *, limit_rate: int | None = None) -> None:
        super().__init__(endpoint, policy=RetryPolicy(), limit_rate=limit_rate)

    @property
    def url(self) -> str:
        return self.endpoint.url

    @property
    def notices(self) -> Sequence[str]:
        return ()

    def disks(self, disk: str | None = None) -> tuple[DiskRecord, ...]:
        """All disks by name, or one. Raises NotFound, Unavailable when the link breaks. Changes nothing there."""
        from snapchain.destination.records import DiskRecord

        return tuple(
            DiskRecord(
                name=each.name,
                epoch=each.epoch,
                points=tuple(map(_point_record, each.points)),
                layers=max((point.layers for point in each.points), default=0),  # all points lie on one chain
            )
            for each in points_at(self.endpoint, disk)
        )

    def summaries(self, disk: str | None = None, *, now: datetime | None = None) -> tuple[DiskSummary, ...]:
        """As ReadableDestination. An older peer lists all points, and lets one disk that it cannot read hide all."""
        from snapchain.destination.summary import summary_of, with_guests
        from snapchain.replica.client import summaries_at

        briefs = summaries_at(self.endpoint) if disk is None else None
        if briefs is not None:
            return with_guests(map(_summary, briefs))
        now = now or datetime.now(UTC)
        return with_guests(summary_of(each, now) for each in self.disks(disk))

    def usage(self, disk: str | None = None, *, on_event: OnEvent = ignore) -> StoredUsage:
        """As ReadableDestination. Nothing is shared between disks: a file is measured by the blocks that it takes."""
        _ = on_event
        from snapchain.destination.usage import DiskUsage, KindUsage, StoredUsage, disk_usage
        from snapchain.replica.client import files_at

        found = []
        count = 0
        for files, points in files_at(self.endpoint):
            trouble = _finding_of(files.disk, files.kind, files.message)
            if trouble is not None:
                found.append(DiskUsage(disk=files.disk, trouble=trouble))
                continue
            count += files.files
            found.append(
                disk_usage(
                    files.disk,
                    [(each.point, each.time) for each in points],
                    [each.added for each in points],
                    lists_points=files.disk == disk,
                    stored_bytes=files.stored,
                    own_bytes=files.stored,
                    data_bytes=files.data,
                    other_bytes=files.other,
                )
            )
        if disk is not None and all(each.disk != disk for each in found):
            raise NotFound(f"there is no disk {disk!r} here", subject=self.url)
        return StoredUsage(
            destination=self.url,
            kinds=(KindUsage(kind="layers", objects=count, bytes=sum(each.stored_bytes for each in found)),),
            disks=tuple(sorted(found, key=lambda each: each.disk)),
            data_bytes=sum(each.data_bytes for each in found),
            findings=tuple(each.trouble for each in found if each.trouble is not None),
        )

    @contextmanager
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
    ) -> Iterator[ReplicaPoint]:
        """As ReadableDestination. clusters: the files of a replica hold whole clusters; damaged: none are named."""
        _ = clusters, damaged, on_event
        with fetch(
            self.endpoint, disk, in_full(point), chain=chain, look=maps_only, first=first, limit_rate=self.limit_rate
        ) as answer:
            yield ReplicaPoint(answer, _point_record(answer.point))

    @contextmanager
    def leaves(self, disk: str, point: str | None = None, *, on_event: OnEvent = ignore) -> Iterator[FetchedLeaves]:
        """As ReadableDestination. All data of the point cross the link."""
        _ = on_event
        with fetch(self.endpoint, disk, in_full(point), limit_rate=self.limit_rate) as answer:
            for layer in answer.layers():
                found = FetchedLeaves(f"{self.url}::{disk}@{answer.point.point}", layer)
                yield found
                found.finish()

    def copying(
        self, disk: str, points: Sequence[int] | None = None, *, on_event: OnEvent = ignore
    ) -> AbstractContextManager[CopyReader]:
        """As ReadableDestination. The files are locked for reading while their layers are fetched: a merge waits."""
        from snapchain.replica.copying import read_copies

        return read_copies(self, disk, points, on_event=on_event)

    def whole(
        self, disk: str, point: str | None = None, *, damaged: bool = False, on_event: OnEvent = ignore
    ) -> AbstractContextManager[PointDisk]:
        """As ReadableDestination. The files are locked for reading: a merge waits. Raises Unsupported over ssh."""
        _ = damaged, on_event
        directory = self.endpoint.directory
        if directory is None:
            raise Unsupported(
                "a point of a replica on another host cannot be read at any offset",
                subject=self.url,
                hint="run it on that host, with dir:/path; a socket there can be forwarded: "
                "ssh -L /run/local.sock:/run/remote.sock HOST",
            )
        from snapchain.replica.fetch_server import whole_point

        return whole_point(directory, disk, in_full(point))

    def verify(
        self,
        disk: str | None = None,
        *,
        share: float = 0.0,
        since: datetime | None = None,
        on_event: OnEvent = ignore,
    ) -> VerifyReport:
        """As `verify_replica`. share: each layer is read with that probability.

        No data cross the link, so a rate has nothing to limit. Raises InvalidInput for `since`: a replica keeps no
        record of what was read.
        """
        if since is not None:
            raise InvalidInput(
                "a replica keeps no record of what was verified, so it cannot leave out what was read before",
                subject=self.url,
                hint="leave out --max-age; --sample 5% reads a share",
            )
        if not 0 <= share <= 1:
            raise InvalidInput(f"a share of {share:.0%} of the data", hint="0% to 100%")
        from snapchain.replica.verification import verify_replica

        return verify_replica(self.endpoint, disk, share=share, on_event=on_event)

    def merging(
        self, disk: str, rules: Rules, *, zone: tzinfo = UTC, now: datetime | None = None
    ) -> Work[PointsMergePlan, PointsMergeReport]:
        """As `ReplicaMerge`; its own host's clock counts. Raises InvalidInput for a time zone that has no name."""
        from snapchain.replica.points_merge import ReplicaMerge

        _ = now
        return ReplicaMerge(self.endpoint, disk, rules, zone=_name_of(zone))

    def renaming(self, old: str, new: str) -> Work[RenamePlan, RenameReport]:
        """Raises Unsupported: overlays of guests name the files of a replica by their paths."""
        _ = old, new
        raise Unsupported(
            "a replica's disks cannot be renamed: guests open their files by path",
            subject=self.url,
            hint="send the image under the new name, and forget the old disk: snapchain forget DEST::OLD --all-points",
        )

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
        """As ReadableDestination."""
        _ = on_event
        check_tag(tag)
        held = hold_at(self.endpoint, disk, in_full(point), tag, reason=reason, dry_run=dry_run)
        return held.point, _hold_records(held.holds)

    def release(
        self, disk: str, point: str, tag: str, *, dry_run: bool = False, on_event: OnEvent = ignore
    ) -> tuple[int, tuple[HoldRecord, ...]]:
        """As ReadableDestination."""
        _ = on_event
        held = release_at(self.endpoint, disk, in_full(point), check_tag(tag), dry_run=dry_run)
        return held.point, _hold_records(held.holds)

    def repairing(self, sources: Sequence[LeafSource], *, read_data: bool = False) -> Work[RepairPlan, RepairReport]:
        """Raises InvalidInput: a replica's files come whole from their source."""
        _ = sources, read_data
        raise InvalidInput(
            "this command takes a repository, and that is a replica",
            subject=self.url,
            hint="send the disk to the replica again: snapchain send IMAGE DEST::DISK --cut-replica",
        )

    def collecting(self, limits: GcLimits | None = None) -> Work[GcPlan, GcReport]:
        """Raises InvalidInput: what a merge frees at a replica is free at once."""
        _ = limits
        raise InvalidInput(
            "this command takes a repository, and that is a replica",
            subject=self.url,
            hint="a merge at a replica gives its space back at once: snapchain merge DEST::DISK --keep-last 7",
        )


def _hold_records(holds: Sequence[Hold]) -> tuple[HoldRecord, ...]:
    from snapchain.destination.records import HoldRecord

    return tuple(HoldRecord(tag=hold.tag, since=hold.since, reason=hold.reason) for hold in holds)


def _point_record(point: HeldPoint) -> PointRecord:
    from snapchain.destination.records import PointRecord
    from snapchain.model.retention import is_future

    return PointRecord(
        point=point.point,
        time=point.time,
        labels=point.labels,
        virtual_size=point.size,
        content_id=point.content_id,
        layers=point.layers,
        holds=_hold_records(point.holds),
        of_the_future=is_future(point.time, datetime.now(UTC)),
        instant=point.instant,
        consistency=point.consistency,
    )


def _summary(brief: BriefDisk) -> DiskSummary:
    from snapchain.destination.summary import DiskSummary, PointSummary, possible_guest

    return DiskSummary(
        name=brief.disk,
        epoch=brief.epoch,
        points=brief.points,
        layers=brief.layers,
        newest=tuple(PointSummary(point=each.point, time=each.time, virtual_size=each.size) for each in brief.newest),
        guest=possible_guest(brief.disk) if brief.of_guest else None,
        trouble=_finding_of(brief.disk, brief.kind, brief.message),
    )


def _finding_of(disk: str, kind: str | None, message: str) -> Finding | None:
    from snapchain.destination.records import Finding
    from snapchain.replica.stream.session import printable

    if kind is None:
        return None
    return Finding(kind=printable(kind), subject=None, message=printable(message), disk=disk, points=())


def _name_of(zone: tzinfo) -> str:
    if zone is UTC:
        return "UTC"
    if isinstance(zone, ZoneInfo) and zone.key is not None:
        return zone.key
    raise InvalidInput("a time zone without a name means nothing to another host", hint="ZoneInfo('Europe/Berlin')")
