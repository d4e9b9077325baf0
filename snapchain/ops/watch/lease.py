"""A guest runs under a lease: its host renews it at the destination and at a witness, and else the kernel stops QEMU.

    the guest is seen (sighting.py)
         -> rehearse: the guards stop the QEMU once -> guards with the deadline (guarded_qemu.py)
         -> LEASE at the witness, then at the destination (lease_places.py)
         -> renewals at both, each by a thread of its own: any one that succeeds moves the deadline of the guards
    no answer to the first request        the renewals tell whether it was recorded; the witness counts after that
    none for five sixths of the lease     QEMU, or libvirt, is asked to pause the guest (courtesy.py)
    none for the whole lease              the guards die, and the kernel stops the QEMU (host/deadman.py)
    one that succeeds again               the guards, or new ones, let the QEMU continue
    one that is refused: a newer epoch    the QEMU is stopped at once, for good: another host has taken the guest over
    an orderly end                        UNLEASE at the destination first, and only then the guards go
    the QEMU has ended                    UNLEASE; a new QEMU is stopped until that, or a renewal, succeeds

What is promised depends on the guards alone.  This process only ever gives them later deadlines, each counted from
before a renewal was sent that succeeded; it may be killed, stopped or late at any moment.  A note says what may be
recorded at the destination, and is written before it is asked: so a later run goes on, also after the host was down.
"""

from __future__ import annotations

import queue
import socket
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Self

from snapchain.destination.protocol import Destination
from snapchain.errors import Busy, Conflict, InvalidInput, NotFound, SnapchainError, Unavailable, Unsupported
from snapchain.host import deadman, files
from snapchain.host.deadman import clock
from snapchain.host.process_identity import Identity, boot_id
from snapchain.host.temporary_names import NEW
from snapchain.model import lease as terms
from snapchain.model.events import OnEvent, ignore
from snapchain.model.guest_state import GuestStanding, GuestState, describe_takeover
from snapchain.model.lease import STOP_SECONDS, Lease
from snapchain.ops.lease_notes import LeaseNote, notes_of, read_note
from snapchain.ops.watch.courtesy import Courtesy
from snapchain.ops.watch.door import GuestDoor
from snapchain.ops.watch.guarded_qemu import GuardedQemu
from snapchain.ops.watch.guest_work import WatchRequest
from snapchain.ops.watch.lease_messages import LeaseMessages
from snapchain.ops.watch.lease_places import Holding, LeasePlace, LeaseRequest, has_lease
from snapchain.ops.watch.renewals import News, Renewals
from snapchain.ops.watch.run import LeaseReport, LeaseState
from snapchain.ops.watch.sighting import Sight

