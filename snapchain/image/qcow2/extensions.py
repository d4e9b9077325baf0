"""Header extensions: the backing format, refused features, and the names of persistent bitmaps.

Unknown extensions are allowed by the format and passed over; what is known must be well formed, as in
qcow2_read_extensions (QEMU 7.2).  Bitmap directories may hold 64 MiB; of a longer one the first MiB is read.
"""

from __future__ import annotations

from dataclasses import dataclass

from snapchain.errors import Corrupt, Unsupported
from snapchain.image.pread import pread
from snapchain.image.qcow2.format import (
    BITMAP_ENTRY,
    BITMAPS_EXTENSION,
    EXTENSION,
    MAX_BITMAP_DIRECTORY_BYTES,
    MAX_BITMAPS,
    Autoclear,
    ExtensionType,
    HeaderFields,
)

_DIRECTORY_READ = 1 << 20
_MAX_BACKING_FORMAT_BYTES = 15
_IN_USE = 1


@dataclass(frozen=True, slots=True)
class Bitmap:
    """A persistent dirty bitmap. granularity in bytes; in_use: it was not saved, so it says nothing."""

    name: str
    granularity: int
    in_use: bool


@dataclass(frozen=True, slots=True)
class Extensions:
    """What the extensions say; zeroes where there are no (valid) bitmaps."""

    backing_format: str | None = None
    nb_bitmaps: int = 0
    bitmap_directory_size: int = 0
    bitmap_directory_offset: int = 0


def read_extensions(head: bytes, fields: HeaderFields, *, subject: object) -> Extensions:
    """Parse the extension area, from `header_length` to the end of `head`.

    Raises Corrupt for malformed ones, Unsupported for an external data file or encryption.
    """
    found: dict[int, bytes] = {}
    at = fields.header_length
    while at + EXTENSION.size <= len(head):
        kind, length = EXTENSION.unpack_from(head, at)
        at += EXTENSION.size
        if kind == ExtensionType.END:
            break
        if length > len(head) - at:
            raise Corrupt(f"header extension {kind:#x} of {length} bytes leaves the header's cluster", subject=subject)
        if kind in found:
            raise Corrupt(f"header extension {kind:#x} stands twice", subject=subject)
        found[kind] = head[at : at + length]
        at += -(-length // 8) * 8
    if ExtensionType.DATA_FILE in found:
        raise Unsupported("the image names an external data file", subject=subject)
    if ExtensionType.CRYPTO_HEADER in found:
        raise Unsupported("the image carries an encryption header", subject=subject)
    backing_format = found.get(ExtensionType.BACKING_FORMAT)
    directory = (0, 0, 0)
    # Without its autoclear bit the extension is stale: a program that does not know bitmaps has written.
    if ExtensionType.BITMAPS in found and fields.autoclear_features & Autoclear.BITMAPS:
        directory = _directory(found[ExtensionType.BITMAPS], fields, subject)
    return Extensions(None if backing_format is None else _format_name(backing_format, subject), *directory)


def _format_name(data: bytes, subject: object) -> str:
    if len(data) > _MAX_BACKING_FORMAT_BYTES or not data.isascii() or not data.decode("ascii").isprintable():
        raise Corrupt("the recorded backing format is not a format's name", subject=subject)
    return data.decode("ascii")


def _directory(data: bytes, fields: HeaderFields, subject: object) -> tuple[int, int, int]:
    if fields.version < 3 or len(data) != BITMAPS_EXTENSION.size:
        raise Corrupt("the bitmaps extension is malformed", subject=subject)
    count, reserved, size, offset = BITMAPS_EXTENSION.unpack(data)
    if not 0 < count <= MAX_BITMAPS or reserved or not 0 < size <= MAX_BITMAP_DIRECTORY_BYTES:
        raise Corrupt(f"the bitmaps extension claims {count} bitmaps in {size} bytes", subject=subject)
    if not offset or offset % (1 << fields.cluster_bits):
        raise Corrupt(f"the bitmap directory is at offset {offset}, which is not cluster-aligned", subject=subject)
    return count, size, offset


def read_bitmaps(fd: int, extensions: Extensions, *, file_size: int, subject: object) -> tuple[Bitmap, ...]:
    """The persistent bitmaps that the directory lists (of a huge directory, those in its first MiB)."""
    if not extensions.nb_bitmaps:
        return ()
    offset, size = extensions.bitmap_directory_offset, extensions.bitmap_directory_size
    if offset + size > file_size:
        raise Corrupt(f"the bitmap directory at offset {offset} lies outside the file", subject=subject)
    directory = pread(fd, min(size, _DIRECTORY_READ), offset=offset, subject=subject)
    found: list[Bitmap] = []
    at = 0
    while len(found) < extensions.nb_bitmaps and at + BITMAP_ENTRY.size <= len(directory):
        _, _, flags, _, granularity_bits, name_size, extra = BITMAP_ENTRY.unpack_from(directory, at)
        start = at + BITMAP_ENTRY.size + extra
        at = -(-(start + name_size) // 8) * 8
        if at > size or granularity_bits > 63:
            raise Corrupt("the bitmap directory is malformed", subject=subject)
        name = directory[start : start + name_size].decode("utf-8", "backslashreplace")
        found.append(Bitmap(name, 1 << granularity_bits, bool(flags & _IN_USE)))
    return tuple(found)
