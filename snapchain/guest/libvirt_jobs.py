"""Block jobs of libvirt domains.

libvirt gives a job its own id, changes the graph itself, and forgets the job at once.  So a job of ours has a record
(journal.py, operation `blockjob`), written before it begins and removed when it is dismissed: by it a later run, or
`guests`, knows whose job it is.  What became of a job that nobody knows any more is judged by the domain's chain:

    commit, stream    the job is done when the layers that it merges away are out of the chain
    active commit     it is done when the lowest layer is the active one

How the data become durable without QEMU's monitor, and why a result counts only then: docs/decisions/0116.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from snapchain.errors import Corrupt, ToolFailed, Unavailable
from snapchain.guest import journal
from snapchain.guest.protocol import GuestDisk, JobKind, JobProgress, JobStatus, Layer, State
from snapchain.host.files import fsync_file
from snapchain.host.os_errors import os_errors
from snapchain.host.qemu_processes import open_images
from snapchain.image import ImageFile
from snapchain.image.backing import Place
from snapchain.image.opening import open_image
from snapchain.image.physical import RunBudget
from snapchain.model.extents import ABSENT, DATA, Extents, fold, pairwise

if TYPE_CHECKING:
    from snapchain.guest.libvirt_guest import LibvirtGuest

OPERATION = "blockjob"
_FLUSH_SECONDS = 60.0
"""How long to wait for the guest's own flush after a stream. An operating system flushes every few seconds."""
_LOOK_SECONDS = 0.25
_NO_JOB = "does not have an active block job"


@dataclass(frozen=True, slots=True)
class JobRecord:
    """A job of ours, as its record has it. lowest, uppermost: its inputs' ends

    merged: the inputs that go, lowest first; formats: theirs
    """

    path: Path
    id: str
    kind: JobKind
    disk: str
    lowest: Path
    uppermost: Path
    merged: tuple[Path, ...]
    formats: tuple[str, ...]
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
            formats=tuple(str(details["formats"]).split("\0")),
            process=found.record.process,
        )
    except (KeyError, ValueError):
        return None


def note(guest: LibvirtGuest, job_id: str, kind: JobKind, disk: str, inputs: Sequence[Layer]) -> JobRecord:
    """Record a job that is about to begin. inputs: lowest first, of local files"""
    merged = inputs[:-1] if kind is JobKind.STREAM else inputs[1:]
    begun = journal.begun(
        guest,
        OPERATION,
        job=job_id,
        kind=kind.value,
        disk=disk,
        lowest=str(inputs[0].path),
        uppermost=str(inputs[-1].path),
        merged="\0".join(str(layer.path) for layer in merged),
        formats="\0".join(layer.image_format for layer in merged),
    )
    record = _record(journal.Found(journal.write(begun), begun))
    assert record is not None
    return record


class LibvirtJob:
    """Implements `protocol.Job`. record: None where no job of this id was begun: it is GONE."""

    def __init__(self, guest: LibvirtGuest, job_id: str, kind: JobKind, disk: str, record: JobRecord | None) -> None:
        self._guest, self._id, self._kind, self._disk, self._record = guest, job_id, kind, disk, record
        self._total = 1
        self._merged_since: float | None = None
        self._is_cancelled = False

    @property
    def id(self) -> str:
        return self._id

    @property
    def kind(self) -> JobKind:
        return self._kind

    def progress(self) -> JobProgress:
        """PENDING and PAUSED are never seen: libvirt finalizes by itself, and does not tell of a pause.

        CONCLUDED once the chain shows the result, and its data are no longer only in QEMU's memory.
        Raises Unavailable where the guest does not flush after a stream.
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
            return self._merged(self._record, disk)
        disk = self._guest.disk(self._disk) if self._is_forgotten() else None
        if disk is None:  # QEMU has ended it, and libvirt has not changed its XML yet
            return JobProgress(JobStatus.RUNNING, 0, self._total)
        if is_merged(self._record, disk):
            return self._merged(self._record, disk)
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

        Raises Unavailable where that cannot be seen yet; the inputs must then stay.
        """
        if self._record is None:
            return
        disk = self._guest.disk(self._disk)
        if disk is None or not is_merged(self._record, disk):
            return  # before the change of the graph: libvirt does not stop there
        if self._kind is JobKind.COMMIT:
            self._check_written_out(self._record.lowest)
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

    def _merged(self, record: JobRecord, disk: GuestDisk) -> JobProgress:
        done = JobProgress(JobStatus.CONCLUDED, self._total, self._total)
        if record.kind is not JobKind.STREAM or self._is_cancelled or _is_taken_in(record, disk):
            return done
        now = time.monotonic()
        self._merged_since = self._merged_since or now
        if now - self._merged_since > _FLUSH_SECONDS:
            raise Unavailable(
                f"the guest has not flushed its disk {self._disk} in {_FLUSH_SECONDS:g} seconds; the merged files stay",
                subject=self._guest.name,
                hint="run it again when the guest has written something",
            )
        return JobProgress(JobStatus.RUNNING, self._total, self._total)

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
    stays = record.uppermost if record.kind is JobKind.STREAM else record.lowest
    return stays in paths and not set(record.merged) & set(paths)


class _LiveFile(ImageFile):
    """A file that QEMU writes to meanwhile: its map is of one moment."""

    def changed(self) -> bool:
        return False


def _is_taken_in(record: JobRecord, disk: GuestDisk) -> bool:
    """Whether the tables of the active layer, as they are in its file, map all that the merged layers hold.

    QEMU keeps changed tables in memory until the guest flushes; a power cut before that would lose streamed data.
    A cluster that is mapped stays so, since only a discard at the root removes it. So one look is a proof.
    """
    active = disk.active
    assert active.path is not None
    is_root = len(disk.chain) == 1
    try:
        with ExitStack() as stack:
            upper = stack.enter_context(_opened(active.path, active.image_format))
            formats = zip(record.merged, record.formats, strict=True)
            inputs = [stack.enter_context(_opened(path, image_format)) for path, image_format in formats]
            return has_all(upper.physical.extents(), [each.physical.extents() for each in inputs], is_root=is_root)
    except Corrupt:
        return False  # a table is being written; the next look tells


def has_all(upper: Extents, inputs: Sequence[Extents], *, is_root: bool) -> bool:
    """Whether a layer maps whatever `inputs` (lowest first) map. is_root: nothing is below it, where zeros may go."""
    below = fold(inputs).resized(upper.size, ABSENT)
    _, mine, theirs = pairwise(upper, below)
    needed = theirs >= DATA if is_root else theirs != ABSENT
    return not bool((needed & (mine == ABSENT)).any())


def _opened(path: Path, image_format: str) -> ImageFile:
    place = Place.of(path)
    fd = open_image(place.real, subject=place.path, named_by=place.named_by)
    return _LiveFile(place, fd, format="raw" if image_format == "raw" else "qcow2", budget=RunBudget())
