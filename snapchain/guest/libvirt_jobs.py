"""Block jobs of libvirt domains.

libvirt gives a job its own id, changes the graph itself, and forgets the job at once.  So a job of ours has a record
(journal.py, operation `blockjob`), written before it begins and removed when it is dismissed: by it a later run, or
`guests`, knows whose job it is.  What became of a job that nobody knows any more is judged by the domain's chain:

    commit           the job is done when the layers that it merges away are out of the chain
    active commit    so is the old active layer then; the guest writes to the lowest

How the data become durable without QEMU's monitor, and why a result counts only then: docs/decisions/0116.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from snapchain.errors import ToolFailed, Unavailable
from snapchain.guest import journal
from snapchain.guest.protocol import GuestDisk, JobKind, JobProgress, JobStatus, Layer, State
from snapchain.host import libvirt
from snapchain.host.files import fsync_file
from snapchain.host.os_errors import os_errors
from snapchain.host.qemu_processes import open_images

if TYPE_CHECKING:
    from snapchain.guest.libvirt_guest import LibvirtGuest

OPERATION = "blockjob"
_LOOK_SECONDS = 0.25
_NO_JOB = "does not have an active block job"


@dataclass(frozen=True, slots=True)
class JobRecord:
    """A job of ours, as its record has it. lowest, uppermost: its inputs' ends; merged: those that go."""

    path: Path
    id: str
    kind: JobKind
    disk: str
    lowest: Path
    uppermost: Path
    merged: tuple[Path, ...]
    process: tuple[int, int] | None


def records(guest: LibvirtGuest) -> list[JobRecord]:
    """Those of jobs in this guest's QEMU as it runs now. Records of an earlier QEMU are removed: its jobs are gone."""
    found, _ = journal.find(guest=guest.name, operation=OPERATION)
    for each in found:
        if each.record.qemu_runs is False:
            journal.remove(each.path)
    now = guest.process() if found else None
    mine = [each for each in found if each.record.process in (None, now)]
    return [record for each in mine if (record := _record(each)) is not None]


def _record(found: journal.Found) -> JobRecord | None:
    details = found.record.details
    try:
        return JobRecord(
            path=found.path,
            id=str(details["job"]),
            kind=JobKind(str(details["kind"])),
            disk=str(details["disk"]),
            lowest=Path(str(details["lowest"])),
            uppermost=Path(str(details["uppermost"])),
            merged=tuple(Path(each) for each in str(details["merged"]).split("\0")),
            process=found.record.process,
        )
    except (KeyError, ValueError):
        return None


def note(guest: LibvirtGuest, job_id: str, kind: JobKind, disk: str, inputs: Sequence[Layer]) -> JobRecord:
    """Record a job that is about to begin. inputs: lowest first, of local files"""
    begun = journal.begun(
        guest,
        OPERATION,
        job=job_id,
        kind=kind.value,
        disk=disk,
        lowest=str(inputs[0].path),
        uppermost=str(inputs[-1].path),
        merged="\0".join(str(layer.path) for layer in inputs[1:]),
    )
    record = _record(journal.Found(journal.write(begun), begun))
    assert record is not None
    return record


