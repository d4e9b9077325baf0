"""Small JSON records in directories where other users may write too: bounded, opened once, marked by their user.

    {"version": 1, ..., "mark": "<HMAC of the rest>"}        host/records.py

A record's mark covers its kind, the inode of its directory and all its values.  Programs without support for marks
read the rest as before.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import re
import secrets
import stat
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from snapchain.errors import InvalidInput, NotFound, SnapchainError
from snapchain.host.directory import Directory
from snapchain.host.os_errors import os_errors
from snapchain.host.private import PrivateDirectory, is_own

_MARK = "mark"


@dataclass(frozen=True, slots=True)
class Record:
    """A record as read from its file.

    text: its JSON without the mark
    status: of the opened file
    is_marked: marked by this user's key for this directory, and writable by its owner only
    is_own: only this user or root can have written it: it is marked, or is their file in their directory
    """

    text: bytes
    status: os.stat_result
    is_marked: bool
    is_own: bool


def encode(values: dict[str, object], *, purpose: str, place: int, key: StateKey | None) -> bytes:
    """A record's bytes; without a key it gets no mark. place: inode of its directory."""
    marked = values if key is None else {**values, _MARK: key.mark(purpose, place, _canonical(values))}
    return json.dumps(marked, indent=1).encode()


def read(directory: Directory, name: str, *, purpose: str, key: StateKey | None, cap: int) -> Record:
    """The record of this name. cap: its largest size in bytes.

    Raises InvalidInput unless it is a regular file within `cap` that holds a JSON object, and as opening a file.
    """
    path = directory.path / name
    with os_errors(path):
        fd = directory.open_file(name)
        try:
            status = os.fstat(fd)
            data = os.read(fd, cap + 1) if stat.S_ISREG(status.st_mode) else None
        finally:
            os.close(fd)
    if data is None or len(data) > cap:
        raise InvalidInput(f"not a regular file of at most {cap} bytes", subject=path)
    try:
        values = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise InvalidInput("it holds no JSON", subject=path) from error
    if not isinstance(values, dict):
        raise InvalidInput("it holds no JSON object", subject=path)
    mark = values.pop(_MARK, None)
    text = _canonical(values)
    place = os.fstat(directory.fd).st_ino
    is_marked = (
        key is not None
        and isinstance(mark, str)
        and not status.st_mode & 0o022
        and key.has_made(mark, purpose, place, text)
    )
    return Record(text, status, is_marked, is_marked or is_own(directory, status))


def _canonical(values: dict[str, object]) -> bytes:
    """The same bytes for the same values, whatever their order and spacing in a file."""
    return json.dumps(values, sort_keys=True, separators=(",", ":")).encode()


# --- The key that marks a user's records in directories where other users may write too.
#
# A record beside an image (a merge journal, a layer note) carries a mark: HMAC-SHA256 under a key in its user's state
# directory.  Another user of the images' directory can remove the record or restore an older one, but cannot forge one.
#
#     root         $XDG_STATE_HOME/snapchain/records.key where only root may write, else
#                  /var/lib/snapchain/records.key, so that a nightly run and root at a terminal share one key
#     other users  $XDG_STATE_HOME/snapchain/records.key, by default below ~/.local/state

NAME = "records.key"
_BYTES = 32
_FILE = re.compile(rb"snapchain records 1 ([0-9a-f]{64})\n")
_FILE_BYTES = len("snapchain records 1 \n") + 2 * _BYTES


@dataclass(frozen=True, slots=True)
class StateKey:
    """The key of this user on this host."""

    secret: bytes

    def __repr__(self) -> str:
        return "StateKey(...)"

    def mark(self, purpose: str, place: int, data: bytes) -> str:
        """The mark of a record. purpose: the kind of record; place: inode of its directory."""
        return hmac.new(self.secret, f"{purpose}\n{place}\n".encode() + data, hashlib.sha256).hexdigest()

    def has_made(self, mark: str, purpose: str, place: int, data: bytes) -> bool:
        """Whether this key made a mark for exactly these values."""
        return hmac.compare_digest(mark.encode(errors="replace"), self.mark(purpose, place, data).encode())


def own_key() -> StateKey | None:
    """The key of this user; None where there is no usable key: then no record counts as this user's by its mark."""
    with suppress(SnapchainError):
        return _read(key_directory())
    return None


def made_key() -> StateKey:
    """The key of this user, created if missing.

    Raises InvalidInput where others may read or replace it, and as reading and writing a file.
    """
    directory = key_directory()
    try:
        return _read(directory)
    except NotFound:
        _make(directory)
        return _read(directory)


def key_directory() -> Path:
    """The state directory that all runs of this user share, whatever their environment. Raises NotFound."""
    try:
        directory = state_dir()
    except RuntimeError as error:
        raise NotFound("this user has no home directory", hint="set XDG_STATE_HOME") from error
    if os.geteuid() != 0:
        return directory
    named = bool(os.environ.get("XDG_STATE_HOME"))
    return directory if named and _is_roots_alone(directory) else SYSTEM_STATE


def _is_roots_alone(directory: Path) -> bool:
    """Whether no other user may change the target of a path, as far as it exists."""
    for place in (directory, *directory.parents):
        try:
            with Directory.open(place) as opened:
                return opened.rights is None
        except FileNotFoundError:
            continue
        except (OSError, SnapchainError):
            return False
    return False


def _read(path: Path) -> StateKey:
    try:
        with PrivateDirectory(path) as directory:
            found = _FILE.fullmatch(directory.read(NAME, cap=_FILE_BYTES, is_secret=True))
    except InvalidInput as error:
        raise InvalidInput(
            f"the key of this user's records cannot be used: {error.message}", subject=path / NAME, hint=error.hint
        ) from error
    if found is None:
        raise InvalidInput(
            "the key of this user's records cannot be used: it holds no key",
            subject=path / NAME,
            hint="remove it: then a new one is made",
        )
    return StateKey(bytes.fromhex(found[1].decode()))


def _make(path: Path) -> None:
    """Create the key. Of two concurrent writers one wins, and both use its key."""
    with PrivateDirectory(path, make=True) as directory:
        directory.write_once(NAME, f"snapchain records 1 {secrets.token_hex(_BYTES)}\n".encode())


# --- State and cache of this user: the XDG base directories.

SYSTEM_STATE = Path("/var/lib/snapchain")
"""The state directory of an installed nightly run of root, whatever its environment."""


def state_dir() -> Path:
    """$XDG_STATE_HOME/snapchain, by default ~/.local/state/snapchain."""
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "snapchain"


def cache_dir() -> Path:
    """$XDG_CACHE_HOME/snapchain, by default ~/.cache/snapchain."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "snapchain"
