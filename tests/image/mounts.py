"""Small filesystems in files, mounted for tests that look at shared extents."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

MAKERS = {
    "xfs": ["mkfs.xfs", "-q", "-m", "reflink=1"],
    "btrfs": ["mkfs.btrfs", "-q"],
    "ext4": ["mkfs.ext4", "-q"],
}


@contextmanager
def mounted(kind: str, directory: Path, *, size: int = 400 << 20) -> Iterator[Path]:
    """A new filesystem of this kind, in a sparse file; unmounted at the end. Skips where there is no such thing."""
    disk = directory / f"{kind}.disk"
    with disk.open("wb") as file:
        file.truncate(size)
    subprocess.run([*MAKERS[kind], disk], check=True, capture_output=True)
    place = directory / kind
    place.mkdir()
    done = subprocess.run(["mount", "-o", "loop", disk, place], check=False, capture_output=True, text=True)
    if done.returncode:
        said = done.stderr.strip()
        pytest.skip(f"no reflink: {said}" if "unknown filesystem" in said else f"no loop device: {said}")
    try:
        yield place
    finally:
        subprocess.run(["umount", place], check=True)
        disk.unlink()
