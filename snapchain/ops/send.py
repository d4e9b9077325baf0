"""send: bring what a replica lacks of an image, as qcow2 layers that are ready to run, and publish a point.

    scan + lock -> the replica's inventory -> missing(have, want) -> groups of files, each one layer -> stream

What to send is decided from both inventories; where the two sides have gone different ways nothing is sent at all.
Pending overlays become one layer, so that redundant overwrites never cross the wire; the root stays a layer of its
own, and so does the top, unless much of them is overwritten too.  With `Files.EACH` every file becomes a layer under
its own name.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime

from snapchain.errors import Diverged, SnapchainError
from snapchain.host.remote_channel import Channel
from snapchain.host.remote_retry import Persistence, persist
from snapchain.image import ImageChain
from snapchain.image.qcow2.aligned import aligned
from snapchain.model import inventory as model
from snapchain.model.content import Sum, content_id, empty_sum
from snapchain.model.extents import ZERO, Extents, over
from snapchain.model.inventory import Collapse, Held, Send, UpToDate, missing
from snapchain.ops.events import Notice, OnEvent, Progress, ignore
from snapchain.ops.lineage import noted_lineage
from snapchain.ops.notes import Notes
from snapchain.ops.ownership import epoch_of, note_epoch
from snapchain.ops.replica_endpoint import replica_at
from snapchain.ops.replica_waiting import waiting
from snapchain.ops.send_geometry import geometry
from snapchain.ops.send_groups import composed, groups
from snapchain.ops.send_recognise import counted_up, recognised
from snapchain.ops.send_request import Divergence, Files, LayerPlan, Request, Scope, SendPlan, SendReport
from snapchain.ops.send_sources import keys, same_source, source_of, sources_of, wanted
from snapchain.ops.source import check_unchanged
from snapchain.replica.catalogue import decode_sum
from snapchain.replica.endpoint import Endpoint
from snapchain.replica.levels import Link
from snapchain.replica.names import offered_name
from snapchain.replica.outgoing import OutgoingLayer
from snapchain.replica.sender import Sender
from snapchain.replica.source_keys import keys_of
from snapchain.replica.stream.messages import Inventory, Open, Source


@dataclass(frozen=True, slots=True)
class _Base:
    """What new layers lie on. files: how many of the source's it stands for; total: its content sum.

    rest: parts of the next file that the replica lacks, where it has some of them
    """

    files: int
    parent: str | None
    size: int
    total: Sum
    lower_total: Sum
    same: bool
    rest: tuple[Source, ...] = ()


def plan_send(request: Request, endpoint: Endpoint, *, on_event: OnEvent = ignore) -> SendPlan:
    """What `send_to_replica` would do; changes nothing on either side. Raises as that does."""
    request.check()
    with (
        request.chain(on_event) as chain,
        endpoint.connect() as channel,
        Sender(channel, link=endpoint.link) as sender,
    ):
        held = sender.open(opening(request, endpoint, chain, look=True))
        run = _Run(chain, sender, request, endpoint.url, on_event)
        base = run.base(held, cut=lambda _keep: None)
        layers = tuple(run.planned(base))
        sender.finish()
    return SendPlan(
        image=str(request.image),
        destination=endpoint.url,
        disk=request.disk,
        layers_present=base.files,
        layers=layers,
        data_bytes=sum(layer.data_bytes for layer in layers),
        labels=tuple(request.labels),
    )


def opening(request: Request, endpoint: Endpoint, chain: ImageChain, *, look: bool = False) -> Open:
    """How a transfer of that chain begins. look: only the inventory is wanted."""
    epoch = _epoch(request, chain)
    by_name = request.epoch == epoch > 1
    return Open(disk=request.disk, replica=endpoint.replica, look=look, epoch=epoch, by_name=by_name)


def _epoch(request: Request, chain: ImageChain) -> int:
    return max(request.epoch, epoch_of(chain, Notes(), image=request.image))


def layers_lacking(
    request: Request, chain: ImageChain, sender: Sender, held: Inventory, *, on_event: OnEvent = ignore
) -> tuple[LayerPlan, ...]:
    """The layers that `send` would make of those files of a chain that a replica does not show.

    held: what it said to `sender`. Sends nothing. Raises Diverged.
    """
    run = _Run(chain, sender, request, sender.peer, on_event)
    base = run.base(held, cut=lambda _keep: None)
    return tuple(run.planned(base))


def send_to_replica(request: Request, endpoint: Endpoint, *, on_event: OnEvent = ignore) -> SendReport:
    """Send what the replica lacks of an image, and publish a point.

    Raises Diverged when the replica holds what the image never was, Conflict when its epoch is newer, Busy when
    somebody writes to the image or the replica's disk, Unavailable when the link breaks: then the next run goes on at
    what is durable.
    """
    return _attempt(request, endpoint, on_event, lambda _count: None)


def send_persistently(
    request: Request, endpoint: Endpoint, *, policy: Persistence, on_event: OnEvent = ignore
) -> SendReport:
    """As `send_to_replica`, again and again while the link breaks and something still becomes durable over there."""
    durable = 0

    def moved(count: int) -> None:
        nonlocal durable
        durable += count

    return persist(
        lambda: _attempt(request, endpoint, on_event, moved),
        policy=policy,
        moved=lambda: durable,
        told=lambda retry: on_event(Notice(str(retry))),
    )


def _attempt(request: Request, endpoint: Endpoint, on_event: OnEvent, moved: Callable[[int], None]) -> SendReport:
    request.check()
    with (
        request.chain(on_event) as chain,
        endpoint.connect() as channel,
        Sender(channel, link=endpoint.link, limit_rate=request.limit_rate) as sender,
    ):
        try:
            held = sender.open(opening(request, endpoint, chain), on_wait=waiting(endpoint, on_event))
            _note_epoch(request, on_event)
            run = _Run(chain, sender, request, endpoint.url, on_event)
            return run.send(run.base(held, cut=sender.cut))
        finally:
            moved(sender.confirmations)


def _note_epoch(request: Request, on_event: OnEvent) -> None:
    """Beside the image, once the replica has it: whoever sends it next must not say an older one."""
    if request.epoch == 1:
        return
    try:
        note_epoch(request.image, request.epoch)
    except SnapchainError as error:
        on_event(Notice(f"the epoch is not noted here, so say --epoch {request.epoch} each time: {error}"))


def send_blindly(request: Request, channel: Channel, *, on_event: OnEvent = ignore) -> SendReport:
    """Write a whole image as a stream that nobody answers: to be saved, or piped to `snapchain receive`.

    The channel is closed at the end. Raises as `send_to_replica`.
    """
    request.check()
    with (
        channel,
        request.chain(on_event) as chain,
        Sender(channel, link=Link.NETWORK, answers=False, limit_rate=request.limit_rate) as sender,
    ):
        sender.open_blindly(Open(disk=request.disk, epoch=_epoch(request, chain)))
        run = _Run(chain, sender, request, channel.peer, on_event)
        return run.send(_Base(0, None, 0, empty_sum(), empty_sum(), same=True))


class _Run:
    def __init__(
        self, chain: ImageChain, sender: Sender, request: Request, destination: str, on_event: OnEvent
    ) -> None:
        self._chain, self._sender, self._destination = chain, sender, destination
        self._request, self._on_event = request, on_event

    def base(self, held: Inventory, *, cut: Callable[[str | None], None]) -> _Base:
        """Where the new layers begin. cut: drops the replica's layers above the one named. Raises Diverged."""
        count = len(self._chain.files)
        if not held.layers:
            return _Base(0, None, 0, empty_sum(), empty_sum(), same=True)
        lineage = (*self._request.lineage, *noted_lineage(self._chain, self._on_event))
        found = missing(
            [Held(layer.id, keys_of(layer)) for layer in held.layers],
            [wanted(file, lineage) for file in self._chain.files[:count]],
            same=same_source,
        )
        tip = held.layers[-1]
        total = decode_sum(tip.content_sum)
        match found:
            case UpToDate():
                return _Base(count, tip.id, tip.size, total, total, same=True)
            case Send() | Collapse():
                if isinstance(found, Collapse):
                    self._on_event(
                        Notice(
                            f"the replica holds {len(found.merges)} merged layers apart still; it reads the same, and "
                            "`snapchain merge` with rules merges there too"
                        )
                    )
                if found.inside is None:
                    return _Base(found.first, tip.id, tip.size, total, total, same=True)
                # The tip is a part of what was merged into the next layer. That counts from the files below it, and
                # stands for what the replica lacks of it; what the tip shows no file here knows any more.
                name = self._chain.files[found.first].path.name
                self._on_event(Notice(f"{name} was merged with what the replica lacks: all of it is sent"))
                lower = counted_up(self._chain, found.first, found.inside, held, on_bytes=self._reading("recognise"))
                return _Base(found.first, tip.id, tip.size, total, lower, False, keys(found.inside.rest))
            case model.Diverged():
                known = None if found.is_ahead else self._recognised(found, held, count)
                if known is not None:
                    return _Base(known, tip.id, tip.size, total, total, same=True)
                if self._request.divergence is Divergence.REFUSE:
                    raise self._diverged(found, held)
                return self._after_cut(found, held, cut)

    def _recognised(self, found: model.Diverged, held: Inventory, count: int) -> int | None:
        self._on_event(
            Notice(f"{count - found.first} files are not known to the replica; reading them to see what they show")
        )
        whole = sum(file.extents.data_bytes for file in self._chain.files[found.first : count])
        return recognised(self._chain, count, found, held, on_bytes=self._reading("recognise", whole))

    def _reading(self, phase: str, whole: int = 0) -> Callable[[int], None]:
        done = 0

        def on_bytes(count: int) -> None:
            nonlocal done
            done += count
            self._on_event(Progress(phase, done, max(done, whole)))

        return on_bytes

    def _after_cut(self, found: model.Diverged, held: Inventory, cut: Callable[[str | None], None]) -> _Base:
        self._on_event(Notice(f"the replica drops {len(found.theirs)} layers, and the points that they give"))
        if not found.base_count:
            cut(None)
            return _Base(0, None, 0, empty_sum(), empty_sum(), same=True)
        keep = held.layers[found.base_count - 1]
        cut(keep.id)
        total = decode_sum(keep.content_sum)
        return _Base(found.first, keep.id, keep.size, total, total, same=True)

    def _diverged(self, found: model.Diverged, held: Inventory) -> Diverged:
        files = {layer.id: layer.file for layer in held.layers}
        theirs = _listed([files[layer] for layer in found.theirs])
        ours = _listed([file.path.name for file in self._chain.files[found.first :]])
        if found.is_ahead:
            what = f"the replica is ahead: it holds {theirs} on top of all that the image has"
        elif found.is_related:
            common = held.layers[found.base_count - 1].file
            what = f"both sides have gone on from {common}: here {ours}, at the replica {theirs}"
        elif known := self._known_there(held):
            what = f"the replica holds {known} in one layer with what was written to since it was sent: {theirs}"
        else:
            what = f"the replica holds another disk under this name: {theirs}; nothing of {ours} is known there"
        return Diverged(
            what,
            subject=f"{self._destination}::{self._request.disk}",
            hint="send under another disk name; or, if what the replica has beyond may go, cut it off there "
            "(--cut-replica)",
        )

    def _known_there(self, held: Inventory) -> str:
        """Files of the image that are parts of layers there."""
        sources = [source for layer in held.layers for source in layer.sources]
        files = [
            file.path.name
            for file in self._chain.files
            if any(same_source(source_of(file), source) for source in sources)
        ]
        return _listed(files)

    def planned(self, base: _Base) -> Iterator[LayerPlan]:
        """The layers that `send` would make."""
        for at, group in enumerate(self._groups(base)):
            layer = self._outgoing(group, base if at == 0 else None)
            files = tuple(str(self._chain.files[at].path) for at in group)
            yield LayerPlan(files=files, virtual_size=layer.extents.size, data_bytes=layer.extents.data_bytes)

    def send(self, base: _Base) -> SendReport:
        """Send the files above the base, publish, and wait until all is durable."""
        begun = time.monotonic()
        groups = self._groups(base)
        layers = [self._outgoing(group, base if at == 0 else None) for at, group in enumerate(groups)]
        whole = sum(layer.extents.data_bytes for layer in layers)
        done = 0
        telling = threading.Lock()

        def on_bytes(count: int) -> None:
            nonlocal done
            with telling:
                done += count
                self._on_event(Progress("send", done, whole))

        on_bytes(0)
        parent, size, total, resumed = base.parent, base.size, base.total, False
        for at, layer in enumerate(layers):
            sent = self._sender.send_layer(
                layer if at == 0 else _on(layer, total),
                parent,
                confirm=lambda: check_unchanged(self._chain),
                on_bytes=on_bytes,
            )
            parent, size, total, resumed = sent.layer, sent.size, sent.total, resumed or sent.resumed_at > 0
        shown = content_id(size, total)
        self._sender.send_point(time=datetime.now(UTC), labels=self._request.labels, size=size, shown=shown)
        finished = self._sender.finish()
        return SendReport(
            disk=self._request.disk,
            destination=self._destination,
            point=finished.points[-1] if finished is not None and finished.points else None,
            layers_sent=len(layers),
            layers_present=base.files,
            bytes_sent=self._sender.bytes_sent,
            data_bytes=self._sender.traffic.data,
            carried_bytes=self._sender.traffic.carried,
            resumed=resumed,
            virtual_size=size,
            content_id=shown,
            seconds=time.monotonic() - begun,
        )

    def _groups(self, base: _Base) -> list[range]:
        each = self._request.files is Files.EACH
        return groups(self._chain, base.files, below=base.size, each=each)

    def _outgoing(self, group: range, base: _Base | None) -> OutgoingLayer:
        files = [self._chain.files[at] for at in group]
        view = self._chain.at(group.stop - 1)
        below = self._chain.at(group.start - 1) if group.start else None
        cluster_size, grain = geometry(files)
        shown = view.resolve().owned_by(0)
        held = composed(self._chain, group)
        if base is not None and base.parent is not None and not group.start:
            # A root says nothing where it reads as zero; on layers of the replica it must.
            held = over(Extents.constant(held.size, ZERO), held)
        return OutgoingLayer(
            name=offered_name(files[-1].path.name),
            cluster_size=cluster_size,
            extended_l2=grain < cluster_size,
            sources=sources_of(files, base.rest if base else ()),
            extents=aligned(held, shown, cluster_size=grain),
            view=view,
            below=below,
            below_sum=base.lower_total if base else empty_sum(),
            same_below=base.same if base else True,
        )


def _on(layer: OutgoingLayer, total: Sum) -> OutgoingLayer:
    return replace(layer, below_sum=total)


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(ascii(name)[1:-1] for name in names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"


__all__ = [
    "Divergence",
    "Files",
    "LayerPlan",
    "Request",
    "Scope",
    "SendPlan",
    "SendReport",
    "layers_lacking",
    "opening",
    "plan_send",
    "replica_at",
    "send_blindly",
    "send_persistently",
    "send_to_replica",
]
