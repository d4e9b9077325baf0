"""The answer to HANDOVER: the disks of a guest become this host's or their sender's again, and its record follows.

    GIVE   lock all disks -> judge them -> write the guest's record -> write the catalogues, one a disk
    BACK   lock all disks -> judge them -> write the catalogues -> write the guest's record

The record (guest_states.py) takes the same step as the disks, SWITCH or WITHDRAW, where the request names all disks
that the replica has of one guest, in one epoch.  A handover of some of its disks, or of disks without a guest, leaves
it: then it is older than the disks, whose catalogues stay the guard.  A run that is cut off is finished by the same
request, by its token.  On the way back the record only follows, since a sender that gives up half of a BACK goes on
by what the catalogues say; until then the disks are in a later epoch than the record, which counts no more.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from snapchain.destination.guest_record import record_disk
from snapchain.errors import NotFound
from snapchain.model.guest_state import GuestChange, GuestStanding, GuestState, Transition, after
from snapchain.replica.guest_states import look
from snapchain.replica.guest_store import alone_with, disks_of, guest_of, read_standing, write_standing
from snapchain.replica.handover import Case, cases_of, give, standing_of, take_back
from snapchain.replica.store import Replica, ReplicaDisk, Work, in_turn, open_replica
from snapchain.replica.stream.frames import Kind
from snapchain.replica.stream.guest_messages import Handed, Handover, Step

if TYPE_CHECKING:
    from snapchain.replica.receiver import Receiver


def answer(receiver: Receiver, request: Handover) -> None:
    """HANDOVER. Raises as `hand_over`."""
    handed = hand_over(request, receiver.root(request.replica))
    receiver.session.reply(Kind.HANDED, handed)
    receiver.session.done()


def hand_over(request: Handover, root: Path) -> Handed:
    """Do what the request says, for all disks or none.

    Raises NotFound for a disk that is not here, Busy when one is being changed or its overlay is open, Conflict where
    a disk is not as it was prepared, another host has taken it over, or a guest has written to what is to go back.
    """
    replica = open_replica(root)
    disks = {each.disk: replica.disk(each.disk) for each in request.disks}
    for name, disk in disks.items():
        if not disk.directory.is_dir():
            raise NotFound(f"there is no disk {name!r} here", subject=root)
    guest = None if request.step is Step.LOOK else _whole_guest(replica, disks)
    # The disk of its records has no overlay; its sender is to be refused as the others' is.
    others = [disk for disk in disks_of(replica, guest) if disk.name not in disks] if guest else []
    with ExitStack() as stack:
        # In one order, whatever the sender's: two handovers at once must not wait for each other.
        for disk in sorted([*disks.values(), *others], key=lambda each: each.name):
            stack.enter_context(in_turn(disk, Work.TRANSFER))
            if disk.read() is None:
                raise NotFound(f"there is no disk {disk.name!r} here", subject=root)
        cases = cases_of(replica, request.disks)
        if request.step is Step.LOOK:
            return Handed(disks=tuple(standing_of(case, request.token) for case in cases))
        if guest is None:
            change = give if request.step is Step.GIVE else take_back
            cases = change(cases, request.token, stack)
        else:
            with alone_with(root, guest):
                cases = _with_record(replica, guest, request, cases, stack)
            _raise_epochs(others, request)
    return Handed(disks=tuple(standing_of(case, request.token) for case in cases))


def _whole_guest(replica: Replica, disks: dict[str, ReplicaDisk]) -> str | None:
    """The guest of which these are all disks, apart from the one of its records."""
    guests = {guest_of(name) for name in disks}
    if len(guests) != 1 or not (guest := guests.pop()):
        return None
    others = {disk.name for disk in disks_of(replica, guest)} - set(disks)
    return guest if others <= {record_disk(guest)} else None


def _with_record(replica: Replica, guest: str, request: Handover, cases: list[Case], stack: ExitStack) -> list[Case]:
    """Hand over all disks of a guest, and write its record."""

    def step(now: GuestStanding, transition: Transition) -> None:
        if any(each.epoch != now.epoch + 1 for each in request.disks):
            return  # they do not all enter the epoch after the guest's
        here = socket.gethostname()[:250]
        change = GuestChange(
            guest=guest,
            transition=transition,
            seen=now.number,
            token=request.token,
            by=request.by or here,
            host=here,
            former=request.by,
        )
        new = after(now, change, time=datetime.now(UTC), subject=f"{replica.root}: {guest}")
        write_standing(replica.root, new)

    def decide() -> None:
        now = look(replica, guest).standing
        if now.token == request.token and now.state is not GuestState.PROTECTED:
            return  # decided by an earlier run
        if now.state is GuestState.MOVING and not _is_awaited(now.token):
            # Nobody works at that move: its disks are ours, and no QEMU of it is known here.
            now = now.model_copy(update={"state": GuestState.PROTECTED})
        step(now, Transition.SWITCH)

    if request.step is Step.GIVE:
        return give(cases, request.token, stack, decide=decide)
    done = take_back(cases, request.token, stack)
    record = read_standing(replica.root, guest)
    if record is not None and record.token == request.token and record.state is not GuestState.PROTECTED:
        step(record, Transition.WITHDRAW)
    return done


def _raise_epochs(others: Sequence[ReplicaDisk], request: Handover) -> None:
    """The disk of the guest's records follows its disks into their epoch. All are locked."""
    epoch = min(each.epoch for each in request.disks)
    for disk in others:
        catalogue = disk.read()
        if catalogue is not None and catalogue.epoch < epoch:
            disk.write(catalogue.after(epoch=epoch))


def _is_awaited(token: str | None) -> bool:
    """Whether a QEMU of this host awaits the guest of a move."""
    from snapchain.guest import journal  # inside: few handovers find a guest that is being moved
    from snapchain.replica.move_record import OPERATION

    records, _ = journal.find(operation=OPERATION)
    return token is not None and any(each.record.details.get("token") == token for each in records)
