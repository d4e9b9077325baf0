"""The directories to search for images that depend on a disk, and the files that a command may remove or change.

A file is the disk's own when it lies in the directory of the disk's top and nothing else depends on it.  For a top that
is a symbolic link, both its directory and that of the file are searched; only the latter makes a file the disk's own.
The search covers the tree below the parent of that directory, so that clones in neighbouring directories are found;
where the file is reached through a bind mount, also the tree around its other places.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from snapchain.errors import SnapchainError
from snapchain.host.directory import Directory
from snapchain.host.files import is_leftover
from snapchain.host.os_errors import os_errors
from snapchain.host.path_resolution import Resolved, real_path, resolve
from snapchain.host.temporary_names import MERGE, RESTORE, SNAPSHOT, temporary_of
from snapchain.image import ImageChain
from snapchain.image.dependents import Dependent, Dependents, Kind, search

__all__ = [
    "Dependent",
    "Dependents",
    "Kind",
    "dependents_of_chain",
    "find_dependents",
    "image_directories",
    "is_linked_elsewhere",
    "is_outside",
    "search_directories",
]

_VARIABLE = "SNAPCHAIN_IMAGE_DIRS"
_UNFINISHED = {MERGE, SNAPSHOT, RESTORE}


def find_dependents(
    files: Sequence[Path], *, top: Path, own: Collection[tuple[int, int]] = (), image_dirs: Sequence[Path] = ()
) -> Dependents:
    """Other users of `files`, by image headers, by links, and by libvirt's definitions.

    files: by the names under which the disk's chain opens them; they need not exist
    top: the file that the guest opens
    own: (device, inode) of the disk's own images, which do not count; neither do files that an unfinished merge,
    snapshot or restore has left beside them
    image_dirs: the directories of --image-dir; those of SNAPCHAIN_IMAGE_DIRS are searched too
    """
    real = _resolved(top)
    elsewhere = [Resolved(name.parent, None) for name in other_names(real.real)]
    homes = list(dict.fromkeys([_parent(real), _resolved(top.parent), *elsewhere]))
    places = [_parent(_resolved(file)) for file in files]
    near = [*homes, *places, *map(_resolved, [*image_dirs, *image_directories()])]
    # A symbolic link in another directory counts as another user of the file.
    known = [path if _resolved(path.parent) in homes else _resolved(path).real for path in files]
    return search(
        known,
        dict.fromkeys([*near, *map(_parent, homes)]),
        near=[place.real for place in near],
        own=[*own, *_unfinished([*homes, *places])],
        disk=top,
    )


def _resolved(path: Path) -> Resolved:
    with os_errors(path):
        return resolve(path)


def _parent(place: Resolved) -> Resolved:
    return Resolved(place.real.parent, place.chosen_by)


def dependents_of_chain(chain: ImageChain, *, image_dirs: Sequence[Path] = ()) -> Dependents:
    """Other users of the files of an opened chain. image_dirs: as for `find_dependents`."""
    return find_dependents(
        [file.path for file in chain.files],
        top=chain.top.path,
        own=[file.device for file in chain.files],
        image_dirs=search_directories(chain, image_dirs),
    )


def search_directories(chain: ImageChain, image_dirs: Sequence[Path]) -> tuple[Path, ...]:
    """The directories to search for users of the chain's files, besides the tree around its top."""
    own = [directory for file in chain.files for directory in (file.path.parent, file.real_path.parent)]
    return tuple(dict.fromkeys([*own, *image_dirs]))


def _unfinished(directories: Iterable[Resolved]) -> Iterator[tuple[int, int]]:
    """(device, inode) of unfinished files of merges, snapshots and restores: nothing needs their backing files.

    A file with a second name does not count: any user may have added it. Neither does one behind another user's link.
    """
    for place in set(directories):
        if place.chosen_by is not None:
            continue
        with suppress(OSError, SnapchainError), Directory.open(place.real) as directory:
            for name in (name for name in directory.names() if name.startswith(".")):
                found = temporary_of(place.real / name)
                if found is not None and found.purpose in _UNFINISHED:
                    with suppress(FileNotFoundError):
                        status = directory.status(name)
                        if is_leftover(status):
                            yield status.st_dev, status.st_ino


def image_directories() -> Iterator[Path]:
    """The directories in SNAPCHAIN_IMAGE_DIRS."""
    return (Path(name) for name in os.environ.get(_VARIABLE, "").split(":") if name)


def is_outside(file: Path, top: Path) -> bool:
    """Whether a file lies in another directory than the disk's top, links resolved."""
    return real_path(file).parent != real_path(top).parent


def is_linked_elsewhere(file: Path, others: Dependents) -> bool:
    """Whether a symbolic link in another directory leads to a file: the given path, or a link that was found."""
    home = real_path(file).parent
    links = [file, *(user.path for user in others.on(file, Kind.LINK) if user.path is not None)]
    return any(real_path(link.parent) != home for link in links)


# --- Other names of a file: bind mounts, and filesystems that are mounted twice.

_ESCAPED = re.compile(rb"\\([0-7]{3})")
TABLE = Path("/proc/self/mountinfo")
_Mount = tuple[str, Path, Path]
"""The filesystem's number, its mounted directory or file, and the mount point."""


def other_names(path: Path) -> list[Path]:
    """The other paths of a file or directory whose own path holds no symbolic links. [] where they are unknown."""
    mounts = list(_mounts())
    # Of several mounts at one place the last one is visible.
    holding = [mount for mount in mounts if path.is_relative_to(mount[2])]
    if not holding:
        return []
    number, shown, at = max(reversed(holding), key=lambda mount: len(mount[2].parts))
    inside = shown / path.relative_to(at)
    names = [
        mounted / inside.relative_to(root)
        for filesystem, root, mounted in mounts
        if filesystem == number and inside.is_relative_to(root)
    ]
    return [name for name in dict.fromkeys(names) if name != path and _is_same(name, path)]


def _mounts() -> Iterator[_Mount]:
    try:
        lines = TABLE.read_bytes().splitlines()
    except OSError:
        return
    for line in lines:
        fields = line.split()
        yield os.fsdecode(fields[2]), _path(fields[3]), _path(fields[4])


def _path(escaped: bytes) -> Path:
    return Path(os.fsdecode(_ESCAPED.sub(lambda found: bytes([int(found[1], 8)]), escaped)))


def _is_same(name: Path, path: Path) -> bool:
    """False where another mount hides the name, or it does not exist."""
    try:
        return name.samefile(path)
    except OSError:
        return False
