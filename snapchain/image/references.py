"""The images of a directory that use a file as their backing file.

Reads the headers of all files in some directories, leniently: an image that snapchain would refuse (dirty, encrypted,
in use) counts as well.  Only images in those directories are found.
"""

from __future__ import annotations

import json
import os
import re
import stat
import struct
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

from snapchain.errors import SnapchainError
from snapchain.host.directory import Directory, open_behind
from snapchain.host.os_errors import os_errors
from snapchain.host.path_resolution import real_name
from snapchain.host.rights import acting_as
from snapchain.image.qcow2.format import EXTENSION, MAGIC, MAX_BACKING_NAME_BYTES, MAX_CLUSTER_BITS, ExtensionType

_FIRST_BYTES = 512
_HEAD_BYTES = 64 << 10
_LARGEST_CLUSTER = 1 << MAX_CLUSTER_BITS
_BACKING = struct.Struct(">4sIQI")
_HEADER_LENGTH_AT = 100
_QED, _QED_BACKING_AT, _QED_BACKING = b"QED\0", 56, struct.Struct("<II")
_VMDK = (b"KDMV", b"COWD", b"# Disk DescriptorFile")
_VMDK_NAME = re.compile(rb'parentFileNameHint="([^"\n]*)"|^RW \d+ [A-Z]+ "([^"\n]*)"', re.MULTILINE)
_MAGICS = (MAGIC, _QED, *_VMDK)
_FILE_PROTOCOLS = {"file", "host_device"}


def children(directories: Iterable[Path], *, of: Collection[Path]) -> dict[Path, list[Path]]:
    """For each of the files `of`, the images in `directories` that record it as their backing file.

    Files without such images have no entry. Images that this user may not read are left out.
    """
    wanted = {real_name(path): path for path in of}
    found: dict[Path, list[Path]] = {}
    for entry in _images(directories):
        try:
            recorded = _backing_name(entry)
        except OSError:
            continue
        if recorded is not None:
            for path in _meant(entry, recorded, wanted):
                found.setdefault(path, []).append(entry)
    return found


def _images(directories: Iterable[Path]) -> Iterator[Path]:
    for directory in dict.fromkeys(Path(real_name(directory)) for directory in directories):
        with os_errors(directory), Directory.open(directory) as home:
            for name in home.names():
                try:
                    status = _looked_at(home, name)
                except (OSError, SnapchainError):  # a dangling link, or removed meanwhile
                    continue
                # Nothing smaller than a header is an image.
                if stat.S_ISREG(status.st_mode) and status.st_size >= _BACKING.size:
                    yield directory / name


def _looked_at(home: Directory, name: str) -> os.stat_result:
    """The status of a file, or of a link's target with the rights of the link's owner."""
    status = home.status(name)
    if stat.S_ISLNK(status.st_mode):
        with acting_as(home.rights_of_file(status)):
            return os.stat(name, dir_fd=home.fd)
    return status


def _backing_name(path: Path) -> str | None:
    """The backing name in a qcow2 header, even of a broken image. Raises OSError for an unreadable one."""
    try:
        fd = open_behind(path)
    except (FileNotFoundError, SnapchainError):  # gone, or swapped, meanwhile
        return None
    try:
        names = recorded_names(fd)
    finally:
        os.close(fd)
    return names[0] if names else None


def recorded_names(fd: int) -> tuple[str, ...]:
    """The files that an opened image's header names: its backing file, and files with its data. () for other files.

    Also of a broken image. Supports qcow2 (with its external data file), qcow, QED and VMDK; a VHD or VHDX records its
    parent outside the header. Raises OSError for an unreadable file.
    """
    head = os.pread(fd, _FIRST_BYTES, 0)
    if not head.startswith(_MAGICS):
        return ()
    head = os.pread(fd, _HEAD_BYTES, 0)
    names = _vmdk_names(head) if head.startswith(_VMDK) else _header_names(fd, head)
    return tuple(os.fsdecode(name) for name in names if name)


