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

In protected, active, suspect and diverged the master may take a lease (lease.py): LEASE and UNLEASE leave the state as
it is, and RENEW the record.  A guest under a lease is not moved; PROMOTE keeps the lease, and START ends it.

A record is written with the number after the one that its writer has read, so of two writers one is refused.  SWITCH,
PROMOTE and WITHDRAW raise the epoch, and with it the epochs of all disks of the guest: these stay the guard that
refuses an old master's writes.  Where the disks are in a later epoch than the record, they have gone on without it.

A guest may have several destinations, each with a record of its own.  KNOW adds others to what one knows, and
says which of them are gone for good.  FOLLOW makes a record say that the guest was taken over at another destination:
from any state to protected, in that later epoch.  Whoever takes a guest over writes at one destination first, and then
at all others (ops/other_destinations.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from enum import StrEnum
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AwareDatetime,
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    StringConstraints,
    model_serializer,
    model_validator,
)

from snapchain.errors import Conflict
from snapchain.model.disk_name import LARGEST_EPOCH
from snapchain.model.lease import Lease

Name = Annotated[str, StringConstraints(min_length=1, max_length=250)]
Words = Annotated[str, StringConstraints(max_length=1000)]
Token = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{32}$")]
Address = Annotated[str, StringConstraints(min_length=1, max_length=4096)]
MOST_DISKS = 1000
"""Of one guest."""
MOST_PLACES = 32
"""Destinations of one guest."""


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
    KNOW = "know"
    FOLLOW = "follow"
    LEASE = "lease"
    RENEW = "renew"
    UNLEASE = "unlease"


class Part(BaseModel):
    """A stored value: exactly these fields."""

    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True)


class Vouched(Part):
    """The proof that the old master is gone.

    how: a fence program that succeeded twice, a person's word, or a lease that ran out
    who: the user and host that said so; words: the program, or what the person gave as the reason
    """

    how: Literal["fence", "person", "lease"]
    who: Name
    words: Words = ""


class Place(Part):
    """A destination of a guest, as one of its hosts has named it.

    id: that the destination gives itself, None where it is not known; url: its address, which may mean something else,
    or nothing, on another host; host: of a replica, the host that has it
    """

    id: Name | None = None
    url: Address
    host: Name | None = None

    @property
    def is_local(self) -> bool:
        """Whether the address is a path of one host."""
        return self.url.startswith(("/", "dir:", "file:"))

    def is_same(self, other: Place) -> bool:
        """Whether both are one destination: by the id where both have one."""
        if self.id is not None and other.id is not None:
            return self.id == other.id
        return self.url == other.url

    def __str__(self) -> str:
        return f"{self.url} on {self.host}" if self.is_local and self.host else self.url


def joined(*places: Place) -> tuple[Place, ...]:
    """Each destination once, in the order of their first mention; an address that other hosts can use is preferred."""
    found: list[Place] = []
    for place in places:
        at = next((number for number, each in enumerate(found) if each.is_same(place)), None)
        if at is None:
            found.append(place)
            continue
        best = min((found[at], place), key=lambda each: each.is_local)
        names = {"id": found[at].id or place.id, "host": found[at].host or place.host}
        found[at] = best.model_copy(update=names)
    return tuple(found)


def updated(known: Sequence[Place], more: Sequence[Place]) -> tuple[Place, ...]:
    """Known destinations, and more. A newer one takes the place of another at the same address, which is gone."""
    stays = [each for each in known if not any(new.url == each.url and not new.is_same(each) for new in more)]
    return joined(*stays, *more)


def apart_from(places: Sequence[Place], *own: Place | None) -> tuple[Place, ...]:
    """Those that are none of `own`."""
    return tuple(each for each in places if not any(mine is not None and each.is_same(mine) for mine in own))


class Gone(Part):
    """A destination that never comes back, as a person has said. who: the user and host that said so, and when"""

    place: Place
    who: Name
    time: AwareDatetime

    def means(self, place: Place | None) -> bool:
        """By the id where it has one: what is made anew at its address is another destination."""
        if place is None or self.place.id is not None:
            return place is not None and self.place.id == place.id
        return place.id is None and place.url == self.place.url

    def __str__(self) -> str:
        return f"{self.who} said so, {self.time:%Y-%m-%d %H:%M} UTC"


