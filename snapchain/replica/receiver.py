"""The receiving side of a stream: one loop that reads requests, and the functions that take in layers and points.

    HELLO OPEN (CUT | LAYER MAP* (DATA | MARK)* END | POINT | ACTIVE | LEAVES)* STOP
    HELLO (ASK | HANDOVER | FETCH | MERGE | HOLD | RELEASE)

Which function answers a request is in the table `stream.requests.REQUESTS`. Nothing that a sender says is believed:
sizes and counts have bounds, data must follow the map and be complete, and a layer counts only when its file, read
back, shows the announced content. A sender can cause a clear error, and the loss of its own layer, and nothing else.
"""

from __future__ import annotations

import struct
from collections.abc import Collection
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path

import numpy as np

from snapchain.errors import Corrupt, NotFound, SnapchainError, Unsupported
from snapchain.host.channel import Channel
from snapchain.model.content import SUM_BYTES, Sum
from snapchain.model.disk_name import check_disk_name
from snapchain.model.extents import Extents
from snapchain.model.inventory import MAX_LAYERS
from snapchain.replica.arrival import Arrival, forget, read_progress, settle
from snapchain.replica.catalogue import FOR_CHANGES, Catalogue, Point, empty_catalogue
from snapchain.replica.epochs import check_epoch, enter_epoch
from snapchain.replica.layer_cut import cut
from snapchain.replica.permissions import EVERYTHING, Permissions, chosen
from snapchain.replica.store import ReplicaDisk, Work, check_free, in_turn, open_replica
from snapchain.replica.stream.fields import MOST_POINTS
from snapchain.replica.stream.frames import Frame, Kind
from snapchain.replica.stream.maps import DataRuns, MapReader, decode_data, layer_id
from snapchain.replica.stream.messages import Cut, HeldLayer, Inventory, LayerOffer, Message, Open, PointOffer, Stored
from snapchain.replica.stream.requests import REQUESTS, Feature
from snapchain.replica.stream.session import ServerSession, describe

_OFFSET = struct.Struct("<Q")
_COUNT = struct.Struct("<Q")
_MOST_LOOKS = 16
"""Requests after an OPEN that only looks."""


@dataclass(slots=True)
class Received:
    """What a stream brought. layers: files that came; known: how many of its layers were here already."""

    disk: str = ""
    layers: list[str] = field(default_factory=list)
    known: int = 0
    points: list[Point] = field(default_factory=list)
    bytes_read: int = 0


def receive(
    channel: Channel,
    root: Path | None = None,
    *,
    within: Path | None = None,
    permissions: Permissions = EVERYTHING,
    group: int | None = None,
) -> Received:
    """Receive one stream to its end, or answer one request. The sender is told of an error before it is raised here.

    root: the replica; None lets the sender name it
    within: where that must lie (`permissions.chosen`)
    permissions: what the sender may ask for
    group: may read a replica that is written to
    Raises Unavailable when the stream ends early (what is durable stays), and whatever a layer is refused for.
    """
    session = ServerSession(channel)
    receiver = Receiver(session, root, within, permissions, group)
    try:
        with session.beating():
            receiver.run()
    except BaseException as error:
        with suppress(SnapchainError):
            session.reply(Kind.FAIL, describe(error))
        raise
    return receiver.received


def begun(channel: Channel, root: Path) -> Inventory:
    """The inventory of the disk that a stream begins with; reads no more of the stream, and changes nothing.

    Raises as `receive`, for what that would refuse at once.
    """
    session = ServerSession(channel)
    session.begin()
    request = session.decode(Open, session.expect(Kind.OPEN))
    receiver = Receiver(session, root, None, EVERYTHING, None)
    return receiver.look(request).model_copy(update={"disk": request.disk})


@dataclass(slots=True)
class Receiver:
    """The receiving end of one stream. Parameters as of `receive`; listens: whether the sender reads responses."""

    session: ServerSession
    only: Path | None
    within: Path | None
    permissions: Permissions
    group: int | None
    received: Received = field(default_factory=Received)
    listens: bool = False

    def run(self) -> None:
        """Read HELLO and the first request, and answer that."""
        self.listens = self.session.begin()
        frame = self.session.next()
        request = REQUESTS.get(frame.kind)
        if request is None or not request.opens or not (self.listens or frame.kind is Kind.OPEN):
            raise self.session.unexpected(frame)
        self.answer(frame, self)

    def answer(self, frame: Frame, context: Receiver | Transfer) -> None:
        """Check a request and have its function answer it: every request passes here.

        Raises Corrupt, and as `Permissions.check` and that function.
        """
        request = REQUESTS[frame.kind]
        message: Message = self.session.decode(request.model, frame)
        self.permissions.check(frame.kind, message, subject=self.session.peer)
        # Loaded when the first such request comes: a sender waits for this process to start.
        module, _, name = request.handler.partition(":")
        getattr(import_module(f"snapchain.replica.{module}"), name)(context, message)

    def root(self, named: str | None) -> Path:
        """The replica's directory, as `permissions.chosen`."""
        return chosen(named, only=self.only, within=self.within)

    def look(self, request: Open) -> Inventory:
        """The inventory of a disk that is not locked. Raises Conflict for an older epoch."""
        root = self.root(request.replica)
        try:
            disk = open_replica(root).disk(request.disk)
        except NotFound:
            check_free(root)
            return Inventory(disk=request.disk, epoch=1, layers=(), last_point=0, partial=None)
        catalogue = disk.read() or empty_catalogue(disk.name)
        check_epoch(disk, catalogue, request.epoch, by_name=request.by_name)
        return inventory(disk, catalogue, self.session.features)


