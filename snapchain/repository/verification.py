"""Verifying a repository, or one disk of it: is every point still what was shipped?

Records always: catalogues, layer records, pages, indexes; every pack named is there and long enough, or what it held
has a copy; every layer's leaves add up to the content id that was recorded.  Data with `read_data` or a `sample`: every
blob is read, decrypted, and the leaves that it gives compared with the record; and of packs also what no point names.
Packs in which damage is found are recorded, so that the next shipment stores again what they held.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from snapchain.destination.records import Finding, Findings, VerifyReport
from snapchain.errors import Conflict, Corrupt, InvalidInput, SnapchainError
from snapchain.model.content import LEAF_BYTES, empty_sum
from snapchain.model.events import Notice, OnEvent, counting, ignore
from snapchain.model.extents import DATA, Int64s, rounded
from snapchain.repository import slot_list
from snapchain.repository.catalogue import ATTEMPTS, Catalogue
from snapchain.repository.chain import ChainView
from snapchain.repository.damage import recorded
from snapchain.repository.format import is_id, layer_name, pack_name
from snapchain.repository.index import newest
from snapchain.repository.ingest import change_of, sum_beyond
from snapchain.repository.layers import StoredLayer, page_location
from snapchain.repository.replay import Replay
from snapchain.repository.repository import Repository, check_agrees
from snapchain.repository.soundness import check_history, check_indexes, check_pack, check_there, named_by_page

_MOST_STEPS = 2_000_000
"""Layers and points looked at to tell which points are affected; in a catalogue that is nothing but damage."""


@dataclass(slots=True)
class _Tally:
    findings: Findings = field(default_factory=Findings)
    checked_bytes: int = 0
    layers: int = 0
    read: dict[str, list[Int64s]] = field(default_factory=dict)

    def note_read(self, pack: str, offsets: npt.NDArray[np.uint32]) -> None:
        """These blobs are read with the layers that name them."""
        self.read.setdefault(pack, []).append(np.unique(offsets).astype(np.int64))

    def note(self, error: SnapchainError, catalogue: Catalogue | None, points: Sequence[int], where: str = "") -> None:
        """Turn an error into a finding; the same one twice is one."""
        self.findings.add(Finding.of(error, catalogue.disk if catalogue else None, points, where))


class Verification:
    """A repository, or one disk of it, and how much of its data to read. share: 0 to 1, which part is drawn anew."""

    def __init__(self, repository: Repository, disk: str | None, share: float) -> None:
        if not 0 <= share <= 1:
            raise InvalidInput(f"a share of {share:.0%} of the data", hint="0% to 100%")
        self._repository = repository
        self._disk = disk
        self._share = share
        self._doubted: frozenset[str] = frozenset()
        self._draw = random.Random()  # noqa: S311 -- chooses what to read, keeps no secret

    def run(self, *, on_event: OnEvent = ignore) -> VerifyReport:
        """Look at everything; findings are values, not errors. Raises only when nothing can be read."""
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
        listed = [info.name for info in newest(self._repository.store)[1]]
        packs = {info.name: info.size for info in self._repository.store.list("packs/")}
        self._doubted = recorded(self._repository.store, self._repository.keys)
        total = sum(self._repository_bytes(catalogue) for catalogue in found) if self._share else None
        on_bytes = counting("verify", total, on_event)
        for catalogue in found:
            self._check_disk(catalogue, packs, tally, on_bytes)
        if self._disk is None:
            self._check_rest(listed, packs, tally)
        findings = tally.findings.all()
        return VerifyReport(
            ok=not findings,
            destination=self._repository.store.url,
            disks=len(found),
            points=sum(len(catalogue.points) for catalogue in found),
            layers=tally.layers,
            data_read=self._share > 0,
            checked_bytes=tally.checked_bytes,
            findings=findings,
        )

    def _catalogues(self, tally: _Tally) -> Iterator[Catalogue]:
        repository = self._repository
        if self._disk is not None:
            try:
                yield repository.catalogue(self._disk)
            except Corrupt as error:
                tally.note(error, None, ())
            return
        for key in repository.disk_keys():
            try:
                catalogue = repository.catalogue_of(key)
            except SnapchainError as error:
                tally.note(error, None, ())
            else:
                if catalogue is not None:
                    yield catalogue

    def _repository_bytes(self, catalogue: Catalogue) -> int:
        total = 0
        for layer in catalogue.parents:
            try:
                total += self._repository.layer(layer).header.data_bytes
            except SnapchainError:
                continue  # counted for the progress bar only; `_check_disk` reports it
        return int(total * self._share)

    def _check_disk(
        self, catalogue: Catalogue, packs: dict[str, int], tally: _Tally, on_bytes: Callable[[int], None]
    ) -> None:
        affected = points_on(catalogue)
        opened: dict[str, StoredLayer] = {}
        bad: set[str] = set()
        for layer in catalogue.parents:
            tally.layers += 1
            try:
                opened[layer] = self._repository.layer(layer)
                self._check_packs(opened[layer], packs, tally)
            except SnapchainError as error:
                bad.add(layer)
                tally.note(error, catalogue, affected.get(layer, ()))
        breaks = catalogue.breaks()
        for point in catalogue.points:
            try:
                catalogue.check_chain(point.layer, breaks)
                top = opened.get(point.layer)
                if top is not None:
                    check_agrees(catalogue.disk, point, top)
            except SnapchainError as error:
                tally.note(error, catalogue, (point.point,))
                bad.add(point.layer)
        bad |= catalogue.above(bad)
        for layer in opened:
            if layer in bad:
                continue
            try:
                catalogue.check_chain(layer, breaks)
                chain_ids = catalogue.chain(layer)
                _check_sum([opened[each] for each in chain_ids])
                if self._share:
                    self._check_data([opened[each] for each in chain_ids], catalogue, affected, tally, on_bytes)
            except SnapchainError as error:
                tally.note(error, catalogue, affected.get(layer, ()))

    def _check_rest(self, indexes: list[str], packs: dict[str, int], tally: _Tally) -> None:
        """What no point needs, and the next shipment relies on."""
        repository = self._repository
        for error in slot_list.check(repository.store, repository.keys):
            tally.note(error, None, ())
        for error in check_indexes(repository, indexes, packs):
            tally.note(error, None, ())
        if self._share >= 1:
            for key in repository.store.list_dirs("disks/"):
                for error in check_history(repository, key):
                    tally.note(error, None, ())
        for name, size in packs.items():
            pack = name.rpartition("/")[2]
            if not is_id(pack) or pack in self._doubted or not self._is_drawn():
                continue  # nothing relies on a pack that is known to be damaged but the layers that name it
            read = np.concatenate([np.empty(0, np.int64), *tally.read.pop(pack, ())])
            for error in check_pack(repository, pack, size, read):
                tally.note(error, None, ())

    def _is_drawn(self) -> bool:
        return self._share >= 1 or self._draw.random() < self._share

    def _check_packs(self, layer: StoredLayer, packs: dict[str, int], tally: _Tally) -> None:
        """Every page can be read, and every blob that it names lies inside a pack that is there, or has a copy."""
        repository = self._repository
        for row in layer.table:
            check_there(repository, bytes(row["id"]), page_location(row), packs, self._doubted)
            tally.note_read(bytes(row["pack"]).hex(), row["offset"][np.newaxis])
            (page,) = layer.pages(int(row["first"]), min(int(row["stop"]), layer.size))
            data = page.runs[page.runs["stored"] != 0]
            reach = np.zeros(len(page.packs), np.int64)
            np.maximum.at(reach, data["pack"], data["offset"].astype(np.int64) + data["stored"])
            for place, (pack, end) in enumerate(zip(page.packs, reach.tolist(), strict=True)):
                if not end:
                    continue  # a merge may keep the name of a pack whose blobs it has dropped; gc looks at runs, too
                if packs.get(pack_name(pack), 0) < end or pack in self._doubted:
                    for blob, where in named_by_page(page):
                        check_there(repository, blob, where, packs, self._doubted)
                tally.note_read(pack, data["offset"][data["pack"] == place])

    def _check_data(
        self,
        chain: Sequence[StoredLayer],
        catalogue: Catalogue,
        affected: PointsOn,
        tally: _Tally,
        on_bytes: Callable[[int], None],
    ) -> None:
        layer = chain[-1]
        view = ChainView(chain, self._repository.blobs)
        replay = Replay(view, layer.extents()).on(chain[:-1])
        read, bad = replay.find_bad(keep=lambda _: self._is_drawn(), on_bytes=on_bytes)
        tally.checked_bytes += read
        for each in bad:
            where = f"guest bytes {each.start} to {each.stop}: "
            tally.note(each.error, catalogue, affected.get(layer.id, ()), where)


def verify(
    repository: Repository, *, disk: str | None = None, share: float = 0.0, on_event: OnEvent = ignore
) -> VerifyReport:
    """Check all disks or one: every record, and a share of the data (1.0 for all of it)."""
    return Verification(repository, disk, share).run(on_event=on_event)


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
