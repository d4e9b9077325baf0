"""Real file systems with real files in them, made by the tools that guests use."""

from __future__ import annotations

import os
import random
import stat
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from snapchain.files.session import Found

KINDS = ("ext4", "ext2", "xfs", "ntfs", "fat", "exfat")
WITHOUT_ROOT = frozenset({"ext4", "ext2", "fat"})
UNIX = frozenset({"ext4", "ext2", "xfs"})
MiB = 1 << 20


def kinds() -> list[Any]:
    """All kinds, as parameters; most need root."""
    return [pytest.param(each, marks=() if each in WITHOUT_ROOT else pytest.mark.root) for each in KINDS]


def plant(folder: Path, count: int, *, unix: bool, seed: int = 7) -> Path:
    """A tree of so many files: empty, in an inode, in several blocks, sparse, in deep and in large directories."""
    chance = random.Random(seed)
    folder.mkdir()
    for number in range(count):
        where = folder / f"d{number % 23}" / "/".join(f"level {n}" for n in range(number % 5))
        where.mkdir(parents=True, exist_ok=True)
        size = 700_000 if number % 997 == 3 else chance.choice([0, 1, 50, 159, 511, 4096, 5000, 20_000])
        (where / f"Datei {number} ü{'x' * (number % 60)}.txt").write_bytes(chance.randbytes(size))
    large = folder / "large directory"
    large.mkdir()
    for number in range(count // 4):
        (large / f"{number:06}").write_bytes(b"%d" % number)
    with (folder / "sparse").open("wb") as file:
        file.seek(3 * MiB)
        file.write(b"middle" * 1000)
        file.seek(5 * MiB)
        file.write(b"end")
    if unix:
        (folder / "link").symlink_to("d1")
        (folder / "long link").symlink_to("x" * 180)
        (folder / "second name").hardlink_to(folder / "sparse")
        os.setxattr(folder / "sparse", "user.note", b"kept")
        os.setxattr(folder / "d2", "user.note", b"of a directory")
        (folder / "sparse").chmod(0o750)
        os.utime(folder / "sparse", ns=(1_600_000_000_123_456_789, 1_500_000_000_987_654_321))
    return folder


def contents(folder: Path) -> dict[str, bytes | str | None]:
    """Path -> the bytes of a file, the target of a link, None for a directory; by the kernel."""
    found: dict[str, bytes | str | None] = {}
    for path in folder.rglob("*"):
        status = path.lstat()
        name = str(path.relative_to(folder))
        if stat.S_ISLNK(status.st_mode):
            found[name] = str(path.readlink())
        elif stat.S_ISREG(status.st_mode):
            found[name] = path.read_bytes()
        else:
            found[name] = None
    return found


def taken(entries: Iterator[Found]) -> dict[str, bytes | str | None]:
    """As `contents`, of a walk."""
    found: dict[str, bytes | str | None] = {}
    for each in entries:
        name = "/".join(each.entry.path)
        if each.entry.kind == "file":
            found[name] = b"".join(piece if isinstance(piece, bytes) else bytes(piece) for piece in each.content)
        else:
            found[name] = each.entry.target
    del found[""]
    found.pop("lost+found", None)
    return found


def run(*words: object) -> None:
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"


@contextmanager
def mounted(image: Path, kind: str) -> Iterator[Path]:
    """By the kernel, or by FUSE for what most kernels lack. Skips where this machine can do neither."""
    at = image.with_suffix(".mounted")
    at.mkdir()
    commands = {"ntfs": ["ntfs-3g"], "exfat": ["mount.exfat-fuse"]}
    if kind in commands and not Path("/dev/fuse").exists():
        pytest.skip("no FUSE here")
    attached = subprocess.run(["losetup", "-f", "--show", image], capture_output=True, text=True, check=False)
    if attached.returncode:
        pytest.skip(f"no loop device: {attached.stderr.strip()}")
    loop = attached.stdout.strip()
    try:
        run(*commands.get(kind, ["mount"]), loop, at)
        try:
            yield at
        finally:
            run("umount", at)
    finally:
        run("losetup", "-d", loop)
        at.rmdir()


def make(kind: str, tree: Path, image: Path, *, size: int) -> Path:
    """An image of `size` bytes with a file system that holds a tree."""
    with image.open("wb") as file:
        file.truncate(size)
    if kind in {"ext4", "ext2"}:
        run(f"mkfs.{kind}", "-q", "-d", tree, image)
        return image
    if kind == "fat":
        run("mkfs.vfat", image)
        run("mcopy", "-s", "-Q", "-i", image, *sorted(tree.iterdir()), "::")
        return image
    if kind == "ntfs":
        run("mkfs.ntfs", "-q", "-F", image)
    else:
        run(f"mkfs.{kind}", *(["-q"] if kind == "xfs" else []), image)
    with mounted(image, kind) as at:
        run("cp", "-r" if kind not in UNIX else "-a", *sorted(tree.iterdir()), at)
    return image


class FileBytes:
    """A raw image as Bytes, which counts what is read. data: None for the file's"""

    def __init__(self, path: Path, data: bytes | None = None) -> None:
        self._data = path.read_bytes() if data is None else data
        self.size = len(self._data)
        self.reads: list[tuple[int, int]] = []

    def read(self, offset: int, length: int, /) -> bytes:
        self.reads.append((offset, length))
        return self._data[offset : offset + length]
