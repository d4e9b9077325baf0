"""restore DEST::GUEST[@POINT] DIR: all disks of a guest point, and then a definition of the guest on them.

    DIR/vda.qcow2  vdb.qcow2     the disks, each restored and proven as any disk
    DIR/web1.xml                 libvirt: the definition with the new paths; web1.sh for a guest that QEMU ran alone
    DIR/web1.live.xml            as it ran; web1.recorded.xml as it was defined
    DIR/web1.VARS.fd, web1.tpm/  firmware variables, and the state of its TPM

All disks or no definition: nothing of it is written before all disks are there. A small note in DIR says which files
this restore has finished, by inode and times, so that a run that was cut off is continued and nobody's file is taken
for one of these. No existing file is replaced.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from snapchain.destination.address import in_full
from snapchain.destination.guest_record import RecordedDisk
from snapchain.destination.reading import ReadableDestination
from snapchain.destination.records import PointRecord
from snapchain.errors import Busy, Conflict, Corrupt, InvalidInput, SnapchainError
from snapchain.host.directory import Directory, same_file
from snapchain.host.files import UNCHANGED, Standing, make_directories, remove_leftover
from snapchain.host.note_file import NoteFile
from snapchain.host.os_errors import os_errors
from snapchain.host.temporary_names import NEW, RESTORE, temporary_of
from snapchain.model.consistency import Consistency
from snapchain.model.events import Event, OnEvent, Progress, ignore
from snapchain.ops.guest_points import GuestView, fault_of
from snapchain.ops.guest_records import read_record
from snapchain.ops.restore import define
from snapchain.ops.restore.changed_definition import NewDisk, NewIdentity
from snapchain.ops.restore.guest_definition import LONGEST_NAME, GuestDefinition, safe_name, unique_name
from snapchain.ops.restore.proof import chain_content_id
from snapchain.ops.restore.run import Restoration
from snapchain.ops.restore.target import Format, RestoreReport

_MOST_DISKS = 1000
_NOTE_PURPOSE = "restored-guest"
_NOTE_CAP = 1 << 20


class _Shown(BaseModel):
    model_config = ConfigDict(frozen=True)


class DiskRestorePlan(_Shown):
    """A disk that would be restored. name: in the guest; disk, point: at the destination; sizes in bytes."""

    name: str
    disk: str
    point: int
    virtual_size: int
    content_id: str
    output: str
    data_bytes: int


class GuestRestorePlan(_Shown):
    """What would be restored. files: of the definition; lacking: what cannot come back, or is missing here."""

    source: str
    guest: str
    guest_point: int
    time: datetime
    consistency: Consistency
    directory: str
    disks: tuple[DiskRestorePlan, ...]
    files: tuple[str, ...]
    lacking: tuple[str, ...]
    defines: str | None
    bytes_to_write: int


class GuestRestoreReport(_Shown):
    """What was restored.

    disks: as a restore of one reports them; those that an earlier run had finished have bytes_written 0
    files: of the definition; definition: that starts the guest; defined: name of the domain that libvirt has now
    lacking: what cannot come back, or is missing on this host: sentences
    """

    source: str
    guest: str
    guest_point: int
    instant: str
    time: datetime
    consistency: Consistency
    directory: str
    disks: tuple[RestoreReport, ...]
    files: tuple[str, ...]
    definition: str | None
    lacking: tuple[str, ...]
    defined: str | None = None
    bytes_written: int
    bytes_resumed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class GuestRestoreRequest:
    """directory: where to, made where it is missing; point: the text after '@'

    format: of all disks, qcow2 by default; whole_chain: every layer as a file
    defines, connect: define it in libvirt, at this URI
    new_name: a clone of this name, with new UUID and MACs; new_identity: these, and the old name
    without_network: no network cards in its definition; console: as in Changes
    standing: owner and mode of the files of its disks
    stops_on_errors: an I/O error of a disk stops the guest, which then sees none
    """

    directory: Path
    point: str | None = None
    format: Format | None = None
    whole_chain: bool = False
    defines: bool = False
    connect: str | None = None
    new_name: str | None = None
    new_identity: bool = False
    without_network: bool = False
    console: Path | None = None
    standing: Standing = UNCHANGED
    stops_on_errors: bool = False


class FinishedFile(BaseModel):
    """A file that this restore has made: device, inode, size, mtime."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    device: int
    inode: int
    size: int
    mtime_ns: int