def gone_of(gone: Sequence[Gone], place: Place | None) -> Gone | None:
    """Whether a destination is gone, and who said it."""
    return next((each for each in gone if each.means(place)), None)


_OPTIONS = "others", "gone", "back", "at", "here", "epoch", "seen_epoch", "lease"
"""Fields that are written only where they say something: programs from before them refuse them."""


def _without_unset(fields: dict[str, Any], required: frozenset[str] = frozenset()) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value or name in required or name not in _OPTIONS}


class GuestStanding(Part):
    """A guest at a destination.

    number: 0 where nothing is recorded, else one more at each change; epoch: of the guest, and of all of its disks
    master: the host that may write the disks, None where no change has named it yet; former: the one before it
    token: of the move or failover that the state belongs to; by: the host that made the change
    vouched: why the former master counts as gone; point, instant: the guest point that was taken over
    lease: that the master holds; while the guest is promoting, that the former one held
    others: the guest's other destinations, and those of them that are gone; at: the one at which the master took it
    over, None for this one
    here: this destination, as it describes itself; never stored
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
    lease: Lease | None = None
    others: tuple[Place, ...] = Field(default=(), max_length=MOST_PLACES)
    gone: tuple[Gone, ...] = Field(default=(), max_length=MOST_PLACES)
    at: Place | None = None
    here: Place | None = None

    @model_serializer(mode="wrap")
    def _without_defaults(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return _without_unset(handler(self), frozenset({"epoch"}))

    @property
    def is_taken_over(self) -> bool:
        """Whether a host other than the first master may write the guest's disks."""
        return self.at is not None or self.state not in (GuestState.PROTECTED, GuestState.MOVING)

    @property
    def has_begun(self) -> bool:
        """Whether the guest may run at this destination's host, by a failover or a move to it."""
        return self.state not in (GuestState.PROTECTED, GuestState.MOVING, GuestState.PROMOTING)

    def overtakes(self, *, token: str, epoch: int) -> bool:
        """Whether another decision than the one with a token has made a host the master in an epoch, or a later one."""
        return self.is_taken_over and self.epoch >= epoch and self.token != token

    def for_older(self) -> GuestStanding:
        """As programs understand it that do not know of several destinations."""
        return self.model_copy(update={"others": (), "gone": (), "at": None, "here": None})


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
    lease: for LEASE; its token is the change's, as it is by RENEW and UNLEASE
    others: for KNOW, destinations that this one is to know; gone: those that never come back; back: those that did
    epoch: for FOLLOW, that of the takeover; for PROMOTE, the newest that is known of the guest anywhere, 0 if none is
    seen_epoch, at: for FOLLOW, the epoch that the caller has read here, and where the guest was taken over, None where
    it is its former host's again
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
    lease: Lease | None = None
    others: tuple[Place, ...] = Field(default=(), max_length=MOST_PLACES)
    gone: tuple[Gone, ...] = Field(default=(), max_length=MOST_PLACES)
    back: tuple[Place, ...] = Field(default=(), max_length=MOST_PLACES)
    epoch: int = Field(default=0, ge=0, le=LARGEST_EPOCH)
    seen_epoch: int = Field(default=0, ge=0, le=LARGEST_EPOCH)
    at: Place | None = None

    @model_serializer(mode="wrap")
    def _without_defaults(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return _without_unset(handler(self))

    @model_validator(mode="after")
    def _has_a_lease(self) -> Self:
        token = None if self.lease is None else self.lease.token
        if token != (self.token if self.transition is Transition.LEASE else None):
            raise ValueError("its lease is not that of the change")
        return self

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

    @property
    def of_lease(self) -> bool:
        """Whether it is about a lease, and leaves the state as it is."""
        return self.transition in (Transition.LEASE, Transition.RENEW, Transition.UNLEASE)

    @property
    def needs_several(self) -> bool:
        """Whether the other side must know of several destinations."""
        return self.transition in (Transition.KNOW, Transition.FOLLOW) or bool(self.epoch)


_UNDER_WAY = frozenset({GuestState.MOVING, GuestState.SWITCHED, GuestState.PROMOTING})
RAISES = frozenset({Transition.SWITCH, Transition.PROMOTE, Transition.WITHDRAW, Transition.FOLLOW})
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
    Transition.FOLLOW: (frozenset(GuestState), GuestState.PROTECTED),
}
"""From which states each is legal, and to which it leads. KNOW changes no state."""
_BEGIN = frozenset({Transition.MOVE, Transition.PROMOTE, Transition.FOLLOW})
"""These begin something; all other steps belong to what is under way or was done, and must name its token."""


