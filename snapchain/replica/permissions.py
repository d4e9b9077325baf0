"""What a peer may request from a receiver: checked in one place, before anything is done.

    send      OPEN, and what follows: layers, points, leaf hashes, a look at the disk and its overlay
    fetch     FETCH: the data of points
    cut       CUT: dropping layers and points
    merge     MERGE: keeping some points, and merging the layers of the others; RELEASE; where the newest point may go,
              `cut` too
    handover  HANDOVER, a GUEST that changes a state, and an ACTIVE that makes an overlay: the disk's master changes;
              a GUEST that only names other destinations needs `send`, since it can take none away
    epochs    an OPEN that skips epochs, or ends a handover, because a human has named it
    guests    MOVE: programs are started here, with a command line of the peer: as much as a login

ASK, the points and their soundness, needs `send` or `fetch`: either shows as much; so does a GUEST that only
looks. HOLD needs `send` or `merge`. Which request needs which right is in `stream.requests.REQUESTS`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from snapchain.errors import InvalidInput
from snapchain.host.path_resolution import place_to_change
from snapchain.model.guest_state import Transition
from snapchain.replica.stream.frames import Kind
from snapchain.replica.stream.guest_messages import AskGuest
from snapchain.replica.stream.messages import Active, Merge, Message, Open
from snapchain.replica.stream.requests import REQUESTS, Right

_APPENDING = frozenset({Right.SEND, Right.FETCH})
"""Rights with which nothing that is there can be removed or replaced."""


@dataclass(frozen=True, slots=True)
class Permissions:
    """What one peer may do. append_only: for messages; then `granted` has no right to remove or replace anything."""

    granted: frozenset[Right]
    append_only: bool = False

    def check(self, kind: Kind, request: Message, *, subject: str) -> None:
        """Raises InvalidInput, which names the right that is missing, and how it is granted."""
        needed = REQUESTS[kind].rights
        if kind is Kind.ACTIVE and isinstance(request, Active) and request.make:
            needed = frozenset({Right.HANDOVER})
        if kind is Kind.GUEST and isinstance(request, AskGuest) and request.change is not None:
            change = request.change
            only_adds = change.transition is Transition.KNOW and not change.gone and not change.back
            needed = frozenset({Right.HANDOVER, Right.SEND} if only_adds else {Right.HANDOVER})
        if kind is Kind.OPEN and isinstance(request, Open) and request.by_name:
            self._check(frozenset({Right.EPOCHS}), "skip epochs, or end a handover", subject)
        if kind is Kind.MERGE and isinstance(request, Merge) and request.newest:
            self._check(frozenset({Right.CUT}), "drop the newest point", subject)
        self._check(needed, kind.name, subject)

    def _check(self, needed: frozenset[Right], what: str, subject: str) -> None:
        if needed & self.granted:
            return
        right = min(needed, default=Right.SEND)
        if self.append_only:
            raise InvalidInput(
                f"{what} is not allowed: this server is append-only, and the right {right.value!r} is missing",
                subject=subject,
                hint="do it on the replica's host, with dir:/path in the place of ssh://host/path",
            )
        words = ",".join(each.value for each in Right if each in self.granted | {right})
        raise InvalidInput(
            f"{what} is not allowed: this key lacks the right {right.value!r}",
            subject=subject,
            hint="to grant it, change the key's line in authorized_keys on the replica's host: "
            f'command="snapchain serve-replica --stdio --root DIR --allow {words}"',
        )


EVERYTHING = Permissions(frozenset(Right))
"""For whoever works as the user of the replica: on its host, or logged in there with a shell."""
CONFINED = Permissions(frozenset(Right) - {Right.EPOCHS, Right.GUESTS})
"""For a key that sshd confines to this program."""


def parse_permissions(allowed: str | None, *, append_only: bool, confined: bool) -> Permissions:
    """From `--allow`, a comma-separated set, and `--append-only`.

    confined: whether the peer can do nothing here but what this program lets it do
    Raises InvalidInput for a word that is no right, and for a right that an append-only server cannot grant.
    """
    if allowed is None:
        if append_only:
            return Permissions(_APPENDING, append_only=True)
        return CONFINED if confined else EVERYTHING
    granted = frozenset(_parse(allowed.split(",")))
    if append_only and (more := granted - _APPENDING):
        raise InvalidInput(
            f"--append-only excludes {', '.join(sorted(more))}", hint="leave out --append-only, or those rights"
        )
    return Permissions(granted, append_only=append_only)


def _parse(words: Iterable[str]) -> Iterable[Right]:
    for word in words:
        try:
            yield Right(word.strip())
        except ValueError:
            known = ", ".join(each.value for each in Right)
            raise InvalidInput(f"--allow does not support {word!a}", hint=f"rights: {known}") from None


# --- which directory a sender may name as the replica


def chosen(named: str | None, *, only: Path | None, within: Path | None) -> Path:
    """The replica's directory.

    named: by the sender; only: where this side knows it; within: it must be this directory or lie in it, symbolic
    links and `..` followed.  With neither, the sender may do what the user of this process may do.
    Raises InvalidInput, which reveals nothing about what lies outside.
    """
    if only is not None:
        if named is not None and Path(named) != only:
            raise InvalidInput("only the replica of this server may be named", subject=ascii(named))
        return only
    if named is None or not named.startswith("/") or "\0" in named:
        raise InvalidInput("the replica's directory must be named, from the root on", subject=ascii(named))
    if within is None:
        return Path(named)
    # The path that is used is the one that was checked: no link is left in it that a sender could change meanwhile. A
    # sender can make directories and files here, but no links. Nor does somebody else choose by a link what lies
    # within.
    real, root = Path(os.path.realpath(named)), place_to_change(within)
    if not real.is_relative_to(root):
        raise InvalidInput("only replicas in the directory that this server was given may be named", subject=named)
    return real
