"""Whether a disk at a replica is still what its catalogue says: links, sizes, and every byte, layer by layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from snapchain.errors import Corrupt
from snapchain.image import ImageChain, ImageFile
from snapchain.image.leaves import counted
from snapchain.image.pread import file_bytes
from snapchain.image.qcow2.refcounts import refcounts
from snapchain.image.qcow2.tables import ImageFd
from snapchain.model.content import content_id, empty_sum
from snapchain.replica.arrival import opened_chain
from snapchain.replica.store import ReplicaDisk


@dataclass(frozen=True, slots=True)
class Finding:
    """A layer that does not show what it should, or whose reference counts would lead a writer astray."""

    file: str
    shown: str
    recorded: str
    counts: str | None = None

    @property
    def message(self) -> str:
        """What is wrong."""
        if self.shown != self.recorded:
            return f"it shows the content {self.shown}, recorded is {self.recorded}"
        return f"its reference counts are wrong, though it shows what it should: {self.counts}"


def verify_disk(disk: ReplicaDisk, *, on_bytes: Callable[[int], None]) -> list[Finding]:
    """Read all layers, compare what the chain shows at each with the catalogue, and count; what is wrong, root first.

    A layer is counted from the sum recorded for the one below it: the lowest of the findings has a fault, those above
    it may only lie on it.
    on_bytes: told how much was read since it was last told
    Raises Corrupt when files are missing, replaced, or linked otherwise, or one cannot be read.
    """
    catalogue = disk.read()
    if catalogue is None or catalogue.tip is None:
        return []
    found: list[Finding] = []
    with opened_chain(disk, catalogue, catalogue.tip) as chain:
        below: ImageChain | None = None
        total = empty_sum()
        for number, layer in enumerate(catalogue.layers):
            view = chain.at(number)
            shown = content_id(view.size, counted(view.top.extents, view, below, total, on_bytes=on_bytes))
            counts = _miscounted(view.top)
            if shown != layer.content_id or counts is not None:
                found.append(Finding(layer.file, shown, layer.content_id, counts))
            below, total = view, layer.sum()
    return found


def _miscounted(file: ImageFile) -> str | None:
    """What `qemu-img check` would say; None where it finds neither errors nor leaks."""
    assert file.header is not None, "a replica's layers are qcow2"
    try:
        found = refcounts(ImageFd(file.fileno(), file_bytes(file.fileno()), file.header, file.path))
    except Corrupt as error:
        return error.message
    if not found.errors and not found.leaks:
        return None
    return f"{found.errors} clusters have too low a count, {found.leaks} too high a one"
