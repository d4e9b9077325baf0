"""migrate, offline: the disks of a guest that does not run become another host's, all of them or none.

    look -> seal -> send -> overlay there      as often as it takes; the source is as good as before
         -> lock, nothing was written since -> fence here -> the destination takes them over -> start hook

One token names the handover.  The marks here come before the question there: from the first mark on nothing here
writes or sends the disks, and the destination is their master only when it has said so.  Cut off anywhere, the same
command goes on; and as long as no guest has written there, `take_back` makes them this host's again.
"""

from __future__ import annotations

import secrets
import shutil
import socket
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from datetime import UTC, datetime
from pathlib import Path

from snapchain.errors import (
    Busy,
    Conflict,
    InvalidInput,
    NotFound,
    SnapchainError,
    ToolFailed,
    Unavailable,
    Unsupported,
)
from snapchain.host.locks import ImageLock, LockMode
from snapchain.host.processes import run
from snapchain.host.retry import RetryPolicy, retry
from snapchain.model.events import Notice, OnEvent, ignore
from snapchain.model.guest_state import GuestChange, GuestState, Transition, describe_takeover
from snapchain.ops.migrate.elsewhere import Elsewhere
from snapchain.ops.migrate.look import check_was_given, look_at, opened, token_of
from snapchain.ops.migrate.ready import Prepared, active_of, prepare, seals, taken_up, whole
from snapchain.ops.migrate.request import (
    Course,
    DiskMoved,
    DiskPlan,
    MigratePlan,
    MigrateReport,
    MigrateRequest,
    Move,
    TakeBackPlan,
    TakeBackReport,
)
from snapchain.ops.ship.run import plan as plan_ship
from snapchain.replica.client import ask_for_handover, guest_at
from snapchain.replica.disk_writer import ReplicaWriting
from snapchain.replica.endpoint import Endpoint
from snapchain.replica.guest_store import guest_of
from snapchain.replica.sender import Sender
from snapchain.replica.stream.guest_messages import MOST_DISKS, HandedDisk, Standing, Step
from snapchain.replica.stream.messages import ActiveState, Open
from snapchain.source import ownership
from snapchain.source.notes import Given, Overlay

_HANDOVER = RetryPolicy(give_up_after=60.0)
"""A question that is asked again without harm; who waits for the answer is a guest that does not run."""


def plan(request: MigrateRequest, endpoint: Endpoint, *, on_event: OnEvent = ignore) -> MigratePlan:
    """What `migrate` would do; changes nothing on either side. Raises as that does, but for images in use."""
    request.check()
    disks = []
    for move in request.moves:
        look = look_at(request, move)
        layers, count, user = 0, 0, None
        if look.given is None:
            try:
                planned = plan_ship(request.send(move, whole(request)), ReplicaWriting(endpoint), on_event=on_event)
                layers, count = len(planned.layers), planned.data_bytes
            except Busy as error:
                user = str(error)
        disks.append(
            DiskPlan(
                image=str(move.image),
                disk=move.disk,
                seals=seals(request, look) and not look.quiet and look.given is None,
                in_use=user,
                epoch=look.epoch,
                given=look.given is not None,
                layers_to_send=layers,
                bytes_to_send=count,
            )
        )
    return MigratePlan(
        destination=endpoint.url,
        disks=tuple(disks),
        bytes_to_send=sum(disk.bytes_to_send for disk in disks),
        start_hook=tuple(request.start_hook),
    )


