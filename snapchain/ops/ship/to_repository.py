"""ship: bring what a repository lacks of an image, and publish a point.

    scan + lock -> missing(have, want) -> plan: which files make which new layers -> run: take in, write, publish

The root of a chain becomes a layer of its own; pending overlays are composed into one, so that redundant
overwrites are neither stored nor sent; the top stays apart where that makes the next shipment cheaper.
With `each_layer` every file becomes a layer and a point.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import takewhile
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from snapchain.errors import Conflict, Corrupt
from snapchain.image import ImageChain
from snapchain.model.content import LEAF_BYTES
from snapchain.model.events import Notice, OnEvent, Progress, ignore
from snapchain.model.extents import Extents, fold, over, rounded
from snapchain.model.fingerprint import same_file
from snapchain.model.inventory import Held, UpToDate, Wanted, missing
from snapchain.model.points import check_label
from snapchain.objects.reserve import fill as fill_reserve
from snapchain.ops.ship.sources import wanted
from snapchain.repository.catalogue import Catalogue, Disk, Point
from snapchain.repository.index import BlobIndex
from snapchain.repository.layer_writer import LayerUpload, Origin
from snapchain.repository.layers import StoredLayer
from snapchain.repository.leases import Lease, Mode
from snapchain.repository.repository import Repository
from snapchain.repository.soundness import damaged_points, is_whole
from snapchain.source.chains import check_unchanged, locked_chain
from snapchain.source.lineage import noted_lineage
from snapchain.source.ownership import check_not_given

_ATTEMPTS = 8
_LOOKS = 3
"""How often a shipment begins again because damage came to light."""
_LATEST = 32_503_680_000.0
"""The year 3000, in seconds since 1970."""
_RAW_CLUSTER = 64 * 1024
"""The cluster size noted for a raw file, for the day when it is restored as qcow2."""


class _Shown(BaseModel):
    model_config = ConfigDict(frozen=True)


class LayerPlan(_Shown):
    """A layer to be made. files: composed into it, lower first; bytes_to_read: guest bytes, in whole leaves."""

    files: tuple[str, ...]
    virtual_size: int
    bytes_to_read: int
    publishes: bool


class ShipPlan(_Shown):
    """What `ship` would do. layers_present: of the chain, recognised without reading their data."""

    image: str
    destination: str
    disk: str
    layers_present: int
    layers: tuple[LayerPlan, ...]
    bytes_to_read: int
    labels: tuple[str, ...]
    note: str | None


class ShipReport(_Shown):
    """What `ship` did.

    points: all numbers published; point: the last of them, which is the image as given; damaged: earlier points of the
    disk of which the repository has lost bytes that the image no longer has
    """

    disk: str
    point: int
    points: tuple[int, ...]
    layers_sent: int
    layers_present: int
    bytes_read: int
    bytes_stored: int
    virtual_size: int
    content_id: str
    damaged: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class _Group:
    """Files [first, stop) of the chain, which become one layer, and then a point or not."""

    first: int
    stop: int
    publishes: bool


@dataclass(frozen=True, slots=True)
class _Composed:
    """Some neighbouring files of a chain as the source of one layer (repository.intake.LayerSource)."""

    extents: Extents
    view: ImageChain

    @property
    def size(self) -> int:
        return self.view.size

    def read_into(self, offset: int, buffer: memoryview) -> None:
        self.view.read_into(offset, buffer)


class Shipment:
    """An image and a repository, both open. Make it by `shipment`."""

    def __init__(
        self,
        chain: ImageChain,
        repository: Repository,
        disk: str,
        *,
        labels: Sequence[str],
        each_layer: bool,
        lineage: Sequence[Wanted] = (),
        time: datetime | None = None,
    ) -> None:
        self._chain, self._repository = chain, repository
        self._disk: Disk = repository.disk(disk)
        self._labels = tuple(labels)
        self._each_layer = each_layer
        self._time = time
        self._lineage = tuple(lineage)
        self._mends = False
        self._look()

    def _look(self) -> None:
        """See what the disk has, and decide what it lacks."""
        self._current = self._disk.read()
        self._have = have = self._stored()
        self._latest = self._latest_chain()
        self._build_on(have)
        self._note = None
        if have and self._first == 0:
            self._note = (
                f"no layer of disk {self._disk.name} is known to be part of this image: all of it is read again"
            )

    def _build_on(self, have: Sequence[StoredLayer]) -> None:
        """have: layers of the newest point, from the root up, that can be built on."""
        found = missing(
            [Held(layer.id, layer.header.sources) for layer in have],
            [wanted(file, self._lineage) for file in self._chain.files],
            same=same_file,
        )
        count = len(self._chain.files)
        self._base = list(have[: found.base_count])
        self._first = count if isinstance(found, UpToDate) else found.first
        self._groups = tuple(self._grouped(self._first, count))

    def plan(self) -> ShipPlan:
        """What `run` will do, in bytes."""
        layers = tuple(
            LayerPlan(
                files=tuple(str(file.path) for file in self._chain.files[group.first : group.stop]),
                virtual_size=self._chain.files[group.stop - 1].size,
                bytes_to_read=rounded(self._extents(group), LEAF_BYTES).data_bytes,
                publishes=group.publishes,
            )
            for group in self._groups
        )
        return ShipPlan(
            image=str(self._chain.files[-1].path),
            destination=self._repository.store.url,
            disk=self._disk.name,
            layers_present=self._first,
            layers=layers,
            bytes_to_read=sum(layer.bytes_to_read for layer in layers),
            labels=self._labels,
            note=self._note,
        )

    def run(self, *, on_event: OnEvent = ignore) -> ShipReport:
        """Ship and publish. Raises Conflict when the image or the disk was changed by others meanwhile."""
        points: list[Point] = []
        with self._lease(on_event) as lease:
            self._look_again()
            for attempt in range(_LOOKS):
                try:
                    report = self._run(points, lease, on_event)
                except Corrupt:
                    lease.check()  # after a collection meanwhile, a missing object is no damage
                    # What lies below turned out to be damaged: from now on that is known, and can be made good.
                    if not self._repository.record_damage() or attempt == _LOOKS - 1:
                        raise
                    self._look()
                else:
                    fill_reserve(self._repository.store)
                    return report
        raise AssertionError("the loop returns or raises")

    def _run(self, points: list[Point], lease: Lease, on_event: OnEvent) -> ShipReport:
        arrival = _Arrival(on_event)
        with LayerUpload(self._repository, on_durable=arrival.show) as deposit:
            self._avoid_damage(deposit.index, lease, on_event)
            if self._note:
                on_event(Notice(self._note))
            total = self.plan().bytes_to_read
            chain = list(self._base)
            if not self._groups:
                points.append(self._publish(chain, self._time_of(len(self._chain.files)), lease.check))
            else:
                arrival.begin(deposit, total)
            for group in self._groups:
                if self._adds(group, chain):
                    chain.append(self._add(group, chain, deposit, arrival.read))
                    arrival.show()
                if group.publishes:
                    points.append(self._publish(chain, self._time_of(group.stop), lease.check))
            return self._report(
                points,
                chain,
                bytes_read=deposit.bytes_read,
                bytes_stored=deposit.bytes_stored,
                damaged=self._find_damage(deposit.index, on_event),
            )

    def _avoid_damage(self, index: BlobIndex, lease: Lease, on_event: OnEvent) -> None:
        """Plan to ship the image's layers again whose blobs lie in damaged packs.

        From the lowest damaged layer up each file becomes a layer of its own, so that older points find their content
        again, wherever their layers ended.
        """
        for error in index.unreadable:
            on_event(Notice(f"{error}: the blobs that it lists are stored again"))
        if index.avoid:
            lease.check()
            self._repository.record_damage()
        whole = self._have
        if index.avoid:
            whole = list(takewhile(lambda layer: is_whole(layer, index), whole))
        is_damaged = len(whole) < len(self._latest)
        self._mends = is_damaged or bool(index.avoid)
        if not is_damaged:
            return
        on_event(Notice(f"disk {self._disk.name} is damaged: the data that the image still has is stored again"))
        self._build_on(whole)
        count = len(self._chain.files)
        self._groups = tuple(
            _Group(at, at + 1, publishes=self._each_layer or at == count - 1) for at in range(self._first, count)
        )

    def _find_damage(self, index: BlobIndex, on_event: OnEvent) -> tuple[int, ...]:
        """Points of the disk that stay damaged, since the image no longer has their bytes."""
        if not self._mends or self._current is None:
            return ()
        found = damaged_points(self._repository, self._current[0], index)
        if found:
            numbers = ", ".join(map(str, found))
            words = f"points that stay damaged, since the image no longer has their data: {numbers}"
            on_event(Notice(f"disk {self._disk.name}: {words}"))
        return found

    def _report(
        self,
        points: Sequence[Point],
        chain: Sequence[StoredLayer],
        *,
        bytes_read: int,
        bytes_stored: int,
        damaged: tuple[int, ...],
    ) -> ShipReport:
        last = points[-1]
        return ShipReport(
            disk=self._disk.name,
            point=last.point,
            points=tuple(point.point for point in points),
            layers_sent=len(chain) - len(self._base),
            layers_present=self._first,
            bytes_read=bytes_read,
            bytes_stored=bytes_stored,
            virtual_size=last.size,
            content_id=last.content_id,
            damaged=damaged,
        )

    def _look_again(self) -> None:
        """Raises Conflict when what this builds on was merged away, and perhaps collected, before it had its lease."""
        self._current = self._disk.read()
        if self._current is not None:
            _check_base(self._current[0], [layer.id for layer in self._base], _links(self._base))

    def _lease(self, on_event: OnEvent) -> Lease:
        work = f"ship {self._disk.name}"
        return self._repository.lease(
            Mode.WRITE, work, on_wait=lambda words: on_event(Notice(words)), disks=[self._disk.name]
        )

    def _stored(self) -> list[StoredLayer]:
        """The layers of the newest point, from the root up to the first whose record is lost."""
        if self._current is None or self._current[0].latest is None:
            return []
        catalogue = self._current[0]
        try:
            return self._repository.chain(catalogue, self._current[0].latest.layer)
        except Corrupt:
            found: list[StoredLayer] = []
            with suppress(Corrupt):
                found.extend(self._repository.layer(layer) for layer in self._latest_chain())
            return found

    def _latest_chain(self) -> tuple[str, ...]:
        """The newest point's layers as the catalogue names them, root first; without a whole chain, its top."""
        latest = self._current[0].latest if self._current else None
        if self._current is None or latest is None:
            return ()
        try:
            return self._current[0].chain(latest.layer)
        except Corrupt:
            return (latest.layer,)

    def _grouped(self, first: int, count: int) -> Iterator[_Group]:
        if self._each_layer:
            yield from (_Group(at, at + 1, publishes=True) for at in range(first, count))
            return
        if first == 0 and count > 1:
            yield _Group(0, 1, publishes=False)
            first = 1
        top = count - 1
        if first < top and not self._top_joins(first, top):
            yield _Group(first, top, publishes=False)
            first = top
        if first < count:
            yield _Group(first, count, publishes=True)

    def _top_joins(self, first: int, top: int) -> bool:
        """Whether the top becomes one layer with the pending sealed files below it, though it will be written to.

        It does when it hides at least half of their data: then both show at most twice what the top holds, and that is
        what reading them again costs when it has changed.  Otherwise the sealed ones are a layer of their own, which
        the next shipment knows without reading it.
        """
        above = self._chain.files[top].extents
        sealed = fold(file.extents for file in self._chain.files[first:top])
        seen = over(sealed.owned_by(0), above.owned_by(1))
        shown = seen.bytes_where(seen.val == 0)
        return above != Extents.absent(above.size) and 2 * shown <= sealed.data_bytes

    def _extents(self, group: _Group) -> Extents:
        return fold(file.extents for file in self._chain.files[group.first : group.stop])

    def _time_of(self, stop: int) -> datetime:
        """Now for the image as given, unless somebody knows better; for a sealed file below it, its last write."""
        if stop == len(self._chain.files):
            return self._time or datetime.now(UTC)
        seconds = self._chain.files[stop - 1].fingerprint.mtime_ns / 1e9
        # Some filesystems hold times of years that no calendar here knows.
        return datetime.fromtimestamp(min(max(seconds, 0.0), _LATEST), UTC)

    def _adds(self, group: _Group, below: Sequence[StoredLayer]) -> bool:
        """False for fresh overlays, which say nothing: their point is that of the layer below."""
        extents = self._extents(group)
        return not below or extents != Extents.absent(below[-1].size)

    def _add(
        self, group: _Group, below: Sequence[StoredLayer], deposit: LayerUpload, on_bytes: Callable[[int], None]
    ) -> StoredLayer:
        files = self._chain.files[group.first : group.stop]
        top = files[-1]
        origin = Origin(
            name=top.path.name,
            image_format=top.format,
            cluster_size=max(512, min(file.cluster_size or _RAW_CLUSTER for file in files)),
            sources=tuple(file.fingerprint for file in files),
        )
        composed = _Composed(self._extents(group), self._chain.at(group.stop - 1))
        return deposit.add(composed, below, origin, on_bytes=on_bytes, confirm=lambda: check_unchanged(self._chain))

    def _publish(self, chain: Sequence[StoredLayer], time: datetime, check: Callable[[], None]) -> Point:
        """Make the next point of the disk name this chain. Raises Conflict when its base was merged away meanwhile.

        check: called before each attempt: who overtook us may have been a collector that took us for dead.
        """
        top = chain[-1].header
        links = _links(chain)
        for attempt in range(_ATTEMPTS):
            catalogue = self._current[0] if self._current else None
            if catalogue is not None:
                _check_base(catalogue, [layer.id for layer in self._base], links)
            number = catalogue.next_point if catalogue else 1
            point = Point(
                point=number, time=time, labels=self._labels, layer=top.id, size=top.size, content_id=top.content_id
            )
            check()
            points = (*(catalogue.points if catalogue else ()), point)
            parents = {**(catalogue.parents if catalogue else {}), **links}
            if self._mends:
                points, parents = _mended(points, parents, chain)
            try:
                self._current = self._disk.advance(
                    self._current, time=datetime.now(UTC), next_point=number + 1, points=points, parents=parents
                )
            except Conflict:
                if attempt == _ATTEMPTS - 1:
                    raise
                self._current = self._disk.read()
                continue
            return point
        raise AssertionError("the loop returns or raises")


