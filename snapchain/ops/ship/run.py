"""ship: bring what a destination lacks of an image, and publish a point. `send` is this, to a replica.

    scan + lock -> recognise what is there -> group the rest into layers -> write, publish

One plan and one run, whatever the kind of destination. Nothing is decided by `run` that `plan` does not show, except
what only reading can tell: how much of an image that has to be compared differs.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime

from snapchain.destination.guest_record import record_disk
from snapchain.destination.reading import ReadableDestination
from snapchain.destination.writing import DiskLook, HeldLayer, LayerWriter, NewLayer, Opening, TakesLayers, Writing
from snapchain.errors import Conflict, Corrupt, Diverged, InvalidInput, NotFound, SnapchainError, Unsupported
from snapchain.host.channel import Channel
from snapchain.image import ImageChain
from snapchain.model.content import Sum
from snapchain.model.events import Notice, OnEvent, Progress, ignore
from snapchain.model.extents import DATA, ZERO, Extents, over
from snapchain.ops.fence.mark import mark_after_refusal
from snapchain.ops.guest_places import introduced
from snapchain.ops.ship.compare import Difference, to_read
from snapchain.ops.ship.grouping import RAW_CLUSTER, composed, geometry, groups
from snapchain.ops.ship.recognition import Base, Recognition, sources_of
from snapchain.ops.ship.request import (
    Divergence,
    Files,
    LayerPlan,
    ShipPlan,
    ShipReport,
    ShipRequest,
    is_unchanged,
)
from snapchain.source.counted_sums import CountedSums
from snapchain.source.lineage import written_at
from snapchain.source.protocol import Scope


def plan(request: ShipRequest, destination: Writing, *, on_event: OnEvent = ignore) -> ShipPlan:
    """What `run` would do; changes nothing on either side. Raises as that does."""
    with opened(request, destination, on_event=on_event) as shipment:
        return shipment.plan()


def run(
    request: ShipRequest,
    destination: Writing,
    *,
    names: ReadableDestination | None = None,
    on_event: OnEvent = ignore,
) -> ShipReport:
    """Ship what a destination lacks of an image, and publish a point.

    names: the destination, where a disk that is new there must not have the name of a guest
    Raises Diverged when a destination with one chain a disk holds what the image never was, Corrupt when its layers do
    not show what the files show that it says they were made of, Conflict when its epoch is newer or the image was
    modified meanwhile, Busy when somebody writes to the image or the disk, Unavailable when the link stays broken: then
    the next run continues at what is durable.
    """
    request.check()
    with request.chain(on_event) as chain, _introduced(request, destination, on_event):
        return _run(request, chain, destination, on_event, names=names)


def _introduced(request: ShipRequest, destination: Writing, on_event: OnEvent) -> AbstractContextManager[None]:
    """An image that another host has is not shipped as its guest's."""
    if request.though_given:
        return nullcontext()
    return introduced(request.image, request.disk, destination, on_event=on_event)


def check_no_guest(name: str, destination: ReadableDestination) -> None:
    """Raises Conflict for the name of a guest: DEST::NAME would mean the disk from then on, and hide the guest."""
    try:
        if not destination.disks(record_disk(name)):
            return
    except (NotFound, InvalidInput, Unsupported):  # or a key that may not look at others
        return
    raise Conflict(
        f"{name!r} is a guest there, and no disk",
        subject=destination.url,
        hint=f"name the disk otherwise there: DEST::{name}/DISK is one of the guest",
    )


def send_blindly(request: ShipRequest, channel: Channel, *, on_event: OnEvent = ignore) -> ShipReport:
    """Write a whole image as a stream that nobody answers: to be saved, or piped to `snapchain receive`.

    The channel is closed at the end. Raises as `run`.
    """
    from snapchain.replica.disk_writer import StreamWriting

    request.check()
    with request.chain(on_event) as chain:
        return _run(request, chain, StreamWriting(channel), on_event)


@contextmanager
def opened(request: ShipRequest, destination: Writing, *, on_event: OnEvent = ignore) -> Iterator[Shipment]:
    """An image locked against writers, to be planned and shipped within the block."""
    request.check()
    with request.chain(on_event) as chain:
        yield Shipment(request, chain, destination, on_event)


