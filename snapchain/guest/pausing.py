"""Pause a guest by its QEMU, or by libvirt, and let it run again: with it, the guest's own clock stops."""

from __future__ import annotations

from snapchain.guest.address import GuestAddress
from snapchain.guest.libvirt_guest import LibvirtGuest
from snapchain.guest.protocol import State
from snapchain.guest.qmp import Monitor


def pause(address: GuestAddress, *, seconds: float) -> bool:
    """Whether it ran until now. seconds: for each answer. Raises what asking QEMU or libvirt raises."""
    if address.qmp is not None:
        with Monitor(address.qmp, patience=seconds, command_seconds=seconds) as monitor:
            if monitor.fields("query-status").get("running") is not True:
                return False
            monitor.execute("stop")
            return True
    return _by_libvirt(address, State.RUNNING, "suspend", seconds)


def unpause(address: GuestAddress, *, seconds: float) -> bool:
    """Whether it was paused until now. As `pause`. A guest that its QEMU paused for an I/O error runs too."""
    if address.qmp is not None:
        with Monitor(address.qmp, patience=seconds, command_seconds=seconds) as monitor:
            if monitor.fields("query-status").get("status") != "paused":
                return False
            monitor.execute("cont")
            return True
    return _by_libvirt(address, State.PAUSED, "resume", seconds)


def _by_libvirt(address: GuestAddress, when: State, verb: str, seconds: float) -> bool:
    guest = LibvirtGuest(address)
    if guest.state() is not when:
        return False
    guest.command(verb, timeout=seconds)
    return True
