"""restore --instant --start DEST::GUEST[@POINT] DIR: the guest runs at once, and its disks are filled meanwhile.

    note in DIR -> records, holds, server, overlays (prepare.py) -> definition -> start QEMU
         -> fill the overlays by stream jobs -> each becomes a plain image: its hold is released, its record removed
         -> the server ends, the note is removed

Whatever is killed on the way, the same command continues: it starts the server again unless that runs, and the guest
unless that runs, and finds the jobs in QEMU by their ids.  What the guest has written is in its own images all along.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from snapchain.destination.address import in_full
from snapchain.destination.guest_record import GuestRecord, RecordedDisk
from snapchain.destination.protocol import Destination
from snapchain.errors import Busy, Conflict, Corrupt, SnapchainError, Unavailable, Unsupported
from snapchain.guest.address import GuestAddress
from snapchain.guest.qmp import Refused
from snapchain.guest.qmp_guest import QmpGuest
from snapchain.guest.qmp_hydration import Hydration
from snapchain.host.files import UNCHANGED, Standing, make_directories
from snapchain.host.note_file import NoteFile
from snapchain.host.openers import OpenFiles
from snapchain.host.qemu_processes import QemuProcess, qemu_process
from snapchain.merge.pace import Pace
from snapchain.model.consistency import Consistency
from snapchain.model.events import Notice, OnEvent, ignore
from snapchain.ops.failover.start import start_script
from snapchain.ops.guest_points import GuestView, fault_of
from snapchain.ops.guest_records import read_record
from snapchain.ops.instant import server
from snapchain.ops.instant.overlay import backing_of
from snapchain.ops.instant.prepare import (
    Passphrase,
    PreparedImage,
    WantedImage,
    check_new,
    forget,
    prepare,
)
from snapchain.ops.instant.record import InstantRecord, record_of
from snapchain.ops.restore.changed_definition import NewDisk, NewIdentity
from snapchain.ops.restore.guest_definition import GuestDefinition, safe_name, unique_name

_NOTE_PURPOSE = "instant-guest"
_NOTE_CAP = 64 << 10
_MOST_DISKS = 1000


class _Shown(BaseModel):
    model_config = ConfigDict(frozen=True)


class InstantDisk(_Shown):
    """A disk. name: in the guest; disk, point: at the destination; output: its image; virtual_size: bytes"""

    name: str
    disk: str
    point: int
    virtual_size: int
    content_id: str
    output: str


class InstantGuestPlan(_Shown):
    """What would be done. resumes: an earlier run has begun it; files: of the definition; lacking: sentences"""

    source: str
    guest: str
    guest_point: int
    time: datetime
    consistency: Consistency
    directory: str
    disks: tuple[InstantDisk, ...]
    files: tuple[str, ...]
    lacking: tuple[str, ...]
    resumes: bool


class InstantGuestReport(_Shown):
    """What was done.

    started: by this run; False for a guest that ran already
    start_seconds: from the beginning until QEMU had opened the images; seconds: of all
    """

    source: str
    guest: str
    guest_point: int
    instant: str
    time: datetime
    consistency: Consistency
    directory: str
    disks: tuple[InstantDisk, ...]
    files: tuple[str, ...]
    definition: str
    lacking: tuple[str, ...]
    started: bool
    start_seconds: float
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class InstantGuestRequest:
    """directory: where to, made where it is missing; point: the text after '@'

    located: the destination, as it is opened from any directory
    new_name: a clone of this name, with new UUID and MACs; new_identity: these, and the old name
    standing: owner and mode of the images; limit: bytes a second that are copied at most, 0 for no limit
    """

    directory: Path
    located: str
    point: str | None = None
    new_name: str | None = None
    new_identity: bool = False
    standing: Standing = UNCHANGED
    limit: int = 0


class _Note(BaseModel):
    """What was begun in a directory. guest_point, instant: of the guest; uuid: of a clone; files: of the definition"""

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: Literal[1] = 1
    source: str
    guest: str
    guest_point: int
    instant: str
    uuid: str | None = None
    files: tuple[str, ...] = ()
    defined: bool = False


@dataclass(frozen=True, slots=True)
class _Disk:
    recorded: RecordedDisk
    wanted: WantedImage


class InstantGuest:
    """A guest point that is to run at once in a directory. Its record is read at once, the rest is done by `run`."""

    def __init__(
        self,
        destination: Destination,
        view: GuestView,
        request: InstantGuestRequest,
        *,
        passphrase: Passphrase,
        on_event: OnEvent = ignore,
    ) -> None:
        """destination: opened to write, since its points are held; passphrase: for the server, where one is started

        Raises NotFound for a point that is not there, Corrupt for a record that is none, Conflict where something else
        was begun in the directory, Unsupported for a guest that QEMU does not run alone.
        """
        self._destination, self._view, self._request, self._on_event = destination, view, request, on_event
        self._passphrase = passphrase
        self._begun = time.monotonic()
        self._directory = Path(os.path.realpath(request.directory))
        self._name = safe_name(request.new_name or view.name.rpartition("/")[2], "guest")
        self._note = self._note_file.read()
        wanted = request.point
        if self._note is not None:
            self._check_same(self._note)
            wanted = str(self._note.guest_point)
        self._point = view.point(in_full(wanted))
        self._address = f"{destination.url}::{view.name}@{self._point.point}"
        if self._note is not None and self._note.instant != self._point.instant:
            raise Conflict(
                "the guest point that this was begun with is another one by now",
                subject=self._address,
                hint=f"restore into another directory than {self._directory}",
            )
        self._record = read_record(destination, self._point, disk=view.record_disk)
        _check_kind(self._record, self._address)
        self._disks = self._placed()
        self._identity: NewIdentity | None = None
        if request.new_name is not None or request.new_identity:
            known = self._note.uuid if self._note is not None else None
            self._identity = NewIdentity(request.new_name) if known is None else NewIdentity(request.new_name, known)
        self._definition = GuestDefinition(
            self._record,
            name=self._name,
            disks={each.recorded.name: NewDisk(each.wanted.image, "qcow2") for each in self._disks},
            directory=self._directory,
            identity=self._identity,
            address=self._address,
            stops_on_errors=True,
        )

    @property
    def images(self) -> Mapping[str, Path]:
        """By the names of the disks in the guest."""
        return {each.recorded.name: each.wanted.image for each in self._disks}

    def plan(self) -> InstantGuestPlan:
        """What `run` will do; changes nothing. Raises Conflict for files that are there already."""
        self._check_free()
        return InstantGuestPlan(
            source=self._destination.url,
            guest=self._point.guest,
            guest_point=self._point.point,
            time=self._record.time,
            consistency=self._record.consistency,
            directory=str(self._directory),
            disks=self._shown(),
            files=tuple(str(self._directory / name) for name in self._definition.files),
            lacking=self._definition.lacking(),
            resumes=self._note is not None,
        )

    def run(self) -> InstantGuestReport:
        """Start the guest, and fill its disks while it runs; or continue what an earlier run has begun.

        Raises Conflict for files that are there already, Unavailable where the point cannot be served and where the
        guest ended before its disks were filled, ToolFailed where QEMU does not start: run again, it continues.
        """
        self.lay_out()
        started = self.start()
        seconds = time.monotonic() - self._begun
        self.fill()
        assert self._definition.path is not None, "checked by _check_kind"
        return InstantGuestReport(
            source=self._destination.url,
            guest=self._point.guest,
            guest_point=self._point.point,
            instant=self._record.instant,
            time=self._record.time,
            consistency=self._record.consistency,
            directory=str(self._directory),
            disks=self._shown(),
            files=tuple(str(self._directory / name) for name in self._definition.files),
            definition=str(self._definition.path),
            lacking=self._definition.lacking(),
            started=started,
            start_seconds=seconds,
            seconds=time.monotonic() - self._begun,
        )

    # --- the steps

    def lay_out(self) -> tuple[PreparedImage, ...]:
        """Make the images on a running server, and the definition of the guest. Idempotent."""
        self._check_free()
        make_directories(self._directory, mode=0o755)
        note = self._note or _Note(
            source=self._request.located,
            guest=self._point.guest,
            guest_point=self._point.point,
            instant=self._point.instant,
            uuid=None if self._identity is None else self._identity.uuid,
            files=tuple(self._definition.files),
        )
        self._write(note)
        # An image that an earlier run has filled has no record any more, and is the guest's own.
        left = [each.wanted for each in self._disks if not self._is_filled(each.wanted.image)]
        prepared: tuple[PreparedImage, ...] = ()
        if left:
            prepared = prepare(
                self._destination,
                self._request.located,
                left,
                passphrase=self._passphrase,
                standing=self._request.standing,
                guest=self._point.guest,
                guest_point=self._point.point,
                on_event=self._on_event,
            ).images
        if not note.defined:
            self._definition.write()
            self._write(note.model_copy(update={"defined": True}))
        return prepared

    def start(self) -> bool:
        """Start QEMU on the images; whether it did not run already. It goes on when snapchain ends."""
        if self._process() is not None:
            return False
        assert self._definition.path is not None, "checked by _check_kind"
        start_script(self._definition.path, list(self.images.values()))
        depends = [record for image in self.images.values() if (record := record_of(image)) is not None]
        words = f"; until it is filled, it depends on {depends[0].destination}" if depends else ""
        self._on_event(Notice(f"{self._name} runs{words}"))
        return True

    def fill(self) -> None:
        """Copy what is left of the points into the images while the guest runs; they are plain images then."""
        records = {path: record for path in self.images.values() if (record := record_of(path)) is not None}
        if records:
            process = self._process()
            if process is None:
                raise self._ended()
            self._fill(records, process)
        self._note_file.remove()
        self._note = None

    def _fill(self, records: Mapping[Path, InstantRecord], process: QemuProcess) -> None:
        pace = Pace(limit=self._request.limit, idle=True, wait=lambda _seconds: None)
        first = next(iter(records))
        try:
            guest = QmpGuest(GuestAddress(qmp=process.qmp[0]), on_event=self._on_event)
        except SnapchainError as error:
            raise self._why(error) from error
        try:
            Hydration(
                guest,
                {path: _job_id(path, record) for path, record in records.items()},
                sizes={path: record.virtual_size for path, record in records.items()},
                serve=lambda: self._serve(records, first),
                pace=pace.begin,
                first_speed=pace.first_speed,
                on_event=self._on_event,
            ).run(lambda image: self._filled(guest, image, records[image]))
        except (Unavailable, Refused) as error:
            raise self._why(error) from error
        finally:
            guest.close()

    def _serve(self, records: Mapping[Path, InstantRecord], first: Path) -> bool:
        image = next((path for path in records if record_of(path) is not None), first)
        return server.ensure(image, self._passphrase)

    def _filled(self, guest: QmpGuest, image: Path, record: InstantRecord) -> None:
        """An image depends on nothing any more, as QEMU has it and as its header says."""
        if backing_of(image) is not None:
            raise Unavailable(
                "QEMU has filled it, and its header still names the point",
                subject=image,
                hint="run the command again: it continues",
            )
        if record.bitmap is not None:
            _drop_bitmap(guest, image, record.bitmap)
        forget(self._destination, image, record, self._on_event)

    def _why(self, error: SnapchainError) -> SnapchainError:
        """The guest's end, where that is why QEMU does not answer."""
        return error if self._process() is not None else self._ended()

    def _ended(self) -> Unavailable:
        return Unavailable(
            "the guest ended before its disks were filled; what it has flushed is kept",
            subject=self._name,
            hint="run the command again: it starts the guest, and continues",
        )

    def _process(self) -> QemuProcess | None:
        """The QEMU that has the images open. Raises Busy where another program has one."""
        there = OpenFiles()
        for image in self.images.values():
            if not image.exists():
                continue
            for opener in there.openers(image.stat()):
                if not opener.writing:
                    continue
                found = None if opener.pid is None else qemu_process(opener.pid)
                if found is None or not found.qmp:
                    raise Busy(f"{opener} has it open", subject=image, hint="end that program, then run it again")
                return found
        return None

    # --- what is there

    def _placed(self) -> list[_Disk]:
        taken = set[str]()
        found = []
        if not self._record.disks or len(self._record.disks) > _MOST_DISKS:
            raise Corrupt(f"the record of a guest has {len(self._record.disks)} disks", subject=self._address)
        for recorded in self._record.disks:
            if (fault := fault_of(self._point, recorded, subject=self._address)) is not None:
                raise fault
            image = self._directory / unique_name(safe_name(recorded.name, "disk"), ".qcow2", taken)
            found.append(_Disk(recorded, WantedImage(image, recorded.disk, self._point.disks[recorded.disk])))
        return found

    def _shown(self) -> tuple[InstantDisk, ...]:
        return tuple(
            InstantDisk(
                name=each.recorded.name,
                disk=each.wanted.disk,
                point=each.wanted.point.point,
                virtual_size=each.wanted.point.virtual_size,
                content_id=each.wanted.point.content_id,
                output=str(each.wanted.image),
            )
            for each in self._disks
        )

    def _is_filled(self, image: Path) -> bool:
        """Whether an earlier run has filled it: it was defined, and has neither a record nor a backing file."""
        is_begun = self._note is not None and self._note.defined
        return is_begun and record_of(image) is None and image.exists() and backing_of(image) is None

    def _check_same(self, note: _Note) -> None:
        same = (note.source, note.guest) == (self._request.located, self._view.name)
        wanted = self._request.point
        if same and (wanted is None or not wanted.isdecimal() or int(wanted) == note.guest_point):
            return
        raise Conflict(
            f"an instant restore of {note.source}::{note.guest}@{note.guest_point} was begun here",
            subject=self._directory,
            hint="restore into another directory, or continue that one",
        )

    def _check_free(self) -> None:
        """Raises Conflict for a file that would be replaced."""
        ours = set(self._note.files) if self._note is not None else set()
        for image in self.images.values():
            if record_of(image) is None and not self._is_filled(image):
                check_new(image)
        for name in self._definition.files:
            if name not in ours and os.path.lexists(self._directory / name):
                raise Conflict(
                    "it exists already, and a restore of a guest replaces no file",
                    subject=self._directory / name,
                    hint="restore into another directory",
                )

    @property
    def _note_file(self) -> NoteFile[_Note]:
        return NoteFile(self._directory, f".{self._name}.snapchain-instant-guest", _Note, _NOTE_PURPOSE, _NOTE_CAP)

    def _write(self, note: _Note) -> None:
        self._note_file.write(note)
        self._note = note


def _check_kind(record: GuestRecord, address: str) -> None:
    """Raises Unsupported for a guest that cannot be filled while it runs."""
    if record.kind != "qmp":
        raise Unsupported(
            "a guest of libvirt cannot run while its disks are filled: libvirt has no command that makes a filled "
            "image durable before it loses its source",
            subject=address,
            hint="restore it whole, with --define; or restore its disks with --instant, one by one",
        )
    if record.argv is None:
        raise Unsupported(
            "the record has no command line, so nothing starts the guest", subject=address, hint="leave --start out"
        )


def _job_id(image: Path, record: InstantRecord) -> str:
    """The same in each run, so that the next one finds the job."""
    return f"sc-fill-{record.token}-{record.beside.index(image.name)}"


def _drop_bitmap(guest: QmpGuest, image: Path, name: str) -> None:
    """Remove the bitmap of what was written, which only an image at rest is compared by."""
    for disk in guest.disks():
        is_same = disk.chain and disk.active.path is not None and disk.active.path.resolve() == image
        if is_same and any(each.name == name for each in disk.active.bitmaps):
            guest.monitor.execute("block-dirty-bitmap-remove", {"node": disk.active.node, "name": name})
