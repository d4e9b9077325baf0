"""How long the switch of a live migration keeps a guest paused, from what was measured on both hosts just before.

The pause is a row of small steps, on two hosts and the way between them: QEMU stops, mirrors end, the state of the
devices goes over, records become durable, QEMU goes on.  What one of each kind takes, with the load that both hosts
have now, is measured while the guest still runs.  How much each counts was fitted to 24 moves between two busy hosts:
it is less than the number of such steps, since much goes on at the same time, and QEMU's own part is the largest.
"""

from __future__ import annotations

from dataclasses import dataclass

_QEMU = 0.05
"""Seconds that QEMU itself needs to stop, to save and to load the state of an ordinary guest's devices."""
_ANSWERS = 1.0
"""Of the length of an answer of QEMU's to a question."""
_ROUND_TRIPS = 6.0
"""The mirrors' last flush, the state of the devices, the question that decides, and the records of each."""
_WRITES = 0.5
"""Of a durable record here and of one there: most of them are written while something else is waited for."""


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
        + _WRITES * (measured.write_here + measured.write_there)
    )
