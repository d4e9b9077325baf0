"""What is lost in a repository: blobs and maps that no pack gives any more, and the guest ranges that need them.

A blob is lost when its pack is missing, short or damaged, no index lists a copy of it, and reading it fails.  Its bytes
can be told all the same: each run that names it says which part of which leaf it is, and the page has the leaf's hash.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from snapchain.destination.records import LostRange
from snapchain.errors import Corrupt, SnapchainError, Unavailable
from snapchain.model.content import LEAF_BYTES
from snapchain.model.extents import Int64s
from snapchain.repository.catalogue import Catalogue
from snapchain.repository.chain import ChainView, Composed
from snapchain.repository.damage import list_packs
from snapchain.repository.data_check import check_answers
from snapchain.repository.format import layer_name, pack_name
from snapchain.repository.index import BlobIndex
from snapchain.repository.layers import StoredLayer, page_location
from snapchain.repository.leaf_proof import map_of, touched
from snapchain.repository.packs import Location
from snapchain.repository.pages import Page
from snapchain.repository.replay import Bad, Replay
from snapchain.repository.repository import Repository
from snapchain.repository.soundness import find_readable


@dataclass(frozen=True, slots=True)
class Part:
    """The `length` bytes of a blob from `skip` on are those of a leaf from `at` on.

    leaf: hash of the leaf, None where it is all zero
    """

    length: int
    skip: int
    at: int
    leaf: bytes | None


@dataclass(slots=True)
class LostBlob:
    """A blob that nobody gives any more. parts: what the layers need of it."""

    blob: bytes
    raw: int
    parts: list[Part] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class LostMap:
    """The map of a layer is lost: of guest bytes [first, stop). stop: None: its record is lost, and so all of it."""

    layer: str
    first: int
    stop: int | None
    error: SnapchainError


@dataclass(frozen=True, slots=True)
class Lost:
    """What the layers of a chain have lost: of their maps, and the guest ranges of their runs."""

    maps: Sequence[LostMap]
    ranges: list[tuple[Int64s, Int64s]]


class Losses:
    """Looks for what is lost, layer by layer.

    index: of all blobs; packs that are not as it says are to be avoided from now on
    ranges: layer -> guest ranges of its runs that are lost; maps: what is lost of maps, by layer; filled by `look`
    """

    def __init__(self, repository: Repository) -> None:
        self.index: BlobIndex = repository.index()
        self.ranges: dict[str, list[tuple[Int64s, Int64s]]] = {}
        self.maps: dict[str, list[LostMap]] = {}
        self._repository = repository
        self._sizes = {pack: info.size for pack, info in list_packs(repository.store).items()}
        # All of them, not a share: what is stored again is stored because nothing there can be relied on.
        unlike = {pack for pack, size in self.index.sizes.items() if self._sizes.get(pack) != size}
        repository.blobs.damaged |= unlike
        self.index.avoid |= repository.blobs.damaged
        self._seen: dict[tuple[str, int], bool] = {}

    def look(self, catalogues: Sequence[Catalogue]) -> Iterator[LostBlob]:
        """Each blob that a layer needs and that is lost, page by page."""
        for catalogue in catalogues:
            for layer in catalogue.parents:
                try:
                    stored = self._repository.layer(layer)
                except (Corrupt, Unavailable) as error:
                    check_answers(self._repository, error)
                    self.maps.setdefault(layer, []).append(LostMap(layer, 0, None, error))
                    continue
                yield from self._look_at(stored)
                self._seen.clear()

    def of(self, chain: Sequence[str]) -> Lost:
        """What `look` has found of these layers."""
        return Lost(
            [lost for layer in chain for lost in self.maps.get(layer, ())],
            [each for layer in chain for each in self.ranges.get(layer, ())],
        )

    def _look_at(self, layer: StoredLayer) -> Iterator[LostBlob]:
        for row in layer.table:
            first, stop = int(row["first"]), min(int(row["stop"]), layer.size)
            where = page_location(row)
            try:
                self._check(bytes(row["id"]), where)
                (page,) = layer.pages(first, stop)
            except (Corrupt, Unavailable) as error:
                check_answers(self._repository, error)
                self.maps.setdefault(layer.id, []).append(LostMap(layer.id, first, stop, error))
                continue
            yield from self._lost_of(layer, page)

    def _lost_of(self, layer: StoredLayer, page: Page) -> Iterator[LostBlob]:
        doubted = [place for place, pack in enumerate(page.packs) if self._is_doubted(pack, page, place)]
        if not doubted:
            return
        runs = np.flatnonzero((page.runs["stored"] != 0) & np.isin(page.runs["pack"], doubted))
        found: dict[bytes, LostBlob] = {}
        flags = np.zeros(len(page.runs), np.bool_)
        for at in runs.tolist():
            row = page.runs[at]
            blob = row["id"].tobytes()
            where = Location(page.packs[int(row["pack"])], int(row["offset"]), int(row["stored"]), int(row["raw"]))
            if self._is_lost(blob, where):
                flags[at] = True
                lost = found.setdefault(blob, LostBlob(blob, where.raw))
                lost.parts += _parts_of(page, at)
        if flags.any():
            self.ranges.setdefault(layer.id, []).append(touched(page, layer.size, flags))
        yield from found.values()

    def _is_doubted(self, pack: str, page: Page, place: int) -> bool:
        """Whether a pack that a page names is damaged, or does not reach as far as the page says."""
        mine = page.runs[(page.runs["stored"] != 0) & (page.runs["pack"] == place)]
        reach = int((mine["offset"].astype(np.int64) + mine["stored"]).max(initial=0))
        return pack in self.index.avoid or self._sizes.get(pack, -1) < reach

    def _is_lost(self, blob: bytes, where: Location) -> bool:
        key = where.pack, where.offset
        if key not in self._seen:
            try:
                self._check(blob, where)
                self._seen[key] = False
            except (Corrupt, Unavailable) as error:
                check_answers(self._repository, error)
                self._seen[key] = True
        return self._seen[key]

    def _check(self, blob: bytes, where: Location) -> None:
        """Raises Corrupt for a blob that is lost."""
        find_readable(
            blob, where, is_sound=self._is_sound, copies=self.index.find_all, read=self._repository.blobs.read
        )

    def _is_sound(self, at: Location) -> bool:
        reaches = self._sizes.get(at.pack)
        if reaches is None:
            # Written since packs were listed, by this program.
            return at.pack not in self.index.avoid and at.pack not in self.index.sizes and self._is_fresh(at.pack)
        return at.pack not in self.index.avoid and reaches >= at.offset + at.stored

    def _is_fresh(self, pack: str) -> bool:
        size = self._repository.store.size(pack_name(pack))
        if size is not None:
            self._sizes[pack] = size
        return size is not None


def _parts_of(page: Page, at: int) -> Iterator[Part]:
    """What one run says of its blob, cut at leaves."""
    start, stop, skip = int(page.start[at]), int(page.stop[at]), int(page.runs["skip"][at])
    begin = start
    while begin < stop:
        leaf = begin // LEAF_BYTES
        end = min(stop, (leaf + 1) * LEAF_BYTES)
        place = int(page.index.searchsorted(leaf))
        listed = place < len(page.index) and int(page.index[place]) == leaf
        known = page.leaves["hash"][place].tobytes() if listed else None
        yield Part(end - begin, skip + begin - start, begin - leaf * LEAF_BYTES, known)
        begin = end


class Chains:
    """The layers of one disk, opened once each as they are asked for."""

    def __init__(self, repository: Repository, catalogue: Catalogue) -> None:
        self._repository, self._catalogue = repository, catalogue
        self._opened: dict[str, StoredLayer] = {}
        self._composed = Composed()

    def names(self, layer: str) -> tuple[str, ...]:
        """The chain that ends in a layer, root first. Raises Corrupt."""
        return self._catalogue.chain(layer)

    def layer(self, layer: str) -> StoredLayer:
        """One of them. Raises Corrupt where its record is lost."""
        if layer not in self._opened:
            self._opened[layer] = self._repository.layer(layer)
        return self._opened[layer]

    def unreadable(self, layer: str, size: int, lost: Lost) -> list[Bad]:
        """The guest ranges of a chain that cannot be read, of those that may be lost; in whole leaves, ascending.

        layer: the last one of the chain, of `size` bytes. What is lost of a map is told as all that it spoke of.
        """
        if lost.maps:
            return _unmapped(layer, size, lost)
        if not lost.ranges:
            return []
        chain = [self.layer(each) for each in self.names(layer)]
        view = ChainView(chain, self._repository.blobs, self._composed.of(chain))
        bad = joined(Replay(view, map_of(view.size, lost.ranges)).find_bad())
        for each in bad:
            check_answers(self._repository, each.error)
        return bad


def _unmapped(layer: str, size: int, lost: Lost) -> list[Bad]:
    found = [Bad(each.first, size if each.stop is None else min(each.stop, size), each.error) for each in lost.maps]
    missing = Corrupt("the data is missing", subject=layer_name(layer))
    for first, stop in lost.ranges:
        found += [Bad(*pair, missing) for pair in zip(first.tolist(), np.minimum(stop, size).tolist(), strict=True)]
    return joined([each for each in found if each.start < each.stop])


def grouped(disk: str, bad: Mapping[int, Sequence[Bad]]) -> list[LostRange]:
    """What points have lost, as ranges, ascending, each with its points. bad: by point"""
    found: dict[tuple[int, int, str], list[int]] = {}
    for point, some in bad.items():
        for each in some:
            found.setdefault((each.start, each.stop, each.error.subject or ""), []).append(point)
    return [
        LostRange(disk=disk, points=tuple(points), offset=first, length=stop - first, subject=subject)
        for (first, stop, subject), points in sorted(found.items())
    ]


def joined(bad: Sequence[Bad]) -> list[Bad]:
    """Neighbouring ranges with one reason as one."""
    found: list[Bad] = []
    for each in sorted(bad, key=lambda one: one.start):
        last = found[-1] if found else None
        if last is not None and last.stop == each.start and last.error.subject == each.error.subject:
            found[-1] = Bad(last.start, each.stop, last.error)
        else:
            found.append(each)
    return found


def merged(blobs: Iterator[LostBlob], most: int) -> Iterator[Mapping[bytes, LostBlob]]:
    """The blobs in portions of about `most` parts, each blob once a portion with all of its parts."""
    portion: dict[bytes, LostBlob] = {}
    count = 0
    for lost in blobs:
        portion.setdefault(lost.blob, LostBlob(lost.blob, lost.raw)).parts.extend(lost.parts)
        count += len(lost.parts)
        if count >= most:
            yield portion
            portion, count = {}, 0
    if portion:
        yield portion