_LOOK = 1.0
"""Seconds from one look at the guards to the next."""
_AFTER_FAULT = 2.0
_REFUSALS = (Conflict, NotFound, InvalidInput, Unsupported)
"""A place that answers so has not recorded what it was asked for."""


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
        self._request, self._path, self._on_renewed = request, note, on_renewed
        self._host = (host or socket.gethostname())[:250]
        self._qemu = GuardedQemu(on_guards=self._try_note)
        self._courtesy = Courtesy(door)
        self._sight = Sight(watch, door, is_needed=lambda: self._lease is None or not self._qemu.is_there)
        door.closed = self._why_closed
        self._news: queue.Queue[News | None] = queue.Queue()
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, name="lease", daemon=True)
        self._holding = Holding(watch.name or watch.guest.domain or "", self._host, 0)
        self._messages = LeaseMessages(self._holding.guest, on_event)
        self._interval = request.interval or terms.interval(request.seconds)
        self._renewals = Renewals(
            self.ask,
            self._news.put,
            interval=self._interval,
            goes_on=lambda lease: self._lease is lease and self._taken is None,
            ending=self._ending,
        )
        self._has_read_note = self._has_ended_unknown = self._has_rehearsed = False
        self._lease: Lease | None = None
        """That the destination may have recorded; None where nothing is promised."""
        self._is_sure = False
        """Whether it is known to have recorded it."""
        self._must_end = False
        self._until = 0.0
        self._taken: GuestStanding | None = None

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ending.set()
        self._renewals.hurry()
        self._news.put(None)
        self._thread.join()
        is_over = False
        try:
            self._end()
            is_over = True
        finally:
            self._courtesy.close(resumes=is_over, seconds=STOP_SECONDS)

    def report(self) -> LeaseReport:
        """How it stands; from any thread."""
        state = self._state()
        left = max(self._until - clock(), 0.0) if state == "held" else None
        faults = self._messages.faults
        return LeaseReport(state=state, seconds=self._request.seconds, left_seconds=left, faults=faults)

    def _state(self) -> LeaseState:
        if self._taken is not None:
            return "taken"
        if self._lease is None:
            return "none"
        if self._until <= clock() and self._qemu.is_stopped:
            return "paused"
        return "held" if self._is_sure else "none"

    def _why_closed(self) -> str | None:
        """A paused guest must not stay so for the length of a shipment, and a stopped QEMU does not answer."""
        if self._courtesy.is_pausing or self._state() in ("paused", "taken"):
            return "its lease was not renewed in time, so the guest is stopped, or about to be"
        return None

    # --- the loop

    def _run(self) -> None:
        while not self._ending.is_set():
            try:
                self.step()
                self._wait()
            except (SnapchainError, OSError, RuntimeError) as error:  # such as no memory for a thread
                self._messages.fault("this host", error)
                self._ending.wait(_AFTER_FAULT)

    def step(self) -> None:
        """Do what is due. Raises what keeps it from being done; then nothing new is promised."""
        if self._taken is None and self._lease is None:
            if self._courtesy.is_pausing:
                self._courtesy.ask_to_resume(STOP_SECONDS)
            self._begin()
        if self._taken is not None:
            self._stay_stopped(self._taken)
        elif self._lease is not None:
            self._follow_process()
            self._qemu.keep(self._until)
            self._be_courteous(self._lease)
            for place in self._request.places:
                self._renewals.keep(place, self._lease)
        self._messages.say(self._state(), self._taken)

    def _wait(self) -> None:
        """Until there is news, or it is time to look again."""
        seconds = _LOOK if self._lease is not None or self._taken is not None else self._interval
        with suppress(queue.Empty):
            news = self._news.get(timeout=seconds)
            if news is not None:
                self.take(news)

    def ask(self, place: LeasePlace, lease: Lease, opened: Destination | None) -> tuple[News, Destination | None]:
        """Renew the lease, or end it where the guest is off; the place, if it may be asked again as it was opened."""
        sent = clock()
        is_end = (self._qemu.process is None or self._must_end) and place is self._request.destination
        try:
            opened = opened or place.opened()
            if is_end:
                answer = self._holding.end(opened, lease, is_sure=self._is_sure)
            else:
                answer = self._holding.renew(opened, lease)
        except (SnapchainError, OSError, RuntimeError) as error:
            return News(lease, place, sent, error), None
        return News(lease, place, sent, answer, is_end), opened

    def take(self, news: News) -> None:
        """Judge the answer of a place."""
        lease, standing = self._lease, news.answer
        if lease is None or news.lease is not lease or self._taken is not None:
            return
        if isinstance(standing, Exception):
            self._messages.fault(news.place.name, standing)
            return
        is_destination = news.place is self._request.destination
        if self._is_taken(standing, lease):
            self._taken = standing
        elif standing.epoch > lease.epoch or news.is_end:
            self._is_over()
        elif has_lease(standing, lease):
            self._messages.fault(news.place.name, None)
            self._is_sure |= is_destination
            if self._is_sure:
                self._renewed(terms.deadline(news.sent, lease.seconds))
        elif not is_destination:
            self._messages.fault(news.place.name, "the lease was ended there; start the watch again")
        elif self._is_sure and standing.lease is None:
            self._is_over()  # nobody takes a guest over by a lease that is not recorded; another one can be taken
        else:
            self._must_end = True  # the request for it may arrive yet

    def _is_taken(self, standing: GuestStanding, lease: Lease) -> bool:
        """Whether another host has the guest that runs here: it has not come back here since."""
        if standing.epoch <= lease.epoch or not self._qemu.is_there:
            return False
        return not self._is_of(standing.epoch)

    def _is_of(self, epoch: int) -> bool:
        """Whether the guest was seen to run here in this epoch, or in a later one."""
        seen = self._sight.last
        return seen is not None and seen.process == self._qemu.process and seen.epoch >= epoch

    def _renewed(self, until: float) -> None:
        """A renewal succeeded that lets the guest run until then."""
        self._on_renewed(until)
        self._until = max(until, self._until)
        self._qemu.renewed(self._until)

    def _is_over(self) -> None:
        """Nothing is promised any more."""
        self._qemu.release()
        if self._qemu.process is None:
            self._has_rehearsed = False
        self._lease = None
        self._is_sure = self._must_end = False
        self._until = 0.0
        self._remove_note()

    # --- the beginning

    def _begin(self) -> None:
        """Take the lease, where nothing is promised. Raises what keeps it from being taken."""
        self._find()
        if self._lease is not None:
            return
        places = {place: place.opened() for place in self._request.places}
        standings = {place: opened.guest_state(self._holding.guest) for place, opened in places.items()}
        newest = max(standings.values(), key=lambda each: each.epoch)
        if newest.epoch > self._holding.epoch:
            if not _was_taken_by_lease(newest, self._host):
                raise self._taken_error(newest)
            self._taken = newest
            return
        at, other = self._request.destination, self._request.witness
        here, there = standings[at].here, None if other is None else standings[other].here
        if here is not None and there is not None and here.is_same(there):
            raise InvalidInput("the witness is the destination itself, by another address", subject=there.url)
        if (older := standings[at].lease) is not None and older.host == self._host:
            # Of a QEMU that has ended, of which no note is left: nothing guards this one yet.
            standings[at] = self._holding.end(places[at], older, is_sure=True)
        self._rehearse()
        self._take_lease(places, standings)

    def _find(self) -> None:
        """The guest of which nothing is promised, or the one that an earlier run has left. Raises NotFound."""
        if not self._has_read_note:
            self._go_on_by_note()
            self._has_read_note = True
            if self._lease is not None:
                return
        try:
            seen = self._sight.look()
            if seen.fault is not None:
                raise seen.fault
        except NotFound:
            self._end_unknown()
            raise
        assert seen.process is not None, "else it has a fault"
        for path, _ in notes_of(seen.process):
            if path != self._path:
                raise Busy(
                    f"another watch has taken a lease of it: {path.parent}",
                    subject=seen.name,
                    hint="start the watch with the same --domain or --qmp as then; its end ends the lease",
                )
        self._qemu.found(seen.process)
        self._holding = Holding(seen.name, self._host, seen.epoch)
        self._messages.guest = seen.name

    def _end_unknown(self) -> None:
        """The guest is off. A lease of this host of which no note is left would keep its hook from starting it."""
        if self._has_ended_unknown or not self._holding.guest:
            return
        opened = self._request.destination.opened()
        standing = opened.guest_state(self._holding.guest)
        if standing.lease is not None:
            self._holding.end(opened, standing.lease, is_sure=True)
        self._has_ended_unknown = True

    def _go_on_by_note(self) -> None:
        """Raises Conflict for a lease at another destination."""
        files.remove_temporaries(self._path, purpose=NEW)
        note = read_note(self._path)
        if note is None:
            return
        is_there = note.is_there
        if note.lease is None:
            if is_there:
                deadman.end(note.guards)
                deadman.let_continue(note.process)
            self._remove_note()
            return
        if note.destination != self._request.destination.name:
            raise Conflict(
                f"its lease is at another destination, {note.destination}, from which it may still be taken over",
                subject=note.guest,
                hint="start the watch with that one as its first DEST, and end it in order",
            )
        self._holding = Holding(note.guest, self._host, note.epoch)
        self._messages.guest = note.guest
        self._qemu.adopt(note.process if is_there else None, note.guards if is_there else ())
        self._courtesy.is_pausing = note.pausing and is_there
        self._lease, self._is_sure = note.lease, note.is_sure
        # With other terms it is ended, and another one taken.
        self._must_end = note.lease != self._holding.lease(self._request, token=note.lease.token)

    def _take_lease(
        self, places: Mapping[LeasePlace, Destination], standings: Mapping[LeasePlace, GuestStanding]
    ) -> None:
        lease = self._holding.lease(self._request)
        try:
            for place, opened in places.items():
                is_witness = place is self._request.witness
                if not is_witness:  # nobody takes the guest over before the destination has the lease
                    self._qemu.guard()
                    until = terms.deadline(clock(), lease.seconds)
                    self._qemu.promise(until)
                    self._lease, self._is_sure, self._until = lease, False, until
                    self._write_note()
                self._holding.take(opened, lease, is_witness=is_witness, seen=standings[place].number)
        except (SnapchainError, OSError, RuntimeError) as error:
            if self._lease is None or isinstance(error, (*_REFUSALS, _NotNoted)):
                self._is_over()
                raise
            self._messages.fault(self._request.destination.name, error)  # it may be recorded: the renewals tell
        else:
            self._is_sure = True
            self._messages.fault("this host", None)
            self._try_note()

    def _rehearse(self) -> None:
        """Raises Unsupported where the guards do not stop the QEMU."""
        if self._has_rehearsed:
            return
        self._qemu.rehearse(on_guards=lambda guards: self._write_note(guards=guards), wait=self._ending.wait)
        self._remove_note()
        self._has_rehearsed = True

    # --- the QEMU

    def _follow_process(self) -> None:
        """Nobody shall take a guest over that was shut down, so its lease is ended. Its next QEMU is guarded too."""
        if self._qemu.is_there:
            return
        if self._qemu.process is not None:
            self._qemu.gone()
            self._courtesy.is_pausing = False
            self._renewals.hurry()  # who starts it again has to wait for that
        try:
            seen = self._sight.look()
        except SnapchainError as error:
            self._messages.fault("this host", f"the guest is off, and its lease is not ended yet: {error}")
            return
        assert seen.process is not None, "it was found"
        self._qemu.replaced_by(seen.process)
        self._messages.fault("this host", None)
        self._try_note()

    def _stay_stopped(self, taken: GuestStanding) -> None:
        """Another host has the guest: whatever runs here stops, unless the guest has come back since."""
        if self._qemu.is_there:
            self._qemu.stop()
            return
        self._qemu.gone()
        try:
            process = self._sight.look().process
        except SnapchainError:  # it is off, as it should be
            return
        assert process is not None, "it was found"
        self._qemu.found(process)
        if self._is_of(taken.epoch):
            self._taken = None
            self._is_over()
        else:
            self._qemu.stop()

    def _be_courteous(self, lease: Lease) -> None:
        left = self._until - clock()
        if clock() < terms.pause_at(self._until, lease.seconds):
            if self._courtesy.is_pausing:
                self._courtesy.ask_to_resume(terms.interval(lease.seconds))
        elif not self._courtesy.is_pausing and left > 0 and not self._qemu.is_stopped:
            self._courtesy.ask_to_pause(left)
            self._try_note()

    # --- the end

    def _end(self) -> None:
        """Raises Unavailable where the destination does not record it: then the guest is stopped at the deadline."""
        if self._taken is not None:
            raise self._taken_error(self._taken)
        if self._lease is None:
            return
        try:
            opened = self._request.destination.opened()
            now = self._holding.end(opened, self._lease, is_sure=self._is_sure)
        except SnapchainError as error:
            self._qemu.leave()
            raise self._not_ended(error) from error
        if self._is_taken(now, self._lease):
            self._qemu.stop()
            raise self._taken_error(now)
        if self._request.witness is not None:
            with suppress(SnapchainError):  # without the destination's record, its own means nothing
                self._holding.end(self._request.witness.opened(), self._lease, is_sure=True)
        self._is_over()

    def _not_ended(self, error: SnapchainError) -> Unavailable:
        pid = "" if self._qemu.process is None else f" {self._qemu.process[0]}"
        return Unavailable(
            f"the lease could not be ended, so the guest stops when it runs out: {error}",
            subject=self._holding.guest,
            hint="start the watch again: it goes on with the lease, and the guest continues. If you are sure that no "
            f"host takes it over, now or later: kill -CONT{pid}",
        )

    def _taken_error(self, standing: GuestStanding) -> Conflict:
        hint = "end its QEMU here, and start no guest on these images; `snapchain fence` shows what they hold besides"
        if standing.state is GuestState.PROTECTED and standing.master == self._host and self._qemu.process is not None:
            hint = (
                "the failover was withdrawn: with this watch ended, remove "
                f"{self._path}, let the guest continue by kill -CONT {self._qemu.process[0]}, and ship it once with "
                f"--epoch {standing.epoch}"
            )
        return Conflict(describe_takeover(standing), subject=self._holding.guest, hint=hint)

    # --- the note

    def _try_note(self) -> None:
        """On a full disk the guards are what counts."""
        try:
            self._write_note()
        except _NotNoted as error:
            self._messages.fault("this host", error)

    def _write_note(self, *, guards: Sequence[Identity] | None = None) -> None:
        """guards: of a rehearsal. Raises _NotNoted."""
        if guards is None and self._lease is None:
            return
        note = LeaseNote(
            guest=self._holding.guest,
            epoch=self._holding.epoch,
            destination=self._request.destination.name,
            process=self._qemu.process or (0, 0),
            boot=boot_id(),
            guards=tuple(self._qemu.guards if guards is None else guards),
            pausing=self._courtesy.is_pausing,
            lease=self._lease if guards is None else None,
            is_sure=self._is_sure,
        )
        try:
            files.write_atomically(self._path, note.model_dump_json().encode())
        except SnapchainError as error:
            raise _NotNoted(f"the note of the lease cannot be written: {error}", subject=self._path) from error

    def _remove_note(self) -> None:
        with suppress(NotFound):
            files.remove(self._path)


class _NotNoted(Unavailable):
    """A later run would not know of the lease."""


def _was_taken_by_lease(standing: GuestStanding, host: str) -> bool:
    """Whether the guest was taken over from this host because it stops the guest itself."""
    vouched = standing.vouched
    return vouched is not None and vouched.how == "lease" and standing.former == host
