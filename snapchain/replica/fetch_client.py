"""Fetch a point from a replica, wherever it is. Each response is checked before it is used.

    with fetch(endpoint, "web1/vda", "7") as answer:
        answer.point, answer.data_bytes         # what will come
        for layer in answer.layers():           # root first; each must be read to its end before the next
            for pieces in layer.batches():
                ...
            layer.announced                     # the content id that its chain has at the replica

At most one layer's map and one frame of data are held. That the bytes are the point's is for the reader to prove.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from snapchain.errors import Corrupt, NotFound, Unavailable
from snapchain.host.channel import Channel
from snapchain.model.content import LEAF_BYTES
from snapchain.model.disk_name import check_disk_name
from snapchain.model.extents import Extents
from snapchain.model.points import chosen_point
from snapchain.objects.throttle import TokenBucket
from snapchain.replica.endpoint import Endpoint
from snapchain.replica.names import check_offered
from snapchain.replica.stream.compression import Link
from snapchain.replica.stream.frames import FRAME_BYTES, Frame, Kind
from snapchain.replica.stream.maps import Arrived, DataRuns, MapReader, Part, decode_data, layer_id
from snapchain.replica.stream.messages import PROGRESS, Done, Fetch, HeldDisk, HeldPoint, LayerOffer, decode
from snapchain.replica.stream.requests import FROM_FETCH, Feature
from snapchain.replica.stream.session import ClientSession

_LONGEST_NAME = 250
_GOES_ON = "it resumes where it stopped"
"""Right for a transfer to a replica; the errors of a channel say so."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Guest bytes [offset, offset + length): `data`, valid until the next batch, or zeroes where that is None."""

    offset: int
    length: int
    data: memoryview | None


@dataclass(slots=True)
class FetchedLayer:
    """A layer that comes. id: the same each time it is fetched; announced: known once all batches were read.

    position: guest offset below which all data have come, or were not asked for
    """

    id: str
    offer: LayerOffer
    extents: Extents
    position: int
    announced: str = ""
    _answer: Answer = field(kw_only=True)

    @property
    def peer(self) -> str:
        """For errors: who sends it."""
        return self._answer.peer

    def batches(self) -> Iterator[list[Piece]]:
        """DATA of its map, in guest order, from where they were asked for; none if only maps were. Raises Corrupt."""
        runs = DataRuns(self.extents)
        while (frame := self._answer.next()).kind is Kind.DATA and not self._answer.request.look:
            found = decode_data(frame.body, runs, self.position, on_base=False, subject=self._answer.peer)
            self.position = found.stop
            yield list(_pieces(found, runs))
        if frame.kind is not Kind.END or len(frame.body) != 32:
            raise self._answer.unexpected(frame)
        if not self._answer.request.look and runs.below(self.position) != runs.total:
            left = runs.total - runs.below(self.position)
            raise Corrupt(f"the layer ends with {left} bytes of data left out", subject=self._answer.peer)
        self.announced = bytes(frame.body).hex()


class Answer:
    """The answer to FETCH. point: the one that was asked for; data_bytes: of all maps, as announced."""

    def __init__(self, channel: Channel, request: Fetch, *, limit_rate: int | None) -> None:
        """Raises Unsupported, NotFound, and what the other side refuses with."""
        self._session = ClientSession(channel, FROM_FETCH)
        self._session.begin()
        if Feature.FETCH_FROM not in self._session.features:  # then all comes
            request = request.model_copy(update={"first_layer": 0, "first_offset": 0})
        self.request, self.peer = request, channel.peer
        self._session.request(Kind.FETCH, request)
        self._bucket = None if limit_rate is None else TokenBucket(limit_rate)
        self.point = self._point(self._expect(Kind.DISK))
        progress = self._expect(Kind.PROGRESS)
        if len(progress.body) != PROGRESS.size:
            raise self.unexpected(progress)
        self.data_bytes: int = PROGRESS.unpack(progress.body)[1]
        if not request.chain and self.data_bytes > self.point.size:
            raise Corrupt("it announces more data than the disk holds", subject=self.peer)

    def layers(self) -> Iterator[FetchedLayer]:
        """The layers, root first: one, or those of the chain. Raises Corrupt."""
        parent: str | None = None
        size, announced = -1, ""
        count = self.point.layers if self.request.chain else 1
        for number in range(count):
            offer = decode(LayerOffer, self._expect(Kind.LAYER).body, subject=self.peer)
            check_offered(offer.name, subject=self.peer)
            if offer.parent != parent or offer.resume_at:
                raise Corrupt("a layer comes that does not lie on the one before", subject=self.peer)
            reader = MapReader(offer, subject=self.peer)
            while not reader.complete:
                reader.add(self._expect(Kind.MAP).body)
            begin = self._begin(number, offer.size)
            layer = FetchedLayer(layer_id(offer, reader.words()), offer, reader.extents(), begin, _answer=self)
            yield layer
            if not layer.announced:
                raise AssertionError("a layer must be read to its end before the next")
            parent, size, announced = layer.id, offer.size, layer.announced
        if (size, announced) != (self.point.size, self.point.content_id):
            raise Corrupt("what came is announced as something else than the point", subject=self.peer)
        if decode(Done, self._expect(Kind.DONE).body, subject=self.peer).layers != count:
            raise Corrupt("it gave another number of layers than it announced", subject=self.peer)

    def _begin(self, number: int, size: int) -> int:
        """The guest offset from which data of a layer come."""
        if number < self.request.first_layer:
            return size
        return min(self.request.first_offset, size) if number == self.request.first_layer else 0

    def next(self) -> Frame:
        """The next frame but BEAT. Raises the error that the other side reports."""
        frame = self._session.next()
        if self._bucket is not None:
            # Unread bytes slow the sender down.
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
        held = decode(HeldDisk, frame.body, subject=self.peer)
        if held.disk != self.request.disk or len(held.points) != 1:
            raise Corrupt("it answered about another disk than the one asked for", subject=self.peer)
        try:
            return chosen_point(held.disk, held.points, self.request.point)
        except NotFound as error:
            raise Corrupt("it gives another point than the one asked for", subject=self.peer) from error


@contextmanager
def fetch(
    endpoint: Endpoint,
    disk: str,
    point: str | None,
    *,
    chain: bool = False,
    look: bool = False,
    first: tuple[int, int] = (0, 0),
    limit_rate: int | None = None,
) -> Iterator[Answer]:
    """Ask for a point, and read the answer inside the block.

    point: as in an address; chain: its layers as they are, else one that shows all; look: their maps only
    first: number of the layer, from 0, and guest offset in it, with which data are to begin; an older side gives all
    limit_rate: bytes a second that are read
    Raises InvalidInput for names that cannot be, NotFound, Unsupported, and what keeps the other side from answering.
    """
    check_disk_name(disk)
    if point is not None and not 0 < len(point) <= _LONGEST_NAME:
        raise NotFound(f"the disk has no point {point[:40]!a}", subject=f"{endpoint.url}::{disk}")
    request = Fetch(
        disk=disk,
        point=point,
        replica=endpoint.replica,
        chain=chain,
        look=look,
        plain=endpoint.link is Link.LOCAL,
        first_layer=first[0],
        first_offset=-(-first[1] // LEAF_BYTES) * LEAF_BYTES,
    )
    try:
        with endpoint.connect() as channel:
            yield Answer(channel, request, limit_rate=limit_rate)
    except Unavailable as error:
        if error.hint is not None:
            error.hint = error.hint.replace(_GOES_ON, "a restore continues what it had written")
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