@dataclass(slots=True)
class Transfer:
    """The part of a stream after OPEN: requests that concern one disk.

    catalogue: as it is by now
    looks: the disk is not locked, and nothing may be changed
    shown: (size, content id) of the chain as the last layer of this stream announced it
    marks: MARK frames so far
    """

    receiver: Receiver
    disk: ReplicaDisk
    catalogue: Catalogue
    looks: bool
    shown: tuple[int, str] | None = None
    marks: int = 0

    @property
    def session(self) -> ServerSession:
        return self.receiver.session

    def answer(self, frame: Frame) -> None:
        """Answer one request. Raises Corrupt for one that may not come here, and as `Receiver.answer`."""
        request = REQUESTS.get(frame.kind)
        if request is None or request.opens or (self.looks and not request.after_look):
            raise self.session.unexpected(frame)
        self.receiver.answer(frame, self)

    def acknowledge(self, count: int) -> None:
        """Tell the sender that so many marks are durable."""
        self.session.reply(Kind.ACK, _COUNT.pack(count))


def transfer(receiver: Receiver, request: Open) -> None:
    """Answer OPEN and what follows it, up to STOP."""
    session = receiver.session
    receiver.received.disk = check_disk_name(request.disk)
    if request.look:
        _look(receiver, request)
        return
    disk = open_replica(receiver.root(request.replica), make=True, group=receiver.group).disk(request.disk)
    with in_turn(disk, Work.TRANSFER, make=True):
        catalogue = settle(disk)
        catalogue = enter_epoch(disk, catalogue, request.epoch, by_name=request.by_name)
        if receiver.listens:
            session.reply(Kind.INVENTORY, inventory(disk, catalogue, session.features))
        current = Transfer(receiver, disk, catalogue, looks=False)
        # A sender may offer each layer that a chain can have, and publish a point at each; no more.
        for _ in range(2 * MAX_LAYERS + 1):
            if (frame := session.next()).kind is Kind.STOP:
                break
            current.answer(frame)
        else:
            raise Corrupt("the stream has more layers than a chain can have", subject=session.peer)
    received = receiver.received
    received.bytes_read = session.channel.bytes_read
    session.done(points=tuple(point.point for point in received.points), layers=len(received.layers))


def _look(receiver: Receiver, request: Open) -> None:
    session = receiver.session
    session.reply(Kind.INVENTORY, receiver.look(request))
    for _ in range(_MOST_LOOKS):
        if (frame := session.next()).kind is Kind.STOP:
            session.done()
            return
        if not (row := REQUESTS.get(frame.kind)) or not row.after_look:
            raise session.unexpected(frame)
        disk = open_replica(receiver.root(request.replica)).disk(request.disk)
        Transfer(receiver, disk, disk.read() or empty_catalogue(disk.name), looks=True).answer(frame)
    raise Corrupt("it asks too much of one look", subject=session.peer)


def take_layer(current: Transfer, offer: LayerOffer) -> None:
    """LAYER and what follows it, up to END: the layer becomes the newest one of the disk, unless it is here already."""
    session, catalogue, received = current.session, current.catalogue, current.receiver.received
    reader = MapReader(offer, subject=session.peer)
    while not reader.complete:
        reader.add(session.expect(Kind.MAP).body)
    layer, extents = layer_id(offer, reader.words()), reader.extents()
    known = next((held for held in catalogue.layers if held.id == layer), None)
    with ExitStack() as stack:
        arrival = None
        if known is None:
            arrival = Arrival(
                current.disk,
                catalogue,
                offer,
                extents,
                layer=layer,
                subject=session.peer,
                on_durable=current.acknowledge,
            )
            stack.callback(arrival.close)
        announced = _take_data(current, extents, arrival, on_base=offer.parent is not None, since=offer.resume_at)
        if arrival is not None:
            current.catalogue = arrival.finish(announced)
            file = current.catalogue.layers[-1].file
            received.layers.append(file)
        elif known is not None:
            if known.content_id != announced:
                raise Corrupt("a layer that is here already is announced with other content", subject=known.file)
            file = known.file
            received.known += 1
    session.reply(Kind.STORED, Stored(layer=layer, file=file))
    current.shown = (offer.size, announced)


