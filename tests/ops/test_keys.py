"""The passphrases of a repository: a crash, a race or a lost reply leaves one that opens, and never a removed one."""

from __future__ import annotations

import base64
import itertools
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from snapchain.errors import Conflict, Corrupt, InvalidInput, NotFound, SnapchainError, Unavailable, Unsupported
from snapchain.model.events import Event, Notice
from snapchain.objects.memory import MemoryStore
from snapchain.objects.store import Data, ObjectInfo, ObjectStore, Refused, StoreWrapper
from snapchain.ops import keys as ops
from snapchain.ops.keys import NewKey
from snapchain.repository import collecting as gc, keys as slots, slot_list
from snapchain.repository.crypto import Keyring
from snapchain.repository.envelope import seal
from snapchain.repository.opening import create_repository, open_repository
from snapchain.repository.repository import Repository
from snapchain.repository.verification import verify
from snapchain.testing.faults import Fault, FaultStore, On, Operation, crash_points
from tests.exhaustive import some
from tests.waiting import HANG

OLD, NEW, OTHER, THIRD = "the old one", "the new one", "another one", "a third one"


def made(passphrase: str = OLD, *, conditional: bool = True) -> MemoryStore:
    store = MemoryStore()
    store.properties = type(store.properties)(conditional_put=conditional, description="this process's memory")
    Repository.create(store, passphrase=lambda: passphrase)
    return store


def copy_of(store: ObjectStore) -> MemoryStore:
    copy = MemoryStore()
    for info in store.list(""):
        copy.put(info.name, store.get(info.name))
    return copy


def opened(store: ObjectStore, passphrase: str = OLD) -> Repository:
    return Repository.open(store, passphrase=lambda: passphrase, writing=True)


def opens(store: ObjectStore, passphrase: str) -> bool:
    try:
        opened(store, passphrase)
    except InvalidInput as error:
        assert "passphrase" in error.message  # noqa: PT017
        return False
    return True


def new(passphrase: str = NEW, **more: object) -> NewKey:
    return NewKey(passphrase=lambda: passphrase, **more)  # type: ignore[arg-type]


def add(store: ObjectStore, passphrase: str = NEW, *, by: str = OLD) -> object:
    return ops.add(opened(store, by), new(passphrase))


def change(store: ObjectStore, passphrase: str = NEW, *, by: str = OLD) -> object:
    return ops.change(opened(store, by), new(passphrase), secret=lambda: by)


def slot_of(store: ObjectStore, passphrase: str) -> str:
    return (opened(store, passphrase).slot or "").removeprefix("keys/")


def remove(store: ObjectStore, slot: str, *, by: str = OLD) -> object:
    return ops.remove(opened(store, by), slot)


def keys_in(store: ObjectStore) -> set[str]:
    return {info.name for info in store.list("keys/")}


def rows(store: ObjectStore, by: str = OLD) -> list[ops.KeyRow]:
    return list(ops.listed(opened(store, by)).slots)


# --- what each does


def test_several_passphrases_open_one_repository() -> None:
    store = made()
    report = ops.add(opened(store), new(label="night shift"))
    assert report.added is not None
    assert (report.action, report.left, report.removed, report.added.label) == ("add", 2, None, "night shift")
    assert opened(store, NEW).keys.disk_key("a") == opened(store, OLD).keys.disk_key("a")
    first, second = rows(store, NEW)
    assert (first.opened, second.opened, second.slot) == (False, True, report.added.slot)
    assert first.host == second.host != None  # noqa: E711
    assert first.created is not None
    assert second.created is not None
    assert first.created <= second.created
    assert (first.warning, second.warning) == (None, None)


def test_a_change_replaces_the_slot_that_opened_the_repository() -> None:
    store = made()
    add(store, OTHER)
    slot = slot_of(store, OLD)
    report = ops.change(opened(store), new(label="x"), secret=lambda: OLD)
    assert (report.removed, report.left) == (slot, 2)
    assert (opens(store, OLD), opens(store, NEW), opens(store, OTHER)) == (False, True, True)
    assert len(keys_in(store)) == 2


