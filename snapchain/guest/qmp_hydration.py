"""A disk of a bare QEMU that is filled from a served point while its guest runs, by a stream job.

    the image names the point, no job   begin
    paused, by an I/O error             have the server run, resume: again and again, until QEMU is connected
    PENDING                             flush, finalize
    CONCLUDED                           flush, dismiss
    the image names nothing, no job     done

A guest whose own read failed is stopped (rerror=stop), and its request is repeated when it is continued: so it sees no
error.  The flush is what QEMU leaves out (guest/jobs.py).  A job that was cut off is begun again: what the image has
already is skipped.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from enum import Enum
from pathlib import Path

from snapchain.errors import Conflict, Unavailable
from snapchain.guest.jobs import WAIT_SECONDS, OnLook, give_up
from snapchain.guest.protocol import GuestDisk, JobKind, JobProgress, JobStatus
from snapchain.guest.qmp import Refused
from snapchain.guest.qmp_graph import word
from snapchain.guest.qmp_guest import QmpGuest
from snapchain.guest.qmp_jobs import QmpJob, begin
from snapchain.host.files import identity_of
from snapchain.model.events import Notice, OnEvent, Progress

_PAUSED_LOOKS = 2
"""Looks in a row after which a paused job is resumed: QEMU pauses it for a moment at each change of the graph."""
_STOPPED = "io-error"
_NO_ROOM = "nospace"
_CONTINUE_SECONDS = 1.0
"""Between two requests that a stopped guest repeats."""
_SERVER_SECONDS = 2.0
"""Between two looks whether the server runs. It is started again long before a request has waited in vain."""
_SERVER_PATIENCE = 600.0
"""For how long a server that cannot be started is tried."""
_STUCK_SECONDS = 120.0
"""For how long failed reads are repeated without a byte copied, while the server runs: then the data are lost there."""


class Act(Enum):
    """What a disk asks for."""

    BEGIN = "begin"
    WAIT = "wait"
    RESUME = "resume"
    FINALIZE = "finalize"
    DISMISS = "dismiss"
    DONE = "done"


def next_act(status: JobStatus, *, depends: bool, paused: int) -> Act:
    """What to do with a disk. depends: it has a layer below its image; paused: looks in a row before this one."""
    match status:
        case JobStatus.GONE:
            return Act.BEGIN if depends else Act.DONE
        case JobStatus.PAUSED:
            return Act.RESUME if paused + 1 >= _PAUSED_LOOKS else Act.WAIT
        case JobStatus.PENDING:
            return Act.FINALIZE
        case JobStatus.CONCLUDED:
            return Act.DISMISS
    return Act.WAIT


def may_continue(run_state: str, *, lacks_room: bool) -> bool:
    """Whether a guest is continued: one that an I/O error has stopped, and nobody else."""
    return run_state == _STOPPED and not lacks_room


class Hydration:
    """Fills one image of a running guest.

    job_id: the same in each run, so that the next one finds the job
    bitmap: of what was written, for an image at rest; it is removed when the image is filled
    check: raises where the image must not lose its backing file; asked before the copying, and at its end
    serve: has the server run, and tells whether it had to be started; it raises Unavailable where that fails
    pace: watches a disk's latency, and sets the speed of its job; first_speed: bytes a second, 0 for no limit
    """

    def __init__(
        self,
        guest: QmpGuest,
        image: Path,
        *,
        job_id: str,
        bitmap: str | None,
        check: Callable[[], None],
        serve: Callable[[], bool],
        pace: Callable[[QmpGuest, str], OnLook],
        first_speed: int,
        on_event: OnEvent,
    ) -> None:
        self._guest, self._monitor, self._image, self._bitmap = guest, guest.monitor, image, bitmap
        self._check = check
        self._serve, self._pace, self._first_speed, self._on_event = serve, pace, first_speed, on_event
        self._node = ""
        self._job = QmpJob(
            guest.monitor,
            job_id,
            JobKind.STREAM,
            all_nodes=lambda: [self._node],
            after_dismiss=guest.overlays.close_orphans,
        )
        self._finalized = False
        self._paused = 0
        self._served_at = 0.0
        self._fails_since: float | None = None
        self._continued_at = 0.0
        self._ignores_room = True
        self._copied, self._copied_at, self._failed, self._told = -1, 0.0, False, 0

    def run(self) -> None:
        """Until the image depends on nothing any more; from whatever state an earlier run has left.

        Interrupted, the job is cancelled: what was copied stays, and the guest runs on the rest of the point.
        Raises Unavailable where QEMU has ended, where its file system is full, where the server cannot be started and
        where a part of the point cannot be read; Conflict where the guest does not use the image any more.
        """
        disk = self._disk()
        self._node = disk.active.node
        look = self._pace(self._guest, disk.name)
        try:
            while self._step(look):
                pass
        except BaseException as error:
            if not self._finalized:
                give_up(self._job, on_event=self._on_event, because=error)
            raise
        self._drop_bitmap()

    def _step(self, look: OnLook) -> bool:
        """Look once, and do what the state asks for. Returns whether anything is left."""
        self._keep_going()
        job, now = self._job, self._job.progress()
        self._check_moves(now)
        # The chain is asked for only where there is no job: beside a stream QEMU 7.2 might not survive it.
        depends = now.status is not JobStatus.GONE or len(self._disk().chain) > 1
        match next_act(now.status, depends=depends, paused=self._paused):
            case Act.BEGIN:
                self._check()
                self._begin()
            case Act.WAIT:
                self._tell(now)
                if now.status is JobStatus.RUNNING:
                    look(job, now)
                job.wait(WAIT_SECONDS)
            case Act.RESUME:
                self._failed = True
                # Refused where it is not paused any more, or only for a moment.
                with suppress(Refused):
                    self._monitor.execute("job-resume", {"id": job.id})
                job.wait(WAIT_SECONDS)
            case Act.FINALIZE:
                job.flush()
                self._check()
                self._finalized = True
                job.finalize()
                job.wait(WAIT_SECONDS)
            case Act.DISMISS:
                self._finalized = True
                self._dismiss(now)
            case Act.DONE:
                return False
        self._paused = self._paused + 1 if now.status is JobStatus.PAUSED else 0
        return True

    def _begin(self) -> None:
        self._finalized = False
        arguments = {"job-id": self._job.id, "device": self._node, "on-error": "stop", "speed": self._first_speed}
        begin(self._monitor, JobKind.STREAM, "block-stream", arguments, backing=None)

    def _dismiss(self, now: JobProgress) -> None:
        """Let a concluded job go. Raises Unavailable for one that failed."""
        if now.error is None:
            self._job.flush()
        self._job.dismiss()
        if now.error is not None:
            raise Unavailable(
                f"QEMU did not fill it: {now.error}",
                subject=self._image,
                hint="run the command again: it continues",
            )

    def _drop_bitmap(self) -> None:
        active = self._disk().active
        if self._bitmap in {each.name for each in active.bitmaps}:
            arguments = {"node": active.node, "name": self._bitmap}
            self._monitor.execute("block-dirty-bitmap-remove", arguments)

    def _disk(self) -> GuestDisk:
        """The guest's disk whose active layer this image is. Raises Conflict."""
        wanted = identity_of(self._image)
        for disk in self._guest.disks():
            if disk.chain and wanted is not None and disk.active.identity == wanted:
                return disk
        raise Conflict(
            "the guest does not write to this image any more",
            subject=self._image,
            hint=f"`snapchain guests {self._guest.option}` shows its disks",
        )

    def _keep_going(self) -> None:
        """Have the server run, and the guest, where an I/O error has stopped it."""
        state = word(self._monitor.fields("query-status"), "status")
        if (state == _STOPPED or time.monotonic() - self._served_at > _SERVER_SECONDS) and not self._is_served():
            return
        lacks_room = self._lacks_room() if state == _STOPPED else False
        if lacks_room and not self._ignores_room:
            raise Unavailable(
                "the guest is stopped, since there is no room for what it writes",
                subject=self._image.parent,
                hint="make room, then run the command again: the guest goes on, and has seen no error",
            )
        if may_continue(state, lacks_room=lacks_room and not self._ignores_room):
            self._continue()
        self._ignores_room = False

    def _continue(self) -> None:
        """Let the guest repeat its request; not too often, since QEMU's client needs some seconds to connect again."""
        at = time.monotonic()
        if at - self._continued_at < _CONTINUE_SECONDS:
            return
        if self._continued_at == 0.0:
            self._on_event(Notice("the guest was stopped by an I/O error, and is continued"))
        self._continued_at, self._failed = at, True
        with suppress(Refused):
            self._monitor.execute("cont")

    def _is_served(self) -> bool:
        """Whether the server runs now. Raises Unavailable where it could not be started for too long."""
        try:
            started = self._serve()
        except Unavailable as error:
            if self._fails_since is None:
                self._fails_since = time.monotonic()
                self._on_event(Notice(f"the server could not be started again, and is tried again: {error}"))
            elif time.monotonic() - self._fails_since > _SERVER_PATIENCE:
                raise
            time.sleep(WAIT_SECONDS)
            return False
        if started:
            self._on_event(Notice("the server of the point had ended, and was started again"))
        self._served_at, self._fails_since = time.monotonic(), None
        return True

    def _lacks_room(self) -> bool:
        """Whether an I/O error was a full file system. The job of a full one is paused as well."""
        rows = [*self._monitor.rows("query-block"), *self._monitor.rows("query-block-jobs")]
        return any(each.get("io-status") == _NO_ROOM for each in rows)

    def _check_moves(self, now: JobProgress) -> None:
        """Raises Unavailable where nothing but errors came for too long."""
        at = time.monotonic()
        if now.done != self._copied or self._fails_since is not None:
            self._copied, self._copied_at, self._failed = now.done, at, False
        elif self._failed and at - self._copied_at > _STUCK_SECONDS:
            raise Unavailable(
                "the point cannot be read at some place, for the guest or for the copy, and repeating it does not help",
                subject=self._image,
                hint="see `snapchain verify --read-data`; the guest may be stopped, and what it has written is kept",
            )

    def _tell(self, now: JobProgress) -> None:
        if now.total:
            self._told = max(self._told, min(now.done, now.total))
            self._on_event(Progress("copy", self._told, now.total))
