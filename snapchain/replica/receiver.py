"""The receiving side of a stream: one state after the other, every frame judged by the state it comes in.

    HELLO OPEN (CUT | LAYER MAP* (DATA | MARK)* END | POINT)* STOP
    HELLO (ASK | HANDOVER | FETCH | MERGE)

Nothing that a sender says is believed: sizes and counts end what may be said, data must follow the map and leave
nothing out, and a layer counts only when its file, read back, shows what was announced.  What a sender can cause is a
clear error, and the loss of its own layer.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Collection
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from snapchain.errors import Conflict, Corrupt, NotFound, SnapchainError, Unsupported
from snapchain.host.channel import Channel
from snapchain.host.files import remove
from snapchain.host.locks import ImageLock, LockMode
from snapchain.model.content import SUM_BYTES, Sum
from snapchain.model.disk_name import check_disk_name
from snapchain.model.extents import Extents
from snapchain.replica.arrival import Arrival, forget, read_progress, settle
from snapchain.replica.catalogue import FOR_CHANGES, Catalogue, Point, empty_catalogue
from snapchain.replica.epochs import check_epoch, enter_epoch
from snapchain.replica.merge_journal import Engine, others_on, undisturbed
from snapchain.replica.permissions import EVERYTHING, Permissions, chosen
from snapchain.replica.store import ReplicaDisk, Work, check_free, in_turn, open_replica
from snapchain.replica.stream import session as failures, session as opening
from snapchain.replica.stream.frames import FROM_SENDER, Frame, FrameReader, Kind
from snapchain.replica.stream.layers import DataRuns, MapReader, decode_data, layer_id
from snapchain.replica.stream.messages import (
    MAX_LAYERS,
    MOST_POINTS,
    Active,
    ActiveState,
    Cut,
    Done,
    Failure,
    HeldLayer,
    Inventory,
    LayerOffer,
    M,
    Open,
    PointOffer,
    Stored,
    decode,
    encode,
)
from snapchain.replica.stream.session import ReplyWriter

_OFFSET = struct.Struct("<Q")
_COUNT = struct.Struct("<Q")
_QUESTIONS = (Kind.ASK, Kind.FETCH, Kind.HANDOVER, Kind.MERGE)

OnLayer = Callable[[str, str], None]


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
    engine: Engine | None = None,
    permissions: Permissions = EVERYTHING,
    group: int | None = None,
) -> Received:
    """Take one stream in, to its end, or answer a question; tells the sender what went wrong before raising it here.

    root: the replica; None lets the sender name it; within: where that must lie (`confinement.chosen`)
    engine: what merges; without one, MERGE is refused, and a disk on which a merge was killed
    permissions: what the sender may ask for; group: that may read a replica which is written to
    Raises Unavailable when the stream ends early (what is durable stays), and whatever a layer is refused for.
    """
    voice = ReplyWriter(channel)
    try:
        with voice.beating():
            return _Reception(channel, voice, root, within, engine, permissions, group).run()
    except BaseException as error:
        with suppress(SnapchainError):
            voice.say(Kind.FAIL, encode(failures.told(error)))
        raise


def begun(channel: Channel, root: Path) -> Inventory:
    """What is here of the disk that a stream begins with; reads no more of it, and changes nothing.

    Raises as `receive`, for what that would refuse at once.
    """
    return _Reception(channel, ReplyWriter(channel), root, None, None, EVERYTHING, None).begun()


class _Reception:
    def __init__(
        self,
        channel: Channel,
        voice: ReplyWriter,
        root: Path | None,
        within: Path | None,
        engine: Engine | None,
        permissions: Permissions,
        group: int | None,
    ) -> None:
        self._channel, self._voice, self._root, self._within = channel, voice, root, within
        self._permissions, self._group = permissions, group
        self._engine = engine
        self._frames = FrameReader(channel, FROM_SENDER)
        self._received = Received()
        self._marks = 0
        self._features: frozenset[str] = frozenset()

    def run(self) -> Received:
        hello = self._hello()
        frame = self._next()
        if frame.kind in _QUESTIONS and hello:
            self._answer(frame)
            return self._received
        if frame.kind is not Kind.OPEN:
            raise self._unexpected(frame)
        asked = self._request(Open, frame)
        self._received.disk = check_disk_name(asked.disk)
        if asked.look:
            self._voice.say(Kind.INVENTORY, encode(self._looked(asked)))
            if (frame := self._next()).kind is Kind.ACTIVE:
                self._tell_of_active(open_replica(self._chosen(asked.replica)).disk(asked.disk), frame)
                frame = self._next()
            if frame.kind is not Kind.STOP:
                raise self._unexpected(frame)
            self._voice.say(Kind.DONE, encode(Done(points=(), layers=0)))
            return self._received
        disk = open_replica(self._chosen(asked.replica), make=True, group=self._group).disk(asked.disk)
        with in_turn(disk, Work.TRANSFER, make=True):
            catalogue = settle(disk, self._engine)
            catalogue = enter_epoch(disk, catalogue, asked.epoch, by_name=asked.by_name)
            if hello:
                self._voice.say(Kind.INVENTORY, encode(inventory(disk, catalogue, self._features)))
            self._take_all(disk, catalogue)
        received = self._received
        received.bytes_read = self._channel.bytes_read
        numbers = tuple(point.point for point in received.points)
        self._voice.say(Kind.DONE, encode(Done(points=numbers, layers=len(received.layers))))
        return received

    def begun(self) -> Inventory:
        self._hello()
        frame = self._expect(Kind.OPEN)
        asked = self._request(Open, frame)
        return self._looked(asked).model_copy(update={"disk": asked.disk})

    def _hello(self) -> bool:
        """Whether the other side listens."""
        frame = self._frames.read()
        try:
            said = opening.agree(frame, peer=self._channel.peer)
        except SnapchainError:
            # It may well listen: it is told what is spoken here.
            self._voice.heard = True
            with suppress(SnapchainError):
                self._voice.say(Kind.HELLO, encode(opening.hello(answers=True)))
            raise
        self._voice.heard = said.answers
        self._features = frozenset(said.features)
        self._voice.say(Kind.HELLO, encode(opening.hello(answers=True)))
        return said.answers

    def _chosen(self, named: str | None) -> Path:
        return chosen(named, only=self._root, within=self._within)

    def _request(self, shape: type[M], frame: Frame) -> M:
        """What a frame asks for: every request passes here. Raises Corrupt, and as `Permissions.check`."""
        asked = decode(shape, frame.body, subject=self._channel.peer)
        self._permissions.check(frame.kind, asked, subject=self._channel.peer)
        return asked

    # What few streams want is loaded where it is wanted: a sender waits for this process to start.

    def _answer(self, frame: Frame) -> None:
        if frame.kind is Kind.FETCH:
            from snapchain.replica.fetch_server import give
            from snapchain.replica.stream.messages import Fetch

            wanted = self._request(Fetch, frame)
            give(wanted, self._chosen(wanted.replica), self._channel, self._voice, engine=self._engine)
            return
        if frame.kind is Kind.HANDOVER:
            from snapchain.replica.handover import hand_over
            from snapchain.replica.stream.messages import Handover

            handed = self._request(Handover, frame)
            self._voice.say(Kind.HANDED, encode(hand_over(handed, self._chosen(handed.replica), self._engine)))
        elif frame.kind is Kind.MERGE:
            from snapchain.replica.merging import merge
            from snapchain.replica.stream.messages import Merge

            merged = self._request(Merge, frame)
            merge(merged, self._chosen(merged.replica), self._voice.say, engine=self._engine)
        else:
            from snapchain.replica.status import answer
            from snapchain.replica.stream.messages import Ask

            asked = self._request(Ask, frame)
            answer(asked, self._chosen(asked.replica), self._voice.say, engine=self._engine)
        self._voice.say(Kind.DONE, encode(Done(points=(), layers=0)))

    def _looked(self, asked: Open) -> Inventory:
        root = self._chosen(asked.replica)
        try:
            disk = open_replica(root).disk(asked.disk)
        except NotFound:
            check_free(root)
            return Inventory(disk=asked.disk, epoch=1, layers=(), last_point=0, partial=None)
        catalogue = disk.read() or empty_catalogue(disk.name)
        check_epoch(disk, catalogue, asked.epoch, by_name=asked.by_name)
        return inventory(disk, catalogue, self._features)

    def _take_all(self, disk: ReplicaDisk, catalogue: Catalogue) -> None:
        # A sender may offer each layer that a chain can have, and publish a point at each; no more.
        shown: tuple[int, str] | None = None
        for _ in range(2 * MAX_LAYERS + 1):
            frame = self._next()
            if frame.kind is Kind.STOP:
                return
            if frame.kind is Kind.LAYER:
                catalogue, shown = self._take_layer(disk, catalogue, frame)
            elif frame.kind is Kind.CUT:
                catalogue = cut(disk, catalogue, self._request(Cut, frame).keep)
            elif frame.kind is Kind.ACTIVE:
                self._make_active(disk, catalogue, frame)
            elif frame.kind is Kind.POINT:
                catalogue = self._publish(disk, catalogue, frame, shown)
            else:
                raise self._unexpected(frame)
        raise Corrupt("the stream has more layers than a chain can have", subject=self._channel.peer)

    def _tell_of_active(self, disk: ReplicaDisk, frame: Frame) -> None:
        from snapchain.replica.handover import look_at_active

        offer = self._request(Active, frame)
        found = undisturbed(
            disk,
            lambda: look_at_active(disk, disk.read() or empty_catalogue(disk.name), offer),
            engine=self._engine,
            is_fine=lambda seen: seen.state is ActiveState.READY and not seen.broken,
        )
        self._voice.say(Kind.READINESS, encode(found))

    def _make_active(self, disk: ReplicaDisk, catalogue: Catalogue, frame: Frame) -> None:
        from snapchain.replica.handover import look_at_active, make_active

        offer = self._request(Active, frame)
        done = make_active if offer.make else look_at_active
        self._voice.say(Kind.READINESS, encode(done(disk, catalogue, offer)))

    def _take_layer(self, disk: ReplicaDisk, catalogue: Catalogue, frame: Frame) -> tuple[Catalogue, tuple[int, str]]:
        offer = self._request(LayerOffer, frame)
        reader = MapReader(offer, subject=self._channel.peer)
        while not reader.complete:
            reader.add(self._expect(Kind.MAP).body)
        layer, extents = layer_id(offer, reader.words()), reader.extents()
        known = next((held for held in catalogue.layers if held.id == layer), None)
        with ExitStack() as stack:
            arrival = None
            if known is None:
                arrival = Arrival(
                    disk,
                    catalogue,
                    offer,
                    extents,
                    layer=layer,
                    subject=self._channel.peer,
                    on_durable=self._acknowledge,
                )
                stack.callback(arrival.close)
            announced = self._take_data(extents, arrival, on_base=offer.parent is not None, since=offer.resume_at)
            if arrival is not None:
                catalogue = arrival.finish(announced)
                file = catalogue.layers[-1].file
                self._received.layers.append(file)
            elif known is not None:
                if known.content_id != announced:
                    raise Corrupt("a layer that is here already is announced with other content", subject=known.file)
                file = known.file
                self._received.known += 1
        self._voice.say(Kind.STORED, encode(Stored(layer=layer, file=file)))
        return catalogue, (offer.size, announced)

    def _take_data(self, extents: Extents, arrival: Arrival | None, *, on_base: bool, since: int) -> str:
        """Take DATA and MARK frames up to END; the content id that it announces."""
        runs = DataRuns(extents) if arrival is None else arrival.runs
        position = since
        while True:
            frame = self._next()
            if frame.kind is Kind.DATA:
                found = decode_data(frame.body, runs, position, on_base=on_base, subject=self._channel.peer)
                if arrival is not None:
                    arrival.take(found)
                position = found.stop
            elif frame.kind is Kind.MARK:
                offset, total = self._mark(frame, runs, position)
                position = offset
                self._marks += 1
                if arrival is None:
                    self._acknowledge(self._marks)
                else:
                    arrival.mark(offset, total, self._marks)
            elif frame.kind is Kind.END:
                if len(frame.body) != 32:
                    raise Corrupt("the end of a layer names no content", subject=self._channel.peer)
                if runs.below(position) != runs.total:
                    raise Corrupt(
                        f"the layer ends with {runs.total - runs.below(position)} bytes of data left out",
                        subject=self._channel.peer,
                    )
                return bytes(frame.body).hex()
            else:
                raise self._unexpected(frame)

    def _mark(self, frame: Frame, runs: DataRuns, position: int) -> tuple[int, Sum]:
        if len(frame.body) != _OFFSET.size + SUM_BYTES:
            raise Corrupt("a mark is cut off", subject=self._channel.peer)
        (offset,) = _OFFSET.unpack_from(frame.body)
        if not position <= offset <= runs.size or runs.below(offset) != runs.below(position):
            raise Corrupt(
                f"a mark at guest byte {offset} does not follow data up to {position}", subject=self._channel.peer
            )
        return offset, np.frombuffer(frame.body, "<u2", offset=_OFFSET.size).astype(np.uint16)

    def _publish(
        self, disk: ReplicaDisk, catalogue: Catalogue, frame: Frame, shown: tuple[int, str] | None
    ) -> Catalogue:
        offer = self._request(PointOffer, frame)
        tip = catalogue.tip
        if shown is not None and tip is not None and shown != (tip.size, tip.content_id):
            # A saved stream of an older state than the chain has by now: its points are history here.
            return catalogue
        if tip is None or (tip.size, tip.content_id) != (offer.size, offer.content_id):
            raise Corrupt("a point is announced that is not what the chain shows", subject=self._channel.peer)
        if any((point.time, point.content_id) == (offer.time, offer.content_id) for point in catalogue.points):
            return catalogue  # the same stream, received again
        if len(catalogue.points) >= MOST_POINTS:
            raise Unsupported(
                f"this disk has {len(catalogue.points)} points, and no more are allowed",
                subject=disk.directory,
                hint="merge points away: `snapchain merge DEST::DISK --keep-last N`",
            )
        point = Point(
            point=catalogue.next_point,
            time=offer.time,
            labels=offer.labels,
            layer=tip.id,
            size=offer.size,
            content_id=offer.content_id,
        )
        catalogue = catalogue.after(points=(*catalogue.points, point), next_point=point.point + 1)
        disk.write(catalogue, reserve=FOR_CHANGES)
        self._received.points.append(point)
        return catalogue

    def _acknowledge(self, count: int) -> None:
        self._voice.say(Kind.ACK, _COUNT.pack(count))

    def _next(self) -> Frame:
        """The next frame that says something."""
        while True:
            frame = self._frames.read()
            if frame.kind is Kind.FAIL:
                raise failures.raised(decode(Failure, frame.body, subject=self._channel.peer), peer=self._channel.peer)
            if frame.kind is not Kind.BEAT:
                return frame

    def _expect(self, kind: Kind) -> Frame:
        frame = self._next()
        if frame.kind is not kind:
            raise self._unexpected(frame)
        return frame

    def _unexpected(self, frame: Frame) -> Corrupt:
        return Corrupt(f"{frame.kind.name} has no place here in the stream", subject=self._channel.peer)


def inventory(disk: ReplicaDisk, catalogue: Catalogue, features: Collection[str]) -> Inventory:
    """What a sender is told of a disk, that names these features."""
    progress = read_progress(disk)
    partial = progress.partial if progress is not None and progress.finished is None else None
    layers = tuple(HeldLayer(**layer.model_dump(include=set(HeldLayer.model_fields))) for layer in catalogue.layers)
    if opening.MERGE_FEATURE not in features:  # it does not know the field
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


# --- CUT: dropping the upper layers of a disk, when the user has decided for the other side of a divergence.
#
# A file in use stops it before anything is changed: one that is open, or that another image depends on. The catalogue
# is written before the files go: a crash leaves files that no catalogue names.


def cut(disk: ReplicaDisk, catalogue: Catalogue, keep: str | None) -> Catalogue:
    """Drop all layers above `keep`, and the points that they give. The disk is locked.

    Raises NotFound when there is no such layer, Busy or Conflict when what is to go is in use.
    """
    ids = [layer.id for layer in catalogue.layers]
    if keep is not None and keep not in ids:
        raise NotFound(f"there is no layer {keep}", subject=disk.directory)
    count = 0 if keep is None else ids.index(keep) + 1
    kept, dropped = catalogue.layers[:count], catalogue.layers[count:]
    forget(disk)
    if not dropped:
        return catalogue
    paths = [disk.path(layer.file) for layer in dropped if disk.path(layer.file).exists()]
    with ExitStack() as stack:
        for path in paths:
            stack.enter_context(ImageLock(path, LockMode.WRITE))
        ours = {(status.st_dev, status.st_ino) for status in (path.stat() for path in paths)}
        others = others_on(disk, paths, own=ours)
        for path in paths:
            if why := others.reason(path):
                raise Conflict(f"it cannot be removed: {why}", subject=path, hint="move or remove that image first")
        gone = {layer.id for layer in dropped}
        points = tuple(point for point in catalogue.points if point.layer not in gone)
        catalogue = catalogue.after(layers=kept, points=points)
        disk.write(catalogue)
        for path in reversed(paths):
            remove(path)
    return catalogue
