"""The reference store keeps the contract that it is the reference of."""

import pytest

from snapchain.errors import InvalidInput
from snapchain.objects.memory import MemoryStore, shared_store
from snapchain.objects.store import ObjectStore
from snapchain.testing.object_contract import ObjectStoreContract


class TestMemory(ObjectStoreContract):
    @pytest.fixture
    def store(self) -> ObjectStore:
        return MemoryStore()


def test_names_and_directories_share_one_space() -> None:
    store = MemoryStore()
    store.put("a/b/c", b"")
    for name in ["a", "a/b"]:
        with pytest.raises(InvalidInput, match="directory"):
            store.put(name, b"")
    for name in ["a/b/c/d", "a/b/c/d/e"]:
        with pytest.raises(InvalidInput, match="object stands"):
            store.create(name, b"")


def test_a_label_names_one_store_in_this_process() -> None:
    shared_store("one").put("a", b"1")
    assert shared_store("one").get("a") == b"1"
    assert shared_store("two").size("a") is None
    assert shared_store("").size("a") is None
    assert shared_store("") is not shared_store("")


def test_its_clock_may_be_replaced() -> None:
    store = MemoryStore(clock=lambda: 77.0)
    store.put("a", b"")
    assert [info.modified for info in store.list("")] == [77.0]
