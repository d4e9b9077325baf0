"""Promise 12 as a state machine: two hosts and a destination, crashes, cuts and lost answers, driving the real code.

Host A runs the guest and ships to the replica on host B.  The fence program of the model really powers A off.  No order
of events may let both hosts run the guest, and no shipment of A may be taken while B runs it.

A model of what is physically so (power, the link, which QEMU runs) stands beside the real files: whether a host may
start its guest is decided by the hook that libvirt would run.
"""

from __future__ import annotations

import itertools
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from hypothesis import HealthCheck, Phase, settings, strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from snapchain.destination.protocol import Destination
from snapchain.errors import SnapchainError, ToolFailed, Unavailable
from snapchain.model.guest_state import GuestState
from snapchain.ops.failover import fence
from snapchain.ops.failover.request import FailoverRequest
from snapchain.ops.failover.run import Failover
from snapchain.ops.fence import hook
from snapchain.ops.fence.returned import FenceRequest, run as fenced
from snapchain.ops.migrate import run as migration
from snapchain.ops.migrate.run import MigrateRequest, Move, migrate, take_back
from snapchain.replica.destination import ReplicaDestination
from snapchain.replica.endpoint import DirectoryEndpoint
from snapchain.source.ownership import note_epoch
from tests.exhaustive import some
from tests.ops.guest_points import GUEST, Guest

DISK = "web1/vda"
EVENTS = st.sampled_from(["nothing", "killed", "lost answer", "A comes back"])


class KilledError(Exception):
    """snapchain was killed."""


class TwoHosts(RuleBasedStateMachine):
    """The world. up: has power; runs: its guest runs; images: of the guest on each host

    template: with `kvm1`, the images of host A, and `replica`, as they are at the beginning of each example
    """

    template: Path

    @initialize()
    def begin(self) -> None:
        self.place = Path(tempfile.mkdtemp(dir=self.template))
        shutil.copytree(self.template / "kvm1", self.place / "kvm1")
        shutil.copytree(self.template / "replica", self.place / "replica")
        self.guest = Guest.__new__(Guest)
        self.guest.place, self.guest.names, self.guest.guest = self.place / "kvm1", ("vda",), GUEST
        self.guest.images, self.guest.shown = {"vda": self.place / "kvm1" / "vda.1.qcow2"}, {}
        self.up = {"A": True, "B": True}
        self.runs = {"A": True, "B": False}
        self.images = {"A": self.guest.images["vda"], "B": self.place / "none.qcow2"}
        self.is_cut = self.fence_fails = False
        self.numbers = itertools.count(2)

    def teardown(self) -> None:
        if hasattr(self, "place"):
            shutil.rmtree(self.place)

    @property
    def replica(self) -> Destination:
        return ReplicaDestination(DirectoryEndpoint(self.place / "replica"))

    def reached(self) -> Destination:
        """The replica, from host A."""
        if self.is_cut:
            raise Unavailable("the link is cut")
        return self.replica

    # --- host A

    @precondition(lambda self: self.up["A"] and not self.runs["A"])
    @rule()
    def a_starts(self) -> None:
        self.start("A", self.reached)

    @precondition(lambda self: self.up["A"] and not self.is_cut)
    @rule()
    def a_ships(self) -> None:
        with suppress(SnapchainError):
            self.guest.ship(self.replica, next(self.numbers))
            assert not self.runs["B"], "an old master's point was taken"

    @precondition(lambda self: self.up["A"] and not self.runs["A"] and not self.is_cut)
    @rule(keeps=st.booleans())
    def a_asks_what_it_holds(self, keeps: bool) -> None:
        with suppress(SnapchainError):
            fenced(FenceRequest(disks=[(self.images["A"], DISK)], keeps_tail=keeps, host="kvm1"), self.replica)

    @rule()
    def a_loses_power(self) -> None:
        self.up["A"] = self.runs["A"] = False

    @precondition(lambda self: not self.up["A"])
    @rule()
    def a_boots(self) -> None:
        self.up["A"] = True

    @precondition(lambda self: self.up["A"])
    @rule()
    def a_stops(self) -> None:
        self.runs["A"] = False

    @precondition(lambda self: not self.runs["A"])
    @rule()
    def a_gets_an_old_copy_of_its_images(self) -> None:
        shutil.rmtree(self.place / "kvm1")
        shutil.copytree(self.template / "kvm1", self.place / "kvm1")

    @precondition(lambda self: self.up["A"] and self.up["B"] and not self.runs["A"] and not self.is_cut)
    @rule(step=st.integers(0, 3), event=EVENTS)
    def a_migrates(self, step: int, event: str) -> None:
        with suppress(SnapchainError, KilledError), self.interrupted(step, event, (migration, "ask_for_handover")):
            report = migrate(
                MigrateRequest(moves=[Move(self.images["A"], DISK)]), DirectoryEndpoint(self.place / "replica")
            )
            self.images["B"] = Path(report.disks[0].overlay)

    @precondition(lambda self: self.up["A"] and self.up["B"] and not self.runs["A"] and not self.is_cut)
    @rule(step=st.integers(0, 3), event=EVENTS)
    def a_takes_back(self, step: int, event: str) -> None:
        if self.runs["B"]:
            return  # its QEMU has the overlay open: the real lock refuses that, and no QEMU runs here
        with suppress(SnapchainError, KilledError), self.interrupted(step, event, (migration, "ask_for_handover")):
            take_back(MigrateRequest(moves=[Move(self.images["A"], DISK)]), DirectoryEndpoint(self.place / "replica"))

    @precondition(lambda self: self.up["A"] and not self.runs["A"] and not self.runs["B"])
    @rule()
    def a_human_names_the_epoch(self) -> None:
        """After a failover was withdrawn, and only then."""
        standing = self.replica.guest_state(GUEST)
        if standing.state is GuestState.PROTECTED and standing.former == "kvm2":
            with suppress(SnapchainError):
                note_epoch(self.images["A"], standing.epoch)

    # --- between them

    @rule()
    def the_link_breaks_or_heals(self) -> None:
        self.is_cut = not self.is_cut

    @rule()
    def the_fence_breaks_or_works(self) -> None:
        self.fence_fails = not self.fence_fails

    # --- host B

    @precondition(lambda self: self.up["B"] and not self.runs["B"])
    @rule(step=st.integers(0, 11), event=EVENTS)
    def b_fails_over(self, step: int, event: str) -> None:
        hooks = (Failover, "_write_note"), (ReplicaDestination, "change_guest"), (fence, "run_hook")
        with suppress(SnapchainError, KilledError), self.interrupted(step, event, *hooks):
            request = FailoverRequest(directory=self.place / "out", fence=["fence"], host="kvm2")
            report = Failover(self.replica, GUEST, request).run()
            self.images["B"] = Path(report.disks[0].path or "")
            self.runs["B"] = True

    @precondition(lambda self: self.up["B"] and not self.runs["B"])
    @rule()
    def b_withdraws(self) -> None:
        with suppress(SnapchainError):
            Failover(self.replica, GUEST, FailoverRequest(directory=self.place / "out", host="kvm2")).withdraw()

    @rule()
    def b_loses_its_guest(self) -> None:
        self.runs["B"] = False

    @precondition(lambda self: self.up["B"] and not self.runs["B"])
    @rule()
    def b_starts(self) -> None:
        if self.images["B"].exists():
            self.start("B", lambda: self.replica)

    # --- what must never be

    @invariant()
    def one_master(self) -> None:
        if hasattr(self, "runs"):
            assert not (self.runs["A"] and self.runs["B"]), "two hosts run the guest"

    # --- helpers

    def start(self, host: str, opened: Callable[[], Destination]) -> None:
        xml = (
            "<domain><name>web1</name><devices><disk type='file' device='disk'>"
            f"<source file='{self.images[host]}'/><target dev='vda'/></disk></devices></domain>"
        )
        with suppress(SnapchainError):
            hook.check(GUEST, xml, [opened], requires_answer=True)
            self.runs[host] = True
            self.one_master()

    def fences(self, *_: object, **__: object) -> None:
        if self.fence_fails:
            raise ToolFailed("no answer", argv=["fence"], status=1, stderr="")
        self.up["A"] = self.runs["A"] = False

    @contextmanager
    def interrupted(self, step: int, event: str, *places: tuple[Any, str]) -> Iterator[None]:
        """In the block, something happens before or after one of the calls of these functions."""
        count = 0

        def happens() -> None:
            nonlocal count
            count += 1
            if count != step + 1:
                return
            if event == "killed":
                raise KilledError
            if event == "lost answer":
                raise Unavailable("the answer was lost")
            if event == "A comes back":
                self.up["A"] = True
                if not self.runs["A"]:
                    self.start("A", self.reached)

        def around(real: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **more: Any) -> Any:
                happens()
                found = real(*args, **more)
                happens()
                return found

            return call

        patches: list[Any] = [mock.patch.object(fence, "missing", return_value=None)]
        if (fence, "run_hook") in places:
            patches.append(mock.patch.object(fence, "run_hook", around(self.fences)))
        patches += [
            mock.patch.object(owner, name, around(getattr(owner, name))) for owner, name in places if owner is not fence
        ]
        for patch in patches:
            patch.start()
        try:
            yield
        finally:
            for patch in reversed(patches):
                patch.stop()


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    guest = Guest(folder / "kvm1", names=("vda",))
    guest.point(ReplicaDestination(DirectoryEndpoint(folder / "replica")), 1)
    return folder


