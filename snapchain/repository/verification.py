"""Verifying a repository, or one disk of it: is every point still what was shipped? In three depths.

records     catalogues, layer records, pages, indexes; every layer's leaves add up to the content id that was recorded
existence   every pack that a record names is there and long enough, or what it held has a copy
data        every pack is read, whole and once; each blob decrypts and has the bytes of its id (pack_reading.py); each
            leaf is proven, by the ids or by reading it (leaf_proof.py).  Also what no point names.

Records and existence always; data of all packs and layers, or of a share of them: those that were not read for longest.
What was found good is kept (verified.py), so that runs take turns, and one that was interrupted is continued.
Packs in which damage is found are recorded (damage.py), so that the next shipment stores again what they held.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from datetime import datetime

import numpy as np

from snapchain.destination.records import Finding, Findings, VerifyReport
from snapchain.errors import Conflict, Corrupt, InvalidInput, SnapchainError
from snapchain.model.content import LEAF_BYTES, empty_sum
from snapchain.model.events import Notice, OnEvent, ignore
from snapchain.model.extents import DATA, Int64s, rounded
from snapchain.repository import slot_list
from snapchain.repository.catalogue import ATTEMPTS, Catalogue
from snapchain.repository.chain import ChainView, Composed
from snapchain.repository.damage import recorded
from snapchain.repository.data_check import DataCheck, check_answers
from snapchain.repository.eras import newest
from snapchain.repository.format import is_id, layer_name, pack_name
from snapchain.repository.ingest import change_of, sum_beyond
from snapchain.repository.layers import StoredLayer, page_location
from snapchain.repository.leaf_proof import doubtful, map_of, touched
from snapchain.repository.pages import Page
from snapchain.repository.replay import Replay
from snapchain.repository.repository import Repository, check_agrees
from snapchain.repository.soundness import check_history, check_indexes, check_there, named_by_page

_MOST_STEPS = 2_000_000
"""Layers and points looked at to tell which points are affected; in a catalogue that is nothing but damage."""


@dataclass(slots=True)
class _Tally:
    findings: Findings = field(default_factory=Findings)
    layers: int = 0
    by_disk: dict[str, int] = field(default_factory=dict)

    def note(self, error: SnapchainError, catalogue: Catalogue | None, points: Sequence[int], where: str = "") -> None:
        """Turn an error into a finding; the same one twice is one."""
        if catalogue is not None:
            self.by_disk[catalogue.disk] = self.by_disk.get(catalogue.disk, 0) + 1
        self.findings.add(Finding.of(error, catalogue.disk if catalogue else None, points, where))


class Verification:
    """A repository, or one disk of it, and how much of its data to read.

    share: 0 to 1; since: what was read and found good at this time or later is not read again
    """

    def __init__(
        self, repository: Repository, disk: str | None, share: float, *, since: datetime | None = None
    ) -> None:
        if not 0 <= share <= 1:
            raise InvalidInput(f"a share of {share:.0%} of the data", hint="0% to 100%")
        self._repository = repository
        self._disk = disk
        self._share = share
        self._since = since
        self._doubted: frozenset[str] = frozenset()

    def run(self, *, on_event: OnEvent = ignore) -> VerifyReport:
        """Look at everything; findings are values, not errors.

        Raises Unavailable when the store no longer answers: run it again, and it goes on.
        """
        for attempt in range(ATTEMPTS):
            tally = _Tally()
            found = list(self._catalogues(tally))
            with ExitStack() as stack:
                try:
                    stack.enter_context(
                        self._repository.reading(
                            {catalogue.disk: tuple(catalogue.parents) for catalogue in found},
                            "verify",
                            on_wait=lambda words: on_event(Notice(words)),
                        )
                    )
                except Conflict:  # or a layer is missing: then it is among the findings
                    if attempt < ATTEMPTS - 1 and found != list(self._catalogues(_Tally())):
                        continue
                return self._checked(found, tally, on_event)
        raise AssertionError("the loop returns or raises")

    def _checked(self, found: Sequence[Catalogue], tally: _Tally, on_event: OnEvent) -> VerifyReport:
        # In this order: what a shipment adds meanwhile is named by nothing that was read before.
        store, keys = self._repository.store, self._repository.keys
        listed = [info.name for info in newest(store)[1]]
        packs = {info.name: info.size for info in store.list("packs/")}
        self._doubted = recorded(store, keys)
        data = None
        if self._share:
            layers = {layer for catalogue in found for layer in catalogue.parents}
            data = DataCheck(self._repository, self._sizes_in_scope(found, packs), layers, on_event)
            data.choose(self._share, self._since, self._disk)
        with ExitStack() as stack:
            if data is not None:
                stack.enter_context(data.kept())
                data.read_packs()
            for catalogue in found:
                self._check_disk(catalogue, packs, tally, data)
            if self._disk is None:
                self._check_rest(listed, packs, tally, data)
            if data is not None:
                data.finish(found, tally.by_disk)
        findings = tally.findings.all()
        return VerifyReport(
            ok=not findings,
            destination=store.url,
            disks=sum(not catalogue.is_gone for catalogue in found),
            points=sum(len(catalogue.points) for catalogue in found),
            layers=tally.layers,
            data_read=self._share > 0,
            checked_bytes=data.guest_bytes if data else 0,
            findings=findings,
            read_bytes=data.read_bytes if data else 0,
            fresh_bytes=data.fresh_bytes if data else 0,
            stored_bytes=data.stored_bytes if data else 0,
            continued=data is not None and data.continued,
            verified_since=data.oldest if data else None,
        )

    def _catalogues(self, tally: _Tally) -> Iterator[Catalogue]:
        repository = self._repository
        if self._disk is not None:
            try:
                yield repository.catalogue(self._disk)
            except Corrupt as error:
                self._note(tally, error, None, ())
            return
        for key in repository.disk_keys():
            try:
                catalogue = repository.catalogue_of(key)
            except SnapchainError as error:
                self._note(tally, error, None, ())
            else:
                if catalogue is not None:
                    yield catalogue

    def _note(
        self, tally: _Tally, error: SnapchainError, catalogue: Catalogue | None, points: Sequence[int], where: str = ""
    ) -> None:
        """An error is a finding. Raises Unavailable when the store no longer answers at all."""
        check_answers(self._repository, error)
        tally.note(error, catalogue, points, where)

    def _sizes_in_scope(self, found: Sequence[Catalogue], packs: Mapping[str, int]) -> dict[str, int]:
        """pack -> bytes of its object, of the packs to read: all, or those of one disk. Not those known to be damaged:
        of them nothing is relied on but what layers name.
        """
        there = {_pack_of(name): size for name, size in packs.items() if name == pack_name(_pack_of(name))}
        wanted = there.keys() - self._doubted
        if self._disk is not None:
            wanted &= {pack for catalogue in found for pack in self._named(catalogue)}
        return {pack: there[pack] for pack in sorted(wanted) if is_id(pack)}

    def _named(self, catalogue: Catalogue) -> Iterator[str]:
        """The packs that a disk's layers name. Records that cannot be read are reported by `_check_disk`."""
        for layer in catalogue.parents:
            with suppress(SnapchainError):
                opened = self._repository.layer(layer)
                for row in opened.table:
                    yield bytes(row["pack"]).hex()
                    (page,) = opened.pages(int(row["first"]), min(int(row["stop"]), opened.size))
                    yield from _packs_of(page)

    def _check_disk(self, catalogue: Catalogue, packs: dict[str, int], tally: _Tally, data: DataCheck | None) -> None:
        affected = points_on(catalogue)
        opened: dict[str, StoredLayer] = {}
        bad: set[str] = set()
        for layer in catalogue.parents:
            tally.layers += 1
            try:
                opened[layer] = self._repository.layer(layer)
                self._check_packs(opened[layer], packs, catalogue.disk, data)
            except SnapchainError as error:
                bad.add(layer)
                self._note(tally, error, catalogue, affected.get(layer, ()))
        breaks = catalogue.breaks()
        for point in catalogue.points:
            try:
                catalogue.check_chain(point.layer, breaks)
                top = opened.get(point.layer)
                if top is not None:
                    check_agrees(catalogue.disk, point, top)
            except SnapchainError as error:
                self._note(tally, error, catalogue, (point.point,))
                bad.add(point.layer)
        bad |= catalogue.above(bad)
        composed = Composed()
        for layer in opened:
            if layer in bad:
                continue
            try:
                catalogue.check_chain(layer, breaks)
                chain = [opened[each] for each in catalogue.chain(layer)]
                _check_sum(chain)
                if data is not None:
                    self._check_data(chain, composed, catalogue, affected, tally, data)
            except SnapchainError as error:
                self._note(tally, error, catalogue, affected.get(layer, ()))

    def _check_rest(self, indexes: list[str], packs: dict[str, int], tally: _Tally, data: DataCheck | None) -> None:
        """What no point needs, and the next shipment relies on."""
        repository = self._repository
        for error in slot_list.check(repository.store, repository.keys):
            tally.note(error, None, ())
        for error in check_indexes(repository, indexes, packs):
            self._note(tally, error, None, ())
        if self._share >= 1:
            for key in repository.store.list_dirs("disks/"):
                for error in check_history(repository, key):
                    self._note(tally, error, None, ())
        for error in () if data is None else data.unnamed_errors():
            self._note(tally, error, None, ())

    def _check_packs(self, layer: StoredLayer, packs: dict[str, int], disk: str, data: DataCheck | None) -> None:
        """Every page can be read, and every blob that it names lies inside a pack that is there, or has a copy."""
        repository = self._repository
        for row in layer.table:
            where = page_location(row)
            if data is not None:  # before anything is raised: what is named is no finding of its own
                data.note_page(disk, where)
            check_there(repository, bytes(row["id"]), where, packs, self._doubted)
            (page,) = layer.pages(int(row["first"]), min(int(row["stop"]), layer.size))
            held = page.runs[page.runs["stored"] != 0]
            reach = np.zeros(len(page.packs), np.int64)
            np.maximum.at(reach, held["pack"], held["offset"].astype(np.int64) + held["stored"])
            for place, (pack, end) in enumerate(zip(page.packs, reach.tolist(), strict=True)):
                if not end:
                    continue  # a merge may keep the name of a pack whose blobs it has dropped; gc looks at runs, too
                if data is not None:
                    data.note_named(disk, pack, held["offset"][held["pack"] == place].astype(np.int64))
                if packs.get(pack_name(pack), 0) < end or pack in self._doubted:
                    for blob, at in named_by_page(page):
                        check_there(repository, blob, at, packs, self._doubted)

    def _check_data(
        self,
        chain: Sequence[StoredLayer],
        composed: Composed,
        catalogue: Catalogue,
        affected: PointsOn,
        tally: _Tally,
        data: DataCheck,
    ) -> None:
        """Prove the leaves of the last layer of a chain, if it is its turn; else those in packs with damage."""
        layer = chain[-1]
        in_turn = layer.id in data.layers
        ranges: list[tuple[Int64s, Int64s]] = []
        damaged = data.bad.keys() | self._doubted
        for page in layer.each_page(0, layer.size):
            suspect = data.runs_in(page, damaged)
            if in_turn:
                trusted = data.trusted(page) & ~suspect
                ranges.append(doubtful(page, layer.size, trusted, self._repository.keys.blob_id))
            elif suspect.any():
                ranges.append(touched(page, layer.size, suspect))
        left = map_of(layer.size, ranges)
        if left.data_bytes:
            view = ChainView(chain, self._repository.blobs, composed.of(chain))
            bad = Replay(view, left).on(chain[:-1]).find_bad()
            for each in bad:
                where = f"guest bytes {each.start} to {each.stop}: "
                self._note(tally, each.error, catalogue, affected.get(layer.id, ()), where)
            if bad:
                return
        if in_turn:
            data.note_good(layer.id)


