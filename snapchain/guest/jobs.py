"""A block job from its start to its end: what to do at each state, and the loop that does it.

    RUNNING -> READY -> PENDING -> CONCLUDED -> dismissed
               pivot    flush,     flush again,
                        finalize   dismiss

The flush before `finalize` is what QEMU leaves out: a crash after the change of a header, and before the data that the
header relies on is on the disk, would show wrong data.  The job is dismissed before anybody looks at the graph:
QEMU 7.2 dies when it lists its nodes beside a concluded stream.

An active commit finalizes itself: at PENDING QEMU holds back all I/O of the guest, for as long as nobody finalizes
(measured with 7.2). It flushes before it pivots, so `flush` does nothing then: the guest would wait for it.
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
    job: Job,
    *,
    phase: str,
    on_event: OnEvent = ignore,
    on_look: OnLook = lambda _job, _now: None,
    seconds: float = WAIT_SECONDS,
) -> Ended:
    """Bring a job to its end, from whatever state it is in.

    phase: what it does, for its progress; on_look: called at each look while it runs, for the speed
    Interrupted before `finalize`, the job is cancelled and dismissed, and the chain is as before.

    Raises Unavailable when QEMU went away or does not answer, and for a job that stays paused.
    """
    driver = _Driver(job, phase, on_event, on_look, seconds)
    try:
        while driver.ended is None:
            driver.step()
    except BaseException as error:
        if not driver.finalized:
            give_up(job, seconds=seconds, on_event=on_event, because=error)
        raise
    return driver.ended


class _Driver:
    """finalized: the graph may be the new one, so that nothing is to be cancelled any more."""

    def __init__(self, job: Job, phase: str, on_event: OnEvent, on_look: OnLook, seconds: float) -> None:
        self.ended: Ended | None = None
        self.finalized = False
        self._job, self._phase, self._seconds = job, phase, seconds
        self._on_event, self._on_look = on_event, on_look
        self._completed, self._paused = False, 0

    def step(self) -> None:
        """Look once, and do what the state asks for."""
        job = self._job
        now = job.progress()
        _report(self._phase, now, self._on_event)
        match next_action(now.status, job.kind, completed=self._completed, paused=self._paused):
            case Action.WAIT:
                self._on_look(job, now)
                job.wait(self._seconds)
            case Action.COMPLETE:
                self._completed = self.finalized = True
                job.complete()
            case Action.FINALIZE:
                job.flush()
                self.finalized = True
                job.finalize()
                job.wait(self._seconds)
            case Action.DISMISS:
                self.finalized = True
                if now.error is None:
                    job.flush()
                job.dismiss()
                self.ended = Ended(End.FAILED if now.error else End.DONE, now.error)
            case Action.NOTHING:
                self.ended = Ended(End.GONE)
            case Action.GIVE_UP:
                raise Unavailable(
                    "the merge is paused, by an I/O error or by somebody, and was cancelled",
                    subject=job.id,
                    hint="see whether there is room for the image, then run it again",
                )
        self._paused = self._paused + 1 if now.status is JobStatus.PAUSED else 0


def give_up(job: Job, *, on_event: OnEvent, because: BaseException, seconds: float = WAIT_SECONDS) -> None:
    """Cancel a job that is not finalized, and wait for its end. Without an answer the next run finds it.

    because: what is raised in any case, and is not told twice
    """
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
