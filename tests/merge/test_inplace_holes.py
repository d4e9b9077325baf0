"""Holes of a file's clusters: they are zeroes that must arrive where the target has other bytes."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from snapchain.image import scan
from snapchain.merge.amendment import fill, plan_commit, relink, settle
from tests.image.oracle import qemu
from tests.merge.test_assemble import assert_same, chain_of


def test_zeroes_that_a_copying_tool_has_made_holes_cover_what_is_below(tmp_path: Path) -> None:
    paths = chain_of(
        tmp_path,
        ("", ["write -P 1 0 4M"]),
        ("", ["write -P 2 0 4M"]),
        ("", ["write -P 3 0 3M", "write -P 0 1M 1M"]),
    )
    subprocess.run(["fallocate", "--dig-holes", paths[2]], check=True)
    before = tmp_path / "before.qcow2"
    qemu("qemu-img", "convert", "-f", "qcow2", "-O", "qcow2", paths[2], before)
    with scan(paths[2]) as chain:
        assert chain.top.physical.extents().data_bytes == 3 << 20
        assert (chain.top.extents.data_bytes, chain.top.extents.zero_bytes) == (2 << 20, 1 << 20)
        amendment = plan_commit(chain, 1, backing=chain.files[1].backing)
        fd = os.open(paths[1], os.O_RDWR)
        try:
            fill(amendment, fd, subject=paths[1])
            relink(amendment, fd, subject=paths[1])
            settle(fd, subject=paths[1])
        finally:
            os.close(fd)
    assert_same(before, paths[1])
