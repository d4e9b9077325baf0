"""What a shipment knows of a large index: never more than is true, and enough once it has met a relative."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from snapchain.errors import Unavailable
from snapchain.objects.memory import MemoryStore
from snapchain.objects.store import ObjectInfo, ObjectStore
from snapchain.repository import condemned, damage, eras, index as indexes, samples, sparse, unlisted
from snapchain.repository.crypto import Keyring
from snapchain.repository.format import BLOB_ROW, pack_name
from snapchain.repository.index import IndexedPack
from snapchain.repository.packs import Location
from snapchain.repository.soundness import is_whole, named
from snapchain.repository.sparse import SparseIndex
from tests.repository.counting import CountingStore
from tests.repository.synthetic import LEAF, again, drawn, repository
from tests.repository.test_repair import data_packs
from tests.repository.test_verified import DISK, noise, published

KEYS = Keyring("aes-256-gcm", "00" * 16, bytes(32))
BLOBS = 100


@pytest.fixture(autouse=True)
def _large(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if any index were large."""
    monkeypatch.setattr(sparse, "WHOLE_BYTES", 0)


def blob(number: int) -> bytes:
    """The first of a hundred that lie side by side is sampled."""
    return number.to_bytes(31, "little") + bytes([0 if number % BLOBS == 0 else 1])


def pack(number: int) -> str:
    return f"{number:032x}"


def listed(number: int, *, stored: int | None = None) -> IndexedPack:
    """Pack number n has the blobs from n * BLOBS on, or those of another one."""
    first = (number if stored is None else stored) * BLOBS
    ids = np.frombuffer(b"".join(blob(first + each) for each in range(BLOBS)), np.uint8).reshape(-1, 32)
    rows = np.zeros(BLOBS, BLOB_ROW)
    rows["offset"], rows["stored"], rows["raw"] = np.arange(BLOBS) * 100, 100, 200
    return IndexedPack(pack(number), 1000 + number, ids, rows)


def filled(store: MemoryStore | CountingStore, packs: int, *, each: int = 1) -> dict[str, list[IndexedPack]]:
    """Indexes of `each` packs, which are there; all sampled."""
    made: dict[str, list[IndexedPack]] = {}
    for first in range(0, packs, each):
        group = [listed(number) for number in range(first, min(first + each, packs))]
        made[indexes.write(store, KEYS, group, era=0)] = group
        for one in group:
            store.put(pack_name(one.pack), bytes(one.size))
    samples.write(store, KEYS, samples.of({name: samples.ids_of(group) for name, group in made.items()}))
    return made


def test_nothing_is_read_before_it_is_asked_for() -> None:
    """A second shipment of an unchanged disk asks for nothing."""
    store = CountingStore(MemoryStore())
    filled(store, 20)
    store.asked.clear()
    index = sparse.load(store, KEYS)
    assert not index.is_whole
    assert store.of("get") == []
    assert [each.name for each in store.of("list")] == ["index/"]


def test_one_sampled_id_leads_to_all_its_neighbours_and_reads_no_others() -> None:
    store = CountingStore(MemoryStore())
    made = filled(store, 20)
    index = sparse.load(store, KEYS)
    assert index.find(blob(501)) is None  # it is not sampled, and nothing is known of its neighbours
    assert index.find(blob(500)) == Location(pack(5), 0, 100, 200)
    assert index.find(blob(501)) == Location(pack(5), 100, 100, 200)
    assert all(index.find(blob(number)) is not None for number in range(500, 600))
    read = {each.name for each in store.of("get", "index/0")}
    assert read == {name for name, group in made.items() if group[0].pack == pack(5)}
    assert len(store.of("size", "packs/")) == 1


def test_neighbours_that_were_prepared_are_found_at_once() -> None:
    store = MemoryStore()
    filled(store, 20)
    index = sparse.load(store, KEYS)
    index.prepare(blob(number) for number in range(590, 610))
    assert index.find(blob(601)) is not None
    assert index.find(blob(599)) is None  # the sampled one of its pack lies before


