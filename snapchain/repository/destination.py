"""A repository as a Destination. Modules that few commands need are imported on use."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import UTC, datetime, tzinfo
from typing import TYPE_CHECKING

from snapchain.destination.reading import LeafSource, Work
from snapchain.destination.records import (
    DiskRecord,
    GcLimits,
    GcPlan,
    GcReport,
    HoldRecord,
    PointsMergePlan,
    PointsMergeReport,
    RenamePlan,
    RenameReport,
    RepairPlan,
    RepairReport,
    VerifyReport,
)
from snapchain.destination.summary import DiskSummary, summary_of
from snapchain.destination.traits import REPOSITORY, Traits
from snapchain.model import holds
from snapchain.model.events import Notice, OnEvent, ignore
from snapchain.objects.meter import traffic_of
from snapchain.repository.catalogue import Catalogue, Hold, Point, find_point
from snapchain.repository.crypto import Keyring
from snapchain.repository.disk_writer import RepositoryWriting
from snapchain.repository.reader import (
    RecordedLeaves,
    RepositoryPoint,
    WholePoint,
    point_leaves,
    point_record,
    read_point,
    whole_point,
)
from snapchain.repository.repository import Repository

if TYPE_CHECKING:
    from snapchain.destination.copying import CopyReader
    from snapchain.destination.usage import StoredUsage
    from snapchain.model.retention import Rules
    from snapchain.model.traffic import Traffic


@dataclass(frozen=True, slots=True)
class Collecting:
    """Work that frees the space of data that no point needs."""

    repository: Repository
    limits: GcLimits

    def plan(self) -> GcPlan:
        """As `collecting.plan`."""
        from snapchain.repository import collecting

        return collecting.plan(self.repository, self.limits)

    def run(self, *, on_event: OnEvent = ignore) -> GcReport:
        """As `collecting.run`."""
        from snapchain.repository import collecting

        return collecting.run(self.repository, self.limits, on_event=on_event)


class RepositoryDestination(RepositoryWriting):
    """See destination/protocol.py. repository: opened, for writing where anything is to be changed."""

    traits: Traits = REPOSITORY

    def __init__(self, repository: Repository) -> None:
        super().__init__(repository)
        self.repository = repository

    @property
    def url(self) -> str:
        return self.repository.store.url

    @property
    def notices(self) -> Sequence[str]:
        return self.repository.notices

    @property
    def keys(self) -> Keyring:
        """The keys of the repository's objects: for programs that read them by docs/format.md."""
        return self.repository.keys

    @property
    def encryption(self) -> str:
        return self.repository.config.encryption

    @property
    def traffic(self) -> Traffic | None:
        return traffic_of(self.repository.store)

    @property
    def id(self) -> str:
        return self.repository.config.id

    def disks(self, disk: str | None = None) -> tuple[DiskRecord, ...]:
        """All disks by name, or one, with their points. Raises NotFound."""
        if disk is not None:
            return (_disk_record(self.repository.catalogue(disk)),)
        return tuple(sorted(map(_disk_record, self.repository.each_catalogue()), key=lambda each: each.name))

    def summaries(self, disk: str | None = None, *, now: datetime | None = None) -> tuple[DiskSummary, ...]:
        """As `summaries.summaries`, with what verify has kept."""
        from snapchain.repository.verified import last_verified

        now = now or datetime.now(UTC)
        if disk is not None:
            found: tuple[DiskSummary, ...] = (summary_of(_disk_record(self.repository.catalogue(disk)), now),)
        else:
            from snapchain.repository.summaries import summaries

            found = summaries(self.repository, now)
        times = last_verified(self.repository.store, self.repository.keys)
        return tuple(
            each if (time := times.get(each.name)) is None else each.model_copy(update={"verified": time})
            for each in found
        )

    def usage(self, disk: str | None = None, *, on_event: OnEvent = ignore) -> StoredUsage:
        """As `usage.usage`."""
        from snapchain.repository.usage import usage

        return usage(self.repository, disk, on_event=on_event)

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
    ) -> AbstractContextManager[RepositoryPoint]:
        """As ReadableDestination. first: nothing is read ahead, so it is of no use here."""
        _ = first
        return read_point(
            self.repository,
            disk,
            point,
            chain=chain,
            clusters=clusters,
            maps_only=maps_only,
            damaged=damaged,
            on_event=on_event,
        )

    def leaves(
        self, disk: str, point: str | None = None, *, on_event: OnEvent = ignore
    ) -> AbstractContextManager[RecordedLeaves]:
        """A point, for comparing. Raises NotFound."""
        _ = on_event
        return point_leaves(self.repository, disk, point)

    def copying(
        self, disk: str, points: Sequence[int] | None = None, *, on_event: OnEvent = ignore
    ) -> AbstractContextManager[CopyReader]:
        """As ReadableDestination. Without points no lease is taken."""
        from snapchain.repository.copying import read_copies

        return read_copies(self.repository, disk, points, on_event=on_event)

    def whole(
        self, disk: str, point: str | None = None, *, damaged: bool = False, on_event: OnEvent = ignore
    ) -> AbstractContextManager[WholePoint]:
        """As ReadableDestination."""
        return whole_point(self.repository, disk, point, damaged=damaged, on_event=on_event)

    def verify(
        self,
        disk: str | None = None,
        *,
        share: float = 0.0,
        since: datetime | None = None,
        on_event: OnEvent = ignore,
    ) -> VerifyReport:
        """As `verification.verify`."""
        from snapchain.repository.verification import verify

        return verify(self.repository, disk=disk, share=share, since=since, on_event=on_event)

    def merging(
        self, disk: str, rules: Rules, *, zone: tzinfo = UTC, now: datetime | None = None
    ) -> Work[PointsMergePlan, PointsMergeReport]:
        """As `RepositoryMerge`."""
        from snapchain.repository.points_merge import RepositoryMerge

        return RepositoryMerge(self.repository, disk, rules, zone=zone, now=now)

    def renaming(self, old: str, new: str) -> Work[RenamePlan, RenameReport]:
        """As `renaming.renaming`."""
        from snapchain.repository.renaming import renaming

        return renaming(self.repository, old, new)

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
        catalogue = self.repository.catalogue(disk)
        number = find_point(catalogue, point).point
        if dry_run:
            make = Hold.made(tag, reason)
            points = holds.held(catalogue.points, number, tag, reason=reason, make=make, disk=disk)
            return number, _holds_of(points or catalogue.points, number)
        held = self.repository.hold(disk, number, tag, reason=reason, on_wait=lambda words: on_event(Notice(words)))
        return number, _holds_of([held], number)

    def release(
        self, disk: str, point: str, tag: str, *, dry_run: bool = False, on_event: OnEvent = ignore
    ) -> tuple[int, tuple[HoldRecord, ...]]:
        """As ReadableDestination."""
        catalogue = self.repository.catalogue(disk)
        number = find_point(catalogue, point).point
        if dry_run:
            return number, _holds_of(holds.released(catalogue.points, number, tag, disk=disk), number)
        left = self.repository.release(disk, number, tag, on_wait=lambda words: on_event(Notice(words)))
        return number, _holds_of([left], number)

    def repairing(self, sources: Sequence[LeafSource], *, read_data: bool = False) -> Work[RepairPlan, RepairReport]:
        """As ReadableDestination."""
        from snapchain.repository.repair import Repair

        return Repair(self.repository, sources, read_data=read_data)

    def collecting(self, limits: GcLimits | None = None) -> Collecting:
        """As ReadableDestination."""
        return Collecting(self.repository, limits or GcLimits())


def _holds_of(points: Sequence[Point], number: int) -> tuple[HoldRecord, ...]:
    found = next(point.holds for point in points if point.point == number)
    return tuple(HoldRecord(tag=hold.tag, since=hold.since, reason=hold.reason) for hold in found)


def _disk_record(catalogue: Catalogue) -> DiskRecord:
    lengths = catalogue.lengths()
    points = (
        point_record(point, lengths.get(point.layer) or len(catalogue.chain(point.layer))) for point in catalogue.points
    )
    return DiskRecord(name=catalogue.disk, epoch=catalogue.epoch, points=tuple(points), layers=len(catalogue.parents))
