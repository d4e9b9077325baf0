"""Restore to a stream: a raw disk, written in guest order as it is read, for a pipe to another program.

Workers deliver what they have read in any order, a few tasks ahead of what is written:

    read    |--3--|      |--5--||--6--|        kept until all before it is there, and it is proven
    written |==1==||==2==|

Each range from a repository is proven before it is written. What a replica sends is proven at the end only, by the
content id of what was written. So the exit code tells whether the stream was the point.
"""

from __future__ import annotations

import heapq
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import numpy as np

from snapchain.destination.reading import PointReader, ReadableDestination
from snapchain.errors import Corrupt
from snapchain.host.batches import Buffer
from snapchain.model.content import LEAF_BYTES, ZERO_LEAF, content_id, empty_sum, leaf_hash, sum_of
from snapchain.model.events import OnEvent, counting, ignore
from snapchain.ops.restore.damage import Damage, check_allowed
from snapchain.ops.restore.target import FilePlan, RestorePlan, RestoreReport, sectors

STREAM = "-"
"""What plans and reports call the output."""
_CHUNK = 16 * LEAF_BYTES


class InOrder:
    """One stream of a disk's bytes, made of pieces that come in any order. `take` may be called from any thread.

    size: of the disk, bytes; write: gets each next part of the stream, filled up to whole sectors
    """

    def __init__(self, size: int, write: Callable[[memoryview], None]) -> None:
        self._size, self._write = size, write
        self._lock = threading.Lock()
        self._waiting: list[tuple[int, int, Buffer]] = []
        self._count = 0
        self._chunk = bytearray(_CHUNK)
        self._at = 0
        self._is_blank = True
        self._total = empty_sum()

    def take(self, pieces: Sequence[tuple[int, Buffer]]) -> None:
        """Keep (offset, bytes) of pieces until `advance` passes them."""
        with self._lock:
            for offset, data in pieces:
                self._count += 1  # a buffer has no order
                heapq.heappush(self._waiting, (offset, self._count, data))

    def advance(self, stop: int) -> None:
        """Write everything below guest offset `stop`; where no piece is, zeroes."""
        while True:
            with self._lock:
                if not self._waiting or self._waiting[0][0] >= stop:
                    break
                offset, _, data = heapq.heappop(self._waiting)
            self._fill(offset)
            self._add(memoryview(data).cast("B"))
        self._fill(min(stop, self._size))

    def finish(self) -> str:
        """Write the rest; the content id of the whole stream."""
        self.advance(self._size)
        if self._at % _CHUNK:
            self._pass_on(self._at % _CHUNK)
        return content_id(self._size, self._total)

    def _fill(self, offset: int) -> None:
        """Zeroes up to an offset."""
        while self._at < offset:
            inside = self._at % _CHUNK
            count = min(offset - self._at, _CHUNK - inside)
            if not self._is_blank:
                self._chunk[inside : inside + count] = bytes(count)
            self._step(count)

    def _add(self, data: memoryview) -> None:
        while data:
            inside = self._at % _CHUNK
            count = min(len(data), _CHUNK - inside)
            self._chunk[inside : inside + count] = data[:count]
            self._is_blank = False
            self._step(count)
            data = data[count:]

    def _step(self, count: int) -> None:
        self._at += count
        if not self._at % _CHUNK:
            self._pass_on(_CHUNK)

    def _pass_on(self, length: int) -> None:
        """Count and write the first bytes of the chunk, which then is blank."""
        view = memoryview(self._chunk)
        if not self._is_blank:
            first = (self._at - 1) // _CHUNK * (_CHUNK // LEAF_BYTES)
            leaves = [
                (first + at // LEAF_BYTES, leaf_hash(view[at : min(at + LEAF_BYTES, length)]))
                for at in range(0, length, LEAF_BYTES)
            ]
            held = [(number, digest) for number, digest in leaves if digest != ZERO_LEAF]
            hashes = np.frombuffer(b"".join(digest for _, digest in held), np.uint8).reshape(-1, len(ZERO_LEAF))
            self._total += sum_of(np.array([number for number, _ in held], np.int64), hashes)
        whole = sectors(length)
        self._write(view[:whole])
        if not self._is_blank:
            view[:] = bytes(_CHUNK)
            self._is_blank = True


class StreamedRestoration:
    """A point of a destination, and a stream that it is written to. Nothing is read before `plan` or `run`."""

    def __init__(
        self,
        destination: ReadableDestination,
        disk: str,
        *,
        point: str | None = None,
        allow_damaged: bool = False,
    ) -> None:
        """allow_damaged: write zeroes for ranges that are lost, and report them. Raises InvalidInput."""
        self._destination, self._disk, self._point = destination, disk, point
        self._allow_damaged = allow_damaged
        if allow_damaged:
            traits = destination.traits
            check_allowed(names_damage=traits.names_damage, kind=traits.kind, whole_chain=False)

    def plan(self) -> RestorePlan:
        """What `run` will do; reads no data."""
        with self._reader(maps_only=True) as reader:
            point = reader.point
            (layer,) = reader.layers()
            stream = FilePlan(
                path=STREAM,
                format="raw",
                virtual_size=layer.extents.size,
                data_bytes=layer.extents.data_bytes,
                backing=None,
            )
        return RestorePlan(
            source=self._destination.url,
            disk=self._disk,
            point=point.point,
            time=point.time.isoformat(),
            virtual_size=point.virtual_size,
            content_id=point.content_id,
            output=STREAM,
            device=False,
            replaces=False,
            files=(stream,),
            bytes_to_write=stream.data_bytes,
        )

    def _reader(self, *, maps_only: bool = False, on_event: OnEvent = ignore) -> AbstractContextManager[PointReader]:
        return self._destination.reader(
            self._disk,
            self._point,
            clusters=False,
            maps_only=maps_only,
            damaged=self._allow_damaged,
            on_event=on_event,
        )

    def run(self, write: Callable[[memoryview], None], *, on_event: OnEvent = ignore) -> RestoreReport:
        """Write the disk. write: takes all of the bytes that it is given, before it returns.

        Raises Corrupt naming the guest range that is lost, or when what was written is not the point, Unavailable when
        the destination does not answer, and what `write` raises. The stream has ended early then, or is not the point.
        """
        damage = Damage(allowed=self._allow_damaged)
        with self._reader(on_event=on_event) as reader:
            point = reader.point
            on_bytes = counting("restore", reader.data_bytes, on_event)
            on_bytes(0)
            written, shown, recorded = 0, "", ""
            for layer in reader.layers():
                written += layer.extents.data_bytes
                stream = InOrder(layer.extents.size, write)

                def on_copied(stop: int, count: int, stream: InOrder = stream) -> None:
                    stream.advance(stop)
                    on_bytes(count)

                recorded = layer.copy(damage.sink(stream.take), on_copied=on_copied)
                shown = stream.finish()
            if shown != recorded or not (damage.ranges or shown == point.content_id):
                raise Corrupt(
                    f"the content id of the stream is {shown}, but {point.content_id} is recorded",
                    subject=f"{self._destination.url}::{self._disk}",
                    hint="do not use what was written; snapchain verify --read-data tells whether the destination is "
                    "damaged",
                )
        return RestoreReport(
            disk=self._disk,
            point=point.point,
            output=STREAM,
            files=(),
            virtual_size=point.virtual_size,
            bytes_written=written,
            content_id=shown,
            damaged=damage.ranges,
        )


__all__ = ["STREAM", "InOrder", "StreamedRestoration"]
