"""Failover by a lease that ran out: from each kind of destination, with a witness, by a clock that the test sets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from snapchain.destination.protocol import Destination
from snapchain.errors import Busy, Conflict, InvalidInput, Unsupported
from snapchain.model.guest_state import GuestChange, GuestState, TakenDisk, Transition, Vouched
from snapchain.model.lease import Lease, silence_seconds, wait_seconds
from snapchain.ops.failover.lease import LeaseEnd, LeaseProof
from snapchain.ops.failover.request import FailoverRequest
from snapchain.ops.failover.run import Failover
from snapchain.ops.other_destinations import Reach
from snapchain.replica import guest_states
from snapchain.repository.destination import RepositoryDestination
from tests.ops.guest_points import GUEST, Guest, Open, opened

TOKEN, OTHER = "1" * 32, "2" * 32
SECONDS = 30


class Clock:
    """Of the host that takes over. passing: called before each wait, for what happens in the world meanwhile

    reach: how it reaches all destinations
    """

    reach: Reach

    def __init__(self) -> None:
        self.now = 1000.0
        self.passing: Callable[[], None] = lambda: None
        self.waits: list[float] = []

    def __call__(self) -> float:
        return self.now

    def wait(self, seconds: float) -> None:
        self.passing()
        self.waits.append(seconds)
        self.now += seconds


@pytest.fixture(params=["directory", "replica"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Open:
    return opened(request.param, request, tmp_path)


@pytest.fixture
def witness(request: pytest.FixtureRequest, tmp_path: Path, place: Open) -> Open:
    kind = "replica" if place().traits.needs_collecting else "directory"
    (tmp_path / "witness").mkdir()
    return opened(kind, request, tmp_path / "witness")


@pytest.fixture
def guest(tmp_path: Path, place: Open, witness: Open) -> Guest:
    guest = Guest(tmp_path / "kvm1")
    guest.point(place(), 1)
    guest.ship(witness(), 1)
    return guest


@pytest.fixture
def clock(place: Open, witness: Open) -> Clock:
    clock = Clock()
    clock.reach = Reach(opens=lambda url: {place().url: place, witness().url: witness}[url]())
    return clock


def change(transition: Transition, at: Destination, token: str = TOKEN, *, lease: Lease | None = None) -> GuestChange:
    return GuestChange(
        guest=GUEST,
        transition=transition,
        seen=at.guest_state(GUEST).number,
        token=token,
        by="kvm1",
        host="kvm1",
        lease=lease,
    )


def grant(place: Open, witness: Open | None = None, *, token: str = TOKEN) -> None:
    """As the old host takes the lease."""
    lease = Lease(token=token, seconds=SECONDS, host="kvm1", epoch=1, witness="its witness" if witness else None)
    if witness is not None:
        other = lease.model_copy(update={"is_witness": True})
        witness().change_guest(change(Transition.LEASE, witness(), token, lease=other))
    place().change_guest(change(Transition.LEASE, place(), token, lease=lease))


def renew(place: Open, token: str = TOKEN) -> bool:
    """As the old host renews it."""
    standing, _ = place().change_guest(change(Transition.RENEW, place(), token))
    return standing.epoch == 1 and standing.lease is not None and standing.lease.token == token


def failover(place: Open, witness: Open | None, clock: Clock, directory: Path, **more: Any) -> Failover:
    proof = LeaseProof(witness=None if witness is None else witness(), clock=clock, wait=clock.wait)
    request = FailoverRequest(**{"directory": directory, "host": "kvm2", "lease": proof, "reach": clock.reach, **more})
    return Failover(place(), GUEST, request)


def test_it_waits_until_the_lease_has_run_out(
    place: Open, witness: Open, guest: Guest, clock: Clock, tmp_path: Path
) -> None:
    grant(place, witness)
    assert renew(place)
    assert renew(witness)
    impossible: list[float] = []

    def passing() -> None:
        if place().guest_state(GUEST).state is GuestState.PROMOTING:
            assert not renew(place), "the destination grants no renewal any more"
            assert not renew(witness), "nor does the witness"
            impossible.append(clock.now)

    clock.passing = passing
    plan = failover(place, witness, clock, tmp_path / "out").plan()
    assert plan.lease is not None
    assert (plan.lease.count, plan.lease_seconds) == (1, silence_seconds(SECONDS) + wait_seconds(SECONDS))
    begun = clock.now
    report = failover(place, witness, clock, tmp_path / "out").run()
    assert clock.now == begun + silence_seconds(SECONDS) + wait_seconds(SECONDS)
    assert impossible == [begun + silence_seconds(SECONDS)], "and then the whole time passes"
    assert (report.state, report.epoch, report.vouched.how) == (GuestState.ACTIVE, 2, "lease")
    assert "its lease of 30 s was not renewed by kvm1" in report.vouched.words
    for each in (place, witness):
        assert (place().guest_state(GUEST).lease, each().guest_state(GUEST).epoch) == (None, 2)
    assert guest.names


def test_the_wait_begins_when_the_witness_grants_nothing(
    place: Open, witness: Open, guest: Guest, clock: Clock
) -> None:
    grant(place, witness)
    proof = LeaseProof(witness=witness(), clock=clock, wait=clock.wait)
    end = LeaseEnd(place(), place().guest_state(GUEST), proof, on_event=lambda _: None)
    assert renew(witness)
    end.revoke(known_witness=None)
    assert not renew(witness)
    end.revoke(known_witness=end.witness)  # by a run that was cut off after it
    end.wait()
    assert clock.waits == [wait_seconds(SECONDS)]
    assert guest.names


@pytest.mark.parametrize("at", ["place", "witness"])
def test_a_host_that_lives_is_not_taken_over(
    place: Open, witness: Open, guest: Guest, clock: Clock, tmp_path: Path, at: str
) -> None:
    grant(place, witness)
    clock.passing = lambda: (renew(place if at == "place" else witness), None)[1]
    with pytest.raises(Busy, match=r"its lease is being renewed: 1 times in 38 seconds, so the host kvm1 lives"):
        failover(place, witness, clock, tmp_path / "out").run()
    assert place().guest_state(GUEST).state is GuestState.PROTECTED
    assert not (tmp_path / "out").exists()
    assert renew(place)
    assert renew(witness)
    assert guest.names


def test_what_is_no_proof(place: Open, witness: Open, guest: Guest, clock: Clock, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(Conflict, match="the guest runs under no lease"):
        failover(place, None, clock, out)
    grant(place, witness)
    with pytest.raises(InvalidInput, match="has a witness, which has to be told: its witness"):
        failover(place, None, clock, out)
    with pytest.raises(Conflict, match="this is the witness of the guest's lease"):
        failover(witness, place, clock, out)
    with pytest.raises(InvalidInput, match="exclude each other"):
        failover(place, witness, clock, out, fence=["true"]).run()
    with pytest.raises(Conflict, match="is not known to be the witness"):
        failover(place, place, clock, out).run()
    grant(place, witness, token=OTHER)
    grant(place, None, token=TOKEN)  # of another lease than the one that the witness has
    with pytest.raises(InvalidInput, match="its lease has no witness"):
        failover(place, witness, clock, out)
    assert clock.waits == []
    assert place().guest_state(GUEST).state is GuestState.PROTECTED
    assert not out.exists()
    assert guest.names


def test_a_lease_is_no_proof_about_another_master(
    place: Open, witness: Open, guest: Guest, clock: Clock, tmp_path: Path
) -> None:
    """The guest was taken over at another destination, and this one, which was silent then, has an older lease."""
    grant(place)
    taken = change(Transition.PROMOTE, witness(), OTHER).model_copy(
        update={
            "host": "kvm3",
            "vouched": Vouched(how="fence", who="root@kvm3"),
            "disks": tuple(
                TakenDisk(disk=disk.name, point=disk.points[-1].point)
                for disk in witness().disks()
                if disk.name.startswith(f"{GUEST}/v")
            ),
        }
    )
    witness().change_guest(taken)
    reach = Reach(at=(witness().url,), opens=clock.reach.opens)
    with pytest.raises(Conflict, match="its lease is of kvm1 in epoch 1, and the guest is promoting on kvm3"):
        failover(place, None, clock, tmp_path / "out", reach=reach).run()
    assert place().guest_state(GUEST).state is GuestState.PROTECTED
    assert clock.waits == []
    assert guest.names


def test_a_witness_of_another_lease_is_none(
    place: Open, witness: Open, guest: Guest, clock: Clock, tmp_path: Path
) -> None:
    """As where the old host was killed between its requests to the two."""
    grant(place, witness)
    lease = Lease(token=OTHER, seconds=SECONDS, host="kvm1", epoch=1, witness="its witness", is_witness=True)
    witness().change_guest(change(Transition.LEASE, witness(), OTHER, lease=lease))
    with pytest.raises(Conflict, match="is not known to be the witness"):
        failover(place, witness, clock, tmp_path / "out").run()
    assert place().guest_state(GUEST).state is GuestState.PROTECTED
    assert guest.names


def test_a_place_that_may_show_old_data_grants_no_lease(
    place: Open, guest: Guest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A renewal is a read: on a network file system it may succeed after the guest was taken over."""
    monkeypatch.setattr(guest_states, "network_file_system", lambda _path: "nfs4")
    at = place()
    if isinstance(at, RepositoryDestination):
        store = at.repository.store
        monkeypatch.setattr(store, "properties", replace(store.properties, stale_through="nfs4"))
    lease = Lease(token=TOKEN, seconds=SECONDS, host="kvm1", epoch=1)
    for step, held in ((Transition.LEASE, lease), (Transition.RENEW, None)):
        with pytest.raises(Unsupported, match="it grants no leases: it is on nfs4"):
            at.change_guest(change(step, at, lease=held))
    if isinstance(at, RepositoryDestination):
        monkeypatch.setattr(store, "properties", replace(store.properties, stale_through=None))
        monkeypatch.setattr(at.repository, "conditional", False)
        with pytest.raises(Unsupported, match="its store has no conditional writes"):
            at.change_guest(change(Transition.LEASE, at, lease=lease))
    assert at.guest_state(GUEST).lease is None
    assert guest.names


