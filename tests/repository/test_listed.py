"""Who has to know every pack learns of them in the end, however busy others are."""

from __future__ import annotations

import threading

import pytest

from snapchain.objects.memory import MemoryStore
from snapchain.objects.store import StoreWrapper
from snapchain.repository import index as indexes, listed as listings
from tests.repository.counting import CountingStore
from tests.repository.test_sparse import KEYS, listed, pack


class Busy(StoreWrapper):
    """Each tenth time that an object is read, another one is put in the place of the last one."""

    def __init__(self, inner: MemoryStore) -> None:
        super().__init__(inner)
        self.reads = 0
        self._lock = threading.Lock()

    def get(self, name: str, *, offset: int = 0, length: int | None = None) -> bytes:
        with self._lock:
            self.reads += 1
            if self.reads % 10 == 0:
                last = max(info.name for info in self.inner.list("index/"))
                (one,) = indexes.parse(KEYS, last, self.inner.get(last))[0]
                indexes.write(self.inner, KEYS, [listed(int(one, 16))], era=0)
                self.inner.delete(last)
        return self.inner.get(name, offset=offset, length=length)


def test_all_packs_are_known_though_others_put_indexes_together_all_the_time() -> None:
    inner = MemoryStore()
    for number in range(60):
        indexes.write(inner, KEYS, [listed(number)], era=0)
    store = Busy(inner)
    index = listings.load(store, KEYS)
    assert index.sizes == {pack(number): 1000 + number for number in range(60)}
    assert store.reads < 2 * 60


def test_small_indexes_are_read_before_others_put_them_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(indexes, "_READERS", 1)
    store = CountingStore(MemoryStore())
    large = {indexes.write(store, KEYS, [listed(10 * at + each) for each in range(9)], era=0) for at in range(9)}
    small = {indexes.write(store, KEYS, [listed(9 + 10 * at)], era=0) for at in range(9)}
    store.asked.clear()
    assert len(indexes.load(store, KEYS).sizes) == 90
    read = [each.name for each in store.of("get")]
    assert (set(read[:9]), set(read[9:])) == (small, large)
