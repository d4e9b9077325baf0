"""A guest runs under a lease: its host renews it at the destination and at a witness, and else the kernel stops QEMU.

    the guest is seen whenever the watch opens it (door.py), also at the beginning of a long shipment
         -> rehearse: the guards stop the QEMU once -> guards with the deadline
         -> LEASE at the witness, then at the destination
         -> renewals at both, each by a thread of its own: any one that succeeds moves the deadline of the guards
    none for five sixths of the lease     QEMU, or libvirt, is asked to pause the guest
    none for the whole lease              the guards die, and the kernel stops the QEMU (host/deadman.py)
    one that succeeds again               new guards, which let the QEMU continue; the guest is resumed if it was paused
    one that is refused: a newer epoch    the QEMU is stopped at once, for good: another host has taken the guest over
    an orderly end, or no QEMU any more   UNLEASE at the destination first, and only then the guards go

What is promised depends on the guards alone.  This process only ever gives them later deadlines, each counted from
before a renewal was sent that succeeded; it may be killed, stopped or late at any moment.
"""

from __future__ import annotations

import queue
import secrets
import socket
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

from snapchain.destination.protocol import Destination
from snapchain.errors import Conflict, InvalidInput, NotFound, SnapchainError, Unavailable, Unsupported
from snapchain.guest.disks import disks_to_protect
from snapchain.guest.libvirt_guest import LibvirtGuest
from snapchain.guest.pausing import pause, unpause
from snapchain.guest.protocol import Guest, State
from snapchain.host import deadman, files
from snapchain.host.deadman import Deadman, clock
from snapchain.host.process_identity import Identity, boot_id, identity
from snapchain.host.temporary_names import NEW
from snapchain.host.terminal import shell_word
from snapchain.model import lease as terms
from snapchain.model.events import Notice, OnEvent, ignore
from snapchain.model.guest_state import GuestChange, GuestStanding, Transition, describe_takeover, epoch_of as latest
from snapchain.model.lease import STOP_SECONDS, Lease
from snapchain.ops.fence import hook
from snapchain.ops.guest_seal import epoch_of
from snapchain.ops.lease_notes import LeaseNote, read_note
from snapchain.ops.watch.door import GuestDoor
from snapchain.ops.watch.guest_work import WatchRequest
from snapchain.ops.watch.run import LeaseReport

_START_SECONDS = 60.0
"""Deadline of guards that are not needed yet, or stop the guest once on trial: a busy machine starts them slowly."""
_LOOK = 1.0
"""Seconds from one look at the guards to the next."""
_AFTER_FAULT = 2.0


@dataclass(frozen=True, slots=True)
class LeasePlace:
    """A place that grants the lease. opened: opens it anew; raises what opening raises"""

    name: str
    opened: Callable[[], Destination]


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaseRequest:
    """destination: from which the guest may be taken over; witness: the other place, if any

    seconds: of the lease; interval: from one renewal to the next, by default a third of the lease
    """

    seconds: int
    interval: float | None = None
    destination: LeasePlace
    witness: LeasePlace | None = None

    @property
    def places(self) -> tuple[LeasePlace, ...]:
        """The witness first: a record at the destination says that the one at the witness was made."""
        return (self.destination,) if self.witness is None else (self.witness, self.destination)


@dataclass(frozen=True, slots=True)
class Seen:
    """A guest that was opened.

    process: None where it does not run; epoch: in which this host writes its disks; fault: why it gets no lease
    """

    name: str
    process: Identity | None
    epoch: int
    fault: SnapchainError | None = None


Held = Literal["none", "held", "paused", "taken"]


@dataclass(frozen=True, slots=True)
class _News:
    """The answer to a renewal of a lease at a place. sent: when it was sent"""

    lease: Lease
    place: str
    sent: float
    answer: GuestStanding | SnapchainError


