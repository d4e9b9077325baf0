"""The qcow2 format as numbers: magic, feature bits, entry masks, limits, and the header's fixed fields.

Names are those of QEMU's docs/interop/qcow2.txt and block/qcow2.h (7.2).  Everything on disk is big-endian.
Nothing here reads a file or checks an image: `header.py` and `tables.py` check, `write.py` writes.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum, IntFlag

MAGIC = b"QFI\xfb"
SECTOR = 512

MIN_CLUSTER_BITS = 9
MAX_CLUSTER_BITS = 21
MIN_EXTENDED_L2_CLUSTER_BITS = 14
"""A subcluster is a 32nd of a cluster and at least a sector."""
MAX_REFCOUNT_ORDER = 6
MAX_L1_BYTES = 32 << 20
MAX_REFCOUNT_TABLE_BYTES = 8 << 20
MAX_SNAPSHOTS = 65536
MAX_BITMAPS = 65535
MAX_BITMAP_DIRECTORY_BYTES = 64 << 20
MAX_BACKING_NAME_BYTES = 1023

SUBCLUSTERS = 32
"""Subclusters of a cluster where L2 entries are extended."""


class Incompatible(IntFlag):
    """Feature bits that a reader must support to open the image at all."""

    DIRTY = 1 << 0
    CORRUPT = 1 << 1
    DATA_FILE = 1 << 2
    COMPRESSION = 1 << 3
    EXTENDED_L2 = 1 << 4


class Autoclear(IntFlag):
    """Feature bits that a writer without support for them must clear."""

    BITMAPS = 1 << 0
    DATA_FILE_RAW = 1 << 1


KNOWN_INCOMPATIBLE = (
    Incompatible.DIRTY
    | Incompatible.CORRUPT
    | Incompatible.DATA_FILE
    | Incompatible.COMPRESSION
    | Incompatible.EXTENDED_L2
)


class CryptMethod(IntEnum):
    """`crypt_method` of the header."""

    NONE = 0
    AES = 1
    LUKS = 2


class CompressionType(IntEnum):
    """`compression_type` of the header."""

    ZLIB = 0
    ZSTD = 1


class ExtensionType(IntEnum):
    """Header extensions: u32 type, u32 length, data padded to 8 bytes."""

    END = 0x00000000
    BACKING_FORMAT = 0xE2792ACA
    FEATURE_NAMES = 0x6803F857
    BITMAPS = 0x23852875
    CRYPTO_HEADER = 0x0537BE77
    DATA_FILE = 0x44415441


EXTENSION = struct.Struct(">II")
BITMAPS_EXTENSION = struct.Struct(">IIQQ")
"""nb_bitmaps, reserved, bitmap_directory_size, bitmap_directory_offset."""
BITMAP_ENTRY = struct.Struct(">QIIBBHI")
"""bitmap_table_offset, bitmap_table_size, flags, type, granularity_bits, name_size, extra_data_size."""
SNAPSHOT_ENTRY_BYTES = 40
"""Fixed part of a snapshot table entry."""

COPIED = 1 << 63
"""L1 and standard L2 entries: the cluster's refcount is exactly one."""
COMPRESSED = 1 << 62
"""L2 entries: the rest is a compressed cluster descriptor."""
ZERO_FLAG = 1 << 0
"""Standard L2 entries of version 3 without extended L2: the cluster reads as zeroes, allocated or not."""
OFFSET_MASK = 0x00FFFFFFFFFFFE00
"""L1 and standard L2 entries: host offset, bits 9 to 55."""
L1_RESERVED = 0x7F000000000001FF
L2_RESERVED = 0x3F000000000001FE
"""Standard L2 entries; with extended L2 bit 0 is reserved too."""
REFCOUNT_TABLE_RESERVED = 0x1FF

_V2 = struct.Struct(">4sIQIIQIIQQIIQ")
_V3 = struct.Struct(">QQQII")
V2_HEADER_BYTES = _V2.size
V3_MIN_HEADER_BYTES = V2_HEADER_BYTES + _V3.size
V3_HEADER_BYTES = V3_MIN_HEADER_BYTES + 8
"""With `compression_type` and its padding, as QEMU since 5.1 writes it."""


