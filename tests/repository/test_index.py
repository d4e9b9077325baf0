"""The index: a dict that costs 56 bytes an entry."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from snapchain.errors import Conflict, Corrupt, Unsupported
from snapchain.objects.memory import MemoryStore
from snapchain.repository import condemned, eras, index as indexes
from snapchain.repository.crypto import Keyring
from snapchain.repository.envelope import seal
from snapchain.repository.format import BLOB_ROW
from snapchain.repository.index import BlobIndex, IndexedPack
from snapchain.repository.packs import Location

KEYS = Keyring("aes-256-gcm", "00" * 16, bytes(32))


def blob(number: int) -> bytes:
    """Ids of which many share their first 8 bytes, which alone are looked up fast."""
    return (number % 7).to_bytes(8, "big") + number.to_bytes(24, "big")


def place(number: int) -> Location:
    return Location(f"{number % 5:032x}", number * 3, number + 16, number)


def listed(pack: int, numbers: list[int]) -> IndexedPack:
    ids = np.frombuffer(b"".join(map(blob, numbers)), np.uint8).reshape(-1, 32)
    rows = np.array([(99, number * 3, number + 16, number) for number in numbers], BLOB_ROW)
    return IndexedPack(f"{pack:032x}", 1000 + pack, ids, rows)


@settings(max_examples=60)
@given(
    steps=st.lists(
        st.lists(st.integers(0, 400), max_size=40) | st.tuples(st.integers(0, 4), st.lists(st.integers(0, 400))),
        max_size=12,
    )
)
def test_it_finds_what_a_dict_finds(steps: list[list[int] | tuple[int, list[int]]]) -> None:
    index = BlobIndex()
    index._FRESH = 16
    known: dict[bytes, set[Location]] = {}
    for step in steps:
        if isinstance(step, tuple):
            pack, numbers = step
            if numbers:
                part = listed(pack, numbers)
                rows = part.rows.copy()
                rows["pack"] = 0
                index.load(part.ids, rows, [part.pack])
            for number in numbers:
                where = Location(f"{pack:032x}", number * 3, number + 16, number)
                known.setdefault(blob(number), set()).add(where)
        else:
            for number in step:
                index.add(blob(number), place(number))
                known.setdefault(blob(number), set()).add(place(number))
        for number in range(0, 401, 13):
            found = index.find(blob(number))
            assert (found in known[blob(number)]) if blob(number) in known else (found is None)
    for number in range(401):
        assert (index.find(blob(number)) is None) == (blob(number) not in known)


def test_segments_stay_few() -> None:
    index = BlobIndex()
    shuffle = random.Random(1)
    for pack in range(300):
        part = listed(pack, [shuffle.randrange(10**9) for _ in range(50)])
        index.load(part.ids, np.zeros(len(part.rows), BLOB_ROW), [part.pack])
    assert len(index._segments) < 12


@settings(max_examples=40)
@given(parts=st.lists(st.lists(st.integers(0, 1000), min_size=1, max_size=20), min_size=1, max_size=5))
def test_what_is_written_is_loaded(parts: list[list[int]]) -> None:
    store = MemoryStore()
    for at in range(0, len(parts), 2):
        indexes.write(store, KEYS, [listed(pack, parts[pack]) for pack in range(at, min(at + 2, len(parts)))], era=0)
    index = indexes.load(store, KEYS)
    for pack, numbers in enumerate(parts):
        for number in numbers:
            found = index.find(blob(number))
            assert found is not None
            assert found.pack in {f"{other:032x}" for other in range(len(parts)) if number in parts[other]}
            assert (found.offset, found.stored, found.raw) == (number * 3, number + 16, number), pack
    assert index.find(blob(2000)) is None


def test_every_altered_byte_is_noticed() -> None:
    store = MemoryStore()
    name = indexes.write(store, KEYS, [listed(1, [1, 2, 3])], era=0)
    data = store.get(name)
    for at in range(len(data)):
        with pytest.raises((Corrupt, Unsupported), match=f"^{name}: "):
            indexes.parse(KEYS, name, data[:at] + bytes([data[at] ^ 2]) + data[at + 1 :])


_LARGE = st.integers(0, 2**32 - 1)


@settings(max_examples=150)
@given(counts=st.tuples(_LARGE | st.integers(0, 3), _LARGE | st.integers(0, 3)), change=st.integers(-60, 60))
def test_a_body_of_another_length_than_its_counts_say_is_corrupt(counts: tuple[int, int], change: int) -> None:
    """A pack takes 24 bytes, a blob 32 and 16."""
    true_length = 24 * counts[0] + 48 * counts[1]
    length = min(max(true_length + change, 0), 400)
    text = b"".join(count.to_bytes(4, "little") for count in counts) + bytes(length)
    sealed = seal(KEYS, b"I", "index/x", text)
    if length != true_length:
        with pytest.raises(Corrupt, match="another length than it says"):
            indexes.parse(KEYS, "index/x", sealed)
    elif counts[0] > counts[1]:
        with pytest.raises(Corrupt, match="more packs than blobs"):
            indexes.parse(KEYS, "index/x", sealed)
    elif counts[1] and not counts[0]:
        with pytest.raises(Corrupt, match="does not list"):
            indexes.parse(KEYS, "index/x", sealed)
    elif counts[0] > 1:
        with pytest.raises(Corrupt, match="a pack twice"):
            indexes.parse(KEYS, "index/x", sealed)
    else:
        _, ids, rows = indexes.parse(KEYS, "index/x", sealed)
        assert len(ids) == len(rows) == counts[1]


@given(body=st.binary(max_size=7))
def test_a_body_too_short_for_its_counts_is_corrupt(body: bytes) -> None:
    with pytest.raises(Corrupt, match="too short") as caught:
        indexes.parse(KEYS, "index/x", seal(KEYS, b"I", "index/x", body))
    assert caught.value.subject == "index/x"


def test_an_index_that_names_a_pack_it_does_not_list_is_corrupt() -> None:
    part = listed(1, [1])
    body = b"\1\0\0\0\1\0\0\0" + bytes(16) + bytes(8) + part.ids.tobytes() + part.rows.tobytes()
    with pytest.raises(Corrupt, match="does not list"):
        indexes.parse(KEYS, "index/x", seal(KEYS, b"I", "index/x", body))


def test_only_the_newest_era_counts() -> None:
    """What a writer stored that slept through a collection is not believed."""
    store = MemoryStore()
    indexes.write(store, KEYS, [listed(1, [1])], era=0)
    era = eras.begin_era(store, KEYS, [info.name for info in store.list("index/")], conditional=True)
    assert era == 1
    indexes.write(store, KEYS, [listed(2, [2])], era=era)
    indexes.write(store, KEYS, [listed(3, [3])], era=0)
    store.put("index/no-index", b"")
    index = indexes.load(store, KEYS)
    assert index.era == 1
    assert [index.find(blob(number)) is not None for number in (1, 2, 3)] == [True, True, True], "it is not complete"
    eras.complete_era(store, KEYS, era)
    index = indexes.load(store, KEYS)
    assert index.era == 1
    assert [index.find(blob(number)) is not None for number in (1, 2, 3)] == [False, True, False]


def test_an_era_that_was_begun_by_who_works_alone_counts_at_once() -> None:
    store = MemoryStore()
    indexes.write(store, KEYS, [listed(1, [1])], era=0)
    before = [info.name for info in store.list("index/")]
    assert eras.begin_era(store, KEYS, before, conditional=True, alone=True) == 1
    assert indexes.load(store, KEYS).find(blob(1)) is None


def test_an_era_that_nobody_completed_counts_beside_the_one_before_it() -> None:
    """Its collector was killed: the next one begins another."""
    store = MemoryStore()
    first = eras.begin_era(store, KEYS, [], conditional=True)
    indexes.write(store, KEYS, [listed(1, [1])], era=first)
    eras.complete_era(store, KEYS, first)
    second = eras.begin_era(store, KEYS, [info.name for info in store.list("index/")], conditional=True)
    third = eras.begin_era(store, KEYS, [info.name for info in store.list("index/")], conditional=True)
    assert (first, second, third) == (1, 2, 3)
    indexes.write(store, KEYS, [listed(2, [2])], era=third)
    index = indexes.load(store, KEYS)
    assert [index.find(blob(number)) is not None for number in (1, 2)] == [True, True]
    eras.complete_era(store, KEYS, second)  # it wakes up, and lists nothing
    assert indexes.load(store, KEYS).find(blob(1)) is None
    assert indexes.load(store, KEYS).find(blob(2)) is not None


def test_no_blob_is_found_in_what_is_condemned() -> None:
    store = MemoryStore()
    indexes.write(store, KEYS, [listed(1, [1]), listed(2, [2])], era=0)
    (going,) = condemned.condemn(store, KEYS, [f"{1:032x}"], [])
    index = indexes.load(store, KEYS)
    assert index.find(blob(1)) is None
    assert [place.pack for place in index.find_all(blob(1))] == [f"{1:032x}"], "who reads may have it"
    assert index.find(blob(2)) is not None
    store.put(going, store.get(going)[:-1] + b"x")
    index = indexes.load(store, KEYS)
    assert index.find(blob(2)) is None, "nobody knows what is to go"
    index.add(blob(3), place(3))
    assert index.find(blob(3)) is not None, "what this session stores does not"


def test_an_era_is_begun_once() -> None:
    store = MemoryStore()
    eras.begin_era(store, KEYS, [], conditional=True)
    with pytest.raises(Conflict, match="another snapchain collects"):
        eras.begin_era(store, KEYS, [], conditional=True)
    with pytest.raises(Corrupt, match="higher than any collection can have reached"):
        eras.begin_era(store, KEYS, [f"index/{10**10 - 1}-{'0' * 32}"], conditional=True)


def test_an_index_that_lists_a_pack_twice_is_refused() -> None:
    """The places of those after it would be others."""
    row = bytes(16) + (1000).to_bytes(8, "little")
    rows = np.zeros(2, BLOB_ROW)
    rows["pack"] = [0, 1]
    body = b"".join(((2).to_bytes(4, "little") * 2, row, row, blob(1), blob(2), rows.tobytes()))
    with pytest.raises(Corrupt, match="lists a pack twice"):
        indexes.parse(KEYS, "index/x", seal(KEYS, b"I", "index/x", body))