def test_small_indexes_are_known_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    store = MemoryStore()
    filled(store, 20)
    monkeypatch.setattr(sparse, "WHOLE_BYTES", 1 << 20)
    index = sparse.load(store, KEYS)
    assert index.is_whole
    assert all(index.find(blob(number)) is not None for number in range(20 * BLOBS))
    assert index.sizes == indexes.load(store, KEYS).sizes


def test_indexes_without_samples_are_read_the_newest_first(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(1000))
    store = MemoryStore(clock=lambda: float(next(clock)))
    filled(store, 3)
    for number in range(10, 16):
        indexes.write(store, KEYS, [listed(number)], era=0)
        store.put(pack_name(pack(number)), bytes(1000 + number))
    size = max(info.size for info in store.list("index/0"))
    monkeypatch.setattr(sparse, "LOOSE_BYTES", 2 * size)
    index = sparse.load(store, KEYS)
    assert index.find(blob(1501)) is not None
    assert index.find(blob(1401)) is not None
    assert index.find(blob(1301)) is None
    assert {each for part in index.loose for each in part.packs} == {pack(14), pack(15)}


@settings(max_examples=40)
@given(
    packs=st.lists(st.integers(0, 9), min_size=1, max_size=12),
    each=st.integers(1, 4),
    gone=st.sets(st.integers(0, 11), max_size=4),
    short=st.sets(st.integers(0, 11), max_size=4),
    avoided=st.sets(st.integers(0, 11), max_size=3),
    to_go=st.sets(st.integers(0, 11), max_size=3),
    asked=st.lists(st.integers(0, 999), min_size=1, max_size=60),
    own=st.sets(st.integers(0, 999), max_size=10),
    room=st.sampled_from([1, 10_000]),
)
def test_what_it_finds_is_there_and_may_be_relied_on(
    packs: list[int],
    each: int,
    gone: set[int],
    short: set[int],
    avoided: set[int],
    to_go: set[int],
    asked: list[int],
    own: set[int],
    room: int,
) -> None:
    """Whatever is missing, cut short, damaged or condemned; and a blob is found after the sampled one beside it."""
    store = MemoryStore()
    made = [listed(number, stored=stored) for number, stored in enumerate(packs)]
    for first in range(0, len(made), each):
        name = indexes.write(store, KEYS, made[first : first + each], era=0)
        samples.write(store, KEYS, samples.of({name: samples.ids_of(made[first : first + each])}))
    for number, one in enumerate(made):
        if number not in gone:
            store.put(pack_name(one.pack), bytes(one.size - (number in short)))
    if avoided:
        damage.record(store, KEYS, map(pack, avoided))
    if to_go:
        condemned.condemn(store, KEYS, set(map(pack, to_go)), ())
    index = sparse.load(store, KEYS)
    mine = Location("f" * 32, 1, 2, 3)
    for number in own:
        index.add(blob(number), mine)
    good = {number for number in range(len(made)) if number not in gone | short | avoided | to_go}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sparse, "NEIGHBOUR_BLOBS", room)
        for number in asked:
            index.prepare([blob(number // BLOBS * BLOBS), blob(number)])
            found = index.find(blob(number))
            places = {Location(pack(at), number % BLOBS * 100, 100, 200) for at in good if packs[at] == number // BLOBS}
            if number in own:
                places.add(mine)
            assert (found is None) == (not places)
            assert found is None or found in places
    whole = indexes.load(store, KEYS)
    for number in asked:
        assert set(index.find_all(blob(number))) - {mine} == set(whole.find_all(blob(number)))


def test_where_a_record_of_what_is_to_go_is_unreadable_only_its_own_packs_count() -> None:
    store = MemoryStore()
    filled(store, 3)
    (name,) = condemned.condemn(store, KEYS, {pack(9)}, ())
    store.put(name, bytes(100))
    index = sparse.load(store, KEYS)
    assert index.condemned.unreadable
    assert index.find(blob(100)) is None
    index.add(blob(100), Location("f" * 32, 1, 2, 3))
    assert index.find(blob(100)) == Location("f" * 32, 1, 2, 3)


def test_many_threads_read_each_index_once() -> None:
    store = CountingStore(MemoryStore())
    filled(store, 30)
    index = sparse.load(store, KEYS)
    store.asked.clear()
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda number: index.find(blob(number)), [n * BLOBS for n in range(30)] * 8))
    assert None not in found
    read = [each.name for each in store.of("get", "index/0")]
    assert len(read) == len(set(read)) == 30


def test_an_index_that_is_put_together_with_others_meanwhile_is_no_error() -> None:
    """Between the listing and the first question, and between that and the next."""
    store = MemoryStore()
    made = filled(store, 4)
    loose = indexes.write(store, KEYS, [listed(7)], era=0)
    store.put(pack_name(pack(7)), bytes(1007))
    index = sparse.load(store, KEYS)
    indexes.write(store, KEYS, [listed(7)], era=0)
    store.delete(loose)
    assert index.find(blob(701)) is not None
    name = next(name for name, group in made.items() if group[0].pack == pack(2))
    store.delete(name)
    assert index.find(blob(200)) is None
    assert index.find(blob(300)) is not None


def test_what_is_read_again_since_others_put_some_together_is_known_once() -> None:
    store = CountingStore(MemoryStore())
    names = [indexes.write(store, KEYS, [listed(number)], era=0) for number in range(4)]
    for number in range(4):
        store.put(pack_name(pack(number)), bytes(1000 + number))
    damaged = indexes.write(store, KEYS, [listed(4)], era=0)
    store.put(damaged, bytes(60))
    index = sparse.load(store, KEYS)
    before = list(store.list("index/"))
    last = max(names)
    (number,) = (number for number, name in enumerate(names) if name == last)
    indexes.write(store, KEYS, [listed(number)], era=0)
    store.delete(last)
    again = Pieces(store.inner)
    again.before = before
    index._store = again
    assert index.find(blob(number * BLOBS)) is not None
    assert len(again.of("list")) == 2
    assert len(indexes.BlobIndex.find_all(index, blob(1))) == 1
    assert [error.subject for error in index.unreadable] == [damaged]


def test_a_damaged_sample_and_a_damaged_index_cost_space_alone() -> None:
    store = MemoryStore()
    made = filled(store, 4)
    name = next(name for name, group in made.items() if group[0].pack == pack(2))
    store.put(name, store.get(name)[:-1])
    index = sparse.load(store, KEYS)
    assert index.find(blob(200)) is None
    assert [error.subject for error in index.unreadable] == [name]
    (sampled,) = (info.name for info in store.list("index/sampled-"))
    store.put(sampled, bytes(100))
    again = sparse.load(store, KEYS)
    assert again.find(blob(300)) is not None  # its index is one without a sample now


def test_samples_of_a_newer_format_say_nothing() -> None:
    store = MemoryStore()
    filled(store, 4)
    (sampled,) = (info.name for info in store.list("index/sampled-"))
    data = bytearray(store.get(sampled))
    data[7] = 2
    store.put(sampled, bytes(data))
    assert sparse.load(store, KEYS).find(blob(301)) is not None


def test_a_store_that_does_not_answer_is_an_error() -> None:
    """Not a reason to store everything again."""

    class Silent(CountingStore):
        def get(self, name: str, *, offset: int = 0, length: int | None = None) -> bytes:
            if name.startswith("index/0"):
                raise Unavailable("no answer", subject=name)
            return super().get(name, offset=offset, length=length)

    store = Silent(MemoryStore())
    filled(store, 4)
    index = sparse.load(store, KEYS)
    with pytest.raises(Unavailable, match="no answer"):
        index.find(blob(100))


class Pieces(CountingStore):
    """Lists in pieces: an era ends between the first and the second, and the collector has done its work."""

    def __init__(self, inner: ObjectStore) -> None:
        super().__init__(inner)
        self.before: list[ObjectInfo] = []

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        now = super().list(prefix)
        if prefix == "index/" and self.before:
            first, self.before = self.before, []
            return iter(first)
        return now


def load_sparse(store: CountingStore) -> SparseIndex:
    return sparse.load(store, KEYS)


@pytest.mark.parametrize("load", [load_sparse, lambda store: indexes.load(store, KEYS)], ids=["sparse", "whole"])
@pytest.mark.parametrize("kind", ["an era is begun", "a long listing"])
def test_a_listing_of_two_moments_is_made_again(load: object, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It shows an index of before, and nothing of what was condemned; a cache still has the index."""
    store = Pieces(MemoryStore())
    filled(store, 2)
    before = list(store.inner.list("index/"))
    era = eras.begin_era(store, KEYS, [info.name for info in before], conditional=True)
    if kind == "an era is begun":
        before = list(store.inner.list("index/"))
    else:
        monkeypatch.setattr(eras, "_ONE_LISTING", 1)
    indexes.write(store, KEYS, [listed(1)], era=era)
    eras.complete_era(store, KEYS, era)  # pack 0 is gone; the old indexes are kept in a cache
    store.before = before
    index = load(store)  # type: ignore[operator]
    assert index.find(blob(0)) is None
    assert index.find(blob(101)) is not None


def test_a_shipment_reads_around_a_bad_sector_that_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """As one that knows all indexes: a copy is looked for, and the store is not asked time and again."""

    class Bad(CountingStore):
        packs: frozenset[str] = frozenset()

        def get(self, name: str, *, offset: int = 0, length: int | None = None) -> bytes:
            if name in self.packs:
                raise Unavailable("input/output error", subject=name)
            return super().get(name, offset=offset, length=length)

    store = Bad(MemoryStore())
    root = drawn(4 * LEAF, noise(*range(4)), b"")
    repo = published(repository(store, block_size=LEAF), [root])
    (first,) = data_packs(repo)
    known = {info.name: store.get(info.name) for info in store.list("index/")}
    for name in known:
        store.delete(name)
    monkeypatch.setattr(unlisted, "MOST", 0)
    published(again(repo), [root], "copy")  # a writer that did not know of the first
    for name, body in known.items():
        store.put(name, body)
    damage.record(store, repo.keys, [first.rpartition("/")[2]])
    store.packs = frozenset([first])
    shipping = again(repo)
    assert not shipping.near_index().is_whole
    (layer,) = shipping.layers(repo.catalogue(DISK).parents).values()
    assert [len(shipping.blobs.read(*each)) for each in named(layer)]


def test_a_layer_of_which_all_copies_are_gone_is_not_taken_for_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """One pack is known to be damaged, the other one is missing, and nobody has noticed yet."""
    store = MemoryStore()
    root = drawn(4 * LEAF, noise(*range(4)), b"")
    repo = published(repository(store, block_size=LEAF), [root])
    (first,) = data_packs(repo)
    known = {info.name: store.get(info.name) for info in store.list("index/")}
    for name in known:
        store.delete(name)
    monkeypatch.setattr(unlisted, "MOST", 0)
    published(again(repo), [root], "copy")
    (second,) = set(data_packs(repo)) - {first}
    for name, body in known.items():
        store.put(name, body)
    (layer,) = repo.layers(repo.catalogue(DISK).parents).values()
    damage.record(store, repo.keys, [first.rpartition("/")[2]])
    assert is_whole(layer, again(repo).near_index())
    store.delete(second)
    assert not is_whole(layer, again(repo).near_index())
