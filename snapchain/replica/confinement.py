"""Which directory a sender may name as the replica: the one that this side was told, one inside a root, or any."""

from __future__ import annotations

import os
from pathlib import Path

from snapchain.errors import InvalidInput
from snapchain.host.directory import place_to_change


def chosen(named: str | None, *, only: Path | None, within: Path | None) -> Path:
    """The replica's directory.

    named: by the sender; only: where this side knows it; within: it must be this directory or lie in it, symbolic
    links and `..` followed.  With neither, the sender is trusted as far as this process's user is.
    Raises InvalidInput, which tells nothing of what lies outside.
    """
    if only is not None:
        if named is not None and Path(named) != only:
            raise InvalidInput("only the replica of this server may be named", subject=ascii(named))
        return only
    if named is None or not named.startswith("/") or "\0" in named:
        raise InvalidInput("the replica's directory must be named, from the root on", subject=ascii(named))
    if within is None:
        return Path(named)
    # What is used afterwards is what was judged: no link is left in it that could be turned meanwhile by a sender,
    # who can make directories and files here, but no links.
    # Nor does somebody else choose by a link what lies within.
    real, root = Path(os.path.realpath(named)), place_to_change(within)
    if not real.is_relative_to(root):
        raise InvalidInput("only replicas in the directory that this server was given may be named", subject=named)
    return real
