"""Repair: store again what a repository has lost, from images, other repositories and replicas that still have it.

A source is asked by the hashes of leaves: its points and images are looked through once, and of a second point of the
same disk only what differs.  Points answer from their records; images are read.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from snapchain.destination.address import ImageAddress, in_full, parse_address
from snapchain.destination.reading import LayerReader, LeafSource, PointLeaves, ReadableDestination, Sink, WholeDisk
from snapchain.errors import Corrupt, Unsupported
from snapchain.image import ImageChain
from snapchain.image.leaves import WORKERS, leaf_hashes
from snapchain.model.content import LEAF_BYTES, Hashes, content_id as content_id_of, empty_sum, sum_of
from snapchain.model.events import OnEvent, counting, ignore
from snapchain.model.extents import ABSENT, DATA, ZERO, Extents, Int64s
from snapchain.model.points import chosen_point
from snapchain.ops.diff import ImageSide, candidates, windows
from snapchain.source.at_rest import ImageAtRest

_APART = 1024
"""Leaves (64 MiB) between two that are wanted: a point is read on rather than asked for again."""


_PIECE = 4 * 1024 * 1024


class _Enough(Exception):
    """All that was wanted of a point has come."""


@dataclass(frozen=True, slots=True)
class _Seen:
    """What a disk was made of that was looked through."""

    size: int
    made_of: Sequence[tuple[object, Extents]]

    def parts(self) -> Sequence[tuple[object, Extents]]:
        """As PointLeaves."""
        return self.made_of


@dataclass(slots=True)
class _Places:
    """Where the leaves are that were located: hash -> (number of the disk, number of the leaf)."""

    of: dict[bytes, tuple[int, int]] = field(default_factory=dict)

    def look_through(
        self,
        sides: Iterable[AbstractContextManager[PointLeaves]],
        wanted: Collection[bytes],
        on_event: OnEvent,
    ) -> set[bytes]:
        """Find leaves in disks that are much alike: the first one is looked through whole, then what differs."""
        left = {leaf for leaf in wanted if leaf not in self.of}
        before: _Seen | None = None
        for number, opening in enumerate(sides):
            if not left:
                break
            with opening as side:
                now = _Seen(side.size, side.parts())
                ranges = candidates(before or _Seen(0, ()), now)
                on_bytes = counting(f"search {side.name}", ranges.data_bytes, on_event)
                for first, stop in windows(ranges, side.size):
                    numbers, hashes = side.leaves(first, stop)
                    for at, leaf in zip(numbers.tolist(), map(bytes, hashes), strict=True):
                        if leaf in left:
                            left.remove(leaf)
                            self.of[leaf] = number, at
                    on_bytes(stop - first)
                before = now
        return {leaf for leaf in wanted if leaf in self.of}

    def by_disk(self, located: Collection[bytes]) -> dict[int, dict[int, bytes]]:
        """disk -> number of a leaf, ascending -> its hash."""
        chosen = sorted((self.of[leaf], leaf) for leaf in located if leaf in self.of)
        found: dict[int, dict[int, bytes]] = {}
        for (number, at), leaf in chosen:
            found.setdefault(number, {})[at] = leaf
        return found


class _HashedImage(ImageSide):
    """An image whose leaves are hashed on several threads."""

    def leaves(self, first: int, stop: int) -> tuple[Int64s, Hashes]:
        """As PointLeaves."""
        pieces = [(at, min(at + _PIECE, stop)) for at in range(first, stop, _PIECE)]
        with ThreadPoolExecutor(WORKERS, "search") as pool:
            found = list(pool.map(lambda piece: ImageSide.leaves(self, *piece), pieces))
        return np.concatenate([each for each, _ in found]), np.concatenate([each for _, each in found])


class ImageSource:
    """An image and all files below it, each as the disk that it showed when it was the top. A LeafSource."""

    def __init__(self, name: str, chain: ImageChain, on_event: OnEvent = ignore) -> None:
        self.name = name
        self._on_event = on_event
        self._disks = [chain, *(chain.at(at) for at in reversed(range(len(chain.files) - 1)))]
        self._places = _Places()
        self._contents: dict[int, str] = {}

    def locate(self, wanted: Collection[bytes]) -> Collection[bytes]:
        """As LeafSource."""
        sides = (nullcontext(_HashedImage(self.name, disk)) for disk in self._disks)
        return self._places.look_through(sides, wanted, self._on_event)

    def read(self, located: Collection[bytes]) -> Iterator[tuple[bytes, bytes]]:
        """As LeafSource."""
        for number, leaves in self._places.by_disk(located).items():
            disk = self._disks[number]
            for at, leaf in leaves.items():
                body = bytearray(LEAF_BYTES)
                length = min(LEAF_BYTES, disk.size - at * LEAF_BYTES)
                disk.read_into(at * LEAF_BYTES, memoryview(body)[:length])
                yield leaf, bytes(body)

    def whole(self, size: int, content_id: str) -> WholeDisk | None:
        """As LeafSource."""
        for number, disk in enumerate(self._disks):
            if disk.size == size and self._content_of(number) == content_id:
                return _WholeImage(disk)
        return None

    def _content_of(self, number: int) -> str:
        if number not in self._contents:
            disk = self._disks[number]
            total = empty_sum()
            for numbers, hashes in leaf_hashes(disk, on_bytes=lambda _: None):
                total += sum_of(numbers, hashes)
            self._contents[number] = content_id_of(disk.size, total)
        return self._contents[number]


@dataclass(frozen=True, slots=True)
class _WholeImage:
    """An image as a WholeDisk."""

    chain: ImageChain

    @property
    def size(self) -> int:
        return self.chain.size

    @property
    def extents(self) -> Extents:
        shown = self.chain.resolve()
        return shown.mapped(np.where(shown.val >= DATA, DATA, np.where(shown.val == ZERO, ZERO, ABSENT)))

    def read_into(self, offset: int, buffer: memoryview, /) -> None:
        self.chain.read_into(offset, buffer)


class PointSource:
    """A disk of a destination: one of its points, or all of them, the newest first. A LeafSource."""

    def __init__(
        self,
        name: str,
        destination: ReadableDestination,
        disk: str,
        point: str | None,
        *,
        kept: ExitStack,
        on_event: OnEvent = ignore,
    ) -> None:
        """kept: what is opened stays so until then. Raises NotFound for a disk or point that is not there."""
        self.name = name
        self._kept, self._on_event = kept, on_event
        self._destination, self._disk = destination, disk
        (record,) = destination.disks(disk)
        chosen = record.points if point is None else [chosen_point(disk, record.points, in_full(point))]
        self._records = list(reversed(chosen))
        self._points = [str(each.point) for each in self._records]
        self._places = _Places()

    def locate(self, wanted: Collection[bytes]) -> Collection[bytes]:
        """As LeafSource."""
        sides = (self._destination.leaves(self._disk, point) for point in self._points)
        return self._places.look_through(sides, wanted, self._on_event)

    def read(self, located: Collection[bytes]) -> Iterator[tuple[bytes, bytes]]:
        """As LeafSource."""
        streams = self._destination.traits.streams
        for number, leaves in self._places.by_disk(located).items():
            for some in [list(leaves)] if streams else _together(leaves):
                with self._destination.reader(self._disk, self._points[number], clusters=False) as reader:
                    for layer in reader.layers():
                        yield from _copied(layer, {at: leaves[at] for at in some}, whole=streams)

    def whole(self, size: int, content_id: str) -> WholeDisk | None:
        """As LeafSource. None for what is read in one direction only."""
        for record in self._records:
            if (record.virtual_size, record.content_id) == (size, content_id):
                with suppress(Unsupported, Corrupt):
                    return self._kept.enter_context(self._destination.whole(self._disk, str(record.point)))
        return None


@contextmanager
def opened_sources(
    addresses: Sequence[str],
    open_destination: Callable[[str], ReadableDestination],
    *,
    format: str | None = None,
    image_dirs: Sequence[Path] = (),
    on_event: OnEvent = ignore,
) -> Iterator[list[LeafSource]]:
    """What the addresses name: images, locked against writers, and disks of destinations, with or without a point.

    Raises NotFound, InvalidInput, and what opening an image or a destination raises.
    """
    with ExitStack() as stack:
        found: list[LeafSource] = []
        for text in addresses:
            address = parse_address(text)
            if isinstance(address, ImageAddress):
                source = ImageAtRest(address.path, format=format, image_dirs=image_dirs, on_event=on_event)
                found.append(ImageSource(text, stack.enter_context(source.opened()), on_event))
            else:
                place = open_destination(address.dest)
                found.append(PointSource(text, place, address.disk, address.point, kept=stack, on_event=on_event))
        yield found


def _together(numbers: Iterable[int]) -> Iterator[list[int]]:
    """Leaves, ascending, in groups that are worth one reading."""
    group: list[int] = []
    for at in numbers:
        if group and at - group[-1] > _APART:
            yield group
            group = []
        group.append(at)
    if group:
        yield group


def _copied(layer: LayerReader, wanted: Mapping[int, bytes], *, whole: bool) -> Iterator[tuple[bytes, bytes]]:
    """(hash, bytes) of leaves of a layer that shows a whole point, by their numbers; who gets them checks the hashes.

    whole: the layer can only be read from its beginning to its end
    """
    bodies = {at: bytearray(LEAF_BYTES) for at in wanted}
    first, stop = min(wanted) * LEAF_BYTES, (max(wanted) + 1) * LEAF_BYTES

    def write(pieces: Sequence[tuple[int, memoryview]]) -> None:
        for offset, piece in pieces:
            for at in range(offset // LEAF_BYTES, -(-(offset + len(piece)) // LEAF_BYTES)):
                if at in bodies:
                    begin, end = max(offset, at * LEAF_BYTES), min(offset + len(piece), (at + 1) * LEAF_BYTES)
                    part = piece[begin - offset : end - offset]
                    bodies[at][begin - at * LEAF_BYTES : end - at * LEAF_BYTES] = part

    def on_copied(done: int, _: int) -> None:
        if not whole and done >= stop:
            raise _Enough

    # What is damaged there as well is missing then.
    with suppress(_Enough, Corrupt):
        layer.copy(Sink(write), start=0 if whole else first, on_copied=on_copied)
    for at, body in bodies.items():
        yield wanted[at], bytes(body)
