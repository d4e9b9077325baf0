"""What a replica answers to FETCH: a point, as one layer that shows all of it, or as the layers of its chain.

    FETCH  ->  DISK PROGRESS (LAYER MAP* DATA* END)+ DONE

Nothing is made, locked against readers, or changed. The files are held as QEMU holds those that it reads, so a merge
or a cut waits; what they show is counted on the way, and is no answer unless it is what was proven when it came.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from snapchain.errors import Busy, Corrupt, NotFound, SnapchainError, Unsupported
from snapchain.host.channel import Channel
from snapchain.host.locks import ImageLock, LockMode
from snapchain.image import ImageChain
from snapchain.image.qcow2.aligned import aligned
from snapchain.model.content import content_id, empty_sum
from snapchain.model.points import chosen_point
from snapchain.replica.arrival import opened_chain
from snapchain.replica.catalogue import Layer, Point
from snapchain.replica.merge_journal import Engine, is_under_way, wait_for_merge
from snapchain.replica.outgoing import Outgoing, OutgoingLayer
from snapchain.replica.send_queue import SendQueue
from snapchain.replica.status import PROGRESS
from snapchain.replica.store import ReplicaDisk, open_replica
from snapchain.replica.stream.compression import Levels, Link
from snapchain.replica.stream.frames import FrameWriter, Kind
from snapchain.replica.stream.layers import layer_id, map_frames, words_of
from snapchain.replica.stream.messages import MAX_RUNS, Done, Fetch, HeldDisk, HeldPoint, LayerOffer, encode

_ATTEMPTS = 5


@dataclass(frozen=True, slots=True)
class _Opened:
    """A point whose files are open. layers: those of its chain, root first."""

    epoch: int
    point: Point
    layers: tuple[Layer, ...]
    chain: ImageChain


def give(asked: Fetch, root: Path, channel: Channel, frames: FrameWriter, *, engine: Engine | None) -> None:
    """Say all of the answer. engine: what settles a merge that was killed.

    Raises NotFound where there is no such replica, disk or point, Corrupt when it is not what it was, Busy when
    somebody is changing it.
    """
    disk = open_replica(root).disk(asked.disk)
    with _opened(disk, asked.point, engine) as found:
        outbox = SendQueue(channel, frames, None)
        try:
            _Giving(asked, disk, found, outbox).run()
        except BaseException:
            # What was given before goes out before the reason why no more comes.
            with suppress(SnapchainError):
                outbox.flush()
            raise
        outbox.flush()


class _Giving:
    def __init__(self, asked: Fetch, disk: ReplicaDisk, found: _Opened, outbox: SendQueue) -> None:
        self._asked, self._disk, self._found, self._outbox = asked, disk, found, outbox
        self._levels = Levels(Link.LOCAL if asked.plain else Link.NETWORK)

    def run(self) -> None:
        found = self._found
        layers = list(_as_they_are(found)) if self._asked.chain else [_as_one(found)]
        self._outbox.put(Kind.DISK, encode(self._told()))
        self._outbox.put(Kind.PROGRESS, PROGRESS.pack(0, sum(layer.extents.data_bytes for layer in layers)))
        recorded = found.layers if self._asked.chain else found.layers[-1:]
        parent: str | None = None
        for layer, record in zip(layers, recorded, strict=True):
            parent = self._give(layer, record, parent)
        self._outbox.put(Kind.DONE, encode(Done(points=(), layers=len(layers))))

    def _told(self) -> HeldDisk:
        point = self._found.point
        held = HeldPoint(
            point=point.point,
            time=point.time,
            labels=point.labels,
            size=point.size,
            content_id=point.content_id,
            layers=len(self._found.layers),
        )
        return HeldDisk(disk=self._disk.name, epoch=self._found.epoch, points=(held,))

    def _give(self, layer: OutgoingLayer, record: Layer, parent: str | None) -> str:
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
        if not self._asked.look:
            self._give_data(layer, record)
        self._outbox.put(Kind.END, bytes.fromhex(record.content_id))
        return layer_id(offer, words)

    def _give_data(self, layer: OutgoingLayer, record: Layer) -> None:
        outgoing = Outgoing(layer, self._levels)
        total = outgoing.first_sum()
        for portion in outgoing.portions():
            total = total + portion.delta
            if portion.frame:
                self._levels.queue_seen(self._outbox.fullness)
                self._outbox.put(Kind.DATA, *portion.frame)
        shown = content_id(layer.extents.size, total)
        if shown == record.content_id:
            return
        if self._found.chain.changed():
            raise Busy("the files were changed while they were read", subject=self._disk.directory, hint="run it again")
        raise Corrupt(
            f"its chain shows the content {shown}, recorded is {record.content_id}",
            subject=self._disk.path(record.file),
            hint="snapchain verify --read-data tells which points are affected",
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


@contextmanager
def _opened(disk: ReplicaDisk, wanted: str | None, engine: Engine | None) -> Iterator[_Opened]:
    """A point, its files held. What is wrong with them counts only where the catalogue still is the same."""
    with ExitStack() as held:
        yield _open(disk, wanted, held, engine)


def _open(disk: ReplicaDisk, wanted: str | None, held: ExitStack, engine: Engine | None) -> _Opened:
    for _ in range(_ATTEMPTS):
        wait_for_merge(disk, engine=engine)
        catalogue = disk.read()
        if catalogue is None:
            raise NotFound(f"there is no disk {disk.name!r} here", subject=disk.directory.parent)
        point = chosen_point(disk.name, catalogue.points, wanted)
        count = 1 + [layer.id for layer in catalogue.layers].index(point.layer)
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
