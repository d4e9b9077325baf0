"""The lease of a guest: its host runs it only as long as it hears that nobody has taken it over.

    source   sends a renewal            answer: not taken over            none for `seconds`: the kernel stops the QEMU
             t0 ----------------------- t1 ............................... t0 + seconds
    taker         makes renewals impossible everywhere      waits `wait_seconds`, by its own clock       START
                  T (after each t0 that succeeded) ........................................... T + wait

No two clocks are compared.  A renewal that succeeded was sent before T, so the source's deadline is before T + seconds
by the source's clock.  Both clocks count the time for which their host is suspended (CLOCK_BOOTTIME).
"""

from __future__ import annotations

from typing import Annotated

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, StringConstraints

from snapchain.errors import Unsupported

SHORTEST, LONGEST = 30, 3600
"""Seconds of a lease that a user may ask for.

In the shortest one a renewal may take 15 seconds before the guest is asked to pause: three lost packets at the start
of a connection cost seven, and ssh and a Python on a busy host the rest. A sixth of it, from that request to the stop,
is STOP_SECONDS, which the guards and QEMU have for an answer.
"""
STOP_SECONDS = 5.0
"""For the kernel to stop the QEMU after the deadline; it takes milliseconds."""
DRIFT = 1.25
"""How much faster the taker's clock may be than the source's: 11 % each, and Linux steers a clock by 10 % at most."""
_RENEWALS = 3
"""In the time of one lease."""
_PAUSE_AFTER = 5 / 6
"""Of a lease: then QEMU is asked to pause the guest, so that its clock stops too."""


class Lease(BaseModel):
    """What is recorded of a lease at the two places that grant it.

    token: of the lease, the same at both; host: the one that holds it; epoch: in which it writes the guest's disks
    witness: the other place, as the holder names it; None where the destination alone grants it
    is_witness: whether the record is the one of the witness; a guest is not taken over there
    count: renewals so far; renewed: the last one, by the clock of the place. Neither is part of the guest's record.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True)

    token: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{32}$")]
    seconds: int = Field(ge=1, le=LONGEST)
    host: Annotated[str, StringConstraints(min_length=1, max_length=250)]
    epoch: int = Field(ge=1)
    witness: Annotated[str, StringConstraints(max_length=4096)] | None = None
    is_witness: bool = False
    count: int = Field(default=0, ge=0, lt=1 << 53)
    renewed: AwareDatetime | None = None


class Renewals(BaseModel):
    """How often a lease was renewed at a place, kept beside the guest's record, and replaced by each renewal."""

    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True)

    token: str
    count: int = Field(ge=0, lt=1 << 53)
    time: AwareDatetime


def unfit_for_leases(file_system: str, subject: object) -> Unsupported:
    """Why a place on a network file system grants none."""
    return Unsupported(
        f"it grants no leases: it is on {file_system}, by which a takeover at another machine may be seen late",
        subject=subject,
        hint="name it by ssh:// to the host that has it on a disk of its own, or use another destination",
    )


def counted(lease: Lease, renewals: Renewals | None) -> Lease:
    """A lease with what is known of its renewals."""
    if renewals is None or renewals.token != lease.token:
        return lease
    return lease.model_copy(update={"count": renewals.count, "renewed": renewals.time})


def interval(seconds: float) -> float:
    """Seconds from one renewal to the next."""
    return seconds / _RENEWALS


def deadline(sent: float, seconds: float) -> float:
    """Until when a guest may run. sent: when the renewal was sent that succeeded, by the source's clock"""
    return sent + seconds


def pause_at(until: float, seconds: float) -> float:
    """When QEMU is asked to pause the guest. until: its deadline"""
    return until - seconds * (1 - _PAUSE_AFTER)


def silence_seconds(seconds: float) -> float:
    """How long a taker sees no renewal, by its own clock, before a lease counts as not renewed any more."""
    return seconds * DRIFT


def wait_seconds(seconds: float) -> float:
    """How long a taker waits, by its own clock, from when no renewal can succeed any more to the start of the guest."""
    return (seconds + STOP_SECONDS) * DRIFT
