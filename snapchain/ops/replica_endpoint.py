"""replica_endpoint: the replica that an address names. Apart, so that who is in a hurry can log in before all else."""

from __future__ import annotations

from snapchain.replica.endpoint import Endpoint, open_endpoint


def replica_at(dest: str, *, connections: int = 1) -> Endpoint:
    """The replica that an address names. connections: of ssh. Touches nothing. Raises InvalidInput."""
    return open_endpoint(dest, connections=connections)
