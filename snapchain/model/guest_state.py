"""The state of a guest at a destination: which host may run it, in which epoch, and what is under way.

    protected --MOVE--> moving --SWITCH--> switched --START--> active --RETURN--> suspect
        |                 |ABORT              |                  |                   |
        |<----------------+                   |                  +----DIVERGE------->+--> diverged
        |--PROMOTE--> promoting --START-------+----> active      |                   |        |
        |<--WITHDRAW-- (promoting, switched)                     +<-----SETTLE-------+--------+

    protected   the master writes the guest's disks, and this destination has points of them
    moving      a live move to the destination's host is under way; the master is still the old one
    switched    that move is over: the destination's host is the master; the guest is not known to run there yet
    promoting   the destination takes over from a master that is gone; the guest is not known to run there yet
    active      the new master runs the guest
    suspect     active, and the host that was master before has come back: nothing that it holds is believed
    diverged    active, and that host holds data that no point has

A record is written with the number after the one that its writer has read, so of two writers one is refused.  SWITCH,
PROMOTE and WITHDRAW raise the epoch, and with it the epochs of all disks of the guest: these stay the guard that
refuses an old master's writes.  Where the disks are in a later epoch than the record, they have gone on without it.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from enum import StrEnum
from typing import Annotated, Literal, Self

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, StringConstraints, model_validator

from snapchain.errors import Conflict
from snapchain.model.disk_name import LARGEST_EPOCH

Name = Annotated[str, StringConstraints(min_length=1, max_length=250)]
Words = Annotated[str, StringConstraints(max_length=1000)]
Token = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{32}$")]
MOST_DISKS = 1000
"""Of one guest."""


class GuestState(StrEnum):
    """What the module says of each."""

    PROTECTED = "protected"
    MOVING = "moving"
    SWITCHED = "switched"
    PROMOTING = "promoting"
    ACTIVE = "active"
    SUSPECT = "suspect"
    DIVERGED = "diverged"


class Transition(StrEnum):
    """How one state becomes another."""

    MOVE = "move"
    ABORT = "abort"
    SWITCH = "switch"
    PROMOTE = "promote"
    WITHDRAW = "withdraw"
    START = "start"
    RETURN = "return"
    DIVERGE = "diverge"
    SETTLE = "settle"


class Part(BaseModel):
    """A stored value: exactly these fields."""

    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True)


class Vouched(Part):
    """The proof that the old master is gone. how: a fence program that succeeded twice, or a person's word

    who: the user and host that said so; words: the program, or what the person gave as the reason
    """

    how: Literal["fence", "person"]
    who: Name
    words: Words = ""


class GuestStanding(Part):
    """A guest at a destination.

    number: 0 where nothing is recorded, else one more at each change; epoch: of the guest, and of all of its disks
    master: the host that may write the disks, None where no change has named it yet; former: the one before it
    token: of the move or failover that the state belongs to; by: the host that made the change
    vouched: why the former master counts as gone; point, instant: the guest point that was taken over
    """

    guest: Name
    number: int = Field(ge=0, lt=1 << 53)
    state: GuestState
    epoch: int = Field(ge=1, le=LARGEST_EPOCH)
    time: AwareDatetime | None = None
    master: Name | None = None
    former: Name | None = None
    token: Token | None = None
    by: Name | None = None
    vouched: Vouched | None = None
    point: int | None = Field(default=None, ge=1, lt=1 << 53)
    instant: Token | None = None

    @property
    def is_taken_over(self) -> bool:
        """Whether a host other than the first master may write the guest's disks."""
        return self.state not in (GuestState.PROTECTED, GuestState.MOVING)


class TakenDisk(Part):
    """A disk that is taken over at a point. disk: its name at the destination"""

    disk: Name
    point: int = Field(ge=1, lt=1 << 53)


