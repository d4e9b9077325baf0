"""The asking side of a guest's move to the host of a replica: one stream, kept for the length of the move."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from snapchain.errors import Corrupt
from snapchain.replica.endpoint import Endpoint
from snapchain.replica.stream.frames import Kind
from snapchain.replica.stream.guest_messages import HandedDisk, Move, MoveStep, Moving, MovingDomain
from snapchain.replica.stream.session import ClientSession, printable

_ALIVE_SECONDS = 5.0
"""The other side gives up a peer that is silent for much longer (guest_server.PATIENCE)."""


@dataclass(frozen=True, slots=True)
class MovingGuest:
    """Which guest moves, by which token. disks: as they are handed over; exports: their names in the guest.

    domain: of libvirt, None for a bare QEMU
    """

    token: str
    guest: str
    disks: Sequence[HandedDisk]
    exports: Sequence[str]
    domain: MovingDomain | None = None


class GuestMove:
    """A move that is under way. Use `moving`."""

    def __init__(self, session: ClientSession, endpoint: Endpoint, what: MovingGuest) -> None:
        self._session, self._endpoint, self._what = session, endpoint, what
        self._begun = False
        self._heard = time.monotonic()
        self.round_trip = float("inf")
        """Seconds: of the LOOK that was answered soonest."""
        self.clock_ahead = 0.0
        """Seconds that the other host's clock is ahead of the one here, known to half that round trip."""

    def step(
        self,
        step: MoveStep,
        *,
        argv: Sequence[str] = (),
        directory: str | None = None,
        qmp: str = "",
        nvram: Sequence[int] = (),
    ) -> Moving:
        """Have one step done there. Raises what the other side refuses with, Unavailable where no answer came."""
        request = Move(
            step=step,
            token=self._what.token,
            replica=self._endpoint.replica,
            guest=self._what.guest,
            by=socket.gethostname(),
            disks=tuple(self._what.disks),
            exports=tuple(self._what.exports),
            nvram=tuple(nvram),
            argv=tuple(argv),
            directory=directory,
            qmp=qmp or None,
            domain=self._what.domain,
        )
        asked, clock = time.monotonic(), time.time()
        if self._begun:
            self._session.request(Kind.MOVE, request)
        else:
            self._begun = True
            self._session.ask(Kind.MOVE, request)
        answer = self._session.decode(Moving, self._session.expect(Kind.MOVING))
        self._heard = time.monotonic()
        took = self._heard - asked
        if step is MoveStep.LOOK and took - answer.rehearsed < self.round_trip:
            self.round_trip, self.clock_ahead = took - answer.rehearsed, answer.clock - (clock + took / 2)
        for text in (
            answer.directory,
            *answer.overlays,
            *answer.nvram,
            answer.version or "",
            answer.machine or "",
            answer.libvirt,
            *(text for line in answer.view.items() for text in line),
        ):
            if printable(text) != text:
                raise Corrupt("it names an impossible file", subject=self._endpoint.url)
        return answer

    def keep_alive(self) -> Moving | None:
        """Say a word where none was said for a while; what came back. Raises as `step`."""
        if self._begun and time.monotonic() - self._heard >= _ALIVE_SECONDS:
            return self.step(MoveStep.LOOK)
        return None

    def stop(self) -> None:
        """End the stream in good order: all is done."""
        self._session.writer.send(Kind.STOP)
        self._session.expect(Kind.DONE)


@contextmanager
def moving(endpoint: Endpoint, what: MovingGuest) -> Iterator[GuestMove]:
    """A stream about one move. Left without `stop`, the other side settles what was begun in it by its record."""
    with endpoint.connect() as channel:
        move = GuestMove(ClientSession(channel), endpoint, what)
        try:
            yield move
        except BaseException:
            channel.abort()
            raise
