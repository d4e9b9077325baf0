"""A guest comes to this host while it runs: the replica's side of a move, which owns the QEMU that awaits it.

    step      what is done                                         journal    state of the guest (guest_state.py)
    PREPARE   disks locked, overlays empty on the newest layers    prepared   moving
    START     QEMU started, -S -incoming defer                     started
    GIVE      its memory is here, whole                                       switched   <- this write decides
    RUN       catalogues of the disks, nbd-server-stop, cont       ran        active

The disks stay locked from PREPARE to the end of the stream, so that no other transfer changes what lies below the
guest.  Where the stream ends early, its peer has died or the link is cut: before GIVE the QEMU is ended and what was
made for it is removed; after GIVE the guest runs here.  Should this process die too, the same is done by the next
stream that names the token, by the next move of these disks, or by `snapchain doctor` on this host.
"""

from __future__ import annotations

import os
import socket
import syslog
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from snapchain.errors import Conflict, Corrupt, InvalidInput, NotFound, SnapchainError, Unavailable
from snapchain.guest import journal
from snapchain.guest.machine_view import machine_view
from snapchain.guest.qmp import Monitor
from snapchain.guest.qmp_migration import Incoming, version_of
from snapchain.host import files, run_directory, site_hooks
from snapchain.host.detached import start_program
from snapchain.host.locks import ImageLock, LockMode
from snapchain.host.priority import urgent
from snapchain.host.process_identity import boot_id, identity
from snapchain.host.qemu_processes import qemu_processes
from snapchain.host.site_hooks import run_site_hooks
from snapchain.model.guest_state import (
    GuestChange,
    GuestStanding,
    GuestState,
    Transition,
    after,
    describe_takeover,
    is_done,
)
from snapchain.replica.guest_states import look
from snapchain.replica.guest_store import alone_with, disks_of, make_nvram, write_standing
from snapchain.replica.handover import Case, cases_of, check_may_be_given, record_given, revoke_given
from snapchain.replica.incoming_qemu import LOG, NBD, RAM, cpu_digest, is_alive, kill, program_of, wait_for_monitor
from snapchain.replica.left_behind import remove_left_behind
from snapchain.replica.move_record import OPERATION, MoveDetails, details_of, made_file, record_of, remove_made, write
from snapchain.replica.store import Work, in_turn, open_replica
from snapchain.replica.stream.frames import Kind
from snapchain.replica.stream.guest_messages import (
    LONGEST_KEY,
    LONGEST_VALUE,
    MOST_ENTRIES,
    HandedDisk,
    Move,
    MoveStep,
    Moving,
    MovingDomain,
)
from snapchain.replica.stream.messages import ActiveState

if TYPE_CHECKING:
    from snapchain.replica.receiver import Receiver

PATIENCE = 60.0
"""Seconds without a word from the peer, which sends one every few seconds but while its ssh logs in once more."""
_COMPLETE_SECONDS = 20.0


def answer(receiver: Receiver, request: Move) -> None:
    """MOVE, and what follows it up to STOP. Raises as the steps of `GuestArrival`."""
    session = receiver.session
    session.channel.patience = min(session.channel.patience, PATIENCE)
    with _opened(receiver.root(request.replica), request) as arrival:
        session.reply(Kind.MOVING, arrival.step(request))
        while (frame := session.next()).kind is not Kind.STOP:
            if frame.kind is not Kind.MOVE:
                raise session.unexpected(frame)
            more = session.decode(Move, frame)
            if more.token != request.token:
                raise Corrupt("it names another move in the same stream", subject=session.peer)
            session.reply(Kind.MOVING, arrival.step(more))
    session.done()


@contextmanager
def _opened(root: Path, request: Move) -> Iterator[GuestArrival]:
    """A move whose disks are locked. At the end of one that began here, what is unfinished is settled."""
    with ExitStack() as locks:
        if request.step is MoveStep.PREPARE:
            _settle_others(root, request)
        elif request.step is MoveStep.START:
            raise InvalidInput("a move begins with PREPARE", subject=root)
        cases = _locked(root, request.disks, locks)
        found = record_of(request.token)
        if request.step is not MoveStep.PREPARE and found is not None and not details_of(found).disks == request.disks:
            raise Conflict("these are not the disks of that move", subject=root)
        arrival = _arrival(root, request, cases, found)
        try:
            yield arrival
        finally:
            arrival.close()


