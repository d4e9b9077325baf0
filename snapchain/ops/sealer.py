"""Sealing the top of a chain, whoever uses it: what `sync` asks for before each round.

Today the image must be at rest.  A guest that runs is sealed through its monitor: another class of this protocol.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from snapchain.ops import snapshot
from snapchain.ops.events import OnEvent, ignore


class Sealer(Protocol):
    """Makes the top of a chain a layer that nobody writes to any more, with a fresh overlay on it."""

    def seal(self) -> Path:
        """Do it; the file that is sealed now. Afterwards the chain has one file more. Raises Busy."""
        ...


class OfflineSealer:
    """A Sealer of an image that no guest has open; the overlay comes in its place, under its path."""

    def __init__(
        self, image: Path, *, format: str | None = None, image_dirs: Sequence[Path] = (), on_event: OnEvent = ignore
    ) -> None:
        self._image, self._format, self._image_dirs, self._on_event = image, format, image_dirs, on_event

    def seal(self) -> Path:
        """Raises Busy when somebody has the image open, and what `snapshot.plan` raises."""
        planned = snapshot.plan(self._image, image_format=self._format, image_dirs=self._image_dirs)
        return snapshot.run(planned, on_event=self._on_event).sealed
