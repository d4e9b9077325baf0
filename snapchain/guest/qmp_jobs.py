"""Block jobs of a bare QEMU: begun with our ids, finalized and dismissed by us, and found again by their ids."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from snapchain.errors import Busy, SnapchainError, Unavailable
from snapchain.guest.protocol import JobKind, JobProgress, JobStatus
from snapchain.guest.qmp import Monitor, Refused, not_understood

_STATUS = {
    "undefined": JobStatus.RUNNING,
    "created": JobStatus.RUNNING,
    "running": JobStatus.RUNNING,
    "waiting": JobStatus.RUNNING,
    "aborting": JobStatus.RUNNING,
    "paused": JobStatus.PAUSED,
    "standby": JobStatus.PAUSED,
    "ready": JobStatus.READY,
    "pending": JobStatus.PENDING,
    "concluded": JobStatus.CONCLUDED,
    "null": JobStatus.GONE,
}
"""waiting: for other jobs of its transaction; aborting: on its way to concluded."""
_OVER_FOR = {
    "job-dismiss": (JobStatus.GONE,),
    "block-job-set-speed": (JobStatus.PENDING, JobStatus.CONCLUDED, JobStatus.GONE),
}
"""The states in which a job has no use for a command any more, where these are others than for the rest."""
_IN_THE_WAY = re.compile(r"\bbusy\b|in use|used as|\block\b|conflict|permission|blocked", re.IGNORECASE)


def in_the_way(refused: Refused) -> SnapchainError:
    """The error for a refusal: Busy where something else at work is the reason, by QEMU's words."""
    if not _IN_THE_WAY.search(refused.words):
        return refused
    return Busy(refused.message, subject=refused.subject, hint="wait until what uses it has ended, or end it")


class QmpJob:
    """See `Job`. nodes: of which one's header or data the job changes; () where that is not known (any more)

    all_nodes: of the disk's chain now, without listing QEMU's nodes; after_dismiss: closes what the job left open
    """

    def __init__(
        self,
        monitor: Monitor,
        job_id: str,
        kind: JobKind,
        *,
        nodes: Sequence[str] = (),
        all_nodes: Callable[[], Sequence[str]],
        after_dismiss: Callable[[], None],
    ) -> None:
        self.id, self.kind = job_id, kind
        self._monitor, self._nodes = monitor, tuple(nodes)
        self._all_nodes, self._after_dismiss = all_nodes, after_dismiss
        self._seen = monitor.mark()

    def progress(self) -> JobProgress:
        """See `Job`."""
        self._seen = self._monitor.mark()
        for each in self._monitor.rows("query-jobs"):
            if each.get("id") == self.id:
                return self._read(each)
        return JobProgress(JobStatus.GONE, 0, 0)

    def _read(self, row: Mapping[str, Any]) -> JobProgress:
        status = _STATUS.get(str(row.get("status")))
        done, total, error = row.get("current-progress"), row.get("total-progress"), row.get("error")
        if status is None or not isinstance(done, int) or not isinstance(total, int):
            raise not_understood("query-jobs", f"the job {self.id} has no known status", subject=self._monitor.path)
        return JobProgress(status, done, total, None if error is None else str(error))

    def wait(self, seconds: float) -> None:
        """See `Job`."""
        self._monitor.wait(self._is_mine, after=self._seen, seconds=seconds)

    def _is_mine(self, name: str, data: Mapping[str, Any]) -> bool:
        return (name == "JOB_STATUS_CHANGE" and data.get("id") == self.id) or (
            name.startswith("BLOCK_JOB_") and data.get("device") == self.id
        )

    def set_speed(self, bytes_per_second: int) -> None:
        """See `Job`. A job that is over has no speed."""
        self._unless_over("block-job-set-speed", {"device": self.id, "speed": bytes_per_second})

    def complete(self) -> None:
        """See `Job`."""
        self._monitor.execute("job-complete", {"id": self.id})

    def flush(self) -> None:
        """See `Job`. QMP has no command for it; the human monitor's `qemu-io` flushes a node.

        The guest waits for that as long as it takes. Nothing is flushed for an active commit: before its pivot QEMU
        has flushed the result while the guest went on, and the files that leave the chain are not written any more.

        QEMU tells only that a node is not there, never that its flush failed: who relies on the data reads them.
        Raises Unavailable for a node that is not there.
        """
        if self.kind is JobKind.ACTIVE_COMMIT:
            return
        for node in self._nodes or self._all_nodes():
            if said := self._monitor.human(f'qemu-io {node} "flush"', repeatable=True).strip():
                raise Unavailable(
                    f"QEMU could not flush {node}: {said}",
                    subject=self._monitor.path,
                    hint="look at the storage of its images",
                )

    def finalize(self) -> None:
        """See `Job`."""
        self._monitor.execute("job-finalize", {"id": self.id})

    def dismiss(self) -> None:
        """See `Job`. Idempotent. Closes the layers of ours that left the chain; QEMU keeps named nodes open."""
        self._unless_over("job-dismiss", {"id": self.id})
        self._after_dismiss()

    def cancel(self) -> None:
        """See `Job`. `job-cancel` never completes a job, not even a ready one. What remains is dismissed."""
        self._unless_over("job-cancel", {"id": self.id})

    def _unless_over(self, command: str, arguments: Mapping[str, Any]) -> None:
        """Refused because the job is over in the meantime: nothing is left to do."""
        try:
            self._monitor.execute(command, arguments)
        except Refused:
            if self.progress().status not in _OVER_FOR.get(command, (JobStatus.CONCLUDED, JobStatus.GONE)):
                raise


def begin(monitor: Monitor, kind: JobKind, command: str, arguments: Mapping[str, Any], *, backing: str | None) -> None:
    """Start a job. backing: the name that is recorded in the header that the job changes.

    Raises Busy when something else at work is in the way, Refused.
    """
    asked = {
        **arguments,
        # At PENDING of an active commit QEMU holds the guest's I/O back: it shall not wait there for us.
        "auto-finalize": kind is JobKind.ACTIVE_COMMIT,
        "auto-dismiss": False,
        **({"backing-file": backing} if backing is not None else {}),
    }
    if monitor.has(command, "backing-mask-protocol"):
        asked["backing-mask-protocol"] = True
    try:
        monitor.execute(command, asked)
    except Refused as refused:
        raise in_the_way(refused) from refused
