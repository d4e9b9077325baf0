"""Small records in JSON that lie where others may put files, too: bounded, judged by descriptor, marked by their user.

    {"version": 1, ..., "mark": "<HMAC of the rest>"}        host/state_key.py

A record's mark covers its kind, the inode of its directory and all that it says.  Programs that know of no marks read
the rest as before.
"""

from __future__ import annotations

import json
import os
import stat
from dataclasses import dataclass

from snapchain.errors import InvalidInput
from snapchain.host.directory import Directory
from snapchain.host.os_errors import os_errors
from snapchain.host.private import is_own
from snapchain.host.state_key import StateKey

_MARK = "mark"


@dataclass(frozen=True, slots=True)
class Record:
    """A record as it was read.

    text: its JSON without the mark; status: of the file that was opened
    is_marked: by this user's key, in this directory, and only its owner may write to it
    is_own: nobody but this user and root can have put it there: marked, or a file of theirs in a place of theirs
    """

    text: bytes
    status: os.stat_result
    is_marked: bool
    is_own: bool


def encode(values: dict[str, object], *, purpose: str, place: int, key: StateKey | None) -> bytes:
    """A record's bytes; without a key it gets no mark. place: inode of the directory in which it is to lie."""
    marked = values if key is None else {**values, _MARK: key.mark(purpose, place, _canonical(values))}
    return json.dumps(marked, indent=1).encode()


def read(directory: Directory, name: str, *, purpose: str, key: StateKey | None, cap: int) -> Record:
    """The record of this name. cap: bytes that it may have.

    Raises InvalidInput for what is no regular file, is larger, or holds no JSON object, and what opening a file raises.
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
    """The same bytes for the same values, in whatever order and spacing a file holds them."""
    return json.dumps(values, sort_keys=True, separators=(",", ":")).encode()