def test_a_removed_passphrase_opens_nothing() -> None:
    store = made()
    add(store)
    report = ops.remove(opened(store, NEW), slot_of(store, OLD)[:6])
    assert (report.left, report.added) == (1, None)
    assert (opens(store, OLD), opens(store, NEW)) == (False, True)
    assert len(keys_in(store)) == 1


def test_the_last_slot_stays() -> None:
    store = made()
    for even_own in (False, True):
        with pytest.raises(Conflict, match=r"opened the repository for this command|last key slot"):
            ops.remove(opened(store), slot_of(store, OLD), even_own=even_own)
    assert opens(store, OLD)


def test_the_slot_in_use_is_removed_only_by_a_word_for_it() -> None:
    store = made()
    add(store)
    with pytest.raises(Conflict, match="opened the repository for this command"):
        remove(store, slot_of(store, OLD))
    ops.remove(opened(store), slot_of(store, OLD), even_own=True)
    assert (opens(store, OLD), opens(store, NEW)) == (False, True)


def test_another_slot_that_is_listed_and_not_there_does_not_count() -> None:
    store = made()
    add(store)
    store.delete(f"keys/{slot_of(store, NEW)}")
    (row,) = [row for row in rows(store) if row.warning]
    assert row.warning == "missing in the store: its passphrase opens nothing"
    with pytest.raises(Conflict, match="last key slot"):
        ops.remove(opened(store), slot_of(store, OLD), even_own=True)
    remove(store, row.slot)
    assert [row.warning for row in rows(store)] == [None]


def test_slots_are_named_by_how_they_begin() -> None:
    store = made()
    add(store)
    for wanted, error, words in [
        ("", NotFound, "no such key slot"),
        ("zzzz", NotFound, "no such key slot"),
        (slot_of(store, NEW)[:3], InvalidInput, "not clear"),
    ]:
        with pytest.raises(error, match=words):
            remove(store, wanted)
    assert len(rows(store)) == 2


def test_a_dry_run_asks_for_nothing_and_changes_nothing() -> None:
    store = made()
    add(store)
    before = {info.name: store.get(info.name) for info in store.list("")}

    def asked() -> str:
        raise AssertionError("no passphrase is needed")

    unasked = NewKey(passphrase=asked)
    assert ops.add(opened(store), unasked, dry_run=True).left == 3
    found = ops.change(opened(store), unasked, secret=asked, dry_run=True)
    assert (found.left, found.removed) == (2, slot_of(store, OLD))
    assert ops.remove(opened(store), slot_of(store, NEW), dry_run=True).left == 1
    with pytest.raises(Conflict, match="opened the repository"):
        ops.remove(opened(store), slot_of(store, OLD), dry_run=True)
    assert {info.name: store.get(info.name) for info in store.list("")} == before


def test_a_new_passphrase_is_not_the_old_one() -> None:
    store = made()
    for act in (add, change):
        with pytest.raises(InvalidInput, match="is the one that opened the repository"):
            act(store, OLD)
    assert len(keys_in(store)) == 1
    add(store, OTHER)
    for act in (add, change):
        with pytest.raises(
            InvalidInput, match=f"opens the repository already, by the key slot {slot_of(store, OTHER)}"
        ):
            act(store, OTHER)
    assert len(keys_in(store)) == 2
    ops.remove(opened(store, OLD), slot_of(store, OTHER))
    add(store, OTHER)


@pytest.mark.parametrize("label", ["x" * 101, "a\nb", "\x1b[2J"])
def test_labels_are_printable_and_short(label: str) -> None:
    with pytest.raises(InvalidInput, match="a label is printable text"):
        ops.add(opened(made()), new(label=label))


# --- cost


