"""Parse and check the qcow2 header before anything else of the file is read.

Reads at most the first 64 KiB of the file.  The checks are those of qcow2_do_open (QEMU 7.2, block/qcow2.c)
and of docs/interop/qcow2.txt; snapchain also refuses encryption, external data files and dirty images.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from snapchain.errors import Corrupt, Unsupported
from snapchain.image.pread import file_bytes, pread
from snapchain.image.qcow2.format import (
    BITMAP_ENTRY,
    BITMAPS_EXTENSION,
    EXTENSION,
    KNOWN_INCOMPATIBLE,
    MAGIC,
    MAX_BACKING_NAME_BYTES,
    MAX_BITMAP_DIRECTORY_BYTES,
    MAX_BITMAPS,
    MAX_CLUSTER_BITS,
    MAX_L1_BYTES,
    MAX_REFCOUNT_ORDER,
    MAX_REFCOUNT_TABLE_BYTES,
    MAX_SNAPSHOTS,
    MIN_CLUSTER_BITS,
    MIN_EXTENDED_L2_CLUSTER_BITS,
    SECTOR,
    SUBCLUSTERS,
    V2_HEADER_BYTES,
    V3_MIN_HEADER_BYTES,
    Autoclear,
    CompressionType,
    ExtensionType,
    HeaderFields,
    Incompatible,
    guest_bytes_per_l2,
)

HEAD_BYTES = 64 << 10


@dataclass(frozen=True, slots=True)
class Backing:
    """The backing file as the header records it; `format` is None where the image leaves it to be probed.

    is_uri: a name to be written is meant to be a URI, such as that of an export; else it must be that of a file
    """

    name: str
    format: str | None
    is_uri: bool = field(default=False, compare=False)


@dataclass(frozen=True, slots=True)
class Qcow2Header:
    """A header that passed every check. Sizes and offsets in bytes.

    bitmaps: persistent bitmaps; also empty when a program without support for them has written to the image
    """

    fields: HeaderFields
    backing: Backing | None
    bitmaps: tuple[Bitmap, ...]
    bitmap_directory: tuple[int, int]
    """Offset and bytes; (0, 0) for none."""

    @property
    def size(self) -> int:
        """Virtual size. As in QEMU, which counts sectors, without the odd bytes of the last one."""
        return self.fields.size // SECTOR * SECTOR

    @property
    def version(self) -> int:
        """2 or 3."""
        return self.fields.version

    @property
    def cluster_bits(self) -> int:
        """9 to 21."""
        return self.fields.cluster_bits

    @property
    def cluster_size(self) -> int:
        """Bytes of a cluster."""
        return 1 << self.fields.cluster_bits

    @property
    def extended_l2(self) -> bool:
        """L2 entries carry a bitmap of subclusters."""
        return bool(self.fields.incompatible_features & Incompatible.EXTENDED_L2)

    @property
    def grain(self) -> int:
        """The smallest piece that is allocated on its own: a cluster, or a subcluster."""
        return self.cluster_size // SUBCLUSTERS if self.extended_l2 else self.cluster_size

    @property
    def compression(self) -> Literal["zlib", "zstd"]:
        """The method of compressed clusters."""
        return "zstd" if self.fields.compression_type == CompressionType.ZSTD else "zlib"

    @property
    def snapshots(self) -> int:
        """Internal snapshots."""
        return self.fields.nb_snapshots

    @property
    def guest_bytes_per_l2(self) -> int:
        """Guest bytes that one L2 table maps."""
        return guest_bytes_per_l2(self.cluster_bits, extended_l2=self.extended_l2)

    @property
    def l1_entries(self) -> int:
        """Entries of the L1 table that map guest bytes; what follows them holds VM state."""
        return -(-self.fields.size // self.guest_bytes_per_l2)


def is_qcow2(fd: int, *, subject: object) -> bool:
    """Whether an open file begins with the qcow2 magic."""
    length = min(len(MAGIC), file_bytes(fd))
    return pread(fd, length, offset=0, subject=subject) == MAGIC


def read_header(fd: int, *, subject: object) -> Qcow2Header:
    """Read and check the header of an open file.

    Raises Corrupt for a broken header, Unsupported for a valid one that is refused.
    """
    file_size = file_bytes(fd)
    head = pread(fd, min(HEAD_BYTES, file_size), offset=0, subject=subject)
    if head[: len(MAGIC)] != MAGIC:
        raise Corrupt("not a qcow2 image: the magic bytes are missing", subject=subject)
    if len(head) < V2_HEADER_BYTES:
        raise Corrupt(f"the file is cut off inside the qcow2 header, at {len(head)} bytes", subject=subject)
    version = int.from_bytes(head[4:8], "big")
    if version not in (2, 3):
        raise Unsupported(f"qcow2 version {version}; only 2 and 3 are known", subject=subject)
    if version == 3 and len(head) < V3_MIN_HEADER_BYTES:
        raise Corrupt(f"the file is cut off inside the qcow2 header, at {len(head)} bytes", subject=subject)
    fields = HeaderFields.unpack(head)
    _check_numbers(fields, subject)
    _check_features(fields, subject)
    head = head[: 1 << fields.cluster_bits]
    _check_tables(fields, file_size, subject)
    end = fields.backing_file_offset or len(head)
    extensions = read_extensions(head[:end], fields, subject=subject)
    return Qcow2Header(
        fields,
        _backing(head, fields, extensions, subject),
        read_bitmaps(fd, extensions, file_size=file_size, subject=subject),
        (extensions.bitmap_directory_offset, extensions.bitmap_directory_size),
    )


def _check_numbers(fields: HeaderFields, subject: object) -> None:
    if not MIN_CLUSTER_BITS <= fields.cluster_bits <= MAX_CLUSTER_BITS:
        raise Corrupt(f"cluster_bits is {fields.cluster_bits}; legal are 9 to 21", subject=subject)
    if fields.refcount_order > MAX_REFCOUNT_ORDER:
        raise Corrupt(f"refcount_order is {fields.refcount_order}; legal are 0 to 6", subject=subject)
    length = fields.header_length
    too_short = fields.version == 3 and length < V3_MIN_HEADER_BYTES
    if too_short or length % 8 or length > 1 << fields.cluster_bits:
        raise Corrupt(f"header_length is {length}; legal are multiples of 8 from 104 to a cluster", subject=subject)


def _check_features(fields: HeaderFields, subject: object) -> None:
    if fields.crypt_method:
        raise Unsupported(f"the image is encrypted (crypt_method {fields.crypt_method})", subject=subject)
    incompatible = fields.incompatible_features
    unknown = incompatible & ~int(KNOWN_INCOMPATIBLE)
    if unknown:
        bits = ", ".join(str(bit) for bit in range(64) if unknown >> bit & 1)
        raise Unsupported(f"unknown incompatible feature bits: {bits}", subject=subject)
    if incompatible & Incompatible.DATA_FILE:
        raise Unsupported("the image keeps its data in an external data file", subject=subject)
    if incompatible & Incompatible.CORRUPT:
        raise Corrupt(
            "the image is marked corrupt", subject=subject, hint="repair a copy of it with `qemu-img check -r all`"
        )
    if incompatible & Incompatible.DIRTY:
        raise Corrupt(
            "the image is marked dirty: it was not closed cleanly, or somebody writes to it",
            subject=subject,
            hint="with lazy_refcounts=on it is so while a guest has it open, a paused one too: shut that down; when "
            "nobody has it open, repair it with `qemu-img check -r leaks`",
        )
    flagged = bool(incompatible & Incompatible.COMPRESSION)
    if fields.compression_type not in (CompressionType.ZLIB, CompressionType.ZSTD):
        raise Unsupported(f"unknown compression type {fields.compression_type}", subject=subject)
    if flagged != (fields.compression_type != CompressionType.ZLIB):
        raise Corrupt(
            f"compression type {fields.compression_type} contradicts the compression feature bit", subject=subject
        )
    if incompatible & Incompatible.EXTENDED_L2 and fields.cluster_bits < MIN_EXTENDED_L2_CLUSTER_BITS:
        raise Corrupt("extended L2 entries need clusters of 16 KiB at least", subject=subject)


def _check_tables(fields: HeaderFields, file_size: int, subject: object) -> None:
    cluster = 1 << fields.cluster_bits
    extended = bool(fields.incompatible_features & Incompatible.EXTENDED_L2)
    needed = -(-fields.size // guest_bytes_per_l2(fields.cluster_bits, extended_l2=extended))
    if needed * 8 > MAX_L1_BYTES:
        raise Corrupt(
            f"a virtual size of {fields.size} bytes is more than clusters of {cluster} bytes can map", subject=subject
        )
    if fields.l1_size * 8 > MAX_L1_BYTES:
        raise Corrupt(f"the L1 table has {fields.l1_size} entries, more than 32 MiB", subject=subject)
    if fields.l1_size < needed:
        raise Corrupt(
            f"the L1 table has {fields.l1_size} entries, too small for the virtual size (needs {needed})",
            subject=subject,
        )
    table_bytes = fields.refcount_table_clusters * cluster
    if not table_bytes:
        raise Corrupt("the image has no refcount table", subject=subject)
    if table_bytes > MAX_REFCOUNT_TABLE_BYTES:
        raise Corrupt(f"the refcount table takes {table_bytes} bytes, more than 8 MiB", subject=subject)
    if fields.nb_snapshots > MAX_SNAPSHOTS:
        raise Corrupt(f"{fields.nb_snapshots} internal snapshots, more than {MAX_SNAPSHOTS}", subject=subject)
    # QEMU leaves an offset behind when the last snapshot goes: of no bytes, maybe beyond the end.
    snapshots_offset = fields.snapshots_offset if fields.nb_snapshots else 0
    for name, offset, length in (
        ("L1 table", fields.l1_table_offset, fields.l1_size * 8),
        ("refcount table", fields.refcount_table_offset, table_bytes),
        ("snapshot table", snapshots_offset, fields.nb_snapshots * 40),
    ):
        if not length and not offset:
            continue
        if offset % cluster or not offset:
            raise Corrupt(f"the {name} is at offset {offset}, which is 0 or not cluster-aligned", subject=subject)
        if offset + length > file_size:
            raise Corrupt(
                f"the {name} ({length} bytes at offset {offset}) lies outside the file of {file_size} bytes",
                subject=subject,
            )


def _backing(head: bytes, fields: HeaderFields, extensions: Extensions, subject: object) -> Backing | None:
    start, length = fields.backing_file_offset, fields.backing_file_size
    if start > 1 << fields.cluster_bits:
        raise Corrupt(f"the backing file name is at offset {start}, outside the first cluster", subject=subject)
    if not start or not length:
        return None
    if length > MAX_BACKING_NAME_BYTES:
        raise Corrupt(f"the backing file name is {length} bytes long; legal are 1023", subject=subject)
    if start < fields.header_length or start + length > len(head):
        raise Corrupt("the backing file name lies outside the first cluster", subject=subject)
    try:
        name = head[start : start + length].decode()
    except UnicodeDecodeError as error:
        raise Unsupported("the backing file name is not UTF-8", subject=subject) from error
    return Backing(name, extensions.backing_format)


# --- Header extensions: the backing format, refused features, and the names of persistent bitmaps.
#
# Unknown extensions are allowed by the format and skipped; known ones must be well formed, as in
# qcow2_read_extensions (QEMU 7.2).  Bitmap directories may hold 64 MiB; of a longer one the first MiB is read.

_DIRECTORY_READ = 1 << 20
_MAX_BACKING_FORMAT_BYTES = 15
_IN_USE = 1


@dataclass(frozen=True, slots=True)
class Bitmap:
    """A persistent dirty bitmap. granularity in bytes; in_use: it was not saved, so its content is void."""

    name: str
    granularity: int
    in_use: bool


@dataclass(frozen=True, slots=True)
class Extensions:
    """The values of the extensions; zeroes where there are no (valid) bitmaps."""

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
    # Without its autoclear bit the extension is stale: a program without support for bitmaps has written.
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
