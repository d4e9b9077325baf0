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

from snapchain.destinations import replica_at
from snapchain.errors import Corrupt, Diverged, SnapchainError
from snapchain.host.channel import Channel
from snapchain.host.retry import RetryPolicy, retry
from snapchain.image import ImageChain
from snapchain.image.qcow2.aligned import aligned
from snapchain.model import inventory as model
from snapchain.model.content import Sum, content_id, decode_sum, empty_sum
from snapchain.model.events import Notice, OnEvent, Progress, ignore
from snapchain.model.extents import ZERO, Extents, over
from snapchain.model.fingerprint import Fingerprint
from snapchain.model.inventory import Collapse, Held, Missing, Send, UpToDate, Wanted, missing
from snapchain.ops.ship.geometry import geometry
from snapchain.ops.ship.groups import composed, groups
from snapchain.ops.ship.recognise import recognised
from snapchain.ops.ship.request import Divergence, Files, LayerPlan, Request, Scope, SendPlan, SendReport
from snapchain.ops.ship.sources import keys, same_source, sources_of, wanted
from snapchain.replica.catalogue import keys_of
from snapchain.replica.client import waiting
from snapchain.replica.endpoint import Endpoint
from snapchain.replica.names import offered_name
from snapchain.replica.outgoing import OutgoingLayer
from snapchain.replica.sender import Marks, Sender
from snapchain.replica.sent_views import SentViews
from snapchain.replica.stream.compression import Link
from snapchain.replica.stream.messages import HeldLayer, Inventory, Open
from snapchain.source.chains import check_unchanged
from snapchain.source.counted_sums import CountedSums
from snapchain.source.lineage import noted_lineage
from snapchain.source.notes import Notes
from snapchain.source.ownership import epoch_of, note_epoch


@dataclass(frozen=True, slots=True)
class _Base:
    """What new layers lie on. files: how many of the source's it stands for; total: what these show, counted here.

    same: whether the replica shows that too; rest: parts of the next file that it lacks, where it has some of them
    """

    files: int
    parent: str | None
    size: int
    total: Sum
    same: bool = True
    rest: tuple[Fingerprint, ...] = ()


_NOTHING = _Base(0, None, 0, empty_sum())


def _covered(found: UpToDate | Send | Collapse, want: Sequence[Wanted]) -> int:
    """How many of the wanted files a replica has."""
    return len(want) if isinstance(found, UpToDate) else found.first


