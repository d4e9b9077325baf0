"""A guest with a lease: two real destinations whose answers a test can cut off, and the holder of a watch."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from snapchain.destination.protocol import Destination
from snapchain.destinations import open_destination
from snapchain.errors import Unavailable
from snapchain.guest.address import GuestAddress, open_guest
from snapchain.guest.snapshot import SnapshotRequest
from snapchain.host.process_identity import Identity
from snapchain.model.events import Event, Notice
from snapchain.model.guest_state import GuestChange, GuestStanding, Transition
from snapchain.ops.guest_seal import seal
from snapchain.ops.ship import guest as ship
from snapchain.ops.watch.door import GuestDoor
from snapchain.ops.watch.guest_work import WatchRequest
from snapchain.ops.watch.lease import LeaseHolder
from snapchain.ops.watch.lease_places import LeasePlace, LeaseRequest
from tests.guest.machine import Machine
from tests.guest.nights import Host
from tests.servers import DIE_WITH_PARENT

LONG, SHORT = 120, 4
"""Seconds of a lease that no busy machine misses; and of one that is meant to run out."""


class Link:
    """The way to a destination. cut: nothing arrives; deaf: to which kind of change no answer comes back

    lost: which kind of change does not arrive
    is_open: answers come back once it is set; late: only those to this kind of change wait for it
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.cut = False
        self.deaf: Transition | None = None
        self.late: Transition | None = None
        self.lost: Transition | None = None
        self.is_open = threading.Event()
        self.is_open.set()
        self.sent: list[Transition] = []
        self.held = 0

    @contextmanager
    def holding(self, late: Transition | None = None) -> Iterator[Callable[[], None]]:
        """No answer comes back, or none to this kind of change, until the end, or what it gives is called.

        held: how many answers wait by now
        """
        self.held, self.late = 0, late
        self.is_open.clear()
        try:
            yield self.is_open.set
        finally:
            self.is_open.set()

    def opened(self) -> Destination:
        return _Reached(self)  # type: ignore[return-value]

    def __call__(self) -> Destination:
        return open_destination(self.url, passphrase=lambda: None, writing=True)


class _Reached:
    def __init__(self, link: Link) -> None:
        self._link, self.url = link, link.url
        self.traits = link().traits

    def guest_state(self, guest: str) -> GuestStanding:
        return self._through(lambda place: place.guest_state(guest))  # type: ignore[no-any-return]

    def change_guest(self, change: GuestChange) -> tuple[GuestStanding, Mapping[str, Path]]:
        self._link.sent.append(change.transition)
        if self._link.lost is change.transition:
            raise Unavailable("it did not arrive", subject=self.url)
        answer = self._through(lambda place: place.change_guest(change), change.transition)
        if self._link.deaf is change.transition:
            raise Unavailable("the answer was lost", subject=self.url)
        return answer  # type: ignore[no-any-return]

    def _through(self, work: Callable[[Destination], Any], transition: Transition | None = None) -> Any:
        if self._link.cut:
            raise Unavailable("the link is cut", subject=self.url)
        answer = work(self._link())
        if self._link.late in (None, transition):
            self._link.held += not self._link.is_open.is_set()
            self._link.is_open.wait()
        return answer


def hold(folder: str, seconds: int) -> None:
    """Hold a lease until SIGTERM."""
    ended = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: ended.set())
    with Leased(Path(folder), seconds=seconds, is_there=True).holder():
        ended.wait()


class Leased:
    """A host whose guest was shipped once, to a replica and to a repository. seconds: of its leases

    address: of the guest, by default of a machine on the host's disks; door: by which the watch opens it
    """

    def __init__(
        self, folder: Path, *, seconds: int = LONG, is_there: bool = False, address: GuestAddress | None = None
    ) -> None:
        self.folder = folder
        if not is_there:
            self.host = Host(folder)
        self.address = address or GuestAddress(qmp=folder / "run" / "qmp")
        self.door = GuestDoor(self.address)
        self.note = folder / "lease.json"
        self.seconds = seconds
        self.destination, self.witness = Link(f"dir:{folder}/replica"), Link(str(folder / "repo"))
        self.said: list[str] = []
        self.renewed: list[float] = []
        self.machine: Machine

    @property
    def watch(self) -> WatchRequest:
        return WatchRequest(guest=self.address, snapshot=SnapshotRequest())

    def ship(self) -> None:
        with open_guest(self.address) as guest:
            taken = seal(guest, SnapshotRequest())[0]
            for link in (self.destination, self.witness):
                ship.run(guest, ship.GuestShipRequest(snapshot=SnapshotRequest(), taken=taken), link())

    def process(self) -> Identity:
        with open_guest(self.address) as guest:
            found = guest.process()
        assert found is not None
        return found

    def holder(self, *, with_witness: bool = True, seconds: int | None = None) -> LeaseHolder:
        request = LeaseRequest(
            seconds=seconds or self.seconds,
            interval=0.5,
            destination=LeasePlace(self.destination.url, self.destination.opened),
            witness=LeasePlace(self.witness.url, self.witness.opened) if with_witness else None,
        )
        return LeaseHolder(
            self.watch,
            self.door,
            request,
            self.note,
            host="kvm1",
            on_renewed=self.renewed.append,
            on_event=self._hear,
        )

    def begin(self) -> subprocess.Popen[bytes]:
        """A holder in a process of its own, until SIGTERM."""
        text = f"from tests.guest.leases import hold; hold({str(self.folder)!r}, {self.seconds})"
        return subprocess.Popen(
            [*DIE_WITH_PARENT, sys.executable, "-c", text], env={**os.environ, "PYTHONPATH": ":".join(sys.path)}
        )

    def _hear(self, event: Event) -> None:
        if isinstance(event, Notice):
            self.said.append(event.message)

    def standing(self, link: Link | None = None) -> GuestStanding:
        return (link or self.destination)().guest_state("web1")
