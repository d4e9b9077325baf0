"""Which point of a repository's disk is meant by an address."""

from __future__ import annotations

from snapchain.model.points import LATEST, chosen_point
from snapchain.repository.catalogue import Catalogue, Point

__all__ = ["LATEST", "find_point"]


def find_point(catalogue: Catalogue, wanted: str | None) -> Point:
    """As `chosen_point`. Raises NotFound."""
    return chosen_point(catalogue.disk, catalogue.points, wanted)
