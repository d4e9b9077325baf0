"""Where files come from: a point of a destination, or an image here, as bytes that can be read at any offset."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Protocol, Self

from snapchain.destination.address import PointAddress
from snapchain.destination.reading import BlobDisk, ReadableDestination
from snapchain.errors import Conflict, InvalidInput
from snapchain.files.session import Bytes
from snapchain.image import ImageChain
from snapchain.model.consistency import Consistency
from snapchain.model.events import OnEvent, ignore
from snapchain.model.extents import Extents
from snapchain.model.points import chosen_point
from snapchain.nbd.cache import BlockCache, Loader
from snapchain.nbd.reading import BlobReading, FileReading, Reading
from snapchain.source.at_rest import ImageAtRest

CACHE_BYTES = 64 << 20
PATIENCE = 120.0
"""Seconds for which a read waits for a store that does not answer."""
_CLEAN = {Consistency.OFFLINE, Consistency.APPLICATION, Consistency.FILESYSTEM}


@dataclass(frozen=True, slots=True)
class Moment:
    """A point, or an image as it is now: then `point` and `time` are None. name: for people

    is_clean: its file systems were at rest, as far as that is recorded
    """

    name: str
    point: int | None
    time: datetime | None
    is_clean: bool


class Source(Protocol):
    """A context manager. name: for people"""

    name: str

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...

    def moments(self) -> Sequence[Moment]:
        """The moment that was named, or all of them, ascending."""
        ...

    @contextmanager
    def opened(self, moment: Moment) -> Iterator[Bytes]:
        """Its bytes. Raises what keeps them from being opened."""
        ...


class PointSource:
    """The point of an address, or all points of its disk. What is fetched for one is kept for the others.

    Raises NotFound, and InvalidInput where a point is named and all are asked for.
    """

    def __init__(
        self,
        destination: ReadableDestination,
        address: PointAddress,
        *,
        all_points: bool = False,
        on_event: OnEvent = ignore,
    ) -> None:
        if all_points and address.point is not None:
            raise InvalidInput("a point is named, and all points are asked for", subject=str(address))
        self._destination, self._disk, self._on_event = destination, address.disk, on_event
        self.name = f"{address.dest}::{address.disk}"
        (record,) = destination.disks(address.disk)
        points = record.points if all_points else [chosen_point(address.disk, record.points, address.point)]
        self._content = {each.point: each.content_id for each in points}
        self._moments = [
            Moment(f"{self.name}@{each.point}", each.point, each.time, each.consistency in _CLEAN) for each in points
        ]
        self._loader: Loader | None = None
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def moments(self) -> Sequence[Moment]:
        """See `Source`."""
        return self._moments

    @contextmanager
    def opened(self, moment: Moment) -> Iterator[Bytes]:
        """See `Source`. Raises also Conflict where the point is another one by now."""
        assert moment.point is not None
        names_damage = self._destination.traits.names_damage
        with self._destination.whole(
            self._disk, str(moment.point), damaged=names_damage, on_event=self._on_event
        ) as disk:
            if disk.content_id != self._content[moment.point]:
                raise Conflict("the point is another one by now", subject=moment.name, hint="run it again")
            reading: Reading
            if isinstance(disk, BlobDisk):
                if self._loader is None:
                    self._loader = Loader(BlockCache(CACHE_BYTES), disk.load)
                    self._stack.callback(self._loader.close)
                reading = BlobReading(disk, disk, self._loader, patience=PATIENCE)
            else:
                reading = FileReading(disk)
            yield _Read(reading)


class ImageSource:
    """An image at rest, locked against writers while it is read."""

    def __init__(
        self,
        path: Path,
        *,
        format: str | None = None,
        image_dirs: Sequence[Path] = (),
        on_event: OnEvent = ignore,
    ) -> None:
        self.name = str(path)
        self._image = ImageAtRest(path, format=format, image_dirs=image_dirs, on_event=on_event)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None: ...

    def moments(self) -> Sequence[Moment]:
        """See `Source`."""
        return [Moment(self.name, None, None, is_clean=True)]

    @contextmanager
    def opened(self, moment: Moment) -> Iterator[Bytes]:
        """See `Source`. Raises what `scan` raises, and Busy."""
        _ = moment
        with self._image.opened() as chain:
            yield _Read(FileReading(_Chain(chain.size, chain.resolve(), chain)))
            self._image.check_unchanged(chain)


class _Chain:
    """An image chain as a WholeDisk."""

    def __init__(self, size: int, extents: Extents, chain: ImageChain) -> None:
        self.size, self.extents, self._chain = size, extents, chain

    def read_into(self, offset: int, buffer: memoryview, /) -> None:
        self._chain.read_into(offset, buffer, resolved=self.extents)


class _Read:
    """A Reading as Bytes."""

    def __init__(self, reading: Reading) -> None:
        self.size, self._reading = reading.size, reading

    def read(self, offset: int, length: int, /) -> bytes:
        found = self._reading.ready(offset, length)
        if found is None:
            found = [piece for pieces in self._reading.wait(offset, length) for piece in pieces]
        return b"".join(bytes(some) if data is None else data for _, some, data in found)
