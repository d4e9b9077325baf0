"""Keeping some points of a disk of a repository, and merging the layers that they do not need.

Only records change; the data that nobody needs any more stays in the store until it is collected.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from datetime import UTC, datetime, tzinfo

from snapchain.destination.records import Finding, PointDecision, PointsMergePlan, PointsMergeReport
from snapchain.errors import Conflict, Corrupt, SnapchainError
from snapchain.model.collapse import Group, collapse_tree
from snapchain.model.events import Notice, OnEvent, Progress, Unit, ignore
from snapchain.model.holds import hold_reasons
from snapchain.model.retention import Rules, decide_by, is_future
from snapchain.repository.catalogue import ATTEMPTS, Catalogue, Point
from snapchain.repository.eras import newest
from snapchain.repository.index import BlobIndex
from snapchain.repository.layers import StoredLayer
from snapchain.repository.leases import Lease, Mode
from snapchain.repository.merging import NotProven, merge_layers
from snapchain.repository.packer import Packer
from snapchain.repository.repository import Repository
from snapchain.repository.verification import points_on


class RepositoryMerge:
    """A disk of a repository and the points of it that stay.

    What others do meanwhile is kept: points that are published or held after the plan was made are not dropped.
    """

    def __init__(
        self, repository: Repository, disk: str, rules: Rules, *, zone: tzinfo = UTC, now: datetime | None = None
    ) -> None:
        """now: the clock of this run."""
        self._repository = repository
        self._disk = repository.disk(disk)
        self._now = now or datetime.now(UTC)
        current = self._disk.existing()
        self._decisions = decide_by(current[0].points, rules, disk=disk, zone=zone, now=self._now, holds=hold_reasons)
        self._drop = frozenset(each.point.point for each in self._decisions if not each.kept)
        self._merged: dict[tuple[str, ...], StoredLayer] = {}
        self._damage: dict[tuple[str, ...], Corrupt] = {}
        self._settle(current)

    def _settle(self, current: tuple[Catalogue, str]) -> None:
        """Apply the decisions to a catalogue."""
        catalogue = current[0]
        self._current = current
        self._kept: tuple[Point, ...] = tuple(
            point for point in catalogue.points if point.point not in self._drop or point.holds
        )
        # Without a point no layer stays. The epoch and the next number do: an old master cannot come back.
        self._groups: tuple[Group, ...] = (
            collapse_tree(dict(catalogue.parents), {point.layer for point in self._kept}) if self._kept else ()
        )

    def plan(self) -> PointsMergePlan:
        """What `run` will do."""
        catalogue = self._current[0]
        merges = tuple(group.members for group in self._groups if group.is_merge)
        return PointsMergePlan(
            destination=self._repository.store.url,
            disk=catalogue.disk,
            points=tuple(
                PointDecision(
                    point=each.point.point,
                    time=each.point.time,
                    labels=each.point.labels,
                    kept=each.kept,
                    reasons=each.reasons,
                    of_the_future=is_future(each.point.time, self._now),
                )
                for each in self._decisions
            ),
            merges=merges,
            layers_before=len(catalogue.parents),
            layers_after=len(self._groups),
            strategy="records" if self._changes_something() else "none",
            bytes_dropped=self._dropped_bytes(),
            requests=3 * len(merges) + 2 * self._changes_something(),
        )

    def run(self, *, on_event: OnEvent = ignore) -> PointsMergeReport:
        """Merge and publish the new catalogue. Raises Conflict when others change the disk time and again."""
        bytes_dropped, changed = 0, False
        if self._changes_something():
            work = f"merge {self._disk.name}"
            with self._repository.lease(
                Mode.WRITE,
                work,
                on_wait=lambda words: on_event(Notice(words)),
                disks=[self._disk.name],
                spends=True,
            ) as lease:
                for attempt in range(ATTEMPTS):
                    # What was read before the lease was held may have been merged away and collected since.
                    self._settle(self._disk.existing())
                    self._current[0].check_not_renamed()
                    changed = self._changes_something()
                    try:
                        bytes_dropped = self._merge(lease, on_event) if changed else 0
                        break
                    except Conflict:
                        if attempt == ATTEMPTS - 1:
                            raise
        catalogue = self._current[0]
        kept = tuple(point.point for point in self._kept)
        return PointsMergeReport(
            destination=self._repository.store.url,
            disk=catalogue.disk,
            points_kept=kept,
            points_dropped=tuple(point.point for point in catalogue.points if point.point not in kept),
            points_of_the_future=tuple(point.point for point in self._kept if is_future(point.time, self._now)),
            merges=tuple(
                group.members for group in self._groups if group.is_merge and group.members not in self._damage
            ),
            layers_before=len(catalogue.parents),
            layers_after=len(self._groups) + sum(len(group) - 1 for group in self._damage),
            bytes_moved=0,
            bytes_freed=0,
            bytes_dropped=bytes_dropped,
            strategy="records" if changed else "none",
            findings=tuple(self._findings(catalogue)),
        )

    def _findings(self, catalogue: Catalogue) -> Iterator[Finding]:
        affected = points_on(catalogue)
        kept = {point.point for point in self._kept}
        for group, error in self._damage.items():
            points = {point for layer in group for point in affected.get(layer, ())} & kept
            yield Finding.of(error, catalogue.disk, sorted(points), "not merged: ")

    def _changes_something(self) -> bool:
        catalogue = self._current[0]
        return len(self._kept) < len(catalogue.points) or len(self._groups) < len(catalogue.parents)

    def _merge(self, lease: Lease, on_event: OnEvent) -> int:
        """Merge the groups, publish; guest bytes that no record names any more.

        A group of which a map is damaged stays as it is.
        """
        repository = self._repository
        self._damage = {}
        renamed: dict[str, str] = {}
        parents: dict[str, str | None] = {}
        before = after = 0
        index = BlobIndex(newest(repository.store)[0])
        with Packer(repository.store, repository.keys, index, pack_size=repository.pack_size) as packer:
            for done, group in enumerate(self._groups):
                on_event(Progress("merge", done, len(self._groups), Unit.LAYERS))
                members: Sequence[str] = group.members
                if group.is_merge:
                    try:
                        made, held = self._merged_group(group, packer)
                    except NotProven:
                        raise
                    except Corrupt as error:
                        self._damage[group.members] = error
                    else:
                        members = [made.id]
                        before, after = before + held, after + made.header.data_bytes
                below = None if group.parent is None else renamed[group.parent]
                for layer in members:
                    parents[layer], below = below, layer
                renamed[group.top] = members[-1]
        on_event(Progress("merge", len(self._groups), len(self._groups), Unit.LAYERS))
        points = tuple(point.model_copy(update={"layer": renamed[point.layer]}) for point in self._kept)
        before += self._dropped_bytes()
        lease.check()
        self._disk.advance(self._current, time=datetime.now(UTC), points=points, parents=parents)
        with suppress(SnapchainError):
            repository.record_damage()
        return before - after

    def _merged_group(self, group: Group, packer: Packer) -> tuple[StoredLayer, int]:
        """The layer that takes the place of a group, and how many guest bytes of data the group held."""
        layers = list(self._repository.layers(group.members).values())
        made = self._merged.get(group.members)
        if made is None:
            made = self._merged[group.members] = merge_layers(self._repository, layers, packer, root=group.is_root)
        return made, sum(layer.header.data_bytes for layer in layers)

    def _dropped_bytes(self) -> int:
        """Guest bytes of data in layers that no group takes over."""
        grouped = {layer for group in self._groups for layer in group.members}
        gone = [layer for layer in self._current[0].parents if layer not in grouped]
        try:
            return sum(layer.header.data_bytes for layer in self._repository.layers(gone).values())
        except Corrupt:
            return 0  # unknown
