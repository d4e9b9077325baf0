"""key: which passphrases open a repository; add one, change one, remove one.

A change writes the new slot first, reads it back and opens it, then stores the next list of key slots
(repository/slot_list.py), and deletes an old slot last.  A crash in between leaves an old passphrase or the new one, or
both, that open the repository.  The master key stays as it is: whoever has kept a copy of a removed slot, and has its
passphrase, can still unwrap it.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from enum import StrEnum
from itertools import islice

from pydantic import BaseModel, ConfigDict

from snapchain.destinations import traits_of
from snapchain.errors import Conflict, Corrupt, InvalidInput, NotFound, SnapchainError, Unavailable, Unsupported
from snapchain.host.terminal import shell_word
from snapchain.model.events import Notice, OnEvent, ignore
from snapchain.objects.reserve import spending
from snapchain.repository import keys as slots, slot_list
from snapchain.repository.crypto import NONE
from snapchain.repository.keys import KeySlot
from snapchain.repository.known import Vouched
from snapchain.repository.opening import note_slot, open_repository
from snapchain.repository.recovery_key import canonical, generate
from snapchain.repository.repository import Passphrase, Repository
from snapchain.repository.slot_list import KEYS, ListedSlot, RemovedSlot, SlotList

COSTS = tuple(slots.COSTS)
LONGEST_LABEL = 100
SHORTEST_PREFIX = 4
_MOST_READ = 200
"""Slots that are looked at: a store could plant thousands."""


class Action(StrEnum):
    """What is done to the key slots."""

    LIST = "list"
    ADD = "add"
    CHANGE = "change"
    REMOVE = "remove"


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True)


class KeyCost(_Record):
    """What one guess at a passphrase costs (Argon2id). factor: the work, as a multiple of the least"""

    memory_kib: int
    iterations: int
    lanes: int
    factor: float


class KeyRow(_Record):
    """One key slot.

    slot: its name below keys/; created, host: null where no list has them; opened: whether it opened the repository now
    recovery: whether its passphrase is a recovery key; cost: null for one that is missing or cannot be read
    warning: what is wrong with it
    """

    slot: str
    label: str = ""
    created: datetime | None = None
    host: str | None = None
    recovery: bool = False
    opened: bool = False
    cost: KeyCost | None = None
    warning: str | None = None


class KeyList(_Record):
    """All key slots, those in use first."""

    destination: str
    repository: str
    slots: tuple[KeyRow, ...]


class KeyReport(_Record):
    """What was done, or would be.

    added: the new slot, null as long as there is none; removed: name of a slot; left: slots in use
    not_deleted: removed slots that the store did not let be deleted
    """

    destination: str
    action: Action
    added: KeyRow | None = None
    removed: str | None = None
    left: int
    not_deleted: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class NewKey:
    """A slot to be made.

    passphrase: asked for once, when nothing else stands in the way; None: the one that opened the repository
    label: for people; recovery: whether it is a recovery key; cost: one of COSTS; None: the least, or that of the slot
    that is replaced
    """

    passphrase: Callable[[], str] | None
    label: str | None = None
    recovery: bool = False
    cost: int | None = None


def recovery_key() -> str:
    """A new passphrase for paper (repository/recovery_key.py)."""
    return generate()


def open_keys(
    destination: str, *, passphrase: Passphrase, writing: bool = False, on_event: OnEvent = ignore
) -> Repository:
    """The repository whose keys are meant.

    Raises InvalidInput for a replica, and for a repository without encryption; and as `open_repository`.
    """
    if not (traits := traits_of(destination)).encrypts:
        raise InvalidInput(
            f"a {traits.kind} is not encrypted, so it has no keys",
            subject=destination,
            hint="access to it is by ssh keys and the modes of its files",
        )
    repository = open_repository(destination, passphrase=passphrase, writing=writing)
    for notice in repository.notices:
        on_event(Notice(notice))
    if repository.config.encryption == NONE:
        raise InvalidInput(
            "the repository is not encrypted, so it has no keys",
            subject=destination,
            hint="encryption is chosen at `init`; ship to a repository that has it",
        )
    return repository


def listed(repository: Repository, *, on_event: OnEvent = ignore) -> KeyList:
    """All key slots that the store has, and those that it should have. Raises as the store."""
    found = _look(repository, on_event)
    rows = [
        *(_row(repository, found, name) for name in found.there),
        *(_row_of(each, warning="missing in the store: its passphrase opens nothing") for each in found.missing),
    ]
    order = sorted(rows, key=lambda row: (row.warning is not None, row.created is not None, row.created or _NEVER))
    return KeyList(destination=repository.store.url, repository=repository.config.id, slots=tuple(order))


def add(repository: Repository, new: NewKey, *, dry_run: bool = False, on_event: OnEvent = ignore) -> KeyReport:
    """Make a slot for another passphrase. dry_run: only check that it can be made; no passphrase is asked for.

    Raises InvalidInput for a bad label, one slot too many, and a passphrase that opens the repository already; Conflict
    when the passphrase that opened the repository was removed meanwhile.
    """
    found = _look(repository, on_event)
    _check_new(repository, found, new)
    if dry_run:
        left = len(_with_opener(repository, found.now).slots) + 1
        return KeyReport(destination=repository.store.url, action=Action.ADD, left=left)
    return _make(repository, new, found, Action.ADD, on_event)


def change(
    repository: Repository,
    new: NewKey,
    *,
    secret: Passphrase,
    dry_run: bool = False,
    on_event: OnEvent = ignore,
) -> KeyReport:
    """Replace the slot that opened the repository by one with another passphrase, or another cost.

    secret: what opened it, for a new slot with the same passphrase. The new slot keeps what `new` does not name.
    dry_run, errors: as `add`
    """
    found = _look(repository, on_event)
    before = _opener(repository, found.now)
    new = replace(
        new,
        label=before.label if new.label is None else new.label,
        recovery=before.recovery if new.passphrase is None else new.recovery,
        cost=_cost_before(repository, found) if new.cost is None else new.cost,
    )
    _check_new(repository, found, new)
    if dry_run:
        left = len(_with_opener(repository, found.now).slots)
        return KeyReport(destination=repository.store.url, action=Action.CHANGE, removed=before.slot, left=left)
    return _make(repository, new, found, Action.CHANGE, on_event, secret=secret)


def remove(
    repository: Repository,
    wanted: str,
    *,
    even_own: bool = False,
    dry_run: bool = False,
    on_event: OnEvent = ignore,
) -> KeyReport:
    """Remove a slot: its passphrase opens the repository no more.

    wanted: the name of the slot, or how it begins; even_own: also the one that opened the repository now
    dry_run: as `add`
    Raises NotFound, InvalidInput for a beginning of several, Conflict for the last slot, and for the one in use.
    """
    found = _look(repository, on_event)
    name = _named(repository, found, wanted)

    def without(now: SlotList) -> SlotList:
        return _without(repository, found, now, name, even_own=even_own)

    left, is_listed = found.now, not found.is_object_alone(name)
    if is_listed:
        left = without(left)
    not_deleted: tuple[str, ...] = ()
    if not dry_run:
        with spending(repository.store):
            if is_listed:
                left = _change_list(repository, without)
            else:
                repository.store.delete(name)
            not_deleted = _delete_removed(repository, left, on_event)
    return KeyReport(
        destination=repository.store.url,
        action=Action.REMOVE,
        removed=name.removeprefix(KEYS),
        left=len(left.slots),
        not_deleted=not_deleted,
    )


# --- what there is

_NEVER = datetime.min.replace(tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class _Found:
    """The newest list, and the slots in the store by object name; an error for one that cannot be read."""

    now: SlotList
    there: Mapping[str, KeySlot | SnapchainError]

    @property
    def missing(self) -> list[ListedSlot]:
        salts = {slot.salt_hex for slot in self.there.values() if isinstance(slot, KeySlot)}
        return [each for each in self.now.slots if each.salt not in salts]

    def salt(self, name: str) -> str | None:
        """The salt of a slot, None where it is missing or cannot be read."""
        slot = self.there.get(name)
        return slot.salt_hex if isinstance(slot, KeySlot) else None

    def original(self, name: str) -> ListedSlot | None:
        """The slot in use of which this one is a copy under another name."""
        known = self.now.listed(self.salt(name) or "")
        if known is None or KEYS + known.slot == name or self.salt(KEYS + known.slot) != known.salt:
            return None
        return known

    def is_object_alone(self, name: str) -> bool:
        """Whether removing the slot changes no list: a copy, one that was put back, one that cannot be read."""
        if name not in self.there:
            return False
        salt = self.salt(name)
        return salt is None or self.now.removal(salt) is not None or self.original(name) is not None


def _look(repository: Repository, on_event: OnEvent = ignore) -> _Found:
    now, notices = slot_list.read(repository.store, repository.keys)
    there: dict[str, KeySlot | SnapchainError] = {}
    names = [info.name for info in islice(repository.store.list(KEYS), _MOST_READ + 1)]
    if len(names) > _MOST_READ:
        notices.append(f"the store has more than {_MOST_READ} key slots, so somebody has planted some")
    for name in dict.fromkeys([*([repository.slot] if repository.slot else []), *names[:_MOST_READ]]):
        try:
            there[name] = slots.parse(repository.store.get(name), subject=name)
        except NotFound:
            continue  # removed meanwhile
        except (Corrupt, Unsupported) as error:
            there[name] = error
    for words in notices:
        if words not in repository.notices:  # which were told when it was opened
            on_event(Notice(words))
    return _Found(now, there)


def _row(repository: Repository, found: _Found, name: str) -> KeyRow:
    slot = found.there[name]
    short = name.removeprefix(KEYS)
    if not isinstance(slot, KeySlot):
        return KeyRow(slot=short, warning=slot.message)
    opened = name == repository.slot
    cost = _cost(slot)
    known, gone = found.now.listed(slot.salt_hex), found.now.removal(slot.salt_hex)
    if gone is not None:
        warning = f"removed on {gone.time:%Y-%m-%d} by {gone.host}, and still in the store or put back"
        return KeyRow(slot=short, opened=opened, cost=cost, warning=warning)
    if known is None:
        words = None if opened else "not listed: an older snapchain or an interrupted command made it, or it is planted"
        return KeyRow(slot=short, opened=opened, cost=cost, warning=words)
    if known.digest != slot.digest:
        warning = "changed since it was made: its passphrase opens nothing"
        return _row_of(known, cost=cost, slot=short, opened=opened, warning=warning)
    if found.original(name) is not None:
        return _row_of(known, cost=cost, slot=short, opened=opened, warning=f"a copy of the slot {known.slot}")
    return _row_of(known, cost=cost, slot=short, opened=opened)


def _cost(slot: KeySlot) -> KeyCost:
    return KeyCost(memory_kib=slot.memory_kib, iterations=slot.iterations, lanes=slot.lanes, factor=slot.cost)


def _row_of(known: ListedSlot, **more: object) -> KeyRow:
    row = KeyRow(slot=known.slot, label=known.label, created=known.created, host=known.host, recovery=known.recovery)
    return row.model_copy(update=more)


def _opener(repository: Repository, now: SlotList) -> ListedSlot:
    """The slot that opened the repository, as the list has it. Raises Conflict when it was removed since."""
    slot = repository.key_slot
    assert slot is not None, "`open_keys` refuses what has no keys"
    if now.removal(slot.salt_hex) is not None:
        raise Conflict(
            "the passphrase that opened the repository was removed meanwhile",
            subject=repository.store.url,
            hint="run it again with another passphrase",
        )
    name = (repository.slot or "").removeprefix(KEYS)
    return now.listed(slot.salt_hex) or ListedSlot(slot=name, salt=slot.salt_hex, digest=slot.digest)


def _with_opener(repository: Repository, now: SlotList) -> SlotList:
    """The list with the slot that opened the repository: it has shown that it is no planted one."""
    opener = _opener(repository, now)
    return now if opener in now.slots else now.model_copy(update={"slots": (*now.slots, opener)})


# --- a new slot


def _check_new(repository: Repository, found: _Found, new: NewKey) -> None:
    """Raises InvalidInput for a bad label, and for slots that a machine would not try all of; Conflict as `_opener`."""
    if new.label is not None and (len(new.label) > LONGEST_LABEL or not new.label.isprintable()):
        raise InvalidInput(f"a label is printable text of at most {LONGEST_LABEL} characters")
    salts = {each.salt for each in _with_opener(repository, found.now).slots}
    work = sum(slot.cost for slot in found.there.values() if isinstance(slot, KeySlot) and slot.salt_hex in salts)
    # All at once, the one to be replaced too: after a crash both are there.
    if work + (new.cost or 1) > slots.MOST_WORK:
        raise InvalidInput(
            f"with one more, trying all key slots would cost {work + (new.cost or 1):g} times the work of one; "
            f"a machine spends at most {slots.MOST_WORK:g}",
            subject=repository.store.url,
            hint="remove a slot first, or choose a lower --cost",
        )


def _cost_before(repository: Repository, found: _Found) -> int:
    """The cost of the slot that opened the repository, among those that are written."""
    slot = found.there.get(repository.slot or "")
    return max((cost for cost in COSTS if isinstance(slot, KeySlot) and cost <= slot.cost), default=1)


def _make(
    repository: Repository,
    new: NewKey,
    found: _Found,
    action: Action,
    on_event: OnEvent,
    *,
    secret: Passphrase | None = None,
) -> KeyReport:
    """Store the new slot, prove it, list it; for a change, remove the one that opened the repository."""
    store, keys = repository.store, repository.keys
    passphrase = _passphrase(repository, new, found, secret)
    replaced = _opener(repository, found.now) if action is Action.CHANGE else None
    with spending(store):
        made = slots.put(store, keys.master, passphrase, repository.config_text, cost=new.cost or 1)
        row = ListedSlot.of(made.name, made.slot, label=new.label or "", recovery=new.recovery)

        def with_new(now: SlotList) -> SlotList:
            now = _with_opener(repository, now)
            now = now.model_copy(update={"slots": (*now.slots, row)})
            return now if replaced is None else _marked(now, replaced.slot, replaced.salt)

        try:
            _prove(repository, made, passphrase)
            now = _change_list(repository, with_new, made if replaced else None)
        except SnapchainError as error:
            if not isinstance(error, Unavailable):  # else a list that has it may still come
                _discard(repository, made)
            raise
        not_deleted = _delete_removed(repository, now, on_event)
    return KeyReport(
        destination=store.url,
        action=action,
        added=_row_of(row, cost=_cost(made.slot), opened=replaced is not None),
        removed=replaced.slot if replaced else None,
        left=len(now.slots),
        not_deleted=not_deleted,
    )


def _passphrase(repository: Repository, new: NewKey, found: _Found, secret: Passphrase | None) -> str:
    """The passphrase of the new slot. Raises InvalidInput for none, and for a new one that opens a slot already."""
    if new.passphrase is None:
        same = secret() if secret is not None else None
        if not same:
            raise InvalidInput("no passphrase was given for the new key slot", subject=repository.store.url)
        return same
    passphrase, url = new.passphrase(), repository.store.url
    for name, slot in found.there.items():
        # Who removes a slot means to lock its passphrase out: no other slot may have the same.
        if not isinstance(slot, KeySlot) or found.now.removal(slot.salt_hex) is not None:
            continue
        if slots.unwrap(slot, canonical(passphrase), repository.config_text, subject=url) is None:
            continue
        if name == repository.slot:
            raise InvalidInput(
                "the new passphrase is the one that opened the repository",
                subject=url,
                hint="to give it another cost: snapchain key change DEST --keep-passphrase --cost N",
            )
        raise InvalidInput(
            f"the new passphrase opens the repository already, by the key slot {name.rpartition('/')[2]}",
            subject=url,
            hint="give another one, or remove that slot",
        )
    return passphrase


def _prove(repository: Repository, made: slots.NamedSlot, passphrase: str) -> None:
    """Read the new slot back and open it. Raises Corrupt."""
    stored = slots.parse(repository.store.get(made.name), subject=made.name)
    opened = slots.unwrap(stored, canonical(passphrase), repository.config_text, subject=made.name)
    if stored != made.slot or opened != repository.keys.master:
        raise Corrupt(
            "the new key slot does not open after it was stored; the old ones are untouched",
            subject=made.name,
            hint="run it again; the store does not keep what it is given",
        )


def _discard(repository: Repository, made: slots.NamedSlot) -> None:
    """Delete a new slot, unless a list has it. Where that is not known, or it cannot be deleted, it stays."""
    with suppress(SnapchainError):
        now, unread = slot_list.read(repository.store, repository.keys)
        if not unread and now.listed(made.slot.salt_hex) is None:
            repository.store.delete(made.name)


# --- the list


def _change_list(
    repository: Repository, alter: Callable[[SlotList], SlotList], own: slots.NamedSlot | None = None
) -> SlotList:
    """Store the next list, and remember it on this machine. own: the slot that opens the repository from now on"""
    now = slot_list.change(repository.store, repository.keys, alter, conditional=repository.conditional)
    if own is not None:
        repository.slot, repository.key_slot = own.name, own.slot
    salt = repository.key_slot.salt_hex if repository.key_slot else ""
    repository.slot_list = now.generation
    repository.vouched = Vouched(salt if now.listed(salt) else "", now.generation)
    note_slot(repository)
    return now


def _marked(now: SlotList, slot: str, salt: str) -> SlotList:
    """The list without a slot, which it has as removed."""
    mark = RemovedSlot(slot=slot, salt=salt, time=datetime.now(UTC), host=socket.gethostname())
    left = tuple(each for each in now.slots if each.salt != salt)
    return now.model_copy(update={"slots": left, "removed": (*now.removed, mark)})


def _without(repository: Repository, found: _Found, now: SlotList, name: str, *, even_own: bool) -> SlotList:
    """The list without the slot of that object. Raises Conflict for the last slot, and the one in use."""
    url = repository.store.url
    slot = name.removeprefix(KEYS)
    salt = found.salt(name) or next(each.salt for each in found.now.slots if each.slot == slot)
    if salt == _opener(repository, now).salt and not even_own:
        raise Conflict(
            "this key slot opened the repository for this command",
            subject=slot,
            hint="use another passphrase to remove it, `snapchain key change` to replace it, or --even-own",
        )
    left = _marked(_with_opener(repository, now), slot, salt)
    there = {each.digest for each in found.there.values() if isinstance(each, KeySlot)}
    if not any(each.digest in there for each in left.slots):
        raise Conflict(
            "this is the last key slot: without it nothing could be read again",
            subject=url,
            hint="add another passphrase first: snapchain key add",
        )
    return left


def _named(repository: Repository, found: _Found, wanted: str) -> str:
    """The object name of the slot that is meant. Raises NotFound, InvalidInput."""
    names = sorted({*found.there, *(KEYS + each.slot for each in found.missing)})
    exact = KEYS + wanted
    chosen = [name for name in names if name == exact] or [name for name in names if name.startswith(exact)]
    hint = f"snapchain key list {shell_word(repository.store.url)}"
    if not wanted or not chosen:
        raise NotFound("there is no such key slot", subject=wanted or repository.store.url, hint=hint)
    if len(chosen) > 1 or (chosen[0] != exact and len(wanted) < SHORTEST_PREFIX):
        raise InvalidInput(
            f"which key slot is meant is not clear: give more of its name, at least {SHORTEST_PREFIX} characters",
            subject=wanted,
            hint=hint,
        )
    return chosen[0]


def _delete_removed(repository: Repository, now: SlotList, on_event: OnEvent) -> tuple[str, ...]:
    """Delete the slots that the list has as removed; the names of those that the store does not let go of."""
    left = []
    try:
        there = _look(repository).there
    except Unavailable as error:  # the list is stored: the next command deletes them
        on_event(Notice(f"removed key slots count no more, and could not be deleted yet ({error.message})"))
        return ()
    for name, slot in there.items():
        if isinstance(slot, KeySlot) and now.removal(slot.salt_hex) is not None:
            try:
                repository.store.delete(name)
            except Unavailable as error:
                left.append(name)
                words = f"{name} counts as removed, and cannot be deleted: older snapchains open the repository by it"
                on_event(Notice(f"{words} ({error.message})"))
    return tuple(left)
