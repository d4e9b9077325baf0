"""The proof that a lease gives: its holder has stopped the guest, since no renewal has succeeded for long enough.

    look at the counters -> `silence_seconds` -> the same counters      a host that lives is not taken over by accident
         -> PROMOTE at the destination -> UNLEASE at the witness        from here on no renewal can succeed
         -> `wait_seconds` from then on, by this host's clock           then the old host's kernel has stopped the QEMU

model/lease.py has the arithmetic.  A run that was cut off waits anew, from when it has made sure of both again.
"""

from __future__ import annotations

import getpass
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from snapchain.destination.protocol import Destination
from snapchain.destination.writing import Writing
from snapchain.errors import Busy, Conflict, InvalidInput
from snapchain.host import deadman
from snapchain.model import lease as terms
from snapchain.model.events import Notice, OnEvent
from snapchain.model.guest_state import (
    PROOF,
    PROOF_WITHOUT_LEASE,
    GuestChange,
    GuestStanding,
    Transition,
    Vouched,
    describe,
)
from snapchain.ops.other_destinations import Reach

_ATTEMPTS = 5
"""At the record of the witness, which somebody else may change at the same time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaseProof:
    """witness: where the lease is renewed too, if anywhere; clock, wait: of this host, in seconds"""

    witness: Destination | None = None
    clock: Callable[[], float] = deadman.clock
    wait: Callable[[float], None] = time.sleep


def with_witness(reach: Reach, witness: Destination) -> Reach:
    """The witness is one of the guest's other destinations, and this host has named how it is reached."""

    def opens(url: str) -> Writing:
        return witness if url == witness.url else reach.opens(url)

    return replace(reach, at=(*reach.at, witness.url), opens=opens)


class LeaseEnd:
    """The lease of a guest, from the side of the host that takes the guest over."""

    def __init__(
        self,
        destination: Destination,
        standing: GuestStanding,
        proof: LeaseProof,
        *,
        newest: GuestStanding | None = None,
        on_event: OnEvent,
    ) -> None:
        """newest: what is known of the guest at any destination, None for a run that is continued

        Raises Conflict where the destination records no lease of the guest's master, InvalidInput for a wrong witness.
        """
        self._destination, self._guest, self._proof, self._on_event = destination, standing.guest, proof, on_event
        self._subject = f"{destination.url}::{standing.guest}"
        self._impossible_since: float | None = None
        lease = standing.lease
        if lease is None:
            raise Conflict("the guest runs under no lease", subject=self._subject, hint=PROOF)
        if newest is not None and newest.epoch != lease.epoch:
            # It stops a QEMU of its own host only: not of one that has the guest by a move, or by another failover.
            where = "" if newest.here is None else f" at {newest.here.url}"
            raise Conflict(
                f"its lease is of {lease.host} in epoch {lease.epoch}, and the guest is {describe(newest)}{where}",
                subject=self._subject,
                hint=f"the lease is no proof about that host: {PROOF_WITHOUT_LEASE}",
            )
        if lease.is_witness:
            raise Conflict(
                "this is the witness of the guest's lease, not the destination that it is taken over from",
                subject=self._subject,
                hint="name the other one, and this one by --witness",
            )
        if lease.witness is not None and proof.witness is None:
            raise InvalidInput(
                f"its lease has a witness, which has to be told: {lease.witness}, as the old host names it",
                subject=self._subject,
                hint="say --witness DEST",
            )
        if lease.witness is None and proof.witness is not None:
            raise InvalidInput("its lease has no witness", subject=self._subject, hint="leave out --witness")
        self._lease = lease

    @property
    def seconds(self) -> float:
        """From the first look to the proof."""
        return terms.silence_seconds(self._lease.seconds) + terms.wait_seconds(self._lease.seconds)

    @property
    def witness(self) -> str | None:
        """Its URL, as this host names it."""
        return None if self._proof.witness is None else self._proof.witness.url

    def check_witness(self) -> None:
        """Raises Conflict where the witness does not record this very lease."""
        if self._proof.witness is None or self._at_witness() == self._lease.token:
            return
        raise Conflict(
            "it does not record the lease that the guest runs under, so it is not known to be the witness",
            subject=f"{self._proof.witness.url}::{self._guest}",
            hint=f"the old host names its witness {self._lease.witness}; if that is this one, run it again",
        )

    def check_silent(self) -> Vouched:
        """Watch the renewals. What is recorded as the proof. Raises Busy when the lease is renewed meanwhile."""
        seconds = terms.silence_seconds(self._lease.seconds)
        before = self._counts()
        self._on_event(Notice(f"{self._subject}: is the lease renewed? It takes {seconds:.0f} seconds to see"))
        self._sleep_until(self._proof.clock() + seconds)
        after = self._counts()
        if after != before:
            raise Busy(
                f"its lease is being renewed: {sum(after) - sum(before)} times in {seconds:.0f} seconds, so the host "
                f"{self._lease.host} lives",
                subject=self._subject,
                hint="to move the guest on purpose: `snapchain migrate` on that host",
            )
        return self.word()

    def word(self) -> Vouched:
        """What is recorded."""
        lease, seconds = self._lease, terms.wait_seconds(self._lease.seconds)
        by = f"{getpass.getuser()}@{socket.gethostname()}"[:250]
        words = f"its lease of {lease.seconds} s was not renewed by {lease.host}; started {seconds:.0f} s later"
        return Vouched(how="lease", who=by, words=words)

    def revoke(self, *, known_witness: str | None) -> None:
        """After PROMOTE: let no renewal succeed at the witness either. From then on the wait counts.

        known_witness: its URL, where an earlier run of this failover has found that it records the lease

        Raises Conflict where it records another one, and what keeps it from being told: then there is no proof.
        """
        if self._proof.witness is not None:
            if known_witness != self._proof.witness.url:
                self.check_witness()
            for attempt in range(_ATTEMPTS):
                try:
                    if self._revoked(self._proof.witness):
                        break
                except Conflict:  # somebody else has changed it at the same time
                    if attempt == _ATTEMPTS - 1:
                        raise
        self._impossible_since = self._proof.clock()

    def wait(self) -> None:
        """Until the old host has surely stopped the guest."""
        assert self._impossible_since is not None, "revoked before"
        seconds = terms.wait_seconds(self._lease.seconds)
        until = self._impossible_since + seconds
        if (left := until - self._proof.clock()) > 0:
            self._on_event(Notice(f"{self._subject}: {left:.0f} of {seconds:.0f} seconds until its lease has run out"))
        self._sleep_until(until)

    def _revoked(self, witness: Destination) -> bool:
        standing = witness.guest_state(self._guest)
        if standing.lease is None or standing.lease.token != self._lease.token:
            return True
        host = socket.gethostname()[:250]
        change = GuestChange(
            guest=self._guest,
            transition=Transition.UNLEASE,
            seen=standing.number,
            token=self._lease.token,
            by=host,
            host=host,
        )
        standing, _ = witness.change_guest(change)
        return standing.lease is None or standing.lease.token != self._lease.token

    def _at_witness(self) -> str | None:
        assert self._proof.witness is not None, "there is one"
        lease = self._proof.witness.guest_state(self._guest).lease
        return None if lease is None or not lease.is_witness else lease.token

    def _counts(self) -> tuple[int, ...]:
        places = (self._destination, self._proof.witness)
        leases = [place.guest_state(self._guest).lease for place in places if place is not None]
        return tuple(-1 if lease is None or lease.token != self._lease.token else lease.count for lease in leases)

    def _sleep_until(self, until: float) -> None:
        while (left := until - self._proof.clock()) > 0:
            self._proof.wait(left)
