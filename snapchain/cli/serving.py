"""`snapchain serve-replica --stdio [--root DIR]` without the parser of command lines.

A sender waits for this process to start, at each sync anew, and the parser is a fifth of that.  Only what ssh and an
authorized_keys file say word for word is taken; anything else goes the usual way, to the same end.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from snapchain.cli import exits

LEFT_BEHIND = "what is durable stays; the sender goes on there"


def serve_directly(words: Sequence[str]) -> bool:
    """Whether this was such a command line; then it has been served. Raises SystemExit with what went wrong told."""
    match list(words):
        case ["serve-replica", "--stdio"]:
            root = None
        case ["serve-replica", "--stdio", "--root", directory] if directory and not directory.startswith("-"):
            root = Path(directory)
        case _:
            return False
    try:
        from snapchain.ops.serve_replica import serve_stdio

        serve_stdio(root=root)
    except BaseException as error:
        raise SystemExit(exits.tell(error, as_json=False, left_behind=LEFT_BEHIND)) from error
    return True
