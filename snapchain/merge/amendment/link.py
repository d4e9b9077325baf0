"""A header with another backing link, so that one write of one sector switches from the old one to the new.

The extensions are written again in their order with the new backing format among them.  Where they reach beyond the
first sector, they may not change there; then a name that does not fit either is put into unused bytes of the header
cluster first, which nothing points to yet.  The table of feature names, which only serves messages, is left out where
there is no room otherwise.  Source: docs/interop/qcow2.txt; the order is that of qcow2_update_header (QEMU 7.2).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from snapchain.errors import Unsupported
from snapchain.image.pread import pread
from snapchain.image.qcow2.encode import backing_name
from snapchain.image.qcow2.format import EXTENSION, SECTOR, V2_HEADER_BYTES, Autoclear, ExtensionType, pack_extension
from snapchain.image.qcow2.header import Backing

_LINK = struct.Struct(">QI")
_LINK_AT = 8
_HEADER_LENGTH = struct.Struct(">I")
_HEADER_LENGTH_AT = 100
_AUTOCLEAR = struct.Struct(">Q")
_AUTOCLEAR_AT = 88
_HEAD_AT_MOST = 64 << 10


@dataclass(frozen=True, slots=True)
class Relink:
    """text goes to text_offset and is flushed; then the first sector is written."""

    sector: bytes
    text: bytes = b""
    text_offset: int = 0


def header_head(fd: int, *, subject: object) -> bytes:
    """The header cluster of an open image that was judged, or its first 64 KiB."""
    size = 1 << int.from_bytes(pread(fd, 4, offset=20, subject=subject), "big")
    return pread(fd, min(size, _HEAD_AT_MOST), offset=0, subject=subject)


def relink(head: bytes, backing: Backing | None, *, subject: object, keeps_bitmaps: bool = True) -> Relink:
    """Give a header cluster (or its first 64 KiB) another backing link, or none.

    keeps_bitmaps: else the header lists none any more; their clusters become unreferenced

    Raises Unsupported when it has no room for that, InvalidInput for a name that QEMU would not take as a plain path.
    """
    name = backing_name(backing.name) if backing else b""
    length = V2_HEADER_BYTES
    if int.from_bytes(head[4:8], "big") == 3:
        (length,) = _HEADER_LENGTH.unpack_from(head, _HEADER_LENGTH_AT)
    old_name, old_length = _LINK.unpack_from(head, _LINK_AT)
    extensions, old_end = _extensions(head, length, old_name or len(head))
    if not keeps_bitmaps:
        head = _without_bitmaps(head)
        extensions = [one for one in extensions if one[0] != ExtensionType.BITMAPS]
    old = head[:SECTOR]
    for kept in (extensions, [one for one in extensions if one[0] != ExtensionType.FEATURE_NAMES]):
        body = head[:length] + _packed(kept, backing)
        if len(body) + len(name) <= SECTOR:
            return Relink(_linked((body + name).ljust(SECTOR, b"\0"), len(body), name))
        if len(body) > SECTOR and head[SECTOR : len(body)] != body[SECTOR:]:
            continue
        at = _room(len(name), [(0, max(len(body), old_end)), (old_name, old_name + old_length)], len(head))
        if at is not None:
            sector = bytearray(body[:SECTOR].ljust(SECTOR, b"\0"))
            # What lies behind the extensions stays, whether the old name or the beginning of the new one.
            sector[len(body) :] = old[len(body) :]
            inside = name[: max(0, SECTOR - at)]
            sector[at : at + len(inside)] = inside
            return Relink(_linked(bytes(sector), at, name), name, at)
    raise Unsupported(
        "its header has no room for another backing link",
        subject=subject,
        hint="merge into a new file instead",
    )


def _without_bitmaps(head: bytes) -> bytes:
    """The flag that the extension is valid is cleared."""
    changed = bytearray(head)
    (features,) = _AUTOCLEAR.unpack_from(head, _AUTOCLEAR_AT)
    _AUTOCLEAR.pack_into(changed, _AUTOCLEAR_AT, features & ~int(Autoclear.BITMAPS))
    return bytes(changed)


def _extensions(head: bytes, start: int, stop: int) -> tuple[list[tuple[int, bytes]], int]:
    """(type, data) of all but the end, and where they end; the header was judged, so they are well formed."""
    found: list[tuple[int, bytes]] = []
    at = start
    while at + EXTENSION.size <= stop:
        kind, length = EXTENSION.unpack_from(head, at)
        at += EXTENSION.size
        if kind == ExtensionType.END:
            break
        found.append((kind, head[at : at + length]))
        at += -(-length // 8) * 8
    return found, at


def _packed(extensions: list[tuple[int, bytes]], backing: Backing | None) -> bytes:
    """With the backing format in its old place, else first."""
    placed = [(kind, data) for kind, data in extensions if kind != ExtensionType.BACKING_FORMAT]
    if backing is not None:
        kinds = [kind for kind, _ in extensions]
        place = kinds.index(ExtensionType.BACKING_FORMAT) if ExtensionType.BACKING_FORMAT in kinds else 0
        placed.insert(place, (ExtensionType.BACKING_FORMAT, (backing.format or "").encode()))
    return b"".join(pack_extension(kind, data) for kind, data in placed) + pack_extension(ExtensionType.END, b"")


def _room(length: int, taken: list[tuple[int, int]], size: int) -> int | None:
    """Where so many bytes are free: after the last taken range, else in the gap before it."""
    if not length:
        return 0
    (_, low), (begin, end) = taken
    for at in (-(-low // 8) * 8, max(-(-low // 8) * 8, end)):
        if at + length <= size and (at >= end or at + length <= begin):
            return at
    return None


def _linked(sector: bytes, at: int, name: bytes) -> bytes:
    found = bytearray(sector)
    _LINK.pack_into(found, _LINK_AT, at if name else 0, len(name))
    return bytes(found)
