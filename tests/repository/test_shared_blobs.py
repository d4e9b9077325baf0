"""Blobs through a cache that processes share: fetched once, encrypted there, and proven when they come from there."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from snapchain.destination.reading import StoredBlob
from snapchain.errors import Corrupt
from snapchain.host.shared_cache import FOLDER, SharedCache
from snapchain.objects.store import ObjectStore, StoreWrapper
from snapchain.repository.chain import ChainView
from snapchain.repository.format import pack_name
from tests.repository.counting import CountingStore
from tests.repository.synthetic import LEAF, Run, Shipped, again, drawn, ship
from tests.waiting import HANG

MiB = 1 << 20


@pytest.fixture
def shipped() -> Shipped:
    """16 blobs that do not compress."""
    return ship([drawn(16 * LEAF, [Run(number * LEAF, LEAF, 1000 + number) for number in range(16)], b"")])


def view(shipped: Shipped, store: ObjectStore | None = None) -> ChainView:
    fresh = again(shipped.repository, store)
    return ChainView([fresh.layer(shipped.layers[0].id)], fresh.blobs)


def blobs_of(disk: ChainView) -> list[StoredBlob]:
    return [part.blob for part in disk.parts(0, disk.size) if part.blob is not None]


def read(disk: ChainView, cache: SharedCache) -> bytes:
    wanted = blobs_of(disk)
    found = {blob.id: plain for blob, plain in disk.load_shared(wanted, cache)}
    return b"".join(found[blob.id] for blob in wanted)


def test_a_second_reader_fetches_nothing_and_the_cache_shows_nothing(shipped: Shipped, tmp_path: Path) -> None:
    with SharedCache(tmp_path, 64 * MiB) as cache:
        assert read(view(shipped), cache) == shipped.stack[0].shown
        store = CountingStore(shipped.repository.store)
        disk = view(shipped, store)
        blobs_of(disk)  # the map
        before = len(store.of("get", "packs/"))
        assert read(disk, cache) == shipped.stack[0].shown
        assert len(store.of("get", "packs/")) == before
    kept = b"".join(path.read_bytes() for path in (tmp_path / FOLDER).iterdir())
    assert len(kept) >= 16 * LEAF
    assert not any(shipped.stack[0].shown[at : at + 16] in kept for at in range(0, 16 * LEAF, LEAF))


def test_an_altered_blob_is_dropped_and_fetched(shipped: Shipped, tmp_path: Path) -> None:
    with SharedCache(tmp_path, 64 * MiB) as cache:
        read(view(shipped), cache)
        kept = sorted(path for path in (tmp_path / FOLDER).iterdir() if path.stat().st_size > LEAF // 2)
        for path, body in ((kept[0], bytes(16)), (kept[1], kept[2].read_bytes()), (kept[3], b"")):
            path.write_bytes(body if len(body) != 16 else body + path.read_bytes()[16:])
        assert read(view(shipped), cache) == shipped.stack[0].shown
        assert kept[1].read_bytes() != kept[2].read_bytes(), "the true one again"


def test_damage_in_the_store_is_not_kept(shipped: Shipped, tmp_path: Path) -> None:
    disk = view(shipped)
    blob = blobs_of(disk)[5]
    name = pack_name(blob.where[0])
    body = bytearray(shipped.repository.store.get(name))
    body[blob.where[1]] ^= 1
    shipped.repository.store.put(name, bytes(body))
    with SharedCache(tmp_path, 64 * MiB) as cache:
        for _ in range(2):
            with pytest.raises(Corrupt, match="altered"):
                list(view(shipped).load_shared([blob], cache))
        assert cache.take(f"{blob.where[0]}-{blob.where[1]:08x}", size=blob.where[2]) is None


class Gated(StoreWrapper):
    """Holds back the reads of packs once it is closed."""

    def __init__(self, inner: ObjectStore) -> None:
        super().__init__(inner)
        self.gate, self.asked, self.reads = threading.Event(), threading.Event(), 0
        self.gate.set()

    def get(self, name: str, *, offset: int = 0, length: int | None = None) -> bytes:
        if not self.gate.is_set():
            self.reads += 1
            self.asked.set()
            self.gate.wait(HANG)
        return self.inner.get(name, offset=offset, length=length)


def test_two_that_want_the_same_at_once_fetch_it_once(shipped: Shipped, tmp_path: Path) -> None:
    stores = [Gated(shipped.repository.store), Gated(shipped.repository.store)]
    disks = [view(shipped, store) for store in stores]
    for disk in disks:
        blobs_of(disk)
    with (
        SharedCache(tmp_path, 64 * MiB) as first,
        SharedCache(tmp_path, 64 * MiB) as second,
        ThreadPoolExecutor(2) as pool,
    ):
        for store in stores:
            store.gate.clear()
        one = pool.submit(read, disks[0], first)
        assert stores[0].asked.wait(HANG)
        other = pool.submit(read, disks[1], second)
        stores[0].gate.set()
        assert one.result() == other.result() == shipped.stack[0].shown
    assert (stores[0].reads, stores[1].reads) == (1, 0)
