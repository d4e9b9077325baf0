"""A replica as a destination that takes layers (destination/writing.py), over one stream.

A connection that breaks is opened again as long as something still becomes durable over there; each attempt goes on
at what is durable.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from snapchain.destination.writing import (
    DiskLook,
    Finished,
    HeldLayer,
    LayerWriter,
    Moment,
    NewestLeaves,
    NewLayer,
    Opening,
    Result,
    Traffic,
)
from snapchain.errors import Unsupported
from snapchain.host.channel import Channel
from snapchain.host.retry import RetryPolicy, retry
from snapchain.image.qcow2.aligned import aligned
from snapchain.model.content import HASH_BYTES, LEAF_BYTES, Hashes, decode_sum
from snapchain.model.events import Notice, OnEvent
from snapchain.model.extents import Int64s
from snapchain.model.guest_checks import GuestCheck, GuestChecks
from snapchain.model.guest_state import GuestChange, GuestStanding
from snapchain.replica.catalogue import keys_of
from snapchain.replica.client import checks_at, guest_at, waiting
from snapchain.replica.endpoint import Endpoint
from snapchain.replica.names import offered_name
from snapchain.replica.outgoing import OutgoingLayer
from snapchain.replica.sender import Marks, Sender
from snapchain.replica.stream.compression import Link
from snapchain.replica.stream.messages import Inventory, Open
from snapchain.replica.stream.requests import Feature

if TYPE_CHECKING:
    from snapchain.destination.copying import CopyWriter


class ReplicaWriting:
    """Implements `destination.writing.Writing` for a replica.

    policy: of retries; None: one attempt; limit_rate: bytes a second on the wire, where a transfer names no other
    """

    def __init__(self, endpoint: Endpoint, *, policy: RetryPolicy | None = None, limit_rate: int | None = None) -> None:
        self.endpoint, self.limit_rate, self._policy = endpoint, limit_rate, policy

    @property
    def url(self) -> str:
        """For people."""
        return self.endpoint.url

    @contextmanager
    def look(self, opening: Opening, *, on_event: OnEvent) -> Iterator[DiskLook]:
        """See `Writing`. Raises Unavailable, and Conflict where the replica is in a newer epoch."""
        _ = on_event
        with self.endpoint.connect() as channel, Sender(channel, link=self.endpoint.link) as sender:
            held = sender.open(open_message(opening, self.endpoint, look=True))
            _require(opening, sender)
            yield DiskWriter(sender, held)
            sender.finish()

    def write(self, opening: Opening, work: Callable[[LayerWriter], Result], *, on_event: OnEvent) -> Result:
        """See `Writing`. Raises Unavailable when the link stays broken, Busy when the replica's disk is in use."""
        durable, marks = 0, Marks()
        limit_rate = opening.limit_rate or self.limit_rate

        def attempt() -> Result:
            nonlocal durable
            with (
                self.endpoint.connect() as channel,
                Sender(channel, link=self.endpoint.link, limit_rate=limit_rate, marks=marks) as sender,
            ):
                try:
                    message = open_message(opening, self.endpoint)
                    held = sender.open(message, on_wait=waiting(self.endpoint, on_event))
                    _require(opening, sender)
                    return work(DiskWriter(sender, held))
                finally:
                    durable += sender.confirmations

        if self._policy is None:
            return attempt()
        return retry(
            attempt, policy=self._policy, progress=lambda: durable, on_retry=lambda each: on_event(Notice(str(each)))
        )

    def write_copy(
        self, opening: Opening, owner: str | None, work: Callable[[CopyWriter], Result], *, on_event: OnEvent
    ) -> Result:
        """Raises Unsupported: the files of a replica belong to the images that were sent there."""
        _ = owner, work, on_event
        raise Unsupported(
            "points are copied to repositories; a replica takes the layers of images",
            subject=f"{self.url}::{opening.disk}",
            hint="restore the point, and ship the image: snapchain restore, snapchain ship IMAGE DEST::DISK",
        )

    def guest_state(self, guest: str) -> GuestStanding:
        """See `TakesLayers`."""
        return guest_at(self.endpoint, guest)[0]

    def change_guest(self, change: GuestChange) -> tuple[GuestStanding, Mapping[str, Path]]:
        """See `Writing`. A SWITCH names its overlays, and goes by `client.guest_at`."""
        standing, disks = guest_at(self.endpoint, change.guest, change)
        return standing, {each.disk: Path(each.overlay) for each in disks}

    def guest_checks(self, guest: str) -> GuestChecks:
        """See `ReadableDestination`."""
        return checks_at(self.endpoint, guest)

    def note_check(self, check: GuestCheck) -> None:
        """See `ReadableDestination`."""
        checks_at(self.endpoint, check.guest, check)


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

    def guest_state(self, guest: str) -> GuestStanding:
        """Raises Unsupported: nobody answers."""
        raise Unsupported(f"a saved stream does not tell how the guest {guest!r} stands", subject=self.url)


def open_message(opening: Opening, endpoint: Endpoint, *, look: bool = False) -> Open:
    """How a transfer begins. look: only the inventory is wanted."""
    by_name = opening.epoch_named and opening.epoch > 1
    return Open(disk=opening.disk, replica=endpoint.replica, look=look, epoch=opening.epoch, by_name=by_name)


def _require(opening: Opening, sender: Sender) -> None:
    """Before anything is sent."""
    if opening.of_guest:
        sender.require(Feature.GUEST_POINT)


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

    def leaves(self) -> NewestLeaves:
        """See `LayerWriter`. They are the word of the other side: who compares proves the result (ops/ship/compare)."""
        self._sender.require(Feature.LEAVES)
        return _TipLeaves(self._held[-1].size, self._sender)

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

    def publish(self, top: HeldLayer, *, time: datetime, labels: Sequence[str], moment: Moment | None = None) -> None:
        """See `LayerWriter`."""
        self._sender.send_point(time=time, labels=labels, size=top.size, shown=top.content_id, moment=moment)

    def finish(self) -> Finished:
        """See `LayerWriter`."""
        done = self._sender.finish()
        return Finished(None if done is None else done.points)


class _TipLeaves:
    """See destination.writing.NewestLeaves: as the other side gives them, batch by batch."""

    def __init__(self, size: int, sender: Sender) -> None:
        self._size, self._sender = size, sender

    def portions(self) -> Iterator[tuple[int, Int64s, Hashes]]:
        """See `NewestLeaves`."""
        for numbers, hashes in self._sender.leaf_batches():
            if len(numbers):
                yield min(self._size, (int(numbers[-1]) + 1) * LEAF_BYTES), numbers, hashes
        yield self._size, np.empty(0, np.int64), np.empty((0, HASH_BYTES), np.uint8)
