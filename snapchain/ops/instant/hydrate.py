"""Copying a point into the image that depends on it, while no guest has the image open.

    qemu-storage-daemon:  image (qcow2) -> point (the export);  block-stream copies what the image lacks

What a killed run has copied stays in the image: the next run continues.  The job is never finalized: QEMU would remove
the backing name before what it holds is on the disk, and before anybody has compared the image with its point. So the
job is cancelled when all is copied, the daemon closes the image, and `finish` does the rest.

A read that fails stops the job. When the server, or its store, is back, the job is resumed, several times: the client
in QEMU needs some seconds to connect again.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from snapchain.errors import Conflict, Corrupt, SnapchainError, ToolFailed, Unavailable
from snapchain.guest.qmp import Monitor, Refused
from snapchain.guest.storage_daemon import StorageDaemon
from snapchain.host.files import read_small
from snapchain.model.events import Notice, OnEvent, Progress
from snapchain.ops.instant import server
from snapchain.ops.instant.record import InstantRecord

PHASE = "copy"
_JOB, _IMAGE, _FILE, _POINT = "hydrate", "image", "file", "point"
_TOP = {"driver": "qcow2", "node-name": _IMAGE, "file": _FILE, "backing": _POINT}
_FLUSH_SECONDS = 5.0
"""So much at most is copied again after a crash: QEMU keeps the tables in memory."""
_RECONNECT_SECONDS = 30
_DRAIN_SECONDS = server.PATIENCE + 60.0
"""For which a reopening may take: QEMU first waits for the reads that wait for a store that is away."""
_NO_ROOM = "nospace"
_LOOK_SECONDS = 0.5
_STALLED_LOOKS = 20
_TRIES = 15
_PAUSE = 1.0


def hydrate(
    image: Path,
    record: InstantRecord,
    *,
    passphrase: Callable[[], str | None],
    speed: int = 0,
    on_event: OnEvent,
) -> None:
    """Copy all that the image lacks. speed: bytes a second, 0 for no limit

    Raises Busy where a program has the image open, Unavailable where the point cannot be read or the image cannot be
    written: what was copied stays, and the next run continues.
    """
    nodes: list[dict[str, Any]] = [
        {
            "driver": "nbd",
            "node-name": _POINT,
            "read-only": True,
            "server": {"type": "unix", "path": record.socket},
            "export": record.export,
            "reconnect-delay": _RECONNECT_SECONDS,
        },
        {"driver": "file", "node-name": _FILE, "filename": str(image)},
        _TOP,
    ]
    with _started(image, record, nodes, passphrase) as daemon:
        _Copying(daemon.monitor, image, record, passphrase, on_event).run(speed)


def _started(
    image: Path, record: InstantRecord, nodes: list[dict[str, Any]], passphrase: Callable[[], str | None]
) -> StorageDaemon:
    """With a server that may end at any moment: then another one is started."""
    for _ in range(_TRIES):
        server.ensure(image, passphrase)
        try:
            return StorageDaemon(image.name, record.token, nodes)
        except ToolFailed:
            if server.serves(record):
                raise
    raise Unavailable("the server of the point ends at once", subject=image, hint=f"see {server.log_of(record)}")


class _Copying:
    def __init__(
        self,
        monitor: Monitor,
        image: Path,
        record: InstantRecord,
        passphrase: Callable[[], str | None],
        on_event: OnEvent,
    ) -> None:
        self._monitor, self._image, self._record = monitor, image, record
        self._passphrase, self._on_event = passphrase, on_event
        self._done, self._stalled, self._tries = -1, 0, 0
        self._has_said = False
        self._flushed_at = time.monotonic()

    def run(self, speed: int) -> None:
        self._monitor.execute(
            "block-stream",
            {
                "device": _IMAGE,
                "job-id": _JOB,
                "on-error": "stop",
                "speed": speed,
                "auto-finalize": False,
                "auto-dismiss": False,
            },
        )
        while True:
            seen = self._monitor.mark()
            job = next((each for each in self._monitor.rows("query-jobs") if each.get("id") == _JOB), None)
            if job is None or job.get("status") == "concluded":
                why = (job or {}).get("error") or "it is gone"
                raise Unavailable(f"the copying has failed: {why}", subject=self._image, hint="run the command again")
            self._note(job)
            if job.get("status") == "pending":
                break
            if job.get("status") == "paused":
                self._resume()
            elif not self._stalled and time.monotonic() - self._flushed_at >= _FLUSH_SECONDS:
                self._flush()
            elif self._stalled and self._stalled % _STALLED_LOOKS == 0:
                self._revive()
            self._monitor.wait(_is_of_job, after=seen, seconds=_LOOK_SECONDS)
        with suppress(Refused):
            self._monitor.execute("job-cancel", {"id": _JOB})

    def _flush(self) -> None:
        """A reopening with the same options writes all that QEMU holds. The daemon has no other command for that."""
        self._monitor.execute("blockdev-reopen", {"options": [_TOP]}, seconds=_DRAIN_SECONDS)
        self._flushed_at = time.monotonic()

    def _note(self, job: Any) -> None:
        done, total = int(job.get("current-progress", 0)), int(job.get("total-progress", 0))
        if done != self._done:
            self._done, self._stalled, self._tries = done, 0, 0
        else:
            self._stalled += 1
        if total:
            self._on_event(Progress(PHASE, min(done, total), total))

    def _resume(self) -> None:
        """After an error: again and again, since the client in QEMU takes some seconds to connect again."""
        # QEMU calls each error of a stream one of reading: the copy is written by the filter that reads.
        if any(each.get("io-status") == _NO_ROOM for each in self._monitor.rows("query-block-jobs")):
            raise _not_written(self._image)
        self._revive()
        if self._tries >= _TRIES:
            raise self._given_up()
        self._tries += 1
        time.sleep(_PAUSE)
        with suppress(Refused):
            self._monitor.execute("job-resume", {"id": _JOB})

    def _revive(self) -> None:
        """Start the server where it has gone. A store that is away is waited for. Raises Conflict without an image."""
        if not os.path.lexists(self._image):
            raise Conflict(
                "it was removed while it was copied",
                subject=self._image,
                hint="the same command begins anew; to give it up, release the hold that `snapchain hold --list` shows "
                "and delete the record beside it",
            )
        if server.serves(self._record):
            self._say("the destination does not answer, or is slow; waiting for it")
            return
        self._say("the server of the point has ended, and is started again")
        until = time.monotonic() + server.PATIENCE
        while True:
            try:
                server.ensure(self._image, self._passphrase)
            except Unavailable:
                if time.monotonic() > until:
                    raise
                time.sleep(_PAUSE)
            else:
                return

    def _say(self, words: str) -> None:
        if not self._has_said:
            self._on_event(Notice.of(self._record.address, words))
        self._has_said = True

    def _given_up(self) -> SnapchainError:
        words = last_note(self._record)
        if words is None:
            return Unavailable(
                "the point cannot be read, or the image cannot be written",
                subject=self._image,
                hint=f"look at the kernel's log, and at {server.log_of(self._record)}; then run the command again: it "
                "continues",
            )
        return Corrupt(
            f"a part of the point cannot be read: {words}",
            subject=self._record.address,
            hint="nothing was filled with zeroes. `snapchain verify --read-data` and `snapchain repair` mend a "
            "repository; then run the command again: it continues",
        )


def _not_written(image: Path) -> Unavailable:
    return Unavailable(
        "the image cannot be written: its file system is full",
        subject=image,
        hint="make room, then run the command again: it continues",
    )


def _is_of_job(name: str, data: Any) -> bool:
    return (name == "JOB_STATUS_CHANGE" and data.get("id") == _JOB) or name.startswith("BLOCK_JOB_")


def last_note(record: InstantRecord) -> str | None:
    """The newest line of the server's log about a range that could not be read."""
    with suppress(SnapchainError):
        lines = read_small(server.log_of(record)).decode(errors="replace").splitlines()
        return next((line for line in reversed(lines) if "could not be read" in line), None)
    return None
