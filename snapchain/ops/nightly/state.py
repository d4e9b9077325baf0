"""What runs have reached, kept in one small file between them.

It decides the order of the next run, turns the verified sample, feeds the metrics of what was not reached, and
remembers which local files were made by merging which others, so that the next shipment knows them again.  Losing it
costs a night's order and one reading of the merged layers; nothing that is stored depends on it, so that no work is
left undone because it cannot be read or written: that is a fault of its own.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from pydantic import AwareDatetime, BaseModel, ConfigDict, ValidationError

from snapchain.errors import NotFound, SnapchainError
from snapchain.host import files
from snapchain.host.os_errors import os_errors
from snapchain.model.inventory import Wanted
from snapchain.repository.source import Source

_CAP = 64 << 20
_BROKEN = ".broken"


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class Reached(_Part):
    """A disk at one destination. captured: the moment whose content is safe there; bytes: of the last shipment."""

    captured: AwareDatetime
    point: int
    points: int
    layers: int
    shipped_bytes: int
    stored_bytes: int


class MergedFile(_Part):
    """A local file that a merge has made, and the files that it was made of, lowest first."""

    made: Source
    of: tuple[Source, ...]


_Content = tuple[int, int, int, int]


def _content(source: Source) -> _Content:
    """Equal for two looks at a file between which nothing was written to it (image/fingerprint.py).

    libvirt changes the owner, and so the ctime, at every start of a guest.
    """
    coarse = source.mtime_ns % 1_000_000_000 == 0
    return (source.inode, source.size, source.mtime_ns, source.ctime_ns if coarse else 0)


class DiskState(_Part):
    """One disk.

    reached: when a run last came to its end with it, well or ill; outcome, seconds: of that run; begun: by a run that
    has not come to its end with it; layers: files below the image, as they were last seen
    """

    image: Path
    reached: AwareDatetime | None = None
    begun: AwareDatetime | None = None
    outcome: str | None = None
    seconds: float = 0.0
    chain_length: int | None = None
    shadowed_bytes: int | None = None
    merge_freed_bytes: int = 0
    destinations: dict[str, Reached] = {}
    layers: tuple[Path, ...] = ()
    merged: tuple[MergedFile, ...] = ()

    @property
    def turn(self) -> datetime | None:
        """When it had its last turn. A run that was killed in the middle of it counts: it may have been the cause."""
        return max((each for each in (self.reached, self.begun) if each is not None), default=None)

    def lineage(self, present: Sequence[Source]) -> tuple[Wanted, ...]:
        """The merged files among those of a chain, each with what it was made of, as deep as is known."""
        known = {_content(each.made): each.of for each in self.merged}

        def wanted(source: Source) -> Wanted:
            # Not recursive: a file that a nightly merge has grown for years is nested as deep. A file is part of one
            # other at most, so each comes after the one that it is part of.
            order = [source]
            for each in order:
                order += known.get(_content(each), ())
            built: dict[_Content, Wanted] = {}
            for each in reversed(order):
                parts = known.get(_content(each), ())
                built[_content(each)] = Wanted(each, tuple(built[_content(part)] for part in parts))
            return built[_content(source)]

        return tuple(wanted(source) for source in present if _content(source) in known)

    def with_merge(self, made: Source, of: Sequence[Source], *, present: Sequence[Source]) -> DiskState:
        """After a merge. present: the files of the chain now; what none of them was made of is forgotten."""
        known = {_content(each.made): each for each in self.merged}
        known[_content(made)] = MergedFile(made=made, of=tuple(of))
        needed = list(present)
        for each in needed:
            if _content(each) in known:
                needed += known[_content(each)].of
        return self.model_copy(
            update={"merged": tuple(known[_content(each)] for each in needed if _content(each) in known)}
        )


class DestinationState(_Part):
    """What runs have done for a destination as a whole.

    verified: disk -> when it was last looked at; damaged: disk -> findings, until it is read whole and none are left;
    gc_freed_bytes: of the last gc; checked_bytes: of the last sample
    """

    verified: dict[str, AwareDatetime] = {}
    damaged: dict[str, int] = {}
    gc_at: AwareDatetime | None = None
    gc_freed_bytes: int = 0
    checked_bytes: int = 0


class State(_Part):
    """All of it, by name."""

    version: int = 1
    disks: dict[str, DiskState] = {}
    destinations: dict[str, DestinationState] = {}


def read_state(path: Path) -> State | None:
    """What is there; None for a file that cannot be understood. Raises what keeps it from being read."""
    try:
        return State.model_validate_json(files.read_small(path, cap=_CAP))
    except NotFound:
        return State()
    except ValidationError:
        return None


class StateFile:
    """The state, on disk after every change, or in memory alone where that cannot be; thread-safe.

    fault: the first thing that kept it from being read or written
    """

    def __init__(self, path: Path, state: State) -> None:
        self._path = path
        self._state = state
        self._lock = threading.Lock()
        self._writable = True
        self.fault: SnapchainError | None = None

    @classmethod
    def open(cls, path: Path, *, on_notice: Callable[[str], None]) -> StateFile:
        """What is there; a file that cannot be understood is put aside, and all begins anew."""
        made = cls(path, State())
        try:
            files.remove_temporaries(path, purpose=files.NEW)
            found = read_state(path)
            if found is None:
                aside = path.with_name(path.name + _BROKEN)
                on_notice(f"{path} is damaged: it is kept as {aside.name}, and what the last runs reached is forgotten")
                with os_errors(path):
                    path.replace(aside)
            else:
                made._state = found
        except SnapchainError as error:
            made.fault = error
            made._writable = False  # what is there may be sound, and must not be replaced by a beginning
        return made

    @property
    def now(self) -> State:
        """The state as it is."""
        return self._state

    def disk(self, name: str, image: Path) -> DiskState:
        """Of one disk, which may be new; of another image under this name, only what the destinations hold."""
        known = self._state.disks.get(name)
        if known is None:
            return DiskState(image=image)
        return known if known.image == image else known.model_copy(update={"image": image, "merged": ()})

    def destination(self, name: str) -> DestinationState:
        """Of one destination, which may be new."""
        return self._state.destinations.get(name, DestinationState())

    def put_disk(self, name: str, disk: DiskState) -> None:
        """Keep it."""
        with self._lock:
            self._save(self._state.model_copy(update={"disks": {**self._state.disks, name: disk}}))

    def put_destination(self, name: str, **values: Any) -> None:
        """Keep these values of a destination; of `verified` and `damaged` only the disks that they name."""
        with self._lock:
            known = self.destination(name)
            verified = {**known.verified, **values.pop("verified", {})}
            damaged = {**known.damaged, **values.pop("damaged", {})}
            values |= {"verified": verified, "damaged": {disk: count for disk, count in damaged.items() if count}}
            now = {**self._state.destinations, name: known.model_copy(update=values)}
            self._save(self._state.model_copy(update={"destinations": now}))

    def _save(self, state: State) -> None:
        self._state = state
        if not self._writable:
            return
        try:
            files.write_atomically(self._path, state.model_dump_json(indent=1).encode())
        except SnapchainError as error:
            self.fault = self.fault or error