class GuestChange(Part):
    """One step of a guest from one state to another.

    seen: number of the record that the caller has read; token: of the move or failover, the same in each repetition
    by: the host that asks; host: the one that becomes master by SWITCH and PROMOTE, and the one that is by MOVE;
    by RETURN and DIVERGE the one that came back; former: the master that PROMOTE replaces, as the guest point has it
    vouched, point, instant: as the record has them, for PROMOTE
    disks: for PROMOTE, all disks of the guest point
    """

    guest: Name
    transition: Transition
    seen: int = Field(ge=0, lt=1 << 53)
    token: Token
    by: Name
    host: Name
    former: Name | None = None
    vouched: Vouched | None = None
    point: int | None = Field(default=None, ge=1, lt=1 << 53)
    instant: Token | None = None
    disks: tuple[TakenDisk, ...] = Field(default=(), max_length=MOST_DISKS)

    @model_validator(mode="after")
    def _names_disks_of_the_guest(self) -> Self:
        names = [each.disk for each in self.disks]
        if len(set(names)) < len(names) or not all(name.startswith(f"{self.guest}/") for name in names):
            raise ValueError("its disks are not those of the guest, each once")
        return self

    @property
    def raises(self) -> bool:
        """Whether it raises the epoch."""
        return self.transition in RAISES


_UNDER_WAY = frozenset({GuestState.MOVING, GuestState.SWITCHED, GuestState.PROMOTING})
RAISES = frozenset({Transition.SWITCH, Transition.PROMOTE, Transition.WITHDRAW})
LEGAL: dict[Transition, tuple[frozenset[GuestState], GuestState]] = {
    Transition.MOVE: (frozenset({GuestState.PROTECTED}), GuestState.MOVING),
    Transition.ABORT: (frozenset({GuestState.MOVING}), GuestState.PROTECTED),
    Transition.SWITCH: (frozenset({GuestState.PROTECTED, GuestState.MOVING}), GuestState.SWITCHED),
    Transition.PROMOTE: (frozenset(GuestState), GuestState.PROMOTING),
    Transition.WITHDRAW: (frozenset({GuestState.SWITCHED, GuestState.PROMOTING}), GuestState.PROTECTED),
    Transition.START: (frozenset({GuestState.SWITCHED, GuestState.PROMOTING}), GuestState.ACTIVE),
    Transition.RETURN: (frozenset({GuestState.ACTIVE}), GuestState.SUSPECT),
    Transition.DIVERGE: (frozenset({GuestState.ACTIVE, GuestState.SUSPECT}), GuestState.DIVERGED),
    Transition.SETTLE: (frozenset({GuestState.SUSPECT, GuestState.DIVERGED}), GuestState.ACTIVE),
}
"""From which states each is legal, and to which it leads."""
_BEGIN = frozenset({Transition.MOVE, Transition.PROMOTE})
"""These begin something; all other steps belong to what is under way or was done, and must name its token."""


def as_disks_stand(record: GuestStanding | None, guest: str, epoch: int, *, master: str | None = None) -> GuestStanding:
    """How a guest stands. record: what is stored, None for nothing; epoch: the latest of its disks

    Disks in a later epoch than the record were handed on without it: their master writes them, as before any change.
    master: that host, where the disks name it
    """
    if record is not None and epoch <= record.epoch:
        return record
    number, former = (0, None) if record is None else (record.number, record.master)
    return GuestStanding(
        guest=guest, number=number, state=GuestState.PROTECTED, epoch=epoch, master=master, former=former
    )


def is_done(now: GuestStanding, change: GuestChange) -> bool:
    """Whether a change was made already, by an earlier run whose answer was lost."""
    return (now.token, now.state, now.number) == (change.token, LEGAL[change.transition][1], change.seen + 1)


