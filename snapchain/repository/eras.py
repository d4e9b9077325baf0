"""Eras: which index objects count.

A collection that deletes packs begins a new era: it writes the indexes of what stays under the next number, says that
they are complete, and deletes those before.  The highest complete era counts, and so do those above it, which are being
written.  A writer that slept through a collection may store an index that lists deleted packs: it has an old number, so
it misleads nobody.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from snapchain.errors import Conflict, Corrupt, NotFound
from snapchain.objects.exclusive import create_exclusively
from snapchain.objects.store import ObjectInfo, ObjectStore
from snapchain.repository.crypto import Keyring
from snapchain.repository.envelope import seal
from snapchain.repository.format import index_era, index_name

KIND = b"I"
"""Of an index object."""
ALONE = "0" * 32
BEGUN = "0" * 31 + "1"
COMPLETE = "0" * 31 + "2"
"""Names of indexes of nothing. ALONE: takes the number of an era for a collector that works alone: the era counts at
once; BEGUN: for one that works beside writers: it counts when COMPLETE is there."""
_LAST_ERA = 10**10 - 1
_NOTHING = bytes(8)
"""An index of no packs and no blobs."""
_ONE_LISTING = 1000
"""Names that a store is sure to list at one moment."""


def begin_era(
    store: ObjectStore, keys: Keyring, before: Iterable[str], *, conditional: bool, alone: bool = False
) -> int:
    """Take the number after those of the index objects `before`, by an index of nothing. Returns the number.

    conditional: as in objects/exclusive.py; alone: whether no writer is at work, so that it may count at once.
    Raises Conflict when another collector has taken the number: one of the two had stood still.
    """
    era = max((index_era(name) or 0 for name in before), default=0) + 1
    if era > _LAST_ERA:
        raise Corrupt("the number of an index's era is higher than any collection can have reached", subject=store.url)
    name = index_name(era, ALONE if alone else BEGUN)
    if not create_exclusively(store, name, _of_nothing(keys, name), conditional=conditional):
        raise Conflict("another snapchain collects at the same time", subject=store.url, hint="run gc again")
    return era


def complete_era(store: ObjectStore, keys: Keyring, era: int) -> None:
    """Say that all that stays is listed in this era."""
    name = index_name(era, COMPLETE)
    store.put(name, _of_nothing(keys, name))


def is_end_of_era(name: str) -> bool:
    """Whether an index object says that its era counts."""
    return name.endswith((f"-{ALONE}", f"-{COMPLETE}"))


def _of_nothing(keys: Keyring, name: str) -> bytes:
    return seal(keys, KIND, name, _NOTHING)


def newest(store: ObjectStore) -> tuple[int, list[ObjectInfo]]:
    """The era to write in, 0 in a new repository, and the index objects that count."""
    return counting(store.list("index/"))


def counting(listed: Iterable[ObjectInfo]) -> tuple[int, list[ObjectInfo]]:
    """As `newest`, from a listing of all below index/."""
    highest, complete, found = _eras(listed)
    return highest, [info for number, info in found if number >= complete]


def _eras(listed: Iterable[ObjectInfo]) -> tuple[int, int, list[tuple[int, ObjectInfo]]]:
    """(the highest era, the highest that is complete, each index object with its era)."""
    found = [(number, info) for info in listed for number in [index_era(info.name)] if number is not None]
    ends = (index_name(number, name) for number, _ in found for name in (ALONE, COMPLETE))
    names = {info.name for _, info in found}
    complete = max((index_era(name) or 0 for name in ends if name in names), default=0)
    return max((number for number, _ in found), default=0), complete, found


def check_one_moment(store: ObjectStore, listed: Sequence[ObjectInfo]) -> None:
    """Raises NotFound where a listing shows indexes of an era that was over before its end.

    A listing in pieces may begin while an era counts, and come to the records of what is condemned when a collector has
    deleted these, with the packs. Whoever read the indexes from a cache would rely on packs that are gone.
    """
    highest, complete, _ = _eras(listed)
    if highest == complete and len(listed) < _ONE_LISTING:
        return
    if _eras(store.list("index/"))[1] != complete:
        raise NotFound("another era began while the indexes were listed", subject=store.url)
