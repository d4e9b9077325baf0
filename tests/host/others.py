"""Directories of other users, as root meets them."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ALICE, BOB, KVM = 40101, 40102, 40103
"""Users and a group without accounts."""

root_only = pytest.mark.root
"""Only root can give files away."""


@pytest.fixture
def open_host() -> Iterator[Path]:
    """A directory of root's that everybody may look into, on the way to which everybody may, too."""
    made = Path(tempfile.mkdtemp(dir="/var/tmp"))
    made.chmod(0o755)
    yield made
    shutil.rmtree(made)


def directory(path: Path, *, uid: int = 0, gid: int = 0, mode: int = 0o755) -> Path:
    """A new one."""
    path.mkdir()
    os.chown(path, uid, gid)
    path.chmod(mode)
    return path


def file(path: Path, text: str = "x", *, uid: int = 0, gid: int = 0, mode: int = 0o600) -> Path:
    """A new one."""
    path.write_text(text)
    os.chown(path, uid, gid)
    path.chmod(mode)
    return path


def link(path: Path, target: str | Path, *, uid: int = 0) -> Path:
    """A new symbolic link."""
    path.symlink_to(target)
    os.lchown(path, uid, uid)
    return path