class LeaseHolder:
    """One guest under a lease. A context manager: the lease ends in order with the block, or the error says why not."""

    def __init__(
        self,
        watch: WatchRequest,
        door: GuestDoor,
        request: LeaseRequest,
        note: Path,
        *,
        host: str = "",
        on_renewed: Callable[[float], None] = lambda _until: None,
        on_event: OnEvent = ignore,
    ) -> None:
        """door: that the watch opens its guest by; note: a file of its own in a private directory

        on_renewed: called with the deadline of each renewal
        """
        self._door = door
        self._watch, self._request, self._path, self._on_event = watch, request, note, on_event
        self._host = (host or socket.gethostname())[:250]
        self._interval = request.interval or terms.interval(request.seconds)
        self._on_renewed = on_renewed
        self._news: queue.Queue[_News | None] = queue.Queue()
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, name="lease", daemon=True)
        self._courtesy = ThreadPoolExecutor(1, "pause")
        self._pause: Future[bool | None] | None = None
        self._resume: Future[bool] | None = None
        self._lock = threading.Lock()
        self._faults: dict[str, str] = {}
        self._guest = ""
        self._seen: Seen | None = None
        self._lease: Lease | None = None
        self._until = 0.0
        self._process: Identity | None = None
        self._pair: Deadman | None = None
        self._older: tuple[Identity, ...] = ()
        """Guards of an earlier run, or of an attempt that failed: they go when newer ones may let the guest run."""
        self._epoch = 0
        self._pausing = False
        self._rehearsed = False
        self._taken: GuestStanding | None = None
        self._said: Held = "none"

    def __enter__(self) -> Self:
        self._door.on_opened, self._door.closed = self._see, self._why_closed
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ending.set()
        self._news.put(None)
        self._thread.join()
        self._courtesy.shutdown(wait=False, cancel_futures=True)
        self._end()

    def report(self) -> LeaseReport:
        """How it stands; from any thread."""
        with self._lock:
            faults = tuple(f"{place}: {words}" for place, words in self._faults.items())
        state = self._state()
        left = max(self._until - clock(), 0.0) if state == "held" else None
        return LeaseReport(state=state, seconds=self._request.seconds, left_seconds=left, faults=faults)

    def _state(self) -> Held:
        if self._taken is not None:
            return "taken"
        if self._lease is None:
            return "none"
        is_stopped = self._process is None or deadman.is_stopped(self._process)
        return "paused" if is_stopped and self._until <= clock() else "held"

    # --- the loop

    def _run(self) -> None:
        while not self._ending.is_set() and self._taken is None:
            try:
                self._step()
                self._wait()
            except SnapchainError as error:
                self._fault("this host", str(error))
                self._ending.wait(_AFTER_FAULT)
        if self._taken is not None:
            self._stop_for_good()

    def _step(self) -> None:
        """What is due."""
        if self._lease is None:
            self._begin()
            return
        self._follow_process()
        self._keep_guarded()
        if clock() >= terms.pause_at(self._until, self._request.seconds):
            self._ask_to_pause()
        elif self._pausing:
            self._ask_to_resume()
        self._tell()

    def _wait(self) -> None:
        """Until there is news, or it is time to look again."""
        seconds = self._interval if self._lease is None else _LOOK
        with suppress(queue.Empty):
            news = self._news.get(timeout=seconds)
            if news is not None:
                self._take(news)

    def _take(self, news: _News) -> None:
        """The answer of a place."""
        if self._lease is None or news.lease is not self._lease:
            return
        if isinstance(news.answer, SnapchainError):
            about = news.answer.subject
            self._fault(news.place, news.answer.message if str(about) == news.place else str(news.answer))
            return
        standing = news.answer
        if standing.epoch > self._lease.epoch:
            self._taken = standing
            return
        has_it = standing.lease is not None and standing.lease.token == self._lease.token
        if not has_it and news.place == self._request.destination.name:
            # Nobody takes a guest over by a lease that the destination does not record: another one can be taken.
            self._lease = None
            self._write_note()
            return
        if not has_it:
            self._fault(news.place, "the lease was ended there; start the watch again to take it there too")
            return
        self._fault(news.place, None)
        self._renewed(terms.deadline(news.sent, self._request.seconds))

    def _renewed(self, until: float) -> None:
        """A renewal succeeded that lets the guest run until then."""
        self._on_renewed(until)
        self._until = max(until, self._until)
        if self._process is None or self._until <= clock():
            return
        if self._pair is not None and not self._extend():
            self._close_pair()  # one of them hangs: others take over
        self._keep_guarded()

    def _extend(self) -> bool:
        """Tell the guards of the deadline; they let the QEMU continue where it was stopped."""
        assert self._pair is not None, "asked by whom there is one"
        assert self._process is not None, "it has guards"
        return self._pair.extend(self._until, resumes=deadman.is_stopped(self._process))

    def _keep_guarded(self) -> None:
        """The QEMU has guards and runs, or is stopped."""
        if self._pair is not None and not self._pair.works:
            self._close_pair()
        if self._process is None:
            return
        has_older = any(identity(guard[0]) == guard for guard in self._older)
        is_new = False
        if self._pair is None and self._until > clock():
            # A busy machine takes long to start guards: while the QEMU cannot run on without them, they get that time.
            is_new = has_older or deadman.is_stopped(self._process)
            self._guard(clock() + _START_SECONDS if is_new else self._until)
        elif self._pair is None and not has_older and not deadman.is_stopped(self._process):
            self._halt()
        if self._pair is None or self._until <= clock():
            return
        if (is_new or deadman.is_stopped(self._process)) and not self._extend():
            self._close_pair()
            return
        if self._older:
            deadman.end(self._older)
            self._older = ()
            self._write_note()
            self._extend()

    def _ask(self, place: LeasePlace, lease: Lease) -> None:
        """The thread of a place: renew, and say what came of it."""
        opened: Destination | None = None
        change = self._change(Transition.RENEW, lease)
        while not self._ending.is_set() and self._taken is None and self._lease is lease:
            sent = clock()
            answer: GuestStanding | SnapchainError
            try:
                if opened is None:
                    opened = place.opened()
                answer = opened.change_guest(change)[0]
            except SnapchainError as error:
                opened, answer = None, error
            self._news.put(_News(lease, place.name, sent, answer))
            self._ending.wait(max(0.0, sent + self._interval - clock()))

    # --- the beginning

    def _begin(self) -> None:
        """Take the lease. Raises what keeps it from being taken; then nothing new is promised."""
        note = self._read_note()
        if note is not None and note.rehearses:
            deadman.end(note.guards)
            deadman.let_continue(note.process)
            note = None
        if note is None:
            seen = self._look()
            self._guest = seen.name
            if seen.fault is not None:
                raise seen.fault
            self._process, self._epoch = seen.process, seen.epoch
        else:
            self._guest, self._epoch, self._process = note.guest, note.epoch, note.process
            self._pausing, self._older = note.pausing, note.guards
            if self._pair is not None:
                self._pair.close()
                self._pair = None
            if note.lease is not None and note.lease == self._new_lease(note.lease.token):
                self._hold(note.lease)
                return
        assert self._process is not None, "one of both has set it"
        places = {place: place.opened() for place in self._request.places}
        standings = {place: opened.guest_state(self._guest) for place, opened in places.items()}
        for standing in standings.values():
            if standing.epoch > self._epoch and note is None:
                raise _taken_error(self._guest, standing)
            if standing.epoch > self._epoch:
                self._taken = standing
                return
        if note is None:
            self._rehearse(self._process)
        self._take_lease(self._new_lease(secrets.token_hex(16)), places, standings)

    def _new_lease(self, token: str) -> Lease:
        witness = self._request.witness
        return Lease(
            token=token,
            seconds=self._request.seconds,
            host=self._host,
            epoch=self._epoch,
            witness=None if witness is None else witness.name[:4096],
        )

    def _take_lease(
        self,
        lease: Lease,
        places: Mapping[LeasePlace, Destination],
        standings: Mapping[LeasePlace, GuestStanding],
    ) -> None:
        self._guard(clock() + _START_SECONDS)
        until = 0.0
        for place, opened in places.items():
            is_witness = place is self._request.witness
            if not is_witness:  # nobody takes the guest over before the destination has the lease
                until = terms.deadline(clock(), lease.seconds)
                self._guard_until(until)
            record = lease.model_copy(update={"is_witness": is_witness})
            try:
                opened.change_guest(self._change(Transition.LEASE, record, seen=standings[place].number))
            except SnapchainError as error:
                # Else it may be recorded: the guards stop the guest, until the destination says that it has the lease.
                is_refused = isinstance(error, (Conflict, NotFound, InvalidInput, Unsupported))
                if not self._older and (is_witness or is_refused):
                    self._release()
                raise
        self._until = until
        self._hold(lease)

    def _guard_until(self, until: float) -> None:
        """Raises Unavailable where the guards do not answer; then nothing new is promised."""
        assert self._pair is not None, "just made"
        if self._pair.extend(until):
            return
        if not self._older:
            self._release()
        raise Unavailable("the processes that guard the guest do not answer", subject=self._guest)

    def _hold(self, lease: Lease) -> None:
        """From now on it is renewed."""
        self._lease = lease
        self._write_note()
        self._keep_guarded()
        self._tell()
        for place in self._request.places:
            threading.Thread(target=self._ask, args=(place, lease), name=f"lease {place.name}", daemon=True).start()

    def _see(self, guest: Guest) -> None:
        """Find the guest's QEMU, and the epoch in which this host writes its disks; by whichever thread opened it."""
        process = self._process
        if self._lease is not None and process is not None and identity(process[0]) == process:
            return
        name = self._watch.name or guest.name
        try:
            process = guest.process() if guest.state() in (State.RUNNING, State.PAUSED) else None
            if process is None:
                raise NotFound("no process of its QEMU is found on this host", subject=name)
        except SnapchainError as error:
            self._seen = Seen(name, None, 0, error)
            return
        try:
            _check_autostart(guest)
            snapshot = self._watch.snapshot
            disks = disks_to_protect(guest, snapshot.disks)
            epochs = [epoch_of(guest, disk.name, image_dirs=snapshot.image_dirs) for disk in disks]
        except SnapchainError as error:
            self._seen = Seen(name, process, 0, error)
        else:
            self._seen = Seen(name, process, latest(epochs))

    def _why_closed(self) -> str | None:
        """A paused guest must not stay so for the length of a shipment, and a stopped QEMU does not answer."""
        if self._pausing or self._state() in ("paused", "taken"):
            return "its lease was not renewed in time, so the guest is stopped, or about to be"
        return None

    def _look(self) -> Seen:
        """The guest as it was seen last: now, unless the watch is at work with it. Raises NotFound where it is off."""
        self._door.look()
        seen = self._seen
        if seen is None or (seen.process is not None and identity(seen.process[0]) != seen.process):
            raise NotFound("no process of its QEMU was found on this host yet", subject=self._guest or None)
        return seen

    def _rehearse(self, process: Identity) -> None:
        """Prove once that the guards stop this QEMU: the guest stands still for milliseconds.

        Raises Unsupported where they do not: another user's QEMU, a kernel or a security module that forbids it.
        """
        if self._rehearsed:
            return
        pair = Deadman(process, clock() + _START_SECONDS)
        try:
            self._write(self._noted(pair.guards, rehearses=True))
            pair.extend(clock())
            until = clock() + STOP_SECONDS
            while not deadman.is_stopped(process) and clock() < until:
                self._ending.wait(0.001)
            stops = deadman.is_stopped(process)
        finally:
            pair.end()
            deadman.let_continue(process)
        self._remove_note()
        if not stops:
            raise Unsupported(
                "the kernel did not stop the guest's QEMU when its guards ended, so a lease would promise nothing",
                subject=self._guest,
                hint="run the watch as root, outside of containers; a security module may forbid the signal",
            )
        self._rehearsed = True

    # --- the guards

    def _guard(self, until: float) -> None:
        """Start guards. Raises as Deadman; then there are none."""
        assert self._process is not None, "it is what they guard"
        self._pair = Deadman(self._process, until)
        self._write_note()

    def _close_pair(self) -> None:
        """The guards go, and the QEMU stops."""
        pair, self._pair = self._pair, None
        if pair is not None:
            pair.end()

    def _release(self) -> None:
        """Nothing is promised any more: the guards go, and the QEMU continues."""
        self._close_pair()
        deadman.end(self._older)
        if self._process is not None:
            deadman.let_continue(self._process)
        self._remove_note()

    def _halt(self) -> None:
        """Stop a QEMU that has no guards, as they would."""
        assert self._process is not None, "there is one"
        with suppress(NotFound):  # it has ended
            self._guard(clock() + _START_SECONDS)
        self._close_pair()

    def _stop_for_good(self) -> None:
        """Another host has the guest: whatever runs here stops."""
        if self._process is not None and identity(self._process[0]) == self._process:
            if self._pair is None or not self._pair.works:
                self._halt()
            self._close_pair()
            deadman.end(self._older)
        self._tell()

    def _follow_process(self) -> None:
        """End the lease of a guest that was shut down: nobody shall take it over, and its next QEMU gets a new one.

        As long as that cannot be recorded, its next QEMU is guarded as this one was.
        """
        if self._process is not None and identity(self._process[0]) == self._process:
            return
        assert self._lease is not None, "else there is nothing to follow"
        self._close_pair()
        self._process, self._pausing = None, False
        try:
            self._unlease_everywhere(self._lease)
        except SnapchainError as error:
            if self._state() == "taken":
                return
            self._fault("this host", f"the guest is off, and its lease cannot be ended: {error}")
            with suppress(NotFound):
                self._process = self._look().process
            return
        self._lease, self._until, self._rehearsed = None, 0.0, False
        self._fault("this host", None)
        self._remove_note()

    # --- the courtesy: a guest that QEMU pauses has a clock that stands still

    def _ask_to_pause(self) -> None:
        left = self._until - clock()
        if self._pausing or left <= 0 or self._process is None or deadman.is_stopped(self._process):
            return
        self._pausing = True
        self._write_note()
        self._pause = self._courtesy.submit(_tried, self._door, left)

    def _ask_to_resume(self) -> None:
        """As often as it takes: a request to pause that QEMU did not answer may be carried out later."""
        if (self._pause is not None and not self._pause.done()) or (
            self._resume is not None and not self._resume.done()
        ):
            return
        was_off = self._pause is not None and self._pause.result() is False
        is_done = self._resume is not None and self._resume.result()
        self._pause = self._resume = None
        if was_off or is_done:
            self._pausing = False
            self._write_note()
            return
        self._resume = self._courtesy.submit(_resumed, self._door, terms.interval(self._request.seconds))

    # --- the end

    def _end(self) -> None:
        """Raises Unavailable where the destination does not record it: then the guest is stopped at the deadline."""
        if self._taken is not None:
            raise _taken_error(self._guest, self._taken)
        if self._lease is None and self._pair is None and not self._older:
            return
        try:
            self._unlease_everywhere(self._lease or self._ask_once_more())
        except SnapchainError as error:
            if self._state() == "taken":
                self._stop_for_good()
                raise
            if self._pair is not None:
                self._pair.close()
            raise self._not_ended(error) from error
        self._release()
        if self._pausing:
            _resumed(self._door, STOP_SECONDS)

    def _ask_once_more(self) -> Lease:
        """A request for a lease whose answer was lost may arrive yet: after one more that succeeds it is refused."""
        lease, place = self._new_lease(secrets.token_hex(16)), self._request.destination.opened()
        place.change_guest(self._change(Transition.LEASE, lease, seen=place.guest_state(self._guest).number))
        return lease

    def _unlease_everywhere(self, lease: Lease) -> None:
        """The destination first: without its record, the one of the witness means nothing."""
        self._unlease(self._request.destination, lease)
        if self._request.witness is not None:
            with suppress(SnapchainError):
                self._unlease(self._request.witness, lease)

    def _unlease(self, place: LeasePlace, lease: Lease) -> None:
        opened = place.opened()
        standing = opened.guest_state(self._guest)
        if standing.epoch == lease.epoch:
            standing, _ = opened.change_guest(self._change(Transition.UNLEASE, lease, seen=standing.number))
        if standing.epoch > lease.epoch:
            self._taken = standing
            raise _taken_error(self._guest, standing)

    def _not_ended(self, error: SnapchainError) -> Unavailable:
        pid = "" if self._process is None else f" {self._process[0]}"
        return Unavailable(
            f"the lease could not be ended, so the guest stops when it runs out: {error}",
            subject=self._guest,
            hint="start the watch again: it takes the lease anew, and the guest continues. If you are sure that no "
            f"host takes it over, now or later: kill -CONT{pid}",
        )

    # --- small things

    def _change(self, transition: Transition, lease: Lease, *, seen: int = 0) -> GuestChange:
        return GuestChange(
            guest=self._guest,
            transition=transition,
            seen=seen,
            token=lease.token,
            by=self._host,
            host=self._host,
            lease=lease if transition is Transition.LEASE else None,
        )

    def _fault(self, place: str, words: str | None) -> None:
        with self._lock:
            before = self._faults.get(place)
            if words is None:
                self._faults.pop(place, None)
            else:
                self._faults[place] = words
        if words is not None and words != before:
            self._on_event(Notice(f"lease of {self._guest or 'the guest'}: {place}: {words}"))

    def _tell(self) -> None:
        """Once, when the state changes."""
        state = self._state()
        if state == self._said:
            return
        words = {
            "none": "there is none",
            "held": "held" if self._said == "none" else "renewed again; the guest continues",
            "paused": "not renewed in time: the guest is stopped until a renewal succeeds",
            "taken": "" if self._taken is None else f"{describe_takeover(self._taken)}; the guest is stopped here",
        }
        self._said = state
        self._on_event(Notice(f"lease of {self._guest}: {words[state]}"))

    def _read_note(self) -> LeaseNote | None:
        files.remove_temporaries(self._path, purpose=NEW)
        return read_note(self._path)

    def _noted(self, guards: Sequence[Identity], *, rehearses: bool = False) -> LeaseNote:
        assert self._process is not None, "the note is about it"
        return LeaseNote(
            rehearses=rehearses,
            guest=self._guest,
            epoch=self._epoch,
            process=self._process,
            boot=boot_id(),
            guards=tuple(guards),
            pausing=self._pausing,
            lease=self._lease,
        )

    def _write_note(self) -> None:
        if self._process is None:
            return
        try:
            self._write(self._noted([*self._older, *(() if self._pair is None else self._pair.guards)]))
        except SnapchainError as error:  # a full disk: the guards are what counts
            self._fault("this host", f"the note of the lease cannot be written: {error}")

    def _write(self, note: LeaseNote) -> None:
        files.write_atomically(self._path, note.model_dump_json().encode())

    def _remove_note(self) -> None:
        with suppress(NotFound):
            files.remove(self._path)


