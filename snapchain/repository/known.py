"""What this machine remembers of repositories: that one was encrypted.

A store in hostile hands could put an unencrypted `config` in the place of an encrypted one, and would be sent the next
point in plain text.  A machine that has seen the repository encrypted refuses that.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import blake3
from pydantic import BaseModel, ConfigDict, ValidationError

from snapchain.errors import Corrupt, SnapchainError
from snapchain.host.files import read_small, write_atomically
from snapchain.host.places import cache_dir, state_dir
from snapchain.repository.crypto import NONE


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


def remember(seen: Known) -> None:
    """Note a repository, whatever was known of its address."""
    path = _path(seen.place)
    with suppress(SnapchainError, OSError, RuntimeError):
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_atomically(path, seen.model_dump_json().encode())


def _path(place: str) -> Path:
    return state_dir() / "repositories" / f"{blake3.blake3(place.encode()).hexdigest(length=16)}.json"


def _read(path: Path) -> Known | None:
    with suppress(SnapchainError, ValidationError, OSError, RuntimeError):
        return Known.model_validate_json(read_small(path))
    return None


__all__ = ["Known", "cache_dir", "check", "remember", "state_dir"]
