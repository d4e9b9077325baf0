"""A file that is cut off: how to mend it is said, and what is said does what it says."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path

import pytest

from snapchain.errors import Corrupt
from snapchain.image import scan
from tests.image.oracle import our_bytes, their_bytes
from tests.ops.stacks import qemu_img, write

CLUSTER = 65536


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "a disk.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", path, "1M")
    write(path, "write -P 5 0 192k")
    return path


@pytest.mark.parametrize("missing", [1, 512, 10_000, CLUSTER - 1])
def test_a_last_cluster_only_partly_in_the_file_is_mended_as_said(image: Path, tmp_path: Path, missing: int) -> None:
    """It reads as QEMU reads it without being mended: zeroes for what is missing."""
    os.truncate(image, image.stat().st_size - missing)
    theirs = their_bytes(image, "qcow2", tmp_path)
    at = 3 * CLUSTER - missing
    with pytest.raises(Corrupt, match=rf"cut off at \d+ bytes, before the data of guest offset {at}$") as caught:
        scan(image)
    hint = str(caught.value.hint)
    assert f"{missing} bytes" in hint
    words = shlex.split(hint[hint.index("truncate -s") :])
    assert words[-1] == str(image)
    subprocess.run(words, check=True)
    with scan(image) as chain:
        assert bytes(our_bytes(chain)) == bytes(theirs)
    assert qemu_img("check", image)


def test_a_file_that_lacks_more_is_not_mended_by_zeroes(image: Path) -> None:
    os.truncate(image, image.stat().st_size - CLUSTER - 5)
    with pytest.raises(Corrupt, match=r"outside the file|cut off") as caught:
        scan(image)
    assert "truncate -s" not in str(caught.value.hint)
