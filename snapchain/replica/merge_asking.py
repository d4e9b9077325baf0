"""Telling a replica, wherever it is, to merge the layers of a disk; nothing that it says is believed unjudged."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from snapchain.errors import Corrupt
from snapchain.host.remote_channel import Channel
from snapchain.model.retention import Policy
from snapchain.replica.client import OnBeat, OnBytes, answers, check_point_count, unexpected
from snapchain.replica.endpoint import Endpoint
from snapchain.replica.stream import failures, opening
from snapchain.replica.stream.frames import Kind
from snapchain.replica.stream.merge_messages import DecidedPoint, Merge, Merged, Outcome
from snapchain.replica.stream.messages import decode

_PROGRESS = struct.Struct("<QQ")


@dataclass(frozen=True, slots=True)
class Answer:
    """What becomes of each point, oldest first, and of the layers."""

    points: tuple[DecidedPoint, ...]
    outcome: Outcome


def merged_at(
    endpoint: Endpoint,
    disk: str,
    policy: Policy,
    *,
    zone: str,
    epoch: int | None = None,
    dry_run: bool = False,
    on_bytes: OnBytes,
    on_wait: OnBeat = lambda: None,
) -> Answer:
    """Have it done over there, or only planned (dry_run).

    zone: name of a time zone; epoch: refused there where it is older than the disk's
    on_bytes: told how many bytes are moved by now, and of how many; on_wait: called while nothing is told
    Raises Unsupported for a far side that is too old for it, what it refuses with, Corrupt for lies.
    """
    asked = Merge(
        disk=disk,
        replica=endpoint.replica,
        last=policy.last,
        hourly=policy.hourly,
        daily=policy.daily,
        weekly=policy.weekly,
        monthly=policy.monthly,
        yearly=policy.yearly,
        within=None if policy.within is None else str(policy.within),
        labels=tuple(sorted(policy.labels)),
        zone=zone,
        epoch=epoch,
        dry_run=dry_run,
    )
    points: list[DecidedPoint] = []
    outcome: Outcome | None = None
    with endpoint.connect() as channel:
        for frame in answers(channel, Kind.MERGE, asked, feature=opening.MERGE_FEATURE, on_beat=on_wait):
            if frame.kind is Kind.PROGRESS and len(frame.body) == _PROGRESS.size and not dry_run and not points:
                on_bytes(*_PROGRESS.unpack(frame.body))
                continue
            if frame.kind is not Kind.MERGED or outcome is not None:
                raise unexpected(frame, channel)
            said = decode(Merged, frame.body, subject=channel.peer)
            if said.disk != disk:
                raise Corrupt("it tells of another disk than the one asked for", subject=channel.peer)
            _check_points([*points[-1:], *said.points], channel)
            points += map(_printable, said.points)
            check_point_count(len(points), channel)
            outcome = said.outcome
    if outcome is None:
        raise Corrupt("it has not said what came of the merge", subject=endpoint.url)
    return Answer(tuple(points), _judged(outcome, done=not dry_run, peer=endpoint.url))


def _check_points(points: Sequence[DecidedPoint], channel: Channel) -> None:
    if any(upper.point <= lower.point for lower, upper in pairwise(points)):
        raise Corrupt("its points do not ascend", subject=channel.peer)


def _printable(point: DecidedPoint) -> DecidedPoint:
    return point.model_copy(update={"reasons": tuple(map(failures.printable, point.reasons))})


def _judged(said: Outcome, *, done: bool, peer: str) -> Outcome:
    fewer = sum(len(members) - 1 for members in said.merges)
    if said.done is not done or said.layers_before - said.layers_after != fewer or not all(map(len, said.merges)):
        raise Corrupt("what it says of the merge contradicts itself, or what it was asked for", subject=peer)
    staying = tuple(each.model_copy(update={"reason": failures.printable(each.reason)}) for each in said.staying)
    return said.model_copy(update={"staying": staying})
