"""Something happens before and after each step of a failover: it is killed, an answer is lost, the old host comes back.

Host A runs the guest and ships to the replica on host B.  The fence program really powers A off.  What is physically
so, power and which guest runs, stands beside the real files; whether A may start its guest is decided by the hook that
libvirt would run.  Random orders of events, over more hosts and destinations: test_masters_model.py.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from snapchain.destination.protocol import Destination
from snapchain.errors import SnapchainError, Unavailable
from snapchain.ops.failover import fence
from snapchain.ops.failover.request import FailoverRequest
from snapchain.ops.failover.run import Failover
from snapchain.ops.fence import hook
from snapchain.replica.destination import ReplicaDestination
from snapchain.replica.endpoint import DirectoryEndpoint
from tests.exhaustive import some
from tests.ops.guest_points import GUEST, Guest

STEPS = 12
"""Of a failover at which something may happen: before and after each note, each round of the fence, each change."""


class KilledError(Exception):
    """snapchain was killed."""


class TwoHosts:
    """up: whether A has power; runs: whose guest runs; template: A's images and the replica, as they are first"""

    def __init__(self, template: Path, place: Path) -> None:
        self.template, self.place = template, place
        shutil.copytree(template / "replica", place / "replica")
        self.up, self.runs = True, {"A": True, "B": False}
        self.guest = Guest.__new__(Guest)
        self.guest.place, self.guest.names, self.guest.guest = place / "kvm1", ("vda",), GUEST
        self.guest.images, self.guest.shown = {"vda": place / "kvm1" / "vda.1.qcow2"}, {}
        self.numbers = itertools.count(2)
        self.a_gets_an_old_copy_of_its_images()

    @property
    def replica(self) -> Destination:
        return ReplicaDestination(DirectoryEndpoint(self.place / "replica"))

    def a_gets_an_old_copy_of_its_images(self) -> None:
        shutil.rmtree(self.place / "kvm1", ignore_errors=True)
        shutil.copytree(self.template / "kvm1", self.place / "kvm1")

    def a_starts(self) -> None:
        xml = (
            "<domain><name>web1</name><devices><disk type='file' device='disk'>"
            f"<source file='{self.guest.images['vda']}'/><target dev='vda'/></disk></devices></domain>"
        )
        with suppress(SnapchainError):
            hook.check(GUEST, xml, [lambda: self.replica], requires_answer=True)
            self.runs["A"] = True
            self.one_master()

    def a_ships(self) -> None:
        with suppress(SnapchainError):
            self.guest.ship(self.replica, next(self.numbers))
            assert not self.runs["B"], "an old master's point was taken"

    def b_fails_over(self, step: int, event: str) -> None:
        with suppress(SnapchainError, KilledError), self.interrupted(step, event):
            Failover(
                self.replica, GUEST, FailoverRequest(directory=self.place / "out", fence=["fence"], host="kvm2")
            ).run()
            self.runs["B"] = True

    def one_master(self) -> None:
        assert not (self.runs["A"] and self.runs["B"]), "two hosts run the guest"

    def fences(self, *_: object, **__: object) -> None:
        self.up = self.runs["A"] = False

    @contextmanager
    def interrupted(self, step: int, event: str) -> Iterator[None]:
        """In the block, something happens before or after one of the steps of a failover."""
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
            self.up = True
            if not self.runs["A"]:
                self.a_starts()

        def around(real: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **more: Any) -> Any:
                happens()
                found = real(*args, **more)
                happens()
                return found

            return call

        places: list[tuple[Any, str]] = [(Failover, "_write_note"), (ReplicaDestination, "change_guest")]
        patches: list[Any] = [
            mock.patch.object(fence, "missing", return_value=None),
            mock.patch.object(fence, "run_hook", around(self.fences)),
            *(mock.patch.object(owner, name, around(getattr(owner, name))) for owner, name in places),
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


@pytest.mark.sampled
@pytest.mark.parametrize("event", ["killed", "lost answer", "A comes back"])
def test_something_happens_at_each_step_of_a_failover(begun: Path, tmp_path: Path, event: str) -> None:
    """Then A boots and starts, the failover goes on, and an old copy of A's images comes back."""
    for step in some(range(STEPS + 1), each=2):
        place = tmp_path / str(step)
        place.mkdir()
        world = TwoHosts(begun, place)
        world.b_fails_over(step, event)
        world.one_master()
        for _ in range(2):
            world.up = True
            if not world.runs["A"]:
                world.a_starts()
            world.a_ships()
            world.one_master()
            if not world.runs["B"]:
                world.b_fails_over(STEPS + 1, "nothing")
            world.one_master()
            assert world.runs["B"], "the next run ends it"
            world.fences()
            world.a_gets_an_old_copy_of_its_images()
        shutil.rmtree(place)
