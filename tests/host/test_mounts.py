"""The other names of a file by mounts. The tests write what the kernel says; links stand for mounts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from snapchain.image import dependent_search as mounts
from snapchain.image.dependent_search import other_names


def test_each_mount_that_shows_the_file_gives_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = tmp_path / "disk" / "v" / "b" / "img"
    real.parent.mkdir(parents=True)
    real.touch()
    (tmp_path / "bind here").symlink_to(real.parent)
    (tmp_path / "file").symlink_to(real)
    (tmp_path / "other-fs").symlink_to(real.parent)
    (tmp_path / "hidden").mkdir()
    (tmp_path / "hidden" / "img").touch()
    table = tmp_path / "mountinfo"
    shown = [
        ("8:0", "/", "/"),
        ("8:1", "/", f"{tmp_path}/disk"),
        ("8:1", "/v/b", f"{tmp_path}/bind\\040here"),
        ("8:1", "/v/b/img", f"{tmp_path}/file"),
        ("8:1", "/v/c", f"{tmp_path}/bind\\040here"),
        ("8:1", "/v/b", f"{tmp_path}/hidden"),
        ("8:1", "/v/b", f"{tmp_path}/nowhere"),
        ("8:2", "/v/b", f"{tmp_path}/other-fs"),
    ]
    table.write_text("".join(f"20 1 {fs} {root} {at} rw - ext4 /dev/x rw\n" for fs, root, at in shown))
    monkeypatch.setattr(mounts, "TABLE", table)
    assert other_names(real) == [tmp_path / "bind here" / "img", tmp_path / "file"]
    assert other_names(tmp_path / "elsewhere") == []
    monkeypatch.setattr(mounts, "TABLE", tmp_path / "none")
    assert other_names(real) == []


def test_what_the_kernel_says_of_a_bind_mount(tmp_path: Path) -> None:
    """In a namespace of its own, where this user may mount."""
    (tmp_path / "a b").mkdir()
    (tmp_path / "a b" / "img").touch()
    (tmp_path / "c").mkdir()
    asked = (
        "import sys, pathlib, snapchain.image.dependent_search as m; print(m.other_names(pathlib.Path(sys.argv[1])))"
    )
    words = ["unshare", "--mount", *([] if os.geteuid() == 0 else ["--map-root-user"]), "sh", "-ec"]
    script = 'mount --bind "$1" "$2" || exit 77; exec "$3" -c "$4" "$2/img"'
    given = [str(tmp_path / "a b"), str(tmp_path / "c"), sys.executable, asked]
    done = subprocess.run([*words, script, "sh", *given], capture_output=True, text=True, check=False)
    if done.returncode == 77 or done.stderr.startswith("unshare:"):
        pytest.skip("nothing can be mounted here")
    assert str(tmp_path / "a b" / "img") in done.stdout
