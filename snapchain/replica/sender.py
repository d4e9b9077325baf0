"""The sending side of a stream: layers in order, each from where its transfer once stopped, then points.

Everything that decides what is sent is known after the inventory: no frame waits for an answer, so latency costs one
round trip for a whole chain.
"""

from __future__ import annotations

import queue
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from types import TracebackType
from typing import Self

import numpy as np

from snapchain.destination.writing import Moment
from snapchain.errors import Corrupt
from snapchain.host.channel import Channel
from snapchain.model.content import HASH_BYTES, LEAF_BYTES, Hashes, Sum, content_id, decode_sum, empty_sum, sum_of
from snapchain.model.extents import Int64s
from snapchain.replica.names import ACTIVE
from snapchain.replica.outgoing import Outgoing, OutgoingLayer
from snapchain.replica.send_queue import SendQueue
from snapchain.replica.stream.compression import Levels, Link
from snapchain.replica.stream.frames import Frame, Kind
from snapchain.replica.stream.maps import decode_leaves, layer_id, map_frames, words_of
from snapchain.replica.stream.messages import (
    PROGRESS,
    Active,
    ActiveState,
    Cut,
    Done,
    Inventory,
    LayerOffer,
    Open,
    Partial,
    PointOffer,
    Readiness,
    WantLeaves,
    encode,
)
from snapchain.replica.stream.requests import Feature
from snapchain.replica.stream.session import ClientSession, hello

MARK_BYTES = 32 << 20
"""Bytes on the wire between two marks: what is sent twice at most after a crash."""
MARK_SECONDS = 2.0
_MOST_MARKS = 256
"""More than the window of what is not yet confirmed can hold."""
_OFFSET = struct.Struct("<Q")
_BODIES = 4
"""Frames of leaf hashes that wait to be used."""
_LOOK_SECONDS = 0.5
"""How soon a thread that waits for the other notices that it has failed."""
OnBytes = Callable[[int, int], None]


def ignored(_done: int, _total: int) -> None:
    """For callers that show no progress."""


@dataclass(frozen=True, slots=True)
class Sent:
    """A layer that was given to the stream. total and content_id: of the chain up to it."""

    layer: str
    size: int
    total: Sum
    content_id: str
    resumed_at: int


class Marks:
    """Content sums that were counted at the last marks: at one of them the next attempt goes on."""

    def __init__(self) -> None:
        self._sums: dict[tuple[str, int], Sum] = {}

    def note(self, layer: str, offset: int, total: Sum) -> None:
        """All data of a layer below the guest offset were read, and give that sum."""
        self._sums[layer, offset] = total
        if len(self._sums) > _MOST_MARKS:
            del self._sums[next(iter(self._sums))]

    def of(self, layer: str, offset: int) -> Sum | None:
        """None where it is not known."""
        return self._sums.get((layer, offset))


@dataclass(slots=True)
class Traffic:
    """Bytes so far. data: DATA of the maps sent; carried: those of them that travelled, before compression."""

    data: int = 0
    carried: int = 0


