"""Taking a point from a replica, wherever it is: every word of the answer is judged before it is used.

    with fetch(endpoint, "web1/vda", "7") as answer:
        answer.point, answer.data_bytes         # what will come
        for layer in answer.layers():           # root first; each must be read to its end before the next
            for pieces in layer.batches():
                ...
            layer.announced                     # the content id that its chain has over there

At most one layer's map and one frame of data are held. That the bytes are the point's is for the reader to prove.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from snapchain.errors import Corrupt, NotFound, Unavailable
from snapchain.host.channel import Channel
from snapchain.model.disk_name import check_disk_name
from snapchain.model.extents import Extents
from snapchain.model.points import chosen_point
from snapchain.objects.throttle import TokenBucket
from snapchain.replica.endpoint import Endpoint
from snapchain.replica.names import check_offered
from snapchain.replica.stream.compression import Link
from snapchain.replica.stream.frames import FRAME_BYTES, Frame
from snapchain.replica.stream.layers import Arrived, DataRuns, MapReader, Part, decode_data, layer_id
from snapchain.replica.stream.messages import (
    FROM_FETCH,
    PROGRESS,
    Done,
    Fetch,
    HeldDisk,
    HeldPoint,
    Kind,
    LayerOffer,
    decode,
)
from snapchain.replica.stream.session import ClientSession

_LONGEST_NAME = 250
_GOES_ON = "it goes on where it stopped"
"""What is right for a transfer to a replica, and is said wherever a channel breaks."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Guest bytes [offset, offset + length): `data`, valid until the next batch, or zeroes where that is None."""

    offset: int
    length: int
    data: memoryview | None


@dataclass(slots=True)
class FetchedLayer:
    """A layer that comes. id: the same each time it is fetched; announced: known once all batches were read."""

    id: str
    offer: LayerOffer
    extents: Extents
    announced: str = ""
    _answer: Answer = field(kw_only=True)

    @property
    def peer(self) -> str:
        """For errors: who sends it."""
        return self._answer.peer

    def batches(self) -> Iterator[list[Piece]]:
        """All DATA of its map, in guest order; nothing where one only looks. Raises Corrupt."""
        runs, position = DataRuns(self.extents), 0
        while (frame := self._answer.next()).kind is Kind.DATA and not self._answer.asked.look:
            found = decode_data(frame.body, runs, position, on_base=False, subject=self._answer.peer)
            position = found.stop
            yield list(_pieces(found, runs))
        if frame.kind is not Kind.END or len(frame.body) != 32:
            raise self._answer.unexpected(frame)
        if not self._answer.asked.look and runs.below(position) != runs.total:
            left = runs.total - runs.below(position)
            raise Corrupt(f"the layer ends with {left} bytes of data left out", subject=self._answer.peer)
        self.announced = bytes(frame.body).hex()


