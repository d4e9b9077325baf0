"""How long the switch of a live migration keeps a guest paused, from a rehearsal on both hosts just before.

The pause is a row of small steps, on two hosts and the way between them: QEMU stops, mirrors end, the state of the
devices goes over, records become durable, QEMU goes on.  How long such steps take on a host changes by more than the
double from hour to hour.  So snapchain rehearses its own ones while the guest still runs, and takes the others for as
slow as these.  Fitted to 40 moves between two hosts that were fast at first, and then slow.
"""

from __future__ import annotations

_QEMU = 0.05
"""Seconds that QEMU needs to stop, to save and to load the state of an ordinary guest's devices on any host."""
_REHEARSALS = 4.1
"""What the whole row takes, in rehearsals."""


def switch_seconds(rehearsal: float) -> float:
    """Of the pause, without the rest of memory and disks that is sent in it.

    rehearsal: seconds for a question to the destination, and for its work in a pause as far as that decides nothing
    """
    return _QEMU + _REHEARSALS * rehearsal
