"""What runs have reached, kept in one small file between them.

It decides the order of the next run, turns the verified sample, and feeds the metrics of what was not reached.  Losing
it costs a night's order; nothing that is stored depends on it, so that no work is left undone because it cannot be read
or written: that is a fault of its own.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

from pydantic import AwareDatetime, BaseModel, ConfigDict, ValidationError

from snapchain.errors import NotFound, SnapchainError
from snapchain.host import files, private
from snapchain.host.temporary_names import NEW
from snapchain.model.consistency import Consistency

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

    @property
    def turn(self) -> datetime | None:
        """When it had its last turn. A run that was killed in the middle of it counts: it may have been the cause."""
        return max((each for each in (self.reached, self.begun) if each is not None), default=None)


class GuestReached(_Part):
    """A guest at one destination. captured: the moment of its newest guest point; bytes: of the last shipment."""

    captured: AwareDatetime
    consistency: Consistency
    point: int
    points: int
    shipped_bytes: int
    stored_bytes: int


class GuestState(_Part):
    """One guest. guest: what it is called on this host; option: how it is named on a command line

    reached, begun, outcome, seconds: as of a disk; chain_lengths: disk -> files of its local chain
    frozen_seconds: how long the last freeze took
    """

    guest: str
    option: str
    reached: AwareDatetime | None = None
    begun: AwareDatetime | None = None
    outcome: str | None = None
    seconds: float = 0.0
    chain_lengths: dict[str, int] = {}
    merge_freed_bytes: int = 0
    frozen_seconds: float | None = None
    destinations: dict[str, GuestReached] = {}

    @property
    def turn(self) -> datetime | None:
        """When it had its last turn."""
        return max((each for each in (self.reached, self.begun) if each is not None), default=None)


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


class TestState(_Part):
    """The last boot test of a guest at a destination.

    begun: one that may not have come to its end; tested: one that has; ok: whether the clone booted; None for none
    """

    begun: AwareDatetime | None = None
    tested: AwareDatetime | None = None
    ok: bool | None = None
    guest_point: int | None = None
    boot_seconds: float | None = None

    @property
    def turn(self) -> datetime | None:
        """When it had its last turn."""
        return max((each for each in (self.begun, self.tested) if each is not None), default=None)


class State(_Part):
    """All of it, by name.

    tests: GUEST@DESTINATION -> its last boot test; clone, clone_connect: of a test that is under way, and its libvirt
    """

    version: int = 1
    disks: dict[str, DiskState] = {}
    guests: dict[str, GuestState] = {}
    destinations: dict[str, DestinationState] = {}
    tests: dict[str, TestState] = {}
    clone: Path | None = None
    clone_connect: str | None = None


def read_state(path: Path) -> State | None:
    """What is there; None for a file that cannot be understood. Raises what keeps it from being read."""
    try:
        return State.model_validate_json(private.read_own(path, cap=_CAP))
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
            files.remove_temporaries(path, purpose=NEW)
            found = read_state(path)
            if found is None:
                aside = path.with_name(path.name + _BROKEN)
                on_notice(f"{path} is damaged: it is kept as {aside.name}, and what the last runs reached is forgotten")
                files.move_aside(path, aside.name)
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
        return known if known.image == image else known.model_copy(update={"image": image, "layers": ()})

    def destination(self, name: str) -> DestinationState:
        """Of one destination, which may be new."""
        return self._state.destinations.get(name, DestinationState())

    def put_disk(self, name: str, disk: DiskState) -> None:
        """Keep it."""
        with self._lock:
            self._save(self._state.model_copy(update={"disks": {**self._state.disks, name: disk}}))

    def guest(self, name: str, guest: str, option: str) -> GuestState:
        """Of one guest, which may be new, or have moved to another monitor."""
        known = self._state.guests.get(name) or GuestState(guest=guest, option=option)
        return known.model_copy(update={"guest": guest, "option": option})

    def put_guest(self, name: str, guest: GuestState) -> None:
        """Keep it."""
        with self._lock:
            self._save(self._state.model_copy(update={"guests": {**self._state.guests, name: guest}}))

    def put_test(self, key: str, test: TestState) -> None:
        """Keep it."""
        with self._lock:
            self._save(self._state.model_copy(update={"tests": {**self._state.tests, key: test}}))

    def put_clone(self, directory: Path | None, connect: str | None = None) -> None:
        """Keep where the clone of a test is, before it is made; None once it is removed."""
        with self._lock:
            self._save(self._state.model_copy(update={"clone": directory, "clone_connect": connect}))

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
