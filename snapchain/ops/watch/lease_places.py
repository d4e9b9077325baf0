"""The two places that grant the lease of a guest, and what its holder asks of them.

take    LEASE: the witness first, so that a record at the destination says that the witness has one too
renew   RENEW: an answer in the lease's epoch shows that nobody had taken the guest over when it was sent
end     UNLEASE: afterwards no request for this lease that is still on its way can succeed
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass

from snapchain.destination.protocol import Destination
from snapchain.errors import Conflict
from snapchain.model.guest_state import GuestChange, GuestStanding, Transition
from snapchain.model.lease import Lease

_ATTEMPTS = 5
"""At a record that somebody else may change at the same time."""


@dataclass(frozen=True, slots=True)
class LeasePlace:
    """A place that grants the lease. opened: opens it anew; raises what opening raises"""

    name: str
    opened: Callable[[], Destination]


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaseRequest:
    """destination: from which the guest may be taken over; witness: the other place, if any

    seconds: of the lease; interval: from one renewal to the next, by default a third of the lease
    """

    seconds: int
    interval: float | None = None
    destination: LeasePlace
    witness: LeasePlace | None = None

    @property
    def places(self) -> tuple[LeasePlace, ...]:
        """In the order in which they are asked for a lease."""
        return (self.destination,) if self.witness is None else (self.witness, self.destination)


@dataclass(frozen=True, slots=True)
class Holding:
    """Who holds leases of a guest. guest: its name at the places; host: this one; epoch: in which it writes the disks

    Its methods raise what `Destination.guest_state` and `change_guest` raise.
    """

    guest: str
    host: str
    epoch: int

    def lease(self, request: LeaseRequest, *, token: str | None = None) -> Lease:
        """The lease that is asked for. token: of an earlier one"""
        return Lease(
            token=token or secrets.token_hex(16),
            seconds=request.seconds,
            host=self.host,
            epoch=self.epoch,
            witness=None if request.witness is None else request.witness.name[:4096],
        )

    def take(self, opened: Destination, lease: Lease, *, is_witness: bool, seen: int) -> GuestStanding:
        """seen: number of the record that was read before"""
        record = lease.model_copy(update={"is_witness": is_witness})
        return opened.change_guest(self._change(Transition.LEASE, record, seen=seen))[0]

    def renew(self, opened: Destination, lease: Lease) -> GuestStanding:
        """How the guest stands at one moment after this was called."""
        return opened.change_guest(self._change(Transition.RENEW, lease))[0]

    def end(self, opened: Destination, lease: Lease, *, is_sure: bool) -> GuestStanding:
        """How the guest stands then: without a lease of this host, or in a later epoch.

        is_sure: whether the place is known to have recorded it. Else the request for it may arrive yet: after one more
        that succeeds it is refused, since it was decided on an older record.
        """
        for attempt in range(_ATTEMPTS):
            standing = opened.guest_state(self.guest)
            if standing.epoch > lease.epoch or (standing.lease is None and is_sure):
                return standing
            try:
                if standing.lease is None:
                    lease = lease.model_copy(update={"token": secrets.token_hex(16)})
                    standing = self.take(opened, lease, is_witness=False, seen=standing.number)
                held = standing.lease
                if held is None or held.host != self.host:
                    return standing
                return opened.change_guest(self._change(Transition.UNLEASE, held, seen=standing.number))[0]
            except Conflict:
                if attempt == _ATTEMPTS - 1:
                    raise
        raise AssertionError("the last attempt returns or raises")

    def _change(self, transition: Transition, lease: Lease, *, seen: int = 0) -> GuestChange:
        return GuestChange(
            guest=self.guest,
            transition=transition,
            seen=seen,
            token=lease.token,
            by=self.host,
            host=self.host,
            lease=lease if transition is Transition.LEASE else None,
        )


def has_lease(standing: GuestStanding, lease: Lease) -> bool:
    """Whether this very lease is recorded."""
    return standing.lease is not None and standing.lease.token == lease.token
