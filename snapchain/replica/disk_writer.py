"""A replica as a destination that takes layers (destination/writing.py), over one stream.

A connection that breaks is opened again as long as something still becomes durable over there; each attempt goes on
at what is durable.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime

import numpy as np

from snapchain.destination.writing import (
    DiskLook,
    Finished,
    HeldLayer,
    LayerWriter,
    NewestLeaves,
    NewLayer,
    Opening,
    Result,
    Traffic,
)
from snapchain.host.channel import Channel
from snapchain.host.retry import RetryPolicy, retry
from snapchain.image.qcow2.aligned import aligned
from snapchain.model.content import LEAF_BYTES, Hashes, decode_sum
from snapchain.model.events import Notice, OnEvent
from snapchain.model.extents import Int64s
from snapchain.replica.catalogue import keys_of
from snapchain.replica.endpoint import Endpoint
from snapchain.replica.names import offered_name
from snapchain.replica.outgoing import OutgoingLayer
from snapchain.replica.sender import Marks, Sender
from snapchain.replica.stream.compression import Link
from snapchain.replica.stream.messages import Inventory, Open

_PORTION = 1 << 18
"""Leaves that are compared at once."""


class ReplicaWriting:
    """Implements `destination.writing.Writing` for a replica. policy: of retries; None: one attempt."""

    def __init__(self, endpoint: Endpoint, *, policy: RetryPolicy | None = None) -> None:
        self._endpoint, self._policy = endpoint, policy

    @property
    def url(self) -> str:
        """For people."""
        return self._endpoint.url

    @contextmanager
    def look(self, opening: Opening, *, on_event: OnEvent) -> Iterator[DiskLook]:
        """See `Writing`. Raises Unavailable, and Conflict where the replica is in a newer epoch."""
        _ = on_event
        with self._endpoint.connect() as channel, Sender(channel, link=self._endpoint.link) as sender:
            held = sender.open(open_message(opening, self._endpoint, look=True))
            yield DiskWriter(sender, held)
            sender.finish()

    def write(self, opening: Opening, work: Callable[[LayerWriter], Result], *, on_event: OnEvent) -> Result:
        """See `Writing`. Raises Unavailable when the link stays broken, Busy when the replica's disk is in use."""
        durable, marks = 0, Marks()

        def attempt() -> Result:
            nonlocal durable
            with (
                self._endpoint.connect() as channel,
                Sender(channel, link=self._endpoint.link, limit_rate=opening.limit_rate, marks=marks) as sender,
            ):
                try:
                    message = open_message(opening, self._endpoint)
                    return work(DiskWriter(sender, sender.open(message, on_wait=waiting(self._endpoint, on_event))))
                finally:
                    durable += sender.confirmations

        if self._policy is None:
            return attempt()
        return retry(
            attempt, policy=self._policy, progress=lambda: durable, on_retry=lambda each: on_event(Notice(str(each)))
        )


