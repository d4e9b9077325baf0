"""A file, a directory or anything else of a guest's file system, whatever library reads it."""

from __future__ import annotations

import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

NodeKind = Literal["file", "directory", "symlink", "device", "fifo", "socket", "unknown"]
PORTION = 1 << 20
_ZEROES = bytes(PORTION)
_KINDS: dict[int, NodeKind] = {
    stat.S_IFREG: "file",
    stat.S_IFDIR: "directory",
    stat.S_IFLNK: "symlink",
    stat.S_IFBLK: "device",
    stat.S_IFCHR: "device",
    stat.S_IFIFO: "fifo",
    stat.S_IFSOCK: "socket",
}


def kind_of(mode: int) -> NodeKind:
    """Of a mode of Unix."""
    return _KINDS.get(stat.S_IFMT(mode), "unknown")


@dataclass(frozen=True)
class Facts:
    """What is known of a node without reading it.

    id: of the node in its file system: two names with one id are one file; links: how many names it has
    mode: its permissions; mode, uid, gid: None where the file system has none
    times: nanoseconds since 1970, None where they are not recorded
    """

    kind: NodeKind
    id: int
    size: int
    mode: int | None = None
    uid: int | None = None
    gid: int | None = None
    links: int = 1
    mtime: int | None = None
    atime: int | None = None
    ctime: int | None = None
    crtime: int | None = None


class Node(Protocol):
    """A node. Any method raises OSError, and what else the library raises, for what cannot be read."""

    def facts(self) -> Facts: ...

    def children(self) -> Iterator[tuple[str, Node] | str]:
        """(name, node) of a directory, in its order, or words for one that cannot be read."""
        ...

    def content(self) -> Iterator[bytes | int]:
        """The bytes of a file in order, at most PORTION at a time; a number is a hole of so many bytes."""
        ...

    def target(self) -> str:
        """Where a symlink leads."""
        ...

    def attributes(self) -> Mapping[str, bytes]:
        """Extended attributes. Asked for once a walk."""
        ...


class FileSystem(Protocol):
    """ignores_case: whether names that differ in case alone are one name"""

    ignores_case: bool

    def root(self) -> Node:
        """Each call begins afresh: nothing is remembered of nodes that were read before."""
        ...


def is_zero(data: bytes) -> bool:
    """Whether all bytes are zero. At most PORTION bytes."""
    return data == _ZEROES[: len(data)]