def test_a_slot_gets_the_cost_that_is_asked_for_and_keeps_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slots, "COSTS", {1: (8, 1), 2: (16, 1)})
    monkeypatch.setattr(slots.KeySlot, "cost", property(lambda slot: slot.memory_kib / 8))
    store = made()
    report = ops.change(opened(store), NewKey(passphrase=None, cost=2), secret=lambda: OLD)
    assert report.added is not None
    assert report.added.cost is not None
    assert (report.added.cost.memory_kib, report.added.cost.factor) == (16, 2.0)
    (name,) = keys_in(store)
    assert json.loads(store.get(name))["memory_kib"] == 16
    kept = ops.change(opened(store), new(), secret=lambda: OLD)
    assert kept.added is not None
    assert kept.added.cost == report.added.cost
    assert (opens(store, OLD), opens(store, NEW)) == (False, True)


@pytest.mark.parametrize("cost", ops.COSTS)
def test_the_costs_are_such_as_every_reader_accepts(cost: int) -> None:
    memory, iterations = slots.COSTS[cost]
    assert slots.MEMORY_KIB <= memory <= 4 * slots.MEMORY_KIB
    assert slots.ITERATIONS <= iterations <= 4 * slots.ITERATIONS
    assert memory * iterations == cost * slots.MEMORY_KIB * slots.ITERATIONS


def test_no_more_slots_than_a_machine_tries(monkeypatch: pytest.MonkeyPatch) -> None:
    """A crash between the new slot and the old one's end leaves both, and the new one must still be tried."""
    store = made()
    monkeypatch.setattr(slots.KeySlot, "cost", 5.0)
    add(store, NEW)
    add(store, OTHER)
    with pytest.raises(InvalidInput, match="a machine spends at most 16"):
        ops.add(opened(store), new(THIRD, cost=2))
    with pytest.raises(InvalidInput, match="a machine spends at most 16"):
        change(store, THIRD)
    assert all(opens(store, each) for each in (OLD, NEW, OTHER))


# --- crashes and lost replies

ACTS: dict[str, Callable[[ObjectStore], object]] = {
    "add": lambda store: add(store, THIRD),
    "change": change,
    "remove": lambda store: remove(store, slot_of(store, OTHER)),
    "remove own": lambda store: ops.remove(opened(store), slot_of(store, OLD), even_own=True),
}


@pytest.mark.parametrize("conditional", [True, False])
@pytest.mark.parametrize("act", ACTS)
def test_a_crash_leaves_a_passphrase_that_opens_and_the_next_command_finishes(act: str, conditional: bool) -> None:
    def begin() -> MemoryStore:
        store = made(conditional=conditional)
        add(store, OTHER)
        return store

    deaths = 0
    for _moment, left in crash_points(begin, ACTS[act]):
        deaths += 1
        found = {each for each in (OLD, NEW, OTHER, THIRD) if opens(left, each)}
        if act == "change":
            assert found >= {OTHER}
            assert found & {OLD, NEW}
        elif act == "add":
            assert found >= {OLD, OTHER}
        else:
            assert found & {OLD, OTHER}
        if not conditional:
            for info in list(left.list("slots/")):  # the claim of a dead writer keeps others away for ten minutes
                if ".claim." in info.name:
                    left.delete(info.name)
        by = min(found & {OLD, OTHER, NEW})
        ops.add(opened(left, by), new("the last one"))
        assert all(opens(left, each) for each in (by, "the last one"))
        listed = rows(left, by)
        assert all(row.warning is None or row.warning.startswith("not listed") for row in listed)
    assert deaths > 3


@pytest.mark.sampled
def test_a_change_of_the_only_slot_survives_every_pair_of_faults() -> None:
    """Also a create that says that it was too late for itself, and a read that gives other bytes."""
    begin = made()
    calls: dict[Operation, int] = {"put": 2, "create": 2, "get": 13, "list": 13, "delete": 1}
    faults = [
        On(nth, fault, operation=operation)
        for operation, count in calls.items()
        for nth, fault in itertools.product(range(1, count + 1), sorted(set(Fault) - {Fault.DELAY}, key=str))
        if (fault is not Fault.TAKEN or operation == "create")
        and (fault not in {Fault.TRUNCATED, Fault.BIT_FLIP} or operation == "get")
    ]
    for pair in some(itertools.combinations(faults, 2), each=29):
        left = copy_of(begin)
        with suppress(SnapchainError):
            change(FaultStore(left, pair))
        assert {each for each in (OLD, NEW) if opens(left, each)}, pair