class StreamWriting:
    """Implements `destination.writing.TakesLayers` for a stream that nobody answers: it gets the whole image."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel

    @property
    def url(self) -> str:
        """For people."""
        return self._channel.peer

    def write(self, opening: Opening, work: Callable[[LayerWriter], Result], *, on_event: OnEvent) -> Result:
        """See `Writing`. The channel is closed at the end."""
        _ = on_event
        with (
            self._channel as channel,
            Sender(channel, link=Link.NETWORK, answers=False, limit_rate=opening.limit_rate) as sender,
        ):
            sender.open_blindly(Open(disk=opening.disk, epoch=opening.epoch))
            return work(DiskWriter(sender, None))


def open_message(opening: Opening, endpoint: Endpoint, *, look: bool = False) -> Open:
    """How a transfer begins. look: only the inventory is wanted."""
    by_name = opening.epoch_named and opening.epoch > 1
    return Open(disk=opening.disk, replica=endpoint.replica, look=look, epoch=opening.epoch, by_name=by_name)


def waiting(endpoint: Endpoint, on_event: OnEvent) -> Callable[[], None]:
    """A function to call at each sign of life that is no answer; it gives one notice."""
    noticed = False

    def notice() -> None:
        nonlocal noticed
        if not noticed:
            noticed = True
            on_event(Notice(f"{endpoint.url} makes us wait: another snapchain may be at work on that disk"))

    return notice


class DiskWriter:
    """Implements `LayerWriter` over an opened stream."""

    branches, believed, mends = False, False, False

    def __init__(self, sender: Sender, held: Inventory | None) -> None:
        """held: what the replica answered; None for a stream that nobody answers."""
        self._sender = sender
        self._held = [
            HeldLayer(
                id=layer.id,
                name=layer.file,
                size=layer.size,
                sources=keys_of(layer),
                content_id=layer.content_id,
                total=decode_sum(layer.content_sum),
            )
            for layer in (held.layers if held is not None else ())
        ]
        self._lock = threading.Lock()
        self._arrived = 0
        self._resumed = False

    @property
    def held(self) -> Sequence[HeldLayer]:
        return self._held

    @property
    def traffic(self) -> Traffic:
        traffic = self._sender.traffic
        return Traffic(
            read=traffic.data,
            stored=traffic.carried,
            sent=self._sender.bytes_sent,
            data=traffic.data,
            carried=traffic.carried,
            resumed=self._resumed,
        )

    def leaves(self, above: str | None) -> NewestLeaves:
        """See `LayerWriter`. They are the word of the other side: who compares proves the result (ops/ship/compare)."""
        _ = above
        return _TipLeaves(self._held[-1].size, *self._sender.leaves())

    def cut(self, keep: str | None, /) -> None:
        """See `LayerWriter`."""
        self._sender.cut(keep)

    def fitted(self, layer: NewLayer) -> NewLayer:
        """See `LayerWriter`: rounded out to the clusters of the file that will hold it."""
        extents = aligned(layer.extents, layer.view.resolve().owned_by(0), cluster_size=layer.grain)
        return replace(layer, extents=extents, amount=extents.data_bytes)

    def add(
        self, layer: NewLayer, parent: HeldLayer | None, *, confirm: Callable[[], None], on_bytes: Callable[[int], None]
    ) -> HeldLayer:
        """See `LayerWriter`. An amount has arrived when it is on the wire, or need not go there."""

        def arrived(count: int) -> None:
            with self._lock:
                self._arrived += count
                on_bytes(self._arrived)

        outgoing = OutgoingLayer(
            name=offered_name(layer.name),
            cluster_size=layer.cluster_size,
            extended_l2=layer.grain < layer.cluster_size,
            sources=layer.sources,
            extents=layer.extents,
            view=layer.view,
            below=layer.below,
            below_sum=layer.below_sum,
            same_below=layer.same_below,
        )
        arrived(0)
        sent = self._sender.send_layer(
            outgoing, None if parent is None else parent.id, confirm=confirm, on_bytes=arrived
        )
        self._resumed = self._resumed or sent.resumed_at > 0
        return HeldLayer(
            id=sent.layer,
            name=outgoing.name,
            size=sent.size,
            sources=layer.sources,
            content_id=sent.content_id,
            total=sent.total,
        )

    def publish(self, top: HeldLayer, *, time: datetime, labels: Sequence[str]) -> None:
        """See `LayerWriter`."""
        self._sender.send_point(time=time, labels=labels, size=top.size, shown=top.content_id)

    def finish(self) -> Finished:
        """See `LayerWriter`."""
        done = self._sender.finish()
        return Finished(None if done is None else done.points)


class _TipLeaves:
    """See destination.writing.NewestLeaves: as the other side gave them."""

    touched = None

    def __init__(self, size: int, numbers: Int64s, hashes: Hashes) -> None:
        self._size, self._numbers, self._hashes = size, numbers, hashes

    def portions(self) -> Iterator[tuple[int, Int64s, Hashes]]:
        """See `NewestLeaves`."""
        for at in range(0, max(1, len(self._numbers)), _PORTION):
            numbers, hashes = self._numbers[at : at + _PORTION], self._hashes[at : at + _PORTION]
            is_last = at + _PORTION >= len(self._numbers)
            yield self._size if is_last else int(np.int64(numbers[-1]) + 1) * LEAF_BYTES, numbers, hashes
