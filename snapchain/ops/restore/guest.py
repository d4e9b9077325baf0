"""restore DEST::GUEST[@POINT] DIR: all disks of a guest point, and then a definition of the guest on them.

    DIR/vda.qcow2  vdb.qcow2     the disks, each restored and proven as any disk
    DIR/web1.xml                 libvirt: the definition with the new paths; web1.sh for a guest that QEMU ran alone
    DIR/web1.live.xml            as it ran; web1.recorded.xml as it was defined
    DIR/web1.VARS.fd, web1.tpm/  firmware variables, and the state of its TPM

All disks or no definition: nothing of it is written before all disks are there. A small note in DIR says which files
this restore has finished, by inode and times, so that a run that was cut off is continued and nobody's file is taken
for one of these. No existing file is replaced.

The record may be written by others: names become plain file names, and texts are bounded (domain_xml.py, qemu_argv.py).
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from snapchain.destination.address import in_full
from snapchain.destination.guest_record import RecordedDisk
from snapchain.destination.reading import ReadableDestination
from snapchain.destination.records import PointRecord
from snapchain.errors import Busy, Conflict, Corrupt, InvalidInput, SnapchainError, Unsupported
from snapchain.guest.domain_xml import tpm_of
from snapchain.host import records
from snapchain.host.directory import Directory, same_file
from snapchain.host.files import make_directories, remove_leftover, write_in
from snapchain.host.os_errors import os_errors
from snapchain.host.temporary_names import NEW, RESTORE, temporary_of
from snapchain.model.consistency import Consistency
from snapchain.model.events import Event, OnEvent, Progress, ignore
from snapchain.ops.guest_points import GuestView, fault_of
from snapchain.ops.guest_records import read_record
from snapchain.ops.restore import define, domain_xml, qemu_argv
from snapchain.ops.restore.changed_definition import Changed, Changes, NewDisk, NewIdentity, is_missing
from snapchain.ops.restore.proof import chain_content_id
from snapchain.ops.restore.run import Restoration
from snapchain.ops.restore.target import Format, RestoreReport

_UNSAFE = re.compile(r"[^A-Za-z0-9._+-]")
_LONGEST_NAME = 100
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
    """

    directory: Path
    point: str | None = None
    format: Format | None = None
    whole_chain: bool = False
    defines: bool = False
    connect: str | None = None
    new_name: str | None = None
    new_identity: bool = False


class _Finished(BaseModel):
    """A file that this restore has made: device, inode, size, mtime."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    device: int
    inode: int
    size: int
    mtime_ns: int


class _Note(BaseModel):
    """What a restore has done in a directory.

    disks: by file name; begun: name of the file of the disk that is being restored
    files: names of the definition's files, before they are written; uuid: of a clone
    defining: libvirt had no such domain, and gets it now
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: Literal[1] = 1
    instant: str
    disks: dict[str, _Finished] = {}
    begun: str | None = None
    files: tuple[str, ...] = ()
    uuid: str | None = None
    defining: bool = False


