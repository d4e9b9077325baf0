"""The other destinations of a guest: asked, and told, by whoever decides which host runs it.

    ask      how the guest stands at all destinations that this one, the caller, or one of those names
    check    a destination that does not answer may be the one at which the guest was taken over: only a word goes on
    follow   first the caller has written its decision at its own destination; now each other one is told of it

Of two that decide at the same time each writes at its own destination before it asks the other's, so at least one of
them finds the other's decision, and yields.  Nothing is used, defined or started before all others were told.  From
then on each of them refuses the old master, and whoever would take the guest over there finds out where it is.
"""

from __future__ import annotations

import getpass
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from snapchain.destination.address import located
from snapchain.destination.writing import Writing
from snapchain.errors import Conflict, InvalidInput, SnapchainError, Unavailable, Unsupported
from snapchain.host.terminal import shell_line
from snapchain.model.events import Notice, OnEvent, ignore
from snapchain.model.guest_state import (
    Gone,
    GuestChange,
    GuestStanding,
    Place,
    Transition,
    apart_from,
    describe_takeover,
    gone_of,
    joined,
    outranks,
)
from snapchain.ops import guest_places

Opens = Callable[[str], Writing]
_TRIES = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Reach:
    """How this host reaches a guest's other destinations.

    at: addresses of some, as this host has them; without: addresses or ids of those that need not answer: the caller
    vouches that the guest was not taken over there; opens: opens an address
    """

    at: Sequence[str] = ()
    without: Sequence[str] = ()
    opens: Opens = guest_places.open_other


class Overtaken(Conflict):
    """Another host has decided at another destination, and counts. standing: of the guest there"""

    def __init__(self, standing: GuestStanding) -> None:
        super().__init__(
            describe_takeover(standing),
            subject=standing.guest if standing.here is None else f"{standing.here.url}::{standing.guest}",
            hint="start it on that host only; `snapchain status` shows how it stands",
        )
        self.standing = standing


@dataclass(frozen=True, slots=True)
class Answer:
    """A destination. standing: of the guest there, None where it is silent; fault: why that is"""

    place: Place
    standing: GuestStanding | None = None
    fault: str = ""