def after(now: GuestStanding, change: GuestChange, *, time: datetime, subject: object) -> GuestStanding:
    """The next record. subject: names the guest at its destination, for errors

    Raises Conflict for a change that is not legal, is another move's, or was decided on an older record.
    """
    if change.seen != now.number:
        raise Conflict(
            f"the state of the guest was changed meanwhile: it is {describe(now)}", subject=subject, hint="run it again"
        )
    states, target = LEGAL[change.transition]
    if change.transition is Transition.WITHDRAW and now.vouched is None:
        states |= {GuestState.ACTIVE}  # a planned move goes back as long as its guest has written nothing
    begins = change.transition in _BEGIN or now.state is GuestState.PROTECTED
    if now.state not in states or not (begins or now.token == change.token):
        raise Conflict(f"the guest is {describe(now)}", subject=subject, hint=_remedy(now))
    if change.transition is Transition.PROMOTE and change.vouched is None:
        raise Conflict("there is no proof that its master is gone", subject=subject, hint=PROOF)
    if change.raises and now.epoch >= LARGEST_EPOCH:
        raise Conflict(f"its epoch is {now.epoch}, and there is none after it", subject=subject)
    kept: dict[str, object] = {"time": time, "by": change.by, "number": now.number + 1, "state": target}
    match change.transition:
        case Transition.MOVE:
            begun = {"token": change.token, "master": change.host, "former": None, "vouched": None}
            return now.model_copy(update=kept | begun | _NO_POINT)
        case Transition.SWITCH | Transition.PROMOTE:
            before = now.master or change.former
            former = before if before != change.host else now.former
            taken = {"token": change.token, "master": change.host, "former": former, "vouched": change.vouched}
            point = {"point": change.point, "instant": change.instant}
            return now.model_copy(update=kept | taken | point | {"epoch": now.epoch + 1})
        case Transition.WITHDRAW:
            back = {"master": now.former, "former": now.master, "vouched": None, "epoch": now.epoch + 1}
            return now.model_copy(update=kept | back | _NO_POINT)
        case Transition.RETURN | Transition.DIVERGE:
            return now.model_copy(update=kept | {"former": change.host})
        case Transition.ABORT | Transition.START | Transition.SETTLE:
            return now.model_copy(update=kept)
    raise AssertionError("every transition has its case")


_NO_POINT: dict[str, object] = {"point": None, "instant": None}
PROOF = (
    "give --fence PROGRAM, whose exit code proves that the old host is down, or vouch for it yourself: --source-is-gone"
)


def _remedy(now: GuestStanding) -> str:
    if now.state is GuestState.MOVING:
        return "wait until that move ends, or abort it: `snapchain migrate --abort`"
    if now.state in _UNDER_WAY:
        return "finish that first: run its command again on that host"
    if now.state is GuestState.PROTECTED:
        return "no move or failover of it is under way; `snapchain status` shows how it stands"
    return "`snapchain status` shows how it stands"


def describe(now: GuestStanding) -> str:
    """The state in a few words, such as `active on kvm2 in epoch 2, since 2026-11-30 04:10 UTC`."""
    words = now.state.value
    if now.state is GuestState.MOVING:
        words = "being moved" if now.master is None else f"being moved from {now.master}"
    elif now.master is not None:
        words = f"{words} on {now.master}" if now.state is not GuestState.PROTECTED else f"protected, of {now.master}"
    since = "" if now.time is None else f", since {now.time:%Y-%m-%d %H:%M} UTC"
    return f"{words} in epoch {now.epoch}{since}"


def describe_takeover(now: GuestStanding) -> str:
    """Who took a guest over, and on whose word; for the host that was its master before."""
    if not now.is_taken_over:
        owner = "another host" if now.master is None else f"{now.master}, or another host,"
        return f"{owner} writes the guest {now.guest} in epoch {now.epoch}"
    how = {None: "by a move", "fence": "by a failover after a fence program", "person": "by a failover"}
    kind = how[None if now.vouched is None else now.vouched.how]
    word = f", for which {now.vouched.who} vouched" if now.vouched and now.vouched.how == "person" else ""
    when = "" if now.time is None else f", {now.time:%Y-%m-%d %H:%M} UTC"
    return f"{now.master or 'another host'} has taken the guest {now.guest} over {kind}{word}: epoch {now.epoch}{when}"


def epoch_of(epochs: Sequence[int]) -> int:
    """The epoch of a guest whose disks are in these epochs. A repository counts from 0."""
    return max((1, *epochs))
