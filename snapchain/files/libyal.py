"""ext2, ext3, ext4 and XFS, by libfsext and libfsxfs, which have one interface."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from snapchain.files.disk import Volume
from snapchain.files.node import PORTION, Facts, Node, is_zero, kind_of

_IS_SPARSE = 1
_LEAST_HOLE = 1 << 16
_MOST_EXTENTS = 1 << 20
_MOST_ATTRIBUTE = 1 << 16
_MOST_ATTRIBUTES = 1024
_MOST_TARGET = 4096


def words_of(error: Exception) -> str:
    """The reason; libyal tells it as a chain of its functions, of which the second is the innermost."""
    text = str(error) or type(error).__name__
    if "UTF-8" in text:
        return "its name, or where it leads, is not UTF-8"
    causes = [each.partition(": ")[2] for each in text.split(". ") if each.startswith(("lib", "py"))]
    return (causes[min(1, len(causes) - 1)] if causes else text)[:1000]


class Unix:
    """A FileSystem. module: pyfsext or pyfsxfs"""

    ignores_case = False

    def __init__(self, module: Any, volume: Volume) -> None:
        self._module, self._volume = module, volume

    def root(self) -> Node:
        """A handle of its own: libfsext tells attributes inside an inode only when it reads that inode first."""
        handle = self._module.volume()
        handle.open_file_object(self._volume)
        return _Node(handle, handle.root_directory)


class _Node:
    """handle: kept open for as long as its nodes are in use"""

    def __init__(self, handle: Any, entry: Any) -> None:
        self._handle, self._entry = handle, entry

    def facts(self) -> Facts:
        entry = self._entry
        mode = entry.file_mode
        return Facts(
            kind=kind_of(mode),
            id=entry.inode_number,
            size=entry.size,
            mode=mode & 0o7777,
            uid=entry.owner_identifier,
            gid=entry.group_identifier,
            links=entry.number_of_links,
            mtime=entry.get_modification_time_as_integer(),
            atime=entry.get_access_time_as_integer(),
            ctime=entry.get_inode_change_time_as_integer(),
            crtime=entry.get_creation_time_as_integer(),
        )

    def children(self) -> Iterator[tuple[str, Node] | str]:
        for number in range(self._entry.number_of_sub_file_entries):
            try:
                entry = self._entry.get_sub_file_entry(number)
                name = entry.name
            except (OSError, RuntimeError, ValueError) as error:
                yield f"its entry {number} cannot be read: {words_of(error)}"
            else:
                yield str(name), _Node(self._handle, entry)

    def content(self) -> Iterator[bytes | int]:
        entry, size = self._entry, int(self._entry.size)
        at = 0
        for stop, is_hole in self._stretches(size):
            if is_hole and stop - at >= _LEAST_HOLE:
                yield stop - at
                at = stop
            while at < stop:
                data = entry.read_buffer_at_offset(min(PORTION, stop - at), at)
                if not data:
                    raise OSError(f"it ends after {at} of {size} bytes")
                yield len(data) if len(data) >= _LEAST_HOLE and is_zero(data) else data
                at += len(data)

    def _stretches(self, size: int) -> Iterator[tuple[int, bool]]:
        """(end, whether it is a hole) of the parts of a file, up to its size."""
        at = 0
        for number in range(min(self._entry.number_of_extents, _MOST_EXTENTS)):
            _, length, flags = self._entry.get_extent(number)
            at = min(at + max(0, length), size)
            yield at, bool(flags & _IS_SPARSE)
        if at < size:  # its bytes are in the inode
            yield size, False

    def target(self) -> str:
        return str(self._entry.symbolic_link_target)[:_MOST_TARGET]

    def attributes(self) -> Mapping[str, bytes]:
        found = {}
        for number in range(min(self._entry.number_of_extended_attributes, _MOST_ATTRIBUTES)):
            attribute = self._entry.get_extended_attribute(number)
            if attribute.size <= _MOST_ATTRIBUTE:
                found[str(attribute.name)] = bytes(attribute.read_buffer_at_offset(attribute.size, 0) or b"")
        return found
