"""Indexes stay few whatever happens, and nothing that they list is forgotten, or believed longer than before."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from snapchain.errors import Unavailable
from snapchain.objects.memory import MemoryStore
from snapchain.objects.store import ObjectStore, Refused, StoreWrapper
from snapchain.repository import condemned, damage, eras, index as indexes, samples, sparse, tidying
from snapchain.repository.format import fresh_id, index_era, index_name, is_samples, pack_name
from snapchain.repository.index import IndexedPack
from snapchain.testing.faults import crash_points
from tests.repository.counting import CountingStore
from tests.repository.test_sparse import KEYS, Pieces, blob, listed, pack


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tidying, "LOOSE", 4)


def shipped(store: ObjectStore, number: int) -> IndexedPack:
    """What one shipment leaves."""
    one = listed(number)
    store.put(pack_name(one.pack), bytes(one.size))
    indexes.write(store, KEYS, [one], era=eras.newest(store)[0])
    return one


def tidied(store: ObjectStore) -> None:
    index = sparse.load(store, KEYS)
    index.find(blob(10**9))
    tidying.tidy(store, KEYS, index, pack_size=None)


def known(store: ObjectStore) -> set[bytes]:
    index = indexes.load(store, KEYS)
    assert not index.unreadable
    return {blob(number) for number in range(0, 3000, 7) if index.find(blob(number)) is not None}


def names(store: ObjectStore) -> tuple[int, int]:
    """How many indexes, and how many objects of samples."""
    found = [info.name for info in store.list("index/")]
    return sum(index_era(name) is not None for name in found), sum(map(is_samples, found))


@pytest.mark.parametrize("whole", [True, False], ids=["small", "large"])
def test_they_are_put_together_when_there_are_many(whole: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparse, "WHOLE_BYTES", (1 << 20) * whole)
    store = CountingStore(MemoryStore())
    for number in range(3):
        shipped(store, number)
    tidied(store)
    assert names(store) == (3, 0)
    shipped(store, 3)
    before = known(store)
    tidied(store)
    assert names(store) == (1, 1)
    assert known(store) == before
    store.asked.clear()
    tidied(store)
    assert not [each for each in store.asked if each.operation in ("put", "delete")]
    index = sparse.load(store, KEYS)
    assert all(index.find(blob(number)) is not None for number in range(400))


def test_large_ones_are_sampled_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tidying, "SMALL_BYTES", 0)
    store = CountingStore(MemoryStore())
    for number in range(4):
        shipped(store, number)
    store.asked.clear()
    tidied(store)
    assert names(store) == (4, 1)
    assert len(store.of("put")) == 1
    assert not store.of("delete")


def test_shipments_without_end_leave_few_objects() -> None:
    """Indexes as their size demands; samples by the logarithm."""
    store = MemoryStore()
    most = (0, 0)
    for number in range(120):
        shipped(store, number)
        tidied(store)
        most = max(most[0], names(store)[0]), max(most[1], names(store)[1])
    assert most[0] <= 120 // 3 + 4  # one of four each time, but for what waits
    assert most[1] <= 8
    assert len(known(store)) == len(range(0, 3000, 7))


def test_a_crash_at_any_moment_forgets_nothing() -> None:
    origin = MemoryStore()
    for number in range(9):
        shipped(origin, number)
        if number == 4:
            tidied(origin)
    before = known(origin)
    steps = 0
    for _, store in crash_points(lambda: copied(origin), tidied):
        assert known(store) == before
        tidied(store)
        assert known(store) == before
        steps += 1
    assert steps > 6


def copied(origin: MemoryStore) -> MemoryStore:
    store = MemoryStore()
    for info in origin.list(""):
        store.put(info.name, origin.get(info.name))
    return store


class NoDelete(StoreWrapper):
    """A writer with the right to add, and with no other."""

    def delete(self, name: str) -> None:
        raise Refused("access denied", subject=name)


def test_who_may_not_delete_leaves_what_nobody_reads_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparse, "WHOLE_BYTES", 0)
    store = CountingStore(NoDelete(MemoryStore()))
    for number in range(4):
        shipped(store, number)
    tidied(store)
    assert names(store) == (5, 1)
    before = len(list(store.list("")))
    store.asked.clear()
    tidied(store)
    assert len(list(store.list(""))) == before
    assert len(store.of("get", "index/0")) == 0
    index = sparse.load(store, KEYS)
    assert index.find(blob(100)) is not None


def test_who_may_not_delete_does_not_store_all_samples_again_each_time() -> None:
    store = NoDelete(MemoryStore())
    for number in range(120):
        shipped(store, number)
        tidied(store)
    stored = sum(len(part.ids) for part in sampled(store))
    assert stored <= 120 * 8  # each id once for each doubling


def sampled(store: ObjectStore) -> list[samples.Samples]:
    names = [info.name for info in store.list("index/") if is_samples(info.name)]
    return [samples.parse(KEYS, name, store.get(name)) for name in names]


def test_samples_of_which_nothing_counts_any_more_go_however_large() -> None:
    """A writer that has slept through a collection leaves some."""
    store = MemoryStore()
    old = index_name(0, fresh_id())
    samples.write(store, KEYS, samples.of({old: np.concatenate([listed(number).ids for number in range(900)])}))
    era = eras.begin_era(store, KEYS, [old], conditional=True)
    eras.complete_era(store, KEYS, era)
    for number in range(4):
        shipped(store, number)
    tidied(store)
    (left,) = sampled(store)
    assert old not in left.indexes


def test_samples_of_an_era_that_began_while_the_indexes_were_listed_stay() -> None:
    """The indexes were listed before the collector began, and the samples after it had written its own."""
    store = MemoryStore()
    for number in range(4):
        shipped(store, number)
    before = list(store.list("index/"))
    era = eras.begin_era(store, KEYS, [info.name for info in before], conditional=True)
    name = indexes.write(store, KEYS, [listed(number) for number in range(4)], era=era)
    ours = samples.write(store, KEYS, samples.of({name: listed(0).ids}))
    store_then = Pieces(store)
    store_then.before = [*before, *store.list("index/sampled-")]
    tidied(store_then)
    assert ours in {info.name for info in store.list("index/")}


@pytest.mark.parametrize("puts", range(3))
def test_a_full_disk_is_not_filled_further_by_each_shipment(puts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two indexes and their samples would be written."""
    monkeypatch.setattr(indexes, "INDEX_BYTES", 12_000)

    class Full(StoreWrapper):
        left = puts

        def put(self, name: str, data: object) -> None:
            if not self.left:
                raise Refused("no space left", subject=name)
            self.left -= 1
            super().put(name, data)  # type: ignore[arg-type]

    store = MemoryStore()
    for number in range(4):
        shipped(store, number)
    before = known(store)
    index = sparse.load(store, KEYS)
    index.find(blob(10**9))
    with pytest.raises(Refused, match="no space left"):
        tidying.tidy(Full(store), KEYS, index, pack_size=None)
    assert names(store) == (4 if puts < 2 else 2, 0)
    assert known(store) == before


