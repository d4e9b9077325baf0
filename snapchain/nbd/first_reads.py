"""Records what the clients of an export read first, and fetches what was recorded before.

    open      the record of the disk  ->  fetched ahead, in its order, after all that clients wait for
    reads     of the first minutes, up to a size  ->  the next record, where it is another one

Neither is needed: a record that cannot be read or stored costs speed alone.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from snapchain.destination.reading import RecordsFirstReads
from snapchain.errors import SnapchainError
from snapchain.model.content import LEAF_BYTES
from snapchain.model.extents import Extents
from snapchain.model.first_reads import MOST_LEAVES, FirstReads, joined, replaces
from snapchain.nbd.data_blocks import DataBlocks
from snapchain.nbd.reading import BlobReading

SECONDS = 180.0
"""From the first read on. Clients of a guest that boots are quiet by then."""
_PATIENCE = 5.0
"""Seconds that the end of an export waits for a store to take the record."""


class Recorder:
    """Of one export. Thread-safe. is_open: whether more is recorded"""

    def __init__(self, extents: Extents) -> None:
        self.is_open = True
        self._data = DataBlocks(extents, LEAF_BYTES)
        self._leaves: dict[int, None] = {}
        self._changed = threading.Condition()

    def note(self, offset: int, length: int) -> None:
        """A client reads this range. Called for every read, so the usual case is short and takes no lock."""
        leaves = self._leaves
        for leaf in range(offset // LEAF_BYTES, -(-(offset + length) // LEAF_BYTES)):
            if leaf not in leaves and self._data.number(leaf + 1) > self._data.number(leaf):
                self._add(leaf)

    def close(self) -> None:
        """Record no more. Idempotent."""
        with self._changed:
            self.is_open = False
            self._changed.notify_all()

    def wait(self, seconds: float) -> FirstReads:
        """What was read first, once that is complete: so many seconds after the first read, or when it is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._leaves or not self.is_open)
            self._changed.wait_for(lambda: not self.is_open, seconds)
            self.is_open = False
            return joined(self._leaves)

    def _add(self, leaf: int) -> None:
        with self._changed:
            if not self.is_open:
                return
            self._leaves[leaf] = None
            self.is_open = len(self._leaves) < MOST_LEAVES
            if len(self._leaves) == 1 or not self.is_open:
                self._changed.notify_all()


@contextmanager
def first_reads(
    disk: RecordsFirstReads, reading: BlobReading, *, records: bool = True, seconds: float = SECONDS
) -> Iterator[None]:
    """A block in which `reading` is served: what was recorded is fetched, and what is read first is recorded.

    records: False where clients read in an order of their own, such as QEMU that copies all of the disk
    """
    recorder = Recorder(reading.extents)
    if records:
        reading.recorder = recorder
    else:
        recorder.close()

    def run() -> None:
        known: FirstReads = ()
        with suppress(SnapchainError):
            known = disk.first_reads()
            reading.prefetch(known)
        found = recorder.wait(seconds)
        if replaces(found, known):
            with suppress(SnapchainError):  # such as a user who may not write there
                disk.note_first_reads(found)

    thread = threading.Thread(target=run, name="nbd first reads", daemon=True)
    thread.start()
    try:
        yield
    finally:
        recorder.close()
        thread.join(_PATIENCE)
