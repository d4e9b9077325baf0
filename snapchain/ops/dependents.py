"""Where to look for those who stand on the files of a disk, and which files a command may remove or write to.

A file is the disk's own when it lies in the directory of the disk's top and nobody else stands on it.  A top that is a
symbolic link has two directories that are searched, and one that is its own: the one in which the file itself lies.
Neighbours are searched below the directory above it, so that clones in directories beside it are found.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from snapchain.image.dependents import Dependent, Dependents, search

__all__ = ["Dependent", "Dependents", "find_dependents", "image_directories", "is_outside"]

_VARIABLE = "SNAPCHAIN_IMAGE_DIRS"


def find_dependents(
    files: Sequence[Path], *, top: Path, own: Collection[tuple[int, int]] = (), image_dirs: Sequence[Path] = ()
) -> Dependents:
    """Who else stands on `files`, by their headers, by links, and by libvirt's definitions.

    files: by the names under which the disk's chain opens them; they need not exist
    top: the file that the disk's user opens; own: (device, inode) of the disk's own images, which do not count
    image_dirs: what --image-dir names; what SNAPCHAIN_IMAGE_DIRS names is searched, too
    """
    named = [path for path in (*image_dirs, *image_directories()) if path.is_dir()]
    homes = list(dict.fromkeys([Path(os.path.realpath(top)).parent, Path(os.path.realpath(top.parent))]))
    near = [*homes, *(Path(os.path.realpath(file)).parent for file in files), *named]
    return search(files, [*near, *(home.parent for home in homes)], near=near, own=own, disk=top)


def image_directories() -> Iterator[Path]:
    """What SNAPCHAIN_IMAGE_DIRS names."""
    return (Path(name) for name in os.environ.get(_VARIABLE, "").split(":") if name)


def is_outside(file: Path, top: Path) -> bool:
    """Whether a file lies in another directory than the disk's top, links resolved."""
    return Path(os.path.realpath(file)).parent != Path(os.path.realpath(top)).parent