class _Arrival:
    """Reports how much has arrived: bytes read, less bytes that wait to be sent. Thread-safe."""

    def __init__(self, on_event: OnEvent) -> None:
        self._total, self._on_event = 0, on_event
        self._lock = threading.Lock()
        self._deposit: LayerUpload | None = None
        self._read = self._shown = 0

    def begin(self, deposit: LayerUpload, total: int) -> None:
        """Nothing of `total` bytes has arrived yet."""
        self._deposit, self._total = deposit, total
        self.show()

    def read(self, count: int) -> None:
        """So many guest bytes more were read."""
        with self._lock:
            self._read += count
        self.show()

    def show(self) -> None:
        """Report the bytes that have arrived by now."""
        assert self._deposit is not None
        with self._lock:
            # Workers read ahead of the count: then less is reported than has arrived.
            self._shown = max(self._shown, self._read - self._deposit.bytes_pending)
            self._on_event(Progress("ship", self._shown, self._total))


@contextmanager
def shipment(
    image: Path,
    repository: Repository,
    disk: str,
    *,
    labels: Sequence[str] = (),
    each_layer: bool = False,
    lineage: Sequence[Wanted] = (),
    time: datetime | None = None,
    format: str | None = None,
    image_dirs: Sequence[Path] = (),
    on_event: OnEvent = ignore,
) -> Iterator[Shipment]:
    """Open an image, locked against writers, to be shipped to `repository` as `disk`.

    labels: given to the points; each_layer: every file of the chain becomes a layer and a point of its own
    lineage: files that local merges have made, each with what it replaces, beside what their own notes say: the
    destination knows those parts
    time: of the point, for an image that was sealed before now
    Raises what `scan` raises for an image that is broken or refused, Busy when somebody writes to it, and Conflict for
    a disk that was given to another host.
    """
    for label in labels:
        check_label(label)
    with locked_chain(image, format=format, image_dirs=image_dirs, on_event=on_event) as chain:
        check_not_given(chain)
        noted = noted_lineage(chain, on_event)
        yield Shipment(
            chain, repository, disk, labels=labels, each_layer=each_layer, lineage=(*lineage, *noted), time=time
        )


