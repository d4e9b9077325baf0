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
from pathlib import Path

from snapchain.errors import InvalidInput
from snapchain.host.directory import Directory
from snapchain.host.os_errors import os_errors
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
    return Record(text, status, is_marked, is_marked or _is_of_ours(directory, status))


def read_own(path: Path, *, cap: int) -> bytes:
    """The bytes of a small file that nobody but this user and root can have put in its place.

    Raises InvalidInput for what somebody else may have put there, and what reading a file raises.
    """
    with os_errors(path), Directory.open(path.parent) as directory:
        fd = directory.open_file(path.name)
        try:
            status = os.fstat(fd)
            if not _is_of_ours(directory, status):
                raise InvalidInput(
                    "another user may have written it",
                    subject=path,
                    hint="keep it where only you may write, or remove it",
                )
            data = os.read(fd, cap + 1)
        finally:
            os.close(fd)
    if len(data) > cap:
        raise InvalidInput(f"larger than the {cap} bytes that it may have", subject=path)
    return data


def _canonical(values: dict[str, object]) -> bytes:
    """The same bytes for the same values, in whatever order and spacing a file holds them."""
    return json.dumps(values, sort_keys=True, separators=(",", ":")).encode()


def _is_of_ours(directory: Directory, status: os.stat_result) -> bool:
    """Whether a file was made by this user or root, in a directory in which nobody else can rename their files."""
    ours = (0, os.geteuid())
    if status.st_uid not in ours or status.st_mode & 0o022 or directory.rights_of_file(status) is not None:
        return False
    place = os.fstat(directory.fd)
    is_anybodys = place.st_mode & stat.S_IWOTH and not place.st_mode & stat.S_ISVTX
    return place.st_uid in ours and not is_anybodys
