"""A source of files that is nothing but bytes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Self

from snapchain.files.session import Bytes
from snapchain.ops.files.source import Moment


class BytesSource:
    """One moment, of these bytes."""

    name = "the disk"

    def __init__(self, disk: Bytes) -> None:
        self._disk = disk

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None: ...

    def moments(self) -> Sequence[Moment]:
        return [Moment(self.name, None, None, is_clean=True)]

    @contextmanager
    def opened(self, moment: Moment) -> Iterator[Bytes]:
        _ = moment
        yield self._disk
