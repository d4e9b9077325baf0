"""The other end of a channel over ssh: the standard streams that sshd has given this process.

From then on they are the channel's alone.  Whatever else in this process reads stdin finds it empty, and what prints to
stdout, be it a library or a program that we start, ends up on stderr, which ssh shows to the user, and not in the
stream.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from snapchain.host.remote_channel import PATIENCE, Channel


def stdio_channel(*, patience: float = PATIENCE) -> Channel:
    """The channel to whoever started us. To be called once, before anything is printed."""
    reader, writer = os.dup(0), os.dup(1)  # not inherited by programs that we start
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)
    return Channel(reader, writer, peer=caller(os.environ), patience=patience)


def caller(environ: Mapping[str, str]) -> str:
    """Who is at the other end, as sshd tells it."""
    words = environ.get("SSH_CONNECTION", "").split()
    return words[0] if words else "the other side"
