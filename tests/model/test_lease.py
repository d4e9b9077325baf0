"""Never two masters by a lease: two clocks that drift, renewals that are late or lost, and a taker who waits."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime

import pytest
from hypothesis import given, strategies as st

from snapchain.errors import Conflict
from snapchain.model.guest_state import (
    GuestChange,
    GuestStanding,
    GuestState,
    Transition,
    Vouched,
    after,
    unrecorded,
)
from snapchain.model.lease import (
    DRIFT,
    STOP_SECONDS,
    Lease,
    deadline,
    interval,
    pause_at,
    silence_seconds,
    wait_seconds,
)

WRONG = 1 / 9
"""How wrong a clock may run: (1 + WRONG) / (1 - WRONG) is DRIFT."""
seconds = st.floats(0, 200)
rates = st.floats(1 - WRONG, 1 + WRONG)


@dataclass(frozen=True)
class Clock:
    """rate: its seconds in one real second; ahead: what it shows at the beginning"""

    rate: float
    ahead: float

    def at(self, time: float) -> float:
        return self.ahead + self.rate * time

    def when(self, shown: float) -> float:
        """The real time at which it shows that."""
        return (shown - self.ahead) / self.rate


clocks = st.builds(Clock, rate=rates, ahead=st.floats(0, 1e6))


@dataclass(frozen=True)
class Renewal:
    """sent: real time; reaches: seconds later the place decides; answered: whether the source hears of it"""

    at_witness: bool
    sent: float
    reaches: float
    answered: bool


renewals = st.builds(
    Renewal, at_witness=st.booleans(), sent=seconds, reaches=seconds, answered=st.booleans()
)  # fmt: skip


@given(
    length=st.integers(1, 120),
    source=clocks,
    taker=clocks,
    sent=st.lists(renewals, max_size=12),
    promoted=seconds,
    revoked=seconds,
    until_stopped=st.floats(0, STOP_SECONDS),
)
def test_the_old_guest_has_stopped_before_the_new_one_starts(
    length: int,
    source: Clock,
    taker: Clock,
    sent: list[Renewal],
    promoted: float,
    revoked: float,
    until_stopped: float,
) -> None:
    """promoted, revoked: when no renewal succeeds any more at the destination, at the witness

    until_stopped: by the source's clock, what the kernel takes from the deadline to the stop
    """
    impossible = max(promoted, revoked)
    starts = taker.when(taker.at(impossible) + wait_seconds(length))
    for each in sent:
        decided = each.sent + each.reaches
        if not each.answered or decided >= (revoked if each.at_witness else promoted):
            continue  # the source does not hear of it, or hears that it is refused
        assert source.when(deadline(source.at(each.sent), length) + until_stopped) <= starts + 1e-6


def test_the_bound_of_the_drift_is_used_up() -> None:
    """With clocks that are any worse, the wait would be too short: nothing is wasted, and nothing is forgotten."""
    source, taker = Clock(1 - WRONG, 0), Clock(1 + WRONG, 0)
    stops = source.when(deadline(source.at(0), 30) + STOP_SECONDS)
    assert taker.when(wait_seconds(30)) == pytest.approx(stops)
    assert pytest.approx(DRIFT) == (1 + WRONG) / (1 - WRONG)


@given(length=st.integers(1, 3600))
def test_what_happens_in_the_time_of_one_lease(length: int) -> None:
    """Three renewals, then the request to pause, then the stop; a taker watches for longer than all of it."""
    until = deadline(100.0, length)
    assert 100.0 + 2 * interval(length) < pause_at(until, length) < until
    assert silence_seconds(length) / (1 + WRONG) > interval(length) / (1 - WRONG)
    assert silence_seconds(length) < wait_seconds(length)


TOKEN, OTHER = "1" * 32, "2" * 32
NOW = datetime(2026, 11, 30, tzinfo=UTC)


def step(
    transition: Transition, now: GuestStanding, *, token: str = TOKEN, host: str = "kvm1", epoch: int = 1
) -> GuestChange:
    lease = Lease(token=token, seconds=30, host=host, epoch=epoch) if transition is Transition.LEASE else None
    vouched = Vouched(how="lease", who="root@kvm2") if transition is Transition.PROMOTE else None
    return GuestChange(
        guest="web1",
        transition=transition,
        seen=now.number,
        token=token,
        by=host,
        host=host,
        lease=lease,
        vouched=vouched,
    )


def taken(now: GuestStanding, change: GuestChange) -> GuestStanding:
    return after(now, change, time=NOW, subject="/backup::web1")


def test_a_lease_lives_until_the_new_master_starts() -> None:
    now = taken(unrecorded("web1", 1), step(Transition.LEASE, unrecorded("web1", 1)))
    assert (now.state, now.number, now.lease and now.lease.token) == (GuestState.PROTECTED, 1, TOKEN)
    for move in (Transition.MOVE, Transition.SWITCH):
        with pytest.raises(Conflict, match="runs under a lease of kvm1"):
            taken(now, step(move, now, token=OTHER))
    promoting = taken(now, step(Transition.PROMOTE, now, token=OTHER, host="kvm2"))
    assert (promoting.lease and promoting.lease.token) == TOKEN, "a run that is continued needs its length"
    for late in (Transition.LEASE, Transition.UNLEASE):
        with pytest.raises(Conflict, match="promoting on kvm2"):
            taken(promoting, step(late, promoting))
    active = taken(promoting, step(Transition.START, promoting, token=OTHER, host="kvm2"))
    assert active.lease is None
    with pytest.raises(Conflict, match="no lease can be taken in epoch 1: the guest is active on kvm2"):
        taken(active, step(Transition.LEASE, active))
    with pytest.raises(Conflict, match="no lease can be taken"):
        taken(active, step(Transition.LEASE, active, epoch=2))
    new = taken(active, step(Transition.LEASE, active, token=OTHER, host="kvm2", epoch=2))
    assert (new.state, new.lease and new.lease.host) == (GuestState.ACTIVE, "kvm2")
    withdrawn = taken(promoting, step(Transition.WITHDRAW, promoting, token=OTHER, host="kvm2"))
    assert withdrawn.lease is None


def test_a_failover_by_a_lease_that_there_is_not() -> None:
    now = unrecorded("web1", 1)
    with pytest.raises(Conflict, match="holds no lease that this destination grants"):
        taken(now, step(Transition.PROMOTE, now, host="kvm2"))
    now = taken(now, step(Transition.LEASE, now))
    elsewhere = step(Transition.PROMOTE, now, token=OTHER, host="kvm2").model_copy(update={"epoch": 2})
    with pytest.raises(Conflict, match="holds no lease that this destination grants"):
        taken(now, elsewhere)
    promoting = taken(now, step(Transition.PROMOTE, now, token=OTHER, host="kvm2"))
    with pytest.raises(Conflict, match="holds no lease that this destination grants"):  # the lease is of kvm1
        taken(promoting, step(Transition.PROMOTE, promoting, token="3" * 32, host="kvm3"))