class Answer:
    """What the other side says to FETCH. point: the one that was asked for; data_bytes: of all maps, as it says."""

    def __init__(self, channel: Channel, asked: Fetch, *, limit_rate: int | None) -> None:
        """Raises Unsupported, NotFound, and what the other side refuses with."""
        self.asked, self.peer = asked, channel.peer
        self._session = ClientSession(channel, FROM_FETCH)
        self._session.ask(Kind.FETCH, asked)
        self._bucket = None if limit_rate is None else TokenBucket(limit_rate)
        self.point = self._point(self._expect(Kind.DISK))
        told = self._expect(Kind.PROGRESS)
        if len(told.body) != PROGRESS.size:
            raise self.unexpected(told)
        self.data_bytes: int = PROGRESS.unpack(told.body)[1]
        if not asked.chain and self.data_bytes > self.point.size:
            raise Corrupt("it announces more data than the disk holds", subject=self.peer)

    def layers(self) -> Iterator[FetchedLayer]:
        """The layers, root first: one, or those of the chain. Raises Corrupt."""
        parent: str | None = None
        size, announced = -1, ""
        count = self.point.layers if self.asked.chain else 1
        for _ in range(count):
            offer = decode(LayerOffer, self._expect(Kind.LAYER).body, subject=self.peer)
            check_offered(offer.name, subject=self.peer)
            if offer.parent != parent or offer.resume_at:
                raise Corrupt("a layer comes that does not lie on the one before", subject=self.peer)
            reader = MapReader(offer, subject=self.peer)
            while not reader.complete:
                reader.add(self._expect(Kind.MAP).body)
            layer = FetchedLayer(layer_id(offer, reader.words()), offer, reader.extents(), _answer=self)
            yield layer
            if not layer.announced:
                raise AssertionError("a layer must be read to its end before the next")
            parent, size, announced = layer.id, offer.size, layer.announced
        if (size, announced) != (self.point.size, self.point.content_id):
            raise Corrupt("what came is announced as something else than the point", subject=self.peer)
        if decode(Done, self._expect(Kind.DONE).body, subject=self.peer).layers != count:
            raise Corrupt("it has given other layers than it says", subject=self.peer)

    def next(self) -> Frame:
        """The next frame that says something. Raises what the other side fails with."""
        frame = self._session.next()
        if self._bucket is not None:
            # Who sends is slowed down by what is not read yet.
            self._bucket.take(FRAME_BYTES + len(frame.body))
        return frame

    def unexpected(self, frame: Frame) -> Corrupt:
        """The error for a frame that should not come now."""
        return self._session.unexpected(frame)

    def _expect(self, kind: Kind) -> Frame:
        frame = self.next()
        if frame.kind is not kind:
            raise self.unexpected(frame)
        return frame

    def _point(self, frame: Frame) -> HeldPoint:
        said = decode(HeldDisk, frame.body, subject=self.peer)
        if said.disk != self.asked.disk or len(said.points) != 1:
            raise Corrupt("it tells of something else than it was asked for", subject=self.peer)
        try:
            return chosen_point(said.disk, said.points, self.asked.point)
        except NotFound as error:
            raise Corrupt("it gives another point than it was asked for", subject=self.peer) from error


@contextmanager
def fetch(
    endpoint: Endpoint,
    disk: str,
    point: str | None,
    *,
    chain: bool = False,
    look: bool = False,
    limit_rate: int | None = None,
) -> Iterator[Answer]:
    """Ask for a point, and read the answer inside the block.

    point: as in an address; chain: its layers as they are, else one that shows all; look: their maps only
    limit_rate: bytes a second that are read
    Raises InvalidInput for names that cannot be, NotFound, Unsupported, and what keeps the other side from answering.
    """
    check_disk_name(disk)
    if point is not None and not 0 < len(point) <= _LONGEST_NAME:
        raise NotFound(f"the disk has no point {point[:40]!a}", subject=f"{endpoint.url}::{disk}")
    asked = Fetch(
        disk=disk,
        point=point,
        replica=endpoint.replica,
        chain=chain,
        look=look,
        plain=endpoint.link is Link.LOCAL,
    )
    try:
        with endpoint.connect() as channel:
            yield Answer(channel, asked, limit_rate=limit_rate)
    except Unavailable as error:
        if error.hint is not None:
            error.hint = error.hint.replace(_GOES_ON, "it begins anew")
        raise


def _pieces(found: Arrived, runs: DataRuns) -> Iterator[Piece]:
    """What a frame brings, cut where the guest's ranges and the frame's parts are cut."""
    places = iter(runs.pieces(found.start, found.stop))
    place = next(places)
    carried = at = 0
    for length, kind in found.parts:
        stop = at + length
        while at < stop:
            if at == place.at + place.length:
                place = next(places)
            count = min(stop, place.at + place.length) - at
            data = found.carried[carried : carried + count] if kind is Part.CARRIED else None
            carried += count if data is not None else 0
            yield Piece(place.offset + at - place.at, count, data)
            at += count
