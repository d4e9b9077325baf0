"""NTFS, FAT and exFAT, by The Sleuth Kit. Times of FAT are local ones; they are taken for UTC."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from snapchain.files.disk import Volume
from snapchain.files.node import PORTION, Facts, Node, NodeKind, is_zero
from snapchain.files.volumes import Content

_LEAST_HOLE = 1 << 16
_LABEL = b" (Volume Label Entry)"
_OF_EXFAT = {b"$ALLOC_BITMAP", b"$UPCASE_TABLE", b"$VOLUME_GUID", b"$TEX_FAT"}
_SYSTEM_FILES = 24
"""NTFS: the numbers of its own files are lower."""


class Windows:
    """A FileSystem. module: pytsk3"""

    ignores_case = True

    def __init__(self, module: Any, content: Content, volume: Volume) -> None:
        class Image(module.Img_Info):  # type: ignore[misc]
            def __init__(self) -> None:
                super().__init__(url="", type=module.TSK_IMG_TYPE_EXTERNAL)

            def read(self, offset: int, length: int) -> bytes:
                return volume.pread(offset, length)

            def get_size(self) -> int:
                return volume.size

        kinds = {
            Content.NTFS: module.TSK_FS_TYPE_NTFS,
            Content.FAT: module.TSK_FS_TYPE_FAT_DETECT,
            Content.EXFAT: module.TSK_FS_TYPE_EXFAT,
        }
        self.module, self.content = module, content
        self._image = Image()
        self._system = module.FS_Info(self._image, 0, kinds[content])

    def root(self) -> Node:
        number = self._system.info.root_inum
        return _Node(self, self._system.open_meta(inode=number))

    def is_own(self, entry: Any) -> bool:
        """Whether an entry is no file of the user's: the file system's own, or one that was deleted."""
        name, meta, module = entry.info.name, entry.info.meta, self.module
        if name.name in {b".", b".."} or not int(name.flags) & int(module.TSK_FS_NAME_FLAG_ALLOC):
            return True
        if meta is None:
            return False
        if int(meta.type) in {int(module.TSK_FS_META_TYPE_VIRT), int(module.TSK_FS_META_TYPE_VIRT_DIR)}:
            return True
        if self.content is Content.NTFS:
            return bool(meta.addr < _SYSTEM_FILES)
        return name.name in _OF_EXFAT or (name.name.endswith(_LABEL) and meta.size == 0)


class _Node:
    def __init__(self, system: Windows, file: Any) -> None:
        self._system, self._file = system, file

    def facts(self) -> Facts:
        meta, module = self._file.info.meta, self._system.module
        if meta is None:
            raise OSError("its record is missing")
        kinds: dict[int, NodeKind] = {
            int(module.TSK_FS_META_TYPE_REG): "file",
            int(module.TSK_FS_META_TYPE_DIR): "directory",
            int(module.TSK_FS_META_TYPE_LNK): "symlink",
        }
        return Facts(
            kind=kinds.get(int(meta.type), "unknown"),
            id=meta.addr,
            size=meta.size,
            links=1 if self._system.content is not Content.NTFS else meta.nlink,
            mtime=_time(meta.mtime, meta.mtime_nano),
            atime=_time(meta.atime, meta.atime_nano),
            ctime=_time(meta.ctime, meta.ctime_nano) if self._system.content is Content.NTFS else None,
            crtime=_time(meta.crtime, meta.crtime_nano),
        )

    def children(self) -> Iterator[tuple[str, Node] | str]:
        for entry in self._file.as_directory():
            if entry.info.name is None:
                yield "one of its entries cannot be read"
            elif not self._system.is_own(entry):
                yield entry.info.name.name.decode("utf-8", "surrogateescape"), _Node(self._system, entry)

    def content(self) -> Iterator[bytes | int]:
        size, at = int(self._file.info.meta.size), 0
        while at < size:
            data = self._file.read_random(at, min(PORTION, size - at))
            if not data:
                raise OSError(f"it ends after {at} of {size} bytes")
            yield len(data) if len(data) >= _LEAST_HOLE and is_zero(data) else data
            at += len(data)

    def target(self) -> str:
        link = self._file.info.meta.link
        if not link:
            raise OSError("where the link leads cannot be read")
        return bytes(link).decode("utf-8", "surrogateescape")

    def attributes(self) -> Mapping[str, bytes]:
        return {}


def _time(seconds: int, nanoseconds: int) -> int | None:
    """0 is what the library has for a time that is not recorded."""
    return seconds * 1_000_000_000 + nanoseconds % 1_000_000_000 if seconds else None
