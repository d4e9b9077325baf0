"""Marks beside images whose guest another host has taken over: every later command here refuses without asking."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

from snapchain.destination.writing import TakesLayers
from snapchain.errors import SnapchainError
from snapchain.image import scan
from snapchain.model.guest_state import GuestStanding
from snapchain.ops.guest_places import guest_named_by
from snapchain.source.notes import Notes
from snapchain.source.ownership import epoch_of, mark_taken_over


def is_replaced(standing: GuestStanding, epoch: int) -> bool:
    """Whether a host that writes a guest's disks in an epoch was replaced by another one.

    The epoch alone decides: it also grows where a host gave the disks away, or a failover was withdrawn.
    """
    return standing.epoch > epoch


def mark_after_refusal(
    disks: Iterable[tuple[Path, str]],
    destination: TakesLayers,
    *,
    format: str | None = None,
    image_dirs: Sequence[Path] = (),
) -> None:
    """Mark images of which a destination has just refused a shipment, where it says that another host took them over.

    disks: image and name at the destination. Raises nothing: the refusal is what the user must see.
    """
    for image, disk in disks:
        guest = guest_named_by(disk)
        if guest is None:
            continue
        with suppress(SnapchainError):
            standing = destination.guest_state(guest)
            with scan(image, format=format, image_dirs=image_dirs) as chain:
                if standing.is_taken_over and is_replaced(standing, epoch_of(chain, Notes())):
                    mark_taken_over(chain, standing, destination=destination.url, disk=disk, image_dirs=image_dirs)