class LibvirtJob:
    """Implements `protocol.Job`. record: None where no job of this id was begun: it is GONE."""

    def __init__(self, guest: LibvirtGuest, job_id: str, kind: JobKind, disk: str, record: JobRecord | None) -> None:
        self._guest, self._id, self._kind, self._disk, self._record = guest, job_id, kind, disk, record
        self._total = 1
        self._is_cancelled = False

    @property
    def id(self) -> str:
        return self._id

    @property
    def kind(self) -> JobKind:
        return self._kind

    def progress(self) -> JobProgress:
        """PENDING and PAUSED are never seen: libvirt finalizes by itself, and does not tell of a pause.

        CONCLUDED once the chain shows the result, or libvirt has no such job any more.
        """
        if self._record is None or not self._is_same_qemu():
            return JobProgress(JobStatus.GONE, 0, 0)
        listed = self._guest.block_job(self._disk)
        disk = self._guest.disk(self._disk)
        if disk is None:
            return JobProgress(JobStatus.GONE, 0, 0)
        if listed is not None:
            self._total = max(1, listed.total)
            status = JobStatus.READY if self._guest.is_ready(self._disk) else JobStatus.RUNNING
            return JobProgress(status, listed.done, listed.total)
        if is_merged(self._record, disk):
            return self._done()
        disk = self._guest.disk(self._disk) if self._is_forgotten() else None
        if disk is None:  # QEMU has ended it, and libvirt has not changed its XML yet
            return JobProgress(JobStatus.RUNNING, 0, self._total)
        if is_merged(self._record, disk):
            return self._done()
        why = "it was cancelled" if self._is_cancelled else "libvirt ended the job, and the chain is as before"
        return JobProgress(JobStatus.CONCLUDED, 0, self._total, why)

    def wait(self, seconds: float) -> None:
        time.sleep(min(seconds, _LOOK_SECONDS))

    def set_speed(self, bytes_per_second: int) -> None:
        self._command("--bandwidth", str(bytes_per_second), "--bytes")

    def complete(self) -> None:
        self._command("--pivot")

    def flush(self) -> None:
        """Bring the files to the disk, from outside: QEMU has written all that the new headers rely on.

        Raises Unavailable where that cannot be seen, or a definition names a merged file: the inputs must then stay.
        """
        if self._record is None:
            return
        disk = self._guest.disk(self._disk)
        libvirt.forget()
        if disk is None or not is_merged(self._record, disk):
            return  # before the change of the graph: libvirt does not stop there
        if self._kind is JobKind.COMMIT:
            self._check_written_out(self._record.lowest)
        self._guest.check_not_defined(self._record.merged)
        if self._kind is JobKind.ACTIVE_COMMIT:
            return  # QEMU has flushed the result before the pivot
        for layer in disk.chain:
            if layer.path is not None:
                fsync_file(Path(os.path.realpath(layer.path)))

    def finalize(self) -> None:
        """libvirt does."""

    def dismiss(self) -> None:
        if self._record is not None:
            journal.remove(self._record.path)

    def cancel(self) -> None:
        self._is_cancelled = True
        self._command("--abort", "--async")

    def _command(self, *words: str) -> None:
        """A blockjob command; nothing happens where the job has ended meanwhile."""
        if self._record is None:
            return
        try:
            self._guest.command("blockjob", "--path", self._disk, *words)
        except ToolFailed as error:
            if _NO_JOB not in error.message:
                raise

    def _done(self) -> JobProgress:
        return JobProgress(JobStatus.CONCLUDED, self._total, self._total)

    def _is_forgotten(self) -> bool:
        """Whether libvirt has no job of the disk in its books either: its XML shows the outcome from then on."""
        try:
            self._guest.command("blockjob", "--path", self._disk, "--bandwidth", "0", "--bytes")
        except ToolFailed as error:
            return _NO_JOB in error.message
        return False

    def _is_same_qemu(self) -> bool:
        assert self._record is not None
        if self._record.process is not None:
            return self._guest.process() == self._record.process
        return self._guest.state() in {State.RUNNING, State.PAUSED}

    def _check_written_out(self, path: Path) -> None:
        """QEMU writes a layer's tables out when it opens it again for reading only, as it does after a commit."""
        process = self._guest.process()
        images = None if process is None else open_images(process[0])
        with os_errors(path):
            status = path.stat()
        if images is None or images.get((status.st_dev, status.st_ino), False):
            raise Unavailable(
                "snapchain cannot see that QEMU has written out the result of the merge; the merged files stay",
                subject=path,
                hint="run it again, as root",
            )


def is_merged(record: JobRecord, disk: GuestDisk) -> bool:
    """Whether the chain shows the result of a job."""
    paths = [layer.path for layer in disk.chain]
    return record.lowest in paths and not set(record.merged) & set(paths)
