"""What may be asked of `failover`, and what it reports: values only."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from snapchain.model.consistency import Consistency
from snapchain.model.guest_state import GuestState, Vouched
from snapchain.model.lease import Lease
from snapchain.ops.failover.lease import LeaseProof
from snapchain.ops.other_destinations import Reach


@dataclass(frozen=True, slots=True, kw_only=True)
class FailoverRequest:
    """How a guest is to be taken over by this host.

    directory: for its definition, and for its disks where the destination has no files that a guest can run on
    point: the text after '@', None for the newest guest point that is whole
    proves: all data of the guest's points are read again before one is chosen
    fence: a program and its arguments whose exit code 0 proves that the old host is down; it is run twice
    vouched: a person's word in its place; lease: the guest's lease in the place of both
    defines, connect: define it in libvirt, at this URI; starts: start it
    host: the name of this host in the record; reach: how the guest's other destinations are reached from it
    """

    directory: Path
    point: str | None = None
    proves: bool = False
    fence: Sequence[str] = ()
    vouched: Vouched | None = None
    lease: LeaseProof | None = None
    defines: bool = False
    connect: str | None = None
    starts: bool = False
    host: str = field(default_factory=socket.gethostname)
    reach: Reach = field(default_factory=Reach)


class _Shown(BaseModel):
    model_config = ConfigDict(frozen=True, defer_build=True)


class Loss(_Shown):
    """What is lost by going back to a point.

    seconds: from the point to now, at most; known_bytes: DATA in later layers that the destination has
    likely_bytes: what the source wrote in that time, by the rate between the last two points; None: not known
    """

    since: datetime
    seconds: float
    known_bytes: int
    likely_bytes: int | None


class Skipped(_Shown):
    """A newer guest point that is not taken. reason: a sentence without a subject"""

    guest_point: int
    reason: str


class TakenOver(_Shown):
    """A disk. name: in the guest; disk, point: at the destination; path: of the file for the guest, None in a plan"""

    name: str
    disk: str
    point: int
    virtual_size: int
    path: str | None


class _Failover(_Shown):
    """A guest and the guest point that is taken, in a plan and in a report.

    skipped: newer points that are not whole; state, epoch: of the guest; lacking: what the definition lacks here
    """

    destination: str
    guest: str
    guest_point: int
    instant: str
    time: datetime
    consistency: Consistency
    skipped: tuple[Skipped, ...]
    loss: Loss
    state: GuestState
    epoch: int
    disks: tuple[TakenOver, ...]
    lacking: tuple[str, ...]


class FailoverPlan(_Failover):
    """What `run` would do. epoch: that the guest would be in; resumes: whether an earlier run has begun it

    lease: that the guest runs under now; lease_seconds: how long the whole takes to prove that it has run out
    master: the host that is replaced, as the guest point or the record has it
    master: the host that is replaced, as the newest record of any destination has it, or else the guest point
    master_at: the other destination at which that host took the guest over, None where it did not
    others: the guest's other destinations; silent: those that do not answer, and for which nobody has vouched
    """

    master: str | None
    master_at: str | None = None
    others: tuple[str, ...] = ()
    silent: tuple[str, ...] = ()
    resumes: bool
    directory: str
    bytes_to_write: int
    defines: bool
    starts: bool
    lease: Lease | None = None
    lease_seconds: float | None = None


class FailoverReport(_Failover):
    """What was done.

    epoch: of the guest now; master: this host; former: the one that it replaces; vouched: why that counts as gone
    definition: the file that starts the guest; defined: name of the domain; started: whether it runs
    order: when this guest was taken up among those of one command, from 1; group: that it belongs to, from 1
    seconds: of all
    """

    master: str
    former: str | None
    vouched: Vouched
    definition: str | None
    defined: str | None
    started: bool
    bytes_written: int
    order: int = 1
    group: int = 1
    seconds: float


class Failed(_Shown):
    """A guest that was not taken over."""

    guest: str
    kind: str
    message: str
    hint: str | None
    order: int
    group: int = 1
    seconds: float


class FailoversPlan(_Shown):
    """What would be done with several guests. failed: those that cannot be taken over, in their order among all"""

    guests: tuple[FailoverPlan, ...]
    failed: tuple[Failed, ...] = ()


class FailoversReport(_Shown):
    """Several guests, in the order in which they were taken up.

    groups: of guests that waited for each other; concurrency: how many at once, at most
    """

    guests: tuple[FailoverReport, ...]
    failed: tuple[Failed, ...] = ()
    groups: int = 1
    concurrency: int = 1
    seconds: float
