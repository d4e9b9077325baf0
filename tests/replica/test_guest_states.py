"""The state of a guest at a replica: who may take which step, and what it does to the disks."""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import Any

import pytest

from snapchain.errors import Busy, Conflict, InvalidInput, NotFound, Unavailable
from snapchain.host.locks import ImageLock, LockMode
from snapchain.model.guest_state import GuestChange, GuestStanding, GuestState, TakenDisk, Transition, Vouched
from snapchain.replica.client import guest_at
from snapchain.replica.endpoint import DirectoryEndpoint
from snapchain.replica.permissions import Permissions
from snapchain.replica.sender import Sender
from snapchain.replica.store import ReplicaDisk
from snapchain.replica.stream.frames import Kind
from snapchain.replica.stream.guest_messages import AskGuest, HandedDisk, Standing
from snapchain.replica.stream.messages import Active, Open
from snapchain.replica.stream.requests import Right
from tests.ops.stacks import Layer, MiB, build, write
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


# --- a live move: MOVE, then SWITCH with the overlays that were prepared


def handed(guest: Guest, epoch: int) -> list[HandedDisk]:
    """The disks as their source has prepared them: an empty overlay on the newest layer of each."""
    found = []
    for disk in guest.images:
        with (
            guest.endpoint.connect() as channel,
            Sender(channel, link=guest.endpoint.link) as sender,
        ):
            held = sender.open(Open(disk=disk, replica=guest.endpoint.replica))
            overlay = Active(
                name="web1.qcow2",
                size=MiB,
                cluster_size=65536,
                extended_l2=False,
                on=held.layers[-1].id,
                make=False,
                prove=False,
            )
            sender.ask_for_active(overlay.model_copy(update={"make": True}))
        found.append(HandedDisk(disk=disk, epoch=epoch, overlay=overlay))
    return found


def test_a_move_switches_all_disks(guest: Guest) -> None:
    mine = token()
    moving, _ = guest.take(Transition.MOVE, mine)
    assert (moving.state, moving.epoch) == (GuestState.MOVING, 1)
    for image, disk in zip(guest.images.values(), guest.images, strict=True):
        write(image, "write -P 8 256k 64k")
        send(image, guest.endpoint, disk)  # the source still ships
    disks = handed(guest, 2)
    for _ in range(2):  # the answer may be lost
        switched, standings = guest.take(Transition.SWITCH, mine, seen=moving.number, handed=disks)
        assert (switched.state, switched.epoch, switched.master) == ("switched", 2, "kvm2")
        assert [(each.disk, each.given, each.epoch) for each in standings] == [(disk, True, 2) for disk in guest.images]
    with pytest.raises(Conflict, match="kvm2 has taken the guest web1 over by a move"):
        send(guest.images["web1/vda"], guest.endpoint, "web1/vda")
    assert guest.take(Transition.START, mine)[0].state is GuestState.ACTIVE


def test_another_move_does_not_interfere(guest: Guest) -> None:
    mine, theirs = token(), token()
    guest.take(Transition.MOVE, mine)
    with pytest.raises(Conflict, match="the guest is being moved from kvm2 in epoch 1") as refused:
        guest.take(Transition.MOVE, theirs)
    assert "wait until that move ends" in str(refused.value.hint)
    disks = handed(guest, 2)
    for step in (Transition.SWITCH, Transition.ABORT):
        with pytest.raises(Conflict, match="the guest is being moved"):
            guest.take(step, theirs, handed=disks if step is Transition.SWITCH else None)
    late = guest.look().number
    guest.take(Transition.ABORT, mine)
    with pytest.raises(Conflict, match="the state of the guest was changed meanwhile"):
        guest.take(Transition.SWITCH, mine, seen=late, handed=disks)  # a switch that comes after the abort
    assert guest.look().epoch == 1
    send(guest.images["web1/vda"], guest.endpoint, "web1/vda")


def test_a_switch_takes_all_disks_or_none(guest: Guest) -> None:
    mine = token()
    guest.take(Transition.MOVE, mine)
    disks = handed(guest, 2)
    write(Path(guest.root / "web1%2Fvdb" / "active" / "web1.qcow2"), "write -P 9 0 64k")
    with pytest.raises(Conflict, match="not the empty overlay on the newest layer"):
        guest.take(Transition.SWITCH, mine, handed=disks)
    standing = guest.look()
    assert (standing.state, standing.epoch) == (GuestState.MOVING, 1)
    with pytest.raises(InvalidInput, match="would be in epoch 3, and its guest in 2"):
        guest.take(Transition.SWITCH, mine, handed=[each.model_copy(update={"epoch": 3}) for each in disks])
    for image, disk in zip(guest.images.values(), guest.images, strict=True):
        send(image, guest.endpoint, disk)