def _links(chain: Sequence[StoredLayer]) -> dict[str, str | None]:
    """layer -> the one below it."""
    return {upper.id: lower.id if lower else None for lower, upper in zip([None, *chain], chain, strict=False)}


def _mended(
    points: Sequence[Point], parents: dict[str, str | None], chain: Sequence[StoredLayer]
) -> tuple[tuple[Point, ...], dict[str, str | None]]:
    """Points and links of a disk, where each point with the content of a layer of `chain` is given by that layer.

    Layers that no point needs any more go: the damaged ones among them.
    """
    fresh = {(layer.size, layer.header.content_id): layer.id for layer in chain}
    mended = tuple(
        point.model_copy(update={"layer": fresh.get((point.size, point.content_id), point.layer)}) for point in points
    )
    before = _needed(points, parents)
    return mended, _without(parents, before - _needed(mended, parents))


def _needed(points: Sequence[Point], parents: dict[str, str | None]) -> set[str]:
    """The layers that some point needs, as far as the links lead."""
    found: set[str] = set()
    for point in points:
        at: str | None = point.layer
        while at is not None and at not in found:
            found.add(at)
            at = parents.get(at)
    return found


def _without(parents: dict[str, str | None], gone: set[str]) -> dict[str, str | None]:
    return {layer: below for layer, below in parents.items() if layer not in gone}


def _check_base(catalogue: Catalogue, base: Sequence[str], links: dict[str, str | None]) -> None:
    for layer in base:
        if layer not in catalogue.parents or catalogue.parents[layer] != links[layer]:
            raise Conflict(
                "layers that this shipment builds on were merged away meanwhile",
                subject=catalogue.disk,
                hint="run it again: what was sent is not sent twice",
            )


__all__ = ["LayerPlan", "ShipPlan", "ShipReport", "Shipment", "shipment"]
