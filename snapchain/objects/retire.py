"""Take back a lease or a claim, also where nothing can be deleted.

A key without the permission to delete, or a bucket whose objects are locked, would leave leases and claims as if their
holders were at work, and block others until they count as dead. So one that cannot be deleted is overwritten with
RETIRED, and an object of exactly that size counts as gone. gc deletes it.
"""

from __future__ import annotations

from contextlib import suppress

from snapchain.errors import SnapchainError
from snapchain.objects.store import ObjectInfo, ObjectStore, Refused

RETIRED = b"retired\n"
"""No lease or claim has this size: a sealed lease is longer than 64 bytes, a claim is empty."""


def retire(store: ObjectStore, name: str) -> SnapchainError | None:
    """Delete the object, or else make it count as gone. Returns why it could not be deleted. Raises nothing."""
    try:
        store.delete(name)
    except SnapchainError as error:
        if isinstance(error, Refused):
            with suppress(SnapchainError):  # then its age decides
                store.put(name, RETIRED)
        return error
    return None


def stays(size: int | None) -> bool:
    """Whether an object of this size (None: no object) does not count as gone."""
    return size is not None and size != len(RETIRED)


def is_retired(info: ObjectInfo) -> bool:
    """Whether the object counts as gone."""
    return not stays(info.size)
