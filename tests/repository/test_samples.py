"""Samples lead to the index that has an id, through any number of putting together; damage in them is noticed."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from snapchain.errors import Corrupt, Unsupported
from snapchain.objects.memory import MemoryStore
from snapchain.repository import samples
from snapchain.repository.crypto import Keyring
from snapchain.repository.envelope import seal
from snapchain.repository.format import index_name
from snapchain.repository.samples import Ids, Samples

KEYS = Keyring("aes-256-gcm", "00" * 16, bytes(32))


def drawn(seed: int, count: int = 200) -> Ids:
    ids = np.random.default_rng(seed).integers(0, 256, (count, 32), dtype=np.uint8)
    ids[: count // 4, 31] = 0  # sampled
    ids[: count // 8, :5] = 7  # many that differ in what samples leave out alone
    return ids


def name_of(number: int) -> str:
    return index_name(number % 3, f"{number:032x}")


def leads(parts: list[Samples], lists: dict[str, Ids]) -> None:
    """Each sampled id leads to all indexes that have it."""
    for name, ids in lists.items():
        for blob in map(bytes, ids):
            holders = {holder for part in parts for holder in part.holders(blob)}
            if samples.is_sampled(blob):
                assert name in holders
            assert holders <= {other for part in parts for other in part.indexes}


@settings(max_examples=30)
@given(groups=st.lists(st.lists(st.integers(0, 12), max_size=4, unique=True), min_size=1, max_size=4), data=st.data())
def test_what_is_written_and_put_together_still_leads_there(groups: list[list[int]], data: st.DataObject) -> None:
    store = MemoryStore()
    lists = {name_of(number): drawn(number) for group in groups for number in group}
    for group in groups:
        samples.write(store, KEYS, samples.of({name_of(n): lists[name_of(n)] for n in group}, [name_of(99)]))
    parts = [samples.parse(KEYS, info.name, store.get(info.name)) for info in store.list("index/")]
    leads(parts, lists)
    counting = data.draw(st.sets(st.sampled_from(sorted(lists)))) if lists else set()
    (whole,) = samples.together(parts, counting)
    assert set(whole.indexes) == counting
    assert len(set(whole.indexes)) == len(whole.indexes)
    assert whole.replaced == ()  # it is not there any more
    leads([whole], {name: lists[name] for name in counting})
    assert samples.together(parts, {*lists, name_of(99)})[0].replaced == (name_of(99),)


def test_an_index_of_which_samples_are_kept_is_not_replaced() -> None:
    """Two hosts did the same at once: one put together what the other has sampled as it was."""
    one = samples.of({name_of(1): drawn(1)})
    other = samples.of({name_of(2): drawn(1)}, [name_of(1)])
    (whole,) = samples.together([one, other], {name_of(1), name_of(2)})
    assert set(whole.indexes) == {name_of(1), name_of(2)}
    assert whole.replaced == ()


def test_too_many_for_one_object_are_parted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples, "_MOST_IDS", 100)
    lists = {name_of(number): drawn(number) for number in range(9)}
    parts = samples.together([samples.of(lists, [name_of(20)])], {*lists, name_of(20)})
    assert len(parts) > 2
    assert all(len(part.ids) <= 100 for part in parts)
    leads(parts, lists)
    assert [name for part in parts for name in part.replaced] == [name_of(20)]


def test_every_altered_byte_is_noticed() -> None:
    store = MemoryStore()
    name = samples.write(store, KEYS, samples.of({name_of(1): drawn(1, 40)}))
    data = store.get(name)
    for at in range(len(data)):
        with pytest.raises((Corrupt, Unsupported), match=f"^{name}: "):
            samples.parse(KEYS, name, data[:at] + bytes([data[at] ^ 2]) + data[at + 1 :])


ROW = bytes(24)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (bytes(11), "too short"),
        (struct.pack("<III", 1, 0, 0), "the length that follows from their counts"),
        (struct.pack("<III", 2**32 - 1, 2**32 - 1, 2**32 - 1) + ROW, "the length that follows from their counts"),
        (struct.pack("<III", 1, 0, 1) + ROW + struct.pack("<Q", 1), "do not list"),
        (struct.pack("<III", 0, 0, 1) + struct.pack("<Q", 0), "do not list"),
        (struct.pack("<III", 1, 0, 2) + ROW + struct.pack("<QQ", 1 << 24, 0), "not in order"),
    ],
)
def test_what_cannot_be_is_corrupt(body: bytes, words: str) -> None:
    with pytest.raises(Corrupt, match=words) as caught:
        samples.parse(KEYS, "index/x", seal(KEYS, b"S", "index/x", body))
    assert caught.value.subject == "index/x"