def unrecorded(guest: str, epoch: int) -> GuestStanding:
    """A guest of which nothing is recorded. epoch: the latest of its disks"""
    return GuestStanding(guest=guest, number=0, state=GuestState.PROTECTED, epoch=epoch)


def as_disks_stand(
    record: GuestStanding | None, guest: str, epoch: int, *, master: str | None = None, at: Place | None = None
) -> GuestStanding:
    """How a guest stands. record: what is stored, None for nothing; epoch: the latest of its disks

    master, at: who writes the disks in that epoch, and where they were given to, as far as the disks tell
    Disks in a later epoch than the record were handed on without it: their master writes them, as before any change.
    """
    if record is None:
        return unrecorded(guest, epoch).model_copy(update={"master": master, "at": at})
    if epoch <= record.epoch:
        return record
    return GuestStanding(
        guest=guest,
        number=record.number,
        state=GuestState.PROTECTED,
        epoch=epoch,
        master=master,
        at=at,
        former=record.master,
        others=record.others,
        gone=record.gone,
    )


def is_done(now: GuestStanding, change: GuestChange) -> bool:
    """Whether a change was made already, by an earlier run whose answer was lost."""
    if change.transition is Transition.KNOW:
        return knows(now, change)
    if change.transition is Transition.FOLLOW and now.epoch != change.epoch:
        return False
    if change.transition is Transition.LEASE:
        return now.lease is not None and now.lease.token == change.token
    if change.transition is Transition.UNLEASE:
        return now.lease is None or now.lease.token != change.token
    if change.transition is Transition.RENEW:
        return True
    return (now.token, now.state, now.number) == (change.token, LEGAL[change.transition][1], change.seen + 1)


def knows(now: GuestStanding, change: GuestChange) -> bool:
    """Whether a destination knows all that KNOW says."""
    return (
        not apart_from(change.others, now.here, *now.others)
        and all(gone_of(now.gone, each.place) for each in change.gone)
        and not any(gone_of(now.gone, place) for place in change.back)
    )


