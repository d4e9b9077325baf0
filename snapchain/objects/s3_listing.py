"""What a listing of a bucket has brought, in little memory and in order."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from datetime import datetime

from snapchain.objects.s3_errors import malformed
from snapchain.objects.store import LARGEST_LISTED_SIZE, ObjectInfo

_NO_TIME = -1e18


class Listing:
    """Names, sizes and times in columns, since there may be a million; and folders."""

    def __init__(self) -> None:
        self.folders: set[str] = set()
        self._names: list[str] = []
        self._sizes = array("q")
        self._times = array("d")

    def __len__(self) -> int:
        return len(self._names) + len(self.folders)

    def add(self, name: str, size: int | None, modified: datetime | None, *, subject: str) -> None:
        """One entry. Raises Unsupported for a size that no object has."""
        if size is None or not 0 <= size <= LARGEST_LISTED_SIZE:
            raise malformed(subject, f"the size of the object is {size}")
        if self._names and name == self._names[-1]:
            return
        self._names.append(name)
        self._sizes.append(size)
        self._times.append(_NO_TIME if modified is None else _seconds(modified, subject))

    def __iter__(self) -> Iterator[ObjectInfo]:
        """By name, each once; of several the last."""
        names = self._names
        order: Sequence[int] = range(len(names))
        if any(names[at] >= names[at + 1] for at in range(len(names) - 1)):
            order = sorted(order, key=names.__getitem__)
        for place, at in enumerate(order):
            if place + 1 < len(order) and names[order[place + 1]] == names[at]:
                continue
            modified = self._times[at]
            yield ObjectInfo(names[at], self._sizes[at], None if modified == _NO_TIME else modified)


def _seconds(modified: datetime, subject: str) -> float:
    try:
        return modified.timestamp()
    except (ValueError, OverflowError, OSError) as error:
        raise malformed(subject, f"the time of the object is {modified}") from error
