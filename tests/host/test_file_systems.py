"""File systems over a network, by what the kernel says of its mounts."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from snapchain.errors import NotFound
from snapchain.host import file_systems
from snapchain.host.file_systems import network_file_system


@pytest.mark.parametrize(
    ("kind", "found"),
    [("nfs4", "nfs4"), ("fuse.sshfs", "fuse.sshfs"), ("ext4", None), ("fuseblk", None), ("ceph", None)],
)
def test_the_kind_of_a_mount(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, found: str | None) -> None:
    device = tmp_path.stat().st_dev
    mounts = tmp_path / "mountinfo"
    mounts.write_text(
        "22 1 0:1 / /proc rw,nosuid - nfs4 other:/export rw\n"
        f"36 22 {os.major(device)}:{os.minor(device)} / /srv/a\\040b rw,relatime shared:1 - {kind} host:/export rw\n"
    )
    monkeypatch.setattr(file_systems, "_MOUNTS", mounts)
    assert network_file_system(tmp_path) == found


def test_this_machine(tmp_path: Path) -> None:
    assert network_file_system(tmp_path) is None
    with pytest.raises(NotFound, match="gone"):
        network_file_system(tmp_path / "gone")