def migrate(request: MigrateRequest, endpoint: Endpoint, *, on_event: OnEvent = ignore) -> MigrateReport:
    """Move them; a run that was cut off goes on.

    Raises Busy when somebody has an image open, Diverged as `send`, Conflict when an image was written to meanwhile,
    was given elsewhere, or the destination is not as it was prepared: then the source is as good as before.
    Unavailable when the destination's word did not come: then nobody may write the disks until the next run, or a
    take-back. ToolFailed when the start hook fails: the disks are the destination's.
    """
    request.check()
    if len(request.moves) > MOST_DISKS:
        raise InvalidInput(f"at most {MOST_DISKS} disks go at once", subject=f"{len(request.moves)} disks")
    check_hook(request.start_hook)
    begun = time.monotonic()
    token, done = _handover_of(request, endpoint, on_event)
    course = Course.NEW if token is None else Course.RESUMED if done is None else Course.DONE
    if token is None:
        token = secrets.token_hex(16)
        prepared = [prepare(request, move, endpoint, on_event) for move in request.moves]
    else:
        prepared = [taken_up(move, look_at(request, move)) for move in request.moves]
    elsewhere = Elsewhere(request, endpoint, on_event) if done is None else None
    if elsewhere is not None:
        elsewhere.check(max(each.look.epoch for each in prepared), token)
    with ExitStack() as locks:
        locked = time.monotonic()
        if elsewhere is not None:
            _lock(request, prepared, locks)
            _check_still(request, prepared)
            _fence_all(request, prepared, endpoint, token, course, on_event)
            _tell_others(request, prepared, endpoint, token, elsewhere, on_event)
            standings = _give(request, prepared, endpoint, token, on_event)
            _noted(request, prepared, token, on_event)
            if request.paused:
                _check_paused(request, prepared)
        else:
            assert done is not None, "else the others are asked"
            standings = _given_still(prepared, endpoint, token)
            _confirm(request, prepared, token, started=done.started)
            for each in prepared:
                with opened(request, each.move) as chain:
                    each.fenced = tuple(ownership.fenced(chain, token))
        cutover = time.monotonic() - locked
    started = None
    if request.start_hook:
        if done is None or not done.started:
            _note_start(prepared, endpoint, token, on_event)
            start(request.start_hook, endpoint.url, request.moves, standings)
            _confirm(request, prepared, token, started=True)
        started = True
    return MigrateReport(
        destination=endpoint.url,
        token=token,
        course=course,
        disks=tuple(_moved(each, standing) for each, standing in zip(prepared, standings, strict=True)),
        bytes_sent=sum(each.sent.bytes_sent for each in prepared if each.sent is not None),
        started=started,
        cutover_seconds=cutover,
        seconds=time.monotonic() - begun,
    )


def take_back(
    request: MigrateRequest, endpoint: Endpoint, *, unasked: bool = False, on_event: OnEvent = ignore
) -> TakeBackReport:
    """Make disks that were given to a destination this host's again, in a newer epoch.

    unasked: without a word with the destination, whose user vouches that no guest runs, or will run, on them anywhere
    Raises NotFound where nothing was given, Conflict where a guest has written there or another host has taken them
    over, Busy when one has them open, Unavailable when the destination cannot be asked.
    """
    token, given = _given_away(request, endpoint)
    elsewhere = Elsewhere(request, endpoint, on_event)
    epoch = max(mark.epoch for _, mark in given)
    if not unasked:
        for move, mark in given:
            check_was_given(move, mark)
        elsewhere.check(epoch, token)
        # A disk without a mark was not given: the question comes after the last mark.
        asked = [_handed(move.disk, mark.overlay, mark.epoch + 1) for move, mark in given]
        _ask_back(endpoint, asked, token)
    for move, mark in given:
        with opened(request, move) as chain:
            ownership.unfence(chain, token, epoch=mark.epoch + 1)
    elsewhere.tell_of_return(token, epoch + 1)
    return TakeBackReport(
        destination=endpoint.url,
        images=tuple(str(move.image) for move, _ in given),
        disks=tuple(move.disk for move, _ in given),
        epochs=tuple(mark.epoch + 1 for _, mark in given),
        asked=not unasked,
    )


def plan_take_back(request: MigrateRequest, endpoint: Endpoint, *, unasked: bool = False) -> TakeBackPlan:
    """What `take_back` would do; changes nothing. Errors as `take_back`, except for locks on the other host."""
    token, given = _given_away(request, endpoint)
    if not unasked:
        for move, mark in given:
            check_was_given(move, mark)
        asked = [_handed(move.disk, mark.overlay, mark.epoch) for move, mark in given]
        for (_, mark), standing in zip(given, ask_for_handover(endpoint, Step.LOOK, asked, token=token), strict=True):
            _check_goes_back(endpoint, mark, standing)
    return TakeBackPlan(
        destination=endpoint.url,
        images=tuple(str(move.image) for move, _ in given),
        disks=tuple(move.disk for move, _ in given),
        epochs=tuple(mark.epoch + 1 for _, mark in given),
        asked=not unasked,
    )