def explore(begun: Path, examples: int, steps: int) -> None:
    class World(TwoHosts):
        template = begun

    run_state_machine_as_test(
        World,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            # A failing example is short enough to be read as it is, and one takes seconds.
            phases=[Phase.explicit, Phase.reuse, Phase.generate],
        ),
    )


STEPS = 12
"""Of a failover at which something may happen: before and after each note, each round of the fence, each change."""


@pytest.mark.sampled
@pytest.mark.parametrize("event", ["killed", "lost answer", "A comes back"])
def test_something_happens_at_each_step_of_a_failover(begun: Path, event: str) -> None:
    """What hypothesis would have to find: then A boots and starts, the failover goes on, and an old copy comes back."""

    class World(TwoHosts):
        template = begun

    for step in some(range(STEPS + 1), each=2):
        world = World()
        TwoHosts.begin(world)
        TwoHosts.b_fails_over(world, step, event)
        world.one_master()
        for _ in range(2):
            TwoHosts.a_boots(world)
            if not world.runs["A"]:
                TwoHosts.a_starts(world)
            TwoHosts.a_ships(world)
            world.one_master()
            if not world.runs["B"]:
                TwoHosts.b_fails_over(world, STEPS + 1, "nothing")
            world.one_master()
            assert world.runs["B"], "the next run ends it"
            TwoHosts.a_loses_power(world)
            TwoHosts.a_gets_an_old_copy_of_its_images(world)
        world.teardown()


def test_never_two_masters(begun: Path) -> None:
    explore(begun, 12, 20)


@pytest.mark.soak
def test_never_two_masters_at_length(begun: Path) -> None:
    explore(begun, 1500, 40)
