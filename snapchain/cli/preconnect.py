"""Logging in to a replica's host while the command line is still being read.

ssh takes a third of a second to get there, in which it mostly waits; to load what reads command lines and images takes
as long.  So where the words plainly name one replica on another host, ssh starts first.  A command line that turns
out to be wrong, or needs no connection, ends the login: nothing has been asked of the other side by then.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING

from snapchain.errors import SnapchainError

if TYPE_CHECKING:
    from snapchain.replica.endpoint import Endpoint

_LOGINS = {"send": 1, "sync": 3}
"""How many connections a verb makes; of sync one may prove not to be needed."""
_OTHERWISE = ("-h", "--help", "--connections", "--check", "--dry-run")
_SCHEME = "ssh://"
_begun: dict[str, Endpoint] = {}


@contextmanager
def logging_in(words: Sequence[str]) -> Iterator[None]:
    """While the block runs, `endpoint_at` may give an endpoint that is under way."""
    dest = _replica_of(words)
    if dest is None:
        yield
        return
    from snapchain.destinations import preconnected_replica

    with ExitStack() as stack:
        with suppress(SnapchainError):  # the verb will meet it again, and say it
            _begun[dest] = stack.enter_context(preconnected_replica(dest, logins=_LOGINS[words[0]]))
        try:
            yield
        finally:
            _begun.clear()


def endpoint_at(dest: str, *, connections: int = 1) -> Endpoint:
    """The replica that an address names, as `replica_at`."""
    from snapchain.destinations import replica_at

    known = _begun.get(dest)
    return known if known is not None and connections == 1 else replica_at(dest, connections=connections)


def _replica_of(words: Sequence[str]) -> str | None:
    """The one replica over ssh that a command line names, which names a file that is there, and nothing unusual."""
    if not words or words[0] not in _LOGINS or any(word.startswith(_OTHERWISE) for word in words):
        return None
    named = [word for word in words if word.startswith(_SCHEME)]
    if len(named) != 1 or "::" not in named[0]:
        return None
    with suppress(OSError, ValueError):
        if any(os.path.exists(word) for word in words[1:3]):  # noqa: PTH110 - before pathlib is worth its time
            return named[0].rpartition("::")[0]
    return None
