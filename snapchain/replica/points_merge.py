"""merge ssh://host/path::DISK: keep some points of a disk at a replica, and merge the layers that they do not need.

It is done where the replica is, by the engine that merges local files: nothing but the rules and the report cross the
link.  The files of the kept points keep their names and read as before.
"""

from __future__ import annotations

from datetime import UTC, datetime

from snapchain.destination.records import PointDecision, PointsMergePlan, PointsMergeReport, StayingLayer
from snapchain.model.events import OnEvent, Progress, ignore
from snapchain.model.retention import Rules, is_future
from snapchain.replica.client import Answer, merged_at, waiting
from snapchain.replica.endpoint import Endpoint


class ReplicaMerge:
    """A disk of a replica, and the rules that say which points of it stay."""

    def __init__(self, endpoint: Endpoint, disk: str, rules: Rules, *, zone: str, epoch: int | None = None) -> None:
        """Touches nothing. zone: name of a time zone, whose calendar counts; epoch: an older one is refused there."""
        self._endpoint, self._disk, self._rules, self._zone, self._epoch = endpoint, disk, rules, zone, epoch

    def plan(self) -> PointsMergePlan:
        """What `run` would do; changes nothing. Errors as `run`."""
        answer = self._asked(dry_run=True, on_event=ignore)
        outcome = answer.outcome
        return PointsMergePlan(
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

    def run(self, *, on_event: OnEvent = ignore) -> PointsMergeReport:
        """Have it done.

        Raises Unsupported for a far side that is too old for it, Busy when a transfer holds the disk for long,
        Unavailable when its disk is full or the link breaks: then the next who comes there finishes or undoes it.
        """
        answer = self._asked(dry_run=False, on_event=on_event)
        outcome = answer.outcome
        return PointsMergeReport(
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
            self._rules,
            zone=self._zone,
            epoch=self._epoch,
            dry_run=dry_run,
            on_bytes=lambda done, total: on_event(Progress("merge", done, total)),
            on_wait=waiting(self._endpoint, on_event),
        )


def _staying(answer: Answer) -> tuple[StayingLayer, ...]:
    return tuple(StayingLayer(file=each.file, reason=each.reason) for each in answer.outcome.staying)