class OtherDestinations:
    """Of one guest. own: destinations that are not asked: the caller's own, and that to which the guest goes."""

    def __init__(
        self,
        guest: str,
        places: Sequence[Place],
        reach: Reach,
        *,
        own: Sequence[Place],
        gone: Sequence[Gone] = (),
        on_event: OnEvent = ignore,
    ) -> None:
        """Asks them all. places: as this host names them; gone: those of them that are, as a destination says"""
        self._guest, self._reach, self._on_event = guest, reach, on_event
        self._places, self._own = joined(*places), own
        self._may_be_silent: Callable[[Place], bool] = lambda _: False
        self._said_gone = tuple(gone)
        self.answers: tuple[Answer, ...] = ()
        self.gone: tuple[Gone, ...] = ()
        self.ask()

    def ask(self) -> None:
        """Ask all of them anew, and those that they name."""
        found: list[Answer] = []
        for url in self._reach.at:
            if (answer := self._asked(Place(url=located(url)), is_named=True)).standing is None:
                raise Unavailable(f"it does not answer: {answer.fault}", subject=url, hint="leave out --at, or mend it")
            found.append(answer)
        left = list(self._places)
        for answer in found:
            left += _named_by(answer)
        while left:
            place = left.pop(0)
            if apart_from((place,), *self._own, *(each.place for each in found)):
                found.append(self._asked(place, is_named=place in self._places))
                left += _named_by(found[-1])
        self.gone = (*self._said_gone, *(gone for each in found if each.standing for gone in each.standing.gone))
        others = (each for each in found if apart_from((each.place,), *self._own))
        self.answers = tuple(each for each in others if each.standing or not gone_of(self.gone, each.place))

    def _asked(self, place: Place, *, is_named: bool) -> Answer:
        """is_named: whether this host has named it, so that its address is surely meant here"""
        if place.id is None and place.is_local and not is_named:
            return Answer(place, fault="it is known only by a path on another host")
        try:
            standing = self._reach.opens(place.url).guest_state(self._guest)
        except SnapchainError as error:
            return Answer(place, fault=str(error))
        here = standing.here
        if place.id is not None and here is not None and here.id != place.id:
            return Answer(place, fault="another destination is at that address")
        if here is None:
            return Answer(place, standing)
        return Answer(joined(place, here)[0].model_copy(update={"url": place.url}), standing)

    # --- what they say

    @property
    def places(self) -> tuple[Place, ...]:
        """All of them."""
        return tuple(each.place for each in self.answers)

    @property
    def silent(self) -> tuple[Answer, ...]:
        """Those that do not answer, but for those whose word was given."""
        for word in self._reach.without:
            if not any(is_meant(each.place, word) for each in self.answers):
                raise InvalidInput(
                    "it is no other destination of the guest",
                    subject=word,
                    hint="those are: " + (", ".join(map(str, self.places)) or "none"),
                )
        silent = (each for each in self.answers if each.standing is None)
        return tuple(each for each in silent if not self._is_excused(each.place))

    def _is_excused(self, place: Place) -> bool:
        return self._may_be_silent(place) or self._is_vouched(place)

    def _is_vouched(self, place: Place) -> bool:
        return any(is_meant(place, word) for word in self._reach.without)

    @property
    def words(self) -> str:
        """What is recorded where a destination need not answer: which, and who has said so."""
        names = [str(each.place) for each in self.answers if each.standing is None and self._is_vouched(each.place)]
        return f"without {', '.join(names)}, as {who()} says" if names else ""

    def newest(self, *known: GuestStanding) -> GuestStanding:
        """The latest of what they and the caller know. Raises ValueError where nobody knows anything."""
        standings = [*known, *(each.standing for each in self.answers if each.standing is not None)]
        return max(standings, key=lambda each: (each.epoch, each.master is not None, each.has_begun))

    def vouch_for_all(self) -> None:
        """A person has said of all that do not answer that the guest was not taken over there."""
        self._may_be_silent = lambda _: True

    def allow_down(self, host: str | None) -> None:
        """A host is proven to be down: a replica on it can have made no other host the master since.

        Not for a name that several hosts may have.
        """
        if host and host != socket.gethostname() and not host.startswith("localhost"):
            self._may_be_silent = lambda place: place.host == host

    def allow(self, places: Sequence[Place]) -> None:
        """These need not answer now: before a failover they would ask the caller's destination."""
        self._may_be_silent = lambda place: not apart_from((place,), *places)

    def check_silent(self) -> None:
        """Raises Unavailable for a destination that does not answer, unless it may, or the caller vouches for it.

        Conflict where the others count the caller's own as gone: they have not asked it before they decided.
        """
        for place in self._own:
            if (said := gone_of(self.gone, place)) is not None:
                raise Conflict(
                    f"the guest's other destinations count it as gone for good: {said}",
                    subject=f"{place}::{self._guest}",
                    hint="take the guest over at one of those; if this one is back for good: `snapchain retire --undo`",
                )
        for each in self.silent:
            raise Unavailable(
                f"the guest may have been taken over there, and it does not answer: {each.fault}",
                subject=f"{each.place}::{self._guest}",
                hint="name it as this host reaches it: --at DEST; or, if you are sure that it was not: "
                + shell_line(["--without", each.place.url]),
            )

    def check_epoch(self, epoch: int, *, token: str | None = None, target: Place | None = None) -> None:
        """Raises Overtaken where a destination is in a later epoch than the caller, who writes the guest's disks.

        token: of the caller's own decision, of which some have heard; target: the destination that the caller asks
        itself, and that decides where others say that the guest is there
        """
        for each in self.answers:
            now = each.standing
            if now is None or now.epoch <= epoch or (token is not None and now.token == token):
                continue
            is_there = target is not None and (now.master == target.host if now.at is None else now.at.is_same(target))
            if not is_there or now.has_begun:
                raise Overtaken(now)

    # --- what they are told

    def announce(self, target: Place, *, by: str) -> None:
        """Have all that answer know of the destination to which the guest goes. Raises as `Writing.change_guest`."""
        for each in self.answers:
            if each.standing is not None and apart_from((target,), *each.standing.others):
                self._told(each, lambda opened: guest_places.tell_others(opened, self._guest, [target], by=by))

    def follow(self, mine: GuestStanding, at: Place | None, *, by: str, insists: bool = True) -> None:
        """Tell all others of a decision that is recorded already. May be repeated.

        insists: one that does not answer any more, and must, stops it before any is told

        mine: with its epoch, token, master and former; at: the destination at which it was made, None for a guest that
        is its old host's again
        Raises Overtaken where another decision counts, Unavailable and what else keeps one from hearing of this.
        """
        before = {each.place.url: each.standing for each in self.answers}
        self.ask()
        for each in self.answers:
            if each.standing is None or _says_so(each.standing, mine, at):
                continue
            if outranks(each.standing, mine, seen=before.get(each.place.url)):
                raise Overtaken(each.standing)
        if insists:
            self.check_silent()
        for each in self.answers:
            if each.standing is not None:
                self._follow(each, mine, at, by, before.get(each.place.url))

    def _follow(
        self, answer: Answer, mine: GuestStanding, at: Place | None, by: str, seen: GuestStanding | None
    ) -> None:
        def one(opened: Writing) -> None:
            for attempt in range(_TRIES):
                now = opened.guest_state(self._guest)
                if _says_so(now, mine, at):
                    return
                if outranks(now, mine, seen=seen):
                    raise Overtaken(now)
                try:
                    opened.change_guest(follow_change(now, mine, at, by=by))
                except Conflict:
                    if attempt == _TRIES - 1:
                        raise
                else:
                    return

        self._told(answer, one, knows=at is not None and not apart_from((at,), *(answer.standing or mine).others))

    def _told(self, answer: Answer, tell: Callable[[Writing], object], *, knows: bool = False) -> None:
        """knows: whether it would ask the decider's destination by itself, so that it need not hear of this"""
        try:
            tell(self._reach.opens(answer.place.url))
        except Unsupported as error:
            self._on_event(Notice(f"{answer.place} cannot hear of this, and does not ask others: {error}"))
        except InvalidInput as error:  # a key that may not change states
            if not knows and not self._is_excused(answer.place):
                raise
            self._on_event(Notice(f"{answer.place} was not told, and must ask others first: {error}"))
        except Unavailable:
            if not self._is_excused(answer.place):
                raise