def _as_url(name: bytes) -> bytes:
    """The name of a data file as a URL: QEMU looks for it from its own directory, as it does with `file:`."""
    return name if not name or name.startswith(b"/") or is_protocol(os.fsdecode(name)) else b"file:" + name


def named_files(image: Path, name: str) -> tuple[Path, ...]:
    """The files that a recorded name may mean: plain paths, `file:`, strings of `json:`; () for other protocols."""
    # An image behind a symbolic link may be opened by either path.
    directories = dict.fromkeys([image.parent, Path(real_name(image)).parent])
    return tuple(directory / each for each in _paths(name) if "\0" not in each for directory in directories)


def mentions(name: str, file: Path) -> bool:
    """Whether a name could mean `file` without being a path to it: relative to QEMU's directory, or by a server."""
    if not is_protocol(name):
        return False
    scheme, _, rest = name.partition(":")
    if scheme in _FILE_PROTOCOLS:
        return not rest.startswith("/") and rest.rpartition("/")[2] == file.name
    strings = _json_strings(name)
    return any(file.name in each for each in ([name] if strings is None else strings) if not each.startswith("/"))


def is_protocol(name: str) -> bool:
    """Whether QEMU parses the name as a protocol, or as options."""
    return ":" in name.split("/", 1)[0]


def _paths(name: str) -> list[str]:
    if not is_protocol(name):
        return [name]
    scheme, _, rest = name.partition(":")
    if scheme in _FILE_PROTOCOLS:
        return [rest]
    return [each.removeprefix("file:") for each in _json_strings(name) or () if each]


def _json_strings(name: str) -> list[str] | None:
    """All strings in a `json:` name. None where it is none, or cannot be parsed."""
    if not name.startswith("json:"):
        return None
    try:
        return list(_strings(json.loads(name.removeprefix("json:"))))
    except (ValueError, RecursionError):
        return None


def _strings(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for each in value.values():
            yield from _strings(each)
    elif isinstance(value, list):
        for each in value:
            yield from _strings(each)


def _header_names(fd: int, head: bytes) -> list[bytes]:
    if head.startswith(_QED):
        place = _QED_BACKING.unpack_from(head, _QED_BACKING_AT) if len(head) >= 64 else (0, 0)
        return [head[place[0] : place[0] + place[1]] if place[1] <= MAX_BACKING_NAME_BYTES else b""]
    if len(head) < _BACKING.size:
        return []
    _, version, offset, length = _BACKING.unpack_from(head)
    name = b""
    if offset and 0 < length <= MAX_BACKING_NAME_BYTES:
        # The first cluster may be larger than the bytes read.
        name = os.pread(fd, length, offset) if offset <= _LARGEST_CLUSTER else b""
    return [name, *(map(_as_url, _data_files(head)) if version >= 3 else ())]


def _data_files(head: bytes) -> Iterator[bytes]:
    """Names of external data files, in the header extensions."""
    at = int.from_bytes(head[_HEADER_LENGTH_AT : _HEADER_LENGTH_AT + 4], "big")
    while at + EXTENSION.size <= len(head):
        kind, length = EXTENSION.unpack_from(head, at)
        if kind == ExtensionType.END:
            return
        if kind == ExtensionType.DATA_FILE:
            yield head[at + EXTENSION.size : at + EXTENSION.size + length]
        at += EXTENSION.size + -(-length // 8) * 8


def _vmdk_names(head: bytes) -> list[bytes]:
    found = _VMDK_NAME.findall(head)
    return [parent or extent for parent, extent in found]


def _meant(entry: Path, recorded: str, wanted: dict[str, Path]) -> list[Path]:
    places = {real_name(path) for path in named_files(entry, recorded)}
    return [path for place, path in wanted.items() if place in places or mentions(recorded, path)]
