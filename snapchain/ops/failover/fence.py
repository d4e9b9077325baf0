"""The proof that an old host is down: a program of the user's, run twice, or a person's word that is recorded.

    SNAPCHAIN_HOOK=fence SNAPCHAIN_GUEST=web1 SNAPCHAIN_HOST=kvm1 SNAPCHAIN_DESTINATION=dir:/srv/replica
    SNAPCHAIN_EPOCH=2 SNAPCHAIN_ROUND=1 SNAPCHAIN_GUESTS="web1 db1"

The program fences the host (power, switch port, cloud API), and exits with 0 only when that host surely is down.  The
second round is right before the guest is started: a host that came back meanwhile is noticed.  Guests of one host that
are taken over together share its proof: a program that cuts the power does so once.
"""

from __future__ import annotations

import getpass
import os
import socket
import threading
import time
from collections.abc import Mapping, Sequence

from snapchain.errors import Conflict, InvalidInput, ToolFailed
from snapchain.host.hooks import missing, run_hook
from snapchain.host.terminal import shell_line
from snapchain.model.guest_state import PROOF, Vouched

_FRESH_SECONDS = 60.0
"""How long the second round counts for further guests of the host."""


def word_of_a_person(words: str = "") -> Vouched:
    """The word of the user who runs this command."""
    user = os.environ.get("SUDO_USER") or getpass.getuser()
    return Vouched(how="person", who=f"{user}@{socket.gethostname()}"[:250], words=words[:1000])


def check(fence: Sequence[str], vouched: Vouched | None, *, by_lease: bool = False, subject: str) -> None:
    """Raises Conflict without any proof, InvalidInput for two, ToolFailed for a program that is not there."""
    kinds = bool(fence) + (vouched is not None) + by_lease
    if kinds > 1:
        raise InvalidInput("--fence, --lease and --source-is-gone exclude each other", hint="give one of them")
    if not kinds:
        raise Conflict("there is no proof that its old host is down", subject=subject, hint=PROOF)
    if fence and (error := missing("fence", fence)) is not None:
        raise error


class Proofs:
    """The proofs of one command, from any thread: one old host is fenced once a round, for all of its guests.

    guests: all that are taken over, told to the program. The proof of the second round is right before a start: it
    counts for a minute.
    """

    def __init__(self, guests: Sequence[str] = ()) -> None:
        self._guests = tuple(guests)
        self._lock = threading.Lock()
        self._hosts: dict[str, threading.Lock] = {}
        self._found: dict[tuple[str, int], tuple[float, Vouched | Conflict]] = {}

    def proven(
        self,
        fence: Sequence[str],
        vouched: Vouched | None,
        *,
        guest: str,
        former: str | None,
        destination: str,
        epoch: int,
        round_: int,
    ) -> Vouched:
        """Run the program, unless it was run for that host; what is recorded.

        Raises Conflict when it does not prove that the old host is down, for each guest of that host.
        """
        if vouched is not None:
            return vouched
        host = f"host {former}" if former is not None else f"guest {guest}"  # one without a host shares no proof
        facts = {
            "guest": guest,
            "guests": " ".join(self._guests or (guest,)),
            "host": former,
            "destination": destination,
            "epoch": epoch,
            "round": round_,
        }
        with self._lock:
            turn = self._hosts.setdefault(host, threading.Lock())
        with turn:
            known = self._found.get((host, round_))
            if known is None or (round_ > 1 and time.monotonic() - known[0] >= _FRESH_SECONDS):
                proof = _run(fence, facts, guest)
                known = self._found[host, round_] = (time.monotonic(), proof)
        if isinstance(known[1], Conflict):
            raise Conflict(known[1].message, subject=guest, hint=known[1].hint) from known[1]
        return known[1]


def _run(fence: Sequence[str], facts: Mapping[str, object], guest: str) -> Vouched | Conflict:
    try:
        run_hook("fence", fence, facts)
    except ToolFailed as error:
        return Conflict(
            f"the fence program did not prove that the old host is down: {error.message}",
            subject=guest,
            hint="make sure that the old host is down; the guest is not started before that",
        )
    who = f"{getpass.getuser()}@{socket.gethostname()}"
    return Vouched(how="fence", who=who[:250], words=shell_line(fence)[:1000])
