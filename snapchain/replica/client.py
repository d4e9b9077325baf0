"""Asking a replica, wherever it is, about its points and its soundness; nothing that it says is believed unjudged."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from snapchain.errors import Corrupt, InvalidInput, Unsupported
from snapchain.host.channel import Channel
from snapchain.model.disk_name import check_disk_name
from snapchain.model.retention import Policy
from snapchain.replica.endpoint import Endpoint
from snapchain.replica.stream import session as failures, session as opening
from snapchain.replica.stream.frames import FROM_RECEIVER, Frame, FrameReader, FrameWriter, Kind
from snapchain.replica.stream.messages import (
    MOST_POINTS,
    Ask,
    DecidedPoint,
    Failure,
    Finding,
    Handed,
    HandedDisk,
    Handover,
    HeldDisk,
    HeldPoint,
    Merge,
    Merged,
    Message,
    Outcome,
    Standing,
    Step,
    Verdict,
    decode,
    encode,
)

_PROGRESS = struct.Struct("<QQ")
MOST_BYTES = 16 << 20
"""Of a whole answer, without its progress. What is kept of it takes ten times as much memory, and more to be shown."""
_ONE_DISK = "name one disk: DEST::DISK; if it was one, look at the other host: it tells of more than it can have"
OnBytes = Callable[[int, int], None]
OnBeat = Callable[[], None]


@dataclass(frozen=True, slots=True)
class Disk:
    """A disk and all its points, oldest first."""

    name: str
    epoch: int
    points: list[HeldPoint]


def points_at(endpoint: Endpoint, disk: str | None = None) -> list[Disk]:
    """All disks there, or one. Raises NotFound, Unsupported, and what keeps the other side from answering."""
    found: list[Disk] = []
    seen: set[str] = set()
    count = 0
    with endpoint.connect() as channel:
        asked = Ask(want="points", disk=disk, replica=endpoint.replica)
        for frame in answers(channel, Kind.ASK, asked, feature=opening.ASK_FEATURE):
            if frame.kind is not Kind.DISK:
                raise unexpected(frame, channel)
            said = decode(HeldDisk, frame.body, subject=channel.peer)
            if not found or found[-1].name != said.disk:
                if _checked(said.disk, disk, channel) in seen:
                    raise Corrupt("it tells of one disk in two places", subject=channel.peer)
                seen.add(said.disk)
                found.append(Disk(said.disk, said.epoch, []))
            _check_points([*found[-1].points[-1:], *said.points], channel)
            count += len(said.points)
            check_point_count(count, channel)
            found[-1].points.extend(said.points)
    if disk is not None and not found:
        raise Corrupt("it has not told of the disk that it was asked about", subject=endpoint.url)
    return found


def soundness_at(
    endpoint: Endpoint, disk: str | None = None, *, data: bool, on_bytes: OnBytes
) -> tuple[list[Verdict], list[Finding]]:
    """What was looked at there, and what was found wrong with it. data: bytes too; errors as `points_at`.

    on_bytes: told how many bytes of data were read by now, and of how many
    """
    verdicts: list[Verdict] = []
    findings: list[Finding] = []
    with endpoint.connect() as channel:
        asked = Ask(want="data" if data else "records", disk=disk, replica=endpoint.replica)
        for frame in answers(channel, Kind.ASK, asked, feature=opening.ASK_FEATURE):
            match frame.kind:
                case Kind.PROGRESS if data and len(frame.body) == _PROGRESS.size:
                    on_bytes(*_PROGRESS.unpack(frame.body))
                case Kind.FINDING:
                    finding = decode(Finding, frame.body, subject=channel.peer)
                    _checked(finding.disk, disk, channel)
                    findings.append(_printable(finding))
                case Kind.VERDICT:
                    verdicts.append(decode(Verdict, frame.body, subject=channel.peer))
                    _checked(verdicts[-1].disk, disk, channel)
                case _:
                    raise unexpected(frame, channel)
    seen = {verdict.disk for verdict in verdicts}
    if len(seen) < len(verdicts) or any(finding.disk not in seen for finding in findings):
        raise Corrupt("its findings are not of the disks that it has looked at", subject=endpoint.url)
    if disk is not None and not verdicts:
        raise Corrupt("it has not looked at the disk that it was asked about", subject=endpoint.url)
    return verdicts, findings


def answers(
    channel: Channel, kind: Kind, asked: Message, *, feature: str, on_beat: OnBeat = lambda: None
) -> Iterator[Frame]:
    """Ask, as `ask` does; what is said before DONE. Raises what the other side refuses with, too.

    on_beat: called while it says nothing but that it lives
    """
    reader = ask(channel, kind, asked, feature=feature)
    left = MOST_BYTES
    while (frame := heard(reader, channel, on_beat)).kind is not Kind.DONE:
        left -= 0 if frame.kind is Kind.PROGRESS else len(frame.body)
        if left < 0:
            raise Corrupt(f"its answer has more than {MOST_BYTES} bytes", subject=channel.peer, hint=_ONE_DISK)
        yield frame


def ask(
    channel: Channel, kind: Kind, asked: Message, *, feature: str, allowed: Mapping[Kind, int] = FROM_RECEIVER
) -> FrameReader:
    """Say HELLO, and ask in the place of OPEN; what reads the answer.

    feature: that the other side must have to understand it; allowed: what it may answer with
    Raises Unsupported where it has not.
    """
    writer, reader = FrameWriter(channel), FrameReader(channel, allowed)
    writer.send(Kind.HELLO, encode(opening.hello(answers=True)))
    there = opening.agree(heard(reader, channel), peer=channel.peer)
    if feature not in there.features:
        raise Unsupported(
            f"the snapchain there is too old to be asked this: it does not know {feature!r}",
            subject=channel.peer,
            hint="bring it up to date over there",
        )
    writer.send(kind, encode(asked))
    return reader


def heard(reader: FrameReader, channel: Channel, on_beat: OnBeat = lambda: None) -> Frame:
    """The next frame that says something. Raises what the other side fails with."""
    while True:
        frame = reader.read()
        if frame.kind is Kind.FAIL:
            raise failures.raised(decode(Failure, frame.body, subject=channel.peer), peer=channel.peer)
        if frame.kind is not Kind.BEAT:
            return frame
        on_beat()


def check_point_count(count: int, channel: Channel) -> None:
    """Raises Corrupt for an answer with more points than this process may hold."""
    if count > MOST_POINTS:
        raise Corrupt(f"its answer has more than {MOST_POINTS} points", subject=channel.peer, hint=_ONE_DISK)


def unexpected(frame: Frame, channel: Channel) -> Corrupt:
    """For what is no answer to the question."""
    return Corrupt(f"{frame.kind.name} has no place here in the stream", subject=channel.peer)


def _checked(said: str, wanted: str | None, channel: Channel) -> str:
    """The name of a disk that it tells of."""
    if wanted is not None and said != wanted:
        raise Corrupt("it tells of another disk than the one asked for", subject=channel.peer)
    try:
        return check_disk_name(said)
    except InvalidInput as error:
        raise Corrupt(error.message, subject=channel.peer) from error


def _check_points(points: Sequence[HeldPoint | DecidedPoint], channel: Channel) -> None:
    if any(upper.point <= lower.point for lower, upper in pairwise(points)):
        raise Corrupt("its points do not ascend", subject=channel.peer)


def _printable(finding: Finding) -> Finding:
    subject = None if finding.subject is None else failures.printable(finding.subject)
    plain = {"kind": failures.printable(finding.kind), "subject": subject}
    return finding.model_copy(update={**plain, "message": failures.printable(finding.message)})


# --- handover


def ask_for_handover(
    endpoint: Endpoint, step: Step, disks: Sequence[HandedDisk], *, token: str
) -> tuple[Standing, ...]:
    """How each disk stands after that step, in their order. May be asked again with the same token.

    Raises what the replica refuses with: then nothing was changed there; Unavailable where that is not known.
    """
    asked = Handover(step=step, token=token, disks=tuple(disks), replica=endpoint.replica)
    found: tuple[Standing, ...] | None = None
    with endpoint.connect() as channel:
        for frame in answers(channel, Kind.HANDOVER, asked, feature=opening.HANDOVER_FEATURE):
            if frame.kind is not Kind.HANDED or found is not None:
                raise unexpected(frame, channel)
            found = decode(Handed, frame.body, subject=channel.peer).disks
    if found is None or [each.disk for each in found] != [each.disk for each in disks]:
        raise Corrupt("it has not told of the disks that it was asked about", subject=endpoint.url)
    for disk, standing in zip(disks, found, strict=True):
        name = f"/{disk.overlay.name}"
        if not standing.overlay.startswith("/") or not standing.overlay.isprintable():
            raise Corrupt("it names a file that cannot be", subject=endpoint.url)
        done = step is Step.LOOK or (standing.given, standing.epoch) == (step is Step.GIVE, disk.epoch)
        if not standing.overlay.endswith(name) or not done:
            raise Corrupt("it has not done what it was asked for", subject=endpoint.url)
    return found


# --- merge


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
            points += map(_printable_point, said.points)
            check_point_count(len(points), channel)
            outcome = said.outcome
    if outcome is None:
        raise Corrupt("it has not said what came of the merge", subject=endpoint.url)
    return Answer(tuple(points), _judged(outcome, done=not dry_run, peer=endpoint.url))


def _printable_point(point: DecidedPoint) -> DecidedPoint:
    return point.model_copy(update={"reasons": tuple(map(failures.printable, point.reasons))})


def _judged(said: Outcome, *, done: bool, peer: str) -> Outcome:
    fewer = sum(len(members) - 1 for members in said.merges)
    if said.done is not done or said.layers_before - said.layers_after != fewer or not all(map(len, said.merges)):
        raise Corrupt("what it says of the merge contradicts itself, or what it was asked for", subject=peer)
    staying = tuple(each.model_copy(update={"reason": failures.printable(each.reason)}) for each in said.staying)
    return said.model_copy(update={"staying": staying})
