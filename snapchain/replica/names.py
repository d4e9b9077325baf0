"""Names that come from outside, as names of files here: the same on every host, and never a way out of a directory."""

from __future__ import annotations

import re
from collections.abc import Collection
from urllib.parse import unquote

from snapchain.errors import Corrupt, InvalidInput
from snapchain.host import replica_layout
from snapchain.model.disk_name import check_disk_name

MARKER, CATALOGUE, ACTIVE = replica_layout.MARKER, replica_layout.CATALOGUE, replica_layout.ACTIVE
LOCK = ".lock"
INCOMING = ".incoming.qcow2"
PROGRESS = ".incoming.json"
MERGING = ".merging.json"
CUTTING = ".cutting.json"
SUFFIX = ".qcow2"
_LONGEST = 200
_PLAIN = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_.+")
# Overlays for guests have a directory of their own in a disk's: there their names are in no layer's way.
_FILE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*\.qcow2", re.ASCII)


def check_new_disk(name: str) -> None:
    """Raises InvalidInput for a new disk whose directory would be taken for something else of a replica."""
    if directory_of(name) in (MARKER, CATALOGUE, ACTIVE):
        raise InvalidInput(
            f"{name!a} cannot be a new disk's name: a replica has files of that name", hint="such as web1/vda"
        )


def directory_of(disk: str) -> str:
    """The directory of a disk: its name, with all but the plainest characters as %XX.

    web1/vda -> web1%2Fvda; a colon or a leading dot or dash would mean something to QEMU or to a shell.
    Raises InvalidInput as `check_disk_name`, and where the result is too long for a file name.
    """
    raw = check_disk_name(disk).encode()
    coded = "".join(
        chr(byte) if byte in _PLAIN and not (at == 0 and byte in b".-") else f"%{byte:02X}"
        for at, byte in enumerate(raw)
    )
    if len(coded) > 255:
        raise InvalidInput("the disk's name is too long for a directory", subject=disk)
    return coded


def disk_of(directory: str) -> str | None:
    """The disk whose directory has this name; None where it is no disk's."""
    name = unquote(directory, errors="replace")
    try:
        return name if directory_of(name) == directory else None
    except InvalidInput:
        return None


def offered_name(file_name: str) -> str:
    """The name under which a replica should hold a source file: the same wherever it can be."""
    stem = file_name.removesuffix(SUFFIX)
    plain = "".join(chr(byte) if byte in _PLAIN else "_" for byte in stem.encode(errors="replace")) or "layer"
    if plain[0] in ".-+":
        plain = "_" + plain[1:]
    return plain[: _LONGEST - len(SUFFIX)] + SUFFIX


def is_layer_name(name: str) -> bool:
    """Whether a file of a replica can have it: no directory, no sign that means something to a shell or to QEMU."""
    return _FILE.fullmatch(name) is not None


def check_offered(name: str, *, subject: str) -> str:
    """Raises Corrupt for a layer's name that `offered_name` would never make."""
    if len(name) > _LONGEST or not _FILE.fullmatch(name):
        raise Corrupt(f"a layer cannot be named {name!a}", subject=subject)
    return name


def free_name(offered: str, layer: str, taken: Collection[str]) -> str:
    """The file name for a layer: as offered, or with the layer's id where another file has that name."""
    if offered not in taken:
        return offered
    stem = offered.removesuffix(SUFFIX)[: _LONGEST - len(SUFFIX) - 33]
    return f"{stem}-{layer[:8]}{SUFFIX}" if f"{stem}-{layer[:8]}{SUFFIX}" not in taken else f"{stem}-{layer}{SUFFIX}"
