"""failover DEST::GUEST: this host takes a guest over whose host is gone.

    look -> choose the point -> ask the guest's other destinations who its master is
         -> proof that this host is down -> note the token here
         -> PROMOTE: the epoch of the guest and of all its disks rises; where the destination holds bootable files, each
            disk gets a writable overlay on its point
         -> FOLLOW: all other destinations hear of it; where another failover is found there that counts, this one ends
         -> else the disks are restored -> definition -> proof, once more -> define -> START: active -> start the guest

Where the proof is a lease, its witness is told after PROMOTE, and the second proof is to wait until it has run out.
From PROMOTE on the old host is refused at the destination.  A run that is cut off is continued by the same command on
the same host: it knows its token by the note in its directory, and nobody else has that.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from snapchain.destination.guest_record import RecordedDisk
from snapchain.destination.protocol import Destination
from snapchain.errors import Conflict, InvalidInput, NotFound, SnapchainError
from snapchain.host.files import make_directories
from snapchain.host.note_file import NoteFile
from snapchain.host.virsh import Virsh
from snapchain.model.events import Notice, OnEvent, ignore
from snapchain.model.guest_state import (
    GuestChange,
    GuestStanding,
    GuestState,
    Place,
    TakenDisk,
    Transition,
    Vouched,
    describe,
)
from snapchain.ops.failover import fence
from snapchain.ops.failover.choose import Chosen, choose, loss_of, the_point
from snapchain.ops.failover.lease import LeaseEnd, with_witness
from snapchain.ops.failover.request import (
    FailoverPlan,
    FailoverReport,
    FailoverRequest,
    TakenOver,
)
from snapchain.ops.failover.start import is_running, start_domain, start_script
from snapchain.ops.guest_places import remember
from snapchain.ops.guest_points import GuestView
from snapchain.ops.guest_points_merge import guest_at
from snapchain.ops.other_destinations import OtherDestinations, Overtaken, follow_change
from snapchain.ops.restore import define
from snapchain.ops.restore.changed_definition import NewDisk
from snapchain.ops.restore.guest import GuestRestoration, GuestRestoreRequest
from snapchain.ops.restore.guest_definition import GuestDefinition, safe_name
from snapchain.replica.guest_store import FOLDER
from snapchain.source.ownership import note_epoch

_RUNS = (GuestState.ACTIVE, GuestState.SUSPECT, GuestState.DIVERGED)
_NOTE_PURPOSE = "failover"
_NOTE_CAP = 1 << 16


class _Note(BaseModel):
    """What a failover has done on this host, in its directory.

    token, instant: of the failover and of its guest point; seen: number of the record that it was decided on
    files: by the disks' names in the guest, once they are all there
    defining: libvirt had no such domain, and gets it now; defined: it has; connect: URI of that libvirt
    witness: URL of the witness of the guest's lease, which was found to record it
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: Literal[1] = 1
    token: str
    instant: str
    seen: int
    files: dict[str, str] = {}
    defining: bool = False
    defined: bool = False
    connect: str | None = None
    witness: str | None = None


