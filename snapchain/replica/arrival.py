"""One layer arriving at a replica: data into a file that has no header yet, then the proof, then its name.

begin     place every cluster by the map alone, so that a second run finds the same places
take      write what a judged frame brings; zeroes are holes, the rest may come from the layers below
mark      what was written so far becomes durable, and is then read back and counted, on another thread
finish    tables and header, which must lead to what was read, and the rest of that: the chain must show the content id
          that was announced
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict

from snapchain.errors import Conflict, Corrupt, Diverged, SnapchainError, Unavailable, Unsupported
from snapchain.host.directory import Directory
from snapchain.host.files import free_bytes, fsync_file, remove, remove_temporaries, rename
from snapchain.host.os_errors import os_errors
from snapchain.host.temporary_names import NEW
from snapchain.image import Backing, ImageChain, scan
from snapchain.image.file import ImageFile, fingerprint_of
from snapchain.image.leaves import Counting, counted
from snapchain.image.physical import Physical, PhysicalBuilder, RunBudget, Runs
from snapchain.image.pread import write_all
from snapchain.image.qcow2.layout import Layout, plan as lay_out
from snapchain.image.qcow2.write import Qcow2Writer
from snapchain.model.content import Sum, content_id, empty_sum, encode_sum
from snapchain.model.extents import DATA, ZERO, Extents
from snapchain.model.inventory import MAX_LAYERS
from snapchain.replica import names
from snapchain.replica.catalogue import Catalogue, Layer, check_room_for_layer, empty_catalogue
from snapchain.replica.layer_cut import settle_cut
from snapchain.replica.merge_journal import settle_merge
from snapchain.replica.store import ReplicaDisk
from snapchain.replica.stream.maps import Arrived, DataRuns, Part
from snapchain.replica.stream.messages import LayerOffer, Partial


class Arrival:
    """A layer that comes on top of `catalogue`'s chain. The disk is locked for its lifetime.

    on_durable: called, in another thread, with the number of durable marks
    """

    def __init__(
        self,
        disk: ReplicaDisk,
        catalogue: Catalogue,
        offer: LayerOffer,
        extents: Extents,
        *,
        layer: str,
        subject: str,
        on_durable: Callable[[int], None],
    ) -> None:
        """Raises Conflict when it does not belong on this chain, Unavailable when there is no room for it."""
        self.layer = layer
        self.runs = DataRuns(extents)
        self._disk, self._catalogue, self._offer, self._extents = disk, catalogue, offer, extents
        self._subject, self._on_durable = subject, on_durable
        names.check_offered(offer.name, subject=subject)
        tip = catalogue.tip
        if (tip.id if tip else None) != offer.parent:
            raise Diverged(
                "the layer that is offered does not lie on the newest one here",
                subject=disk.directory,
                hint="another transfer was faster, or the two sides went their own ways: look again",
            )
        if len(catalogue.layers) == MAX_LAYERS:
            raise Unsupported(f"the chain has {MAX_LAYERS} layers, and QEMU opens no more", subject=disk.directory)
        foreseen = self._record(offer.name, content_id=bytes(32).hex(), total=empty_sum())
        check_room_for_layer(catalogue, foreseen, subject=disk.directory)
        self._below = None if tip is None else opened_chain(disk, catalogue, tip)
        self._fd = -1
        self._growing: GrowingFile | None = None
        self._durability: Durability | None = None
        try:
            backing = Backing(tip.file, "qcow2") if tip else None
            try:
                layout = lay_out(
                    extents, cluster_size=offer.cluster_size, backing=backing, extended_l2=offer.extended_l2
                )
            except SnapchainError as error:
                raise Corrupt(f"a layer is offered that cannot be: {error.message}", subject=subject) from error
            _check_room(disk, layout.metadata_bytes)
            self.resumes_at = self._open_file(layout.file_bytes)
            self._writer = Qcow2Writer(self._fd, layout, subject=disk.path(names.INCOMING))
            if self.resumes_at:
                self._writer.resume()
            else:
                self._writer.begin()
            self._growing = GrowingFile(disk.path(names.INCOMING), self._fd, layout)
            self._below_sum = tip.sum() if tip else empty_sum()
            self._counting = self._begun(self._growing)
            self._durability = Durability(disk, layer, on_durable, look_back=self._counting.up_to)
        except BaseException:
            self.close()
            raise

    def _begun(self, growing: GrowingFile) -> Counting:
        below = self._below
        view = ImageChain([*(below.files if below else ()), growing], owned=False)
        return Counting(growing.extents, view, below, self._below_sum)

    def _open_file(self, file_bytes: int) -> int:
        """The guest offset up to which an earlier run made this very layer durable, else 0 with an empty file."""
        offer, path = self._offer, self._disk.path(names.INCOMING)
        progress = read_progress(self._disk)
        known = progress is not None and progress.partial.layer == self.layer
        durable = progress.partial.durable if known and progress is not None else 0
        if offer.resume_at > durable:
            raise Conflict(
                f"the data go on at guest byte {offer.resume_at}, but only {durable} are here",
                subject=self._subject,
                hint="run it again",
            )
        if not durable:
            forget(self._disk)
        with os_errors(path), Directory.open(self._disk.directory) as here:
            if not durable:
                self._fd = here.create(names.INCOMING)
                return 0
            _make_writable(here)
            self._fd = here.open_file(names.INCOMING, writing=True)
            status = os.fstat(self._fd)
            if status.st_size != file_bytes or status.st_nlink != 1:
                raise Corrupt("the file of the layer that is arriving was changed", subject=path, hint="remove it")
            write_all(self._fd, bytes(4), 0)
        return durable

    def take(self, frame: Arrived) -> None:
        """Write what a frame brings. Raises Unavailable when the disk fails or is full."""
        if frame.stop <= self.resumes_at:
            return
        pieces = self.runs.pieces(frame.start, frame.stop)
        if len(frame.parts) == 1 and frame.parts[0][1] is Part.CARRIED:
            self._writer.write_pieces([(p.offset, frame.carried[p.at : p.at + p.length]) for p in pieces])
            return
        writes: list[tuple[int, memoryview]] = []
        carried = at = piece = 0
        for length, kind in frame.parts:
            stop = at + length
            while at < stop:
                found = pieces[piece]
                count = min(stop, found.at + found.length) - at
                offset = found.offset + at - found.at
                if kind is Part.CARRIED:
                    writes.append((offset, frame.carried[carried : carried + count]))
                    carried += count
                elif kind is Part.BELOW:
                    writes.append((offset, self._from_below(offset, count)))
                at += count
                piece += at == found.at + found.length
        self._writer.write_pieces(writes)

    def _from_below(self, offset: int, count: int) -> memoryview:
        buffer = memoryview(bytearray(count))
        assert self._below is not None
        inside = max(0, min(offset + count, self._below.size) - offset)
        if inside:
            self._below.read_into(offset, buffer[:inside])
        return buffer

    def mark(self, offset: int, total: Sum, count: int) -> None:
        """The sender's mark number `count`: it had counted `total` when all data below `offset` were sent."""
        if offset <= self.resumes_at:
            self._on_durable(count)
        else:
            assert self._durability is not None
            self._durability.mark(offset, total, count)

    def finish(self, announced: str) -> Catalogue:
        """Prove the layer, and make it part of the chain; the catalogue with it.

        Raises Corrupt when the chain does not show the announced content id; then nothing is left of the layer.
        """
        assert self._durability is not None
        self._durability.close()
        path = self._disk.path(names.INCOMING)
        self._writer.finish()
        with os_errors(path):
            self._disk.access.give(self._fd, self._disk.layer_mode())
        fsync_file(path)
        total = self._proven(announced)
        with os_errors(self._disk.directory), Directory.open(self._disk.directory) as here:
            taken = set(here.names())
        file = names.free_name(self._offer.name, self.layer, taken)
        layer = self._record(file, content_id=announced, total=total)
        partial = Partial(layer=self.layer, durable=self._offer.size, content_sum=layer.content_sum)
        write_progress(self._disk, Progress(partial=partial, finished=layer))
        return publish(self._disk, self._catalogue, layer)

    def _record(self, file: str, *, content_id: str, total: Sum) -> Layer:
        offer = self._offer
        return Layer(
            id=self.layer,
            file=file,
            size=offer.size,
            content_id=content_id,
            content_sum=encode_sum(total),
            sources=offer.sources,
            time=datetime.now(UTC),
            cluster_size=offer.cluster_size,
            data_bytes=self._extents.data_bytes,
        )

    def _proven(self, announced: str) -> Sum:
        # All bytes have been read from the file, most of them behind a mark, while others were still to come. Unless
        # the tables lead to these very bytes, that proves nothing.
        assert self._growing is not None
        total = self._counting.rest(_unheard)
        with scan(self._disk.path(names.INCOMING), format="qcow2") as view:
            if not self._growing.became(view.top):
                total = counted(view.top.extents, view, self._below, self._below_sum, on_bytes=_unheard)
            shown = content_id(view.size, total)
        if shown != announced:
            forget(self._disk)
            raise Corrupt(
                f"what arrived shows the content {shown}, announced was {announced}; it was thrown away",
                subject=self._subject,
                hint="run it again; if it persists, verify the source and the layers that are here",
            )
        return total

    def close(self) -> None:
        """Give up what is open. What is durable stays, for the next run."""
        if self._durability is not None:
            self._durability.stop()
        if self._growing is not None:
            self._growing.close()
        if self._below is not None:
            self._below.close()
            self._below = None
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _make_writable(here: Directory) -> None:
    """A run that was killed in its last steps has made the file read-only, and begun its header."""
    fd = here.open_file(names.INCOMING)
    try:
        with here.changing(fd):
            os.fchmod(fd, 0o600)
    finally:
        os.close(fd)