def opening_of(request: ShipRequest, chain: ImageChain) -> Opening:
    """Which disk is written, and in which epoch: what notes beside the image tell counts, too."""
    epoch = max(request.epoch, request.source().epoch(chain))
    named = request.epoch == epoch
    return Opening(
        disk=request.disk,
        epoch=epoch,
        epoch_named=named,
        limit_rate=request.limit_rate,
        of_guest=request.moment is not None,
    )


def layers_lacking(
    request: ShipRequest, chain: ImageChain, there: DiskLook, destination: str, *, on_event: OnEvent = ignore
) -> tuple[LayerPlan, ...]:
    """The layers that `run` would make of those files of a chain that a destination does not show.

    Sends nothing. Raises Diverged, and Corrupt as `run`.
    """
    sums = CountedSums(None if there.believed else request.remembered_by, on_event)
    if request.divergence is Divergence.COMPARE:
        # Where both show the same, the comparison has made no layer by which the image would be known again.
        with suppress(Diverged):
            plain = replace(request, divergence=Divergence.REFUSE)
            return _planned(plain, chain, there, destination, sums, on_event)
    return _planned(request, chain, there, destination, sums, on_event)


def _planned(
    request: ShipRequest,
    chain: ImageChain,
    there: DiskLook,
    destination: str,
    sums: CountedSums,
    on_event: OnEvent,
) -> tuple[LayerPlan, ...]:
    layers = _Work(request, chain, there, destination, sums, on_event).planned()
    sums.flush()
    return layers


class Shipment:
    """An image that is opened, and a destination."""

    def __init__(self, request: ShipRequest, chain: ImageChain, destination: Writing, on_event: OnEvent) -> None:
        self._request, self._chain, self._destination, self._on_event = request, chain, destination, on_event

    def plan(self) -> ShipPlan:
        """See `plan`."""
        return plan_opened(self._request, self._chain, self._destination, on_event=self._on_event)

    def run(self, *, on_event: OnEvent | None = None) -> ShipReport:
        """See `run`."""
        heard = self._on_event if on_event is None else on_event
        with _introduced(self._request, self._destination, heard):
            return _run(self._request, self._chain, self._destination, heard)


def plan_opened(
    request: ShipRequest, chain: ImageChain, destination: Writing, *, on_event: OnEvent = ignore
) -> ShipPlan:
    """As `plan`, for a chain that is opened already. Lets no file be read that recognition by names can spare."""
    with destination.look(opening_of(request, chain), on_event=on_event) as there:
        sums = CountedSums(None if there.believed else request.remembered_by, on_event)
        work = _Work(request, chain, there, destination.url, sums, on_event, reads=False)
        layers = work.planned()
    return ShipPlan(
        image=str(request.image),
        destination=destination.url,
        disk=request.disk,
        layers_present=work.base.files,
        layers=layers,
        bytes_to_read=sum(layer.bytes_to_read for layer in layers),
        data_bytes=sum(layer.data_bytes for layer in layers),
        labels=tuple(request.labels),
        note=work.base.note,
    )


def _run(
    request: ShipRequest,
    chain: ImageChain,
    destination: TakesLayers,
    on_event: OnEvent,
    *,
    names: ReadableDestination | None = None,
) -> ShipReport:
    def write(writer: LayerWriter) -> ShipReport:
        if names is not None and not writer.held:
            check_no_guest(request.disk, names)
        if request.epoch > 1:
            _note_epoch(request, on_event)
        sums = CountedSums(None if writer.believed else request.remembered_by, on_event)
        try:
            return _Work(request, chain, writer, destination.url, sums, on_event).written(writer)
        finally:
            sums.flush()

    try:
        return destination.write(opening_of(request, chain), write, on_event=on_event)
    except Conflict:
        if request.opens is None:
            mark_after_refusal(
                [(request.image, request.disk)], destination, format=request.format, image_dirs=request.image_dirs
            )
        raise