def compressed_offset_bits(cluster_bits: int) -> int:
    """Bits of a compressed cluster descriptor that hold the host offset (in bytes); the sector count follows.

    The count, `cluster_bits - 8` bits wide, is of 512-byte sectors beside the one that holds the offset.
    """
    return 62 - (cluster_bits - 8)


def guest_bytes_per_l2(cluster_bits: int, *, extended_l2: bool) -> int:
    """Guest bytes that one L2 table (one cluster of entries) maps."""
    return 1 << (2 * cluster_bits - (4 if extended_l2 else 3))


@dataclass(frozen=True, slots=True, kw_only=True)
class HeaderFields:
    """The header's fixed fields as stored on disk, unchecked. Offsets and sizes in bytes."""

    version: int = 3
    backing_file_offset: int = 0
    backing_file_size: int = 0
    cluster_bits: int = 16
    size: int = 0
    crypt_method: int = CryptMethod.NONE
    l1_size: int = 0
    """In entries of 8 bytes."""
    l1_table_offset: int = 0
    refcount_table_offset: int = 0
    refcount_table_clusters: int = 0
    nb_snapshots: int = 0
    snapshots_offset: int = 0
    incompatible_features: int = 0
    compatible_features: int = 0
    autoclear_features: int = 0
    refcount_order: int = 4
    header_length: int = V3_HEADER_BYTES
    compression_type: int = CompressionType.ZLIB

    def pack(self) -> bytes:
        """`header_length` bytes for version 3 (72 for version 2), without extensions."""
        first = _V2.pack(
            MAGIC,
            self.version,
            self.backing_file_offset,
            self.backing_file_size,
            self.cluster_bits,
            self.size,
            self.crypt_method,
            self.l1_size,
            self.l1_table_offset,
            self.refcount_table_offset,
            self.refcount_table_clusters,
            self.nb_snapshots,
            self.snapshots_offset,
        )
        if self.version == 2:
            return first
        second = _V3.pack(
            self.incompatible_features,
            self.compatible_features,
            self.autoclear_features,
            self.refcount_order,
            self.header_length,
        )
        return (first + second + bytes([self.compression_type])).ljust(self.header_length, b"\0")

    @staticmethod
    def unpack(head: bytes) -> HeaderFields:
        """From the first bytes of a file, which start with MAGIC; fields that a version lacks get its defaults.

        Raises struct.error when `head` is shorter than the version's fixed part.
        """
        (
            _,
            version,
            backing_file_offset,
            backing_file_size,
            cluster_bits,
            size,
            crypt_method,
            l1_size,
            l1_table_offset,
            refcount_table_offset,
            refcount_table_clusters,
            nb_snapshots,
            snapshots_offset,
        ) = _V2.unpack_from(head)
        incompatible = compatible = autoclear = compression_type = 0
        refcount_order, header_length = 4, V2_HEADER_BYTES
        if version == 3:
            incompatible, compatible, autoclear, refcount_order, header_length = _V3.unpack_from(head, V2_HEADER_BYTES)
            if header_length > V3_MIN_HEADER_BYTES and len(head) > V3_MIN_HEADER_BYTES:
                compression_type = head[V3_MIN_HEADER_BYTES]
        return HeaderFields(
            version=version,
            backing_file_offset=backing_file_offset,
            backing_file_size=backing_file_size,
            cluster_bits=cluster_bits,
            size=size,
            crypt_method=crypt_method,
            l1_size=l1_size,
            l1_table_offset=l1_table_offset,
            refcount_table_offset=refcount_table_offset,
            refcount_table_clusters=refcount_table_clusters,
            nb_snapshots=nb_snapshots,
            snapshots_offset=snapshots_offset,
            incompatible_features=incompatible,
            compatible_features=compatible,
            autoclear_features=autoclear,
            refcount_order=refcount_order,
            header_length=header_length,
            compression_type=compression_type,
        )


def pack_extension(kind: int, data: bytes) -> bytes:
    """One header extension, padded to 8 bytes."""
    return EXTENSION.pack(kind, len(data)) + data.ljust(-(-len(data) // 8) * 8, b"\0")