def _check_room(disk: ReplicaDisk, table_bytes: int) -> None:
    """Data may turn out to be zeroes, which need no room; tables are written in full."""
    if table_bytes > free_bytes(disk.directory):
        raise Unavailable(f"the layer needs {table_bytes} bytes for its tables alone", subject=disk.directory)


def opened_chain(disk: ReplicaDisk, catalogue: Catalogue, tip: Layer) -> ImageChain:
    """The chain that is here. Raises Corrupt when it is not what the catalogue says."""
    chain = scan(disk.path(tip.file), format="qcow2")
    found = [(file.path.name, file.size, file.format) for file in chain.files]
    wanted = [(layer.file, layer.size, "qcow2") for layer in catalogue.layers]
    if found == wanted and all(file.path.parent == chain.top.path.parent for file in chain.files):
        return chain
    chain.close()
    raise Corrupt(
        "the files of this disk are not the chain that its catalogue names",
        subject=disk.directory,
        hint="somebody has rebased, resized or replaced them",
    )


def _unheard(count: int) -> None:
    """The progress of a proof is not reported."""


# --- What of an arriving layer is durable: one small record beside its file, replaced as the transfer goes on.
#
# Before a layer becomes part of the chain, the record holds its whole catalogue entry (`finished`). After a crash
# between the rename and the catalogue, the next run completes both.


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


