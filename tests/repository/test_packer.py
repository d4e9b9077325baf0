"""The packer: bounded, honest about failures, and never waiting for itself."""

from __future__ import annotations

import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import blake3
import pytest

from snapchain.errors import Unavailable
from snapchain.objects.memory import MemoryStore
from snapchain.objects.store import Data, ObjectStore, StoreWrapper
from snapchain.repository import index as indexes, packer as packers, packs
from snapchain.repository.blobs import BlobReader
from snapchain.repository.crypto import Keyring
from snapchain.repository.format import pack_name
from snapchain.repository.index import BlobIndex
from snapchain.repository.layer_writer import LayerUpload
from snapchain.repository.packer import SMALL, UPLOADS, Packer, Stream
from snapchain.testing.faults import Crash, Fault, FaultStore, On
from tests.repository.synthetic import LEAF, ORIGIN, Run, again, drawn, nothing, repository
from tests.waiting import HANG, stuck, wait_until

KEYS = Keyring("aes-256-gcm", "00" * 16, bytes(32))


@pytest.fixture(autouse=True)
def _small_packs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packs, "PACK_BYTES", 1600)


class Slow(StoreWrapper):
    """Each upload takes a moment; how many were under way at once."""

    def __init__(self, inner: ObjectStore, seconds: float = 0.01) -> None:
        super().__init__(inner)
        self.seconds = seconds
        self.most = self.now = 0
        self._lock = threading.Lock()

    def put(self, name: str, data: Data) -> None:
        with self._lock:
            self.now += 1
            self.most = max(self.most, self.now)
        time.sleep(self.seconds)
        super().put(name, data)
        with self._lock:
            self.now -= 1


def blobs(count: int, size: int = 400, seed: int = 1) -> list[bytes]:
    shuffle = random.Random(seed)
    return [shuffle.randbytes(size) for _ in range(count)]


def identity(plain: bytes) -> bytes:
    return blake3.blake3(plain).digest()


def pack_all(store: ObjectStore, plain: list[bytes]) -> None:
    with Packer(store, KEYS, BlobIndex()) as packer:
        for each in plain:
            packer.add(identity(each), each, len(each))
        packer.flush()


def test_more_packs_than_may_be_in_flight_do_not_deadlock() -> None:
    """Filling waited for an upload that needed the lock that filling held. Two threads, hundreds of packs."""
    store = Slow(MemoryStore(), 0.001)
    plain = blobs(600)
    with Packer(store, KEYS, BlobIndex()) as packer, ThreadPoolExecutor(4) as pool:
        where = list(pool.map(lambda each: packer.add(identity(each), each, len(each)), plain))
        packer.flush()
    assert len({each.pack for each in where}) > 20 * UPLOADS
    assert store.most <= UPLOADS
    index = indexes.load(store, KEYS)
    reader = BlobReader(store, KEYS)
    assert all(index.find(identity(each)) == place for each, place in zip(plain, where, strict=True))
    assert dict(reader.read_all([(identity(each), place) for each, place in zip(plain, where, strict=True)])) == dict(
        enumerate(plain)
    )


def test_what_waits_in_memory_is_bounded() -> None:
    """While no upload ends, no more than the queue's packs are accepted."""
    gate = threading.Event()

    class Stuck(StoreWrapper):
        def put(self, name: str, data: Data) -> None:
            assert gate.wait(HANG)
            super().put(name, data)

    accepted: list[bytes] = []

    def fill() -> None:
        for each in blobs(100):
            packer.add(identity(each), each, len(each))
            accepted.append(each)

    store = Stuck(MemoryStore())
    with Packer(store, KEYS, BlobIndex()) as packer:
        filler = threading.Thread(target=fill)
        filler.start()
        wait_until(lambda: stuck(filler))
        assert len(accepted) <= 3 * (UPLOADS + 3)
        gate.set()
        filler.join()
        packer.flush()
    assert len(accepted) == 100


