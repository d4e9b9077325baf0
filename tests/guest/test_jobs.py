"""One block job from its start to its end (guest/jobs.py), with a job that follows a script."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from snapchain.errors import Unavailable
from snapchain.guest.jobs import Action, End, drive, next_action
from snapchain.guest.protocol import JobKind, JobProgress, JobStatus
from snapchain.model.events import Event, Progress

RUNNING, READY, PENDING = JobStatus.RUNNING, JobStatus.READY, JobStatus.PENDING
CONCLUDED, PAUSED, GONE = JobStatus.CONCLUDED, JobStatus.PAUSED, JobStatus.GONE


class ScriptedJob:
    """Each look gives the next state; the last one stays. calls: what was asked of it."""

    id = "sc-merge-vda-00000000"

    def __init__(
        self, states: Sequence[JobStatus | BaseException], *, kind: JobKind = JobKind.COMMIT, error: str | None = None
    ) -> None:
        self.kind, self._states, self._error = kind, list(states), error
        self.calls: list[str] = []

    def progress(self) -> JobProgress:
        state = self._states[0]
        if len(self._states) > 1:
            self._states.pop(0)
        if isinstance(state, BaseException):
            raise state
        return JobProgress(state, 1, 2, self._error if state is CONCLUDED else None)

    def wait(self, seconds: float) -> None:
        assert seconds > 0
        self.calls.append("wait")

    def set_speed(self, bytes_per_second: int) -> None:
        self.calls.append(f"speed {bytes_per_second}")

    def complete(self) -> None:
        self.calls.append("complete")

    def flush(self) -> None:
        self.calls.append("flush")

    def finalize(self) -> None:
        self.calls.append("finalize")

    def dismiss(self) -> None:
        self.calls.append("dismiss")

    def cancel(self) -> None:
        self.calls.append("cancel")
        self._states = [CONCLUDED]

    @property
    def deeds(self) -> list[str]:
        """Without the waiting."""
        return [call for call in self.calls if call != "wait"]


def test_a_commit_is_flushed_before_its_header_changes_and_after() -> None:
    job = ScriptedJob([RUNNING, RUNNING, PENDING, CONCLUDED])
    seen: list[Event] = []
    ended = drive(job, phase="merge", on_event=seen.append)
    assert ended.end is End.DONE
    assert job.deeds == ["flush", "finalize", "flush", "dismiss"]
    assert Progress("merge", 1, 2) in seen


def test_an_active_commit_is_completed_once_and_never_held_at_pending() -> None:
    job = ScriptedJob([RUNNING, READY, READY, CONCLUDED], kind=JobKind.ACTIVE_COMMIT)
    assert drive(job, phase="merge").end is End.DONE
    assert job.deeds == ["complete", "flush", "dismiss"]
    # One that did not finalize itself.
    job = ScriptedJob([PENDING, CONCLUDED], kind=JobKind.ACTIVE_COMMIT)
    drive(job, phase="merge")
    assert job.deeds == ["flush", "finalize", "flush", "dismiss"]


def test_a_failed_job_is_dismissed_and_its_error_told() -> None:
    job = ScriptedJob([RUNNING, CONCLUDED], error="No space left on device")
    ended = drive(job, phase="merge")
    assert (ended.end, ended.error) == (End.FAILED, "No space left on device")
    assert job.deeds == ["dismiss"]


def test_of_a_vanished_job_the_graph_decides() -> None:
    assert drive(ScriptedJob([RUNNING, GONE]), phase="merge").end is End.GONE


def test_a_moment_of_pause_is_waited_for_and_a_lasting_one_cancelled() -> None:
    assert drive(ScriptedJob([RUNNING, *[PAUSED] * 15, RUNNING, PENDING, CONCLUDED]), phase="merge").end is End.DONE
    job = ScriptedJob([RUNNING, PAUSED])
    with pytest.raises(Unavailable, match="paused"):
        drive(job, phase="merge")
    assert job.deeds == ["cancel", "dismiss"]


@pytest.mark.parametrize("before", [[RUNNING], [RUNNING, PENDING]])
def test_an_interrupt_before_finalize_cancels_and_dismisses(before: list[JobStatus]) -> None:
    job = ScriptedJob([*before[:1], KeyboardInterrupt(), *before])
    with pytest.raises(KeyboardInterrupt):
        drive(job, phase="merge")
    assert job.deeds == ["cancel", "dismiss"]


def test_after_finalize_nothing_is_cancelled() -> None:
    job = ScriptedJob([PENDING, KeyboardInterrupt(), CONCLUDED])
    with pytest.raises(KeyboardInterrupt):
        drive(job, phase="merge")
    assert job.deeds == ["flush", "finalize"]


def test_a_dead_qemu_is_told_and_not_waited_for() -> None:
    job = ScriptedJob([RUNNING, Unavailable("QEMU went away")])
    job.cancel = lambda: (_ for _ in ()).throw(Unavailable("QEMU went away"))  # type: ignore[method-assign]
    with pytest.raises(Unavailable, match="went away"):
        drive(job, phase="merge")


def test_each_look_may_change_the_speed() -> None:
    job = ScriptedJob([RUNNING, PENDING, CONCLUDED])
    drive(job, phase="merge", on_look=lambda each, _now: each.set_speed(7))
    assert job.deeds == ["speed 7", "flush", "finalize", "flush", "dismiss"]


def test_what_each_state_asks_for() -> None:
    assert next_action(RUNNING, JobKind.STREAM) is Action.WAIT
    assert next_action(READY, JobKind.ACTIVE_COMMIT) is Action.COMPLETE
    assert next_action(READY, JobKind.ACTIVE_COMMIT, completed=True) is Action.WAIT
    assert next_action(PENDING, JobKind.STREAM) is Action.FINALIZE
    assert next_action(CONCLUDED, JobKind.STREAM) is Action.DISMISS
    assert next_action(GONE, JobKind.STREAM) is Action.NOTHING
    assert next_action(PAUSED, JobKind.STREAM, paused=3) is Action.WAIT
    assert next_action(PAUSED, JobKind.STREAM, paused=20) is Action.GIVE_UP