def test_a_list_that_is_there_already_is_known_to_be_ones_own() -> None:
    store = made()
    change(FaultStore(store, [On(1, Fault.TAKEN, operation="create", prefix="slots/")]))
    assert (opens(store, OLD), opens(store, NEW), slot_list.newest(store)) == (False, True, 2)


def test_a_slot_that_a_list_has_is_not_deleted_after_an_error() -> None:
    store = made()
    name = slot_list.list_name(2)
    taken, garbled = On(1, Fault.TAKEN, operation="create", prefix=name), On(1, Fault.BIT_FLIP, "get", name)
    with pytest.raises(Conflict, match="removed meanwhile"):
        change(FaultStore(store, [taken, garbled]))
    assert opens(store, NEW)


@pytest.mark.sampled
@pytest.mark.parametrize("fault", [Fault.LOST_REPLY, Fault.UNAVAILABLE, Fault.TAKEN])
@pytest.mark.parametrize("act", ACTS)
def test_a_lost_reply_leaves_a_passphrase_that_opens(act: str, fault: Fault) -> None:
    store = made()
    add(store, OTHER)
    operations: tuple[Operation, ...] = ("put", "create", "delete", "get", "list")
    for operation, nth in some(itertools.product(operations, range(1, 12)), each=4):
        left = copy_of(store)
        with_fault = FaultStore(left, [On(nth, fault, operation=operation)])
        with suppress(Unavailable, Corrupt):
            ACTS[act](with_fault)
        assert {each for each in (OLD, NEW, OTHER) if opens(left, each)}


def test_a_slot_that_the_store_garbles_replaces_nothing() -> None:
    class Garbles(StoreWrapper):
        def put(self, name: str, data: Data) -> None:
            body = json.loads(bytes(data))  # type: ignore[arg-type]
            self.inner.put(name, json.dumps(body | {"wrapped": base64.b64encode(bytes(48)).decode()}).encode())

    store = made()
    with pytest.raises(Corrupt, match="does not open after it was stored"):
        change(Garbles(store))
    assert (opens(store, OLD), opens(store, NEW), len(keys_in(store))) == (True, False, 1)


# --- two at once


class Turns:
    """Lets two actors call a store: so many calls of the first, so many of the second, then the rest of each."""

    def __init__(self, first: int, second: int) -> None:
        self._phases = [[0, first], [1, second], [0, 1 << 30], [1, 1 << 30]]
        self._changed = threading.Condition()

    def call(self, actor: int, effect: Callable[[], object]) -> object:
        with self._changed:
            assert self._changed.wait_for(lambda: self._whose() == actor, timeout=HANG)
            self._phases[0][1] -= 1
            try:
                return effect()
            finally:
                self._changed.notify_all()

    def _whose(self) -> int:
        while not self._phases[0][1]:
            self._phases.pop(0)
        return self._phases[0][0]

    def end(self, actor: int) -> None:
        with self._changed:
            self._phases = [each for each in self._phases if each[0] != actor] or [[1 - actor, 1 << 30]]
            self._changed.notify_all()


class Taking(StoreWrapper):
    """The store as one actor meets it."""

    def __init__(self, inner: ObjectStore, turns: Turns, actor: int) -> None:
        super().__init__(inner)
        self._turns, self._actor = turns, actor

    def put(self, name: str, data: Data) -> None:
        self._turns.call(self._actor, lambda: self.inner.put(name, data))

    def create(self, name: str, data: Data) -> bool:
        return bool(self._turns.call(self._actor, lambda: self.inner.create(name, data)))

    def get(self, name: str, *, offset: int = 0, length: int | None = None) -> bytes:
        found = self._turns.call(self._actor, lambda: self.inner.get(name, offset=offset, length=length))
        assert isinstance(found, bytes)
        return found

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        found = self._turns.call(self._actor, lambda: [*self.inner.list(prefix)])
        assert isinstance(found, list)
        return iter(found)

    def delete(self, name: str) -> None:
        self._turns.call(self._actor, lambda: self.inner.delete(name))


