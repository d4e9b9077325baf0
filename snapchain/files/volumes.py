"""The volumes of a disk, by name, and what each of them holds, by its first bytes.

disk        all of it, where it has no partition table
p1, p2      a partition
vg/lv       a logical volume of LVM
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

from snapchain.files import lvm
from snapchain.files.disk import Disk, Volume
from snapchain.files.lvm import Malformed, Piece
from snapchain.files.partitions import Partition, partitions

_HEAD = 0x10400
_MOST_VOLUMES = 1024


class Content(StrEnum):
    """What a volume holds."""

    EXT = "ext"
    XFS = "xfs"
    NTFS = "ntfs"
    FAT = "fat"
    EXFAT = "exfat"
    BTRFS = "btrfs"
    LUKS = "luks"
    BITLOCKER = "bitlocker"
    ZFS = "zfs"
    SWAP = "swap"
    LVM = "lvm"
    UNKNOWN = "unknown"


READABLE = frozenset({Content.EXT, Content.XFS, Content.NTFS, Content.FAT, Content.EXFAT})

_EXT_RECOVER = 0x4
# filetype, recover, meta_bg, extents, 64bit, mmp, flex_bg, ea_inode, csum_seed, largedir, inline_data, casefold
_EXT_KNOWN = 0x2 | 0x4 | 0x10 | 0x40 | 0x80 | 0x100 | 0x200 | 0x400 | 0x2000 | 0x4000 | 0x8000 | 0x20000
_EXT_ENCRYPT = 0x10000
_XFS_KNOWN = 0x1 | 0x2 | 0x4 | 0x8 | 0x20  # ftype, sparse inodes, meta uuid, big time, many extents
_XFS_NEEDS_REPAIR = 0x10


@dataclass(frozen=True)
class Described:
    """A volume. size: bytes; trouble: why its files cannot be read; is_dirty: whether its journal has to be replayed"""

    name: str
    size: int
    content: Content
    pieces: tuple[Piece, ...]
    trouble: str | None = None
    is_dirty: bool = False


def volumes(disk: Disk) -> list[Described]:
    """All volumes of a disk: partitions by number, then logical volumes by name. Raises OSError."""
    whole = _described(disk, "disk", disk.size, (Piece(0, disk.size, 0),))
    table = [] if whole.content in READABLE else partitions(disk.read, disk.size)
    if not table:
        places, found = [Partition("disk", 0, disk.size)], [whole]
    else:
        places = table[:_MOST_VOLUMES]
        found = [_described(disk, each.name, each.size, (Piece(0, each.size, each.start),)) for each in places]
    physical, listed = [], []
    for place, each in zip(places, found, strict=True):
        trouble = each.trouble
        if each.content is Content.LVM:
            try:
                if (volume := lvm.physical_volume(disk.read, place)) is not None:
                    physical.append(volume)
            except Malformed as error:
                trouble = f"{error}"
        listed.append(each if trouble == each.trouble else Described(each.name, each.size, each.content, (), trouble))
    try:
        logical = lvm.logical_volumes(physical)[:_MOST_VOLUMES]
    except Malformed as error:
        return [
            Described(each.name, each.size, each.content, (), str(error)) if each.content is Content.LVM else each
            for each in listed
        ]
    return [*listed, *_logical(disk, logical)]


def _logical(disk: Disk, found: list[lvm.LogicalVolume]) -> Iterator[Described]:
    for each in found:
        if each.trouble is not None:
            yield Described(each.name, each.size, Content.UNKNOWN, (), each.trouble)
        elif any(piece.disk < 0 or piece.disk + piece.size > disk.size for piece in each.pieces):
            yield Described(each.name, each.size, Content.UNKNOWN, (), "it reaches past the end of the disk")
        else:
            yield _described(disk, each.name, each.size, each.pieces)


def _described(disk: Disk, name: str, size: int, pieces: tuple[Piece, ...]) -> Described:
    head = Volume(disk, pieces).pread(0, _HEAD)
    content = content_of(head)
    trouble, is_dirty = _judged(content, head)
    return Described(name, size, content, pieces, trouble, is_dirty)


def content_of(head: bytes) -> Content:
    """What begins with these bytes, 66,560 of them where there are so many."""

    def has(offset: int, magic: bytes) -> bool:
        return head[offset : offset + len(magic)] == magic

    if has(0, b"LUKS\xba\xbe"):
        return Content.LUKS
    if has(3, b"-FVE-FS-"):
        return Content.BITLOCKER
    if any(has(512 * sector, b"LABELONE") for sector in range(4)):
        return Content.LVM
    if has(0, b"XFSB"):
        return Content.XFS
    if has(3, b"NTFS    "):
        return Content.NTFS
    if has(3, b"EXFAT   "):
        return Content.EXFAT
    if has(0x10040, b"_BHRfS_M"):
        return Content.BTRFS
    if has(0x438, b"\x53\xef"):
        return Content.EXT
    if has(4086, b"SWAPSPACE2") or has(4086, b"SWAP-SPACE"):
        return Content.SWAP
    if has(510, b"\x55\xaa") and (has(0x36, b"FAT1") or has(0x36, b"FAT ") or has(0x52, b"FAT32")):
        return Content.FAT
    return Content.UNKNOWN


_NOT_READ = {
    Content.BTRFS: "Btrfs is not supported",
    Content.LUKS: "it is encrypted by LUKS, in the guest",
    Content.BITLOCKER: "it is encrypted by BitLocker, in the guest",
    Content.SWAP: "it is swap space",
    Content.LVM: "it is a physical volume of LVM: name a logical volume",
    Content.UNKNOWN: "it holds no file system that snapchain knows",
}


def _judged(content: Content, head: bytes) -> tuple[str | None, bool]:
    """(why the files cannot be read, whether the journal has to be replayed)"""
    if content is Content.EXT and len(head) >= 0x468:
        incompatible = int.from_bytes(head[0x460:0x464], "little")
        if incompatible & _EXT_ENCRYPT:
            return "the guest encrypts files in it (fscrypt)", False
        if unknown := incompatible & ~_EXT_KNOWN:
            return f"its ext features {unknown:#x} are not supported", False
        return None, bool(incompatible & _EXT_RECOVER)
    if content is Content.XFS and len(head) >= 512:
        version, incompatible = struct.unpack_from(">H", head, 100)[0] & 15, int.from_bytes(head[216:220], "big")
        if version == 5 and incompatible & _XFS_NEEDS_REPAIR:
            return "the guest has to repair it first (xfs_repair)", False
        if version == 5 and (unknown := incompatible & ~_XFS_KNOWN):
            return f"its XFS features {unknown:#x} are not supported", False
    return _NOT_READ.get(content), False
