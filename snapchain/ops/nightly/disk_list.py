"""The disks of a run in the order of work, and what has become of those of earlier runs.

A disk that was shipped once and is not selected any more would go unnoticed, were it not a fault: a directory may not
be mounted, a pattern may be mistyped.  Only what `retired` names, and names that an image bore before, may be gone.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from fnmatch import fnmatchcase
from pathlib import Path

from snapchain.errors import NotFound, SnapchainError
from snapchain.ops.nightly.config import Nightly
from snapchain.ops.nightly.plan import order
from snapchain.ops.nightly.selection import SelectedDisk, select
from snapchain.ops.nightly.state import State


@dataclass(frozen=True, slots=True)
class Roster:
    """disks: in the order of work; layers, leftovers: matched files that are none; gone: names that should be there

    former: names that nobody expects any more, and whose state is of no interest; faults: gone ones among them
    """

    disks: tuple[SelectedDisk, ...] = ()
    layers: tuple[Path, ...] = ()
    leftovers: tuple[Path, ...] = ()
    gone: tuple[str, ...] = ()
    former: frozenset[str] = frozenset()
    faults: tuple[SnapchainError, ...] = ()


def roster(config: Nightly, state: State, *, now: datetime | None = None) -> Roster:
    """Look which images there are. now: by the clock of this run."""
    found = select(
        config,
        known={disk.image for disk in state.disks.values() if disk.destinations},
        sealed={path for disk in state.disks.values() for path in disk.layers},
    )
    turns = {name: turn for name, disk in state.disks.items() if (turn := disk.turn)}
    selected = {disk.image: disk.name for disk in found.disks}
    missed = {name: disk for name, disk in state.disks.items() if name not in selected.values()}
    former = {
        name
        for name, disk in missed.items()
        if disk.image in selected or any(fnmatchcase(name, pattern) for pattern in config.retired)
    }
    gone = tuple(name for name, disk in missed.items() if disk.destinations and name not in former)
    return Roster(
        disks=tuple(order(found.disks, lambda disk: disk.name, turns, now=now)),
        layers=found.layers,
        leftovers=found.leftovers,
        gone=gone,
        former=frozenset(former),
        faults=(*found.faults, *([_gone(gone)] if gone else [])),
    )


def _gone(names: tuple[str, ...]) -> NotFound:
    return NotFound(
        "shipped by earlier runs, and no image is selected for it now",
        subject=", ".join(names),
        hint='is a directory not mounted? Disks that may be gone are named in the configuration: retired = ["..."]',
    )
