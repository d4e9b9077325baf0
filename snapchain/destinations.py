"""The one door from an address to an opened destination.

open_destination("/backup", passphrase=...)              a repository
open_destination("s3://bucket/prefix", passphrase=...)   a repository
open_destination("ssh://root@kvm2/srv/replica")          a replica
open_destination("dir:/srv/replica")                     a replica
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from snapchain.destination.traits import REPLICA, REPOSITORY, Traits
from snapchain.errors import InvalidInput

if TYPE_CHECKING:
    from snapchain.destination.protocol import Destination
    from snapchain.model.compression import Compression
    from snapchain.replica.destination import ReplicaDestination
    from snapchain.replica.endpoint import Endpoint, GuestEndpoint

_REPLICAS = ("ssh://", "dir:")
Passphrase = Callable[[], str | None]


def traits_of(url: str) -> Traits:
    """What kind of destination an address means. Touches nothing."""
    return REPLICA if url.lower().startswith(_REPLICAS) else REPOSITORY


def open_destination(
    address: str | Path,
    *,
    passphrase: Passphrase = lambda: None,
    writing: bool = False,
    limit_rate: int | None = None,
    pack_size: int | None = None,
    compression: Compression | None = None,
    connections: int = 1,
    accept: str | None = None,
    endpoint: str | None = None,
    profile: str | None = None,
) -> Destination:
    """What lies at an address: dir:/path and ssh://[user@]host/path are replicas, everything else is a repository.

    passphrase: asked where it is encrypted; writing: whether points will be published, held or merged
    limit_rate: bytes a second to and from it; pack_size: bytes that new objects of a repository have at most
    compression: of guest data that are written to a repository
    connections: of ssh, to a replica; accept: id of a repository that is taken whatever this machine knew of it
    endpoint, profile: of S3, where they are not as boto3 finds them
    A replica is not touched here. Raises InvalidInput, NotFound where there is no repository, and Corrupt for another
    or an older one than this machine knows.
    """
    url = str(address)
    if traits_of(url) is REPLICA:
        if accept is not None:
            raise InvalidInput("a replica has no id that could be accepted", subject=url)
        if pack_size is not None:
            raise InvalidInput("a replica has no packs, so they have no size", subject=url)
        if compression is not None:
            raise InvalidInput("a replica keeps plain files: nothing is compressed there", subject=url)
        if endpoint is not None or profile is not None:
            raise InvalidInput("only s3:// has an endpoint and a profile", subject=url)
        return destination_at(replica_at(url, connections=connections), limit_rate=limit_rate)
    from snapchain.repository.destination import RepositoryDestination
    from snapchain.repository.opening import open_repository

    return RepositoryDestination(
        open_repository(
            url,
            passphrase=passphrase,
            writing=writing,
            limit_rate=limit_rate,
            pack_size=pack_size,
            compression=compression,
            accept=accept,
            endpoint=endpoint,
            profile=profile,
        )
    )


def check_is_made(url: str) -> None:
    """Raises InvalidInput for a kind that is not made in advance."""
    if traits_of(url) is REPLICA:
        raise InvalidInput(
            "this command takes a repository, and that is a replica",
            subject=url,
            hint="a replica needs no init: the first `snapchain ship IMAGE DEST::DISK` makes it",
        )


def replica_at(url: str, *, connections: int = 1) -> GuestEndpoint:
    """The endpoint of a replica. connections: of ssh. Touches nothing. Raises InvalidInput."""
    from snapchain.replica.endpoint import open_endpoint

    return open_endpoint(url, connections=connections)


def destination_at(endpoint: Endpoint, *, limit_rate: int | None = None) -> ReplicaDestination:
    """The replica that an endpoint leads to. limit_rate: bytes a second on the wire. Touches nothing."""
    from snapchain.replica.destination import ReplicaDestination

    return ReplicaDestination(endpoint, limit_rate=limit_rate)


@contextmanager
def preconnected_replica(url: str, *, logins: int) -> Iterator[Endpoint]:
    """The endpoint of a replica at ssh://..., with ssh already connecting. Raises as `SshEndpoint.ahead`."""
    from snapchain.host.ssh import parse_remote_address
    from snapchain.replica.endpoint import SshEndpoint

    endpoint = SshEndpoint(parse_remote_address(url))
    with endpoint.ahead(logins):
        yield endpoint