class Failover:
    """A guest at a destination, to be taken over by this host."""

    def __init__(
        self,
        destination: Destination,
        guest: str,
        request: FailoverRequest,
        *,
        proofs: fence.Proofs | None = None,
        on_event: OnEvent = ignore,
    ) -> None:
        """proofs: those that the guests of one command share, so that a host is fenced once for all of its guests

        Raises NotFound for a guest or a point that is not there, InvalidInput for a request that contradicts itself.

        Conflict where another host runs it, or is about to, unless there is proof that it is down.
        """
        self._destination, self._request, self._on_event = destination, request, on_event
        self._begun = time.monotonic()
        self._proofs = proofs or fence.Proofs()
        self._subject = f"{destination.url}::{guest}"
        if request.connect is not None and not request.defines:
            raise InvalidInput("--connect names the libvirt to define it in", hint="say --define too")
        self._directory = request.directory.absolute()
        self._view: GuestView = guest_at(destination, guest)
        self._name = safe_name(guest.rpartition("/")[2], "guest")
        self._standing = destination.guest_state(guest)
        self._note = self._noted()
        self._connect = self._libvirt()
        self._chosen = self._choose()
        self._loss = loss_of(destination, self._view, self._chosen.point)
        self._others = self._ask_others()
        self._present = self._others.newest(self._standing)
        self._address = f"{self._subject}@{self._chosen.point.point}"
        self._lease_end: LeaseEnd | None = None
        if request.lease is not None and not self._is_done:
            newest = None if self.resumes else self._present
            self._lease_end = LeaseEnd(destination, self._standing, request.lease, newest=newest, on_event=on_event)

    @property
    def resumes(self) -> bool:
        """Whether an earlier run on this host has begun it."""
        return self._note is not None

    def plan(self) -> FailoverPlan:
        """What `run` would do; changes nothing."""
        chosen = self._chosen
        in_place = self._destination.traits.bootable_files
        lacking: tuple[str, ...] = ()
        to_write = 0
        if in_place:
            lacking = self._definition(self._new_disks()).lacking()
        else:
            planned = self._restoration().plan()
            lacking, to_write = planned.lacking, planned.bytes_to_write
        return FailoverPlan(
            destination=self._destination.url,
            guest=self._view.name,
            guest_point=chosen.point.point,
            instant=chosen.point.instant,
            time=chosen.point.time,
            consistency=chosen.record.consistency,
            skipped=chosen.skipped,
            loss=self._loss,
            state=self._standing.state,
            epoch=self._standing.epoch if self.resumes else self._present.epoch + 1,
            master=self._former(),
            master_at=None if self.resumes else self._found_at(),
            others=tuple(map(str, self._others.places)),
            silent=tuple(str(each.place) for each in self._others.silent),
            resumes=self.resumes,
            disks=self._taken({}),
            directory=str(self._directory),
            lacking=lacking,
            bytes_to_write=to_write,
            defines=self._request.defines,
            starts=self._request.starts,
            lease=self._standing.lease,
            lease_seconds=None if self._lease_end is None else self._lease_end.seconds,
        )

    def run(self, *, order: int = 1, group: int = 1) -> FailoverReport:
        """Take the guest over; continues what an earlier run of this host has begun.

        Raises Conflict without proof that the old host is down, where another host was faster, and where libvirt has a
        domain of that name; as a restore where the disks are restored; ToolFailed where the guest does not start: the
        guest is this host's then, and the same command tries again.
        """
        request = self._request
        fence.check(request.fence, request.vouched, by_lease=request.lease is not None, subject=self._subject)
        self._check_others()
        is_done = self._is_done
        self._check_start()
        if not self.resumes:
            self._check_new()
        vouched = self._proven(1)
        make_directories(self._directory, mode=0o755)
        if self._note is None:
            note = _Note(
                token=secrets.token_hex(16),
                instant=self._chosen.point.instant,
                seen=self._standing.number,
                witness=None if self._lease_end is None else self._lease_end.witness,
            )
            self._write_note(note)
        written = 0
        if not is_done:
            overlays = self._promote(vouched)
            if self._lease_end is not None:
                self._lease_end.revoke(known_witness=self._begun_note().witness)
            self._tell_others()
            written = self._lay_out(overlays)
        definition = self._definition(self._new_disks())
        self._proven(2)
        defined = self._define(definition)
        # The record before the start: a run whose failover was withdrawn, or that was overtaken, starts nothing.
        self._change(Transition.START)
        started = self._start(definition) if request.starts else False
        return FailoverReport(
            destination=self._destination.url,
            guest=self._view.name,
            guest_point=self._chosen.point.point,
            instant=self._chosen.point.instant,
            time=self._chosen.point.time,
            consistency=self._chosen.record.consistency,
            skipped=self._chosen.skipped,
            loss=self._loss,
            state=self._standing.state,
            epoch=self._standing.epoch,
            master=request.host,
            former=self._standing.former,
            vouched=vouched,
            disks=self._taken(self._begun_note().files),
            definition=None if definition.path is None else str(definition.path),
            defined=defined,
            started=started,
            lacking=definition.lacking(),
            bytes_written=written,
            order=order,
            group=group,
            seconds=time.monotonic() - self._begun,
        )

    def plan_withdraw(self) -> GuestStanding:
        """The failover that `withdraw` would undo; changes nothing. Raises NotFound where none is under way."""
        if self._standing.state is not GuestState.PROMOTING:
            raise NotFound(
                f"no failover of it is under way: it is {describe(self._standing)}",
                subject=self._subject,
                hint="once it is active, only `snapchain failback` moves it back",
            )
        return self._standing

    def withdraw(self) -> GuestStanding:
        """Undo a failover that was begun, as long as its guest is not active and has written to no overlay.

        Raises NotFound where none is under way, Conflict and Busy as `Destination.change_guest`.
        """
        self.plan_withdraw()
        self._change(Transition.WITHDRAW)
        self._note_file.remove()
        try:
            self._others.follow(self._standing, None, by=self._request.host, insists=False)
        except SnapchainError as error:
            self._on_event(Notice(f"not every other destination has heard of it: {error}"))
        return self._standing

    # --- what is decided

    def _libvirt(self) -> str | None:
        """URI of the libvirt that has the guest, or is to get it. Raises Conflict where an earlier run chose another.

        Two daemons of one host would both start it.
        """
        known, asked = None if self._note is None else self._note.connect, self._request.connect
        if known is not None and asked not in (None, known):
            raise Conflict(
                f"an earlier run has defined it in the libvirt {known}",
                subject=self._subject,
                hint=f"go on with --connect {known}",
            )
        return known or asked

    def _choose(self) -> Chosen:
        if self._note is not None:
            if self._request.point is not None:
                wanted = self._view.point(self._request.point)
                if wanted.instant != self._note.instant:
                    raise Conflict(
                        "a failover to another guest point is under way",
                        subject=self._subject,
                        hint="leave out --to, or undo it first: --withdraw",
                    )
            return the_point(self._destination, self._view, self._note.instant)
        return choose(self._destination, self._view, self._request.point, proves=self._request.proves)

    def _ask_others(self) -> OtherDestinations:
        standing, reach = self._standing, self._request.reach
        if self._request.lease is not None and self._request.lease.witness is not None:
            reach = with_witness(reach, self._request.lease.witness)
        places = [*standing.others, *([] if standing.at is None else [standing.at])]
        own = [self._place, Place(url=self._destination.url)]
        return OtherDestinations(self._view.name, places, reach, own=own, gone=standing.gone, on_event=self._on_event)

    @property
    def _place(self) -> Place:
        return self._standing.here or Place(url=self._destination.url)

    def _check_others(self) -> None:
        """Raises Overtaken where a run that began this was overtaken, Unavailable for a destination that is silent."""
        if self.resumes:
            self._others.check_epoch(self._standing.epoch)
        if self._request.vouched is None:
            self._others.allow_down(self._former())
        else:
            self._others.vouch_for_all()
        self._others.check_silent()

    def _former(self) -> str | None:
        if self._note is not None and self._note.token == self._standing.token:
            return self._standing.former
        return self._present.master or self._chosen.record.host

    def _found_at(self) -> str | None:
        """The other destination at which the present master took the guest over."""
        at = self._present.at or (self._present.here if self._present is not self._standing else None)
        is_here = at is None or at.is_same(self._place)
        return None if is_here or not self._present.epoch > 1 else str(at)

    def _check_new(self) -> None:
        """Raises what would stop the run after the epoch is raised."""
        if self._request.defines:
            placeholder = {
                each.name: NewDisk(self._directory / each.name, "qcow2") for each in self._chosen.record.disks
            }
            definition = self._definition(placeholder)
            definition.check_definable()
            define.check_new(*definition.domain(), connect=self._connect)

    def _check_start(self) -> None:
        """Raises InvalidInput where libvirt would start a domain of this name that is another guest, or an old one."""
        is_defined = self._request.defines or (self._note is not None and self._note.defined)
        if self._request.starts and self._chosen.record.kind == "libvirt" and not is_defined:
            raise InvalidInput(
                "libvirt starts only what it has defined", subject=self._subject, hint="say --define too"
            )

    # --- what is done

    @property
    def _is_done(self) -> bool:
        """Whether an earlier run of this host has made the guest its own, and all files are in place."""
        return self._note is not None and bool(self._note.files) and self._standing.state in _RUNS

    def _proven(self, round_: int) -> Vouched:
        vouched = (
            self._proven_by_lease(round_)
            if self._request.lease is not None
            else self._proofs.proven(
                self._request.fence,
                self._request.vouched,
                guest=self._view.name,
                former=self._former(),
                destination=self._destination.url,
                epoch=self._standing.epoch,
                round_=round_,
            )
        )
        words = "; ".join(each for each in (vouched.words, self._others.words) if each)
        return vouched.model_copy(update={"words": words[:1000]})

    def _proven_by_lease(self, round_: int) -> Vouched:
        """As a fence program is run twice: first that nobody renews the lease, then that it has run out."""
        if self._lease_end is None:
            assert self._standing.vouched is not None, "it was proven when it was begun"
            return self._standing.vouched
        if round_ == 1 and not self.resumes:
            self._lease_end.check_witness()
            return self._lease_end.check_silent()
        if round_ > 1:
            self._lease_end.wait()
        return self._lease_end.word()

    def _promote(self, vouched: Vouched) -> Mapping[str, Path]:
        """The overlays of the disks, by their names at the destination."""
        note = self._begun_note()
        change = GuestChange(
            guest=self._view.name,
            transition=Transition.PROMOTE,
            seen=note.seen,
            token=note.token,
            by=self._request.host,
            host=self._request.host,
            former=(self._former() or "")[:250] or None,
            epoch=self._present.epoch if self._present.epoch > self._standing.epoch else 0,
            vouched=vouched,
            point=self._chosen.point.point,
            instant=self._chosen.point.instant,
            disks=tuple(
                TakenDisk(disk=each.disk, point=self._chosen.point.disks[each.disk].point)
                for each in self._chosen.record.disks
            ),
        )
        try:
            self._standing, overlays = self._destination.change_guest(change)
        except Conflict:
            # Refused before anything was changed: this run has begun nothing.
            if self._destination.guest_state(self._view.name).token != note.token:
                self._note_file.remove()
            raise
        return overlays

    def _tell_others(self) -> None:
        """From here on no other destination lets its host, or the old one, have the guest. Raises Overtaken."""
        try:
            self._others.follow(self._standing, self._place, by=self._request.host)
        except Overtaken as overtaken:
            self._yield_to(overtaken.standing)
            raise

    def _yield_to(self, taken: GuestStanding) -> None:
        """Another host's takeover counts: this destination follows it, or else the failover here is withdrawn."""
        try:
            change = follow_change(self._standing, taken, taken.at or taken.here, by=self._request.host)
            self._standing, _ = self._destination.change_guest(change)
        except Conflict:
            self._change(Transition.WITHDRAW)
        self._note_file.remove()

    def _lay_out(self, overlays: Mapping[str, Path]) -> int:
        """Put all files of the guest in place, and note them; bytes that were written."""
        note = self._begun_note()
        recorded = self._chosen.record.disks
        written = 0
        if overlays:
            files = {each.name: overlays[each.disk] for each in recorded}
            self._definition({name: NewDisk(path, "qcow2") for name, path in files.items()}).write()
        else:
            restoration = self._restoration()
            files = dict(restoration.outputs)
            # Nothing was in the way before the first run: what is there without a note of a restore is a whole one.
            if restoration.is_begun or not all(path.exists() for path in files.values()):
                written = restoration.run().bytes_written
            for path in files.values():
                note_epoch(path, self._standing.epoch)
            # From now on the guest is shipped from here: whoever ships it must know where else it is.
            remember(files.values(), self._view.name, [self._place, *self._standing.others, *self._others.places])
        self._write_note(note.model_copy(update={"files": {name: str(path) for name, path in files.items()}}))
        return written

    def _new_disks(self) -> dict[str, NewDisk]:
        """The files of the guest; before they are there, under names that tell what the definition would lack."""
        files = {} if self._note is None else self._note.files
        return {
            each.name: NewDisk(Path(files.get(each.name, self._directory / each.name)), "qcow2")
            for each in self._chosen.record.disks
        }

    def _begun_note(self) -> _Note:
        assert self._note is not None, "written before anything is changed"
        return self._note

    def _restoration(self) -> GuestRestoration:
        request = GuestRestoreRequest(directory=self._directory, point=str(self._chosen.point.point))
        return GuestRestoration(self._destination, self._view, request, on_event=self._on_event)

    def _definition(self, disks: Mapping[str, NewDisk]) -> GuestDefinition:
        return GuestDefinition(
            self._chosen.record,
            name=self._name,
            disks=disks,
            directory=self._directory,
            identity=None,
            address=self._address,
        )

    def _define(self, definition: GuestDefinition) -> str | None:
        note = self._begun_note()
        if not self._request.defines:
            return None
        definition.check_definable()
        assert definition.path is not None
        name, uuid = definition.domain()
        if note.defined:
            return name
        if not note.defining:
            define.check_new(name, uuid, connect=self._connect)
            self._write_note(note.model_copy(update={"defining": True, "connect": Virsh(self._connect).uri}))
            for sentence in definition.place_tpm(uuid, connect=self._connect):
                self._on_event(Notice(sentence))
        define.define(definition.path, name=name, connect=self._connect)
        self._write_note(self._begun_note().model_copy(update={"defined": True}))
        return name

    def _start(self, definition: GuestDefinition) -> bool:
        note = self._begun_note()
        if self._chosen.record.kind == "libvirt":
            start_domain(definition.domain()[0], connect=self._connect)
            return True
        images = [Path(each) for each in note.files.values()]
        if is_running(images):
            return True
        if definition.path is None:
            raise NotFound("the record has no command line, so nothing starts the guest", subject=self._address)
        start_script(definition.path, images)
        return True

    def _change(self, transition: Transition) -> None:
        """Take a step out of PROMOTING; nothing where the guest is active already."""
        if self._standing.state is not GuestState.PROMOTING:
            return
        assert self._standing.token is not None, "a failover has one"
        change = GuestChange(
            guest=self._view.name,
            transition=transition,
            seen=self._standing.number,
            token=self._standing.token,
            by=self._request.host,
            host=self._request.host,
        )
        self._standing, _ = self._destination.change_guest(change)

    def _taken(self, files: Mapping[str, str]) -> tuple[TakenOver, ...]:
        def taken(each: RecordedDisk) -> TakenOver:
            point = self._chosen.point.disks[each.disk]
            return TakenOver(
                name=each.name,
                disk=each.disk,
                point=point.point,
                virtual_size=point.virtual_size,
                path=files.get(each.name),
            )

        return tuple(taken(each) for each in self._chosen.record.disks)

    # --- the note in the directory

    @property
    def _note_file(self) -> NoteFile[_Note]:
        return NoteFile(self._directory, f".{self._name}.snapchain-failover", _Note, _NOTE_PURPOSE, _NOTE_CAP)

    def _noted(self) -> _Note | None:
        """Of an earlier run on this host, whose failover is under way or done at the destination."""
        note = self._note_file.read()
        # With another token it is an old one; one that was never told of is begun anew by the next run.
        return note if note is not None and note.token == self._standing.token else None

    def _write_note(self, note: _Note) -> None:
        self._note_file.write(note)
        self._note = note


def default_directory(replica: Path, guest: str) -> Path:
    """Where the definition of a guest goes that runs on the files of a replica of this host."""
    return replica / FOLDER / f"{safe_name(guest.replace('/', '_'), 'guest')}.failover"
