"""A block job from its start to its end: what to do at each state, and the loop that does it.

    RUNNING -> READY -> PENDING -> CONCLUDED -> dismissed
               pivot    flush,     flush again,
                        finalize   dismiss

The flush before `finalize` is what QEMU leaves out: a crash after the change of a header, and before the data that the
header relies on is on the disk, would show wrong data.  The job is dismissed before anybody looks at the graph: QEMU 7.2
dies when it lists its nodes beside a concluded stream.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum

from snapchain.errors import SnapchainError, Unavailable
from snapchain.guest.protocol import Job, JobKind, JobProgress, JobStatus
from snapchain.model.events import Notice, OnEvent, Progress, ignore

WAIT_SECONDS = 0.5
"""Between two looks at a job whose state does not change: for its progress, and for the speed."""
_MOST_PAUSED = 20
"""Looks in a row at which a job may be paused: QEMU pauses it for a moment at each change of the graph."""

OnLook = Callable[[Job, JobProgress], None]


class Action(Enum):
    """What a state of a job asks for."""

    WAIT = "wait"
    COMPLETE = "complete"
    FINALIZE = "finalize"
    DISMISS = "dismiss"
    NOTHING = "nothing"
    """It is over: nobody knows the job."""
    GIVE_UP = "give up"


class End(Enum):
    """How a job ended. FAILED: with an error, the chain is as before; GONE: nobody knows, the graph decides."""

    DONE = "done"
    FAILED = "failed"
    GONE = "gone"


@dataclass(frozen=True, slots=True)
class Ended:
    """error: QEMU's words for a job that failed."""

    end: End
    error: str | None = None


def next_action(status: JobStatus, kind: JobKind, *, completed: bool = False, paused: int = 0) -> Action:
    """What to do with a job in a state. completed: the pivot was asked for already; paused: looks in a row before.

    A job that stays paused was stopped by an I/O error, or by somebody: nobody would ever resume it.
    """
    match status:
        case JobStatus.READY if kind is JobKind.ACTIVE_COMMIT and not completed:
            return Action.COMPLETE
        case JobStatus.PENDING:
            return Action.FINALIZE
        case JobStatus.CONCLUDED:
            return Action.DISMISS
        case JobStatus.GONE:
            return Action.NOTHING
        case JobStatus.PAUSED if paused >= _MOST_PAUSED:
            return Action.GIVE_UP
    return Action.WAIT


def drive(
    job: Job, *, phase: str, on_event: OnEvent = ignore, on_look: OnLook = lambda _job, _now: None, seconds: float = WAIT_SECONDS
) -> Ended:
    """Bring a job to its end, from whatever state it is in.

    phase: what it does, for its progress; on_look: called at each look while it runs, for the speed
    Interrupted before `finalize`, the job is cancelled and dismissed, and the chain is as before.

    Raises Unavailable when QEMU went away or does not answer, and for a job that stays paused.
    """
    completed, paused, finalized = False, 0, False
    try:
        while True:
            now = job.progress()
            paused = paused + 1 if now.status is JobStatus.PAUSED else 0
            _report(phase, now, on_event)
            match next_action(now.status, job.kind, completed=completed, paused=paused):
                case Action.WAIT:
                    on_look(job, now)
                    job.wait(seconds)
                case Action.COMPLETE:
                    job.complete()
                    completed = True
                case Action.FINALIZE:
                    if now.error is None:
                        job.flush()
                    finalized = True
                    job.finalize()
                    job.wait(seconds)
                case Action.DISMISS:
                    if now.error is None:
                        job.flush()
                    job.dismiss()
                    return Ended(End.FAILED if now.error else End.DONE, now.error)
                case Action.NOTHING:
                    return Ended(End.GONE)
                case Action.GIVE_UP:
                    raise Unavailable(
                        "the merge is paused, by an I/O error or by somebody, and was cancelled",
                        subject=job.id,
                        hint="see whether there is room for the image, then run it again",
                    )
    except BaseException as error:
        if not finalized:
            _cancel(job, seconds=seconds, on_event=on_event, because=error)
        raise


def _cancel(job: Job, *, seconds: float, on_event: OnEvent, because: BaseException) -> None:
    """Give a job up, and wait for its end. Without an answer it stays for the next run, by its journal."""
    try:
        job.cancel()
        while (now := job.progress()).status is not JobStatus.GONE:
            match now.status:
                case JobStatus.CONCLUDED:
                    job.dismiss()
                    return
                case JobStatus.PENDING:
                    # Cancelled too late: QEMU would wait for ever.
                    job.cancel()
            job.wait(seconds)
    except SnapchainError as error:
        if str(error) != str(because):
            with suppress(SnapchainError):
                on_event(Notice(f"the job {job.id} could not be cancelled; the next run ends it: {error}"))


def _report(phase: str, now: JobProgress, on_event: OnEvent) -> None:
    if now.status in {JobStatus.RUNNING, JobStatus.READY} and now.total:
        on_event(Progress(phase, min(now.done, now.total), now.total))
