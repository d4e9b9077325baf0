"""The response to MERGE: layers that no kept point needs are merged into the next, or a plan of that.

    MERGE  ->  PROGRESS* MERGED+ DONE

The client sends nothing more.  When it is gone, the next response to it fails, and the merge under way is undone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, tzinfo
from pathlib import Path
from typing import TYPE_CHECKING
from zoneinfo import ZoneInfo

from snapchain.errors import InvalidInput, NotFound
from snapchain.model.events import ByteCount
from snapchain.model.retention import Decision, DropPoints
from snapchain.replica import layer_merge
from snapchain.replica.arrival import settle
from snapchain.replica.catalogue import Catalogue, Point
from snapchain.replica.epochs import check_epoch
from snapchain.replica.layer_merge import LayerMergePlan
from snapchain.replica.merge_journal import undisturbed
from snapchain.replica.store import ReplicaDisk, Work, in_turn, open_replica
from snapchain.replica.stream.fields import POINTS_AT_ONCE
from snapchain.replica.stream.frames import Kind
from snapchain.replica.stream.messages import PROGRESS, DecidedPoint, Merge, Merged, Message, Outcome, Staying

if TYPE_CHECKING:
    from snapchain.replica.receiver import Receiver


_LONGEST_REASON = 1000
Reply = Callable[[Kind, Message | bytes], None]


def answer(receiver: Receiver, request: Merge) -> None:
    """MERGE. Raises as `merge`."""
    merge(request, receiver.root(request.replica), receiver.session.reply)
    receiver.session.done()


def merge(request: Merge, root: Path, reply: Reply) -> None:
    """Do it, and send all responses but DONE.

    Raises InvalidInput for no rule, NotFound where there is no such replica or disk, Conflict for an older epoch, Busy
    when the disk stays locked, and as `layer_merge.plan`, `run`.
    """
    if request.is_empty and request.drop is None:
        raise InvalidInput("no rule says which points to keep", subject=request.disk, hint="such as --keep-last 7")
    zone = _zone(request.zone)
    rules = request if request.drop is None else DropPoints(frozenset(request.drop), newest=request.newest)
    disk = open_replica(root).disk(request.disk)
    if request.dry_run:
        planned = undisturbed(
            disk,
            lambda: layer_merge.plan(disk, _checked(disk, disk.read(), request), rules, zone=zone),
            is_fine=lambda _plan: False,
        )
        _send_pages(planned, _foreseen(planned), reply)
        return
    _checked(disk, disk.read(), request)
    with in_turn(disk, Work.MERGE):
        settled = _checked(disk, settle(disk), request)
        planned = layer_merge.plan(disk, settled, rules, zone=zone)
        _send_pages(planned, _done(disk, planned, reply), reply)


def _checked(disk: ReplicaDisk, catalogue: Catalogue | None, request: Merge) -> Catalogue:
    if catalogue is None:
        raise NotFound(f"there is no disk {disk.name!r} here", subject=disk.directory.parent)
    if request.epoch is not None:
        check_epoch(disk, catalogue, request.epoch, by_name=True)  # the epoch of the disk does not change here
    return catalogue


def _zone(name: str) -> tzinfo:
    if name == "UTC":  # also where there is no database of zones
        return UTC
    try:
        return ZoneInfo(name)
    except (OSError, ValueError, LookupError) as error:
        raise InvalidInput(
            f"{name[:100]!a} is no time zone known on the replica's host", hint="say --time-zone, such as UTC"
        ) from error


def _foreseen(planned: LayerMergePlan) -> Outcome:
    each = [what for _, what in planned.groups]
    return Outcome(
        done=False,
        layers_before=len(planned.catalogue.layers),
        layers_after=planned.layers_after,
        merges=tuple(tuple(layer.file for layer in members) for members, _ in planned.groups),
        staying=_staying(planned.stays),
        strategy=planned.strategy,
        bytes_moved=sum(what.bytes_to_move for what in each),
        bytes_freed=sum(what.shadowed_bytes for what in each) + planned.cut_bytes,
        needs_bytes=max((what.needs_bytes for what in each), default=0),
        free_bytes=planned.free_bytes,
        cut=len(planned.cut),
    )


def _done(disk: ReplicaDisk, planned: LayerMergePlan, reply: Reply) -> Outcome:
    count = ByteCount(0, lambda done, total: reply(Kind.PROGRESS, PROGRESS.pack(done, total)))
    done = layer_merge.run(disk, planned, on_bytes=count.reach)
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
        cut=len(planned.cut),
    )


def _staying(stays: Sequence[layer_merge.Stays]) -> tuple[Staying, ...]:
    return tuple(Staying(file=each.layer.file, reason=each.reason[:_LONGEST_REASON]) for each in stays)


def _send_pages(planned: LayerMergePlan, outcome: Outcome, reply: Reply) -> None:
    pages = list(_pages(planned.decisions))
    for number, page in enumerate(pages, start=1):
        last = outcome if number == len(pages) else None
        reply(Kind.MERGED, Merged(disk=planned.catalogue.disk, points=page, outcome=last))


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
