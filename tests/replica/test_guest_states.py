"""The state of a guest at a replica: who may take which step, and what it does to the disks."""

from __future__ import annotations

import secrets
from pathlib import Path

import pytest

from snapchain.errors import Conflict, NotFound
from snapchain.model.guest_state import GuestChange, GuestStanding, GuestState, TakenDisk, Transition, Vouched
from snapchain.replica.client import guest_at
from snapchain.replica.endpoint import DirectoryEndpoint
from snapchain.replica.stream.messages import HandedDisk, Standing
from tests.ops.stacks import Layer, MiB, build
from tests.replica.conftest import send

VOUCHED = Vouched(how="person", who="root@kvm2")


class Guest:
    """A guest of two disks at a replica, as its source and its replica's host see it."""

    def __init__(self, tmp_path: Path) -> None:
        self.root = tmp_path / "replica"
        self.images = {
            f"web1/{name}": build(tmp_path / name, [Layer(MiB, [f"write -P {at} 0 128k"])])[0]
            for at, name in enumerate(("vda", "vdb"), 1)
        }
        for disk, image in self.images.items():
            send(image, self.endpoint, disk)

    @property
    def endpoint(self) -> DirectoryEndpoint:
        return DirectoryEndpoint(self.root)

    def look(self) -> GuestStanding:
        return guest_at(self.endpoint, "web1")[0]

    def take(
        self, transition: Transition, token: str, *, seen: int | None = None, handed: list[HandedDisk] | None = None
    ) -> tuple[GuestStanding, tuple[Standing, ...]]:
        taken = tuple(TakenDisk(disk=disk, point=1) for disk in self.images)
        change = GuestChange(
            guest="web1",
            transition=transition,
            seen=self.look().number if seen is None else seen,
            token=token,
            by="kvm2",
            host="kvm2",
            former="kvm1",
            vouched=VOUCHED if transition is Transition.PROMOTE else None,
            disks=taken if transition is Transition.PROMOTE else (),
        )
        return guest_at(self.endpoint, "web1", change, handed=handed or ())


@pytest.fixture
def guest(tmp_path: Path) -> Guest:
    return Guest(tmp_path)


def token() -> str:
    return secrets.token_hex(16)


def test_a_guest_is_protected_until_something_is_recorded(guest: Guest) -> None:
    found = guest.look()
    assert (found.state, found.epoch, found.number, found.master) == (GuestState.PROTECTED, 1, 0, None)
    with pytest.raises(NotFound, match="there is no guest 'other' here"):
        guest_at(guest.endpoint, "other")


def test_a_failover_takes_all_disks_and_refuses_the_old_master(guest: Guest) -> None:
    mine = token()
    standing, disks = guest.take(Transition.PROMOTE, mine)
    assert (standing.state, standing.epoch, standing.master, standing.former) == ("promoting", 2, "kvm2", "kvm1")
    assert [(each.disk, each.epoch, each.given) for each in disks] == [("web1/vda", 2, True), ("web1/vdb", 2, True)]
    assert all(Path(each.overlay).is_file() for each in disks)
    with pytest.raises(Conflict, match=r"kvm2 has taken the guest web1 over by a failover, for which root"):
        send(guest.images["web1/vda"], guest.endpoint, "web1/vda")
    assert guest.take(Transition.START, mine)[0].state is GuestState.ACTIVE
