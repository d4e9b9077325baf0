"""How long the switch of a live migration keeps a guest paused, from a rehearsal on both hosts just before.

The pause is a row of small steps, on two hosts and the way between them: QEMU stops, mirrors end, the state of the
devices goes over, records become durable, QEMU goes on.  The same steps can take twice as long an hour later.  So
snapchain rehearses its own steps while the guest still runs, and expects the others to be as slow as these.  The
figures were fitted to 40 moves between two busy hosts.
"""

from __future__ import annotations

_QEMU = 0.05
"""Seconds that QEMU needs to stop, to save and to load the state of an ordinary guest's devices on any host."""
_REHEARSALS = 4.1
"""What the whole row takes, in rehearsals."""


def switch_seconds(rehearsal: float) -> float:
    """Of the pause, without the rest of memory and disks that is sent in it.

    rehearsal: seconds of a question to the destination, with the work that a paused guest waits for there
    """
    return _QEMU + _REHEARSALS * rehearsal
