"""A guest of one disk with a point at a replica, which another host takes over where that is asked for."""

from __future__ import annotations

from pathlib import Path

from snapchain.ops.failover.request import FailoverRequest
from snapchain.ops.failover.run import Failover
from snapchain.ops.fence.returned import FenceRequest, run as fence
from snapchain.replica.destination import ReplicaDestination
from snapchain.replica.endpoint import DirectoryEndpoint
from tests.ops.guest_points import Guest
from tests.ops.test_failover import WORD


def made_point(image: Path, replica: Path) -> Guest:
    """The disk web1/vda shows the image."""
    guest = Guest(replica.parent / "made", names=())
    guest.names, guest.images = ("vda",), {"vda": image}
    guest.ship(ReplicaDestination(DirectoryEndpoint(replica)), 1)
    return guest


def taken_over(image: Path, replica: Path, *, fenced: bool = False) -> None:
    """fenced: the old host knows it."""
    guest = made_point(image, replica)
    place = ReplicaDestination(DirectoryEndpoint(replica))
    request = FailoverRequest(directory=replica.parent / "over", host="kvm2", vouched=WORD)
    Failover(place, guest.guest, request).run()
    if fenced:
        fence(FenceRequest(disks=[(image, "web1/vda")], host="kvm1"), place)
