"""What is durable of a layer that is arriving: one small record beside its file, replaced as the transfer goes on.

Before a layer becomes part of the chain the record says so (`finished`), with all that the catalogue will: whoever
comes after a crash between the rename and the catalogue finishes what was begun, and never does half of it.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, ConfigDict

from snapchain.host.files import fsync_file, remove, remove_temporaries, rename
from snapchain.host.temporary_names import NEW
from snapchain.model.content import Sum, encode_sum
from snapchain.replica import names
from snapchain.replica.catalogue import Catalogue, Layer, empty_catalogue
from snapchain.replica.merge_journal import Engine, settle_merge
from snapchain.replica.store import ReplicaDisk
from snapchain.replica.stream.messages import Partial


class Progress(BaseModel):
    """finished: the layer as it will stand in the catalogue, once its file is whole and proven."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal[1] = 1
    partial: Partial
    finished: Layer | None = None


def read_progress(disk: ReplicaDisk) -> Progress | None:
    """What is under way, if anything; nothing where the file that it speaks of is gone."""
    found = disk.record(Progress, names.PROGRESS)
    if found is None or (found.finished is None and not disk.path(names.INCOMING).exists()):
        return None
    return found


def write_progress(disk: ReplicaDisk, progress: Progress) -> None:
    """Note it, durably."""
    disk.put(names.PROGRESS, progress)


def forget(disk: ReplicaDisk) -> None:
    """Nothing is under way any more. The record first: without it the file means nothing."""
    remove(disk.path(names.PROGRESS))
    remove(disk.path(names.INCOMING))


def settle(disk: ReplicaDisk, engine: Engine | None = None) -> Catalogue:
    """Finish what a killed run had finished but for the catalogue; the catalogue as it is then. Under the lock.

    engine: for a merge that was killed; without one that is left alone. Raises as `settle_merge`.
    """
    for record in (names.CATALOGUE, names.PROGRESS, names.MERGING):
        remove_temporaries(disk.path(record), purpose=NEW)
    catalogue = disk.read() or empty_catalogue(disk.name)
    progress = read_progress(disk)
    if progress is not None and progress.finished is not None:
        catalogue = publish(disk, catalogue, progress.finished)
    return settle_merge(disk, catalogue, engine)


def publish(disk: ReplicaDisk, catalogue: Catalogue, layer: Layer) -> Catalogue:
    """Make a finished layer, of which a record tells already, the tip of the chain. May be done again at any step."""
    incoming = disk.path(names.INCOMING)
    if all(known.id != layer.id for known in catalogue.layers):
        if incoming.exists():
            rename(incoming, disk.path(layer.file))
        elif not disk.path(layer.file).exists():
            remove(disk.path(names.PROGRESS))
            return catalogue
        catalogue = catalogue.after(layers=(*catalogue.layers, layer))
        disk.write(catalogue)
    remove(disk.path(names.PROGRESS))
    return catalogue


@dataclass(frozen=True, slots=True)
class _Mark:
    durable: int
    total: Sum
    count: int


class Durability:
    """Makes marks durable one after the other, on a thread of its own, so that data go on arriving meanwhile.

    Marks that wait while the disk is busy become one. on_durable: told how many marks are durable, in that thread
    look_back: told after that, in that thread, up to which guest offset
    """

    def __init__(
        self, disk: ReplicaDisk, layer: str, on_durable: Callable[[int], None], *, look_back: Callable[[int], None]
    ) -> None:
        self._disk, self._layer, self._on_durable, self._look_back = disk, layer, on_durable, look_back
        self._marks: queue.SimpleQueue[_Mark | None] = queue.SimpleQueue()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="durability", daemon=True)
        self._thread.start()

    def mark(self, durable: int, total: Sum, count: int) -> None:
        """All data below guest offset `durable` were written. Raises what went wrong with an earlier mark."""
        if self._failure is not None:
            raise self._failure
        self._marks.put(_Mark(durable, total, count))

    def stop(self) -> None:
        """Wait for the marks given so far, whatever becomes of them; harmless when repeated."""
        self._marks.put(None)
        self._thread.join()

    def close(self) -> None:
        """As `stop`. Raises what went wrong with a mark."""
        self.stop()
        if self._failure is not None:
            raise self._failure

    def _run(self) -> None:
        try:
            last = False
            while not last:
                newest, last = self._newest()
                if newest is not None:
                    self._make_durable(newest)
        except BaseException as error:  # noqa: BLE001 -- raised again where marks are given
            self._failure = error

    def _newest(self) -> tuple[_Mark | None, bool]:
        newest = self._marks.get()
        if newest is None:
            return None, True
        while True:
            try:
                following = self._marks.get_nowait()
            except queue.Empty:
                return newest, False
            if following is None:
                return newest, True
            newest = following

    def _make_durable(self, mark: _Mark) -> None:
        fsync_file(self._disk.path(names.INCOMING))
        partial = Partial(layer=self._layer, durable=mark.durable, content_sum=encode_sum(mark.total))
        write_progress(self._disk, Progress(partial=partial))
        self._on_durable(mark.count)
        self._look_back(mark.durable)