@pytest.mark.parametrize("with_witness", [True, False])
def test_cut_off_at_any_step_it_waits_anew(
    place: Open,
    witness: Open,
    guest: Guest,
    clock: Clock,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    with_witness: bool,
) -> None:
    """Before and after each change at both places and each note; the next run ends it, and waits for the whole time."""
    other = witness if with_witness else None
    grant(place, other)
    cut = Cutting(monkeypatch, {type(place()), type(witness())})
    step = 0
    while True:
        done = cut.run(step, failover(place, other, clock, tmp_path / "out").run)
        before = clock.now
        if done:
            break
        promoted = place().guest_state(GUEST)
        if promoted.state is GuestState.PROMOTING:
            assert not renew(place)
        report = None
        step += 1
    report = failover(place, other, clock, tmp_path / "out").run()
    assert (report.state, report.epoch) == (GuestState.ACTIVE, 2)
    assert clock.now == before, "a guest that is active is not proven again"
    assert step > 3
    assert guest.names


class Cutting:
    """Raises before or after one of the changes and notes of a failover."""

    class CutError(Exception):
        pass

    def __init__(self, monkeypatch: pytest.MonkeyPatch, kinds: set[type[Destination]]) -> None:
        self._patch, self._kinds = monkeypatch, kinds
        self._left = 0

    def run(self, step: int, work: Callable[[], object]) -> bool:
        """Whether it came to its end."""
        self._left = step
        with self._patch.context() as patch:
            patch.setattr(Failover, "_write_note", self._cutting(Failover._write_note))
            for kind in self._kinds:
                patch.setattr(kind, "change_guest", self._cutting(kind.change_guest))
            try:
                work()
            except Cutting.CutError:
                return False
        return True

    def _cutting(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **more: Any) -> Any:
            self._tick()
            found = real(*args, **more)
            self._tick()
            return found

        return call

    def _tick(self) -> None:
        self._left -= 1
        if self._left == -1:
            raise Cutting.CutError
