"""`snapchain serve-replica --stdio`, as an authorized_keys file has it, without the parser of command lines.

A sender waits for this process to start, at each sync anew, and the parser is a fifth of that.  Only what ssh and an
authorized_keys file say word for word is taken; anything else goes the usual way, to the same end.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from snapchain.cli import exits

LEFT_BEHIND = "what is durable stays; the sender goes on there"


_WITH_VALUE = ("--root", "--allow", "--group")


def serve_directly(words: Sequence[str]) -> bool:
    """Whether this was such a command line; then it has been served. Raises SystemExit with what went wrong told."""
    options = _options(words)
    if options is None:
        return False
    try:
        from snapchain.ops.serve_replica import serve_stdio

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