def _check_goes_back(endpoint: Endpoint, mark: Given, standing: Standing) -> None:
    """Raises Conflict for a disk that the destination would not give back."""
    if standing.epoch > mark.epoch + 1:
        raise Conflict(
            f"the disk is in epoch {standing.epoch} there: another host has taken it over since",
            subject=standing.overlay,
            hint="find out which host runs the guest before anything else",
        )
    if not standing.given:
        return  # it never came to that, or is back already
    with endpoint.connect() as channel, Sender(channel, link=endpoint.link) as sender:
        sender.open(Open(disk=standing.disk, replica=endpoint.replica, look=True, epoch=mark.epoch + 1))
        state = sender.ask_for_active(active_of(mark.overlay)).state
    if state is not ActiveState.READY:
        raise Conflict(
            "a guest has written to the disk since the handover; taking it back would lose that",
            subject=standing.overlay,
            hint="shut that guest down, and migrate it from there to here",
        )


def _given_away(request: MigrateRequest, endpoint: Endpoint) -> tuple[str, list[tuple[Move, Given]]]:
    """The token of a handover, and what was given in it. Raises NotFound where nothing was."""
    request.check()
    looks = [look_at(request, move) for move in request.moves]
    token = token_of(request, looks, endpoint)
    if token is None:
        raise NotFound("it was not given away", subject=request.moves[0].image, hint="there is nothing to take back")
    given = zip(request.moves, looks, strict=True)
    return token, [(move, look.given) for move, look in given if look.given is not None]


def _ask_back(endpoint: Endpoint, asked: Sequence[HandedDisk], token: str) -> None:
    try:
        ask_for_handover(endpoint, Step.BACK, asked, token=token)
    except (NotFound, Unavailable) as error:
        is_gone = "if it is gone for good, say --take-back --destination-is-gone"
        if isinstance(error, NotFound) or error.hint is None:
            error.hint = is_gone if error.hint is None else f"{error.hint}; {is_gone}"
        raise


# ---- the handover


def _handover_of(request: MigrateRequest, endpoint: Endpoint, on_event: OnEvent) -> tuple[str | None, Given | None]:
    """The token of one that was begun; the mark too, once the destination has said that it has the disks."""
    looks = [look_at(request, move) for move in request.moves]
    token = token_of(request, looks, endpoint)
    marks = [look.given for look in looks if look.given is not None]
    if len(marks) == len(looks):
        return token, next((mark for mark in marks if mark.confirmed), None)
    if token is None:
        return None, None
    if any(mark.confirmed for mark in marks):
        raise Conflict(
            "its disks were about to be taken back, and one of them is already",
            subject=endpoint.url,
            hint="say --take-back to finish that",
        )
    # The destination is asked after the last mark: it does not have them, unless the run that sets the marks is not
    # dead at all. It never will have them by this token, once it was asked for them back.
    on_event(Notice("an interrupted handover had not come to the destination; it begins anew"))
    take_back(request, endpoint, on_event=on_event)
    return None, None


def _given_still(prepared: Sequence[Prepared], endpoint: Endpoint, token: str) -> tuple[Standing, ...]:
    """Raises Conflict when the disks have moved on from the destination since."""
    disks = [_handed(each.move.disk, each.overlay, each.epoch) for each in prepared]
    found = ask_for_handover(endpoint, Step.LOOK, disks, token=token)
    for standing in found:
        if not standing.given:
            raise Conflict(
                f"{standing.disk} was handed over there, and has gone on from there since: it is in epoch "
                f"{standing.epoch}",
                subject=endpoint.url,
            )
    return found


def _lock(request: MigrateRequest, prepared: Sequence[Prepared], locks: ExitStack) -> None:
    """Nobody may open any of the tops from now on; a paused guest has them open all the same."""
    if not request.paused:
        for each in prepared:
            locks.enter_context(ImageLock(each.look.top, LockMode.WRITE))


def _check_still(request: MigrateRequest, prepared: Sequence[Prepared]) -> None:
    """Raises Conflict for an image that somebody has written to since it was looked at."""
    for each in prepared:
        if not each.look.unchanged(look_at(request, each.move)):
            raise Conflict(
                "it was written to while it was being migrated",
                subject=each.move.image,
                hint="shut the guest down, and run it again: only what is new is sent",
            )


