"""The disks of one guest, together: which requests make a set, and the commands that move them all."""

from __future__ import annotations

from collections.abc import Sequence

from snapchain.errors import InvalidInput
from snapchain.ops.disk_set import check_disks
from snapchain.ops.sync.request import Destination, SyncRequest
from snapchain.ops.sync.virsh import migrate_commands


def check_together(requests: Sequence[SyncRequest]) -> None:
    """Raises InvalidInput for requests that mean nothing, alone or together."""
    check_disks([(request.send.image, request.send.disk) for request in requests])
    for request in requests:
        request.check()
    guests = {(request.guest.domain, request.guest.uri) for request in requests if request.guest is not None}
    if len(guests) > 1:
        names = ", ".join(sorted({domain for domain, _ in guests}))
        raise InvalidInput(
            f"these are disks of several guests: {names}", hint="name the disks of one guest, or --domain"
        )
    targets = [request.guest.target for request in requests if request.guest is not None]
    if len(set(targets)) < len(targets):
        raise InvalidInput("two disks would be one disk of the guest", subject=", ".join(targets))


def commands_for(requests: Sequence[SyncRequest], disks: Sequence[Destination]) -> tuple[str, ...]:
    """One migration of all disks; nothing where a disk's place in the guest, or its overlay, is not known."""
    found = [
        (request.guest, disk.names, disk.overlay)
        for request, disk in zip(requests, disks, strict=True)
        if request.guest is not None and disk.overlay is not None
    ]
    return migrate_commands(found) if len(found) == len(disks) else ()
