"""The work behind each strategy, planned to the byte, and the one that is taken."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass

from snapchain.errors import Unsupported
from snapchain.image import ImageChain
from snapchain.image.assemble import Assembly, plan as assemble
from snapchain.image.assemble.kernel import share_range
from snapchain.image.qcow2.header import Backing
from snapchain.ops.merge.inputs import bitmaps
from snapchain.ops.merge.strategy import Strategy

_SPARE = 1 << 20
"""For what the filesystem itself needs to note."""


@dataclass(frozen=True, slots=True, eq=False)
class Way:
    """One way to make the result. Sizes in bytes. shares_extents: what moves is shared, not copied."""

    strategy: Strategy
    work: Assembly
    shares_extents: bool

    @property
    def bytes_moved(self) -> int:
        """Shared or copied."""
        return self.work.bytes_moved

    @property
    def bytes_needed(self) -> int:
        """Room that it takes while the inputs are still there."""
        needed = self.work.layout.metadata_bytes if self.shares_extents else self.work.bytes_needed
        return needed + _SPARE

    @property
    def cluster_size(self) -> int:
        """Of the result."""
        return self.work.geometry.cluster_size

    @property
    def extended_l2(self) -> bool:
        """Of the result."""
        return self.work.geometry.extended_l2


def ways(
    view: ImageChain,
    first: int,
    *,
    backing: Backing | None,
    cluster_size: int | None,
    drop_bitmaps: bool,
) -> Way:
    """view: up to the uppermost input. Raises Unsupported, with the reason, where what is asked for does not fit."""
    held = bitmaps(view.files[first:])
    if held and not drop_bitmaps:
        file, names = held[0]
        raise Unsupported(
            f"it holds persistent bitmaps ({names}), which would be wrong after a merge",
            subject=file.path,
            hint="--drop-bitmaps merges without them; the next incremental backup must then read everything",
        )
    work = assemble(view, first, backing=backing, cluster_size=cluster_size)
    return Way(Strategy.NEW, work, shares_extents(view, first))


def shares_extents(view: ImageChain, first: int) -> bool:
    """Whether new files beside the top can share the blocks of all the files from `first` on.

    Tried with one block and a file that never has a name.
    """
    directory = view.top.real_path.parent
    block = os.statvfs(directory).f_bsize
    try:
        probe = os.open(directory, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError:  # no such files here, or no permission: then nothing is promised
        return False
    try:
        for file in view.files[first:]:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                return False
            if status.st_size >= block and share_range(file.fileno(), 0, probe, 0, block) is not None:
                return False
    except OSError:  # a full or failing disk: the work itself will meet that, and say so
        return False
    finally:
        os.close(probe)
    return True
