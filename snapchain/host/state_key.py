"""The key by which a user's own records are known again, where others may put files, too.

A record beside an image (a merge's journal, a layer's note) carries a mark: HMAC-SHA256 under a key that lies in the
state directory of its user.  Whoever may write to the images' directory can remove the record, or put an older one
back, but can make none that says something else.

    root         $XDG_STATE_HOME/snapchain/records.key, where only root may write; else /var/lib/snapchain/records.key:
                 a nightly run and the same user at a terminal have one key
    other users  $XDG_STATE_HOME/snapchain/records.key, by default below ~/.local/state
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import secrets
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from snapchain.errors import InvalidInput, NotFound, SnapchainError
from snapchain.host.directory import Directory
from snapchain.host.places import SYSTEM_STATE, state_dir
from snapchain.host.private import PrivateDirectory

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
        """The mark of a record. purpose: of this kind of record; place: inode of the directory in which it lies."""
        return hmac.new(self.secret, f"{purpose}\n{place}\n".encode() + data, hashlib.sha256).hexdigest()

    def has_made(self, mark: str, purpose: str, place: int, data: bytes) -> bool:
        """Whether a mark is this key's, for just this."""
        return hmac.compare_digest(mark.encode(errors="replace"), self.mark(purpose, place, data).encode())


def own_key() -> StateKey | None:
    """The key of this user; None where there is none that can be used: then no record is known as this user's."""
    with suppress(SnapchainError):
        return _read(_directory())
    return None


def made_key() -> StateKey:
    """The key of this user, made where there is none.

    Raises InvalidInput where others may read or replace it, and what reading and writing a file raises.
    """
    directory = _directory()
    try:
        return _read(directory)
    except NotFound:
        _make(directory)
        return _read(directory)


def _directory() -> Path:
    try:
        directory = state_dir()
    except RuntimeError as error:
        raise NotFound("this user has no home directory", hint="set XDG_STATE_HOME") from error
    if os.geteuid() != 0:
        return directory
    named = bool(os.environ.get("XDG_STATE_HOME"))
    return directory if named and _is_roots_alone(directory) else SYSTEM_STATE


def _is_roots_alone(directory: Path) -> bool:
    """Whether no other user may change what a path leads to, as far as it is there."""
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
    """Of two that make one at once, one wins, and both use it."""
    with PrivateDirectory(path, make=True) as directory:
        directory.write_once(NAME, f"snapchain records 1 {secrets.token_hex(_BYTES)}\n".encode())