def plan_send(request: Request, endpoint: Endpoint, *, on_event: OnEvent = ignore) -> SendPlan:
    """What `send_to_replica` would do; changes nothing on either side. Raises as that does."""
    request.check()
    with (
        request.chain(on_event) as chain,
        endpoint.connect() as channel,
        Sender(channel, link=endpoint.link) as sender,
    ):
        held = sender.open(opening(request, endpoint, chain, look=True))
        run = _Run(chain, sender, request, endpoint.url, on_event, reads=False)
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

    held: what it said to `sender`. Sends nothing. Raises Diverged, and Corrupt as `send_to_replica`.
    """
    run = _Run(chain, sender, request, sender.peer, on_event)
    base = run.base(held, cut=lambda _keep: None)
    run.sums.flush()
    return tuple(run.planned(base))


def send_to_replica(request: Request, endpoint: Endpoint, *, on_event: OnEvent = ignore) -> SendReport:
    """Send what the replica lacks of an image, and publish a point.

    Raises Diverged when the replica holds what the image never was, Corrupt when its layers do not show what the files
    show that it says they were made of, Conflict when its epoch is newer, Busy when somebody writes to the image or
    the replica's disk, Unavailable when the link breaks: then the next run goes on at what is durable.
    """
    return _attempt(request, endpoint, on_event, lambda _count: None, Marks())


def send_persistently(
    request: Request, endpoint: Endpoint, *, policy: RetryPolicy, on_event: OnEvent = ignore
) -> SendReport:
    """As `send_to_replica`, again and again while the link breaks and something still becomes durable over there."""
    durable, marks = 0, Marks()

    def moved(count: int) -> None:
        nonlocal durable
        durable += count

    return retry(
        lambda: _attempt(request, endpoint, on_event, moved, marks),
        policy=policy,
        progress=lambda: durable,
        on_retry=lambda notice: on_event(Notice(str(notice))),
    )


def _attempt(
    request: Request, endpoint: Endpoint, on_event: OnEvent, moved: Callable[[int], None], marks: Marks
) -> SendReport:
    request.check()
    with (
        request.chain(on_event) as chain,
        endpoint.connect() as channel,
        Sender(channel, link=endpoint.link, limit_rate=request.limit_rate, marks=marks) as sender,
    ):
        try:
            held = sender.open(opening(request, endpoint, chain), on_wait=waiting(endpoint, on_event))
            _note_epoch(request, on_event)
            run = _Run(chain, sender, request, endpoint.url, on_event)
            try:
                return run.send(run.base(held, cut=sender.cut))
            finally:
                run.sums.flush()
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
        try:
            return run.send(_NOTHING)
        finally:
            run.sums.flush()


class _Run:
    def __init__(
        self,
        chain: ImageChain,
        sender: Sender,
        request: Request,
        destination: str,
        on_event: OnEvent,
        *,
        reads: bool = True,
    ) -> None:
        """reads: whether files are read where it is not remembered what they show; else the replica is believed."""
        self._chain, self._sender, self._destination = chain, sender, destination
        self._request, self._on_event, self._reads = request, on_event, reads
        self.sums = CountedSums(request.image, on_event)

    def base(self, held: Inventory, *, cut: Callable[[str | None], None]) -> _Base:
        """Where the new layers begin. cut: drops the replica's layers above the one named.

        Raises Diverged, and Corrupt where what the replica shows is not what the files here show.
        """
        if not held.layers:
            return _NOTHING
        lineage = (*self._request.lineage, *noted_lineage(self._chain, self._on_event))
        want = [wanted(file, lineage) for file in self._chain.files]
        found = self._missing(held.layers, want)
        if isinstance(found, model.Diverged):
            known = None if found.is_ahead else self._recognised(found, held)
            if known is not None:
                return self._on(held.layers[-1], known)
            if self._request.divergence is Divergence.REFUSE:
                raise self._diverged(found, held)
            return self._after_cut(held.layers[: found.base_count], held, want, cut)
        if isinstance(found, Collapse):
            self._on_event(
                Notice(
                    f"the replica holds {len(found.merges)} merged layers apart still; it reads the same, and "
                    "`snapchain merge` with rules merges there too"
                )
            )
        if not isinstance(found, UpToDate) and found.inside is not None:
            # The tip is a part of what was merged into the next layer. That counts from the files below it, and
            # stands for what the replica lacks of it; what the tip shows no file here knows any more.
            name = self._chain.files[found.first].path.name
            self._on_event(Notice(f"{name} was merged with what the replica lacks: all of it is sent"))
            tip, total = held.layers[-1], self._counted(found.first)
            return _Base(found.first, tip.id, tip.size, total, same=False, rest=keys(found.inside.rest))
        count = _covered(found, want)
        if self._is_true(held.layers[-1], count):
            return self._on(held.layers[-1], count)
        if self._request.divergence is Divergence.REFUSE:
            raise self._false(held, want)
        return self._after_cut(held.layers, held, want, cut)

    def _missing(self, layers: Sequence[HeldLayer], want: Sequence[Wanted]) -> Missing:
        return missing([Held(layer.id, keys_of(layer)) for layer in layers], want, same=same_source)

    def _on(self, layer: HeldLayer, count: int) -> _Base:
        return _Base(count, layer.id, layer.size, decode_sum(layer.content_sum))

    def _counted(self, count: int) -> Sum:
        """What the lowest `count` files show, by our own reading."""
        return self.sums.count(self._chain, count, on_bytes=self._reading("recognise"))

    def _is_true(self, layer: HeldLayer, count: int) -> bool:
        """Whether a layer of the replica shows what the lowest `count` files show here."""
        total = self.sums.of(self._chain, count)
        if total is None and not self._reads:
            return True
        if total is None:
            unread = self.sums.unread(self._chain, count)
            self._on_event(Notice(f"reading {unread} files, to compare them with what the replica says that it shows"))
            total = self._counted(count)
        size = self._chain.files[count - 1].size
        return (layer.size, layer.content_id) == (size, content_id(size, total))

    def _ends(self, layers: Sequence[HeldLayer], want: Sequence[Wanted]) -> Iterator[tuple[HeldLayer, int, bool]]:
        """The layers at whose ends files end, lowest first: how many of these, and whether both show the same.

        Up to the first where they do not.
        """
        for number in range(1, len(layers) + 1):
            found = self._missing(layers[:number], want)
            if isinstance(found, model.Diverged) or (not isinstance(found, UpToDate) and found.inside is not None):
                continue
            count = _covered(found, want)
            is_true = self._is_true(layers[number - 1], count)
            yield layers[number - 1], count, is_true
            if not is_true:
                return

    def _false(self, held: Inventory, want: Sequence[Wanted]) -> Corrupt:
        """The error for a replica whose layers are not what they should be; the lowest of them is named."""
        layer, count, _ = list(self._ends(held.layers, want))[-1]
        file = self._chain.files[count - 1].path
        return Corrupt(
            f"its layer {layer.file} does not show what {file} shows here, though it was made of that file by its own "
            "account",
            subject=f"{self._destination}::{self._request.disk}",
            hint="somebody has put other data there, or that file was changed after it was sent: `snapchain send "
            "--cut-replica` drops that layer and all above it there, and sends them again",
        )

    def _recognised(self, found: model.Diverged, held: Inventory) -> int | None:
        count = len(self._chain.files)
        self._on_event(
            Notice(f"{count - found.first} files are not known to the replica; reading them to see what they show")
        )
        whole = sum(file.extents.data_bytes for file in self._chain.files[found.first :])
        return recognised(self._chain, count, found, held, self.sums, on_bytes=self._reading("recognise", whole))

    def _reading(self, phase: str, whole: int = 0) -> Callable[[int], None]:
        done = 0

        def on_bytes(count: int) -> None:
            nonlocal done
            done += count
            self._on_event(Progress(phase, done, max(done, whole)))

        return on_bytes

    def _after_cut(
        self,
        common: Sequence[HeldLayer],
        held: Inventory,
        want: Sequence[Wanted],
        cut: Callable[[str | None], None],
    ) -> _Base:
        """Cut off all above the uppermost of the common layers that shows what the files here show."""
        keep = next(((each, n) for each, n, is_true in reversed(list(self._ends(common, want))) if is_true), None)
        dropped = len(held.layers) if keep is None else len(held.layers) - 1 - held.layers.index(keep[0])
        self._on_event(Notice(f"the replica drops {dropped} layers, and the points that they give"))
        cut(None if keep is None else keep[0].id)
        return _NOTHING if keep is None else self._on(*keep)

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
            if any(same_source(file.fingerprint, source) for source in sources)
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
            self.sums.note(self._chain, groups[at].stop, total)
        shown = content_id(size, total)
        self._sender.send_point(time=datetime.now(UTC), labels=self._request.labels, size=size, shown=shown)
        finished = self._sender.finish()
        if finished is not None:
            self._remember()
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

    def _remember(self) -> None:
        """What was sent, for `verify`."""
        try:
            SentViews(self._destination, self._request.disk).note(self._chain, self.sums)
        except SnapchainError as error:
            self._on_event(Notice(f"`verify` cannot compare what was sent with what is there: {error}"))

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
            below_sum=base.total if base else empty_sum(),
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
