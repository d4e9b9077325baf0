"""Packs that were found damaged: records of them for all machines, and a comparison of sizes.

An object index/damaged-NAME (kind D) lists packs of which some byte was found altered or missing.  A writer does not
rely on any blob in such a pack, nor in one that is missing or has another size than the index says: it stores the blob
again if it has its bytes.  A reader that finds a blob damaged takes another copy of it, which an index lists; the id
proves that the copy is right.  `gc` names the copies in the records, and then deletes pack and damage record.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Literal

from snapchain.errors import SnapchainError
from snapchain.objects.store import Archived, ObjectInfo, ObjectStore
from snapchain.repository.crypto import Keyring
from snapchain.repository.envelope import Many, StoredModel, made_by, parse as parse_stored, seal, unseal
from snapchain.repository.format import damage_name, fresh_id, is_damage, is_id, pack_name

KIND = b"D"
MOST_LISTED = 16_000
"""Packs (256 GB) whose presence a shipment checks: 16 requests on S3. Of more it checks a random share."""
_FOLDERS = tuple(f"{number:02x}" for number in range(256))


class DamageRecord(StoredModel):
    """One record. packs: ids of the packs."""

    format: Literal[1] = 1
    time: datetime
    packs: Many[str]
    made_by: str | None = None


def record(store: ObjectStore, keys: Keyring, packs: Iterable[str]) -> None:
    """Store a record of these packs."""
    name = damage_name(fresh_id())
    found = DamageRecord(time=datetime.now(UTC), packs=tuple(sorted(packs)), made_by=made_by())
    store.put(name, seal(keys, KIND, name, found.model_dump_json().encode()))


def read(store: ObjectStore, keys: Keyring, names: Iterable[str]) -> dict[str, frozenset[str]]:
    """The packs of each of these records. One that cannot be read lists none: that damage will be found again."""
    found: dict[str, frozenset[str]] = {}
    for name in names:
        try:
            body = unseal(keys, KIND, name, store.get(name))
            packs = parse_stored(DamageRecord, body, what="the record of damage", subject=name).packs
        except Archived:
            raise
        except SnapchainError:
            packs = ()
        found[name] = frozenset(pack for pack in packs if is_id(pack))
    return found


def recorded(store: ObjectStore, keys: Keyring) -> frozenset[str]:
    """All packs that a record lists."""
    names = [info.name for info in store.list("index/") if is_damage(info.name)]
    return frozenset[str]().union(*read(store, keys, names).values())


def compare(store: ObjectStore, sizes: Mapping[str, int]) -> tuple[frozenset[str], dict[str, ObjectInfo]]:
    """(packs that are missing, or have another size than `sizes` says; packs of which `sizes` says nothing).

    sizes: pack -> bytes of the object, of packs that were durable before this call. Of many packs a random share is
    looked at.
    """
    count = len(_FOLDERS) * MOST_LISTED // max(1, len(sizes))
    folders = [""] if count >= len(_FOLDERS) else [f"{each}/" for each in random.sample(_FOLDERS, max(1, count))]
    bad: set[str] = set()
    fresh: dict[str, ObjectInfo] = {}
    for folder in folders:
        there = list_packs(store, f"packs/{folder}")
        some = {pack: size for pack, size in sizes.items() if pack.startswith(folder.rstrip("/"))}
        bad |= {pack for pack, size in some.items() if pack not in there or there[pack].size != size}
        fresh |= {pack: info for pack, info in there.items() if pack not in sizes}
    return frozenset(bad), fresh


def list_packs(store: ObjectStore, prefix: str = "packs/") -> dict[str, ObjectInfo]:
    """pack -> its object, of what stands at its place below `prefix`."""
    found = ((info.name.rpartition("/")[2], info) for info in store.list(prefix))
    return {pack: info for pack, info in found if is_id(pack) and info.name == pack_name(pack)}
