"""The list of key slots: who made each and when, and which were removed.  Sealed; each change is a new object.

    keys/SLOT                       a slot: what a passphrase opens, in plain text (keys.py)
    slots/00000000000000000001      the list as `init` made it
    slots/00000000000000000002      the list after the first change

A store can plant slots, and put removed ones back.  It cannot seal a list: a slot that the list does not have is
reported, and one that it has as removed opens nothing any more.  A slot counts by its salt: put back under another
name, it is still the removed one.

A change is one create-if-absent of the next list.  So of two commands that would each remove the slot of the other,
the slower one meets the list of the faster one, and is refused.

A repository of an older version has no list until its keys are first changed.  A list that cannot be read hides no
data: the one before it counts then, with a notice.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Literal, Self

from snapchain.errors import Conflict, Corrupt, NotFound, SnapchainError, Unsupported
from snapchain.objects.exclusive import create_exclusively
from snapchain.objects.store import ObjectStore
from snapchain.repository.crypto import Keyring
from snapchain.repository.envelope import Many, StoredModel, made_by, parse as parse_stored, seal, unseal
from snapchain.repository.keys import KeySlot, parse as parse_slot

KIND = b"K"
KEYS = "keys/"
FOLDER = "slots/"
_NAME = re.compile(r"slots/([0-9]{20})")
_ATTEMPTS = 20
_MOST = 10**12
"""Higher numbers are not ours: nobody changes keys so often."""
_OLDER = 10
"""Lists that are tried when the newest cannot be read."""


class ListedSlot(StoredModel):
    """A slot that is in use.

    slot: its name below keys/ when it was made; salt: hex, by which it counts; digest: as KeySlot.digest
    created, host: null for a slot that was made before there was a list
    recovery: whether its passphrase is a recovery key
    """

    slot: str
    salt: str
    digest: str
    created: datetime | None = None
    host: str | None = None
    label: str = ""
    recovery: bool = False
    made_by: str | None = None

    @classmethod
    def of(cls, name: str, slot: KeySlot, *, label: str = "", recovery: bool = False) -> Self:
        """A slot that this program has just made. name: of the object"""
        return cls(
            slot=name.removeprefix(KEYS),
            salt=slot.salt_hex,
            digest=slot.digest,
            created=datetime.now(UTC),
            host=socket.gethostname(),
            label=label,
            recovery=recovery,
            made_by=made_by(),
        )


class RemovedSlot(StoredModel):
    """A slot that opens nothing any more. host: where it was removed"""

    slot: str
    salt: str
    time: datetime
    host: str


class SlotList(StoredModel):
    """One list. generation: as in its name, 0 where there is none yet."""

    format: Literal[1] = 1
    generation: int = 0
    time: datetime | None = None
    slots: Many[ListedSlot] = ()
    removed: Many[RemovedSlot] = ()
    made_by: str | None = None

    def listed(self, salt: str) -> ListedSlot | None:
        """The slot with this salt, if it is in use."""
        return next((each for each in self.slots if each.salt == salt), None)

    def removal(self, salt: str) -> RemovedSlot | None:
        """What is recorded of the removal of the slot with this salt."""
        return next((each for each in self.removed if each.salt == salt), None)


def newest(store: ObjectStore) -> int:
    """The number of the newest list, 0 where there is none; one request."""
    return max(_numbers(store), default=0)


def read(store: ObjectStore, keys: Keyring) -> tuple[SlotList, list[str]]:
    """The newest list that can be read, an empty one where there is none, and notices of those that cannot be.

    Raises Unsupported for a list of a newer snapchain.
    """
    found, notices, _ = _read(store, keys)
    return found, notices


def change(store: ObjectStore, keys: Keyring, alter: Callable[[SlotList], SlotList], *, conditional: bool) -> SlotList:
    """Store the next list: what `alter` makes of the newest. It may be called several times, and raise.

    conditional: whether the store's create-if-absent can be trusted. Raises Conflict when others are always faster.
    """
    for _ in range(_ATTEMPTS):
        current, _notices, number = _read(store, keys)
        if number >= _MOST:
            raise Corrupt("no list of key slots can follow: somebody has planted one", subject=list_name(number))
        made = {"generation": number + 1, "time": datetime.now(UTC), "made_by": made_by()}
        wanted = alter(current).model_copy(update=made)
        name = list_name(number + 1)
        body = seal(keys, KIND, name, wanted.model_dump_json().encode())
        if create_exclusively(store, name, body, conditional=conditional) or _is_ours(store, name, body):
            return wanted
    raise Conflict("others change the key slots all the time", subject=store.url, hint="run it again")


def _read(store: ObjectStore, keys: Keyring) -> tuple[SlotList, list[str], int]:
    """As `read`, and the number of the newest list."""
    numbers = sorted(_numbers(store), reverse=True)
    notices: list[str] = []
    for number in numbers[:_OLDER]:
        try:
            return _load(store, keys, number), notices, numbers[0]
        except (Corrupt, NotFound) as error:
            notices.append(f"a list of key slots cannot be read, so a removed slot may count again ({error})")
    return SlotList(), notices, max(numbers, default=0)


def check(store: ObjectStore, keys: Keyring) -> list[SnapchainError]:
    """What is wrong with the newest list, and which slots that it lists are missing or damaged."""
    while True:
        number = newest(store)
        if not number:
            return []
        try:
            listed = _load(store, keys, number)
        except SnapchainError as error:
            return [error]
        found = [fault for each in listed.slots if (fault := _missing(store, each)) is not None]
        if newest(store) == number:  # else a slot may have been removed meanwhile
            return found


def _is_ours(store: ObjectStore, name: str, body: bytes) -> bool:
    """Whether the list is there that was to be created: a request that was sent twice fails the second time."""
    try:
        return store.get(name) == body
    except NotFound:
        return False


def _missing(store: ObjectStore, listed: ListedSlot) -> SnapchainError | None:
    name = KEYS + listed.slot
    try:
        slot = parse_slot(store.get(name), subject=name)
    except NotFound:
        return Corrupt("the key slot is missing from the store: its passphrase opens nothing", subject=name)
    except (Corrupt, Unsupported) as error:
        return error
    if slot.digest == listed.digest:
        return None
    return Corrupt("the key slot was changed since it was made: its passphrase opens nothing", subject=name)


def list_name(number: int) -> str:
    """The object name of a list."""
    return f"{FOLDER}{number:020d}"


def _numbers(store: ObjectStore) -> list[int]:
    found = (_NAME.fullmatch(info.name) for info in store.list(FOLDER))
    return [number for match in found if match and 0 < (number := int(match[1])) <= _MOST]


def _load(store: ObjectStore, keys: Keyring, number: int) -> SlotList:
    name = list_name(number)
    found = parse_stored(
        SlotList, unseal(keys, KIND, name, store.get(name)), what="the list of key slots", subject=name
    )
    if found.generation != number:
        raise Corrupt("the list of key slots has another number than its name", subject=name)
    return found
