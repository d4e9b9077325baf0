"""The guest of a watch as it was seen last: its QEMU's process, and the epoch in which this host writes its disks.

A QMP socket serves one client, and a shipment keeps it for hours: so the guest is seen by whichever thread opens it
(door.py), and whoever needs it reads what was seen.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from snapchain.errors import NotFound, SnapchainError, Unsupported
from snapchain.guest.disks import disks_to_protect
from snapchain.guest.libvirt_guest import LibvirtGuest
from snapchain.guest.protocol import Guest, State
from snapchain.host.process_identity import Identity, identity
from snapchain.host.terminal import shell_word
from snapchain.model.guest_state import epoch_of as latest
from snapchain.ops.fence import hook
from snapchain.ops.guest_seal import epoch_of
from snapchain.ops.watch.door import GuestDoor
from snapchain.ops.watch.guest_work import WatchRequest


@dataclass(frozen=True, slots=True)
class Seen:
    """A guest that was opened.

    process: None where it does not run; epoch: in which this host writes its disks; fault: why it gets no lease
    """

    name: str
    process: Identity | None
    epoch: int
    fault: SnapchainError | None = None


class Sight:
    """Of a guest that comes through `door`. is_needed: whether anybody wants to know more than was seen already"""

    def __init__(self, watch: WatchRequest, door: GuestDoor, *, is_needed: Callable[[], bool]) -> None:
        self._watch, self._door, self._is_needed = watch, door, is_needed
        self._seen: Seen | None = None
        door.on_opened = self._see

    @property
    def last(self) -> Seen | None:
        """With its process running now."""
        seen = self._seen
        if seen is None or seen.process is None or identity(seen.process[0]) != seen.process:
            return None
        return seen

    def look(self) -> Seen:
        """As it is now; where the watch is at work with it, as it was. Raises NotFound where it is off."""
        self._door.look()
        if (seen := self.last) is not None:
            return seen
        if self._seen is not None and self._seen.fault is not None:
            raise self._seen.fault
        raise NotFound("no process of its QEMU was found on this host yet", subject=self._watch.name or None)

    def _see(self, guest: Guest) -> None:
        """By whichever thread has opened it."""
        if not self._is_needed():
            return
        name = self._watch.name or guest.name
        process, epoch = None, 0
        try:
            process = guest.process() if guest.state() in (State.RUNNING, State.PAUSED) else None
            if process is None:
                raise NotFound("no process of its QEMU is found on this host", subject=name)
            _check_autostart(guest)
            snapshot = self._watch.snapshot
            disks = disks_to_protect(guest, snapshot.disks)
            epoch = latest([epoch_of(guest, disk.name, image_dirs=snapshot.image_dirs) for disk in disks])
        except SnapchainError as error:
            self._seen = Seen(name, process, epoch, error)
        else:
            self._seen = Seen(name, process, epoch)


def _check_autostart(guest: Guest) -> None:
    """Raises Unsupported where libvirt starts the guest by itself, also while nobody can tell who may run it."""
    if isinstance(guest, LibvirtGuest) and guest.has_autostart() and not hook.requires_answer():
        raise Unsupported(
            "it starts with its host, also with one that comes back behind a cut link, where no lease stops it",
            subject=guest.name,
            hint=f"`virsh autostart --disable {shell_word(guest.name)}`, or let libvirt ask the destinations first: "
            "`snapchain fence --install-hook --require-answer --at DEST`",
        )