def test_a_store_that_fails_is_not_asked_to_delete_one_after_another() -> None:
    """Each request may take minutes until it is given up, and the shipment is over."""

    class Gone(StoreWrapper):
        def delete(self, name: str) -> None:
            raise Unavailable("no answer", subject=name)

    store = CountingStore(Gone(MemoryStore()))
    for number in range(20):
        shipped(store, number)
    store.asked.clear()
    tidied(store)
    assert len(store.of("delete")) <= 2


def test_what_is_condemned_is_left_out_and_what_is_damaged_stays_listed() -> None:
    store = MemoryStore()
    for number in range(6):
        shipped(store, number)
    condemned.condemn(store, KEYS, {pack(1)}, ())
    damage.record(store, KEYS, [pack(2)])
    tidied(store)
    sizes = indexes.load(store, KEYS).sizes
    assert sizes.keys() == {pack(number) for number in range(6) if number != 1}
    assert names(store) == (2, 1)


def test_nothing_is_done_where_nobody_can_tell_what_is_condemned() -> None:
    store = MemoryStore()
    for number in range(6):
        shipped(store, number)
    (name,) = condemned.condemn(store, KEYS, {pack(1)}, ())
    store.put(name, bytes(80))
    tidied(store)
    assert names(store) == (6, 0)


def test_nothing_is_done_when_a_collector_has_begun_another_era(monkeypatch: pytest.MonkeyPatch) -> None:
    """What would be written under the era before might not count, while that which counts is deleted."""
    monkeypatch.setattr(sparse, "WHOLE_BYTES", 0)
    store = MemoryStore()
    for number in range(6):
        shipped(store, number)
    index = sparse.load(store, KEYS)
    era = eras.begin_era(store, KEYS, [info.name for info in store.list("index/")], conditional=True)
    for number in range(6):
        indexes.write(store, KEYS, [listed(number)], era=era)
    eras.complete_era(store, KEYS, era)
    assert index.find(blob(501)) is not None
    before = {info.name for info in store.list("index/")}
    tidying.tidy(store, KEYS, index, pack_size=None)
    assert {info.name for info in store.list("index/")} == before


def test_of_many_at_work_about_one_does_it(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = np.random.default_rng(1)
    monkeypatch.setattr("random.random", draw.random)
    done = 0
    for _ in range(200):
        store = MemoryStore()
        for number in range(4):
            shipped(store, number)
        for number in range(10):
            store.put(f"leases/v-{number:032x}", bytes(50))
        store.put(f"leases/v-{11:032x}.ended", bytes(8))
        tidied(store)
        done += names(store)[1]
    assert 8 <= done <= 40  # 20 in the mean


def test_a_store_that_fails_is_reported() -> None:
    class Full(StoreWrapper):
        def put(self, name: str, data: object) -> None:  # noqa: ARG002 - as the store has it
            raise Unavailable("no room", subject=name)

    store = MemoryStore()
    for number in range(4):
        shipped(store, number)
    index = sparse.load(store, KEYS)
    with pytest.raises(Unavailable, match="no room"):
        tidying.tidy(Full(store), KEYS, index, pack_size=None)
    assert names(store) == (4, 0)


@settings(max_examples=30)
@given(data=st.data())
def test_two_at_once_one_call_after_another_forget_nothing(data: st.DataObject) -> None:
    """Both put the same together; then the next one puts that together."""
    store = MemoryStore()
    for number in range(data.draw(st.integers(4, 8))):
        shipped(store, number)
    before = known(store)

    class Between(StoreWrapper):
        count = data.draw(st.integers(0, 12))

        def _tick(self) -> None:
            self.count -= 1
            if self.count == 0:
                tidied(store)

        def put(self, name: str, data: object) -> None:
            self._tick()
            super().put(name, data)  # type: ignore[arg-type]

        def get(self, name: str, *, offset: int = 0, length: int | None = None) -> bytes:
            self._tick()
            return super().get(name, offset=offset, length=length)

        def delete(self, name: str) -> None:
            self._tick()
            super().delete(name)

    tidied(Between(store))
    assert known(store) == before
    tidied(store)
    assert known(store) == before
