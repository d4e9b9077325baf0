"""The way back after a failover: only what differs crosses the link, and it goes on wherever it was cut off."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest

from snapchain.errors import Conflict, NotFound
from snapchain.model.guest_state import GuestState
from snapchain.ops import failback
from snapchain.ops.failback import PrepareRequest, prepare
from snapchain.ops.fence import hook
from snapchain.ops.migrate import run as migration
from snapchain.ops.migrate.run import MigrateReport, MigrateRequest, Move
from snapchain.replica.destination import ReplicaDestination
from snapchain.replica.endpoint import DirectoryEndpoint
from tests.ops.guest_points import Guest
from tests.ops.stacks import qemu_img, write
from tests.ops.test_failover import failover
from tests.ops.test_fence import fenced, xml

KiB = 1 << 10


class World:
    """Host kvm1 with a guest of two disks, which kvm2 has taken over at point 1 and written to since."""

    def __init__(self, tmp_path: Path) -> None:
        self.there, self.back = tmp_path / "kvm2" / "replica", tmp_path / "kvm1" / "back"
        self.there.parent.mkdir()
        self.guest = Guest(tmp_path / "kvm1")
        self.guest.point(self.replica(), 1)
        write(self.guest.images["vda"], "write -P 7 1536k 64k")  # what no point has
        report = failover(self.replica, tmp_path / "out").run()
        self.overlays = {each.name: Path(each.path or "") for each in report.disks}
        write(self.overlays["vda"], "write -P 9 256k 128k")
        write(self.overlays["vdb"], "write -P 8 0 64k")

    def replica(self) -> ReplicaDestination:
        return ReplicaDestination(DirectoryEndpoint(self.there))

    def prepare(self) -> failback.PrepareReport:
        disks = [(self.guest.images[name], f"web1/{name}") for name in self.guest.names]
        return prepare(PrepareRequest(disks=disks), DirectoryEndpoint(self.back))

    def failback(self) -> MigrateReport:
        moves = [Move(path, f"web1/{name}") for name, path in self.overlays.items()]
        return failback.run(MigrateRequest(moves=moves), DirectoryEndpoint(self.back))

    def check(self, report: MigrateReport, tmp_path: Path) -> None:
        """What came back reads as what the new host had."""
        for moved, name in zip(report.disks, self.guest.names, strict=True):
            one, other = tmp_path / "one.raw", tmp_path / "other.raw"
            qemu_img("convert", "-O", "raw", moved.overlay, one)
            qemu_img("convert", "-O", "raw", self.overlays[name], other)
            assert one.read_bytes() == other.read_bytes()


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def test_only_what_differs_is_sent(world: World, tmp_path: Path) -> None:
    fenced(world.replica, world.guest)
    prepared = world.prepare()
    assert prepared.bytes_copied > 0
    assert "kvm2 has taken the guest web1 over" in prepared.disks[0].taken_over
    report = world.failback()
    changed = (128 + 64) * KiB
    assert report.bytes_sent < 1.2 * changed
    assert [each.epoch for each in report.disks] == [3, 3]
    world.check(report, tmp_path)
    # The guest is the old host's again: there it starts, and on no other image.
    for name, moved in zip(world.guest.names, report.disks, strict=True):
        old, world.guest.images[name] = world.guest.images[name], Path(moved.overlay)
        assert old.exists()
    assert hook.check("web1", xml(world.guest), [world.replica]) == []
    for name, path in world.overlays.items():
        world.guest.images[name] = path
    with pytest.raises(Conflict, match="was given to"):
        hook.check("web1", xml(world.guest), [])


def test_the_next_failover_is_in_a_later_epoch(world: World, tmp_path: Path) -> None:
    """Although nothing was shipped since: the new master's epoch is known by the mark of the one that gave it."""
    fenced(world.replica, world.guest)
    world.prepare()
    world.failback()
    standing = world.replica().guest_state("web1")
    assert (standing.state, standing.epoch, standing.former) == (GuestState.PROTECTED, 3, "kvm2")
    assert standing.master == socket.gethostname(), "the mark on the overlay names it"
    came = ReplicaDestination(DirectoryEndpoint(world.back)).guest_state("web1")
    assert (came.state, came.epoch, came.master) == (GuestState.SWITCHED, 3, socket.gethostname())
    report = failover(world.replica, tmp_path / "again").run()
    assert report.epoch == 4
    for name in world.guest.names:
        moved = next(world.back.glob(f"web1%2F{name}/active/*.qcow2"))
        world.guest.images[name] = moved
    with pytest.raises(Conflict, match="kvm2 has taken the guest web1 over"):
        hook.check("web1", xml(world.guest), [world.replica])


def test_images_that_nobody_has_taken_over_stay(world: World) -> None:
    """Before the destination was asked: they may be the only copy."""
    with pytest.raises(NotFound, match="nobody is known to have taken it over"):
        world.prepare()
    assert not world.back.exists()


@pytest.mark.parametrize("lost", ["before", "after"])
def test_it_goes_on_where_it_was_cut_off(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: str
) -> None:
    fenced(world.replica, world.guest)
    world.prepare()
    assert world.prepare().bytes_copied == 0, "what is there is not copied again"
    real: Any = vars(migration)["ask_for_handover"]

    def cut(*args: Any, **more: Any) -> Any:
        if lost == "after":
            real(*args, **more)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(migration, "ask_for_handover", cut)
        with pytest.raises(KeyboardInterrupt):
            world.failback()
    report = world.failback()
    assert [each.epoch for each in report.disks] == [3, 3]
    world.check(report, tmp_path)
