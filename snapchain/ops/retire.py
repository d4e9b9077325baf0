"""retire: a destination of a guest never comes back, so that no move and no failover waits for its word.

It may be the one at which the guest was taken over: a person vouches that it was not.  All others record that, with the
name.  From then on a silence of that destination is no reason to stop; and it cannot take the guest over by itself,
should it come back: it asks the others first, and they say that it is gone.
"""

from __future__ import annotations

import socket
from dataclasses import dataclass, field
from datetime import UTC, datetime

from pydantic import BaseModel, ConfigDict

from snapchain.destination.writing import Writing
from snapchain.errors import Conflict, InvalidInput, SnapchainError
from snapchain.model.events import Notice, OnEvent, ignore
from snapchain.model.guest_state import Gone, Place, describe
from snapchain.ops.guest_places import tell_gone
from snapchain.ops.other_destinations import OtherDestinations, Reach, is_meant, who


@dataclass(frozen=True, slots=True, kw_only=True)
class RetireRequest:
    """destination: the address or id of the one that is gone; undo: it is back; reach: how the others are reached"""

    destination: str
    undo: bool = False
    reach: Reach = field(default_factory=Reach)


class RetireReport(BaseModel):
    """destination: the one that is gone, or back; who: says so; told: the others that have recorded it

    silent: those that have not; they wait for its word as before
    """

    model_config = ConfigDict(frozen=True, defer_build=True)

    guest: str
    destination: str
    undo: bool
    who: str
    told: tuple[str, ...] = ()
    silent: tuple[str, ...] = ()


def retire(
    place: Writing, guest: str, request: RetireRequest, *, dry_run: bool = False, on_event: OnEvent = ignore
) -> RetireReport:
    """Record it at a destination that is there, and at all others that answer. dry_run: only what would be done

    May be repeated. Raises InvalidInput for what is no destination of the guest, Conflict for one that answers.
    """
    standing = place.guest_state(guest)
    own = [Place(url=place.url), *([] if standing.here is None else [standing.here])]
    known = [*standing.others, *([] if standing.at is None else [standing.at])]
    others = OtherDestinations(guest, known, request.reach, own=own, gone=standing.gone, on_event=on_event)
    said = _undone(others, request) if request.undo else _said(others, request)
    newest = others.newest(standing)
    if not request.undo and newest.at is not None and newest.at.is_same(said.place):
        raise Conflict(
            f"the guest was taken over there: it is {describe(newest)}",
            subject=said.place,
            hint="if that host is gone, too, fail over first: `snapchain failover`",
        )
    answering = [each for each in others.answers if each.standing is not None and not said.means(each.place)]
    told = [str(own[-1]), *(str(each.place) for each in answering)]
    silent = [each.place for each in others.answers if each.standing is None and not said.means(each.place)]
    if not dry_run:
        tell_gone(place, guest, said, by=socket.gethostname(), undo=request.undo)
        for each in answering:
            try:
                opened = request.reach.opens(each.place.url)
                tell_gone(opened, guest, said, by=socket.gethostname(), undo=request.undo)
            except SnapchainError as error:
                on_event(Notice(f"{each.place} was not told: {error}"))
                told.remove(str(each.place))
                silent.append(each.place)
    return RetireReport(
        guest=guest,
        destination=str(said.place),
        undo=request.undo,
        who=said.who,
        told=tuple(told),
        silent=tuple(map(str, silent)),
    )


def _said(others: OtherDestinations, request: RetireRequest) -> Gone:
    for each in others.answers:
        if is_meant(each.place, request.destination):
            if each.standing is not None:
                raise Conflict(
                    "it answers, and has the guest: it is not gone",
                    subject=each.place,
                    hint="as long as it answers, nothing waits for it",
                )
            return Gone(place=each.place, who=who(), time=datetime.now(UTC))
    for gone in others.gone:  # said before: those that have not heard of it are told
        if is_meant(gone.place, request.destination):
            return gone
    raise InvalidInput(
        "it is no other destination of the guest",
        subject=request.destination,
        hint="those are: " + (", ".join(map(str, (*others.places, *(g.place for g in others.gone)))) or "none"),
    )


def _undone(others: OtherDestinations, request: RetireRequest) -> Gone:
    for gone in others.gone:
        if is_meant(gone.place, request.destination):
            return gone
    raise InvalidInput(
        "no destination of the guest says that it is gone",
        subject=request.destination,
        hint="those that are: " + (", ".join(str(each.place) for each in others.gone) or "none"),
    )