def _taken_error(guest: str, standing: GuestStanding) -> Conflict:
    return Conflict(
        f"{describe_takeover(standing)}",
        subject=guest,
        hint="end its QEMU here, and start no guest on these images; `snapchain fence` shows what they hold besides",
    )


def _check_autostart(guest: Guest) -> None:
    """Raises Unsupported where libvirt starts the guest by itself, also while nobody can tell who may run it."""
    if isinstance(guest, LibvirtGuest) and guest.has_autostart() and not hook.requires_answer():
        raise Unsupported(
            "it starts with its host, also with one that comes back behind a cut link, where no lease stops it",
            subject=guest.name,
            hint=f"`virsh autostart --disable {shell_word(guest.name)}`, or let libvirt ask the destinations first: "
            "`snapchain fence --install-hook --require-answer --at DEST`",
        )


def _tried(door: GuestDoor, seconds: float) -> bool | None:
    """Whether it was paused now; False: it was not asked, or did not run; None where that is not known.

    The guards see to it then.
    """
    until = clock() + seconds
    try:
        with door.turn(seconds) as is_mine:
            left = until - clock()
            return is_mine and left > 0 and pause(door.address, seconds=left)
    except SnapchainError:
        return None


def _resumed(door: GuestDoor, seconds: float) -> bool:
    """Whether QEMU has answered: then it has nothing left to do of what it was asked before."""
    try:
        with door.turn(seconds) as is_mine:
            if is_mine:
                unpause(door.address, seconds=seconds)
            return is_mine
    except SnapchainError:
        return False
