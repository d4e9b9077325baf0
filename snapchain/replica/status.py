"""What a replica answers to somebody who asks and sends nothing: its points, and whether it is sound.

    ASK  ->  DISK* DONE                                    what points there are
         ->  (PROGRESS* FINDING* VERDICT)* DONE            whether records, or data, are sound

Nothing is made, locked or changed, but for what a merge that was killed has left: that is put in order first.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

from snapchain.errors import Busy, InvalidInput, NotFound, SnapchainError, Unsupported
from snapchain.replica.catalogue import Catalogue
from snapchain.replica.checking import check_disk
from snapchain.replica.merge_journal import Engine, wait_for_merge
from snapchain.replica.store import ReplicaDisk, open_replica
from snapchain.replica.stream.frames import Kind
from snapchain.replica.stream.messages import POINTS_AT_ONCE, Ask, HeldDisk, HeldPoint, encode

Say = Callable[[Kind, bytes], None]
PROGRESS = struct.Struct("<QQ")
"""Bytes of data read so far, and of how many, by the maps of the layers."""
_PROGRESS_SECONDS = 0.3


def answer(asked: Ask, root: Path, say: Say, *, engine: Engine | None = None) -> None:
    """Say all but DONE. Raises NotFound where there is no such replica or disk, and what `say` raises.

    engine: for a merge that was killed, which is finished or undone before anything is judged
    """
    replica = open_replica(root)
    disks = replica.disks() if asked.disk is None else [replica.disk(asked.disk)]
    if asked.want == "points":
        for disk in disks:
            for page in _pages(_settled(disk, engine)):
                say(Kind.DISK, encode(page))
        return
    teller = _Teller(disks, say) if asked.want == "data" else None
    for disk in disks:
        on_bytes = _ignored if teller is None else teller.read
        checked = check_disk(disk, data=asked.want == "data", on_bytes=on_bytes, engine=engine)
        for finding in checked.findings:
            say(Kind.FINDING, encode(finding))
        say(Kind.VERDICT, encode(checked.verdict))


def _settled(disk: ReplicaDisk, engine: Engine | None) -> Catalogue:
    with suppress(Busy, InvalidInput, Unsupported):  # its points are told all the same
        wait_for_merge(disk, engine=engine, patience=0)
    found = disk.read()
    if found is None:
        raise NotFound(f"there is no disk {disk.name!r} here", subject=disk.directory.parent)
    return found


def _pages(catalogue: Catalogue) -> Iterator[HeldDisk]:
    heights = {layer.id: number for number, layer in enumerate(catalogue.layers, 1)}
    points = [
        HeldPoint(
            point=point.point,
            time=point.time,
            labels=point.labels,
            size=point.size,
            content_id=point.content_id,
            layers=heights[point.layer],
        )
        for point in catalogue.points
    ]
    for at in range(0, max(1, len(points)), POINTS_AT_ONCE):
        page = tuple(points[at : at + POINTS_AT_ONCE])
        yield HeldDisk(disk=catalogue.disk, epoch=catalogue.epoch, points=page)


class _Teller:
    """Says now and then how much was read."""

    def __init__(self, disks: list[ReplicaDisk], say: Say) -> None:
        # A catalogue that cannot be read is a finding later; here it adds nothing.
        self._total = sum(_data_bytes(disk) for disk in disks)
        self._say, self._done, self._told = say, 0, 0.0

    def read(self, count: int) -> None:
        self._done += count
        if time.monotonic() - self._told >= _PROGRESS_SECONDS:
            self._told = time.monotonic()
            self._say(Kind.PROGRESS, PROGRESS.pack(self._done, max(self._done, self._total)))


def _data_bytes(disk: ReplicaDisk) -> int:
    try:
        catalogue = disk.read()
    except SnapchainError:
        return 0
    return 0 if catalogue is None else sum(layer.data_bytes for layer in catalogue.layers)


def _ignored(_count: int) -> None:
    """Records are read in no time."""
