"""The answer to MERGE: the layers that no kept point needs become one with the next, or what that would do.

    MERGE  ->  PROGRESS* MERGED+ DONE

The asker is heard no more: once it is gone the next word to it fails, and the merge that is at work ends as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, tzinfo
from pathlib import Path
from typing import TYPE_CHECKING
from zoneinfo import ZoneInfo

from snapchain.errors import InvalidInput, NotFound, Unsupported
from snapchain.model.events import ByteCount
from snapchain.model.retention import Decision
from snapchain.replica import layer_merge as collapsing
from snapchain.replica.arrival import settle
from snapchain.replica.catalogue import Catalogue, Point
from snapchain.replica.epochs import check_epoch
from snapchain.replica.layer_merge import Collapsing
from snapchain.replica.merge_journal import Engine, undisturbed
from snapchain.replica.store import ReplicaDisk, Work, in_turn, open_replica
from snapchain.replica.stream.messages import (
    POINTS_AT_ONCE,
    PROGRESS,
    DecidedPoint,
    Kind,
    Merge,
    Merged,
    Message,
    Outcome,
    Staying,
)

if TYPE_CHECKING:
    from snapchain.replica.receiver import Receiver


_LONGEST_REASON = 1000
Reply = Callable[[Kind, Message | bytes], None]


def answer(receiver: Receiver, request: Merge) -> None:
    """MERGE. Raises as `merge`."""
    merge(request, receiver.root(request.replica), receiver.session.reply, engine=receiver.engine)
    receiver.session.done()


def merge(asked: Merge, root: Path, say: Reply, *, engine: Engine | None) -> None:
    """Do it, and say all but DONE.

    Raises InvalidInput for no rule, NotFound where there is no such replica or disk, Conflict for an older epoch, Busy
    when others do not let go of the disk, Unsupported where nothing here can merge, and as `collapsing.plan`, `run`.
    """
    if engine is None:
        raise Unsupported("this receiver cannot merge", subject=root)
    if asked.is_empty:
        raise InvalidInput("no rule says which points to keep", subject=asked.disk, hint="such as --keep-last 7")
    zone = _zone(asked.zone)
    disk = open_replica(root).disk(asked.disk)
    if asked.dry_run:
        planned = undisturbed(
            disk,
            lambda: collapsing.plan(disk, _checked(disk, disk.read(), asked), asked, zone=zone, engine=engine),
            engine=engine,
            is_fine=lambda _plan: False,
        )
        _tell(planned, _foreseen(planned), say)
        return
    _checked(disk, disk.read(), asked)
    with in_turn(disk, Work.MERGE):
        settled = _checked(disk, settle(disk, engine), asked)
        planned = collapsing.plan(disk, settled, asked, zone=zone, engine=engine)
        _tell(planned, _done(disk, planned, engine, say), say)


def _checked(disk: ReplicaDisk, catalogue: Catalogue | None, asked: Merge) -> Catalogue:
    if catalogue is None:
        raise NotFound(f"there is no disk {disk.name!r} here", subject=disk.directory.parent)
    if asked.epoch is not None:
        check_epoch(disk, catalogue, asked.epoch, by_name=True)  # it stays what it is here
    return catalogue


def _zone(name: str) -> tzinfo:
    if name == "UTC":  # also where there is no database of zones
        return UTC
    try:
        return ZoneInfo(name)
    except (OSError, ValueError, LookupError) as error:
        raise InvalidInput(
            f"{name[:100]!a} is no time zone that the replica's host knows", hint="say --time-zone, such as UTC"
        ) from error


def _foreseen(planned: Collapsing) -> Outcome:
    each = [what for _, what in planned.groups]
    return Outcome(
        done=False,
        layers_before=len(planned.catalogue.layers),
        layers_after=planned.layers_after,
        merges=tuple(tuple(layer.file for layer in members) for members, _ in planned.groups),
        staying=_staying(planned.stays),
        strategy=planned.strategy,
        bytes_moved=sum(what.bytes_to_move for what in each),
        bytes_freed=sum(what.shadowed_bytes for what in each),
        needs_bytes=max((what.needs_bytes for what in each), default=0),
        free_bytes=planned.free_bytes,
    )


def _done(disk: ReplicaDisk, planned: Collapsing, engine: Engine, say: Reply) -> Outcome:
    count = ByteCount(0, lambda done, total: say(Kind.PROGRESS, PROGRESS.pack(done, total)))
    done = collapsing.run(disk, planned, engine=engine, on_bytes=count.reach)
    return Outcome(
        done=True,
        layers_before=len(planned.catalogue.layers),
        layers_after=len(done.catalogue.layers),
        merges=tuple(tuple(layer.file for layer in members) for members in done.merged),
        staying=_staying(done.stays),
        strategy=done.strategy,
        bytes_moved=done.bytes_moved,
        bytes_freed=done.bytes_freed,
        needs_bytes=max((what.needs_bytes for _, what in planned.groups), default=0),
        free_bytes=planned.free_bytes,
    )


def _staying(stays: Sequence[collapsing.Stays]) -> tuple[Staying, ...]:
    return tuple(Staying(file=each.layer.file, reason=each.reason[:_LONGEST_REASON]) for each in stays)


def _tell(planned: Collapsing, outcome: Outcome, say: Reply) -> None:
    pages = list(_pages(planned.decisions))
    for number, page in enumerate(pages, start=1):
        last = outcome if number == len(pages) else None
        say(Kind.MERGED, Merged(disk=planned.catalogue.disk, points=page, outcome=last))


def _pages(decisions: Sequence[Decision[Point]]) -> Iterator[tuple[DecidedPoint, ...]]:
    for at in range(0, max(1, len(decisions)), POINTS_AT_ONCE):
        yield tuple(
            DecidedPoint(
                point=each.point.point,
                time=each.point.time,
                labels=each.point.labels,
                kept=each.kept,
                reasons=tuple(why[:_LONGEST_REASON] for why in each.reasons),
            )
            for each in decisions[at : at + POINTS_AT_ONCE]
        )
