"""Where files come from: a point of a destination, or an image here, as bytes that can be read at any offset."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Protocol, Self

from snapchain.destination.address import PointAddress
from snapchain.destination.reading import ReadableDestination
from snapchain.errors import InvalidInput
from snapchain.files.session import Bytes
from snapchain.image import ImageChain
from snapchain.model.consistency import Consistency
from snapchain.model.events import OnEvent, ignore
from snapchain.model.extents import Extents
from snapchain.model.points import chosen_point
from snapchain.nbd.reading import FileReading, Reading
from snapchain.ops.readings import PATIENCE, PointReadings
from snapchain.source.at_rest import ImageAtRest

CACHE_BYTES = 64 << 20
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
        self._destination, self._disk = destination, address.disk
        self.name = f"{address.dest}::{address.disk}"
        (record,) = destination.disks(address.disk)
        points = record.points if all_points else [chosen_point(address.disk, record.points, address.point)]
        self._records = {each.point: each for each in points}
        self._moments = [
            Moment(f"{self.name}@{each.point}", each.point, each.time, each.consistency in _CLEAN) for each in points
        ]
        self._readings = PointReadings(cache=CACHE_BYTES, patience=PATIENCE, on_event=on_event)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._readings.__exit__()

    def moments(self) -> Sequence[Moment]:
        """See `Source`."""
        return self._moments

    @contextmanager
    def opened(self, moment: Moment) -> Iterator[Bytes]:
        """See `Source`. Raises NotFound where the point is another one by now."""
        assert moment.point is not None
        with self._readings.opened(self._destination, self._disk, self._records[moment.point]) as reading:
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
