"""Never two guests by a lease: a model of hosts, clocks, links and processes, over the code that really decides.

The watch of the first host holds the lease at two destinations; other hosts take the guest over, by the lease or by a
fence program, and withdraw.  The real LeaseHolder, Failover, destinations and hook run; only the kernel is a model: its
processes, the guards that stop them at their deadline, and as late as is allowed, and clocks that drift apart as far
as is allowed.  The watch is killed or frozen at any of its calls, requests and answers are lost, come late or much
later, links are cut, the host is started again, the guest is shut down and started, and two hosts take it over at once.

one_guest   At no moment the guest runs on two hosts.
lives       A guest whose host is cut off from nothing, and whose watch works, is not taken over by its lease.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import Phase, settings, strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from snapchain.destination.protocol import Destination
from snapchain.errors import NotFound, SnapchainError, Unavailable
from snapchain.guest.address import GuestAddress
from snapchain.guest.snapshot import SnapshotRequest
from snapchain.host.process_identity import Identity
from snapchain.model.guest_state import GuestChange, GuestStanding, Transition
from snapchain.model.lease import DRIFT, STOP_SECONDS
from snapchain.ops import lease_notes
from snapchain.ops.failover.lease import LeaseProof
from snapchain.ops.failover.request import FailoverRequest
from snapchain.ops.failover.run import Failover
from snapchain.ops.watch import guarded_qemu, lease as lease_module, sighting
from snapchain.ops.watch.door import GuestDoor
from snapchain.ops.watch.guest_work import WatchRequest
from snapchain.ops.watch.lease import LeaseHolder
from snapchain.ops.watch.lease_places import LeasePlace, LeaseRequest
from snapchain.ops.watch.renewals import News
from snapchain.ops.watch.sighting import Seen
from snapchain.replica import guest_states
from snapchain.replica.destination import ReplicaDestination
from snapchain.replica.store import Replica, open_replica
from snapchain.replica.stream.guest_messages import AskGuest, HandedDisk
from tests.exhaustive import examples
from tests.ops.guest_points import GUEST
from tests.ops.masters import World, made_copy, ship
from tests.ops.test_masters_model import PLACE

SECONDS = 30
SLOW, FAST = 2 / (1 + DRIFT), 2 * DRIFT / (1 + DRIFT)
"""Rates of two clocks that are as far apart as the wait allows."""
OLD = "a"


class Died(BaseException):
    """The watch was killed."""


class Near(ReplicaDestination):
    """A replica that is asked about guests without a stream: that takes long, and is tested elsewhere."""

    def __init__(self, world: World, place: str) -> None:
        super().__init__(world.endpoint(place))
        self._world, self._place = world, place

    def guest_state(self, guest: str) -> GuestStanding:
        with self._opened() as replica:
            return guest_states.look(replica, guest).standing

    def change_guest(
        self, change: GuestChange, *, handed: Sequence[HandedDisk] = ()
    ) -> tuple[GuestStanding, Mapping[str, Path]]:
        request = AskGuest(guest=change.guest, change=change, handed=tuple(handed))
        with self._opened(makes=change.transition is Transition.KNOW) as replica:
            found = guest_states.change(replica, request)
        return found.standing, {each.disk: Path(each.overlay or "") for each in found.disks}

    @contextmanager
    def _opened(self, *, makes: bool = False) -> Iterator[Replica]:
        world, before = self._world, self._world.host
        if (before, self._place) in world.cut:
            raise Unavailable("the link is cut", subject=self.url)
        world.host = self._place.partition("/")[0]
        try:
            yield open_replica(world.root / self._place, make=makes)
        finally:
            world.host = before


class NearWorld(World):
    """Whose replicas are `Near`."""

    def destination(self, place: str) -> Destination:
        return super().destination(place) if place == "repository" else Near(self, place)

    def standing(self, place: str) -> GuestStanding | None:
        before, self.cut = self.cut, set()
        try:
            return self.destination(place).guest_state(GUEST)
        except NotFound:
            return None
        finally:
            self.cut = before


@dataclass
class Pair:
    """Two guards of the modelled kernel."""

    process: Identity
    until: float
    number: int
    lives: bool = True


@dataclass
class Kernel:
    """Of the first host. runs: processes -> whether they are stopped; late: seconds until the kernel stops one"""

    runs: dict[Identity, bool] = field(default_factory=dict)
    pairs: list[Pair] = field(default_factory=list)
    late: float = 0.0

    def at(self, clock: float) -> None:
        """What has happened until then."""
        for pair in self.pairs:
            if pair.lives and pair.until + self.late <= clock:
                self.end(pair)

    def end(self, pair: Pair) -> None:
        if pair.lives:
            pair.lives = False
            if pair.process in self.runs:
                self.runs[pair.process] = True

    def quit(self, process: Identity) -> None:
        self.runs.pop(process, None)
        for pair in self.pairs:
            pair.lives &= pair.process != process


ACTIONS = ("nothing", "step", "ask destination", "ask witness", "take", "take oldest", "kill", "watch", "late")
scripts = st.lists(st.sampled_from(ACTIONS), max_size=12)
faults = st.lists(st.sampled_from(["", "", "", "lost", "deaf", "late"]), max_size=4)
pauses = st.lists(st.sampled_from([0.0, 0.0, 1.0, 12.0, 31.0, 90.0]), max_size=4)


class Leases(RuleBasedStateMachine):
    """now: real seconds; rates: of the hosts' clocks; late: requests that were sent and have not arrived yet

    news: answers that the watch has not judged yet; running: hosts on which the guest runs, beside the first one
    """

    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp(prefix="leases-", dir=PLACE))
        self.patch = pytest.MonkeyPatch()
        self.world = NearWorld(self.root, self.patch, (OLD, "b", "c"), ("b", "c"), True, names=("vda",))
        self.copy = made_copy(self.world, OLD)
        self.now, self.pids = 1000.0, 100
        self.rates: dict[str, float] = {}
        self.kernel = Kernel()
        self.process: Identity | None = None
        self.holder: LeaseHolder | None = None
        self.terms: tuple[str, str | None, int] = ("", None, SECONDS)
        self.news: list[News] = []
        self.late: list[Callable[[], Any]] = []
        self.running: set[str] = set()
        self.faults: list[str] = []
        self.pauses: list[float] = []
        self.dies = 0
        self.is_waiting = False
        self._patch_kernel()

    def _patch_kernel(self) -> None:
        model = self
        calls = SimpleNamespace(
            clock=lambda: self._clock(OLD),
            is_stopped=lambda process: self.kernel.runs.get(process, False),
            let_continue=self._continue,
            stop=self._signal_stop,
            end=self._end_guards,
        )

        class SimulatedDeadman:
            def __init__(self, process: Identity, until: float) -> None:
                model._moment()
                if process not in model.kernel.runs:
                    raise NotFound("it has ended")
                self.pair = Pair(process, until, len(model.kernel.pairs))
                model.kernel.pairs.append(self.pair)
                model._pass(0)

            @property
            def guards(self) -> tuple[Identity, Identity]:
                return (-2 * self.pair.number - 1, 0), (-2 * self.pair.number - 2, 0)

            @property
            def works(self) -> bool:
                return self.pair.lives

            def extend(self, until: float, *, resumes: bool = False, timeout: float = 5.0) -> bool:
                _ = timeout
                model._moment()
                if not self.pair.lives:
                    return False
                self.pair.until = until
                model._pass(0)
                if until <= model._clock(OLD):  # its timer ends it at once
                    model.kernel.end(self.pair)
                    return False
                if resumes and self.pair.lives:
                    model.kernel.runs[self.pair.process] = False
                model._moment()
                return self.pair.lives

            def close(self) -> None:
                pass

            def end(self) -> None:
                model._moment()
                model.kernel.end(self.pair)

        for module in (guarded_qemu, lease_module):
            self.patch.setattr(module, "deadman", calls)
        self.patch.setattr(guarded_qemu, "Deadman", SimulatedDeadman)
        self.patch.setattr(guarded_qemu, "identity", self._identity)
        self.patch.setattr(sighting, "identity", self._identity)
        self.patch.setattr(lease_module, "clock", calls.clock)
        self.patch.setattr(lease_module, "Renewals", lambda *_, **__: SimpleNamespace(keep=lambda *_: None, hurry=int))
        courtesy = SimpleNamespace(is_pausing=False, ask_to_pause=int, ask_to_resume=int, close=lambda **_: None)
        self.patch.setattr(lease_module, "Courtesy", lambda _door: courtesy)
        self.patch.setattr(lease_notes, "still_runs", lambda process, **_: process in self.kernel.runs)

    def _identity(self, pid: int) -> Identity | None:
        if pid < 0:
            pair = self.kernel.pairs[(-pid - 1) // 2]
            return (pid, 0) if pair.lives else None
        return (pid, 1) if (pid, 1) in self.kernel.runs else None

    def _continue(self, process: Identity) -> None:
        self._moment()
        if process in self.kernel.runs:
            self.kernel.runs[process] = False

    def _signal_stop(self, process: Identity) -> None:
        self._moment()
        if process in self.kernel.runs:
            self.kernel.runs[process] = True

    def _end_guards(self, guards: Sequence[Identity]) -> None:
        self._moment()
        for pair in self.kernel.pairs:
            if any((-pid - 1) // 2 == pair.number for pid, _ in guards):
                self.kernel.end(pair)

    # --- time

    def _clock(self, host: str) -> float:
        return self.now * self.rates.get(host, 1.0)

    def _pass(self, seconds: float) -> None:
        """Real seconds."""
        self.now += seconds
        self.kernel.at(self._clock(OLD))
        self.one_guest()

    def _moment(self) -> None:
        """Before each call of the watch that the world may notice: it may be late, or killed there."""
        if self.dies:
            self.dies -= 1
            if not self.dies:
                raise Died
        if self.pauses:
            self._pass(self.pauses.pop())

    # --- the first host

    def _place(self, name: str) -> LeasePlace:
        return LeasePlace(name, lambda: _Reached(self, name))  # type: ignore[arg-type,return-value]

    def _new_holder(self) -> LeaseHolder:
        destination, witness, seconds = self.terms
        watch = WatchRequest(guest=GuestAddress(domain=GUEST), snapshot=SnapshotRequest(), name=GUEST)
        request = LeaseRequest(
            seconds=seconds,
            destination=self._place(destination),
            witness=None if witness is None else self._place(witness),
        )
        holder = LeaseHolder(watch, GuestDoor(watch.guest), request, self.root / OLD / "lease.json", host=OLD)
        holder._sight = _Sight(self)  # type: ignore[assignment]
        return holder

    def _do(self, work: Callable[[], Any]) -> None:
        with self.world.on(OLD):
            try:
                work()
            except SnapchainError:
                pass
            except Died:
                self._kill()
            finally:
                self.dies = 0

    def _kill(self) -> None:
        self.holder, self.news = None, []

    def _act(self, action: str) -> None:
        """One action of the first host."""
        holder = self.holder
        if action == "watch" and holder is None:
            self.holder = self._new_holder()
        if action == "late" and self.late:
            with self.world.on(OLD), suppress(SnapchainError):
                self.late.pop(0)()
        if holder is None:
            return
        if action == "step":
            self._do(holder.step)
        elif action == "kill":
            self._kill()
        elif action.startswith("ask"):
            self._do(lambda: self._ask(holder, action == "ask destination"))
        elif action.startswith("take") and self.news:
            news = self.news.pop(0 if action == "take oldest" else -1)
            self._do(lambda: holder.take(news))

    def _ask(self, holder: LeaseHolder, is_destination: bool) -> None:
        request, lease = holder._request, holder._lease
        place = request.destination if is_destination else request.witness
        if lease is not None and place is not None and holder._taken is None:
            self.news.append(holder.ask(place, lease, None)[0])

    def _work(self) -> None:
        """The watch does all that is due."""
        self._act("step")
        for action in ("ask destination", "take", "ask witness", "take", "step"):
            self._act(action)

    @initialize(
        slow=st.sampled_from([OLD, "b", None]),
        late=st.sampled_from([0.0, STOP_SECONDS]),
        at=st.sampled_from([("b/replica", "repository"), ("b/replica", None), ("repository", "c/replica")]),
    )
    def begin(self, slow: str | None, late: float, at: tuple[str, str | None]) -> None:
        self.rates = {OLD: 1.0} if slow is None else {host: SLOW if host == slow else FAST for host in (OLD, "b", "c")}
        self.kernel.late = late
        self.terms = (*at, SECONDS)
        for number, place in enumerate(self.world.places, 1):
            with self.world.on(OLD):
                ship(self.world, self.copy, place, number)
        self._start()
        self._act("watch")
        self._work()
        assert self.holder is not None
        assert self.holder._state() == "held"

    def teardown(self) -> None:
        self.patch.undo()
        shutil.rmtree(self.root, ignore_errors=True)

    @rule(action=st.sampled_from(ACTIONS), faults=faults, pauses=pauses, dies=st.sampled_from([0, 0, 0, 1, 2, 3, 5, 8]))
    def act(self, action: str, faults: list[str], pauses: list[float], dies: int) -> None:
        self.faults, self.pauses, self.dies = list(faults), list(pauses), dies
        self._act(action)
        self.faults, self.pauses, self.dies = [], [], 0

    @rule()
    def work(self) -> None:
        self._work()

    @rule(seconds=st.sampled_from([1.0, 9.0, 31.0, 100.0]))
    def time(self, seconds: float) -> None:
        self._pass(seconds)

    @rule(destination=st.sampled_from(["b/replica", "repository"]), witness=st.sampled_from(["c/replica", None]))
    def other_terms(self, destination: str, witness: str | None) -> None:
        """The watch is started otherwise."""
        self._kill()
        self.terms = (destination, witness, SECONDS if witness else 2 * SECONDS)
        self._act("watch")

    @rule()
    def end(self) -> None:
        """The watch ends in order."""
        if (holder := self.holder) is not None:
            self._do(holder._end)
            self._kill()

    @rule(keeps_note=st.sampled_from([True, True, False]))
    def reboot(self, keeps_note: bool) -> None:
        """The first host goes down, and comes again."""
        self._down()
        if not keeps_note:
            (self.root / OLD / "lease.json").unlink(missing_ok=True)

    def _down(self) -> None:
        self._kill()
        for process in list(self.kernel.runs):
            self.kernel.quit(process)
        self.process = None

    @rule()
    def quit(self) -> None:
        if self.process is not None:
            self.kernel.quit(self.process)

    @rule()
    def start(self) -> None:
        self._start()

    def _start(self) -> None:
        """Through the hook, which asks all destinations."""
        if self.process in self.kernel.runs:
            return

        def answers(place: str) -> GuestStanding | None:
            if (OLD, place) in self.world.cut:
                raise Unavailable("the link is cut", subject=place)
            return self.world.standing(place)

        if self.world.may_start(self.copy, answers, requires_answer=True):
            self._new_process()

    def _new_process(self) -> None:
        self.pids += 1
        self.process = (self.pids, 1)
        self.kernel.runs[self.process] = False

    @precondition(lambda self: self.holder is not None and self.holder._lease is not None)
    @rule()
    def start_by_hand(self) -> None:
        """Without the hook, as bare QEMU: the watch looks each second."""
        if self.process in self.kernel.runs or self.running:
            return
        self._new_process()
        assert self.process is not None
        self.kernel.runs[self.process] = True  # what it does until the watch has looked is not judged here
        self._act("step")
        if self.process in self.kernel.runs and not self._is_watched():
            self.kernel.runs[self.process] = False

    def _is_watched(self) -> bool:
        return self.holder is not None and self.holder._qemu.process == self.process

    # --- the others

    @rule(place=st.sampled_from(["b/replica", "c/replica", "repository"]))
    def cut(self, place: str) -> None:
        self.world.cut.add((OLD, place))

    @rule()
    def heal(self) -> None:
        self.world.cut.clear()

    @rule(
        host=st.sampled_from(["b", "c"]),
        cuts=st.booleans(),
        with_witness=st.sampled_from([True, True, True, False]),
        proof=st.sampled_from(["lease", "lease", "lease", "fence"]),
        script=scripts,
        dies=st.sampled_from([None, None, None, 1, 2, 3]),
    )
    def failover(
        self, host: str, cuts: bool, with_witness: bool, proof: str, script: list[str], dies: int | None
    ) -> None:
        """script: what the first host does while this one waits; dies: at which of its waits and starts it ends"""
        destination, witness, _ = self.terms
        place = destination if destination in ("repository", f"{host}/replica") else f"{host}/replica"
        if cuts:
            self.world.cut |= {(OLD, each) for each in self.world.places}
        script, left = list(script), [dies or 0]
        if proof == "fence":  # no other host has the guest any more
            self._down()
            self.running &= {host}

        def moment() -> None:
            left[0] -= 1
            if not left[0]:
                raise Died

        def wait(seconds: float) -> None:
            moment()
            share = seconds / self.rates.get(host, 1.0) / (len(script) + 1)
            while script:
                self._pass(share)
                self._act(script.pop())
                self.one_guest()
            self._pass(share * 1.000001)

        def work() -> None:
            with self.world.on(host):
                other = self.world.destination(witness) if with_witness and witness is not None else None
                request = FailoverRequest(
                    directory=self.root / host / f"out-{place.replace('/', '-')}",
                    host=host,
                    lease=None
                    if proof == "fence"
                    else LeaseProof(witness=other, clock=lambda: self._clock(host), wait=wait),
                    fence=["true"] if proof == "fence" else [],
                    reach=self.world.reach(),
                )
                Failover(self.world.destination(place), GUEST, request).run()

        try:
            work()
        except (SnapchainError, Died):
            return
        self.running.add(host)
        self.one_guest()

    @precondition(lambda self: self.holder is not None and self.holder._state() == "held" and not self.world.cut)
    @rule(host=st.sampled_from(["b", "c"]))
    def failover_of_a_host_that_lives(self, host: str) -> None:
        assert self.holder is not None
        lease = self.holder._lease
        before = set(self.running)
        self.failover(host, False, True, "lease", ["take", "ask destination"], None)
        assert self.running == before
        assert self.holder._lease is lease

    @rule(host=st.sampled_from(["b", "c"]))
    def withdraw(self, host: str) -> None:
        if host in self.running:
            return
        for place in (f"{host}/replica", "repository"):
            with self.world.on(host), suppress(SnapchainError):
                directory = self.root / host / f"out-{place.replace('/', '-')}"
                request = FailoverRequest(directory=directory, host=host, fence=["true"], reach=self.world.reach())
                Failover(self.world.destination(place), GUEST, request).withdraw()

    # --- what must hold

    @invariant()
    def one_guest(self) -> None:
        running = set(self.running)
        if any(not is_stopped for is_stopped in self.kernel.runs.values()):
            running.add(OLD)
        assert len(running) <= 1, f"the guest runs on {running}"


class _Sight:
    """What the watch sees of the guest."""

    def __init__(self, model: Leases) -> None:
        self._model = model

    @property
    def last(self) -> Seen | None:
        process = self._model.process
        if process is None or process not in self._model.kernel.runs:
            return None
        return Seen(GUEST, process, self._model.copy.epoch())

    def look(self) -> Seen:
        if (seen := self.last) is None:
            raise NotFound("it is off")
        return seen


class _Reached:
    """A destination as the first host reaches it."""

    def __init__(self, model: Leases, place: str) -> None:
        self._model, self.place = model, place
        self.url = model.world.url(place)

    def guest_state(self, guest: str) -> GuestStanding:
        return self._through(lambda: self._model.world.destination(self.place).guest_state(guest))  # type: ignore[no-any-return]

    def change_guest(self, change: Any) -> Any:
        return self._through(lambda: self._model.world.destination(self.place).change_guest(change))

    def _through(self, work: Callable[[], Any]) -> Any:
        self._model._moment()
        fault = self._model.faults.pop() if self._model.faults else ""
        if fault == "late":  # it arrives at some time, also behind a link that was cut meanwhile
            self._model.late.append(work)
        if fault in ("lost", "late"):
            raise Unavailable("no answer", subject=self.url)
        answer = work()
        self._model._moment()
        if fault == "deaf":
            raise Unavailable("no answer", subject=self.url)
        return answer


@pytest.mark.sampled
def test_never_two_guests_by_a_lease() -> None:
    run_state_machine_as_test(
        Leases,
        settings=settings(
            max_examples=examples(4, times=100), stateful_step_count=25, phases=(Phase.generate, Phase.shrink)
        ),
    )
