"""Every file of a real file system comes back with its bytes; so do links, attributes, modes and times."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from snapchain.files.session import Session
from tests.files.images import UNIX, FileBytes, MiB, contents, kinds, make, plant, run, taken

SMALL, LARGE = 300, 20_000


@pytest.mark.parametrize("kind", kinds())
@pytest.mark.parametrize(
    ("count", "size"), [(SMALL, 320 * MiB), pytest.param(LARGE, 800 * MiB, marks=pytest.mark.soak)]
)
def test_all_files_have_their_bytes(tmp_path: Path, kind: str, count: int, size: int) -> None:
    tree = plant(tmp_path / "tree", count, unix=kind in UNIX)
    image = make(kind, tree, tmp_path / "image", size=size)
    with Session(FileBytes(image), subject="image", most_bytes=1 << 40) as session:
        (volume,) = session.volumes()
        assert (volume.name, volume.trouble) == ("disk", None)
        session.open(volume.name)
        with session.walk([], depth=100, contents=True) as entries:
            assert taken(entries) == contents(tree)
        assert session.problems == []
        if kind not in UNIX:
            return
        with session.walk([], depth=100, attributes=True, links=True) as entries:
            found = {"/".join(each.entry.path): each.entry for each in entries}
    assert {found["sparse"].same_as, found["second name"].same_as} in ({None, ("sparse",)}, {None, ("second name",)})
    first = found["sparse"] if found["sparse"].same_as is None else found["second name"]
    status = (tree / "sparse").stat()
    assert first.mtime is not None
    step = 1 if kind == "xfs" else 1_000_000_000  # mkfs.ext4 -d writes whole seconds
    assert (first.mtime // step, first.mode, first.links) == (status.st_mtime_ns // step, 0o750, 2)
    assert (first.uid, first.gid) == (os.getuid(), os.getgid())
    assert first.attributes == {"user.note": b"kept".hex()}
    assert found["d2"].attributes == {"user.note": b"of a directory".hex()}


@pytest.mark.parametrize(
    "options",
    [
        ["-O", "inline_data"],
        ["-O", "meta_bg,^resize_inode"],
        ["-O", "^extents,^64bit"],
        ["-O", "^metadata_csum", "-I", "128"],
        ["-b", "1024", "-O", "metadata_csum_seed"],
        ["-O", "bigalloc"],
        ["-O", "casefold"],
    ],
)
def test_the_features_of_ext(tmp_path: Path, options: list[str]) -> None:
    """Either all bytes, or a refusal: never other bytes."""
    tree = plant(tmp_path / "tree", 60, unix=True)
    image = tmp_path / "image"
    with image.open("wb") as file:
        file.truncate(64 * MiB)
    run("mkfs.ext4", "-q", *options, "-d", tree, image)
    with Session(FileBytes(image), subject="image", most_bytes=1 << 40) as session:
        (volume,) = session.volumes()
        assert volume.trouble is None
        session.open(volume.name)
        with session.walk([], depth=100, contents=True) as entries:
            assert taken(entries) == contents(tree)
        assert session.problems == []