def _take_data(current: Transfer, extents: Extents, arrival: Arrival | None, *, on_base: bool, since: int) -> str:
    """Take DATA and MARK frames up to END; the content id that it announces."""
    session = current.session
    runs = DataRuns(extents) if arrival is None else arrival.runs
    position = since
    while True:
        frame = session.next()
        if frame.kind is Kind.DATA:
            found = decode_data(frame.body, runs, position, on_base=on_base, subject=session.peer)
            if arrival is not None:
                arrival.take(found)
            position = found.stop
        elif frame.kind is Kind.MARK:
            position, total = _mark(frame, runs, position, peer=session.peer)
            current.marks += 1
            if arrival is None:
                current.acknowledge(current.marks)
            else:
                arrival.mark(position, total, current.marks)
        elif frame.kind is Kind.END:
            if len(frame.body) != 32:
                raise Corrupt("the end of a layer names no content", subject=session.peer)
            if runs.below(position) != runs.total:
                raise Corrupt(
                    f"the layer ends with {runs.total - runs.below(position)} bytes of data left out",
                    subject=session.peer,
                )
            return bytes(frame.body).hex()
        else:
            raise session.unexpected(frame)


def _mark(frame: Frame, runs: DataRuns, position: int, *, peer: str) -> tuple[int, Sum]:
    if len(frame.body) != _OFFSET.size + SUM_BYTES:
        raise Corrupt("a mark is cut off", subject=peer)
    (offset,) = _OFFSET.unpack_from(frame.body)
    if not position <= offset <= runs.size or runs.below(offset) != runs.below(position):
        raise Corrupt(f"a mark at guest byte {offset} does not follow data up to {position}", subject=peer)
    return offset, np.frombuffer(frame.body, "<u2", offset=_OFFSET.size).astype(np.uint16)


def publish_point(current: Transfer, offer: PointOffer) -> None:
    """POINT: a point of what the chain shows, unless the disk has it already."""
    catalogue, shown = current.catalogue, current.shown
    tip = catalogue.tip
    if shown is not None and tip is not None and shown != (tip.size, tip.content_id):
        # A saved stream of an older state than the chain has by now: its points are history here.
        return
    if tip is None or (tip.size, tip.content_id) != (offer.size, offer.content_id):
        raise Corrupt("a point is announced that is not what the chain shows", subject=current.session.peer)
    same = offer.time, offer.content_id, offer.instant
    known = next((each for each in catalogue.points if (each.time, each.content_id, each.instant) == same), None)
    if known is not None:
        if known.instant is not None:  # the answer was lost, and the sender tries again
            current.receiver.received.points.append(known)
        return  # the same stream, received again
    if len(catalogue.points) >= MOST_POINTS:
        raise Unsupported(
            f"this disk has {len(catalogue.points)} points, and no more are allowed",
            subject=current.disk.directory,
            hint="merge points away: `snapchain merge DEST::DISK --keep-last N`",
        )
    point = Point(
        point=catalogue.next_point,
        time=offer.time,
        labels=offer.labels,
        layer=tip.id,
        size=offer.size,
        content_id=offer.content_id,
        instant=offer.instant,
        consistency=offer.consistency,
    )
    current.catalogue = catalogue.after(points=(*catalogue.points, point), next_point=point.point + 1)
    current.disk.write(current.catalogue, reserve=FOR_CHANGES)
    current.receiver.received.points.append(point)


def inventory(disk: ReplicaDisk, catalogue: Catalogue, features: Collection[str]) -> Inventory:
    """The INVENTORY of a disk, for a sender that names these features."""
    progress = read_progress(disk)
    partial = progress.partial if progress is not None and progress.finished is None else None
    layers = tuple(HeldLayer(**layer.model_dump(include=set(HeldLayer.model_fields))) for layer in catalogue.layers)
    if Feature.MERGE not in features:  # it does not know the field
        layers = tuple(
            layer.model_copy(update={"older": "", "sources": ()}) if layer.older else layer for layer in layers
        )
    return Inventory(
        disk=disk.name,
        epoch=catalogue.epoch,
        layers=layers,
        last_point=catalogue.points[-1].point if catalogue.points else 0,
        partial=partial,
    )


def cut_layers(current: Transfer, request: Cut) -> None:
    """CUT: the user has decided for the other side of a divergence. Raises as `cut`."""
    forget(current.disk)
    current.catalogue = cut(current.disk, current.catalogue, request.keep)