def _note_epoch(request: ShipRequest, on_event: OnEvent) -> None:
    """Beside the image, once the destination has it: whoever ships it next must not say an older one."""
    try:
        request.source().note_epoch(request.epoch)
    except SnapchainError as error:
        on_event(Notice(f"the epoch is not noted here, so say --epoch {request.epoch} each time: {error}"))


@dataclass(frozen=True, slots=True)
class _Group:
    """Files [start, stop) of the chain as one layer, and then a point or not.

    shows: the content sum that must come of it, where that is known before it is written
    """

    files: range
    layer: NewLayer
    publishes: bool
    shows: Sum | None = None


class _Work:
    def __init__(
        self,
        request: ShipRequest,
        chain: ImageChain,
        there: DiskLook,
        destination: str,
        sums: CountedSums,
        on_event: OnEvent,
        *,
        reads: bool = True,
    ) -> None:
        """reads: see Recognition."""
        self._request, self._chain, self._there, self._sums = request, chain, there, sums
        self._url, self._on_event = destination, on_event
        self._recognition = Recognition(chain, there, request, destination, sums, on_event, reads=reads)
        self.base = self._recognition.base()

    def planned(self) -> tuple[LayerPlan, ...]:
        """The layers that `written` would make, at most; what has to be compared counts as if all of it differed."""
        base = self.base
        if base.compares is None:
            return tuple(self._shown(group.files, group.layer, group.publishes) for group in self._grouped())
        extents = to_read(base.compares, self._chain)
        layer = replace(self._compared(extents, None), amount=extents.data_bytes)
        return (self._shown(range(base.files, len(self._chain.files)), layer, publishes=True),)

    def _shown(self, files: range, layer: NewLayer, publishes: bool) -> LayerPlan:  # noqa: FBT001
        return LayerPlan(
            files=tuple(str(self._chain.files[at].path) for at in files),
            virtual_size=layer.view.size,
            bytes_to_read=layer.amount,
            data_bytes=layer.extents.data_bytes,
            publishes=publishes,
        )

    def written(self, writer: LayerWriter) -> ShipReport:
        """Write the layers, publish, and wait until all is durable."""
        begun = time.monotonic()
        base = self.base
        newest = writer.held[-1] if writer.held and not writer.mends else None
        if base.note:
            self._on_event(Notice(base.note))
        if base.cut:
            writer.cut(None if base.layer is None else base.layer.id)
        todo = self._grouped() if base.compares is None else self._difference()
        whole = sum(group.layer.amount for group in todo)
        top = self.base.layer
        for number, group in enumerate(todo):
            layer = group.layer
            if number and top is not None:
                layer = replace(layer, below_sum=top.total)
            top = writer.add(
                layer,
                top,
                confirm=lambda: self._request.source().check_unchanged(self._chain),
                on_bytes=lambda done: self._on_event(Progress("ship", done, whole)),
            )
            if group.shows is not None and not (top.total == group.shows).all():
                raise Corrupt(
                    f"its new layer {top.name} does not show what {self._chain.top.path} shows",
                    subject=f"{self._url}::{self._request.disk}",
                    hint="no point was published; keep the image, and report this",
                )
            if not writer.believed:
                self._sums.note(self._chain, group.files.stop, top.total)
            if group.publishes:
                self._publish(writer, top, group.files.stop, is_last=group is todo[-1])
        if not todo:
            assert top is not None, "an image without a layer there has at least a root"
            self._publish(writer, top, len(self._chain.files), is_last=True)
        assert top is not None
        finished = writer.finish()
        if finished.points is not None:
            self._remember()
        points = finished.points or ()
        traffic = writer.traffic
        return ShipReport(
            disk=self._request.disk,
            destination=self._url,
            point=points[-1] if points else None,
            points=points,
            layers_sent=len(todo),
            layers_present=base.files,
            bytes_read=max(traffic.read, self._recognition.bytes_compared),  # what differs is read twice
            bytes_stored=traffic.stored,
            bytes_sent=traffic.sent,
            data_bytes=traffic.data,
            carried_bytes=traffic.carried,
            resumed=traffic.resumed,
            virtual_size=top.size,
            content_id=top.content_id,
            damaged=finished.damaged,
            unchanged=is_unchanged(newest, top),
            seconds=time.monotonic() - begun,
        )

    def _publish(self, writer: LayerWriter, top: HeldLayer, stop: int, *, is_last: bool) -> None:
        """is_last: it shows the image as given; files above `stop` then say nothing."""
        time = (self._request.time if is_last else None) or self._time_of(stop)
        moment = self._request.moment if is_last else None
        writer.publish(top, time=time, labels=self._request.labels, moment=moment)

    def _time_of(self, stop: int) -> datetime:
        """Now for the image as given; for a sealed file below it, its last write."""
        if stop == len(self._chain.files):
            return datetime.now(UTC)
        return written_at(self._chain.files[stop - 1].fingerprint)

    def _remember(self) -> None:
        """What was sent, for `verify` of what another host records."""
        if self._there.believed:
            return
        try:
            from snapchain.replica.sent_views import SentViews  # a repository needs none of it

            SentViews(self._url, self._request.disk).note(self._chain, self._sums)
        except SnapchainError as error:
            self._on_event(Notice(f"`verify` cannot compare what was sent with what is there: {error}"))

    def _grouped(self) -> list[_Group]:
        base = self.base
        each = self._request.files is Files.EACH or self._there.mends
        below = 0 if base.layer is None else base.layer.size
        found = groups(self._chain, base.files, below=below, each=each)
        last = len(found) - 1
        return [
            _Group(
                files,
                self._there.fitted(self._layer(files, base if number == 0 else None)),
                publishes=self._request.each_point or number == last,
            )
            for number, files in enumerate(found)
        ]

    def _layer(self, files: range, base: Base | None) -> NewLayer:
        """base: what it lies on, where that is at the destination already."""
        chain = self._chain
        made_of = [chain.files[at] for at in files]
        cluster_size, grain = geometry(made_of)
        held = composed(chain, files)
        if base is not None and base.layer is not None and not files.start:
            # A root says nothing where it reads as zero; on layers that are there it must.
            held = over(Extents.constant(held.size, ZERO), held)
        return NewLayer(
            name=made_of[-1].path.name,
            image_format=made_of[-1].format,
            cluster_size=cluster_size,
            grain=grain,
            sources=sources_of(made_of, base.rest if base else ()),
            extents=held,
            view=chain.at(files.stop - 1),
            below=chain.at(files.start - 1) if files.start else None,
            below_sum=self.base.total if base is None else base.total,
            same_below=base.same if base else True,
        )

    def _difference(self) -> list[_Group]:
        """What has to be compared, as one layer."""
        base, count = self.base, len(self._chain.files)
        found = self._recognition.difference(base)
        # An empty layer makes the image known by its names, where what was counted here is not remembered.
        if found is not None and found.is_none and not self._there.believed:
            return []
        everything = to_read(Extents.constant(self._chain.size, DATA), self._chain).data_bytes
        if found is None or (self._there.branches and 2 * found.extents.data_bytes > everything):
            # Little is left of what is there: a chain of its own is worth more than a layer that hides it.
            self.base = replace(base, files=0, layer=None, compares=None, total=base.total - base.total)
            return self._grouped()
        layer = self._there.fitted(self._compared(found.extents, found))
        return [_Group(range(base.files, count), layer, publishes=True, shows=found.total)]

    def _compared(self, extents: Extents, found: Difference | None) -> NewLayer:
        chain = self._chain
        total: Sum = self.base.total
        return NewLayer(
            name=chain.top.path.name,
            image_format=chain.top.format,
            cluster_size=RAW_CLUSTER,
            grain=RAW_CLUSTER,
            sources=sources_of(chain.files),
            extents=extents,
            view=chain.at(len(chain.files) - 1),
            below=None if found is None else found.table,
            below_sum=total,
            same_below=False,
        )


__all__ = [
    "Divergence",
    "Files",
    "LayerPlan",
    "Scope",
    "ShipPlan",
    "ShipReport",
    "ShipRequest",
    "Shipment",
    "layers_lacking",
    "opened",
    "opening_of",
    "plan",
    "run",
    "send_blindly",
]