def verify(
    repository: Repository,
    *,
    disk: str | None = None,
    share: float = 0.0,
    since: datetime | None = None,
    on_event: OnEvent = ignore,
) -> VerifyReport:
    """Check all disks or one: every record, and a share of the data (1.0: all) as far as it was not read since then."""
    return Verification(repository, disk, share, since=since).run(on_event=on_event)


def _pack_of(name: str) -> str:
    """The id in an object name of a pack."""
    return name.rpartition("/")[2]


def _packs_of(page: Page) -> Iterator[str]:
    """The packs that a page's runs name."""
    for place in np.unique(page.runs["pack"][page.runs["stored"] != 0]).tolist():
        yield page.packs[place]


def _check_sum(chain: Sequence[StoredLayer]) -> None:
    """The recorded leaves of a layer, put on those of the chain below, give its recorded content sum."""
    layer, below = chain[-1], chain[:-1]
    total = below[-1].header.sum().copy() if below else empty_sum()
    if below and layer.size < below[-1].size:
        total -= sum_beyond(below, layer.size)
    for row in layer.table:
        first, stop = int(row["first"]), min(int(row["stop"]), layer.size)
        (page,) = layer.pages(first, stop)
        touched = rounded(page.extents(layer.size), LEAF_BYTES)
        held = touched.val == DATA
        total += change_of(below, touched.at[held], touched.ends[held], page.leaves)
    if not np.array_equal(total, layer.header.sum()):
        raise Corrupt("its leaves do not add up to the content id that was recorded", subject=layer_name(layer.id))


class PointsOn:
    """layer -> the points whose chains it is part of; asked layer by layer, since all together may be any number."""

    def __init__(self, catalogue: Catalogue) -> None:
        self._points: dict[str, list[int]] = {}
        self._above: dict[str, list[str]] = {}
        self._steps = 0
        sound = catalogue.lengths()
        for point in catalogue.points:
            if point.layer in sound:  # `_check_disk` reports the broken chain itself
                self._points.setdefault(point.layer, []).append(point.point)
        for layer, below in catalogue.parents.items():
            if below is not None and layer in sound:
                self._above.setdefault(below, []).append(layer)

    def get(self, layer: str, default: tuple[int, ...] = ()) -> tuple[int, ...]:
        """The points on a layer, ascending; `default` where it has none, or too much was asked."""
        if self._steps > _MOST_STEPS:
            return default
        found: list[int] = []
        waiting = [layer]
        while waiting:
            at = waiting.pop()
            self._steps += 1 + len(self._points.get(at, ()))
            found += self._points.get(at, ())
            waiting += self._above.get(at, ())
        return tuple(sorted(found)) or default


def points_on(catalogue: Catalogue) -> PointsOn:
    """As the class says."""
    return PointsOn(catalogue)