def after(now: GuestStanding, change: GuestChange, *, time: datetime, subject: object) -> GuestStanding:
    """The next record. subject: names the guest at its destination, for errors

    Raises Conflict for a change that is not legal, is another move's, or was decided on an older record.
    """
    if change.seen != now.number:
        raise Conflict(
            f"the state of the guest was changed meanwhile: it is {describe(now)}", subject=subject, hint="run it again"
        )
    if change.transition is Transition.KNOW:
        known = updated(now.others, apart_from(change.others, now.here))
        if len(known) > MOST_PLACES:
            raise Conflict(f"a guest has at most {MOST_PLACES} destinations", subject=subject)
        if gone_of(change.gone, now.here):
            raise Conflict("it is said to be gone for good, and is here", subject=subject)
        new = [each for each in change.gone if not gone_of(now.gone, each.place)]
        lost = [each for each in (*now.gone, *new) if not any(map(each.means, change.back))][-MOST_PLACES:]
        said = {"number": now.number + 1, "time": time, "by": change.by, "others": known, "gone": tuple(lost)}
        return now.model_copy(update=said)
    if change.of_lease:
        return _leased(now, change, time=time, subject=subject)
    states, target = LEGAL[change.transition]
    if change.transition is Transition.WITHDRAW and now.vouched is None:
        states |= {GuestState.ACTIVE}  # a planned move goes back as long as its guest has written nothing
    begins = change.transition in _BEGIN or now.state is GuestState.PROTECTED
    if now.state not in states or not (begins or now.token == change.token):
        raise Conflict(f"the guest is {describe(now)}", subject=subject, hint=_remedy(now))
    if change.transition is Transition.PROMOTE and change.vouched is None:
        raise Conflict("there is no proof that its master is gone", subject=subject, hint=PROOF)
    _check_lease(now, change, subject=subject)
    if change.transition is Transition.FOLLOW and not _may_follow(now, change):
        raise Conflict(describe_takeover(now), subject=subject, hint="`snapchain status` shows how it stands")
    epoch = change.epoch if change.transition is Transition.FOLLOW else max(now.epoch, change.epoch) + 1
    if change.raises and epoch > LARGEST_EPOCH:
        raise Conflict(f"its epoch is {epoch - 1}, and there is none after it", subject=subject)
    kept: dict[str, object] = {"time": time, "by": change.by, "number": now.number + 1, "state": target}
    match change.transition:
        case Transition.MOVE:
            begun = {"token": change.token, "master": change.host, "former": None, "vouched": None, "at": None}
            return now.model_copy(update=kept | begun | _NO_POINT)
        case Transition.SWITCH | Transition.PROMOTE:
            is_elsewhere = change.epoch > now.epoch  # then the caller has heard of it what is not known here
            before = change.former if is_elsewhere else now.master or change.former
            former = before if before != change.host else now.former
            taken = {"token": change.token, "master": change.host, "former": former, "vouched": change.vouched}
            point = {"point": change.point, "instant": change.instant}
            return now.model_copy(update=kept | taken | point | {"epoch": epoch, "at": None})
        case Transition.WITHDRAW:
            back = {"master": now.former, "former": now.master, "vouched": None, "epoch": epoch}
            return now.model_copy(update=kept | back | _NO_POINT | {"lease": None})
        case Transition.FOLLOW:
            at = None if change.at is None or (now.here and now.here.is_same(change.at)) else change.at
            more = () if at is None else apart_from((at,), *now.others)
            taken = {"token": change.token, "master": change.host, "former": change.former, "vouched": change.vouched}
            where = {"epoch": epoch, "at": at, "others": (*now.others, *more)[:MOST_PLACES]}
            return now.model_copy(update=kept | taken | where | _NO_POINT | {"lease": None})
        case Transition.RETURN | Transition.DIVERGE:
            return now.model_copy(update=kept | {"former": change.host})
        case Transition.START:
            return now.model_copy(update=kept | {"lease": None})
        case Transition.ABORT | Transition.SETTLE:
            return now.model_copy(update=kept)
        case Transition.LEASE | Transition.RENEW | Transition.UNLEASE:
            raise AssertionError("told apart before")
    raise AssertionError("every transition has its case")


def _leased(now: GuestStanding, change: GuestChange, *, time: datetime, subject: object) -> GuestStanding:
    """After LEASE or UNLEASE; the state stays. Raises Conflict where another host may run the guest, or holds it."""
    kept: dict[str, object] = {"time": time, "by": change.by, "number": now.number + 1}
    if change.transition is Transition.UNLEASE:
        if now.state is GuestState.PROMOTING:
            raise Conflict(f"the guest is {describe(now)}", subject=subject, hint=_remedy(now))
        return now.model_copy(update=kept | {"lease": None})
    assert change.lease is not None, "checked when the change was made"
    is_others = now.is_taken_over and now.master not in (None, change.host)
    if now.state in _UNDER_WAY or is_others or change.lease.epoch != now.epoch:
        fact = f"no lease can be taken in epoch {change.lease.epoch}: the guest is {describe(now)}"
        hint = "if this host is its master, ship there with --epoch first; else start no guest on its images here"
        raise Conflict(fact, subject=subject, hint=hint)
    if now.lease is not None and now.lease.host != change.host:
        fact = f"the host {now.lease.host} holds a lease of the guest"
        raise Conflict(fact, subject=subject, hint="end the watch there, which ends the lease")
    return now.model_copy(update=kept | {"lease": change.lease})


