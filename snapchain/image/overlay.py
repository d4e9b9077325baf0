"""An empty qcow2 overlay: reads as its backing file until somebody writes to it.

The same file, as a guest sees it, as `qemu-img create -u -b NAME -F FORMAT -o compat=1.1` makes; but written to a
descriptor, so that no name is followed that somebody may have swapped, and without opening the backing file.
"""

from __future__ import annotations

from snapchain.image.qcow2.header import Backing
from snapchain.image.qcow2.layout import DEFAULT_CLUSTER_SIZE, plan
from snapchain.image.qcow2.write import Qcow2Writer
from snapchain.model.extents import Extents


def write_overlay(
    fd: int, size: int, backing: Backing, *, cluster_size: int | None, extended_l2: bool, subject: object
) -> None:
    """Fill a new, empty file. It is not flushed: do that before it gets the name by which others find it.

    size: guest bytes, a multiple of 512; cluster_size: None for QEMU's own choice; subject: the file that errors name
    Raises InvalidInput for a geometry or a backing name that qcow2 cannot have, Unavailable for a full or failing disk.
    """
    chosen = DEFAULT_CLUSTER_SIZE if cluster_size is None else cluster_size
    name = backing.name
    if "/" not in name and ":" in name:  # QEMU would take it for a protocol
        backing = Backing(f"./{name}", backing.format)
    layout = plan(Extents.absent(size), cluster_size=chosen, backing=backing, extended_l2=extended_l2)
    writer = Qcow2Writer(fd, layout, subject=subject)
    writer.begin()
    writer.finish(flush=False)
