"""The replica that an address names. Apart from what is done with it, so that who is in a hurry can log in first."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from snapchain.host.ssh import is_remote, parse_remote_address
from snapchain.replica.endpoint import Endpoint, SshEndpoint, open_endpoint


def replica_at(dest: str, *, connections: int = 1) -> Endpoint:
    """The replica at ssh://... or dir:/... . connections: of ssh. Touches nothing. Raises InvalidInput."""
    if is_remote(dest):
        return open_endpoint(dest, connections=connections)
    from snapchain.replica.engine import ReplicaEngine  # inside: who logs in elsewhere first has no receiver here

    return open_endpoint(dest, engine=ReplicaEngine())


@contextmanager
def replica_ahead(dest: str, *, logins: int) -> Iterator[Endpoint]:
    """The replica at ssh://..., with ssh on its way already (SshEndpoint.ahead). Raises as that, and InvalidInput."""
    endpoint = SshEndpoint(parse_remote_address(dest))
    with endpoint.ahead(logins):
        yield endpoint


__all__ = ["Endpoint", "replica_ahead", "replica_at"]