def _fence_all(
    request: MigrateRequest,
    prepared: Sequence[Prepared],
    endpoint: Endpoint,
    token: str,
    course: Course,
    on_event: OnEvent,
) -> None:
    """Mark all of them, or none: a new handover has not been asked for yet, so its marks may go again."""
    try:
        for each in prepared:
            each.fenced = _fence(request, each, prepared, endpoint, token)
    except SnapchainError as error:
        if course is not Course.NEW:
            raise
        try:
            for each in prepared:
                with opened(request, each.move) as chain:
                    ownership.unfence(chain, token)
        except SnapchainError as fault:
            on_event(Notice(f"its mark could not be taken off again: {fault}; the same command goes on"))
        raise error  # noqa: TRY201 -- the undoing's own may have come after it


def _fence(
    request: MigrateRequest, each: Prepared, prepared: Sequence[Prepared], endpoint: Endpoint, token: str
) -> tuple[Path, ...]:
    mark = Given(
        destination=endpoint.url,
        disk=each.move.disk,
        epoch=each.epoch,
        token=token,
        time=datetime.now(UTC),
        overlay=each.overlay,
        together=tuple(other.move.disk for other in prepared),
    )
    with opened(request, each.move) as chain:
        return tuple(ownership.fence(chain, mark, image_dirs=request.image_dirs))


def _tell_others(
    request: MigrateRequest,
    prepared: Sequence[Prepared],
    endpoint: Endpoint,
    token: str,
    elsewhere: Elsewhere,
    on_event: OnEvent,
) -> None:
    """Have the guest's other destinations refuse this host. Where one objects, the disks are this host's again."""
    try:
        elsewhere.tell(token, max(each.epoch for each in prepared))
    except SnapchainError as error:
        _undone(request, endpoint, on_event)
        raise error  # noqa: TRY201 -- the take-back's own may have come after it


def _undone(request: MigrateRequest, endpoint: Endpoint, on_event: OnEvent) -> None:
    try:
        take_back(request, endpoint, on_event=on_event)
        on_event(Notice("it was refused: the disks are this host's, as before"))
    except SnapchainError as fault:
        on_event(Notice(f"the disks are still marked as being given away, say --take-back: {fault}"))


def _give(
    request: MigrateRequest, prepared: Sequence[Prepared], endpoint: Endpoint, token: str, on_event: OnEvent
) -> tuple[Standing, ...]:
    """Have the destination take them over. Where it refuses, they are this host's again before that is raised."""
    disks = [_handed(each.move.disk, each.overlay, each.epoch) for each in prepared]
    try:
        return retry(
            lambda: ask_for_handover(endpoint, Step.GIVE, disks, token=token),
            policy=_HANDOVER,
            progress=lambda: 0,
            on_retry=lambda notice: on_event(Notice(str(notice))),
        )
    except Unavailable as error:
        raise Unavailable(
            f"it is not known whether the destination has taken the disks over: {error.message}",
            subject=error.subject,
            hint="run it again to finish, or with --take-back to undo it; until then nothing here writes them",
        ) from error
    except SnapchainError as error:
        _undone(request, endpoint, on_event)
        raise error  # noqa: TRY201 -- the take-back's own may have come after it


def _noted(request: MigrateRequest, prepared: Sequence[Prepared], token: str, on_event: OnEvent) -> None:
    """Note the destination's word. Where that fails, nobody may think that it has not come."""
    try:
        _confirm(request, prepared, token, started=False)
    except Conflict:
        raise
    except SnapchainError:
        on_event(Notice("the destination has the disks; only noting that here has failed"))
        raise


def _confirm(request: MigrateRequest, prepared: Sequence[Prepared], token: str, *, started: bool) -> None:
    for each in prepared:
        with opened(request, each.move) as chain:
            ownership.confirm(chain, token, started=started)