def _check_lease(now: GuestStanding, change: GuestChange, *, subject: object) -> None:
    """Raises Conflict for a move of a guest under a lease, and for a failover by a lease that there is not."""
    if now.lease is not None and change.transition in (Transition.MOVE, Transition.SWITCH):
        fact = f"the guest runs under a lease of {now.lease.host}"
        raise Conflict(fact, subject=subject, hint="end its watch there, which ends the lease; then move it")
    if change.transition is not Transition.PROMOTE or change.vouched is None or change.vouched.how != "lease":
        return
    if now.lease is None or now.lease.is_witness or not now.lease.epoch == now.epoch >= change.epoch:
        raise Conflict("its master holds no lease that this destination grants", subject=subject, hint=PROOF)


def is_as_asked(now: GuestStanding, change: GuestChange) -> bool:
    """Whether an answer to a change says that it was made."""
    if change.of_lease or change.transition is Transition.KNOW:
        return is_done(now, change)
    return (change.token, LEGAL[change.transition][1]) == (now.token, now.state)


def _may_follow(now: GuestStanding, change: GuestChange) -> bool:
    """Whether a takeover at another destination is later than what is recorded here.

    In one epoch it replaces only what has started no guest: of two that meet, the caller decides which one yields.
    """
    if change.seen_epoch != now.epoch:
        return False
    if change.epoch == now.epoch:
        return now.state is GuestState.PROMOTING or (now.state is GuestState.PROTECTED and now.at is not None)
    return change.epoch > now.epoch


def outranks(theirs: GuestStanding, mine: GuestStanding, *, seen: GuestStanding | None) -> bool:
    """Whether what another destination has recorded counts before a takeover that is recorded as `mine` already.

    seen: how the guest stood there before that, None where it did not answer. The proof that the master is gone was
    made with that in view, so what has not changed since does not count.
    """
    if theirs.token == mine.token and theirs.epoch <= mine.epoch:
        return False
    if theirs.epoch > mine.epoch:
        return True
    if theirs.epoch == mine.epoch:
        has_followed = theirs.state is GuestState.PROTECTED and theirs.at is not None
        may_wait = has_followed or theirs.state is GuestState.PROMOTING
        return not may_wait or (theirs.token or "") > (mine.token or "")
    if seen is not None and (theirs.state, theirs.token, theirs.epoch) == (seen.state, seen.token, seen.epoch):
        return False
    was_written = seen is not None and theirs.epoch > seen.epoch and theirs.at is None and not theirs.has_begun
    return (theirs.has_begun or was_written) and theirs.master != mine.former


_NO_POINT: dict[str, object] = {"point": None, "instant": None}
PROOF = (
    "give --fence PROGRAM, whose exit code proves that the old host is down; or --lease, where the guest runs under "
    "one; or vouch for it yourself: --source-is-gone"
)
PROOF_WITHOUT_LEASE = "give --fence PROGRAM, or vouch for it yourself: --source-is-gone"


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
    where = "" if now.at is None else f", taken over at {now.at}"
    return f"{words} in epoch {now.epoch}{since}{where}"


def describe_takeover(now: GuestStanding) -> str:
    """Who took a guest over, and on whose word; for the host that was its master before."""
    if not now.is_taken_over:
        owner = "another host" if now.master is None else f"{now.master}, or another host,"
        return f"{owner} writes the guest {now.guest} in epoch {now.epoch}"
    how = {
        None: "by a move",
        "fence": "by a failover after a fence program",
        "lease": "by a failover after its lease ran out",
        "person": "by a failover",
    }
    kind = how[None if now.vouched is None else now.vouched.how]
    word = f", for which {now.vouched.who} vouched" if now.vouched and now.vouched.how == "person" else ""
    when = "" if now.time is None else f", {now.time:%Y-%m-%d %H:%M} UTC"
    where = "" if now.at is None else f" at {now.at}"
    taker = now.master or "another host"
    return f"{taker} has taken the guest {now.guest} over {kind}{word}{where}: epoch {now.epoch}{when}"


def epoch_of(epochs: Sequence[int]) -> int:
    """The epoch of a guest whose disks are in these epochs. A repository counts from 0."""
    return max((1, *epochs))
