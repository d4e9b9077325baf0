"""merge ssh://host/path::DISK: keep some points of a disk at a replica, and merge the layers that they do not need.

It is done where the replica is, by the engine that merges local files: nothing but the rules and the report cross the
link.  The files of the kept points keep their names and read as before.
"""

from __future__ import annotations

from datetime import UTC, datetime

from pydantic import BaseModel, ConfigDict

from snapchain.model.events import OnEvent, Progress, ignore
from snapchain.model.retention import Policy, is_future
from snapchain.ops.merge_repository import PointDecision
from snapchain.ops.replica_waiting import waiting
from snapchain.replica.client import Answer, merged_at
from snapchain.replica.endpoint import Endpoint


class StayingLayer(BaseModel):
    """A layer that no kept point needs, and why it stays: it is open, or an image depends on it."""

    model_config = ConfigDict(frozen=True)

    file: str
    reason: str


class ReplicaMergePlan(BaseModel):
    """What a merge at a replica would do. Sizes in bytes.

    merges: the files that become one, lower first, each; the last one's name stays
    shadowed_bytes: overwritten data that goes; needs_bytes: room that it takes beside the layers
    """

    model_config = ConfigDict(frozen=True)

    destination: str
    disk: str
    points: tuple[PointDecision, ...]
    merges: tuple[tuple[str, ...], ...]
    staying: tuple[StayingLayer, ...]
    layers_before: int
    layers_after: int
    strategy: str
    bytes_to_move: int
    shadowed_bytes: int
    needs_bytes: int
    free_bytes: int


class ReplicaMergeReport(BaseModel):
    """What a merge at a replica did. Sizes in bytes.

    bytes_moved: shared with or copied into other files over there; bytes_freed: of its disk
    strategy: of all merges, joined by '+'; staying: layers that were gone round
    points_of_the_future: dated later than this host's clock; no rule counts them, and none drops them
    """

    model_config = ConfigDict(frozen=True)

    destination: str
    disk: str
    points_kept: tuple[int, ...]
    points_dropped: tuple[int, ...]
    points_of_the_future: tuple[int, ...] = ()
    merges: tuple[tuple[str, ...], ...]
    staying: tuple[StayingLayer, ...]
    layers_before: int
    layers_after: int
    bytes_moved: int
    bytes_freed: int
    strategy: str


class ReplicaMerge:
    """A disk of a replica, and the rules that say which points of it stay."""

    def __init__(self, endpoint: Endpoint, disk: str, policy: Policy, *, zone: str, epoch: int | None = None) -> None:
        """Touches nothing. zone: name of a time zone, whose calendar counts; epoch: an older one is refused there."""
        self._endpoint, self._disk, self._policy, self._zone, self._epoch = endpoint, disk, policy, zone, epoch

    def plan(self) -> ReplicaMergePlan:
        """What `run` would do; changes nothing. Errors as `run`."""
        answer = self._asked(dry_run=True, on_event=ignore)
        outcome = answer.outcome
        return ReplicaMergePlan(
            destination=self._endpoint.url,
            disk=self._disk,
            points=tuple(
                PointDecision(**point.model_dump(), of_the_future=is_future(point.time, datetime.now(UTC)))
                for point in answer.points
            ),
            merges=outcome.merges,
            staying=_staying(answer),
            layers_before=outcome.layers_before,
            layers_after=outcome.layers_after,
            strategy=outcome.strategy,
            bytes_to_move=outcome.bytes_moved,
            shadowed_bytes=outcome.bytes_freed,
            needs_bytes=outcome.needs_bytes,
            free_bytes=outcome.free_bytes,
        )

    def run(self, *, on_event: OnEvent = ignore) -> ReplicaMergeReport:
        """Have it done.

        Raises Unsupported for a far side that is too old for it, Busy when a transfer holds the disk for long,
        Unavailable when its disk is full or the link breaks: then the next who comes there finishes or undoes it.
        """
        answer = self._asked(dry_run=False, on_event=on_event)
        outcome = answer.outcome
        return ReplicaMergeReport(
            destination=self._endpoint.url,
            disk=self._disk,
            points_kept=tuple(point.point for point in answer.points if point.kept),
            points_dropped=tuple(point.point for point in answer.points if not point.kept),
            points_of_the_future=tuple(
                point.point for point in answer.points if point.kept and is_future(point.time, datetime.now(UTC))
            ),
            merges=outcome.merges,
            staying=_staying(answer),
            layers_before=outcome.layers_before,
            layers_after=outcome.layers_after,
            bytes_moved=outcome.bytes_moved,
            bytes_freed=outcome.bytes_freed,
            strategy=outcome.strategy,
        )

    def _asked(self, *, dry_run: bool, on_event: OnEvent) -> Answer:
        return merged_at(
            self._endpoint,
            self._disk,
            self._policy,
            zone=self._zone,
            epoch=self._epoch,
            dry_run=dry_run,
            on_bytes=lambda done, total: on_event(Progress("merge", done, total)),
            on_wait=waiting(self._endpoint, on_event),
        )


def _staying(answer: Answer) -> tuple[StayingLayer, ...]:
    return tuple(StayingLayer(file=each.file, reason=each.reason) for each in answer.outcome.staying)
