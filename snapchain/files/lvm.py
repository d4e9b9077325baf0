"""LVM2: the logical volumes of a physical volume that lies on the disk, as ranges of the disk.

    physical volume   [label]  sector 0 to 3: LABELONE, uuid, areas of data and of metadata
                      [metadata area]  a header, and the description of the volume group as text, in a ring
                      [extents]  the data

Linear and striped volumes are handled.  Any other kind of segment (thin, cache, RAID, mirror, snapshot) needs the
kernel's device mapper, and has no map here.  Everything is hostile: text, nesting and counts are bounded.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from snapchain.files.partitions import Partition, Read

_SECTOR = 512
_MOST_TEXT = 8 << 20
_MOST_DEPTH = 16
_MOST_PIECES = 1 << 16
_MOST_SIZE = 1 << 63
_MAGIC = b" LVM2 x[5A%r0N*>"
_TOKEN = re.compile(r'\s*(?:#[^\n]*\n\s*)*("(?:[^"\\]|\\.)*"|[A-Za-z0-9_.+/-]+|[{}\[\]=,])')


class Malformed(Exception):
    """The metadata cannot be understood."""


class Piece(NamedTuple):
    """Bytes [at, at + size) of a logical volume are those of the disk from `disk` on."""

    at: int
    size: int
    disk: int


@dataclass(frozen=True)
class LogicalVolume:
    """name: vg/lv; size: bytes. trouble: why it has no map, None where `pieces` is one"""

    name: str
    size: int
    pieces: tuple[Piece, ...] = ()
    trouble: str | None = None


class PhysicalVolume(NamedTuple):
    """start: where it lies on the disk; text: the description of its group"""

    uuid: str
    start: int
    text: str


def physical_volume(read: Read, where: Partition) -> PhysicalVolume | None:
    """The physical volume in a range of the disk; None where there is none. Raises Malformed."""
    head = read(where.start, 4 * _SECTOR)
    at = next((n * _SECTOR for n in range(4) if head[n * _SECTOR : n * _SECTOR + 8] == b"LABELONE"), None)
    if at is None or head[at + 24 : at + 32] != b"LVM2 001":
        return None
    at += int.from_bytes(head[at + 20 : at + 24], "little")
    uuid = head[at : at + 32].decode("ascii", "replace")
    areas = [struct.unpack_from("<QQ", head, each) for each in range(at + 40, len(head) - 15, 16)]
    ends = [number for number, area in enumerate(areas) if area == (0, 0)]
    if len(ends) < 2 or ends[1] == ends[0] + 1:
        raise Malformed("the physical volume has no metadata of its own")
    offset, size = areas[ends[0] + 1]
    header = read(where.start + offset, _SECTOR)
    if len(header) < _SECTOR or header[4:20] != _MAGIC:
        raise Malformed("its metadata area has no header")
    begin, length = struct.unpack_from("<QQ", header, 40)
    if not _SECTOR <= begin < size or not 0 < length <= min(_MOST_TEXT, size - _SECTOR):
        raise Malformed("its metadata lie outside of their area")
    first = min(length, size - begin)
    text = read(where.start + offset + begin, first)
    text += read(where.start + offset + _SECTOR, length - first) if first < length else b""
    return PhysicalVolume(uuid, where.start, text.rstrip(b"\0").decode("utf-8", "replace"))


def logical_volumes(found: Sequence[PhysicalVolume]) -> list[LogicalVolume]:
    """The logical volumes of all groups of which physical volumes were found, by name. Raises Malformed."""
    newest: dict[str, Mapping[str, Any]] = {}
    for each in found:
        for name, group in parsed(each.text).items():
            if isinstance(group, dict) and _number(group, "seqno") >= _number(newest.get(name, {}), "seqno"):
                newest[name] = group
    starts = {each.uuid: each.start for each in found}
    return sorted((each for name, group in newest.items() for each in _of_group(name, group, starts)), key=str)


def _of_group(name: str, group: Mapping[str, Any], starts: Mapping[str, int]) -> list[LogicalVolume]:
    extent = _number(group, "extent_size") * _SECTOR
    if extent <= 0:
        raise Malformed(f"the volume group {name} has extents of no size")
    begins = {
        label: starts[uuid] + _number(volume, "pe_start") * _SECTOR
        for label, volume in _section(group, "physical_volumes").items()
        if (uuid := str(volume.get("id", "")).replace("-", "")) in starts
    }
    volumes = []
    for label, volume in _section(group, "logical_volumes").items():
        status = volume.get("status")
        if not isinstance(status, list) or "VISIBLE" not in status:
            continue
        segments = [each for key, each in volume.items() if key.startswith("segment") and isinstance(each, dict)]
        size = sum(_number(each, "extent_count") for each in segments) * extent
        try:
            pieces = tuple(sorted(piece for each in segments for piece in _pieces(each, extent, begins)))
            _check_whole(pieces, size)
        except Malformed as error:
            shown = size if 0 <= size < _MOST_SIZE else 0
            volumes.append(LogicalVolume(f"{name}/{label}", shown, trouble=str(error)))
        else:
            volumes.append(LogicalVolume(f"{name}/{label}", size, pieces))
    return volumes


def _pieces(segment: Mapping[str, Any], extent: int, begins: Mapping[str, int]) -> list[Piece]:
    """Raises Malformed for a segment that has no map here."""
    kind = segment.get("type")
    if kind != "striped":
        raise Malformed(f"a logical volume of the kind {kind} needs the guest's own kernel")
    at = _number(segment, "start_extent") * extent
    size = _number(segment, "extent_count") * extent
    stripes = segment.get("stripes", [])
    if not isinstance(stripes, list) or len(stripes) != 2 * _number(segment, "stripe_count") or not stripes:
        raise Malformed("its stripes contradict their number")
    places = []
    for label, first in zip(stripes[::2], stripes[1::2], strict=True):
        if label not in begins:
            raise Malformed("a part of it lies on another disk of the guest")
        if not isinstance(first, int) or first < 0:
            raise Malformed("a stripe begins at no extent")
        places.append(begins[label] + first * extent)
    if len(places) == 1:
        return [Piece(at, size, places[0])]
    stripe = _number(segment, "stripe_size") * _SECTOR
    if stripe <= 0 or size // stripe > _MOST_PIECES:
        raise Malformed("it has too many stripes")
    return [
        Piece(at + n * stripe, stripe, places[n % len(places)] + n // len(places) * stripe)
        for n in range(size // stripe)
    ]


def _check_whole(pieces: Sequence[Piece], size: int) -> None:
    at = 0
    for piece in pieces:
        if piece.at != at or piece.size <= 0:
            raise Malformed("its segments leave a gap, or overlap")
        at += piece.size
    if at != size or not 0 < size < _MOST_SIZE:
        raise Malformed("its segments do not give its size")


def _number(of: Mapping[str, Any], key: str) -> int:
    value = of.get(key, 0)
    return value if isinstance(value, int) else 0


def _section(of: Mapping[str, Any], key: str) -> dict[str, dict[str, Any]]:
    value = of.get(key, {})
    return {name: each for name, each in value.items() if isinstance(each, dict)} if isinstance(value, dict) else {}


def parsed(text: str) -> dict[str, Any]:
    """The text of LVM metadata: sections as dictionaries, arrays as lists, numbers and strings. Raises Malformed."""
    tokens = _tokens(text)
    place = 0

    def take() -> str:
        nonlocal place
        if place >= len(tokens):
            raise Malformed("the description of the volume group ends in the middle")
        place += 1
        return tokens[place - 1]

    def value(word: str) -> Any:
        if word == "[":
            values = []
            while (each := take()) != "]":
                if each != ",":
                    values.append(value(each) if each != "[" else None)
            return values
        if word.startswith('"'):
            return word[1:-1]
        return int(word) if re.fullmatch(r"-?\d{1,18}", word, re.ASCII) else word

    def section(depth: int) -> dict[str, Any]:
        if depth > _MOST_DEPTH:
            raise Malformed("the description of the volume group is nested too deeply")
        found: dict[str, Any] = {}
        while place < len(tokens):
            name = take()
            if name == "}":
                return found
            follows = take()
            if follows == "{":
                found[name] = section(depth + 1)
            elif follows == "=":
                found[name] = value(take())
            else:
                raise Malformed("the description of the volume group is malformed")
        return found

    return section(0)


def _tokens(text: str) -> list[str]:
    tokens = []
    at = 0
    while found := _TOKEN.match(text, at):
        tokens.append(found[1])
        at = found.end()
    return tokens
