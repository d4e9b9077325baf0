"""Resolve a recorded backing name to a file, and check that it may be opened, before touching it.

QEMU parses `scheme:` in front of the first slash as a protocol and `json:` as options; both could reach the network
or any file, so only plain paths are followed.  A relative name starts at the directory of the path by which the
overlay was opened, symbolic links in that path untouched (path_combine in QEMU's block.c).  With links resolved, the
file must lie in a directory that the user has named: the image's own, and for the overlay of a guest at a replica the
parent, which holds its layers.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from snapchain.errors import Unsupported
from snapchain.host.os_errors import os_errors
from snapchain.host.path_resolution import real_name, resolve
from snapchain.host.replica_layout import layers_of
from snapchain.host.rights import Rights
from snapchain.host.terminal import shell_word
from snapchain.image.opening import NamedBy
from snapchain.image.qcow2.header import Backing


@dataclass(frozen=True, slots=True)
class Place:
    """A file by two names: `path` as QEMU would open it (absolute), `real` with all links resolved.

    chosen_by: the user whose link leads there (host/path_resolution.py)
    """

    path: Path
    real: Path
    chosen_by: Rights | None = None

    @property
    def named_by(self) -> tuple[NamedBy, ...]:
        """For `open_image`."""
        return () if self.chosen_by is None else (NamedBy(self.chosen_by, self.path),)

    @staticmethod
    def of(path: str | os.PathLike[str]) -> Place:
        """The place of a path, relative to the working directory. Raises as `Directory.open`."""
        # No normpath: `link/..` is not the directory that holds `link`.
        whole = Path.cwd() / path
        with os_errors(whole):
            found = resolve(whole)
        return Place(whole, found.real, found.chosen_by)


class Allowed:
    """The directories, and everything below them, from which backing files may come."""

    def __init__(self, top: Place, image_dirs: Sequence[Path]) -> None:
        named = [real_name(directory) for directory in (top.path.parent, *image_dirs)]
        own = [*map(Path, named), top.real.parent]
        layers = [found for place in (own[0], own[-1]) if (found := layers_of(place)) is not None]
        self._directories = tuple(dict.fromkeys([*own, *layers]))

    def place(self, backing: Backing, *, overlay: Path) -> Place:
        """The file that the overlay's backing name refers to. Raises Unsupported for names that are not followed."""
        name = backing.name
        if any(character < " " or character == "\x7f" for character in name):
            raise Unsupported("the backing file name holds control characters", subject=overlay)
        if ":" in name.split("/", 1)[0]:
            raise Unsupported(
                f"the backing file is {_shown(name)}, not a plain path; snapchain follows files only",
                subject=overlay,
                hint="`qemu-img rebase -u -b PATH -F FORMAT` records a plain path",
            )
        found = Place.of(overlay.parent / name)
        if not any(found.real.is_relative_to(directory) for directory in self._directories):
            raise Unsupported(
                f"the backing file {_shown(name)} lies outside the directories that you named",
                subject=overlay,
                hint=f"if you trust the image: --image-dir {shell_word(found.real.parent)}",
            )
        return found


def _shown(name: str) -> str:
    return ascii(name if len(name) <= 200 else f"{name[:200]}...")