@dataclass(frozen=True, slots=True)
class _Disk:
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
        self._name = _safe(view.name.rpartition("/")[2], "guest")
        clones = request.new_name is not None or request.new_identity
        self._identity = NewIdentity(_domain_name(request.new_name)) if clones else None
        if request.new_name is not None:
            self._name = _safe(request.new_name, "guest")
        self._disks = self._placed()
        self._note = self._noted()
        if self._identity is not None and self._note is not None and self._note.uuid is not None:
            self._identity = NewIdentity(self._identity.name, self._note.uuid)
        self._changed, self._files = self._definition()
        if request.defines:
            self._check_definable()

    # --- looking

    def plan(self) -> GuestRestorePlan:
        """What `run` will do; reads maps, and no data. Raises Conflict for files that are there already."""
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
            lacking=self._lacking(),
            defines=self._domain()[0] if self._request.defines else None,
            bytes_to_write=sum(each.data_bytes for each in disks),
        )

    # --- doing

    def run(self) -> GuestRestoreReport:
        """Restore all disks, then write the definition, then define it.

        Raises Conflict for files and domains that are there already, and as a restore of one disk. What is finished
        stays, and the next run goes on from there.
        """
        note = self._note or _Note(instant=self._record.instant, uuid=self._identity and self._identity.uuid)
        if self._request.defines and not note.defining:
            define.check_new(*self._domain(), connect=self._request.connect)
        self._check_free()
        make_directories(self._directory, mode=0o777)
        reports: list[RestoreReport] = []
        for disk in self._disks:
            report = self._done_before(disk, note)
            if report is None:
                note = note.model_copy(update={"begun": disk.path.name})
                self._write_note(note)
                report = self._restored(disk, sum(each.bytes_written for each in reports))
            if disk.path.name not in note.disks:
                note = note.model_copy(update={"disks": {**note.disks, disk.path.name: _finished(disk.path)}})
                self._write_note(note)
            reports.append(report)
        note = note.model_copy(update={"files": tuple(self._files)})
        self._write_note(note)
        self._write(self._files)
        definition = self._directory / self._definition_name if self._changed is not None else None
        defined, lacking = None, self._lacking()
        if self._request.defines:
            assert definition is not None, "checked by _check_definable"
            name, uuid = self._domain()
            self._write_note(note.model_copy(update={"defining": True}))
            lacking = (*lacking, *self._placed_tpm(uuid))
            try:
                defined = define.define(definition, name=name, connect=self._request.connect)
            except SnapchainError:
                self._write_note(note)
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

    def _placed(self) -> list[_Disk]:
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
            name = _unique(f"{_safe(recorded.name, 'disk')}", f".{kind}", taken)
            found.append(_Disk(recorded, point, self._directory / name, kind))
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

    def _data_bytes(self, disk: _Disk) -> int:
        with self._destination.reader(
            disk.recorded.disk, str(disk.point.point), chain=self._request.whole_chain, maps_only=True
        ) as reader:
            return reader.data_bytes

    def _restored(self, disk: _Disk, before: int) -> RestoreReport:
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
        ).run(on_event=heard)
        if report.content_id != disk.recorded.content_id:
            raise Corrupt(
                f"its disk {disk.recorded.name} was restored with another content than the guest point records",
                subject=self._address,
            )
        return report

    def _done_before(self, disk: _Disk, note: _Note) -> RestoreReport | None:
        """Of a disk that an earlier run has restored; None for one that is still to be restored.

        A file that it has finished last may be in place and not noted yet: then its content tells whose it is.
        """
        name = disk.path.name
        if name not in note.disks:
            if name != note.begun or not os.path.lexists(disk.path):
                return None
            if not _is_restored(disk):
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

    # --- the definition

    @property
    def _definition_name(self) -> str:
        return f"{self._name}.xml" if self._record.kind == "libvirt" else f"{self._name}.sh"

    def _definition(self) -> tuple[Changed | None, dict[str, bytes]]:
        """The changed definition, and its files by their names, which may have directories: that one is the last."""
        record, base = self._record, f"{self._name}."
        taken = {each.path.name for each in self._disks}
        nvram: dict[str, Path] = {}
        files: dict[str, bytes] = {}
        for file in record.files:
            if file.role == "nvram":
                old = Path(file.name).name or "VARS.fd"
                name = _unique(base + _safe(old, "VARS.fd"), "", taken)
                nvram[old] = self._directory / name
                files[name] = file.data
            else:
                parts = [_safe(part, "part") for part in Path(file.name).parts if part not in ("/", "..", ".")]
                files["/".join([f"{base}tpm", *(parts[-4:] or ["state"])])] = file.data
        changes = Changes(
            disks={each.recorded.name: NewDisk(each.path, each.format) for each in self._disks},
            old_paths={each.name: each.path for each in record.disks},
            left_out=dict(record.left_out),
            nvram=nvram,
            tpm=self._directory / f"{base}tpm" if any(file.role == "tpm" for file in record.files) else None,
            directory=self._directory,
            identity=self._identity,
        )
        changed: Changed | None = None
        if record.kind == "libvirt":
            for name, text in ((f"{base}live.xml", record.live), (f"{base}recorded.xml", record.inactive)):
                if text is not None:
                    files[name] = text.encode("utf-8", "replace")
            if (text := record.inactive or record.live) is not None:
                changed = domain_xml.change(text, changes, subject=self._address)
        elif record.argv is not None:
            changed = qemu_argv.change(record.argv, changes, subject=self._address)
        if changed is not None:
            files[self._definition_name] = changed.text.encode("utf-8", "surrogateescape")  # a directory's own bytes
        return changed, files

    def _placed_tpm(self, uuid: str | None) -> tuple[str, ...]:
        """Put the state of the TPM where libvirt looks for it; what is left to do."""
        top = f"{self._name}.tpm/"
        files = {name.removeprefix(top): data for name, data in self._files.items() if name.startswith(top)}
        assert self._changed is not None, "checked by _check_definable"
        found = tpm_of(domain_xml.parse(self._changed.text, subject=self._address))
        if not files or found is None or found[1] is not None:
            return ()
        return tuple(define.place_tpm(files, version=found[0], uuid=uuid, connect=self._request.connect))

    def _lacking(self) -> tuple[str, ...]:
        record = self._record
        found = [] if self._changed is None else list(self._changed.lacking)
        if self._changed is None:
            found.append("the record has no definition of the guest: define it by hand")
        if record.kind == "qmp":
            found += [f"a medium is missing here: {path}" for path in record.media if is_missing(path)]
            if any(file.role == "tpm" for file in record.files):
                found.append(f"start its TPM with the restored state: swtpm socket --tpmstate dir={self._name}.tpm")
        found += [f"it cannot be moved: {each}" for each in record.immovable]
        found += [f"it was not recorded: {each}" for each in record.unreadable]
        return tuple(dict.fromkeys(found))

    def _domain(self) -> tuple[str, str | None]:
        """Name and UUID of the domain that would be defined."""
        assert self._changed is not None, "checked by _check_definable"
        return domain_xml.identity_of(self._changed.text, subject=self._address)

    def _check_definable(self) -> None:
        if self._record.kind != "libvirt":
            raise InvalidInput(
                "the guest was not managed by libvirt, so there is nothing to define",
                subject=self._address,
                hint=f"leave out --define; {self._name}.sh will start it",
            )
        if (self._record.inactive or self._record.live) is None:
            raise Unsupported("the record has no definition of the domain", subject=self._address)

    # --- files beside the disks

    @property
    def _note_name(self) -> str:
        return f".{self._name}.snapchain-restore"

    def _noted(self) -> _Note | None:
        """What an earlier run of the same restore has done here; files that changed since are left out."""
        try:
            with Directory.open(self._directory) as directory:
                key = records.own_key()
                found = records.read(directory, self._note_name, purpose=_NOTE_PURPOSE, key=key, cap=_NOTE_CAP)
                note = _Note.model_validate_json(found.text)
        except (OSError, SnapchainError, ValidationError):
            return None
        if not found.is_own or note.instant != self._record.instant:
            return None
        with os_errors(self._directory):
            disks = {
                name: finished for name, finished in note.disks.items() if _is_still(self._directory / name, finished)
            }
        return note.model_copy(update={"disks": disks})

    def _write_note(self, note: _Note) -> None:
        with os_errors(self._directory), Directory.open(self._directory) as directory:
            inode = os.fstat(directory.fd).st_ino
            values = note.model_dump(mode="json")
            data = records.encode(values, purpose=_NOTE_PURPOSE, place=inode, key=records.made_key())
            write_in(directory, self._note_name, data)

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
        ours = {*self._note.disks, *self._note.files, self._note.begun} if self._note else set()
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

    def _write(self, files: Mapping[str, bytes]) -> None:
        for name, data in files.items():
            path = self._directory / name
            if path.parent != self._directory:
                make_directories(path.parent, mode=0o700, whatever_the_umask=True)
            with os_errors(path), Directory.open(path.parent) as directory:
                write_in(directory, path.name, data, mode=0o600, whatever_the_umask=True)