def follow_change(now: GuestStanding, mine: GuestStanding, at: Place | None, *, by: str) -> GuestChange:
    """The step by which a destination hears of a decision. now: how the guest stands there; mine, at: as `follow`."""
    return GuestChange(
        guest=now.guest,
        transition=Transition.FOLLOW,
        seen=now.number,
        seen_epoch=now.epoch,
        token=mine.token or "",
        by=by,
        host=mine.master or by,
        former=mine.former,
        vouched=mine.vouched,
        epoch=mine.epoch,
        at=at,
    )


def who() -> str:
    """The user who gives a word, and this host."""
    return f"{os.environ.get('SUDO_USER') or getpass.getuser()}@{socket.gethostname()}"[:250]


def _says_so(now: GuestStanding, mine: GuestStanding, at: Place | None) -> bool:
    """Whether a destination has heard of a decision, or of one for the same place, such as of another disk."""
    if now.epoch != mine.epoch:
        return False
    return now.token == mine.token or (at is not None and now.at is not None and now.at.is_same(at))


def _named_by(answer: Answer) -> Iterator[Place]:
    """Destinations that one knows of. Where its host has given the guest on, the address is that host's."""
    if answer.standing is not None:
        yield from answer.standing.others
        if answer.standing.at is not None:
            yield answer.standing.at


def is_meant(place: Place, word: str) -> bool:
    """Whether an id or an address that a person gives is that of a destination."""
    return word in (place.id, place.url) or located(word) == place.url


__all__ = ["Answer", "OtherDestinations", "Overtaken", "Reach", "follow_change", "is_meant", "who"]
