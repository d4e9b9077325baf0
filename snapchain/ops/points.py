"""Which point of a disk is meant by an address."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING

from snapchain.host.local_time import local_zone
from snapchain.model.points import LATEST, chosen_point, instant

if TYPE_CHECKING:
    from snapchain.repository.catalogue import Catalogue, Point

__all__ = ["LATEST", "find_point", "in_full"]


def find_point(catalogue: Catalogue, wanted: str | None) -> Point:
    """As `chosen_point`, with dates and times of this machine's zone. Raises NotFound."""
    return chosen_point(catalogue.disk, catalogue.points, in_full(wanted))


def in_full(wanted: str | None) -> str | None:
    """A date or a local time as the RFC 3339 time that it means, for a host with another clock; else as it is."""
    moment = None if wanted is None else instant(wanted, now=datetime.now(UTC), zone=local_zone())
    return wanted if moment is None else moment.isoformat()
