"""Counts what is asked of a server, request by request: also pages of listings, and what is sent again."""

from __future__ import annotations

import threading
from collections import Counter
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from snapchain.objects.store import ObjectStore, innermost

if TYPE_CHECKING:
    from snapchain.model.traffic import Traffic

_FIELDS = {
    "PutObject": "puts",
    "ListObjectsV2": "lists",
    "GetObject": "gets",
    "HeadObject": "heads",
    "DeleteObject": "deletes",
}
"""Operation of S3 -> field of Traffic. botocore itself may send a HeadBucket."""


class Meter:
    """The counts of one store. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()

    def sent(self, operation: str, size: int) -> None:
        """A request goes out. size: bytes of its body"""
        with self._lock:
            self._counts[_FIELDS.get(operation, "heads")] += 1
            self._counts["bytes_up"] += size

    def received(self, size: int) -> None:
        """Bytes of a response's body have come."""
        with self._lock:
            self._counts["bytes_down"] += size

    def repeated(self) -> None:
        """A request will be sent again."""
        with self._lock:
            self._counts["retries"] += 1

    def refused(self) -> None:
        """The server wants fewer requests."""
        with self._lock:
            self._counts["refused"] += 1

    @property
    def traffic(self) -> Traffic:
        """All so far."""
        from snapchain.model.traffic import Traffic

        with self._lock:
            return Traffic(**self._counts)


@runtime_checkable
class Metered(Protocol):
    """A store that counts its requests."""

    meter: Meter


def traffic_of(store: ObjectStore) -> Traffic | None:
    """What was asked so far of the store below all wrappers; None for one to which no requests are sent."""
    bottom = innermost(store)
    return bottom.meter.traffic if isinstance(bottom, Metered) else None
