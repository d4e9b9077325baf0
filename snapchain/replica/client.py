"""Requests to a replica, wherever it is: its points, their soundness, merge, handover, holds. Responses are checked."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

from pydantic import ValidationError

from snapchain.errors import Corrupt, InvalidInput
from snapchain.model.disk_name import check_disk_name
from snapchain.model.events import Notice, OnEvent
from snapchain.model.guest_checks import GuestCheck, GuestChecks
from snapchain.model.guest_state import GuestChange, GuestStanding, is_as_asked
from snapchain.model.retention import DropPoints, Rules
from snapchain.replica.endpoint import Endpoint
from snapchain.replica.stream.fields import MOST_POINTS
from snapchain.replica.stream.frames import Kind
from snapchain.replica.stream.guest_messages import AskGuest, Handed, HandedDisk, Handover, Standing, Stands, Step
from snapchain.replica.stream.messages import (
    PROGRESS,
    AddedPoint,
    Ask,
    BriefDisk,
    DecidedPoint,
    DiskFiles,
    Finding,
    Held,
    HeldDisk,
    HeldPoint,
    HoldPoint,
    M,
    Merge,
    Merged,
    Outcome,
    ReleasePoint,
    Verdict,
)
from snapchain.replica.stream.requests import Feature
from snapchain.replica.stream.session import ONE_DISK, ClientSession, OnBeat, printable

OnBytes = Callable[[int, int], None]


@contextmanager
def _connected(endpoint: Endpoint) -> Iterator[ClientSession]:
    with endpoint.connect() as channel:
        yield ClientSession(channel)


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
    with _connected(endpoint) as session:
        request = Ask(want="points", disk=disk, replica=endpoint.replica)
        for frame in session.responses(Kind.ASK, request):
            if frame.kind is not Kind.DISK:
                raise session.unexpected(frame)
            page = session.decode(HeldDisk, frame)
            if not found or found[-1].name != page.disk:
                if _checked(page.disk, disk, session.peer) in seen:
                    raise Corrupt("it lists one disk in two places", subject=session.peer)
                seen.add(page.disk)
                found.append(Disk(page.disk, page.epoch, []))
            _check_points([*found[-1].points[-1:], *page.points], session.peer)
            count += len(page.points)
            check_point_count(count, session.peer)
            found[-1].points.extend(page.points)
    if disk is not None and not found:
        raise Corrupt("its answer lacks the disk that was asked for", subject=endpoint.url)
    return found


def summaries_at(endpoint: Endpoint) -> list[BriefDisk] | None:
    """All disks there in short, as they are listed; None from a snapchain that is too old to answer so.

    Raises as `points_at`.
    """
    found: list[BriefDisk] = []
    with _connected(endpoint) as session:
        session.begin()
        if Feature.SUMMARY not in session.features:
            return None
        for frame in session.responses(Kind.ASK, Ask(want="summary", replica=endpoint.replica)):
            if frame.kind is not Kind.DISK:
                raise session.unexpected(frame)
            brief = session.decode(BriefDisk, frame)
            _checked(brief.disk, None, session.peer)
            found.append(brief)
    if len({each.disk for each in found}) < len(found):
        raise Corrupt("it lists one disk in two places", subject=endpoint.url)
    return found


def files_at(endpoint: Endpoint) -> list[tuple[DiskFiles, list[AddedPoint]]]:
    """What the files of each disk take, and all its points, as they are listed.

    Raises as `points_at`, and Unsupported for a server that is too old.
    """
    found: list[tuple[DiskFiles, list[AddedPoint]]] = []
    with _connected(endpoint) as session:
        request = Ask(want="files", replica=endpoint.replica)
        for frame in session.responses(Kind.ASK, request, feature=Feature.SUMMARY):
            if frame.kind is not Kind.DISK:
                raise session.unexpected(frame)
            page = session.decode(DiskFiles, frame)
            _checked(page.disk, None, session.peer)
            if not found or found[-1][0].disk != page.disk:
                found.append((page, []))
            found[-1][1].extend(page.points)
    if len({disk.disk for disk, _ in found}) < len(found):
        raise Corrupt("it lists one disk in two places", subject=endpoint.url)
    return found


def soundness_at(
    endpoint: Endpoint, disk: str | None = None, *, share: float, on_bytes: OnBytes
) -> tuple[list[Verdict], list[Finding]]:
    """A verdict for each disk that was checked, and all findings.

    share: of the data that is read: 1 all, 0 none; in between, the probability with which each layer is read
    on_bytes: called with how many bytes of data were read by now, and of how many
    Raises as `points_at`.
    """
    data = share > 0
    verdicts: list[Verdict] = []
    findings: list[Finding] = []
    with _connected(endpoint) as session:
        request = Ask(want="data" if data else "records", disk=disk, replica=endpoint.replica, share=share or 1.0)
        for frame in session.responses(Kind.ASK, request, feature=Feature.SAMPLE if 0 < share < 1 else None):
            match frame.kind:
                case Kind.PROGRESS if data and len(frame.body) == PROGRESS.size:
                    on_bytes(*PROGRESS.unpack(frame.body))
                case Kind.FINDING:
                    finding = session.decode(Finding, frame)
                    _checked(finding.disk, disk, session.peer)
                    findings.append(_printable(finding))
                case Kind.VERDICT:
                    verdicts.append(session.decode(Verdict, frame))
                    _checked(verdicts[-1].disk, disk, session.peer)
                case _:
                    raise session.unexpected(frame)
    seen = {verdict.disk for verdict in verdicts}
    if len(seen) < len(verdicts) or any(finding.disk not in seen for finding in findings):
        raise Corrupt("it reports findings of disks that it did not check", subject=endpoint.url)
    if disk is not None and not verdicts:
        raise Corrupt("its answer lacks the disk that was asked for", subject=endpoint.url)
    return verdicts, findings


def _valid(model: type[M], **fields: object) -> M:
    try:
        return model.model_validate(fields)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        what = ".".join(map(str, first["loc"]))
        raise InvalidInput(f"{what} cannot be used: {first['msg']}") from error


def check_point_count(count: int, peer: str) -> None:
    """Raises Corrupt for an answer with more points than this process keeps in memory."""
    if count > MOST_POINTS:
        raise Corrupt(f"its answer has more than {MOST_POINTS} points", subject=peer, hint=ONE_DISK)


def _checked(name: str, wanted: str | None, peer: str) -> str:
    """The name of a disk in a response. Raises Corrupt for another one than `wanted`, and for no name of a disk."""
    if wanted is not None and name != wanted:
        raise Corrupt("it answered about another disk than the one asked for", subject=peer)
    try:
        return check_disk_name(name)
    except InvalidInput as error:
        raise Corrupt(error.message, subject=peer) from error


def _check_points(points: Sequence[HeldPoint | DecidedPoint], peer: str) -> None:
    if any(upper.point <= lower.point for lower, upper in pairwise(points)):
        raise Corrupt("its points do not ascend", subject=peer)


def _printable(finding: Finding) -> Finding:
    subject = None if finding.subject is None else printable(finding.subject)
    plain = {"kind": printable(finding.kind), "subject": subject}
    return finding.model_copy(update={**plain, "message": printable(finding.message)})


# --- handover


def ask_for_handover(
    endpoint: Endpoint, step: Step, disks: Sequence[HandedDisk], *, token: str
) -> tuple[Standing, ...]:
    """The state of each disk after that step, in their order. May be repeated with the same token.

    Raises what the replica refuses with: then nothing was changed there; Unavailable where that is not known.
    """
    found: tuple[Standing, ...] | None = None
    with _connected(endpoint) as session:
        session.begin()  # which tells its features
        by = socket.gethostname()[:250] if Feature.GUEST_STATE in session.features else None
        request = Handover(step=step, token=token, disks=tuple(disks), replica=endpoint.replica, by=by)
        for frame in session.responses(Kind.HANDOVER, request):
            if frame.kind is not Kind.HANDED or found is not None:
                raise session.unexpected(frame)
            found = session.decode(Handed, frame).disks
    if found is None or [each.disk for each in found] != [each.disk for each in disks]:
        raise Corrupt("its answer lacks the disks that were asked for", subject=endpoint.url)
    _check_overlays(endpoint, found)
    for disk, standing in zip(disks, found, strict=True):
        name = f"/{disk.overlay.name}"
        done = step is Step.LOOK or (standing.given, standing.epoch) == (step is Step.GIVE, disk.epoch)
        if not standing.overlay.endswith(name) or not done:
            raise Corrupt("it did not do what was requested", subject=endpoint.url)
    return found


# --- the state of a guest


def guest_at(
    endpoint: Endpoint, guest: str, change: GuestChange | None = None, *, handed: Sequence[HandedDisk] = ()
) -> tuple[GuestStanding, tuple[Standing, ...]]:
    """How a guest stands at a replica, after a change where one is asked for; and the disks that this took over.

    handed: for SWITCH: all disks of the guest, in the epoch after the one in which it stands
    May be repeated with the same change. Raises what the replica refuses with: then nothing was changed there;
    Unavailable where that is not known, Unsupported for a server that is too old.
    """
    request = _valid(AskGuest, guest=guest, replica=endpoint.replica, change=change, handed=tuple(handed))
    feature = None
    if change is not None:
        feature = Feature.LEASE if change.of_lease else Feature.PLACES if change.needs_several else None
    found = _ask_guest(endpoint, request, feature=feature)
    standing = found.standing
    if change is not None and not is_as_asked(standing, change):
        raise Corrupt("it did not do what was requested", subject=endpoint.url)
    _check_overlays(endpoint, found.disks)
    if standing.here is not None:
        standing = standing.model_copy(update={"here": standing.here.model_copy(update={"url": endpoint.url})})
    return standing, found.disks


def checks_at(endpoint: Endpoint, guest: str, check: GuestCheck | None = None) -> GuestChecks:
    """What came of the last checks of a guest, after one that is to be recorded. Raises as `guest_at`."""
    request = _valid(AskGuest, guest=guest, replica=endpoint.replica, check=check)
    return _ask_guest(endpoint, request).checks


def _ask_guest(endpoint: Endpoint, request: AskGuest, *, feature: Feature | None = None) -> Stands:
    found: Stands | None = None
    with _connected(endpoint) as session:
        for frame in session.responses(Kind.GUEST, request, feature=feature):
            if frame.kind is not Kind.STANDING or found is not None:
                raise session.unexpected(frame)
            found = session.decode(Stands, frame)
    if found is None or found.standing.guest != request.guest:
        raise Corrupt("its answer lacks the guest that was asked for", subject=endpoint.url)
    return found


def _check_overlays(endpoint: Endpoint, disks: Sequence[Standing]) -> None:
    if any(not each.overlay.startswith("/") or not each.overlay.isprintable() for each in disks):
        raise Corrupt("it names an impossible file", subject=endpoint.url)


# --- merge


@dataclass(frozen=True, slots=True)
class Answer:
    """What becomes of each point, oldest first, and of the layers."""

    points: tuple[DecidedPoint, ...]
    outcome: Outcome


def merged_at(
    endpoint: Endpoint,
    disk: str,
    rules: Rules,
    *,
    zone: str,
    epoch: int | None = None,
    dry_run: bool = False,
    on_bytes: OnBytes,
    on_wait: OnBeat = lambda: None,
) -> Answer:
    """Merge layers at the replica, or only plan it (dry_run).

    zone: name of a time zone; epoch: refused there where it is older than the disk's
    on_bytes: called with the bytes moved so far, and in all; on_wait: called while the server sends only BEAT
    Raises InvalidInput for a rule that no message can carry, Unsupported for a server that is too old, what it refuses
    with, and Corrupt for an impossible answer.
    """
    feature = None
    if isinstance(rules, DropPoints):
        feature = Feature.DROP_NEWEST if rules.newest else Feature.DROP_POINTS
        chosen: dict[str, object] = {"drop": tuple(sorted(rules.numbers)), "newest": rules.newest}
    else:
        chosen = dict(rules)
    request = _valid(Merge, disk=disk, replica=endpoint.replica, **chosen, zone=zone, epoch=epoch, dry_run=dry_run)
    points: list[DecidedPoint] = []
    outcome: Outcome | None = None
    with _connected(endpoint) as session:
        for frame in session.responses(Kind.MERGE, request, on_wait, feature=feature):
            if frame.kind is Kind.PROGRESS and len(frame.body) == PROGRESS.size and not dry_run and not points:
                on_bytes(*PROGRESS.unpack(frame.body))
                continue
            if frame.kind is not Kind.MERGED or outcome is not None:
                raise session.unexpected(frame)
            page = session.decode(Merged, frame)
            if page.disk != disk:
                raise Corrupt("it answered about another disk than the one asked for", subject=session.peer)
            _check_points([*points[-1:], *page.points], session.peer)
            points += map(_printable_point, page.points)
            check_point_count(len(points), session.peer)
            outcome = page.outcome
    if outcome is None:
        raise Corrupt("its answer lacks the outcome of the merge", subject=endpoint.url)
    return Answer(tuple(points), _judged(outcome, done=not dry_run, peer=endpoint.url))


def _printable_point(point: DecidedPoint) -> DecidedPoint:
    return point.model_copy(update={"reasons": tuple(map(printable, point.reasons))})


def _judged(outcome: Outcome, *, done: bool, peer: str) -> Outcome:
    fewer = sum(len(members) - 1 for members in outcome.merges)
    layers_gone = outcome.layers_before - outcome.layers_after - outcome.cut
    if outcome.done is not done or layers_gone != fewer or not all(map(len, outcome.merges)):
        raise Corrupt("its account of the merge contradicts itself, or the request", subject=peer)
    staying = tuple(each.model_copy(update={"reason": printable(each.reason)}) for each in outcome.staying)
    return outcome.model_copy(update={"staying": staying})


def waiting(endpoint: Endpoint, on_event: OnEvent) -> Callable[[], None]:
    """A callback for BEAT that tells the user once that the replica makes them wait."""
    noted = False

    def tell() -> None:
        nonlocal noted
        if not noted:
            noted = True
            on_event(Notice(f"{endpoint.url} makes us wait: another snapchain may be working on that disk"))

    return tell


# --- hold and release


def hold_at(
    endpoint: Endpoint, disk: str, point: str | None, tag: str, *, reason: str = "", dry_run: bool = False
) -> Held:
    """Keep a point whatever the rules say; its number and all holds that it has then.

    point: as in an address, None for the newest; a tag that it has already keeps its date and gets this reason
    Raises NotFound, InvalidInput for a bad tag or reason, Unsupported for a server that is too old, Corrupt.
    """
    request = _valid(
        HoldPoint, disk=disk, replica=endpoint.replica, point=point, tag=tag, reason=reason, dry_run=dry_run
    )
    held = _held(endpoint, Kind.HOLD, request)
    if all((each.tag, each.reason) != (tag, reason) for each in held.holds):
        raise Corrupt("it did not hold the point as requested", subject=endpoint.url)
    return held


def release_at(endpoint: Endpoint, disk: str, point: str | None, tag: str, *, dry_run: bool = False) -> Held:
    """Take a hold off a point; its number and the holds that it has left. Raises as `hold_at`."""
    request = _valid(ReleasePoint, disk=disk, replica=endpoint.replica, point=point, tag=tag, dry_run=dry_run)
    held = _held(endpoint, Kind.RELEASE, request)
    if any(each.tag == tag for each in held.holds):
        raise Corrupt("it did not release the point", subject=endpoint.url)
    return held


def _held(endpoint: Endpoint, kind: Kind, request: HoldPoint | ReleasePoint) -> Held:
    found: Held | None = None
    with _connected(endpoint) as session:
        for frame in session.responses(kind, request):
            if found is not None:
                raise session.unexpected(frame)
            found = session.decode(Held, frame)
    if found is None or found.disk != request.disk:
        raise Corrupt("its answer lacks the disk that was asked for", subject=endpoint.url)
    return found