def _arrival(root: Path, request: Move, cases: list[Case], found: journal.Found | None) -> GuestArrival:
    if request.domain is None:
        return GuestArrival(root, request, cases, found)
    from snapchain.replica.domain_server import DomainArrival  # inside: most hosts have one kind

    return DomainArrival(root, request, cases, found, request.domain)


def _locked(root: Path, disks: tuple[HandedDisk, ...], locks: ExitStack) -> list[Case]:
    """The disks, in the order of the request.

    Raises NotFound where one is not here, such as on a filesystem that is not mounted: that is no answer to who has
    the guest.
    """
    replica = open_replica(root)
    for name in sorted(each.disk for each in disks):
        disk = replica.disk(name)
        if not disk.directory.is_dir():
            raise NotFound(f"there is no disk {name!r} here", subject=root)
        locks.enter_context(in_turn(disk, Work.TRANSFER))
        if disk.read() is None:
            raise NotFound(f"there is no disk {name!r} here", subject=root)
    return cases_of(replica, disks)


class GuestArrival:
    """One move. found: its record, None where there is none (yet); cases: its disks, locked."""

    def __init__(self, root: Path, request: Move, cases: list[Case], found: journal.Found | None) -> None:
        self._root, self._token, self._guest, self._cases = root, request.token, request.guest, cases
        self._by, self._epoch = request.by, request.disks[0].epoch
        self._exports, self._nvram = request.exports, request.nvram
        self._found = found
        self._monitor: Monitor | None = None
        self._settles = self._has_run = False
        self._resumed: float | None = None
        self._version: str | None = None
        self._machine: str | None = None
        self._view: dict[str, str] = {}
        self._rehearsed = 0.0
        self._urgent = ExitStack()
        self._domain: MovingDomain | None = request.domain

    def step(self, request: Move) -> Moving:
        """Carry out one step. Raises Conflict for one that may not come now, and as each of them."""
        begun = time.time()
        match request.step:
            case MoveStep.PREPARE:
                self._prepare()
            case MoveStep.START:
                self._start(request)
            case MoveStep.GIVE:
                self._settles = True
                self._give()
                self._follow()
            case MoveStep.RUN:
                self._run()
            case MoveStep.GIVE_AND_RUN:
                self._settles = True
                self._give()
                self._resume()
            case MoveStep.END:
                self.end()
            case MoveStep.LOOK if self._settles and self._found is not None and not self._has_run:
                self._rehearse()
        answer = self._standing(begun)
        self._view = {}  # told once: a guest waits for later answers
        return answer

    def close(self) -> None:
        """Settle what is unfinished, where this stream has begun it."""
        try:
            if self._settles and self._found is not None:
                self.settle()
            self._urgent.close()
            if self._has_run:
                self._tell_hooks("after")
                for case in self._cases:
                    with suppress(SnapchainError, OSError):  # the guest runs: files that stay are no fault of the move
                        remove_left_behind(case.disk)
        finally:
            self._urgent.close()
            if self._monitor is not None:
                self._monitor.close()

    def settle(self) -> None:
        """Run the guest where it was given to this host; else give the move up."""
        if self._found is None:
            return
        if self._is_given():
            if self._alive():
                self._run()
        else:
            self.end()

    def settle_abandoned(self) -> None:
        """As `settle`, of a move whose stream has ended long ago."""
        self.settle()

    # --- The steps.

    def _prepare(self) -> None:
        if self._found is not None:
            raise Conflict("it was prepared before", subject=self._root)
        for case in self._cases:
            check_may_be_given(case, self._token)
            if case.state is not ActiveState.READY:
                raise Conflict(
                    "it is not the empty overlay on the newest layer any more that was prepared for the guest",
                    subject=case.path,
                    hint="another transfer was faster, or somebody uses it: run the migration again",
                )
            with ImageLock(case.path, LockMode.WRITE):
                pass  # nobody runs on it yet
        standing = self._standing_now()
        if standing.state is GuestState.MOVING and standing.token and record_of(standing.token) is None:
            # Nobody works at that move, since the disks are ours, and no QEMU of it is known.
            self._change(Transition.ABORT, host=self._by, token=standing.token)
        if standing.epoch + 1 != self._epoch:
            raise Conflict(
                f"the guest is in epoch {standing.epoch} here, and would be given in {self._epoch}",
                subject=f"{self._root}: {self._guest}",
                hint="run the migration again; find out which host runs the guest before anything else",
            )
        nvram = [make_nvram(self._root, self._guest, number, size) for number, size in enumerate(self._nvram)]
        directory = self._make_directory()
        self._settles = True
        # The journal first: whoever finds the guest `moving` finds out what became of the move.
        self._write(
            MoveDetails(
                token=self._token,
                by=self._by,
                root=self._root,
                disks=tuple(case.asked for case in self._cases),
                overlays=tuple(made_file(case.path) for case in self._cases),
                nvram=tuple(made_file(path) for path in nvram),
                directory=directory,
                stage="prepared",
                domain=self._domain,
            )
        )
        self._change(Transition.MOVE, host=self._by)
        self._run_hooks("before")

    def _make_directory(self) -> Path:
        return run_directory.make(self._guest, self._token)

    def _start(self, request: Move) -> None:
        details = self._at("prepared")
        if not request.argv or not request.qmp:
            raise InvalidInput("there is no command to start", subject=self._guest)
        argv = program_of(request.argv, request.directory)
        qmp = Path(request.qmp)
        pid = start_program(argv, log=details.directory / LOG, environment=dict(os.environ))
        found = identity(pid)
        self._urgent.enter_context(urgent())  # from now on it waits for what is sent, and the guest for it
        # Recorded before anything else can fail: a program that nobody knows of would stay for ever.
        details = self._write(details.model_copy(update={"stage": "started", "qemu": found}), qmp=qmp)
        self._monitor = wait_for_monitor(qmp, found, log=details.directory / LOG)
        if (peer := self._monitor.peer) not in (None, pid) and peer is not None:  # the command was a wrapper
            self._write(details.model_copy(update={"qemu": identity(peer)}), qmp=qmp)
        incoming = Incoming(self._monitor)
        self._version = ".".join(map(str, version_of(self._monitor)))
        machine = self._monitor.execute("qom-get", {"path": "/machine", "property": "type"})
        self._machine = str(machine).removesuffix("-machine")
        view = list(machine_view(self._monitor).items())[:MOST_ENTRIES]
        self._view = {key[:LONGEST_KEY]: value[:LONGEST_VALUE] for key, value in view}
        incoming.listen(details.directory / RAM, details.directory / NBD, self._exports)

    def _rehearse(self) -> None:
        """Do the work that a paused guest waits for, without its decisions, and note the seconds.

        In the pause the same work is quicker: the files that it reads are in memory by then.
        """
        begun, details = time.monotonic(), self._at("prepared", "started", "ran")
        if self._monitor is not None:
            with suppress(SnapchainError):  # the answer says whether it runs
                self._monitor.execute("query-status")
        self._standing_now()
        self._write(details)
        self._rehearsed = time.monotonic() - begun

    def _give(self) -> None:
        self._at("started")
        if not self._alive():
            raise self._overtaken() or Conflict("the QEMU that had got the guest has ended here", subject=self._guest)
        try:
            Incoming(self._connected()).check_complete(seconds=_COMPLETE_SECONDS)
        except Conflict:
            raise
        except SnapchainError as error:  # whatever its death looks like from here: nothing is recorded yet
            raise Conflict(
                f"the QEMU that had got the guest does not answer here any more: {error.message}", subject=self._guest
            ) from error
        for case in self._cases:
            if not case.given(self._token):
                check_may_be_given(case, self._token)
                if case.catalogue.tip is None or case.catalogue.tip.id != case.asked.overlay.on:
                    raise Conflict("its overlay is not on the newest layer here any more", subject=case.path)
        self._change(Transition.SWITCH, host=socket.gethostname())

    def _follow(self, *beside: Callable[[], object]) -> None:
        """All disks of the guest follow its record into the new epoch. beside: what is to be done at the same time

        One after the other, each would wait for the storage, and a paused guest for all of them.
        """
        with ThreadPoolExecutor(len(self._cases) + 1 + len(beside)) as pool:
            cases = [pool.submit(record_given, case, self._token) for case in self._cases]
            rest = [pool.submit(each) for each in (self._raise_others, *beside)]
            self._cases = [each.result() for each in cases]
            for each in rest:
                each.result()

    def _raise_others(self) -> None:
        """The epochs of disks that no guest runs on, such as the one of the guest's records."""
        mine = {case.disk.name for case in self._cases}
        for disk in disks_of(open_replica(self._root), self._guest):
            if disk.name not in mine and (found := disk.read()) is not None and found.epoch < self._epoch:
                with in_turn(disk, Work.TRANSFER):
                    disk.write((disk.read() or found).after(epoch=self._epoch))

    def _run(self) -> None:
        self._at("started", "ran")
        if not self._alive():
            raise Unavailable(
                "the QEMU that had got the guest has ended; the disks are this host's",
                subject=self._guest,
                hint="start the guest here on the overlays of its disks",
            )
        if not self._is_given():
            raise Conflict("the guest was not given to this host", subject=self._guest)
        self._resume()

    def _resume(self) -> None:
        """The guest is this host's. That it may have run is on the disk before it does."""
        incoming, details = Incoming(self._connected()), self._at("started", "ran")
        try:
            self._follow(lambda: self._write(details.model_copy(update={"stage": "ran"})), incoming.stop_exports)
        except SnapchainError:  # such as a QEMU that has died: it never ran, and its source has its memory still
            self._write(details)
            raise
        self._resumed = incoming.run() or time.time()
        self._change(Transition.START, host=socket.gethostname())
        assert self._found is not None
        journal.remove(self._found.path)
        self._has_run = True

    def end(self) -> None:
        """Give it up.

        Raises Conflict where the guest may have run here, or has come whole and is this host's; and where it was taken
        over by another decision: then no sender may think that it is its own again.
        """
        fault = self._overtaken()
        if self._found is None:
            if self._is_given():
                raise Conflict("the guest was given to this host, and may have run here", subject=self._guest)
            if fault is not None:
                raise fault
            return
        details, given = details_of(self._found), self._is_given()
        if details.stage == "ran" or (given and self._alive()):
            raise Conflict("the guest is this host's", subject=self._guest, hint="migrate it from here")
        if self._monitor is not None:
            self._monitor.close()
            self._monitor = None
        self._urgent.close()
        kill(details.qemu, boot=self._found.record.boot)
        for process in qemu_processes():  # one of which a snapchain that was killed had no time to make a note
            if any(f"{details.directory}/" in word for word in process.argv):
                kill((process.pid, process.started), boot=boot_id())
        if given:
            self._change(Transition.WITHDRAW, host=self._by)
            self._cases = [revoke_given(case, self._token) for case in self._cases]
        elif fault is None:
            self._change(Transition.ABORT, host=self._by)
        self._forget(details, fault)

    def _forget(self, details: MoveDetails, fault: Conflict | None) -> None:
        """Remove what was made for the guest. fault: raised then; what the files are that decision has to say."""
        for made in (*details.overlays, *details.nvram) if fault is None else ():
            remove_made(made)
        run_directory.remove(details.directory)
        assert self._found is not None
        journal.remove(self._found.path)
        self._found = None
        self._tell_hooks("aborted")
        if fault is not None:
            raise fault

    def _run_hooks(self, when: str) -> None:
        """Those of this host's administrator. Raises as `run_site_hooks`."""
        overlays = {f"overlay_{number}": case.path for number, case in enumerate(self._cases, 1)}
        facts = {"guest": self._guest, "source": self._by, "disks": len(self._cases), **overlays}
        run_site_hooks(site_hooks.ARRIVAL, when, facts)

    def _tell_hooks(self, when: str) -> None:
        """As `_run_hooks`, where nothing depends on them any more: this host's log has what fails."""
        try:
            self._run_hooks(when)
        except SnapchainError as error:
            syslog.syslog(syslog.LOG_WARNING, f"snapchain: {error.subject}: {error.message}")

    # --- Its records.

    def _standing_now(self) -> GuestStanding:
        return look(open_replica(self._root), self._guest).standing

    def _is_given(self) -> bool:
        """Whether this host is the guest's master by this move."""
        now = self._standing_now()
        return now.token == self._token and now.has_begun

    def _overtaken(self) -> Conflict | None:
        """The error where another decision than this move has made a host the guest's master since."""
        return self._fault_of(self._standing_now())

    def _fault_of(self, now: GuestStanding) -> Conflict | None:
        if not now.overtakes(token=self._token, epoch=self._epoch):
            return None
        return Conflict(
            describe_takeover(now), subject=f"{self._root}: {self._guest}", hint="start it on that host only"
        )

    def _change(self, transition: Transition, *, host: str, token: str | None = None) -> None:
        """Take the guest to its next state here, unless it is there already. Raises Conflict."""
        with alone_with(self._root, self._guest):
            now = self._standing_now()
            asked = GuestChange(
                guest=self._guest,
                transition=transition,
                seen=now.number,
                token=token or self._token,
                by=self._by,
                host=host,
            )
            again = asked.model_copy(update={"seen": now.number - 1}) if now.number else asked
            if transition is Transition.SWITCH and (fault := self._fault_of(now)) is not None:
                raise fault
            if is_done(now, again) or _is_undone(now, transition):
                return
            subject = f"{self._root}: {self._guest}"
            write_standing(self._root, after(now, asked, time=datetime.now(UTC), subject=subject))

    def _at(self, *stages: str) -> MoveDetails:
        details = None if self._found is None else details_of(self._found)
        if details is None or details.stage not in stages:
            raise Conflict(
                f"the move is not at that step: {'nothing is known of it' if details is None else details.stage}",
                subject=self._guest,
            )
        return details

    def _write(self, details: MoveDetails, *, qmp: Path | None = None) -> MoveDetails:
        self._found = write(details, guest=self._guest, before=self._found, qmp=qmp)
        return details

    def _alive(self) -> bool:
        return self._found is not None and is_alive(details_of(self._found).qemu, boot=self._found.record.boot)

    def _connected(self) -> Monitor:
        if self._monitor is None:
            assert self._found is not None
            self._monitor = Monitor(Path(self._found.record.qmp or ""))
        return self._monitor

    def _standing(self, begun: float) -> Moving:
        details = None if self._found is None else details_of(self._found)
        return Moving(
            directory="" if details is None else str(details.directory),
            overlays=tuple(str(case.path) for case in self._cases),
            nvram=() if details is None else tuple(str(each.path) for each in details.nvram),
            alive=self._alive(),
            given=self._is_given(),
            ran=details is not None and details.stage == "ran",
            version=self._version,
            machine=self._machine,
            view=self._view,
            cpu=cpu_digest(),
            free=files.free_bytes(self._root),
            clock=(begun + time.time()) / 2,
            rehearsed=self._rehearsed,
            resumed=self._resumed,
        )


def _is_undone(now: GuestStanding, transition: Transition) -> bool:
    """Whether there is nothing to undo: the move had not come so far."""
    return transition in (Transition.ABORT, Transition.WITHDRAW) and now.state is GuestState.PROTECTED


def settle_record(found: journal.Found) -> None:
    """Finish or undo a move to this host that was interrupted. Raises Busy where somebody works on its disks."""
    details = details_of(found)
    request = Move(
        step=MoveStep.LOOK,
        token=details.token,
        guest=found.record.guest,
        by=details.by,
        disks=details.disks,
        domain=details.domain,
    )
    with ExitStack() as locks:
        now = record_of(details.token)
        if now is None:
            return
        arrival = _arrival(details.root, request, _locked(details.root, details.disks, locks), now)
        try:
            arrival.settle_abandoned()
        finally:
            arrival.close()


def _settle_others(root: Path, request: Move) -> None:
    """Earlier moves of these disks whose processes have died."""
    names = {each.disk for each in request.disks}
    for found in journal.find(operation=OPERATION)[0]:
        if not found.record.is_abandoned:
            continue
        details = details_of(found)
        if details.root == root and names & {each.disk for each in details.disks}:
            settle_record(found)
