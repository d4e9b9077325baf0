"""A domain of libvirt comes to this host: libvirt moves it, and this records what libvirt has done.

    step      what is done                                         journal    state of the guest
    PREPARE   disks locked, overlays empty on the newest layers    prepared   moving
              (libvirt starts its QEMU, and lets it run: `Finish`)
    GIVE      libvirt has it: it runs, or has run                             switched, active

libvirt decides, and its own state is asked: a domain that it has defined or runs has come whole.  One that still waits
for its memory may become either, so nothing is concluded before that is over.  Where the stream ends early and libvirt
does not know the domain, the overlays stay until the source says END, or the next move or `doctor` comes: somebody
may still be about to start it on them.
"""

from __future__ import annotations

import socket
import time
from contextlib import suppress
from pathlib import Path

from snapchain.errors import Busy, Conflict, NotFound, SnapchainError, Unsupported
from snapchain.guest import journal
from snapchain.guest.libvirt_migration import (
    Arrived,
    Presence,
    arrival_of,
    host_uuid,
    names_taken,
    presence,
    start_with_host,
)
from snapchain.host import run_directory
from snapchain.host.virsh import Virsh, is_installed, socket_of
from snapchain.model.guest_state import Transition
from snapchain.replica.guest_server import GuestArrival
from snapchain.replica.handover import Case
from snapchain.replica.move_record import details_of, remove_made
from snapchain.replica.stream.guest_messages import DomainPresence, Move, MoveStep, Moving, MovingDomain

_WAIT_SECONDS = 60.0
"""For a QEMU that waits for its memory to be let run or ended by libvirt, which notices a lost client within 30."""
_POLL_SECONDS = 0.2
_QEMU_DIRECTORY = Path("/var/lib/libvirt/qemu")
"""libvirt gives it to the user that its QEMUs run as."""
_PRESENCE = {
    Presence.ABSENT: DomainPresence.ABSENT,
    Presence.DEFINED: DomainPresence.DEFINED,
    Presence.WAITING: DomainPresence.INCOMING,
    Presence.PAUSED: DomainPresence.HERE,
    Presence.RUNNING: DomainPresence.HERE,
}


class DomainArrival(GuestArrival):
    """One move of a domain. Errors as of `GuestArrival`; Unavailable where libvirt does not answer."""

    def __init__(
        self, root: Path, request: Move, cases: list[Case], found: journal.Found | None, domain: MovingDomain
    ) -> None:
        super().__init__(root, request, cases, found)
        self._uuid, self._title, self._starts_with_host = domain.uuid, domain.name, domain.starts_with_host
        self._virsh = Virsh()
        self._arrived: Arrived | None = None
        self._host = ""

    def step(self, request: Move) -> Moving:
        """See `GuestArrival`."""
        begun = time.time()
        match request.step:
            case MoveStep.PREPARE:
                self._check_free()
                self._host = host_uuid(self._virsh)
                self._prepare()
            case MoveStep.GIVE | MoveStep.RUN:
                self._settles = True
                self._take()
            case MoveStep.END:
                self.end()
            case MoveStep.LOOK:
                pass
            case _:
                raise Unsupported("libvirt does that of its domains", subject=request.step.value)
        return self._standing(begun)

    def settle(self) -> None:
        """Record what libvirt has done, where it has the domain; else leave all as it is, for END."""
        if self._found is None:
            return
        if self._settled_presence() in (Presence.ABSENT, Presence.WAITING) and not self._is_given():
            return
        self._take()

    def settle_abandoned(self) -> None:
        """As `settle`, where nobody is left who could still have libvirt start it."""
        self.settle()
        if self._found is not None:
            self.end()

    def _check_free(self) -> None:
        if not is_installed():
            raise NotFound("this host has no virsh", subject="virsh", hint="install libvirt there")
        for words in names_taken(self._virsh, self._uuid, self._title):
            raise Conflict(words, subject=self._title, hint="see whether it is needed, then undefine it there")

    def _make_directory(self) -> Path:
        path = run_directory.make_for_libvirt(self._token)
        with suppress(OSError):
            run_directory.give_to(path, _QEMU_DIRECTORY.stat().st_uid)
        return path

    def _take(self) -> None:
        """The domain is this host's, since libvirt has it. Raises Conflict where it has not."""
        if not self._is_given():
            now = self._settled_presence()
            if now in (Presence.ABSENT, Presence.WAITING):
                raise Conflict(f"libvirt does not run the domain here: it is {now.value}", subject=self._title)
            self._change(Transition.SWITCH, host=socket.gethostname())
        self._follow()
        self._change(Transition.START, host=socket.gethostname())
        self._has_run = True
        self._arrived = arrival_of(self._virsh, self._uuid)
        if self._starts_with_host:
            with suppress(SnapchainError):  # a guest without a definition that lasts cannot
                start_with_host(self._virsh, self._uuid)
        if self._found is not None:
            run_directory.remove(details_of(self._found).directory)
            journal.remove(self._found.path)
            self._found = None

    def end(self) -> None:
        """Give it up. Raises Conflict where libvirt has the domain, Busy where it still waits for its memory."""
        if self._is_given():
            raise Conflict("the guest is this host's", subject=self._guest, hint="migrate it from here")
        if self._found is None:
            return
        now = self._settled_presence()
        if now is Presence.WAITING:
            raise Busy("libvirt's QEMU for it still waits here", subject=self._title, hint="wait until it has ended")
        if now is not Presence.ABSENT:
            raise Conflict("libvirt has the guest here", subject=self._title, hint="migrate it from here")
        details = details_of(self._found)
        self._change(Transition.ABORT, host=self._by)
        for made in details.overlays:
            remove_made(made)
        run_directory.remove(details.directory)
        journal.remove(self._found.path)
        self._found = None
        self._tell_hooks("aborted")

    def _settled_presence(self) -> Presence:
        """How libvirt has it, once it does not wait for its memory any more; WAITING where that does not end."""
        until = time.monotonic() + _WAIT_SECONDS
        while (now := presence(self._virsh, self._uuid)) is Presence.WAITING and time.monotonic() < until:
            time.sleep(_POLL_SECONDS)
        return now

    def _standing(self, begun: float) -> Moving:
        now = presence(self._virsh, self._uuid)
        facts: dict[str, object] = {
            "domain": _PRESENCE[now],
            "alive": now not in (Presence.ABSENT, Presence.DEFINED),
            "ran": now in (Presence.DEFINED, Presence.PAUSED, Presence.RUNNING),
            "libvirt": str(socket_of(self._virsh.uri)),
            "host": self._host,
        }
        if self._arrived is not None:
            came = self._arrived
            facts |= {"pause": came.pause, "memory": came.memory, "rounds": came.rounds}
        return super()._standing(begun).model_copy(update=facts)