def test_a_blob_that_many_threads_bring_is_stored_once() -> None:
    store = MemoryStore()
    plain = blobs(30)
    start = threading.Barrier(6)

    def bring(seed: int) -> list[object]:
        order = plain[:]
        random.Random(seed).shuffle(order)
        start.wait()
        return [packer.add(identity(each), each, len(each)) for each in order]

    with Packer(store, KEYS, BlobIndex()) as packer, ThreadPoolExecutor(6) as pool:
        found = {place for places in pool.map(bring, range(6)) for place in places}
        packer.flush()
    assert len(found) == len(plain)
    held = sum(info.size for info in store.list("packs/"))
    assert held < 30 * 416 + 200 * len(list(store.list("packs/")))


@pytest.mark.parametrize("fault", [Fault.UNAVAILABLE, Fault.LOST_REPLY])
@pytest.mark.parametrize("nth", [1, 5, 40])
def test_a_failed_upload_is_the_error_of_whoever_fills_or_flushes(fault: Fault, nth: int) -> None:
    store = FaultStore(Slow(MemoryStore(), 0.001), [On(nth, fault, operation="put", prefix="packs/")])
    with pytest.raises(Unavailable, match="injected"):
        pack_all(store, blobs(300))
    assert listed(store) <= stored(store)


def test_a_failed_upload_ends_a_whole_shipment_with_its_error() -> None:
    for prefix in ("packs/", "index/", "layers/"):
        opened = repository()
        store = FaultStore(opened.store, [On(1, Fault.UNAVAILABLE, operation="put", prefix=prefix)])
        layer = drawn(40 * LEAF, [Run(0, 40 * LEAF, 5000)], b"")
        with pytest.raises(Unavailable, match="injected"), LayerUpload(again(opened, store)) as deposit:
            deposit.add(layer, [], ORIGIN, on_bytes=nothing, confirm=nothing)
        assert list(opened.store.list("layers/")) == []


def test_a_crash_in_an_upload_ends_the_session() -> None:
    store = FaultStore(MemoryStore(), crash_at=6)
    with pytest.raises(Crash):
        pack_all(store, blobs(300))


def test_leaving_with_an_error_does_not_wait_for_slow_uploads_nor_strand_a_thread() -> None:
    """A worker that waits for a slot when the session is given up gets an error, not the end of time."""
    gate = threading.Event()

    class Stuck(StoreWrapper):
        def put(self, name: str, data: Data) -> None:
            ended.append(gate.wait(HANG))
            super().put(name, data)

    ended: list[bool] = []
    outcome: list[BaseException] = []
    packer = Packer(Stuck(MemoryStore()), KEYS, BlobIndex())

    def fill() -> None:
        try:
            for each in blobs(200):
                packer.add(identity(each), each, len(each))
        except BaseException as error:  # noqa: BLE001 -- what a thread ends with is the test
            outcome.append(error)

    workers = [threading.Thread(target=fill, daemon=True) for _ in range(12)]
    for worker in workers:
        worker.start()
    wait_until(lambda: stuck(*workers))
    packer.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert ended == [], "no upload was waited for"
    gate.set()
    for worker in workers:
        worker.join(HANG)
    assert not any(worker.is_alive() for worker in workers)
    assert len(outcome) == 12


def listed(store: ObjectStore) -> set[str]:
    """Packs that an index lists, all of which must be there."""
    sizes = indexes.load(store, KEYS).sizes
    assert {pack: store.size(pack_name(pack)) for pack in sizes} == sizes
    return set(sizes)


def stored(store: ObjectStore) -> set[str]:
    return {info.name.rpartition("/")[2] for info in store.list("packs/")}


