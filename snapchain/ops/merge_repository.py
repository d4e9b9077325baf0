"""merge DEST::DISK: keep some points of a disk, and merge what they do not need.

Only records change; the data that nobody needs any more stays in the store until it is collected.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, tzinfo

from pydantic import BaseModel, ConfigDict

from snapchain.model.collapse import Group, collapse_tree
from snapchain.model.retention import Policy, decide
from snapchain.ops.events import Notice, OnEvent, Progress, ignore
from snapchain.repository.catalogue import Catalogue, Point
from snapchain.repository.holds import reasons
from snapchain.repository.layers import StoredLayer
from snapchain.repository.leases import Lease, Mode
from snapchain.repository.merging import merge_layers
from snapchain.repository.packer import Packer
from snapchain.repository.repository import Repository


class PointDecision(BaseModel):
    """What becomes of one point, and why."""

    model_config = ConfigDict(frozen=True)

    point: int
    time: datetime
    labels: tuple[str, ...]
    kept: bool
    reasons: tuple[str, ...]


class RepositoryMergePlan(BaseModel):
    """What a merge in a repository would do. merges: the layers that become one, lower first, each."""

    model_config = ConfigDict(frozen=True)

    destination: str
    disk: str
    points: tuple[PointDecision, ...]
    merges: tuple[tuple[str, ...], ...]
    layers_before: int
    layers_after: int


class RepositoryMergeReport(BaseModel):
    """What a merge in a repository did.

    bytes_moved: guest data read or written, always 0; bytes_dropped: guest bytes that no record names any more;
    bytes_freed: of the store, 0 until they are collected
    """

    model_config = ConfigDict(frozen=True)

    destination: str
    disk: str
    points_kept: tuple[int, ...]
    points_dropped: tuple[int, ...]
    layers_before: int
    layers_after: int
    bytes_moved: int
    bytes_freed: int
    bytes_dropped: int
    strategy: str


class RepositoryMerge:
    """A disk of a repository and the points of it that stay."""

    def __init__(
        self, repository: Repository, disk: str, policy: Policy, *, zone: tzinfo = UTC, now: datetime | None = None
    ) -> None:
        self._repository = repository
        self._disk = repository.disk(disk)
        self._current = self._disk.existing()
        self._catalogue: Catalogue = self._current[0]
        decided = decide(self._catalogue.points, policy, zone=zone, now=now, holds=reasons)
        self._decisions = decided
        self._kept: tuple[Point, ...] = tuple(each.point for each in decided if each.kept)
        self._groups: tuple[Group, ...] = collapse_tree(
            dict(self._catalogue.parents), {point.layer for point in self._kept}
        )

    def plan(self) -> RepositoryMergePlan:
        """What `run` will do."""
        return RepositoryMergePlan(
            destination=self._repository.store.url,
            disk=self._catalogue.disk,
            points=tuple(
                PointDecision(
                    point=each.point.point,
                    time=each.point.time,
                    labels=each.point.labels,
                    kept=each.kept,
                    reasons=each.reasons,
                )
                for each in self._decisions
            ),
            merges=tuple(group.members for group in self._groups if group.is_merge),
            layers_before=len(self._catalogue.parents),
            layers_after=len(self._groups),
        )

    def run(self, *, on_event: OnEvent = ignore) -> RepositoryMergeReport:
        """Merge and publish the new catalogue. Raises Conflict when the disk was changed meanwhile."""
        plan = self.plan()
        kept = {point.point for point in self._kept}
        dropped = tuple(point.point for point in self._catalogue.points if point.point not in kept)
        bytes_dropped = 0
        if plan.merges or dropped:
            work = f"merge {self._catalogue.disk}"
            lease = self._repository.lease(Mode.WRITE, work, on_wait=lambda words: on_event(Notice(words)))
            with lease:
                bytes_dropped = self._merge(lease, on_event)
        return RepositoryMergeReport(
            destination=plan.destination,
            disk=plan.disk,
            points_kept=tuple(sorted(kept)),
            points_dropped=dropped,
            layers_before=plan.layers_before,
            layers_after=plan.layers_after,
            bytes_moved=0,
            bytes_freed=0,
            bytes_dropped=bytes_dropped,
            strategy="records" if plan.merges or dropped else "none",
        )

    def _merge(self, lease: Lease, on_event: OnEvent) -> int:
        """Merge the groups, publish; guest bytes that are named no more."""
        repository = self._repository
        renamed: dict[str, str] = {}
        before = sum(repository.layer(layer).header.data_bytes for layer in self._catalogue.parents)
        after = 0
        index = repository.index()
        with Packer(repository.store, repository.keys, index) as packer:
            for done, group in enumerate(self._groups):
                on_event(Progress("merge", done, len(self._groups)))
                layers: Sequence[StoredLayer] = [repository.layer(layer) for layer in group.members]
                made = layers[0]
                if group.is_merge:
                    made = merge_layers(repository, layers, packer, root=group.is_root)
                renamed[group.top] = made.id
                after += made.header.data_bytes
        on_event(Progress("merge", len(self._groups), len(self._groups)))
        parents = {
            renamed[group.top]: None if group.parent is None else renamed[group.parent] for group in self._groups
        }
        points = tuple(point.model_copy(update={"layer": renamed[point.layer]}) for point in self._kept)
        lease.check()
        self._disk.advance(self._current, time=datetime.now(UTC), points=points, parents=parents)
        return before - after