def test_a_switch_that_is_cut_off_between_two_disks(guest: Guest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The record is there, and one disk lags: START is refused, and the same request finishes it."""
    mine = token()
    moving, _ = guest.take(Transition.MOVE, mine)
    disks = handed(guest, 2)
    real, written = ReplicaDisk.write, []

    def cut(self: ReplicaDisk, *args: Any, **more: Any) -> None:
        written.append(self.name)
        if len(written) == 2:
            raise Unavailable("the disk is full", subject="/srv")
        real(self, *args, **more)

    with monkeypatch.context() as patch:
        patch.setattr(ReplicaDisk, "write", cut)
        with pytest.raises(Unavailable, match="the disk is full"):
            guest.take(Transition.SWITCH, mine, seen=moving.number, handed=disks)
    assert guest.look().state is GuestState.SWITCHED
    with pytest.raises(Conflict, match="disk web1/vdb is in epoch 1, and the guest in 2: it was not finished"):
        guest.take(Transition.START, mine)
    guest.take(Transition.SWITCH, mine, seen=moving.number, handed=disks)
    assert guest.take(Transition.START, mine)[0].state is GuestState.ACTIVE


def test_a_switch_is_withdrawn_until_a_guest_writes(guest: Guest) -> None:
    mine = token()
    guest.take(Transition.MOVE, mine)
    seen = guest.look().number
    _, standings = guest.take(Transition.SWITCH, mine, handed=handed(guest, 2))
    overlay = Path(standings[0].overlay)
    with ImageLock(overlay, LockMode.WRITE), pytest.raises(Busy, match="open"):
        guest.take(Transition.WITHDRAW, mine)
    back, _ = guest.take(Transition.WITHDRAW, mine)
    assert (back.state, back.epoch) == (GuestState.PROTECTED, 3)
    assert not overlay.exists()
    with pytest.raises(Conflict, match="changed meanwhile"):
        guest.take(Transition.SWITCH, mine, seen=seen, handed=handed_again(guest))
    send(guest.images["web1/vda"], guest.endpoint, "web1/vda", epoch=3)


def handed_again(guest: Guest) -> list[HandedDisk]:
    overlay = Active(
        name="web1.qcow2", size=MiB, cluster_size=65536, extended_l2=False, on="0" * 32, make=False, prove=False
    )
    return [HandedDisk(disk=disk, epoch=2, overlay=overlay) for disk in guest.images]


def test_only_a_key_that_may_hand_over_changes_a_state(guest: Guest) -> None:
    look = AskGuest(guest="web1")
    change = GuestChange(guest="web1", transition=Transition.MOVE, seen=0, token=token(), by="a", host="a")
    for right in Right:
        permissions = Permissions(frozenset({right}))
        if right in (Right.SEND, Right.FETCH, Right.HANDOVER):
            permissions.check(Kind.GUEST, look, subject="it")
        else:
            with pytest.raises(InvalidInput, match="is not allowed"):
                permissions.check(Kind.GUEST, look, subject="it")
        if right is not Right.HANDOVER:
            with pytest.raises(InvalidInput, match="lacks the right 'handover'"):
                permissions.check(Kind.GUEST, look.model_copy(update={"change": change}), subject="it")


def test_no_sender_raises_the_epoch_of_a_guest_that_runs_here(guest: Guest, tmp_path: Path) -> None:
    """By the disk of its records, which has no overlay: the new master would then count as an old one."""
    record = build(tmp_path / "record", [Layer(MiB, ["write -P 3 0 64k"])])[0]
    send(record, guest.endpoint, "web1/.guest")
    mine = token()
    guest.take(Transition.PROMOTE, mine)
    guest.take(Transition.START, mine)
    for epoch in (1, 2, 3):
        write(record, f"write -P {epoch} 512k 64k")
        if epoch == 2:
            continue  # its own epoch, such as of the new master
        with pytest.raises(Conflict, match="kvm2 has taken the guest web1 over"):
            send(record, guest.endpoint, "web1/.guest", epoch=epoch)
    assert (guest.look().state, guest.look().epoch) == (GuestState.ACTIVE, 2)
