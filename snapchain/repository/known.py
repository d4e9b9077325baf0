"""What this machine remembers of repositories: that one was encrypted, and how far each of its disks had come.

A store in hostile hands could put an unencrypted `config` in the place of an encrypted one, and would be sent the next
point in plain text.  A machine that has seen the repository encrypted refuses that.  Or it could take the newest
generations of a disk away: the older ones are whole and true, and only who has seen a newer one can tell.
"""

from __future__ import annotations

import threading
from contextlib import suppress
from pathlib import Path

import blake3
from pydantic import BaseModel, ConfigDict, ValidationError

from snapchain.errors import Corrupt, SnapchainError
from snapchain.host.files import read_small, write_atomically
from snapchain.host.places import cache_dir, make_directory, state_dir
from snapchain.repository.crypto import NONE

_LARGEST = 64 * 1024 * 1024


class Known(BaseModel):
    """One remembered repository. place: its address and endpoint."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    place: str
    id: str
    encryption: str


def check(seen: Known) -> None:
    """Compare with what is remembered of this address, and remember it.

    Raises Corrupt for a repository that was encrypted and no longer is.  Where nothing can be remembered (no home
    directory), nothing is checked.
    """
    path = _path(seen.place)
    before = _read(path)
    if before is not None and before.encryption != NONE and seen.encryption == NONE:
        raise Corrupt(
            "this repository was encrypted when this machine last used it, and now says that it is not",
            subject=seen.place,
            hint=f"if somebody made a new one here on purpose, remove {path}",
        )
    if before != seen:
        remember(seen)


def recall(place: str) -> Known | None:
    """What is remembered of this address."""
    return _read(_path(place))


class Memory:
    """How far the disks of one repository had come when this machine last saw them. Thread-safe.

    Kept in a file beside the Known of the place.  Where nothing can be remembered, nothing is checked; of two processes
    that remember at once, one may be forgotten.
    """

    def __init__(self, seen: Known) -> None:
        self._path = _path(seen.place).with_suffix(".generations")
        self._seen = seen
        self._lock = threading.Lock()
        self._generations: dict[str, int] | None = None
        self._written: dict[str, int] = {}

    def floor(self, disk: str) -> int:
        """The highest generation known of a disk (its key); ask before looking at the store. 0: none."""
        with self._lock:
            return self._loaded().get(disk, 0)

    def note(self, disk: str, generation: int, floor: int) -> None:
        """A disk was seen at a generation, 0 if there is none, after `floor` was asked for.

        Raises Corrupt when it has been further.
        """
        if generation < floor:
            raise Corrupt(
                f"a disk is at generation {generation}, and was at {floor} when this machine last saw it: "
                "its newest points were taken away",
                subject=self._seen.place,
                hint=f"if somebody put back an older state of the repository on purpose, remove {self._path}",
            )
        with self._lock:
            known = self._loaded()
            known[disk] = max(generation, known.get(disk, 0))

    def flush(self) -> None:
        """Write down what is new."""
        with self._lock, suppress(SnapchainError, OSError, RuntimeError):
            known = self._loaded()
            if known != self._written:
                make_directory(self._path.parent)
                write_atomically(self._path, _Generations(id=self._seen.id, disks=known).model_dump_json().encode())
                self._written = dict(known)

    def _loaded(self) -> dict[str, int]:
        if self._generations is None:
            self._generations = {}
            with suppress(SnapchainError, ValidationError, OSError, RuntimeError):
                found = _Generations.model_validate_json(read_small(self._path, cap=_LARGEST))
                if found.id == self._seen.id:  # another repository, made anew in the place of the first
                    self._generations = dict(found.disks)
            self._written = dict(self._generations)
        return self._generations


class _Generations(BaseModel):
    """The file. id: of the repository; disks: by key."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    id: str
    disks: dict[str, int]


def remember(seen: Known) -> None:
    """Note a repository, whatever was known of its address."""
    path = _path(seen.place)
    with suppress(SnapchainError, OSError, RuntimeError):
        make_directory(path.parent)
        write_atomically(path, seen.model_dump_json().encode())


def _path(place: str) -> Path:
    return state_dir() / "repositories" / f"{blake3.blake3(place.encode()).hexdigest(length=16)}.json"


def _read(path: Path) -> Known | None:
    with suppress(SnapchainError, ValidationError, OSError, RuntimeError):
        return Known.model_validate_json(read_small(path))
    return None


__all__ = ["Known", "cache_dir", "check", "remember", "state_dir"]