def _note_start(prepared: Sequence[Prepared], endpoint: Endpoint, token: str, on_event: OnEvent) -> None:
    """Have the destination record that the guest starts; before it does, so that one that was overtaken starts nothing.

    Nothing where it has no record of this handover: it keeps none, or these were not all disks of a guest.
    Raises Conflict where another move or failover was faster.
    """
    guest = guest_of(prepared[0].move.disk)
    if not guest:
        return
    here = socket.gethostname()[:250]

    def ask() -> None:
        now, _ = guest_at(endpoint, guest)
        if now.token == token and now.state is GuestState.SWITCHED:
            step = Transition.START
            change = GuestChange(guest=guest, transition=step, seen=now.number, token=token, by=here, host=here)
            guest_at(endpoint, guest, change)
        elif now.token == token and now.state is GuestState.PROTECTED:
            raise Conflict("it was taken back meanwhile, by another run", subject=f"{endpoint.url}::{guest}")
        elif now.token != token and now.is_taken_over:
            raise Conflict(describe_takeover(now), subject=f"{endpoint.url}::{guest}", hint="start no guest here")

    with suppress(Unsupported):
        retry(ask, policy=_HANDOVER, progress=lambda: 0, on_retry=lambda notice: on_event(Notice(str(notice))))


def _check_paused(request: MigrateRequest, prepared: Sequence[Prepared]) -> None:
    for each in prepared:
        now = look_at(request, each.move)
        if not each.look.unchanged(now):
            raise Conflict(
                "its guest was not paused: it has written to it while it was given away, and that is lost",
                subject=each.move.image,
                hint="end that guest; say --take-back to go on here instead of there",
            )


def _handed(disk: str, overlay: Overlay, epoch: int) -> HandedDisk:
    return HandedDisk(disk=disk, epoch=epoch, overlay=active_of(overlay))


def _moved(each: Prepared, standing: Standing) -> DiskMoved:
    return DiskMoved(
        image=str(each.move.image),
        disk=each.move.disk,
        epoch=standing.epoch,
        overlay=standing.overlay,
        sealed=None if each.sealed is None else str(each.sealed),
        fenced=tuple(map(str, each.fenced)),
        layers_sent=0 if each.sent is None else each.sent.layers_sent,
        bytes_sent=0 if each.sent is None else each.sent.bytes_sent,
    )


__all__ = [
    "MigratePlan",
    "MigrateReport",
    "MigrateRequest",
    "Move",
    "TakeBackPlan",
    "TakeBackReport",
    "migrate",
    "plan",
    "plan_take_back",
    "take_back",
]


# --- The hook that starts a guest at its new host: a program of the user's, with the facts in its environment.
#
#     SNAPCHAIN_HOOK=start SNAPCHAIN_DESTINATION=ssh://kvm2/srv/replica SNAPCHAIN_DISKS=2
#     SNAPCHAIN_IMAGE_1=/images/web1.qcow2 SNAPCHAIN_DISK_1=web1/vda SNAPCHAIN_OVERLAY_1=/srv/... SNAPCHAIN_EPOCH_1=2
#     SNAPCHAIN_IMAGE_2=... ; of the first disk without a number, too
#
# An argument list, no shell.

_SECONDS = 600.0
_CAP = 64 << 10


def check_hook(hook: Sequence[str]) -> None:
    """Raises NotFound for a hook that cannot be run: that is told before anything is handed over."""
    if hook and shutil.which(hook[0]) is None:
        raise NotFound("the start hook: no such program", subject=hook[0], hint="it is run without a shell")


def start(hook: Sequence[str], destination: str, moves: Sequence[Move], standings: Sequence[Standing]) -> None:
    """Run it. Raises ToolFailed when it fails, or takes longer than ten minutes."""
    facts = {"HOOK": "start", "DESTINATION": destination, "DISKS": str(len(moves))}
    for number, (move, standing) in enumerate(zip(moves, standings, strict=True), 1):
        disk = {
            "IMAGE": str(move.image.absolute()),
            "DISK": move.disk,
            "OVERLAY": standing.overlay,
            "EPOCH": str(standing.epoch),
        }
        facts |= {f"{name}_{number}": value for name, value in disk.items()} | (disk if number == 1 else {})
    try:
        run(hook, env={f"SNAPCHAIN_{name}": value for name, value in facts.items()}, timeout=_SECONDS, output_cap=_CAP)
    except ToolFailed as error:
        raise ToolFailed(
            f"the start hook: {error.message}",
            argv=error.argv,
            status=error.status,
            stderr=error.stderr,
            subject=hook[0],
            hint="the disks are the destination's; run it again to run the hook again, or start the guest there by "
            "hand; with --take-back they are this host's again, as long as no guest has written there",
        ) from error
