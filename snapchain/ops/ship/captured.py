"""A disk that was captured while its guest goes on (guest/capture.py): what a destination lacks of it, as one layer.

    bitmap     only what a dirty bitmap lists since the destination's newest content is read, and compared with it
    compared   no bitmap goes back to that content: all is read and compared; only what differs is stored
    whole      the destination has nothing of the disk yet

The hashes of a replica are its own word.  Where a bitmap limits what is read, they are believed as far as the content
id that they add up to is the one in the bitmap's name, which this host has counted itself.
"""

from __future__ import annotations

import time as clock
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime

import numpy as np

from snapchain.destination.writing import HeldLayer, LayerWriter, Moment, NewLayer, Opening, TakesLayers
from snapchain.errors import Corrupt
from snapchain.guest.capture import CapturedDisk
from snapchain.image.leaves import LeafTable
from snapchain.image.view import View
from snapchain.model.content import Sum, empty_sum
from snapchain.model.events import Notice, OnEvent, counting
from snapchain.model.extents import ABSENT, DATA, Extents
from snapchain.ops.ship.compare import Difference, compare, region_of, to_read
from snapchain.ops.ship.grouping import RAW_CLUSTER
from snapchain.ops.ship.request import CapturedBy, ShipReport, is_unchanged


@dataclass(frozen=True, slots=True)
class Stored:
    """top: the chain that shows the disk, to be published; layers: that were made

    why: no bitmap could be used, a sentence
    """

    top: HeldLayer
    layers: int
    captured_by: CapturedBy
    why: str | None = None


def store(disk: CapturedDisk, writer: LayerWriter, *, subject: str, on_event: OnEvent) -> Stored:
    """Bring a destination up to a captured disk; nothing is published. subject: DEST::DISK, for people.

    Raises Corrupt where a destination contradicts itself, Unsupported where a replica is too old for comparing, and
    what reading the disk and writing there raise.
    """
    if not writer.held:
        top = _added(writer, _whole(disk), None, on_event)
        return Stored(top, 1, CapturedBy.WHOLE)
    tip = writer.held[-1]
    changed, why = disk.changed_since(tip.content_id, tip.size)
    view: View = disk.view if changed is None else disk.unmapped
    if changed is None:
        on_event(Notice(f"disk {disk.name} is read as a whole: {why}"))
    region = region_of(changed, view, tip)
    on_bytes = counting("compare", to_read(region, view).data_bytes, on_event)
    found = compare(view, tip, writer.leaves(), region, on_bytes=on_bytes)
    by = CapturedBy.COMPARED if changed is None else CapturedBy.BITMAP
    if changed is None and not (found.total == found.read).all():
        if not writer.believed:
            raise Corrupt(
                f"the leaf hashes of its layer {tip.name!a} contradict the content id that it announces",
                subject=subject,
                hint="verify the replica: snapchain verify",
            )
        # The records contradict each other: a chain of its own needs none of them.
        return Stored(_added(writer, _whole(disk), None, on_event), 1, CapturedBy.WHOLE, why)
    if found.is_none and tip.size == disk.size:
        return Stored(tip, 0, by, why)
    top = _added(writer, _difference(disk, view, found, tip), tip, on_event)
    if not (top.total == found.total).all():
        raise Corrupt(
            f"its new layer {top.name} does not show what disk {disk.name} of the guest showed",
            subject=subject,
            hint="no point was published; report this",
        )
    return Stored(top, 1, by, why)


def ship(
    disk: CapturedDisk,
    opening: Opening,
    destination: TakesLayers,
    *,
    before_publishing: Callable[[str], None],
    time: datetime,
    labels: Sequence[str],
    moment: Moment,
    on_event: OnEvent,
) -> ShipReport:
    """Bring a destination up to a captured disk, and publish a point of it.

    before_publishing: called with the content id of the point. Raises as `store`, and as writing does.
    """
    begun = clock.monotonic()
    subject = f"{destination.url}::{opening.disk}"

    def write(writer: LayerWriter) -> ShipReport:
        read = disk.bytes_read
        newest = writer.held[-1] if writer.held and not writer.mends else None
        stored = store(disk, writer, subject=subject, on_event=on_event)
        top = stored.top
        before_publishing(top.content_id)
        writer.publish(top, time=time, labels=labels, moment=moment)
        finished = writer.finish()
        points, traffic = finished.points or (), writer.traffic
        return ShipReport(
            disk=opening.disk,
            destination=destination.url,
            point=points[-1] if points else None,
            points=points,
            layers_sent=stored.layers,
            layers_present=len(writer.held),
            bytes_read=disk.bytes_read - read,
            bytes_stored=traffic.stored,
            bytes_sent=traffic.sent,
            data_bytes=traffic.data,
            carried_bytes=traffic.carried,
            resumed=traffic.resumed,
            virtual_size=top.size,
            content_id=top.content_id,
            damaged=finished.damaged,
            unchanged=is_unchanged(newest, top),
            captured_by=stored.captured_by,
            captured_why=stored.why,
            seconds=clock.monotonic() - begun,
        )

    return destination.write(opening, write, on_event=on_event)


def _added(writer: LayerWriter, layer: NewLayer, parent: HeldLayer | None, on_event: OnEvent) -> HeldLayer:
    fitted = writer.fitted(layer)
    shown = _Arriving(counting("ship", fitted.amount, on_event))
    return writer.add(fitted, parent, confirm=_frozen, on_bytes=shown.arrived)


def _frozen() -> None:
    """A captured view does not change; where it broke, reading has failed."""


@dataclass(slots=True)
class _Arriving:
    """Totals as `LayerWriter.add` gives them, told as increments."""

    tell: Callable[[int], None]
    known: int = 0

    def arrived(self, total: int) -> None:
        """So many bytes by now; in any thread."""
        if total > self.known:
            more, self.known = total - self.known, total
            self.tell(more)


def _whole(disk: CapturedDisk) -> NewLayer:
    shown = disk.view.resolve()
    extents = shown.mapped(np.where(shown.val >= DATA, np.int64(DATA), np.int64(ABSENT)))
    return _layer(disk, disk.view, extents, None, empty_sum())


def _difference(disk: CapturedDisk, view: View, found: Difference, tip: HeldLayer) -> NewLayer:
    return _layer(disk, view, found.extents, found.table, tip.total)


def _layer(disk: CapturedDisk, view: View, extents: Extents, below: LeafTable | None, below_sum: Sum) -> NewLayer:
    return NewLayer(
        name=disk.name if disk.path is None else disk.path.name,
        image_format=disk.image_format,
        cluster_size=RAW_CLUSTER,
        grain=RAW_CLUSTER,
        sources=disk.sources,
        extents=extents,
        view=view,
        below=below,
        below_sum=below_sum,
        same_below=below is None,
    )
