"""What a user names: the path of an image, or DEST::DISK[@POINT].

    /images/web1.qcow2                an image
    /backup::web1/vda                 the newest point of disk web1/vda in the repository at /backup
    s3://bucket/prefix::web1/vda@7    its point 7
    /backup                           a destination, where a command wants one

The last '::' separates destination and disk, since a URL may contain '::' and a disk's name may not. A '::' in the
brackets of an IPv6 address does not count. The first '@' after it separates disk and point.

Where a command takes an image or a disk, text with '::' that is the path of a file here is that image, whatever else it
could mean; so is './a::b' unless './a' is a directory. Where only a disk can be meant, it is one.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from snapchain.errors import InvalidInput

_MARK = "::"
_IPV6_HOST = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^/\[\]]*\[[^/\]]*")


@dataclass(frozen=True, slots=True)
class ImageAddress:
    """A disk image here."""

    path: Path

    def __str__(self) -> str:
        return str(self.path)


@dataclass(frozen=True, slots=True)
class PointAddress:
    """A disk in a destination. point: as written (latest, a number, a label, a time), None where none is."""

    dest: str
    disk: str
    point: str | None = None

    def __str__(self) -> str:
        at = "" if self.point is None else f"@{self.point}"
        return f"{self.dest}{_MARK}{self.disk}{at}"


@dataclass(frozen=True, slots=True)
class DestinationAddress:
    """A whole destination, where a command can also do with one disk of it."""

    dest: str

    def __str__(self) -> str:
        return self.dest


def parse_address(text: str) -> ImageAddress | PointAddress:
    """An image's path, or DEST::DISK[@POINT]; looks whether there is such a file.

    Raises InvalidInput, also for a directory.
    """
    if _MARK in text and _is_image(text):
        return ImageAddress(Path(text))
    address = _parsed(text)
    if isinstance(address, ImageAddress) and _is_directory(address.path):
        raise InvalidInput("this is no image", subject=text, hint=f"a disk of a destination is {text}::DISK")
    return address


def _is_directory(path: Path) -> bool:
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False


def _is_image(text: str) -> bool:
    try:
        if Path(text).is_file() or Path(text).is_block_device():
            return True
        return text.startswith(("./", "../")) and not Path(text.rpartition(_MARK)[0]).is_dir()
    except (OSError, ValueError):  # a name that is too long for this filesystem, or holds a zero byte
        return False


def _parsed(text: str) -> ImageAddress | PointAddress:
    host = _IPV6_HOST.match(text)
    mark = text.rfind(_MARK, host.end() if host else 0)
    if mark < 0:
        if not text:
            raise InvalidInput("an empty address", hint="name an image, or DEST::DISK[@POINT]")
        return ImageAddress(Path(text))
    dest, rest = text[:mark], text[mark + len(_MARK) :]
    disk, at, point = rest.partition("@")
    if not dest or not disk or (at and not point):
        raise InvalidInput(
            "not an address", subject=text, hint="write DEST::DISK or DEST::DISK@POINT, such as /backup::web1/vda@7"
        )
    return PointAddress(dest, disk, point if at else None)


def parse_point_address(text: str) -> PointAddress:
    """DEST::DISK[@POINT]. Raises InvalidInput for anything else."""
    address = _parsed(text)
    if isinstance(address, ImageAddress):
        if _is_image(text):
            raise InvalidInput(
                "this is an image, not a disk of a destination",
                subject=text,
                hint="write DEST::DISK, such as /backup::web1/vda",
            )
        raise InvalidInput("no disk is named", subject=text, hint=_with_disk(text))
    return address


def _with_disk(text: str) -> str:
    """The hint for an address without a disk: what may have been meant."""
    dest, mark, disk = text.rpartition(":")
    if mark and dest and disk and not disk.startswith("/") and dest not in {"dir", "file", "s3"}:
        return f"two colons stand before the disk: {dest}::{disk}"
    return f"write DEST::DISK, such as {text}::web1/vda"


def parse_disk_address(text: str) -> PointAddress:
    """DEST::DISK. Raises InvalidInput for anything else, a point included."""
    address = parse_point_address(text)
    if address.point is not None:
        raise InvalidInput("a disk is wanted here, not a point of it", subject=text, hint=f"leave out @{address.point}")
    return address


def parse_destination(text: str) -> DestinationAddress | PointAddress:
    """DEST[::DISK[@POINT]]. Raises InvalidInput."""
    address = _parsed(text)
    return address if isinstance(address, PointAddress) else DestinationAddress(text)


_SCHEME = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*)://|(?P<bare>s3|file|dir|ssh|memory):", re.IGNORECASE)


def located(dest: str, *, directory: Path = Path()) -> str:
    """The destination as a store wants it.

    A path from `directory` (relative: from the current one) becomes absolute. A URL stays, with its scheme in lower
    case. So does text that begins like a URL (`s3:bucket`): that is probably a mistake, and must become an error.
    `./s3:bucket` is a path.
    """
    found = _SCHEME.match(dest)
    if found is None:
        return str((directory / dest).absolute())
    length = len(found["scheme"] or found["bare"])
    return dest[:length].lower() + dest[length:]


def local_directory(dest: str) -> Path | None:
    """The directory of this machine at a located address; None for a bucket or another host."""
    scheme = next((each for each in ("file://", "dir:") if dest.lower().startswith(each)), "")
    return Path(dest[len(scheme) :]) if scheme or dest.startswith("/") else None


def in_full(wanted: str | None) -> str | None:
    """The text after '@', with a date or a local time written as an RFC 3339 time; other text as it is.

    Another host has another clock and another zone.
    """
    if wanted is None:
        return None
    from snapchain.host.local_time import local_zone  # inside: most addresses name no time
    from snapchain.model.points import instant

    moment = instant(wanted, now=datetime.now(UTC), zone=local_zone())
    return wanted if moment is None else moment.isoformat()
