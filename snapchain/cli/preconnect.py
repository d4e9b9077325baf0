"""What starts before the parser of command lines is loaded: a login to a replica's host, and serving a sender.

ssh needs a third of a second for a login, in which it mostly waits; loading the parser and what reads images takes as
long. So where a command line clearly names one replica on another host, ssh starts first. A command line that turns
out to be wrong, or needs no connection, ends the login: nothing has been requested by then.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING

from snapchain.cli import exits
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
        with suppress(SnapchainError):  # the verb will raise it again, and report it
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


# --- `snapchain serve-replica --stdio`, as ssh or an authorized_keys file has it, without the parser
#
# A sender waits for this process to start, at each sync anew, and the parser takes a fifth of that. Only these exact
# command lines are served here; any other is parsed as usual, with the same result.

LEFT_BEHIND = "what is durable stays; the sender resumes there"
_WITH_VALUE = ("--root", "--allow", "--group")


def serve_directly(words: Sequence[str]) -> bool:
    """Whether this was such a command line; then it was served. Raises SystemExit after an error was shown."""
    options = _options(words)
    if options is None:
        return False
    try:
        from pathlib import Path

        from snapchain.ops.receive import serve_stdio

        root = options.get("--root")
        serve_stdio(
            root=None if root is None else Path(root),
            allow=options.get("--allow"),
            append_only="--append-only" in options,
            group=options.get("--group"),
        )
    except BaseException as error:
        raise SystemExit(exits.report(error, as_json=False, left_behind=LEFT_BEHIND)) from error
    return True


def _options(words: Sequence[str]) -> dict[str, str] | None:
    """The options of such a command line, each once, with their values; None for any other."""
    if list(words[:2]) != ["serve-replica", "--stdio"]:
        return None
    found: dict[str, str] = {}
    rest = iter(words[2:])
    for word in rest:
        value = next(rest, "") if word in _WITH_VALUE else word
        if word in found or not value or (word in _WITH_VALUE and value.startswith("-")):
            return None
        if word not in _WITH_VALUE and word != "--append-only":
            return None
        found[word] = value
    return found