def _safe(text: str, otherwise: str) -> str:
    """Text of a record as the name of a file: no slashes, no dot in front, no blanks."""
    return _UNSAFE.sub("_", text)[:_LONGEST_NAME].lstrip(".") or otherwise


def _unique(stem: str, suffix: str, taken: set[str]) -> str:
    """A name that is not taken yet, and is from now on."""
    names: Iterable[str] = (f"{stem}{suffix}", *(f"{stem}.{number}{suffix}" for number in range(2, _MOST_DISKS + 2)))
    name = next(each for each in names if each not in taken)
    taken.add(name)
    return name


def _domain_name(name: str | None) -> str | None:
    if name is not None and (not name or not name.isprintable() or "/" in name or len(name) > _LONGEST_NAME):
        raise InvalidInput(f"{name[:200]!a} cannot name a guest", hint="printable text without slashes, such as web2")
    return name


def _is_one_file(directory: Directory, name: str, other: str) -> bool:
    return directory.has(other) and same_file(directory.status(name), directory.status(other))


def _is_restored(disk: _Disk) -> bool:
    """Whether the file of a disk is one of this user's, and shows the disk."""
    with suppress(SnapchainError), os_errors(disk.path):
        status = disk.path.stat(follow_symlinks=False)
        if stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid():
            shown = chain_content_id(disk.path, format=disk.format, size=disk.point.virtual_size)
            return shown == disk.recorded.content_id
    return False


def _finished(path: Path) -> _Finished:
    with os_errors(path):
        found = path.stat(follow_symlinks=False)
    return _Finished(device=found.st_dev, inode=found.st_ino, size=found.st_size, mtime_ns=found.st_mtime_ns)


def _is_still(path: Path, finished: _Finished) -> bool:
    with suppress(SnapchainError):
        return _finished(path) == finished
    return False