class Sender:
    """A context manager around one stream; the channel stays the caller's. The other side is told of an exception.

    answers: whether the other side speaks; a stream that is saved has none, and begins with `open_blindly`
    """

    def __init__(
        self,
        channel: Channel,
        *,
        link: Link,
        answers: bool = True,
        limit_rate: int | None = None,
        marks: Marks | None = None,
    ) -> None:
        """marks: of earlier attempts, so that what was counted then need not be read again."""
        self.traffic = Traffic()
        self._channel = channel
        self._session = ClientSession(channel)
        self._answers = answers
        self._limit_rate = limit_rate
        self._levels = Levels(link)
        self._outbox: SendQueue | None = None
        self._partial: Partial | None = None
        self._newest: tuple[str, int, str] | None = None  # layer, size and content id
        self._layers: dict[str, tuple[int, str]] = {}
        self._files: frozenset[str] = frozenset()
        self._marked_bytes, self._marked_at = 0, time.monotonic()
        self._marks = Marks() if marks is None else marks

    @property
    def peer(self) -> str:
        """The other end, for messages."""
        return self._channel.peer

    @property
    def bytes_sent(self) -> int:
        """On the wire."""
        return self._channel.bytes_written

    @property
    def confirmations(self) -> int:
        """How often the other side has confirmed that something is durable."""
        return 0 if self._outbox is None else self._outbox.confirmations

    def open(self, request: Open, *, on_wait: Callable[[], None] = lambda: None) -> Inventory:
        """Name the disk; what the other side holds of it. Raises Unsupported, or what the other side refuses with.

        on_wait: called now and then while the other side waits for a merge of that disk to end
        """
        assert self._answers
        session = self._session
        session.begin()
        if request.epoch > 1:
            session.require(Feature.EPOCH)
        if Feature.NAMED_EPOCH not in session.features:
            request = request.model_copy(update={"by_name": False})
        session.writer.send(Kind.OPEN, encode(request))
        frame = session.next(on_wait)
        if frame.kind is not Kind.INVENTORY:
            raise Corrupt(f"it answered with {frame.kind.name}, not with INVENTORY", subject=self._channel.peer)
        found = session.decode(Inventory, frame)
        if found.disk != request.disk:
            raise Corrupt("it answered about another disk than the one asked for", subject=self._channel.peer)
        if found.epoch > request.epoch or (found.epoch < request.epoch and not request.look):
            raise Corrupt(
                f"its disk is in epoch {found.epoch}, and it accepted a sender of epoch {request.epoch}",
                subject=self._channel.peer,
            )
        for layer in found.layers:
            if content_id(layer.size, decode_sum(layer.content_sum)) != layer.content_id:
                raise Corrupt(f"its layer {layer.file!a} contradicts itself", subject=self._channel.peer)
        self._partial = found.partial
        self._files = frozenset(layer.file for layer in found.layers)
        self._layers = {layer.id: (layer.size, layer.content_id) for layer in found.layers}
        self._newest = None if not found.layers else (found.layers[-1].id, *self._layers[found.layers[-1].id])
        self._outbox = SendQueue(self._channel, session.writer, session, limit_rate=self._limit_rate)
        return found

    def require(self, feature: Feature) -> None:
        """Raises Unsupported if the other side lacks the feature."""
        self._session.require(feature)

    def cut(self, keep: str | None) -> None:
        """Have the other side drop all layers above `keep` (None: all there are), and the points that they give."""
        self._partial = None
        self._newest = None if keep is None else (keep, *self._layers[keep])
        self._opened().put(Kind.CUT, encode(Cut(keep=keep)))

    def open_blindly(self, request: Open) -> None:
        """Begin a stream that nobody answers."""
        writer = self._session.writer
        writer.send(Kind.HELLO, encode(hello(answers=False)))
        writer.send(Kind.OPEN, encode(request))
        self._outbox = SendQueue(self._channel, writer, limit_rate=self._limit_rate)

    def send_layer(
        self, layer: OutgoingLayer, parent: str | None, *, confirm: Callable[[], None], on_bytes: Callable[[int], None]
    ) -> Sent:
        """Send one layer, from where an earlier run made it durable.

        parent: the id of the layer that it lies on; confirm: called when all is read, raises when the source changed
        on_bytes: called, in any thread, with counts of DATA bytes that are on the wire, or need not be sent
        """
        outbox = self._opened()
        outgoing = Outgoing(layer, self._levels)
        words = words_of(layer.extents, layer.cluster_size // 32 if layer.extended_l2 else layer.cluster_size)
        offer = LayerOffer(
            name=layer.name,
            size=layer.extents.size,
            cluster_size=layer.cluster_size,
            extended_l2=layer.extended_l2,
            parent=parent,
            sources=layer.sources,
            runs=len(words),
        )
        name = layer_id(offer, words)
        total, since = self._start(outgoing, name)
        outbox.put(Kind.LAYER, encode(offer.model_copy(update={"resume_at": since})))
        for body in map_frames(words):
            outbox.put(Kind.MAP, body)
        on_bytes(outgoing.runs.below(since))
        for portion in outgoing.portions(since=since):
            total = total + portion.delta
            if portion.frame:
                self._levels.queue_seen(outbox.fullness)
                sent = partial(on_bytes, portion.data)
                self._marked_bytes += outbox.put(Kind.DATA, *portion.frame, on_sent=sent)
            else:
                on_bytes(portion.data)
            self.traffic.data += portion.data
            self.traffic.carried += portion.carried
            if self._marked_bytes >= MARK_BYTES or time.monotonic() - self._marked_at >= MARK_SECONDS:
                outbox.mark(_OFFSET.pack(portion.stop), total.astype("<u2").tobytes())
                self._marks.note(name, portion.stop, total)
                self._marked_bytes, self._marked_at = 0, time.monotonic()
        confirm()
        shown = content_id(offer.size, total)
        outbox.end_layer(name, bytes.fromhex(shown))
        self._newest = (name, offer.size, shown)
        return Sent(name, offer.size, total, shown, since)

    def _start(self, outgoing: Outgoing, name: str) -> tuple[Sum, int]:
        """The content sum counted so far, and the guest offset from which on data are sent."""
        partial = self._partial
        size = outgoing.layer.extents.size
        if partial is None or partial.layer != name or partial.durable > size:
            return outgoing.first_sum(), 0
        if partial.durable % LEAF_BYTES and partial.durable != size:
            return outgoing.first_sum(), 0  # no mark of ours lies inside a leaf
        # The sum that the other side gives back may be anything: what is announced is counted here.
        known = self._marks.of(name, partial.durable)
        return outgoing.sum_up_to(partial.durable) if known is None else known, partial.durable

    def send_point(
        self, *, time: datetime, labels: Sequence[str], size: int, shown: str, moment: Moment | None = None
    ) -> None:
        """Publish a point of what the chain shows that is there by now.

        Raises Unsupported for a moment where the other side is too old for it.
        """
        if moment is not None and self._answers:
            self._session.require(Feature.GUEST_POINT)
        offer = PointOffer(
            time=time,
            labels=tuple(labels),
            size=size,
            content_id=shown,
            instant=moment and moment.instant,
            consistency=moment and moment.consistency,
        )
        self._opened().put(Kind.POINT, encode(offer))

    def ask_for_active(self, active: Active) -> Readiness:
        """Have the empty overlay for the active top looked at, or made, and end the stream.

        Raises Unsupported when the other side is too old for it, and what it refuses with.
        """
        self._session.require(Feature.ACTIVE)
        outbox = self._opened()
        answers: list[Readiness] = []

        def on_response(frame: Frame) -> bool:
            answers.append(self._session.decode(Readiness, frame))
            return True

        outbox.request(Kind.ACTIVE, active, on_response)
        outbox.stop()
        found = answers[0]
        # This text is printed, and becomes part of commands that a user will run.
        if not found.directory.startswith("/") or not found.directory.isprintable():
            raise Corrupt("it names an impossible directory", subject=self._channel.peer)
        if found.file != f"{ACTIVE}/{active.name}" or not set(found.broken) <= self._files:
            raise Corrupt("it answered about other files than the ones asked for", subject=self._channel.peer)
        if found.proven is not active.prove or (active.make and found.state is not ActiveState.READY):
            raise Corrupt("it did not do what was requested", subject=self._channel.peer)
        return found

    def leaves(self, *, on_bytes: OnBytes = ignored) -> tuple[Int64s, Hashes]:
        """(int64[n], uint8[n, 32]): numbers and hashes of the leaves of the newest content that are not all zero.

        Errors as `leaf_batches`. Takes 40 bytes of memory a leaf: 640 MiB for 1 TiB of data.
        """
        batches = list(self.leaf_batches(on_bytes=on_bytes))
        numbers = [np.empty(0, np.int64), *(numbers for numbers, _ in batches)]
        hashes = [np.empty((0, HASH_BYTES), np.uint8), *(hashes for _, hashes in batches)]
        return np.concatenate(numbers), np.concatenate(hashes)

    def leaf_batches(self, *, on_bytes: OnBytes = ignored) -> Iterator[tuple[Int64s, Hashes]]:
        """As `leaves`, ascending batch by batch; the other side waits while a batch is used.

        Of a hash that is given early only the end proves that it is the content's: then all are compared with the
        content id of the newest layer.
        on_bytes: called in another thread with (bytes read over there, bytes in all)
        Raises Unsupported when the other side is too old, Diverged when its newest layer is another one by now, and
        Corrupt.
        """
        if self._newest is None:
            return
        self._session.require(Feature.LEAVES)
        layer, size, announced = self._newest
        outbox, peer = self._opened(), self._channel.peer
        bodies: queue.Queue[bytes] = queue.Queue(_BODIES)
        abandoned = threading.Event()

        def on_response(frame: Frame) -> bool:
            body = bytes(frame.body)
            if frame.kind is Kind.PROGRESS:
                if len(body) != PROGRESS.size:
                    raise self._session.unexpected(frame)
                on_bytes(*PROGRESS.unpack(body))
                return False
            while not abandoned.is_set():
                outbox.check()
                with suppress(queue.Full):
                    bodies.put(body, timeout=_LOOK_SECONDS)
                    break
            return not body

        outbox.request(Kind.LEAVES, WantLeaves(layer=layer), on_response)
        total, last = empty_sum(), -1
        try:
            while body := _taken(bodies, outbox):
                numbers, hashes = decode_leaves(body, last, size, subject=peer)
                last = int(numbers[-1])
                total += sum_of(numbers, hashes)
                yield numbers, hashes
        finally:
            abandoned.set()
        if content_id(size, total) != announced:
            raise Corrupt("its leaf hashes are not those of its newest layer", subject=peer)

    def finish(self) -> Done | None:
        """Wait until all is durable at the other side. Raises what went wrong."""
        return self._opened().stop()

    def _opened(self) -> SendQueue:
        assert self._outbox is not None, "open it first"
        return self._outbox

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and self._outbox is not None:
            self._outbox.fail(error)


def _taken(bodies: queue.Queue[bytes], outbox: SendQueue) -> bytes:
    while True:
        outbox.check()
        with suppress(queue.Empty):
            return bodies.get(timeout=_LOOK_SECONDS)