def settle(disk: ReplicaDisk) -> Catalogue:
    """Finish what a killed run left half done; the catalogue as it is then. Under the lock.

    That is a layer that was not in the catalogue yet, files that a cut had to remove, and a merge.

    Raises as `settle_merge`.
    """
    for record in (names.CATALOGUE, names.PROGRESS, names.MERGING, names.CUTTING):
        remove_temporaries(disk.path(record), purpose=NEW)
    catalogue = disk.read() or empty_catalogue(disk.name)
    progress = read_progress(disk)
    if progress is not None and progress.finished is not None:
        catalogue = publish(disk, catalogue, progress.finished)
    settle_cut(disk, catalogue)
    return settle_merge(disk, catalogue)


def publish(disk: ReplicaDisk, catalogue: Catalogue, layer: Layer) -> Catalogue:
    """Make a finished layer, which the progress record names, the tip of the chain. May be repeated after any step."""
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
    """Makes marks durable one after the other, on a thread of its own, while more data arrive.

    Marks that wait while the disk is busy become one.

    on_durable: called, in that thread, with the number of durable marks
    look_back: called after that, in that thread, with the guest offset of the last one
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


# --- A qcow2 file that is still being written, read by its layout: what has been written so far can be looked at before
# there are tables and a header.


class GrowingFile(ImageFile):
    """An ImageFile by its layout alone; it has no header yet. Bytes of DATA that are not written read as zeroes."""

    def __init__(self, path: Path, fd: int, layout: Layout) -> None:
        """fd: stays the caller's; a copy of it is held. Compressed clusters are not read."""
        self.path = self.real_path = path
        self.chosen_by = None
        self.format = "qcow2"
        self.header = None
        self._local = threading.local()
        self._fd = os.dup(fd)
        status = os.fstat(fd)
        self.fingerprint = fingerprint_of(status)
        self.device = (status.st_dev, status.st_ino)
        self.physical = _physical(layout, path)

    def shown_extents(self) -> Extents:
        """By its layout: a hole may be data that has not arrived yet."""
        return self.physical.extents()

    def became(self, finished: ImageFile) -> bool:
        """Whether the tables of the finished file lead to the bytes that were read here."""
        mine, theirs = self.physical, finished.physical
        if finished.device != self.device or mine.size != theirs.size or len(mine) != len(theirs):
            return False
        data = mine.kind == DATA
        return bool(
            np.array_equal(mine.start, theirs.start)
            and np.array_equal(mine.kind, theirs.kind)
            and np.array_equal(mine.host[data], theirs.host[data])
            and not theirs.stored.any()
        )


def _physical(layout: Layout, path: Path) -> Physical:
    extents = layout.extents
    zero = extents.val == ZERO
    runs = Runs.concatenated(
        Runs.plain(layout.guest, layout.guest + layout.length, kind=DATA, host=layout.host),
        Runs.plain(extents.at[zero], extents.ends[zero], kind=ZERO, host=-1),
    )
    # What the layout was made of has been judged: it may cost what it costs.
    builder = PhysicalBuilder(layout.size, budget=RunBudget(2 * len(runs) + 1), subject=path)
    builder.add(runs[np.argsort(runs.start, kind="stable")])
    return builder.finish()
