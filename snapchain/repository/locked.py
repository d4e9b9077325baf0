"""Objects that the store has locked (Object Lock of S3): gc leaves them until they can be deleted.

S3 does not refuse to delete a locked object: it hides it, which frees nothing, and makes it harder to get back.  So the
store is asked first, and only about what would be deleted.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime

from snapchain.objects.store import Locks, ObjectStore, innermost

_AT_ONCE = 8
"""Requests. A bucket without Object Lock is asked once for all."""


class Locked:
    """The locks of one store, each asked for once. The next run notices locks that end during this one."""

    def __init__(self, store: ObjectStore) -> None:
        bottom = innermost(store)
        self._store = bottom if isinstance(bottom, Locks) else None
        self._known: dict[str, datetime | None] = {}

    def among(self, names: Iterable[str]) -> dict[str, datetime]:
        """Those of these objects that are locked, and until when."""
        wanted = list(names)
        store = self._store
        if store is None:
            return {}
        new = [name for name in wanted if name not in self._known]
        if new:
            # The first one alone: with it the bucket is asked whether it locks at all.
            self._known[new[0]] = store.locked_until(new[0])
            with ThreadPoolExecutor(_AT_ONCE, "locks") as pool:
                self._known.update(zip(new[1:], pool.map(store.locked_until, new[1:]), strict=True))
        return {name: until for name in wanted if (until := self._known[name]) is not None}


def last_of(locked: Mapping[str, datetime]) -> datetime | None:
    """When the last of these locks ends, None where there is none, or one that has no end."""
    last = max(locked.values(), default=None)
    return None if last is None or last == datetime.max.replace(tzinfo=UTC) else last
