"""What a watch does to its guest and to its destinations: each call opens what it needs, and closes it again."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC
from pathlib import Path

from snapchain.destination.protocol import Destination
from snapchain.errors import InvalidInput
from snapchain.guest.address import GuestAddress
from snapchain.guest.disks import active_path, disks_to_protect, find_disk
from snapchain.guest.protocol import Guest, State
from snapchain.guest.snapshot import GuestSnapshot, SnapshotRequest
from snapchain.merge.pace import Pace
from snapchain.merge.request import At, MergeRequest
from snapchain.merge.run import MergeReport
from snapchain.merge.stack import held_by
from snapchain.model.events import OnEvent, ignore
from snapchain.model.retention import Policy
from snapchain.ops import guest_points_merge
from snapchain.ops.guest_chain_merge import plan_disk, run_disk
from snapchain.ops.guest_seal import as_named_now, epoch_of, seal
from snapchain.ops.merge import held_at
from snapchain.ops.ship import guest as ship
from snapchain.ops.watch.door import GuestDoor
from snapchain.ops.watch.rounds import DiskSight, Range
from snapchain.ops.watch.run import HeldAt, Look, Shipped
from snapchain.source.at_rest import ImageAtRest
from snapchain.source.protocol import Scope


@dataclass(frozen=True, slots=True, kw_only=True)
class WatchRequest:
    """What is watched, and how.

    name: of the guest at the destinations, None for its own; snapshot: how it is taken, with its labels
    policy: which guest points a destination keeps; idle: merge slowly enough that the guest does not feel it
    """

    guest: GuestAddress
    name: str | None = None
    snapshot: SnapshotRequest = field(default_factory=SnapshotRequest)
    policy: Policy = field(default_factory=Policy)
    idle: bool = True


class GuestWork:
    """The Work of one guest. destinations: name -> opens it anew; raises what opening raises

    door: by which the guest is opened, None for one of its own
    """

    def __init__(
        self,
        request: WatchRequest,
        destinations: Mapping[str, Callable[[], Destination]],
        *,
        door: GuestDoor | None = None,
        on_event: OnEvent = ignore,
    ) -> None:
        self._request, self._open, self._on_event = request, destinations, on_event
        self._guest = (door or GuestDoor(request.guest, on_event=on_event)).opened
        self._opened: dict[str, Destination] = {}

    @contextmanager
    def _at(self, target: str) -> Iterator[Destination]:
        """A destination, opened once a round: a directory that is held open for days could not be unmounted."""
        try:
            if target not in self._opened:
                self._opened[target] = self._open[target]()
            yield self._opened[target]
        except BaseException:
            self._opened.pop(target, None)
            raise

    def _name(self, guest: Guest) -> str:
        return self._request.name or guest.name

    def look(self, held: Mapping[str, HeldAt], snapshot: GuestSnapshot | None) -> Look:
        """See `Work`."""
        with self._guest() as guest:
            disks = tuple(
                self._sight(disk.name, active_path(disk, guest=guest), disk.active.known_format, held)
                for disk in disks_to_protect(guest, self._request.snapshot.disks)
            )
            is_newest = snapshot is not None and as_named_now(guest, snapshot) is not None
            return Look(self._name(guest), disks, is_newest)

    def _sight(self, name: str, active: Path, image_format: str | None, held: Mapping[str, HeldAt]) -> DiskSight:
        at = [At(target, tuple(layers.get(name, ()))) for target, layers in held.items()]
        image_dirs = (*self._request.snapshot.image_dirs, active.parent)
        source = ImageAtRest(active, format=image_format, image_dirs=image_dirs, on_event=self._on_event)
        try:
            with source.opened(Scope.SEALED) as chain:
                source.check_not_given(chain)
                sealed = tuple(_allocated(file.path) for file in chain.files)
                counts = held_by(chain, at)
        except InvalidInput:  # nothing is sealed yet
            sealed, counts = (), [0] * len(at)
        return DiskSight(
            name=name,
            sealed=sealed,
            active=_allocated(active),
            held=dict(zip(held, counts, strict=True)),
        )

    def snapshot(self) -> GuestSnapshot:
        """See `Work`."""
        with self._guest() as guest:
            return seal(guest, self._request.snapshot, on_event=self._on_event)[0]

    def ship(self, snapshot: GuestSnapshot, target: str) -> Shipped:
        """See `Work`."""
        with self._guest() as guest, self._at(target) as destination:
            request = ship.GuestShipRequest(
                snapshot=self._request.snapshot,
                taken=as_named_now(guest, snapshot) or snapshot,
                name=self._request.name,
                labels=self._request.snapshot.labels,
            )
            done = ship.run(guest, request, destination, on_event=self._on_event)
        return Shipped(
            guest_point=done.guest_point,
            bytes_read=sum(each.bytes_read for each in done.disks),
            bytes_stored=sum(each.bytes_stored for each in done.disks),
        )

    def held(self, target: str) -> HeldAt:
        """See `Work`."""
        with self._guest() as guest, self._at(target) as destination:
            names = [disk.name for disk in disks_to_protect(guest, self._request.snapshot.disks)]
            return {
                name: held_at(target, destination, f"{self._name(guest)}/{name}", epoch=self._epoch(guest, name)).layers
                for name in names
            }

    def _epoch(self, guest: Guest, disk: str) -> int:
        return epoch_of(guest, disk, image_dirs=self._request.snapshot.image_dirs)

    def keep(self, target: str) -> None:
        """See `Work`. The destination is closed then."""
        if self._request.policy.is_empty:
            self._opened.pop(target, None)
            return
        with self._guest() as guest, self._at(target) as destination:
            del self._opened[target]
            guest_points_merge.run(
                destination, self._name(guest), self._request.policy, zone=UTC, on_event=self._on_event
            )

    def squeeze(self, each: Range) -> MergeReport:
        """See `Work`."""
        with self._guest() as guest:
            chain = find_disk(guest, each.disk).chain
            lowest, uppermost = chain[each.first].path, chain[each.last].path
            return self._merge(guest, each.disk, from_layer=str(lowest), to_layer=str(uppermost))

    def settle(self, disk: str, held: Mapping[str, HeldAt], *, max_layers: int) -> MergeReport:
        """See `Work`."""
        at = tuple(At(target, tuple(layers.get(disk, ()))) for target, layers in held.items())
        with self._guest() as guest:
            return self._merge(guest, disk, max_layers=max_layers, at=at)

    def _merge(
        self,
        guest: Guest,
        disk: str,
        *,
        from_layer: str | None = None,
        to_layer: str | None = None,
        max_layers: int | None = None,
        at: tuple[At, ...] = (),
    ) -> MergeReport:
        dirs = self._request.snapshot.image_dirs
        active = active_path(find_disk(guest, disk), guest=guest)
        request = MergeRequest(
            image=active,
            image_dirs=(*dirs, active.parent),
            from_layer=from_layer,
            to_layer=to_layer,
            max_layers=max_layers,
            at=at,
        )
        planned = plan_disk(guest, disk, request)
        pace = Pace(idle=self._request.idle and guest.state() is not State.OFF)
        return run_disk(guest, planned, on_event=self._on_event, pace=pace)


def _allocated(path: Path) -> int:
    """Bytes of the filesystem that a file takes; 0 for one that has just gone."""
    try:
        return os.stat(path).st_blocks * 512  # noqa: PTH116
    except OSError:
        return 0
