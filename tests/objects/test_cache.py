"""A cache is never wrong, at worst slow."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from snapchain.objects import SCHEMES
from snapchain.objects.cache import CachedStore
from snapchain.objects.memory import MemoryStore
from snapchain.objects.store import StoreWrapper
from snapchain.repository.format import fresh_id, index_name
from snapchain.repository.opening import create_repository, open_repository


class Counting(StoreWrapper):
    """Counts whole reads."""

    def __init__(self) -> None:
        super().__init__(MemoryStore())
        self.reads: list[str] = []

    def get(self, name: str, *, offset: int = 0, length: int | None = None) -> bytes:
        self.reads.append(name)
        return self.inner.get(name, offset=offset, length=length)


def test_an_immutable_object_is_fetched_once(tmp_path: Path) -> None:
    inner = Counting()
    inner.put("index/a", b"one")
    for _ in range(3):
        assert CachedStore(inner, tmp_path / "c", prefix="index/").get("index/a") == b"one"
    assert inner.reads == ["index/a"]


def test_other_objects_and_ranges_are_not_cached(tmp_path: Path) -> None:
    inner = Counting()
    inner.put("disks/a/1", b"one")
    inner.put("index/a", b"0123")
    store = CachedStore(inner, tmp_path / "c", prefix="index/")
    assert [store.get("disks/a/1") for _ in range(2)] == [b"one"] * 2
    assert [store.get("index/a", offset=1, length=2) for _ in range(2)] == [b"12"] * 2
    assert len(inner.reads) == 4


def test_a_damaged_cache_is_asked_no_further(tmp_path: Path) -> None:
    inner = Counting()
    inner.put("index/a", b"the truth")
    store = CachedStore(inner, tmp_path / "c", prefix="index/")
    store.get("index/a")
    kept = tmp_path / "c" / "a"
    for damage in (b"", b"short", kept.read_bytes()[:-1] + b"?"):
        kept.write_bytes(damage)
        assert store.get("index/a") == b"the truth"
    assert len(inner.reads) == 4


def test_a_listing_forgets_what_the_store_lost(tmp_path: Path) -> None:
    inner = Counting()
    for name in ("index/a", "index/b"):
        inner.put(name, name.encode())
    store = CachedStore(inner, tmp_path / "c", prefix="index/")
    for name in ("index/a", "index/b"):
        store.get(name)
    inner.delete("index/a")
    assert [info.name for info in store.list("index/")] == ["index/b"]
    assert [path.name for path in (tmp_path / "c").iterdir()] == ["b"]


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "c").write_text("in the way")
    inner = Counting()
    inner.put("index/a", b"one")
    store = CachedStore(inner, tmp_path / "c", prefix="index/")
    assert store.get("index/a") == b"one"
    assert [info.name for info in store.list("index/")] == ["index/a"]


@pytest.mark.parametrize("is_remote", [False, True])
def test_indexes_of_a_remote_store_are_cached_whatever_its_address(
    monkeypatch: pytest.MonkeyPatch, is_remote: bool
) -> None:
    far = Counting()
    far.properties = replace(far.properties, is_remote=is_remote)
    monkeypatch.setitem(SCHEMES, "far", lambda _: far)
    create_repository("far://there", passphrase=lambda: "secret")
    name = index_name(0, fresh_id())
    far.inner.put(name, b"no index")
    for _ in range(2):
        open_repository("far://there", passphrase=lambda: "secret").index()
    assert far.reads.count(name) == (1 if is_remote else 2)
