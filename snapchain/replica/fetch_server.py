"""What a replica answers when its content is wanted.

    FETCH   ->  DISK PROGRESS (LAYER MAP* DATA* END)+ DONE    a point: one layer that shows it, or its chain's layers
    LEAVES  ->  PROGRESS* LEAF_HASHES+                        the leaf hashes of the newest content

Nothing is made, locked against readers, or changed. The files are locked as QEMU locks files that it reads, so a merge
or a cut waits; what they show is counted on the way, and is no answer unless it is what was proven when it came.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from snapchain.errors import Busy, Corrupt, Diverged, InvalidInput, NotFound, SnapchainError, Unsupported
from snapchain.host.locks import ImageLock, LockMode
from snapchain.image import ImageChain
from snapchain.image.leaves import leaf_hashes
from snapchain.image.qcow2.aligned import aligned
from snapchain.image.windows import data_leaves
from snapchain.model.content import LEAF_BYTES, content_id, empty_sum, sum_of
from snapchain.model.events import ByteCount
from snapchain.model.extents import Extents
from snapchain.model.points import chosen_point
from snapchain.replica.arrival import opened_chain
from snapchain.replica.catalogue import Catalogue, Layer, Point
from snapchain.replica.merge_journal import is_under_way, wait_for_merge
from snapchain.replica.outgoing import Outgoing, OutgoingLayer
from snapchain.replica.send_queue import SendQueue
from snapchain.replica.status import held_point
from snapchain.replica.store import ReplicaDisk, open_replica
from snapchain.replica.stream.compression import Levels, Link
from snapchain.replica.stream.fields import MAX_RUNS
from snapchain.replica.stream.frames import Kind
from snapchain.replica.stream.maps import encode_leaves, layer_id, map_frames, words_of
from snapchain.replica.stream.messages import PROGRESS, Done, Fetch, HeldDisk, LayerOffer, WantLeaves, encode

if TYPE_CHECKING:
    from snapchain.replica.receiver import Receiver, Transfer


_ATTEMPTS = 5
_LEAVES_AT_ONCE = 1024


@dataclass(frozen=True, slots=True)
class _Opened:
    """A chain whose files are open. layers: of it, root first; point: that it gives, if one was asked for."""

    epoch: int
    point: Point | None
    layers: tuple[Layer, ...]
    chain: ImageChain


def answer(receiver: Receiver, request: Fetch) -> None:
    """FETCH.

    Raises NotFound where there is no such replica, disk or point, Corrupt when it is not what it was, Busy when
    somebody is changing it.
    """
    session = receiver.session
    if request.first_offset % LEAF_BYTES:
        raise InvalidInput(f"offset {request.first_offset} is not at a leaf", subject=request.disk)
    disk = open_replica(receiver.root(request.replica)).disk(request.disk)
    with _opened(disk, lambda catalogue: _point(disk, catalogue, request.point)) as found:
        outbox = SendQueue(session.channel, session.writer)
        try:
            _Giving(request, disk, found, outbox, session.features).run()
        except BaseException:
            # What was given before is sent before the reason why no more comes.
            with suppress(SnapchainError):
                outbox.flush()
            raise
        outbox.flush()


@dataclass(frozen=True, slots=True)
class ChainDisk:
    """A PointDisk. What it gives is not proven: `verify --read-data` reads all of it for that."""

    chain: ImageChain
    extents: Extents
    content_id: str

    @property
    def size(self) -> int:
        return self.chain.size

    def read_into(self, offset: int, buffer: memoryview, /) -> None:
        """As WholeDisk."""
        self.chain.read_into(offset, buffer)


@contextmanager
def whole_point(directory: Path, disk: str, wanted: str | None) -> Iterator[ChainDisk]:
    """A point of a replica of this host. Its files are locked for reading while it is open. Raises as `answer`."""
    found = open_replica(directory).disk(disk)
    with _opened(found, lambda catalogue: _point(found, catalogue, wanted)) as opened:
        yield ChainDisk(opened.chain, opened.chain.resolve().owned_by(0), opened.layers[-1].content_id)


def answer_leaves(current: Transfer, request: WantLeaves) -> None:
    """LEAVES: number and hash of each leaf of the newest content that is not all zero, ascending; an empty frame ends.

    They are checked against the recorded content id on the way. At most some windows of the disk are in memory.
    Raises Diverged when the newest layer is another one by now, Corrupt or Busy as `answer`.
    """
    session, disk = current.session, current.disk
    with _opened(disk, lambda catalogue: _newest(disk, catalogue, request.layer)) as found:
        chain, record = found.chain, found.layers[-1]
        count = ByteCount(
            data_leaves(chain).data_bytes,
            lambda done, total: session.reply(Kind.PROGRESS, PROGRESS.pack(done, total)),
        )
        shown = empty_sum()
        waiting, entries = 0, bytearray()
        for numbers, hashes in leaf_hashes(chain, on_bytes=count.add):
            shown += sum_of(numbers, hashes)
            entries += encode_leaves(numbers, hashes)
            waiting += len(numbers)
            if waiting >= _LEAVES_AT_ONCE:
                session.reply(Kind.LEAF_HASHES, bytes(entries))
                waiting, entries = 0, bytearray()
        if entries:
            session.reply(Kind.LEAF_HASHES, bytes(entries))
        _check_shown(disk, found, record, content_id(chain.size, shown))
        session.reply(Kind.LEAF_HASHES)


class _Giving:
    def __init__(
        self, request: Fetch, disk: ReplicaDisk, found: _Opened, outbox: SendQueue, features: Collection[str]
    ) -> None:
        self._features = features
        self._request, self._disk, self._found, self._outbox = request, disk, found, outbox
        self._levels = Levels(Link.LOCAL if request.plain else Link.NETWORK)

    def run(self) -> None:
        found = self._found
        layers = list(_as_they_are(found)) if self._request.chain else [_as_one(found)]
        self._outbox.put(Kind.DISK, encode(self._told()))
        self._outbox.put(Kind.PROGRESS, PROGRESS.pack(0, sum(layer.extents.data_bytes for layer in layers)))
        recorded = found.layers if self._request.chain else found.layers[-1:]
        parent: str | None = None
        for number, (layer, record) in enumerate(zip(layers, recorded, strict=True)):
            parent = self._give(number, layer, record, parent)
        self._outbox.put(Kind.DONE, encode(Done(points=(), layers=len(layers))))

    def _told(self) -> HeldDisk:
        point = self._found.point
        assert point is not None
        held = held_point(point, len(self._found.layers), self._features)
        return HeldDisk(disk=self._disk.name, epoch=self._found.epoch, points=(held,))

    def _give(self, number: int, layer: OutgoingLayer, record: Layer, parent: str | None) -> str:
        """The layer's id."""
        words = words_of(layer.extents, layer.cluster_size // 32 if layer.extended_l2 else layer.cluster_size)
        if len(words) > MAX_RUNS:
            raise Unsupported(
                f"the map has {len(words)} runs, and the stream holds no more than {MAX_RUNS}",
                subject=self._disk.directory,
                hint="take the point as its layers (--chain)",
            )
        offer = LayerOffer(
            name=layer.name,
            size=layer.extents.size,
            cluster_size=layer.cluster_size,
            extended_l2=layer.extended_l2,
            parent=parent,
            sources=layer.sources,
            runs=len(words),
        )
        self._outbox.put(Kind.LAYER, encode(offer))
        for body in map_frames(words):
            self._outbox.put(Kind.MAP, body)
        if not self._request.look and number >= self._request.first_layer:
            self._give_data(
                layer, record, since=self._request.first_offset if number == self._request.first_layer else 0
            )
        self._outbox.put(Kind.END, bytes.fromhex(record.content_id))
        return layer_id(offer, words)

    def _give_data(self, layer: OutgoingLayer, record: Layer, *, since: int) -> None:
        outgoing = Outgoing(layer, self._levels)
        total = outgoing.first_sum()
        for portion in outgoing.portions(since=since):
            total = total + portion.delta
            if portion.frame:
                self._levels.queue_seen(self._outbox.fullness)
                self._outbox.put(Kind.DATA, *portion.frame)
        if not since:  # else what was not read may be anything: whoever has it proves the whole
            _check_shown(self._disk, self._found, record, content_id(layer.extents.size, total))


def _check_shown(disk: ReplicaDisk, found: _Opened, record: Layer, shown: str) -> None:
    """Raises Busy or Corrupt where a chain shows another content than was recorded of it."""
    if shown == record.content_id:
        return
    if found.chain.changed():
        raise Busy("the files were changed while they were read", subject=disk.directory, hint="run it again")
    raise Corrupt(
        f"its chain shows the content {shown}, recorded is {record.content_id}",
        subject=disk.path(record.file),
        hint="snapchain verify --read-data lists the affected points",
    )


def _as_one(found: _Opened) -> OutgoingLayer:
    chain, top = found.chain, found.chain.top
    shown = chain.resolve().owned_by(0)
    return OutgoingLayer(
        name=found.layers[-1].file,
        cluster_size=top.cluster_size,
        extended_l2=False,
        sources=(),
        extents=aligned(shown, shown, cluster_size=top.cluster_size),
        view=chain,
        below=None,
        below_sum=empty_sum(),
        same_below=False,
    )


def _as_they_are(found: _Opened) -> Iterator[OutgoingLayer]:
    for number, (file, layer) in enumerate(zip(found.chain.files, found.layers, strict=True)):
        yield OutgoingLayer(
            name=layer.file,
            cluster_size=file.cluster_size,
            extended_l2=file.grain < file.cluster_size,
            sources=layer.sources,
            extents=file.extents,
            view=found.chain.at(number),
            below=found.chain.at(number - 1) if number else None,
            below_sum=found.layers[number - 1].sum() if number else empty_sum(),
            same_below=False,
        )


def _point(disk: ReplicaDisk, catalogue: Catalogue, wanted: str | None) -> tuple[Point | None, str]:
    point = chosen_point(disk.name, catalogue.points, wanted)
    return point, point.layer


def _newest(disk: ReplicaDisk, catalogue: Catalogue, wanted: str) -> tuple[Point | None, str]:
    if catalogue.tip is None or catalogue.tip.id != wanted:
        raise Diverged(
            "that layer is not the newest one here",
            subject=disk.directory,
            hint="another transfer was faster: run it again",
        )
    return None, wanted


@contextmanager
def _opened(disk: ReplicaDisk, choose: Callable[[Catalogue], tuple[Point | None, str]]) -> Iterator[_Opened]:
    """A chain whose files are locked for reading. choose: (point, id of the layer that is its top).

    An error counts only if the catalogue has not changed since. Raises NotFound, Busy, Corrupt, and as `choose`.
    """
    with ExitStack() as held:
        yield _open(disk, choose, held)


def _open(
    disk: ReplicaDisk,
    choose: Callable[[Catalogue], tuple[Point | None, str]],
    held: ExitStack,
) -> _Opened:
    for _ in range(_ATTEMPTS):
        wait_for_merge(disk)
        catalogue = disk.read()
        if catalogue is None:
            raise NotFound(f"there is no disk {disk.name!r} here", subject=disk.directory.parent)
        point, top = choose(catalogue)
        count = 1 + [layer.id for layer in catalogue.layers].index(top)
        layers = catalogue.layers[:count]
        with ExitStack() as attempt:
            try:
                below = catalogue.model_copy(update={"layers": layers})
                chain = attempt.enter_context(opened_chain(disk, below, layers[-1]))
                for file in chain.files:
                    attempt.enter_context(ImageLock(file.path, LockMode.READ))
                if chain.changed() or is_under_way(disk):
                    raise Busy("the files are being changed", subject=disk.directory, hint="run it again")
            except SnapchainError:
                if disk.read() == catalogue and not is_under_way(disk):
                    raise
                continue
            held.enter_context(attempt.pop_all())
            return _Opened(catalogue.epoch, point, layers, chain)
    raise Busy("the disk changes while it is looked at", subject=disk.directory, hint="run it again")