def at_once(store: ObjectStore, turns: Turns, *acts: Callable[[ObjectStore], object]) -> list[SnapchainError | None]:
    """What each of two ends with."""
    ended: list[SnapchainError | None] = [None, None]

    def run(actor: int) -> None:
        try:
            acts[actor](Taking(store, turns, actor))
        except SnapchainError as error:
            ended[actor] = error
        finally:
            turns.end(actor)

    threads = [threading.Thread(target=run, args=(actor,)) for actor in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return ended


PAIRS = ["each removes the other's", "each changes the same", "add and remove the adder", "change and remove it"]


@pytest.mark.sampled
@pytest.mark.parametrize("pair", PAIRS)
def test_two_at_once_leave_a_passphrase_that_opens(pair: str) -> None:
    begin = made()
    add(begin, OTHER)
    old, other = slot_of(begin, OLD), slot_of(begin, OTHER)
    acts: dict[str, tuple[Callable[[ObjectStore], object], Callable[[ObjectStore], object]]] = {
        PAIRS[0]: (lambda s: remove(s, other), lambda s: remove(s, old, by=OTHER)),
        PAIRS[1]: (lambda s: change(s, NEW), lambda s: change(s, THIRD)),
        PAIRS[2]: (lambda s: add(s, NEW, by=OTHER), lambda s: remove(s, other)),
        PAIRS[3]: (lambda s: change(s, NEW), lambda s: remove(s, old, by=OTHER)),
    }
    ends = set()
    for first, second in some(itertools.product(range(22), range(22)), each=7):
        store = copy_of(begin)
        one, two = at_once(store, Turns(first, second), *acts[pair])
        for error in (one, two):  # NotFound: the slot has been removed already
            assert error is None or isinstance(error, Conflict | NotFound | InvalidInput), error
        found = {each for each in (OLD, NEW, OTHER, THIRD) if opens(store, each)}
        assert found
        ends.add((one is None, two is None))
        if pair == PAIRS[0]:
            assert found == ({OLD} if one is None else {OTHER})
            assert (one is None) is not (two is None), "one of both is refused"
        elif pair == PAIRS[1]:
            assert found == {OTHER, NEW if one is None else THIRD}
            assert (one is None) is not (two is None)
        elif pair == PAIRS[2]:
            assert OLD in found
            assert (NEW in found) is (one is None)
            assert (OTHER in found) is (two is not None)
        else:
            assert OTHER in found
            assert OLD not in found
            assert (NEW in found) is (one is None)
        assert all(row.warning is None for row in rows(store, min(found))), "nothing is left over"
    assert len(ends) > 1, "both were faster once"


@pytest.mark.sampled
def test_a_reader_opens_the_repository_while_its_slot_is_replaced() -> None:
    begin = made()

    def replace(store: ObjectStore) -> object:
        return ops.change(opened(store), NewKey(passphrase=None), secret=lambda: OLD)

    for first, second in some(itertools.product(range(10), range(22)), each=5):
        ended = at_once(copy_of(begin), Turns(first, second), opened, replace)
        assert ended == [None, None]


def test_a_passphrase_that_was_removed_meanwhile_makes_no_slot() -> None:
    store = made()
    add(store, OTHER)
    slow = opened(store)
    ops.remove(opened(store, OTHER), slot_of(store, OLD))
    with pytest.raises(Conflict, match="removed meanwhile"):
        ops.add(slow, new())
    with pytest.raises(Conflict, match="removed meanwhile"):
        ops.change(slow, new(), secret=lambda: OLD)
    assert (opens(store, NEW), len(keys_in(store))) == (False, 1)


# --- what a store can do


def put_back(store: MemoryStore, name: str | None) -> None:
    """Remove the old passphrase, and let the store put its slot back. name: None: the old one"""
    slot = f"keys/{slot_of(store, OLD)}"
    text = store.get(slot)
    remove(store, slot.removeprefix("keys/"), by=NEW)
    store.put(name or slot, text)


@pytest.mark.parametrize("name", [None, "keys/" + "0" * 32])
def test_a_removed_slot_that_is_put_back_opens_nothing_and_is_shown(name: str | None) -> None:
    store = made()
    add(store)
    put_back(store, name)
    with pytest.raises(InvalidInput, match="this passphrase was removed from the repository"):
        opened(store, OLD)
    (row,) = [row for row in rows(store, NEW) if row.warning]
    assert row.warning is not None
    assert row.warning.startswith("removed on ")
    assert ops.remove(opened(store, NEW), row.slot).left == 1
    assert len(keys_in(store)) == 1
    assert slot_list.newest(store) == 3, "its list was changed once"


def test_a_removed_slot_with_the_same_passphrase_as_one_in_use_stands_in_nobodys_way() -> None:
    store = made()
    name = f"keys/{slot_of(store, OLD)}"
    text = store.get(name)
    ops.change(opened(store), NewKey(passphrase=None), secret=lambda: OLD)
    store.put(name, text)
    assert f"keys/{slot_of(store, OLD)}" != name


def test_the_salt_in_another_spelling_is_the_same_salt() -> None:
    """The last letter of a base64 text has bits that nobody reads."""
    store = made()
    name = f"keys/{slot_of(store, OLD)}"
    slot = json.loads(store.get(name))
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
    last = alphabet[alphabet.index(slot["salt"][-2]) ^ 1]
    respelled = slot | {"salt": slot["salt"][:-2] + last + "="}
    assert base64.b64decode(respelled["salt"]) == base64.b64decode(slot["salt"])
    add(store)
    remove(store, name.removeprefix("keys/"), by=NEW)
    store.put("keys/" + "0" * 32, json.dumps(respelled).encode())
    assert not opens(store, OLD)


def test_planted_slots_are_shown_and_can_be_removed() -> None:
    store = made()
    other = made("a stranger's")
    planted = {"keys/" + "1" * 32: other.get(min(keys_in(other))), "keys/" + "2" * 32: b"damaged"}
    for name, text in planted.items():
        store.put(name, text)
    found = {row.slot: row.warning for row in rows(store)}
    assert (found["1" * 32] or "").startswith("not listed")
    assert "is damaged" in (found["2" * 32] or "")
    for name in planted:
        remove(store, name.removeprefix("keys/"))
    assert [row.warning for row in rows(store)] == [None]


def test_a_slot_that_was_changed_is_shown_and_does_not_count() -> None:
    store = made()
    add(store)
    name = f"keys/{slot_of(store, NEW)}"
    slot = json.loads(store.get(name))
    store.put(name, json.dumps(slot | {"wrapped": base64.b64encode(bytes(48)).decode()}).encode())
    (warning,) = [row.warning for row in rows(store) if row.warning]
    assert warning == "changed since it was made: its passphrase opens nothing"
    with pytest.raises(Conflict, match="last key slot"):
        ops.remove(opened(store), slot_of(store, OLD), even_own=True)
    remove(store, name.removeprefix("keys/"))
    assert [row.warning for row in rows(store)] == [None]


def test_a_copy_of_a_slot_is_removed_without_the_slot() -> None:
    store = made()
    add(store)
    slot = slot_of(store, NEW)
    store.put("keys/" + "f" * 32, store.get(f"keys/{slot}"))
    (row,) = [row for row in rows(store) if row.warning]
    assert (row.slot, row.warning) == ("f" * 32, f"a copy of the slot {slot}")
    remove(store, "f" * 32)
    assert opens(store, NEW)
    assert [row.warning for row in rows(store)] == [None, None]


def test_thousands_of_planted_slots_are_not_all_read() -> None:
    store = made()
    for number in range(1000):
        store.put(f"keys/{number:032x}", b"{}")
    heard: list[Event] = []
    counting = FaultStore(store)
    repository = Repository.open(counting, passphrase=lambda: OLD, slot=f"keys/{slot_of(store, OLD)}")
    ops.listed(repository, on_event=heard.append)
    assert sum(call.operation == "get" for call in counting.calls) < 250
    assert any(isinstance(each, Notice) and "more than 200 key slots" in each.text for each in heard)


@pytest.mark.parametrize("how", ["altered", "another's", "gone", "of an older number"])
def test_a_list_that_cannot_be_read_hides_no_data_and_is_told(how: str) -> None:
    store = made()
    add(store)
    newest = slot_list.list_name(2)
    if how == "altered":
        store.put(newest, store.get(newest)[:-1] + b"x")
    elif how == "another's":
        store.put(slot_list.list_name(3), store.get(newest))
    elif how == "gone":
        store.put(slot_list.list_name(3), b"")
    else:
        repository = opened(store)
        body = slot_list.SlotList(generation=1).model_dump_json().encode()
        store.put(newest, seal(repository.keys, slot_list.KIND, newest, body))
    for passphrase in (OLD, NEW):
        repository = opened(store, passphrase)
        assert any("a list of key slots cannot be read" in words for words in repository.notices)
    assert any((finding.subject or "").startswith("slots/") for finding in verify(opened(store)).findings)
    add(store, OTHER)
    assert opened(store, OTHER).notices == []
    assert all(opens(store, each) for each in (OLD, NEW, OTHER))


def test_a_list_of_a_newer_snapchain_is_refused() -> None:
    store = made()
    repository = opened(store)
    name = slot_list.list_name(2)
    store.put(name, seal(repository.keys, slot_list.KIND, name, b'{"format": 2, "generation": 2}'))
    with pytest.raises(Unsupported, match="the list of key slots was written by a newer snapchain"):
        opened(store)


def test_a_number_that_nobody_reaches_is_ignored() -> None:
    store = made()
    store.put("slots/" + "9" * 20, b"planted")
    assert opened(store).notices == []
    add(store)
    assert slot_list.newest(store) == 2
    store.put(slot_list.list_name(10**12), b"planted")
    with pytest.raises(Corrupt, match="somebody has planted one"):
        add(store, OTHER)
    assert all(opens(store, each) for each in (OLD, NEW))


def test_a_store_that_refuses_to_delete_is_told_and_the_slot_counts_as_removed() -> None:
    class Keeps(StoreWrapper):
        def delete(self, name: str) -> None:
            raise Refused("access denied", subject=name)

    store = made()
    heard: list[Event] = []
    report = ops.change(opened(Keeps(store)), new(), secret=lambda: OLD, on_event=heard.append)
    assert report.not_deleted == (f"keys/{report.removed}",)
    assert any(isinstance(each, Notice) and "cannot be deleted" in each.text for each in heard)
    assert (opens(store, OLD), opens(store, NEW)) == (False, True)
    add(store, OTHER, by=NEW)
    assert len(keys_in(store)) == 2, "the next command, with the right to, deletes it"


# --- this machine remembers


def directory(tmp_path: Path) -> str:
    place = str(tmp_path / "repo")
    create_repository(place, passphrase=lambda: OLD)
    return place


def at(place: str, passphrase: str = OLD) -> Repository:
    return open_repository(place, passphrase=lambda: passphrase, writing=True)


def test_an_older_list_is_refused_where_a_newer_one_was_seen(tmp_path: Path) -> None:
    place = directory(tmp_path)
    ops.add(at(place), new())
    repository = at(place, NEW)
    old = Path(place, "keys", slot_of(repository.store, OLD))
    text = old.read_bytes()
    ops.remove(repository, old.name)
    old.write_bytes(text)
    with pytest.raises(InvalidInput, match="was removed from the repository"):
        at(place)
    Path(place, slot_list.list_name(3)).unlink()
    for passphrase in (OLD, NEW):
        with pytest.raises(Corrupt, match="key slots that were removed would count again") as caught:
            at(place, passphrase)
        assert str(caught.value.hint).endswith(f"--accept-repository {repository.config.id}")
    open_repository(place, passphrase=lambda: NEW, accept=repository.config.id)
    at(place, NEW)


def test_a_list_that_was_read_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = directory(tmp_path)
    seen: list[int] = []
    read = slot_list.read

    def counted(store: ObjectStore, keys: Keyring) -> tuple[slot_list.SlotList, list[str]]:
        seen.append(1)
        return read(store, keys)

    monkeypatch.setattr(slot_list, "read", counted)
    assert at(place).notices == []
    assert seen == [], "the command that made it knows it"
    ops.add(at(place), new())
    seen.clear()
    at(place)
    assert seen == [], "the command that changed it knows it"
    at(place, NEW)
    assert seen == [1], "of another slot nothing was found yet"


def test_a_removed_slot_under_the_name_that_is_remembered_opens_nothing(tmp_path: Path) -> None:
    """What is remembered is the salt, and not only the name."""
    place = directory(tmp_path)
    old = at(place).slot or ""
    text = Path(place, old).read_bytes()
    ops.change(at(place), new(), secret=lambda: OLD)
    now = at(place, NEW).slot or ""
    Path(place, now).write_bytes(text)
    with pytest.raises(InvalidInput, match="was removed from the repository"):
        at(place)


# --- old repositories, and those without keys


def of_version_0_1() -> MemoryStore:
    store = made()
    for info in list(store.list("slots/")):
        store.delete(info.name)
    return store


def test_a_repository_of_0_1_opens_and_gets_keys() -> None:
    store = of_version_0_1()
    (row,) = rows(store)
    assert (row.opened, row.created, row.host, row.warning) == (True, None, None, None)
    assert verify(opened(store)).ok
    add(store)
    first, second = rows(store)
    assert (first.slot, first.created, second.host is not None) == (slot_of(store, OLD), None, True)
    assert (first.warning, second.warning) == (None, None)
    remove(store, first.slot, by=NEW)
    assert (opens(store, OLD), opens(store, NEW)) == (False, True)


def test_init_survives_a_list_that_cannot_be_stored() -> None:
    store = MemoryStore()
    broken = FaultStore(store, [On(1, Fault.UNAVAILABLE, operation="create", prefix="slots/")])
    repository = Repository.create(broken, passphrase=lambda: OLD)
    assert any("could not be listed" in words for words in repository.notices)
    assert [row.created for row in rows(store)] == [None]


def test_what_has_no_keys_says_so(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="a replica is not encrypted, so it has no keys"):
        ops.open_keys(f"dir:{tmp_path}", passphrase=lambda: None)
    place = str(tmp_path / "plain")
    create_repository(place, passphrase=lambda: None, encryption="none")
    assert not Path(place, "slots").exists()
    with pytest.raises(InvalidInput, match="the repository is not encrypted, so it has no keys"):
        ops.open_keys(place, passphrase=lambda: None)


def test_gc_and_verify_keep_and_check_the_lists() -> None:
    store = made()
    add(store)
    before = {info.name for info in store.list("slots/")} | keys_in(store)
    gc.run(opened(store))
    assert {info.name for info in store.list("slots/")} | keys_in(store) == before
    assert verify(opened(store)).ok
    slot = slot_of(store, NEW)
    text = store.get(f"keys/{slot}")
    store.delete(f"keys/{slot}")
    (finding,) = verify(opened(store)).findings
    assert (finding.subject, "missing from the store" in finding.message) == (f"keys/{slot}", True)
    store.put(f"keys/{slot}", store.get(f"keys/{slot_of(store, OLD)}"))
    (finding,) = verify(opened(store)).findings
    assert "changed since it was made" in finding.message
    store.put(f"keys/{slot}", text[:-5])
    (finding,) = verify(opened(store)).findings
    assert "is damaged" in finding.message


def test_gc_removes_claims_on_lists_that_are_dead() -> None:
    now = [1000.0]
    store = MemoryStore(clock=lambda: now[0])
    Repository.create(store, passphrase=lambda: OLD)
    claims = [f"{slot_list.list_name(2)}.claim.{number:016x}" for number in range(2)]
    store.put(claims[0], b"")
    now[0] = 10_000.0
    store.put(claims[1], b"")
    gc.run(opened(store))
    assert [store.size(name) for name in claims] == [None, 0]


def test_the_lists_show_the_store_no_name() -> None:
    store = made()
    ops.add(opened(store), new(label="a label of the night shift"))
    (row, _) = rows(store)
    assert row.host
    for info in store.list("slots/"):
        assert b"night" not in store.get(info.name)
        assert row.host.encode() not in store.get(info.name)
