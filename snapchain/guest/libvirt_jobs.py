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
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from snapchain.errors import Conflict, NotFound, SnapchainError, ToolFailed, Unavailable, Unsupported
from snapchain.guest import journal
from snapchain.guest.libvirt_disks import AGAIN
from snapchain.guest.protocol import GuestDisk, JobKind, JobProgress, JobStatus, Layer, State
from snapchain.host import libvirt
from snapchain.host.files import fsync_file, identity_of
from snapchain.host.os_errors import os_errors
from snapchain.host.qemu_processes import open_images
from snapchain.host.virsh import SECONDS_TO_CHANGE

if TYPE_CHECKING:
    from snapchain.guest.libvirt_guest import LibvirtGuest

OPERATION = "blockjob"
_LOOK_SECONDS = 0.25
_NO_JOB = "does not have an active block job"
_NOT_IN_CHAIN = "is not in this backing file chain"
"""QEMU's words for a layer that has left the chain."""
_KINDS = {
    "Block Commit": "commit",
    "Active Block Commit": "active-commit",
    "Block Pull": "stream",
    "Block Copy": "mirror",
    "Backup": "backup",
}
"""virsh's word for a type of block job -> ours."""


@dataclass(frozen=True, slots=True)
class BlockJob:
    """A block job as libvirt lists it. done, total: bytes"""

    kind: str
    done: int
    total: int


def block_job(said: str) -> BlockJob | None:
    """The job that `blockjob --raw` shows; None for none."""
    values = dict(line.strip().split("=", 1) for line in said.splitlines() if "=" in line)
    if "type" not in values:
        return None
    return BlockJob(_KINDS.get(values["type"], values["type"]), int(values["cur"]), int(values["end"]))


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
        _check_not_defined(self._guest, self._record.merged)
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


def _check_not_defined(guest: LibvirtGuest, merged: Sequence[Path]) -> None:
    """Raises Unavailable where the definition for the next start names one of these files."""
    lasting = guest.lasting_disks()
    named = {guest.path_of(layer) for disk in lasting for layer in disk.layers} & set(merged)
    if named:
        raise Unavailable(
            "the definition for the guest's next start still names merged files, which stay: "
            f"{', '.join(sorted(map(str, named)))}",
            subject=guest.name,
            hint="correct it by `virsh edit`, then run it again",
        )


# --- the command that begins one


def start(
    guest: LibvirtGuest,
    kind: JobKind,
    disk: str,
    *,
    lowest: Path,
    uppermost: Path,
    backing: str | None,
    job_id: str,
    speed: int,
) -> LibvirtJob:
    """See `Guest.start`."""
    found = guest.disk(disk)
    if found is None:
        raise NotFound("the guest has no disk of this name", subject=f"{guest.name}/{disk}")
    guest.check_idle([found])
    inputs = _inputs(f"{guest.name}/{disk}", found, lowest, uppermost)
    if kind is JobKind.COMMIT:
        _check_visible(guest)
    words = _job_words(kind, disk, found, inputs)
    if speed:
        words += ["--bandwidth", str(speed), "--bytes"]
    record = note(guest, job_id, kind, disk, inputs)
    job = LibvirtJob(guest, job_id, kind, disk, record)
    try:
        _begin(guest, words, keep_relative=backing is not None and not backing.startswith("/"))
    except Unavailable:
        raise  # it may have begun: its record stays
    except SnapchainError:
        job.dismiss()
        raise
    return job


def _check_visible(guest: LibvirtGuest) -> None:
    """Raises Unsupported where nobody could tell afterwards whether QEMU has written out the result."""
    process = guest.process()
    if process is None or open_images(process[0]) is None:
        raise Unsupported(
            "this user may not see which files the guest's QEMU has open, and a live merge relies on that",
            subject=guest.name,
            hint="run it as root",
        )


def _begin(guest: LibvirtGuest, words: list[str], *, keep_relative: bool) -> None:
    try:
        _order(guest, words, keep_relative=keep_relative)
    except ToolFailed as error:
        if _NOT_IN_CHAIN not in error.message:
            raise
        raise Conflict(
            "libvirt lists layers that QEMU has merged already: libvirtd died at the end of that merge",
            subject=guest.name,
            hint="shut the guest down and start it again, so that libvirt reads its chains anew; then run it again",
        ) from error


def _order(guest: LibvirtGuest, words: list[str], *, keep_relative: bool) -> None:
    verb, *more = words
    if keep_relative and "--active" not in words:
        try:
            guest.command(verb, *more, "--keep-relative", timeout=SECONDS_TO_CHANGE)
        except ToolFailed as error:
            # libvirt keeps relative names only where all of them are.
            if "relative" not in error.message:
                raise
        else:
            return
    guest.command(verb, *more, timeout=SECONDS_TO_CHANGE)


def _inputs(subject: str, disk: GuestDisk, lowest: Path, uppermost: Path) -> tuple[Layer, ...]:
    """The layers from `lowest` to `uppermost`. Raises Conflict where the chain is another one."""
    numbers = {layer.identity: number for number, layer in enumerate(disk.chain) if layer.identity is not None}
    first, last = numbers.get(identity_of(lowest) or (-1, -1)), numbers.get(identity_of(uppermost) or (-1, -1))
    if first is None or last is None or first >= last:
        raise Conflict(f"the chain of the disk does not have {lowest} below {uppermost}", subject=subject, hint=AGAIN)
    if any(layer.path is None for layer in disk.chain[first : last + 1]):
        raise Unsupported("a layer of the chain is no local file", subject=subject, hint="leave the disk out")
    return disk.chain[first : last + 1]


def _job_words(kind: JobKind, disk: str, found: GuestDisk, inputs: tuple[Layer, ...]) -> list[str]:
    """The virsh command that begins a job. Layers are named by libvirt's number, which is exact.

    Raises Unsupported for a stream: nothing but the guest, or QEMU's monitor, can flush its result (decision 0116).
    """
    is_active = inputs[-1] is found.active
    if kind is JobKind.STREAM:
        raise Unsupported(
            "snapchain does not stream through libvirt", subject=disk, hint="merge by a commit: --strategy commit"
        )
    if is_active is not (kind is JobKind.ACTIVE_COMMIT):
        raise Conflict(f"the active layer of the disk is {found.active.path} now", subject=disk, hint=AGAIN)
    words = ["blockcommit", "--path", disk, "--base", _index(disk, inputs[0])]
    return [*words, "--active"] if is_active else [*words, "--top", _index(disk, inputs[-1])]


def _index(disk: str, layer: Layer) -> str:
    """As libvirt names a layer: vda[3]."""
    found = re.fullmatch(r"libvirt-(\d+)-format", layer.node)
    return f"{disk}[{found[1]}]" if found else str(layer.path)
