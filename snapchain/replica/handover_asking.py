"""Asking a replica to become the master of disks, or to give them back; nothing that it says is believed unjudged."""

from __future__ import annotations

from collections.abc import Sequence

from snapchain.errors import Corrupt
from snapchain.replica.client import answers, unexpected
from snapchain.replica.endpoint import Endpoint
from snapchain.replica.stream import opening
from snapchain.replica.stream.frames import Kind
from snapchain.replica.stream.handover_messages import Handed, HandedDisk, Handover, Standing, Step
from snapchain.replica.stream.messages import decode


def ask_for_handover(
    endpoint: Endpoint, step: Step, disks: Sequence[HandedDisk], *, token: str
) -> tuple[Standing, ...]:
    """How each disk stands after that step, in their order. May be asked again with the same token.

    Raises what the replica refuses with: then nothing was changed there; Unavailable where that is not known.
    """
    asked = Handover(step=step, token=token, disks=tuple(disks), replica=endpoint.replica)
    found: tuple[Standing, ...] | None = None
    with endpoint.connect() as channel:
        for frame in answers(channel, Kind.HANDOVER, asked, feature=opening.HANDOVER_FEATURE):
            if frame.kind is not Kind.HANDED or found is not None:
                raise unexpected(frame, channel)
            found = decode(Handed, frame.body, subject=channel.peer).disks
    if found is None or [each.disk for each in found] != [each.disk for each in disks]:
        raise Corrupt("it has not told of the disks that it was asked about", subject=endpoint.url)
    for disk, standing in zip(disks, found, strict=True):
        name = f"/{disk.overlay.name}"
        if not standing.overlay.startswith("/") or not standing.overlay.isprintable():
            raise Corrupt("it names a file that cannot be", subject=endpoint.url)
        done = step is Step.LOOK or (standing.given, standing.epoch) == (step is Step.GIVE, disk.epoch)
        if not standing.overlay.endswith(name) or not done:
            raise Corrupt("it has not done what it was asked for", subject=endpoint.url)
    return found