class _Note(BaseModel):
    """What a restore has done in a directory.

    disks: by file name; begun: name of the file of the disk that is being restored
    served: file names of disks that are made usable at once, in the place of restored ones
    files: names of the definition's files, before they are written; uuid: of a clone
    defining: libvirt had no such domain, and gets it now
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: Literal[1] = 1
    instant: str
    disks: dict[str, FinishedFile] = {}
    begun: str | None = None
    served: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    uuid: str | None = None
    defining: bool = False


@dataclass(frozen=True, slots=True)
class PlacedDisk:
    """A disk to be restored. path: of the file that the guest opens."""

    recorded: RecordedDisk
    point: PointRecord
    path: Path
    format: Format


class GuestRestoration:
    """A guest point, and a directory that it goes to. The record is read at once, the disks by `run`."""

    def __init__(
        self,
        destination: ReadableDestination,
        view: GuestView,
        request: GuestRestoreRequest,
        *,
        on_event: OnEvent = ignore,
    ) -> None:
        """Raises NotFound for a point or a disk that is not there, Corrupt for a record that is none."""
        self._destination, self._request, self._on_event = destination, request, on_event
        if request.whole_chain and request.format is not None:
            raise InvalidInput("--chain restores each layer in its own format", hint="leave out --format")
        if request.connect is not None and not request.defines:
            raise InvalidInput("--connect names the libvirt to define it in", hint="say --define too")
        self._point = view.point(in_full(request.point))
        self._address = f"{destination.url}::{view.name}@{self._point.point}"
        self._record = read_record(destination, self._point, disk=view.record_disk)
        self._directory = request.directory.absolute()
        self._name = safe_name(request.new_name or view.name.rpartition("/")[2], "guest")
        clones = request.new_name is not None or request.new_identity
        self._identity = NewIdentity(_domain_name(request.new_name)) if clones else None
        self._disks = self._placed()
        self._note = self._noted()
        if self._identity is not None and self._note is not None and self._note.uuid is not None:
            self._identity = NewIdentity(self._identity.name, self._note.uuid)
        self._definition = GuestDefinition(
            self._record,
            name=self._name,
            disks={each.recorded.name: NewDisk(each.path, each.format) for each in self._disks},
            directory=self._directory,
            identity=self._identity,
            address=self._address,
            without_network=request.without_network,
            stops_on_errors=request.stops_on_errors,
            console=request.console,
        )
        self._files = self._definition.files
        if request.defines:
            self._definition.check_definable()

    # --- looking

    @property
    def is_begun(self) -> bool:
        """Whether an earlier run has begun it, and did not end it."""
        return self._note is not None

    @property
    def outputs(self) -> Mapping[str, Path]:
        """The files that the guest opens, by the names of the disks in it."""
        return {each.recorded.name: each.path for each in self._disks}

    @property
    def disks(self) -> Sequence[PlacedDisk]:
        """The disks with their points and files."""
        return self._disks

    @property
    def has_definition(self) -> bool:
        """Whether the files of its definition are there."""
        return all((self._directory / name).exists() for name in self._files)

    @property
    def definition(self) -> Path | None:
        """The file that starts the guest, or defines it; None where the record has none."""
        return self._definition.path

    def lacking(self) -> tuple[str, ...]:
        """What cannot come back, or is missing on this host: sentences."""
        return self._definition.lacking()

    @property
    def definition_files(self) -> tuple[Path, ...]:
        """The files of its definition."""
        return tuple(self._directory / name for name in self._files)

    def is_finished(self) -> bool:
        """Whether all its files are there, and each disk shows its point: an earlier run has ended. Reads the disks."""
        return self.has_definition and all(
            is_restored(each.path, each.format, each.point, self._request.standing) for each in self._disks
        )

    def plan(self, *, is_made: bool = False) -> GuestRestorePlan:
        """What `run` will do; reads maps, and no data. is_made: its files are there, by an earlier run

        Raises Conflict for files that are there already.
        """
        if not is_made:
            self._check_free()
        disks = tuple(
            DiskRestorePlan(
                name=each.recorded.name,
                disk=each.recorded.disk,
                point=each.point.point,
                virtual_size=each.point.virtual_size,
                content_id=each.point.content_id,
                output=str(each.path),
                data_bytes=self._data_bytes(each),
            )
            for each in self._disks
        )
        return GuestRestorePlan(
            source=self._destination.url,
            guest=self._point.guest,
            guest_point=self._point.point,
            time=self._record.time,
            consistency=self._record.consistency,
            directory=str(self._directory),
            disks=disks,
            files=tuple(str(self._directory / name) for name in self._files),
            lacking=self._definition.lacking(),
            defines=self._definition.domain()[0] if self._request.defines else None,
            bytes_to_write=sum(each.data_bytes for each in disks),
        )

    # --- doing

    def run(self, *, serve: Callable[[Sequence[PlacedDisk]], None] | None = None) -> GuestRestoreReport:
        """Restore all disks, then write the definition, then define it.

        serve: makes files that can be used at once, in the place of restored disks. Idempotent; replaces no file
        Raises Conflict for files and domains that are there already, and as a restore of one disk. What is finished
        stays, and the next run goes on from there.
        """
        note = self._note or _Note(instant=self._record.instant, uuid=self._identity and self._identity.uuid)
        if self._request.defines and not note.defining:
            define.check_new(*self._definition.domain(), connect=self._request.connect)
        self._check_free()
        make_directories(self._directory, mode=0o755)
        reports: list[RestoreReport] = []
        if serve is not None:
            note = note.model_copy(update={"served": tuple(each.path.name for each in self._disks)})
            self._note_file.write(note)
            serve(self._disks)
        for disk in self._disks if serve is None else ():
            report = self._done_before(disk, note)
            if report is None:
                note = note.model_copy(update={"begun": disk.path.name})
                self._note_file.write(note)
                report = self._restored(disk, sum(each.bytes_written for each in reports))
            if disk.path.name not in note.disks:
                note = note.model_copy(update={"disks": {**note.disks, disk.path.name: finished_file(disk.path)}})
                self._note_file.write(note)
            reports.append(report)
        note = note.model_copy(update={"files": tuple(self._files)})
        self._note_file.write(note)
        self._definition.write()
        definition = self._definition.path
        defined, lacking = None, self._definition.lacking()
        if self._request.defines:
            assert definition is not None, "checked by check_definable"
            name, uuid = self._definition.domain()
            self._note_file.write(note.model_copy(update={"defining": True}))
            lacking = (*lacking, *self._definition.place_tpm(uuid, connect=self._request.connect))
            try:
                defined = define.define(definition, name=name, connect=self._request.connect)
            except SnapchainError:
                self._note_file.write(note)
                raise
        with os_errors(self._directory), Directory.open(self._directory) as directory:
            self._sweep(directory)
            directory.remove(self._note_name)
            directory.sync()
        return GuestRestoreReport(
            source=self._destination.url,
            guest=self._point.guest,
            guest_point=self._point.point,
            instant=self._record.instant,
            time=self._record.time,
            consistency=self._record.consistency,
            directory=str(self._directory),
            disks=tuple(reports),
            files=tuple(str(self._directory / name) for name in self._files),
            definition=None if definition is None else str(definition),
            lacking=lacking,
            defined=defined,
            bytes_written=sum(each.bytes_written for each in reports),
            bytes_resumed=sum(each.bytes_resumed for each in reports),
        )

    # --- disks

    def _placed(self) -> list[PlacedDisk]:
        """The disks of the record with their files. Raises NotFound, Corrupt where the points contradict the record."""
        record, taken = self._record, set[str]()
        if not record.disks or len(record.disks) > _MOST_DISKS:
            raise Corrupt(f"the record of a guest has {len(record.disks)} disks", subject=self._address)
        found = []
        for recorded in record.disks:
            if (error := fault_of(self._point, recorded, subject=self._address)) is not None:
                raise error
            point = self._point.disks[recorded.disk]
            kind = self._format(recorded.disk, point)
            name = unique_name(safe_name(recorded.name, "disk"), f".{kind}", taken)
            found.append(PlacedDisk(recorded, point, self._directory / name, kind))
        return found

    def _format(self, disk: str, point: PointRecord) -> Format:
        """Of the file that the guest opens."""
        if not self._request.whole_chain:
            return self._request.format or "qcow2"
        kind: Format = "qcow2"
        with self._destination.reader(disk, str(point.point), chain=True, maps_only=True) as reader:
            for layer in reader.layers():
                kind = layer.format
        return kind

    def _data_bytes(self, disk: PlacedDisk) -> int:
        with self._destination.reader(
            disk.recorded.disk, str(disk.point.point), chain=self._request.whole_chain, maps_only=True
        ) as reader:
            return reader.data_bytes

    def _restored(self, disk: PlacedDisk, before: int) -> RestoreReport:
        """before: bytes of the disks before it, so that the progress of all never falls"""

        def heard(event: Event) -> None:
            if isinstance(event, Progress):
                total = None if event.total is None else before + event.total
                self._on_event(replace(event, done=before + event.done, total=total))
            else:
                self._on_event(event.within(disk.recorded.name))

        report = Restoration(
            self._destination,
            disk.recorded.disk,
            disk.path,
            point=str(disk.point.point),
            format=None if self._request.whole_chain else disk.format,
            whole_chain=self._request.whole_chain,
            standing=self._request.standing,
        ).run(on_event=heard)
        if report.content_id != disk.recorded.content_id:
            raise Corrupt(
                f"its disk {disk.recorded.name} was restored with another content than the guest point records",
                subject=self._address,
            )
        return report

    def _done_before(self, disk: PlacedDisk, note: _Note) -> RestoreReport | None:
        """Of a disk that an earlier run has restored; None for one that is still to be restored.

        A file that it has finished last may be in place and not noted yet: then its content tells whose it is.
        """
        name = disk.path.name
        if name not in note.disks:
            if name != note.begun or not os.path.lexists(disk.path):
                return None
            if not is_restored(disk.path, disk.format, disk.point, self._request.standing):
                raise self._in_the_way(disk.path)
        return RestoreReport(
            disk=disk.recorded.disk,
            point=disk.point.point,
            output=str(disk.path),
            files=(str(disk.path),),
            virtual_size=disk.point.virtual_size,
            bytes_written=0,
            content_id=disk.point.content_id,
        )

    # --- files beside the disks

    @property
    def _note_name(self) -> str:
        return f".{self._name}.snapchain-restore"

    def _noted(self) -> _Note | None:
        """What an earlier run of the same restore has done here; files that changed since are left out."""
        note = self._note_file.read()
        if note is None or note.instant != self._record.instant:
            return None
        with os_errors(self._directory):
            disks = {
                name: finished for name, finished in note.disks.items() if is_still(self._directory / name, finished)
            }
        return note.model_copy(update={"disks": disks})

    @property
    def _note_file(self) -> NoteFile[_Note]:
        return NoteFile(self._directory, self._note_name, _Note, _NOTE_PURPOSE, _NOTE_CAP)

    def _sweep(self, directory: Directory) -> None:
        """Remove what killed runs have left: half-written texts, and second names of disks that are in place."""
        texts = {self._note_name, *self._files}
        for name in directory.names():
            left = temporary_of(self._directory / name)
            if left is None:
                continue
            final = left.target.name
            is_text = left.purpose == NEW and final in texts
            with suppress(Busy, FileNotFoundError):
                if is_text or (left.purpose == RESTORE and _is_one_file(directory, name, final)):
                    remove_leftover(directory, name, final=final)

    def _check_free(self) -> None:
        """Raises Conflict for a file that would be replaced."""
        ours = {*self._note.disks, *self._note.served, *self._note.files, self._note.begun} if self._note else set()
        for name in (*(each.path.name for each in self._disks), *self._files):
            path = self._directory / name
            if name not in ours and (path.exists() or path.is_symlink()):
                raise self._in_the_way(path)

    @staticmethod
    def _in_the_way(path: Path) -> Conflict:
        return Conflict(
            "it exists already, and a restore of a guest replaces no file",
            subject=path,
            hint="restore into another directory",
        )


def _domain_name(name: str | None) -> str | None:
    if name is not None and (not name or not name.isprintable() or "/" in name or len(name) > LONGEST_NAME):
        raise InvalidInput(f"{name[:200]!a} cannot name a guest", hint="printable text without slashes, such as web2")
    return name


def _is_one_file(directory: Directory, name: str, other: str) -> bool:
    return directory.has(other) and same_file(directory.status(name), directory.status(other))


def is_restored(path: Path, format: Format, point: PointRecord, standing: Standing) -> bool:
    """Whether a file is one of this user's, and shows the point."""
    with suppress(SnapchainError, FileNotFoundError), os_errors(path):
        status = path.stat(follow_symlinks=False)
        if stat.S_ISREG(status.st_mode) and status.st_uid in (os.geteuid(), standing.uid):
            return chain_content_id(path, format=format, size=point.virtual_size) == point.content_id
    return False


def finished_file(path: Path) -> FinishedFile:
    """A file that is in place now."""
    with os_errors(path):
        found = path.stat(follow_symlinks=False)
    return FinishedFile(device=found.st_dev, inode=found.st_ino, size=found.st_size, mtime_ns=found.st_mtime_ns)


def is_still(path: Path, finished: FinishedFile) -> bool:
    """Whether it is the same file, and nobody has written to it."""
    with suppress(SnapchainError):
        return finished_file(path) == finished
    return False
