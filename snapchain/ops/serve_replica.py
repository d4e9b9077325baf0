"""serve_replica: the other end of ssh://, started there by the sender's ssh, and by nobody else.

The sender names the replica's directory and is trusted as far as the user is who logged in: it could as well have run
anything else.  Everything else that it says is judged.
"""

from __future__ import annotations

from snapchain.host.remote_lanes import accept_lanes
from snapchain.host.remote_stdio import stdio_channel
from snapchain.replica.receiver import receive

PATIENCE = 60.0
"""Seconds of silence after which a sender is given up: it says something every ten, and when its ssh has noticed a dead
link, after 75, and it comes again, this process must not hold the disk's lock any more."""


def serve_stdio() -> None:
    """Receive one stream from the standard streams. What goes wrong is told to the sender, and raised."""
    channel = accept_lanes(stdio_channel(patience=PATIENCE))
    if channel is not None:  # else this process was a lane of another's
        with channel:
            receive(channel)