@pytest.mark.timeout(20)
def test_what_a_kill_leaves_unlisted_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """At every moment: no more than INDEX_BYTES, and what is on its way."""
    monkeypatch.setattr(packers, "INDEX_BYTES", 5000)
    most = 0

    class Watched(StoreWrapper):
        def put(self, name: str, data: Data) -> None:
            nonlocal most
            super().put(name, data)
            if name.startswith("packs/"):
                most = max(most, len(stored(self.inner) - listed(self.inner)))

    store = Watched(MemoryStore())
    with Packer(store, KEYS, BlobIndex()) as packer:
        for each in blobs(300):
            packer.add(identity(each), each, len(each))
        packer.flush()
    assert 5000 // 1400 < most <= 5000 // 1000 + UPLOADS + 1
    assert stored(store) == listed(store)


def test_small_indexes_are_put_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packers, "INDEX_BYTES", 2500)
    store, plain = MemoryStore(), blobs(40 * SMALL)
    pack_all(store, plain)
    assert stored(store) == listed(store)
    count = len(stored(store)) // 2
    assert len(list(store.list("index/"))) < count // SMALL + SMALL
    index = indexes.load(store, KEYS)
    assert all(index.find(identity(each)) is not None for each in plain)


def test_indexes_that_are_put_together_meanwhile_are_loaded_all_the_same() -> None:
    store = MemoryStore()
    pack_all(store, blobs(10))
    (small,) = [info.name for info in store.list("index/")]

    class Meanwhile(StoreWrapper):
        def get(self, name: str, *, offset: int = 0, length: int | None = None) -> bytes:
            if name == small and self.inner.size(small) is not None:
                packs_listed, ids, rows = indexes.parse(KEYS, small, self.inner.get(small))
                sizes = [indexes.IndexedPack(pack, size, ids[:1], rows[:1]) for pack, size in packs_listed.items()]
                indexes.write(self.inner, KEYS, sizes, era=0)
                self.inner.delete(small)
            return super().get(name, offset=offset, length=length)

    assert set(indexes.load(Meanwhile(store), KEYS).sizes) == stored(store)


def _cut_off(store: ObjectStore, error: BaseException) -> None:
    with Packer(store, KEYS, BlobIndex()) as packer:
        for each in blobs(100):
            packer.add(identity(each), each, len(each))
        raise error


@pytest.mark.parametrize("error", [KeyboardInterrupt(), Unavailable("the network is gone")])
def test_leaving_with_an_error_lists_what_was_sent(error: BaseException) -> None:
    store = MemoryStore()
    with pytest.raises(type(error), match=f"^{error}"):
        _cut_off(store, error)
    assert len(listed(store)) > 20
    assert len(stored(store) - listed(store)) <= UPLOADS + 1


@pytest.mark.timeout(20)
def test_a_store_that_hangs_does_not_hold_up_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packers, "_LAST_WORDS", 0.01)
    gate = threading.Event()

    class Hanging(StoreWrapper):
        def put(self, name: str, data: Data) -> None:
            if name.startswith("index/"):
                gate.wait()
            super().put(name, data)

    with pytest.raises(KeyboardInterrupt):
        _cut_off(Hanging(MemoryStore()), KeyboardInterrupt())
    gate.set()


def test_data_and_pages_lie_apart() -> None:
    store = MemoryStore()
    with Packer(store, KEYS, BlobIndex()) as packer:
        data, page = blobs(2)
        one = packer.add(identity(data), data, len(data))
        other = packer.add(identity(page), page, len(page), stream=Stream.PAGES)
        packer.flush()
    assert one.pack != other.pack


def test_what_is_known_is_not_stored_again() -> None:
    store = MemoryStore()
    (plain,) = blobs(1)
    with Packer(store, KEYS, BlobIndex()) as packer:
        first = packer.add(identity(plain), plain, len(plain))
        packer.flush()
        assert packer.bytes_stored == sum(info.size for info in store.list("packs/"))
    with Packer(store, KEYS, indexes.load(store, KEYS)) as packer:
        assert packer.add(identity(plain), plain, len(plain)) == first
        packer.flush()
        assert packer.bytes_stored == 0
    assert len(list(store.list("index/"))) == 1


def test_the_slots_outnumber_the_uploads_so_that_filling_can_go_on() -> None:
    assert packers.UPLOADS == UPLOADS >= 2
