"""Repair: what is lost is stored again from places that still have it. Content decides, by hashes, never names.

    lost blob   its leaves are found by their hashes; it is stored again under its id, where all records find it
    lost map    of a layer: an image that shows the same content is stored as a new layer, which takes its place
    lost leaf   of which no whole blob could be made, as after a merge: stored as a blob of its own, and the layer gets
                a new record that names it

Nothing is ever dropped: what no source has stays as it is, and is reported.  Each step leaves everything as good as
before: blobs, their index, records, then a generation of each catalogue; running again finishes.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime

import blake3
import numpy as np
import zstandard

from snapchain.destination.reading import LeafSource, WholeDisk
from snapchain.destination.records import Finding, LostRange, RepairPlan, RepairReport
from snapchain.errors import Conflict, Corrupt, SnapchainError
from snapchain.model.compression import LEVELS, Compression
from snapchain.model.content import LEAF_BYTES
from snapchain.model.events import Notice, OnEvent, ignore
from snapchain.model.extents import Int64s
from snapchain.repository import layers as records
from snapchain.repository.catalogue import Catalogue, Point, needed_layers
from snapchain.repository.data_check import check_answers
from snapchain.repository.format import PAGE_ROW, RUN_ROW, fresh_id
from snapchain.repository.ingest import store_page_body
from snapchain.repository.layer_writer import LayerUpload, Origin
from snapchain.repository.layers import StoredLayer, leaves_shown
from snapchain.repository.leases import Lease, Mode
from snapchain.repository.losses import Chains, Losses, Lost, LostBlob, grouped, joined, merged
from snapchain.repository.packer import Packer
from snapchain.repository.packs import Location, packed
from snapchain.repository.pages import Page, PageBuilder, Rows
from snapchain.repository.replay import Bad
from snapchain.repository.repository import Repository
from snapchain.repository.verification import verify

_PORTION = 1 << 16
"""Parts of lost blobs that are looked for together: 4 GiB of leaves, each of which is a hash in memory."""
_AT_ONCE = 1 << 10
"""Leaves that are in memory at once: 64 MiB."""

_Place = tuple[bytes, Location]
_Bad = dict[str, dict[int, list[Bad]]]
"""disk -> point -> ranges that cannot be read."""


@dataclass(slots=True)
class _Done:
    blobs: int = 0
    stored: int = 0
    layers: int = 0


@dataclass(slots=True)
class _Located:
    """Which leaves the sources have: hash -> the source that has it."""

    sources: Sequence[LeafSource]
    of: dict[bytes, int] = field(default_factory=dict)

    def look_for(self, wanted: Collection[bytes]) -> None:
        """Ask the sources, one after the other, for what is not located yet."""
        left = {leaf for leaf in wanted if leaf not in self.of}
        for number, source in enumerate(self.sources):
            if not left:
                return
            found = set(source.locate(left))
            self.of.update(dict.fromkeys(found, number))
            left -= found

    def read(self, wanted: Collection[bytes]) -> dict[bytes, bytes]:
        """The bytes of the leaves that are located, as far as they are still there."""
        found: dict[bytes, bytes] = {}
        for number, source in enumerate(self.sources):
            mine = {leaf for leaf in wanted if self.of.get(leaf) == number}
            read = source.read(mine) if mine else ()
            found.update((leaf, data) for leaf, data in read if blake3.blake3(data).digest() == leaf)
        return found


class Repair:
    """A repository, and places that may have what it has lost. Work of `destination.repairing`."""

    def __init__(self, repository: Repository, sources: Sequence[LeafSource], *, read_data: bool = False) -> None:
        self._repository, self._sources, self._read_data = repository, sources, read_data

    def plan(self, *, on_event: OnEvent = ignore) -> RepairPlan:
        """What is damaged, and what of it no source has. Changes nothing."""
        before, self._repository.takes_notes = self._repository.takes_notes, False
        try:
            return self._planned(on_event)
        finally:
            self._repository.takes_notes = before

    def _planned(self, on_event: OnEvent) -> RepairPlan:
        self._read_all(on_event)
        catalogues, findings = self._catalogues()
        with self._reading(catalogues, on_event):
            losses = Losses(self._repository)
            located = _Located(self._sources)
            for portion in merged(losses.look(catalogues), _PORTION):
                located.look_for(_leaves_of(portion.values()))
            damaged = self._bad(catalogues, losses)
            replaced = {each for catalogue in catalogues for each, _ in self._replaceable(catalogue, losses)}
            lost: _Bad = {}
            for catalogue in catalogues:
                for point in catalogue.points:
                    bad = damaged.get(catalogue.disk, {}).get(point.point, [])
                    left = joined(list(self._left(catalogue, point, bad, losses, located, replaced)))
                    if left:
                        lost.setdefault(catalogue.disk, {})[point.point] = left
        return RepairPlan(
            destination=self._repository.store.url, damaged=_ranges(damaged), lost=_ranges(lost), findings=findings
        )

    def run(self, *, on_event: OnEvent = ignore) -> RepairReport:
        """Store again what a source has; then read all that was damaged, as a proof: what still cannot be is lost.

        Raises Conflict when this run stood still so long that others took it for dead.
        """
        self._read_all(on_event)
        repository, done = self._repository, _Done()
        with repository.lease(Mode.WRITE, "repair", on_wait=lambda words: on_event(Notice(words))) as lease:
            catalogues, findings = self._catalogues()
            losses = self._surveyed(catalogues)
            damaged = self._bad(catalogues, losses)
            lost = damaged
            if damaged:
                repository.record_damage()
                located = _Located(self._sources)
                self._store_blobs(catalogues, located, done)
                catalogues = self._replace_maps(catalogues, losses, lease, done)
                catalogues = self._store_leaves(catalogues, located, lease, done)
                lost = self._bad(catalogues, self._surveyed(catalogues), damaged)
        left = _ranges(lost)
        return RepairReport(
            ok=not left and not findings,
            destination=repository.store.url,
            damaged=_ranges(damaged),
            lost=left,
            blobs_stored=done.blobs,
            bytes_stored=done.stored,
            layers_replaced=done.layers,
            findings=findings,
        )

    # ---- what is damaged

    def _read_all(self, on_event: OnEvent) -> None:
        if self._read_data:
            verify(self._repository, share=1.0, on_event=on_event)

    def _catalogues(self) -> tuple[list[Catalogue], tuple[Finding, ...]]:
        """The newest of all disks, and those that cannot be read, as findings."""
        found: list[Catalogue] = []
        findings: list[Finding] = []
        for key in self._repository.disk_keys():
            try:
                catalogue = self._repository.catalogue_of(key)
            except SnapchainError as error:
                check_answers(self._repository, error)
                findings.append(Finding.of(error, None, ()))
                continue
            if catalogue is not None:
                found.append(catalogue)
        return found, tuple(findings)

    @contextmanager
    def _reading(self, catalogues: Sequence[Catalogue], on_event: OnEvent) -> Iterator[None]:
        """For the length of a `with` block no collector takes away what the catalogues need."""
        layers = {catalogue.disk: tuple(catalogue.parents) for catalogue in catalogues}
        with ExitStack() as stack:
            with suppress(Conflict):  # the record of a layer is missing: what is looked for
                stack.enter_context(
                    self._repository.reading(layers, "repair", on_wait=lambda words: on_event(Notice(words)))
                )
            yield

    def _surveyed(self, catalogues: Sequence[Catalogue]) -> Losses:
        """What is lost as things stand."""
        losses = Losses(self._repository)
        for _ in losses.look(catalogues):
            pass  # only where, not what
        return losses

    def _bad(self, catalogues: Sequence[Catalogue], losses: Losses, of: _Bad | None = None) -> _Bad:
        """What cannot be read now. of: also of these ranges, which could not be read before."""
        found: _Bad = {}
        for catalogue in catalogues:
            chains = Chains(self._repository, catalogue)
            for point in catalogue.points:
                before = (of or {}).get(catalogue.disk, {}).get(point.point, [])
                try:
                    lost = losses.of(chains.names(point.layer))
                except Corrupt as error:
                    bad = [Bad(0, point.size, error)]
                else:
                    first = np.array([each.start for each in before], np.int64)
                    stop = np.array([each.stop for each in before], np.int64)
                    ranges = [(first, stop), *lost.ranges] if before else lost.ranges
                    bad = chains.unreadable(point.layer, point.size, Lost(lost.maps, ranges))
                if bad:
                    found.setdefault(catalogue.disk, {})[point.point] = bad
        return found

    def _left(
        self,
        catalogue: Catalogue,
        point: Point,
        bad: Sequence[Bad],
        losses: Losses,
        located: _Located,
        replaced: Collection[str],
    ) -> Iterator[Bad]:
        """What of a point no source has, for a plan."""
        if not bad:
            return
        try:
            chain = catalogue.chain(point.layer)
        except Corrupt:
            yield from bad
            return
        # A layer that takes another one's place shows all that was below it.
        top = max((place for place, layer in enumerate(chain) if layer in replaced), default=-1)
        if any(lost.layer in chain[top + 1 :] for lost in losses.of(chain).maps):
            yield from bad
            return
        if top >= 0:  # of what is above it only what that has lost itself
            bad = [
                Bad(first, min(stop, point.size), bad[0].error)
                for firsts, stops in losses.of(chain[top + 1 :]).ranges
                for first, stop in zip(firsts.tolist(), stops.tolist(), strict=True)
                if first < point.size
            ]
        layers = list(self._repository.layers(chain[top + 1 :]).values()) if bad else []
        for each in bad:
            numbers, hashes = leaves_shown(layers, each.start, each.stop)
            shown = dict(zip(numbers.tolist(), map(bytes, hashes), strict=True))
            located.look_for(shown.values())
            for leaf, digest in shown.items():
                if digest not in located.of:
                    start = leaf * LEAF_BYTES
                    yield Bad(start, min(start + LEAF_BYTES, each.stop), each.error)

    # ---- blobs

    def _store_blobs(self, catalogues: Sequence[Catalogue], located: _Located, done: _Done) -> None:
        """Store again each lost blob all of whose bytes some source has, under its id."""
        repository = self._repository
        losses = Losses(repository)
        with Packer(repository.store, repository.keys, losses.index, pack_size=repository.pack_size) as packer:
            for portion in merged(losses.look(catalogues), _PORTION):
                located.look_for(_leaves_of(portion.values()))
                for some in _batches(portion.values()):
                    leaves = located.read(_leaves_of(some))
                    for lost in some:
                        body = _body_of(lost, leaves)
                        if body is not None and _id_of(repository, body) == lost.blob:
                            _store(packer, lost.blob, body, done)
                packer.flush()

    # ---- leaves

    def _store_leaves(
        self, catalogues: Sequence[Catalogue], located: _Located, lease: Lease, done: _Done
    ) -> list[Catalogue]:
        """Give each layer that has lost leaves a new record, in which those that some source has are whole."""
        repository = self._repository
        losses = self._surveyed(catalogues)
        with Packer(repository.store, repository.keys, losses.index, pack_size=repository.pack_size) as packer:
            return [self._mended(catalogue, losses, located, packer, lease, done) for catalogue in catalogues]

    def _mended(
        self, catalogue: Catalogue, losses: Losses, located: _Located, packer: Packer, lease: Lease, done: _Done
    ) -> Catalogue:
        renamed: dict[str, str] = {}
        lengths = catalogue.lengths()
        chains = Chains(self._repository, catalogue)
        for layer in sorted(lengths, key=lengths.__getitem__):
            lost = losses.of(chains.names(layer))
            if lost.maps or not lost.ranges:
                continue
            opened = chains.layer(layer)
            if not _speaks_of(opened, lost):
                continue
            bad = chains.unreadable(layer, opened.size, lost)
            table = self._new_table(opened, bad, located, packer, done)
            if table is None:
                continue
            packer.flush()
            header = opened.header.model_copy(
                update={
                    "id": fresh_id(),
                    "data_bytes": int(table["data"].sum()),
                    "zero_bytes": int(table["zero"].sum()),
                }
            )
            records.write(self._repository.store, self._repository.keys, header, table)
            renamed[layer] = header.id
            done.layers += 1
        return self._renamed(catalogue, renamed, lease) if renamed else catalogue

    def _new_table(
        self, layer: StoredLayer, bad: Sequence[Bad], located: _Located, packer: Packer, done: _Done
    ) -> Rows | None:
        """The pages of a layer, in which the bad leaves that it touches are blobs of their own; None: nothing to do."""
        table: list[Rows] = [np.empty(0, PAGE_ROW)]
        changed = False
        for row in layer.table:
            first, stop = int(row["first"]), min(int(row["stop"]), layer.size)
            (page,) = layer.pages(first, stop)
            wanted = _touched(page, bad)
            known = {int(leaf["index"]): leaf["hash"].tobytes() for leaf in page.leaves}
            located.look_for({known[leaf] for leaf in wanted if leaf in known})
            mended = False
            for at in range(0, len(wanted), _AT_ONCE):
                some = wanted[at : at + _AT_ONCE]
                leaves = located.read({known[leaf] for leaf in some if leaf in known})
                for leaf in some:
                    data = leaves.get(known[leaf]) if leaf in known else b""  # all zero
                    if data is None:
                        continue
                    # What the page does not speak of is not its own, though it may be of the leaf.
                    begin = max(first, leaf * LEAF_BYTES)
                    end = min(stop, (leaf + 1) * LEAF_BYTES)
                    body = data[begin - leaf * LEAF_BYTES : end - leaf * LEAF_BYTES]
                    blob = _id_of(self._repository, body)
                    place = (blob, _store(packer, blob, body, done)) if leaf in known else None
                    page = with_range(page, begin, end, place)
                    mended = True
            if mended:
                table.append(
                    store_page_body(
                        int(row["first"]), int(row["stop"]), page, keys=self._repository.keys, packer=packer
                    )
                )
                changed = True
            else:
                table.append(np.array([row], PAGE_ROW))
        return np.concatenate(table) if changed else None

    # ---- maps

    def _replaceable(self, catalogue: Catalogue, losses: Losses) -> Iterator[tuple[str, WholeDisk]]:
        """(layer, a disk that shows its content) of layers that have lost their map, or lie on one; root first."""
        known = {point.layer: (point.size, point.content_id) for point in catalogue.points}
        lengths = catalogue.lengths()
        replaced: set[str] = set()
        for layer in sorted(lengths, key=lengths.__getitem__):
            chain = catalogue.chain(layer)
            top = max((place for place, each in enumerate(chain) if each in replaced), default=-1)
            if not losses.of(chain[top + 1 :]).maps:
                continue
            content = known.get(layer) or self._content_of(layer)
            disk = content and next(filter(None, (source.whole(*content) for source in self._sources)), None)
            if disk:
                replaced.add(layer)
                yield layer, disk

    def _content_of(self, layer: str) -> tuple[int, str] | None:
        try:
            header = self._repository.layer(layer).header
        except Corrupt:
            return None
        return header.size, header.content_id

    def _replace_maps(
        self, catalogues: Sequence[Catalogue], losses: Losses, lease: Lease, done: _Done
    ) -> list[Catalogue]:
        """Put new layers in the place of those that have lost their map, where an image shows the same content."""
        if not losses.maps:
            return list(catalogues)
        found: list[Catalogue] = []
        for catalogue in catalogues:
            renamed: dict[str, str] = {}
            roots: set[str] = set()
            for layer, disk in self._replaceable(catalogue, losses):
                with LayerUpload(self._repository) as upload:
                    origin = Origin("disk.qcow2", "qcow2", 65536, ())
                    added = upload.add(disk, [], origin, on_bytes=lambda _: None, confirm=lambda: None)
                content = next(
                    ((each.size, each.content_id) for each in catalogue.points if each.layer == layer),
                    self._content_of(layer),
                )
                if (added.size, added.header.content_id) != content:
                    continue  # the image was changed meanwhile
                done.stored += upload.bytes_read
                done.layers += 1
                renamed[layer] = added.id
                roots.add(added.id)
            found.append(self._renamed(catalogue, renamed, lease, roots=roots) if renamed else catalogue)
        return found

    def _renamed(
        self, catalogue: Catalogue, renamed: Mapping[str, str], lease: Lease, *, roots: Collection[str] = ()
    ) -> Catalogue:
        """Publish that layers of a disk have others in their place. roots: those of them that lie on nothing."""

        def fields(current: Catalogue) -> dict[str, object] | None:
            if not renamed.keys() & current.parents.keys():
                return None  # merged away meanwhile
            parents = {
                renamed.get(layer, layer): None if renamed.get(layer) in roots else below and renamed.get(below, below)
                for layer, below in current.parents.items()
            }
            points = tuple(
                point.model_copy(update={"layer": renamed.get(point.layer, point.layer)}) for point in current.points
            )
            needed = needed_layers(points, parents)
            was = needed_layers(current.points, current.parents)
            gone = {renamed.get(layer, layer) for layer in was} - needed
            return {"points": points, "parents": {each: below for each, below in parents.items() if each not in gone}}

        return self._repository.disk(catalogue.disk).update(fields, time=datetime.now(UTC), check=lease.check)


def with_range(page: Page, first: int, stop: int, place: tuple[bytes, Location] | None) -> Page:
    """A page in which guest bytes [first, stop) are a blob, or zeroes, and all others what they were.

    place: the id of the blob and where it lies; None for zeroes
    """
    lower, upper = page.start < first, page.stop > stop
    kept = [
        _cut(page.runs[lower], page.start[lower], np.minimum(page.stop[lower], first)),
        _cut(page.runs[upper], np.maximum(page.start[upper], stop), page.stop[upper]),
    ]
    mine = np.zeros(1, RUN_ROW)
    mine["start"], mine["length"] = first, stop - first
    packs = list(page.packs)
    if place is not None:
        blob, where = place
        mine["id"] = np.frombuffer(blob, np.uint8)
        mine["pack"], packs = len(packs), [*packs, where.pack]
        mine["offset"], mine["stored"], mine["raw"] = where.offset, where.stored, where.raw
    builder = PageBuilder()  # names the packs that are still needed
    builder.add(np.concatenate([kept[0], mine, kept[1]]), packs, page.leaves)
    taken = builder.take()
    assert taken is not None
    return taken[2]


def _cut(runs: Rows, first: Int64s, stop: Int64s) -> Rows:
    """Of each run what lies in [first, stop), which is not before its start."""
    rows = runs.copy()
    held = rows["stored"] != 0
    rows["skip"][held] += (first - rows["start"].astype(np.int64)).astype(np.uint32)[held]
    rows["start"], rows["length"] = first, stop - first
    return rows


def _speaks_of(layer: StoredLayer, lost: Lost) -> bool:
    """Whether a layer has something in the ranges that may be lost."""
    return any(
        len(range(*page.places(first, stop).indices(len(page.runs))))
        for firsts, stops in lost.ranges
        for first, stop in zip(firsts.tolist(), stops.tolist(), strict=True)
        for page in layer.each_page(first, min(stop, layer.size))
    )


def _touched(page: Page, bad: Sequence[Bad]) -> list[int]:
    """The leaves in some ranges that a page's runs touch, ascending."""
    found: set[int] = set()
    for each in bad:
        for at in range(*page.places(each.start, each.stop).indices(len(page.runs))):
            first = max(int(page.start[at]), each.start) // LEAF_BYTES
            found.update(range(first, -(-min(int(page.stop[at]), each.stop) // LEAF_BYTES)))
    return sorted(found)


def _leaves_of(blobs: Iterable[LostBlob]) -> set[bytes]:
    """The leaves that some blobs are made of."""
    return {part.leaf for lost in blobs for part in lost.parts if part.leaf is not None}


def _batches(blobs: Iterable[LostBlob]) -> Iterator[list[LostBlob]]:
    """Some blobs at a time, of about _AT_ONCE leaves together."""
    some: list[LostBlob] = []
    count = 0
    for lost in blobs:
        some.append(lost)
        count += len(lost.parts)
        if count >= _AT_ONCE:
            yield some
            some, count = [], 0
    if some:
        yield some


def _body_of(lost: LostBlob, leaves: Mapping[bytes, bytes]) -> bytes | None:
    """The bytes of a blob, None where some are not known."""
    body = bytearray(lost.raw)
    known = np.zeros(lost.raw, np.bool_)
    for part in lost.parts:
        data = bytes(LEAF_BYTES) if part.leaf is None else leaves.get(part.leaf)
        if data is not None:
            body[part.skip : part.skip + part.length] = data[part.at : part.at + part.length]
            known[part.skip : part.skip + part.length] = True
    return bytes(body) if known.all() else None


def _id_of(repository: Repository, body: bytes) -> bytes:
    pieces = (blake3.blake3(body[at : at + LEAF_BYTES]).digest() for at in range(0, len(body), LEAF_BYTES))
    return repository.keys.blob_id(b"".join(pieces))


def _store(packer: Packer, blob: bytes, body: bytes, done: _Done) -> Location:
    done.blobs += 1
    done.stored += len(body)
    return packer.add(blob, packed(zstandard.ZstdCompressor(level=LEVELS[Compression.DEFAULT]), body), len(body))


def _ranges(bad: _Bad) -> tuple[LostRange, ...]:
    return tuple(each for disk in sorted(bad) for each in grouped(disk, bad[disk]))
