"""How long the switch of a live migration keeps a guest paused, from what was measured on both hosts just before.

The pause is a row of small steps, on two hosts and the way between them: QEMU stops, mirrors end, the state of the
devices goes over, records become durable, QEMU goes on.  What one of each kind takes, with the load that both hosts
have now, is measured while the guest still runs; how many there are of each is known.
"""

from __future__ import annotations

from dataclasses import dataclass

_QEMU = 0.012
"""Seconds that QEMU itself needs to stop, to save and to load the state of an ordinary guest's devices."""
_ANSWERS = 14
"""Steps of the length of an answer of QEMU's to a question: those to it, on both hosts, and those of its own."""
_WRITES_HERE, _WRITES_THERE = 1, 2
"""Durable records that nothing else is waited for beside. Here: the guest's own last writes, as QEMU stops."""
_ROUND_TRIPS = 3
"""The mirrors' last flush, the state of the devices, the question that decides."""


@dataclass(frozen=True, slots=True)
class Measured:
    """Seconds. round_trip: of a question to the snapchain at the destination; answer: of QEMU here to a question

    write_here, write_there: of a small durable record
    """

    round_trip: float
    answer: float
    write_here: float
    write_there: float


def switch_seconds(measured: Measured) -> float:
    """Of the pause, without the rest of memory and disks that is sent in it."""
    return (
        _QEMU
        + _ANSWERS * measured.answer
        + _ROUND_TRIPS * measured.round_trip
        + _WRITES_HERE * measured.write_here
        + _WRITES_THERE * measured.write_there
    )
