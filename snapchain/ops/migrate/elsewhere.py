"""The guest's other destinations, as a migration of its disks asks and tells them (ops/other_destinations.py).

The other destinations hear of the handover before the destination is asked to take the disks: from then on each refuses
a failover that was decided without it.  Images that come back to an old state bear no marks, so a destination that does
not answer may be the one that knows better: an offline image is no proof that its host is the master.
"""

from __future__ import annotations

import socket
from contextlib import suppress

from snapchain.errors import NotFound, SnapchainError, Unsupported
from snapchain.image import scan
from snapchain.model.events import Notice, OnEvent
from snapchain.model.guest_state import Gone, GuestStanding, GuestState, Place
from snapchain.ops.guest_places import guest_named_by, own_places, places_of, told_of
from snapchain.ops.migrate.request import MigrateRequest
from snapchain.ops.other_destinations import OtherDestinations, Overtaken
from snapchain.replica.client import guest_at
from snapchain.replica.endpoint import Endpoint
from snapchain.source.ownership import mark_taken_over


class Elsewhere:
    """Asks them all. Disks that are named as no guest's have no other destinations that could be found."""

    def __init__(self, request: MigrateRequest, endpoint: Endpoint, on_event: OnEvent) -> None:
        self._request, self._on_event = request, on_event
        self._images = [move.image for move in request.moves]
        guests = {guest_named_by(move.disk) for move in request.moves}
        self._guest = guests.pop() if len(guests) == 1 else None
        self._target = Place(url=endpoint.url)
        self._others: OtherDestinations | None = None
        if self._guest is None:
            return
        places = list(places_of(self._images, self._guest))
        gone: tuple[Gone, ...] = ()
        with suppress(NotFound, Unsupported):  # a disk that is new there, or a snapchain that keeps no such records
            standing, _ = guest_at(endpoint, self._guest)
            self._target = standing.here or self._target
            places += standing.others
            gone = standing.gone
        own = [self._target, Place(url=endpoint.url), *own_places(self._images)]
        self._others = OtherDestinations(self._guest, places, request.reach, own=own, gone=gone, on_event=on_event)

    def check(self, epoch: int, token: str) -> None:
        """Raises Overtaken where another host has taken the guest over since this one wrote it in an epoch.

        Then its images are marked. token: of the handover, of which some may have heard already
        Raises Unavailable for a destination that is silent.
        """
        if self._others is None:
            return
        try:
            self._others.check_epoch(epoch, token=token, target=self._target)
        except Overtaken as overtaken:
            self._mark(overtaken.standing)
            raise
        self._others.check_silent()
        if self._others.words:
            self._on_event(Notice(self._others.words))

    def announce(self, epoch: int) -> None:
        """Before a guest moves while it runs: all others know of the destination to which it goes. Raises as `check`.

        A host that runs the guest adds no second master by moving it.  So another destination may be silent if it was
        told of this one before: whoever takes the guest over there asks here first.
        """
        if self._others is None:
            return
        self._others.check_epoch(epoch)
        self._others.allow(told_of(self._images, self._guest or "", self._target))
        self._others.check_silent()
        self._others.announce(self._target, by=socket.gethostname())

    def tell_afterwards(self, token: str, epoch: int) -> None:
        """They hear that the guest is there. One that does not, knows of the destination, and asks it."""
        if self._others is None:
            return
        try:
            self.tell(token, epoch)
        except SnapchainError as error:
            self._on_event(Notice(f"not every other destination has heard of the move: {error}"))

    def _mark(self, standing: GuestStanding) -> None:
        """Every later command here refuses without asking anybody."""
        url = self._target.url if standing.here is None else standing.here.url
        dirs = self._request.image_dirs
        for move in self._request.moves:
            kind = move.format or self._request.format
            with suppress(SnapchainError), scan(move.image, format=kind, image_dirs=dirs) as chain:
                mark_taken_over(chain, standing, destination=url, disk=move.disk, image_dirs=dirs)

    def tell(self, token: str, epoch: int) -> None:
        """They hear that the disks go to the destination, in an epoch. Raises as `OtherDestinations.follow`."""
        if self._others is not None:
            self._others.follow(self._decided(token, epoch, self._target.host), self._target, by=socket.gethostname())

    def tell_of_return(self, token: str, epoch: int) -> None:
        """They hear that the disks are this host's again. One that does not, asks the destination before a failover."""
        if self._others is None:
            return
        try:
            here = socket.gethostname()
            self._others.follow(self._decided(token, epoch, here), None, by=here, insists=False)
        except SnapchainError as error:
            self._on_event(Notice(f"not every other destination has heard of it: {error}"))

    def _decided(self, token: str, epoch: int, master: str | None) -> GuestStanding:
        assert self._guest is not None, "else nobody is told"
        return GuestStanding(
            guest=self._guest,
            number=0,
            state=GuestState.PROTECTED,
            epoch=epoch,
            master=master or "the destination's host",
            former=socket.gethostname(),
            token=token,
        )
