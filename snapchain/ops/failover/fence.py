"""The proof that an old host is down: a program of the user's, run twice, or a person's word that is recorded.

    SNAPCHAIN_HOOK=fence SNAPCHAIN_GUEST=web1 SNAPCHAIN_HOST=kvm1 SNAPCHAIN_DESTINATION=dir:/srv/replica
    SNAPCHAIN_EPOCH=2 SNAPCHAIN_ROUND=1

The program fences the host (power, switch port, cloud API), and exits with 0 only when that host surely is down.  The
second round is right before the guest is started: a host that came back meanwhile is noticed.
"""

from __future__ import annotations

import getpass
import os
import socket
from collections.abc import Sequence

from snapchain.errors import Conflict, InvalidInput, ToolFailed
from snapchain.host.hooks import missing, run_hook
from snapchain.host.terminal import shell_line
from snapchain.model.guest_state import PROOF, Vouched


def word_of_a_person(words: str = "") -> Vouched:
    """The word of the user who runs this command."""
    user = os.environ.get("SUDO_USER") or getpass.getuser()
    return Vouched(how="person", who=f"{user}@{socket.gethostname()}"[:250], words=words[:1000])


def check(fence: Sequence[str], vouched: Vouched | None, *, subject: str) -> None:
    """Raises Conflict without any proof, InvalidInput for two, ToolFailed for a program that is not there."""
    if fence and vouched is not None:
        raise InvalidInput("--fence and --source-is-gone exclude each other", hint="give one of them")
    if not fence and vouched is None:
        raise Conflict("there is no proof that its old host is down", subject=subject, hint=PROOF)
    if fence and (error := missing("fence", fence)) is not None:
        raise error


def proven(
    fence: Sequence[str],
    vouched: Vouched | None,
    *,
    guest: str,
    former: str | None,
    destination: str,
    epoch: int,
    round_: int,
) -> Vouched:
    """Run the program once; what is recorded. Raises Conflict when it does not prove that the old host is down."""
    if vouched is not None:
        return vouched
    facts = {"guest": guest, "host": former, "destination": destination, "epoch": epoch, "round": round_}
    try:
        run_hook("fence", fence, facts)
    except ToolFailed as error:
        raise Conflict(
            f"the fence program did not prove that the old host is down: {error.message}",
            subject=guest,
            hint="make sure that the old host is down; the guest is not started before that",
        ) from error
    who = f"{getpass.getuser()}@{socket.gethostname()}"
    return Vouched(how="fence", who=who[:250], words=shell_line(fence)[:1000])
