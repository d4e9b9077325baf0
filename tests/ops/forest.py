"""Forests of small images: disks on shared bases, with links of all kinds, and what each of their names shows.

    with forests(data) as forest:           draws one, in a directory of its own
        command(forest, target, data)       whatever a user may do to the disk `target`
        forest.check(target)                nothing of anybody else was changed

Images are written here, byte by byte, and what they show is computed from the drawn clusters alone; so a forest takes
a few milliseconds, and no code under test has a say in what is true.
"""

from __future__ import annotations

import os
import struct
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from hypothesis import strategies as st

from snapchain.errors import SnapchainError
from snapchain.image import scan
from tests.memory import scratch

SHM = scratch()
CLUSTER = 512
CLUSTERS = 8
SIZE = CLUSTERS * CLUSTER
DIRECTORIES = ("a", "b", "_base")
ZERO = 0
"""A cluster that hides what is below it."""


def write_image(path: Path, clusters: Mapping[int, int], backing: str | None) -> None:
    """A qcow2 file of SIZE guest bytes: `clusters` maps a cluster's number to the byte that fills it, or to ZERO."""
    name = b"" if backing is None else os.fsencode(backing)
    data = sorted(number for number, byte in clusters.items() if byte != ZERO)
    used = 5 + len(data)
    extensions = struct.pack(">II5s3x", 0xE2792ACA, 5, b"qcow2") if name else b""
    extensions += bytes(8)
    header = struct.pack(
        ">4sIQIIQIIQQIIQQQQII",
        b"QFI\xfb", 3, 104 + len(extensions) if name else 0, len(name), 9, SIZE, 0, 1, 3 * CLUSTER, CLUSTER, 1, 0, 0,
        0, 0, 0, 4, 104,
    )  # fmt: skip
    copied = 1 << 63
    entries = [0] * (CLUSTER // 8)
    for number, byte in clusters.items():
        entries[number] = 1 if byte == ZERO else copied | (5 + data.index(number)) * CLUSTER
    parts = [
        header + extensions + name,
        struct.pack(">Q", 2 * CLUSTER),
        struct.pack(f">{used}H", *[1] * used),
        struct.pack(">Q", copied | 4 * CLUSTER),
        struct.pack(f">{len(entries)}Q", *entries),
        *(bytes([clusters[number]]) * CLUSTER for number in data),
    ]
    assert all(len(part) <= CLUSTER for part in parts)
    path.write_bytes(b"".join(part.ljust(CLUSTER, b"\0") for part in parts))


def read(path: Path, image_dirs: list[Path]) -> bytes | None:
    """What a disk shows; None where it cannot be opened."""
    try:
        with scan(path, format="qcow2", image_dirs=image_dirs) as chain:
            found = bytearray(chain.size)
            chain.read_into(0, memoryview(found))
            return bytes(found)
    except SnapchainError:
        return None


@dataclass(frozen=True)
class State:
    """A name: its kind and place, and of a file owner, mode and bytes."""

    link: str | None
    inode: int
    standing: tuple[int, int, int]
    content: bytes

    @classmethod
    def of(cls, path: Path) -> State:
        status = path.lstat()
        if path.is_symlink():
            return cls(str(path.readlink()), status.st_ino, (0, 0, 0), b"")
        return cls(None, status.st_ino, (status.st_mode, status.st_uid, status.st_gid), path.read_bytes())


@dataclass
class Forest:
    """shown: by name, links too; chains: of each image, uppermost first; below: the name that an image records."""

    root: Path
    chains: dict[Path, list[Path]] = field(default_factory=dict)
    below: dict[Path, Path] = field(default_factory=dict)
    shown: dict[Path, bytes] = field(default_factory=dict)
    before: dict[Path, State] = field(default_factory=dict)
    may_go: set[Path] = field(default_factory=set)
    """What the command was told to remove or replace."""

    @property
    def image_dirs(self) -> list[Path]:
        return [self.root]

    def add(self, path: Path, clusters: Mapping[int, int], below: Path | None, recorded: str | None) -> None:
        """An image that stands on another name of the forest, and records it so."""
        write_image(path, clusters, recorded)
        shown = bytearray(self.shown[below] if below else bytes(SIZE))
        for number, byte in clusters.items():
            shown[number * CLUSTER : (number + 1) * CLUSTER] = bytes([byte]) * CLUSTER
        self.shown[path] = bytes(shown)
        real = Path(os.path.realpath(below)) if below else None
        self.chains[path] = [path, *(self.chains[real] if real else [])]
        if below is not None:
            self.below[path] = below

    def disks(self) -> list[Path]:
        """Every name by which an image can be opened, the longest chains first."""
        return sorted(self.shown, key=lambda name: -len(self.chain(name)))

    def chain(self, name: Path) -> list[Path]:
        """Real paths of the chain of any name, uppermost first."""
        return self.chains[Path(os.path.realpath(name))]

    def remember(self) -> None:
        """As it is now, to be compared with by `check`."""
        self.before = {path: State.of(path) for path in self.names()}

    def names(self) -> list[Path]:
        return sorted(path for path in self.root.rglob("*") if path.is_symlink() or not path.is_dir())

    def own(self, target: Path) -> set[Path]:
        """What a command on `target` may change: files of its chain in its directory, and what the user has named.

        A link beside them, by which the chain itself opens one of them, is one of its names.
        """
        chain = self.chain(target)
        names = [*chain, *(self.below[path] for path in chain if path in self.below)]
        return {path for path in names if path.parent == chain[0].parent} | self.may_go

    def check(self, target: Path) -> None:
        """Nothing of anybody else was changed, and every name that is left shows what it did."""
        own = self.own(target)
        for path, before in self.before.items():
            if path not in own:
                assert os.path.lexists(path), f"{path} was removed"
                assert State.of(path) == before, f"{path} was changed"
        for path, shown in self.shown.items():
            # A layer of the disk's own may go; every other name is somebody's disk.
            if path in own and path != Path(os.path.realpath(target)) and not path.exists():
                continue
            if path in own and path in self.half_done():
                continue
            assert read(path, self.image_dirs) == shown, f"{path} shows something else"

    def half_done(self) -> set[Path]:
        """Lower inputs of commits that were killed: by themselves they read wrong, until the doctor removes them."""
        from snapchain.merge.journal import is_journal, read as read_journal

        journals = [read_journal(path) for path in self.names() if is_journal(path)]
        commits = [journal for journal in journals if journal.stage == "committing"]
        return {path for each in commits for path in (each.lowest, *(entry.path for entry in each.remove))}


_CLUSTERS = st.dictionaries(st.integers(0, CLUSTERS - 1), st.integers(0, 255), max_size=4)


@contextmanager
def forests(data: st.DataObject) -> Iterator[Forest]:
    """A forest of 4 to 7 images, with further names for some of them."""
    with tempfile.TemporaryDirectory(dir=SHM) as name:
        forest = Forest(Path(os.path.realpath(name)))
        for each in DIRECTORIES:
            (forest.root / each).mkdir()
        (forest.root / "linked").symlink_to("_base")
        for number in range(data.draw(st.integers(4, 7))):
            # Most images stand on the newest one, in the same directory: so chains grow long.
            names = list(forest.shown)
            below = data.draw(st.sampled_from([*names[-1:] * 4, *names[-4:], None])) if names else None
            homes = [below.parent.name] * 3 if below else []
            directory = forest.root / data.draw(st.sampled_from([*homes, *DIRECTORIES]))
            path = directory / f"{number}.qcow2"
            recorded = None if below is None else data.draw(_recorded(forest, path, below))
            forest.add(path, data.draw(_CLUSTERS), below, recorded)
            if data.draw(st.integers(0, 4)) == 4:
                _add_name(forest, path, directory.parent / data.draw(st.sampled_from(DIRECTORIES)), data)
        forest.remember()
        yield forest


def _recorded(forest: Forest, image: Path, below: Path) -> st.SearchStrategy[str]:
    """Ways to name one file in the header of another."""
    relative = os.path.relpath(below, image.parent)
    names = [relative, str(below), f"./{relative}"]
    if below.parent.name == "_base":
        names.append(str(forest.root / "linked" / below.name))
    return st.sampled_from(names)


def _add_name(forest: Forest, path: Path, directory: Path, data: st.DataObject) -> None:
    """A symbolic or hard link, under which the image can be opened."""
    link = directory / f"{path.stem}-link.qcow2"
    if data.draw(st.booleans()):
        link.symlink_to(data.draw(st.sampled_from([str(path), os.path.relpath(path, directory)])))
    else:
        os.link(path, link)
        forest.chains[link] = [link, *forest.chains[path][1:]]
    # A relative name in its header may lead nowhere from there.
    if read(link, forest.image_dirs) == forest.shown[path]:
        forest.shown[link] = forest.shown[path]
