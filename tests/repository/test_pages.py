"""Pages and layer records: whatever bytes they are made of, they are read right or are Corrupt."""

from __future__ import annotations

import json
import random
import secrets
from datetime import UTC, datetime

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from snapchain.errors import Corrupt, Unsupported
from snapchain.model.content import content_id, empty_sum, encode_sum
from snapchain.objects.memory import MemoryStore
from snapchain.repository import layers as records
from snapchain.repository.crypto import Keyring
from snapchain.repository.envelope import seal
from snapchain.repository.format import LEAF_ROW, PAGE_ROW, RUN_ROW, layer_name
from snapchain.repository.layers import LayerHeader
from snapchain.repository.pages import Page, PageBuilder, Rows
from tests.repository.synthetic import LEAF, Drawn, Run, drawn, ship, stacks

KEYS = Keyring("aes-256-gcm", "00" * 16, bytes(32))
_NUMBER = st.sampled_from([0, 1, 511, 512, LEAF - 1, LEAF, 5 * LEAF, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1])
_BYTES = st.binary(min_size=16, max_size=16).map(bytes.hex)


def page(runs: list[tuple[int, int, int]], leaves: list[int], packs: int = 1) -> Page:
    """runs: (start, length, stored)"""
    rows = np.zeros(len(runs), RUN_ROW)
    for at, (start, length, stored) in enumerate(runs):
        rows[at] = (start, length, np.full(32, at % 256), 0, at * 100, stored, length if stored else 0, 0)
    listed = np.zeros(len(leaves), LEAF_ROW)
    listed["index"] = leaves
    listed["hash"] = 7
    return Page(rows, listed, [f"{pack:032x}" for pack in range(packs)])


def same(one: Page, other: Page) -> bool:
    return (
        np.array_equal(one.runs, other.runs)
        and np.array_equal(one.leaves, other.leaves)
        and list(one.packs) == list(other.packs)
    )


@settings(max_examples=60)
@given(stack=stacks(max_layers=2))
def test_pages_are_decoded_as_they_were_encoded(stack: list[Drawn]) -> None:
    for layer in ship(stack).layers:
        for row in layer.table:
            first, stop = int(row["first"]), int(row["stop"])
            (stored,) = layer.pages(first, stop)
            assert same(Page.decode(stored.encode(), first, min(stop, layer.size), subject="x"), stored)
            assert (stored.data_bytes(), stored.zero_bytes()) == (int(row["data"]), int(row["zero"]))


@settings(max_examples=300)
@given(body=st.binary(max_size=400), counts=st.tuples(*[st.integers(0, 4)] * 3), bounds=st.tuples(_NUMBER, _NUMBER))
def test_any_bytes_are_a_page_or_corrupt(body: bytes, counts: tuple[int, ...], bounds: tuple[int, int]) -> None:
    head = b"".join(count.to_bytes(4, "little") for count in counts) + bytes(4)
    exact = counts[0] * 16 + counts[1] * RUN_ROW.itemsize + counts[2] * LEAF_ROW.itemsize
    first, stop = sorted(min(bound, 1 << 57) for bound in bounds)
    for text in (body, head + body, head + (body * 20).ljust(exact, b"\0")[:exact]):
        _decodes_or_is_corrupt(text, first, stop)


@settings(max_examples=300)
@given(
    fields=st.lists(
        st.tuples(st.integers(0, 3), st.sampled_from(RUN_ROW.names or ()).filter(lambda name: name != "id"), _NUMBER),
        min_size=1,
        max_size=3,
    ),
    leaves=st.lists(_NUMBER, max_size=3),
)
def test_a_page_with_wrong_numbers_is_corrupt_or_still_sound(
    fields: list[tuple[int, str, int]], leaves: list[int]
) -> None:
    """Numbers near every border put into every field: no overflow, no negative, no other exception."""
    runs = page([(0, 512, 100), (LEAF, LEAF, 200), (2 * LEAF, 512, 0), (3 * LEAF, 4096, 90)], [0, 1])
    for at, name, number in fields:
        runs.runs[name][at] = number & int(np.iinfo(RUN_ROW[name]).max)
    listed = np.zeros(2 + len(leaves), LEAF_ROW)
    listed["index"] = [*leaves, 0, 1]
    _decodes_or_is_corrupt(Page(runs.runs, listed, runs.packs).encode(), 0, 4 * LEAF)


def _decodes_or_is_corrupt(text: bytes, first: int, stop: int) -> None:
    try:
        found = Page.decode(text, first, stop, subject="layers/x")
    except Corrupt as error:
        assert error.subject == "layers/x"  # noqa: PT017
        return
    if stop > LEAF << 10:
        return
    found.extents(stop)
    found.places(first, stop)
    end = 0
    for start, length, *_, stored, raw, skip in found.runs.tolist():
        assert max(first, end) <= start < start + length <= stop
        assert not stored or skip + length <= raw
        end = start + length
    index = found.leaves["index"].tolist()
    assert index == sorted(set(index))
    for leaf in index:
        assert any(
            start < (leaf + 1) * LEAF and start + length > leaf * LEAF for start, length, *_ in found.runs.tolist()
        )


@pytest.mark.parametrize(
    ("runs", "leaves"),
    [
        ([(0, 512, 1)], [2**64 - 1, 0]),
        ([(0, 512, 1)], [2**63]),
        ([(0, 512, 1)], [1]),
        ([], [0]),
        ([(0, 512, 1), (256, 512, 1)], []),
        ([(512, 512, 1), (0, 512, 1)], []),
        ([(0, 0, 1)], []),
        ([(4 * LEAF - 1, 2, 1)], []),
        ([(2**64 - 1, 2, 1)], []),
        ([(0, 2**64 - 1, 1)], []),
    ],
)
def test_pages_that_contradict_themselves(runs: list[tuple[int, int, int]], leaves: list[int]) -> None:
    with np.errstate(over="ignore"):
        rows = np.zeros(len(runs), RUN_ROW)
        rows["start"], rows["length"] = [run[0] for run in runs], [run[1] for run in runs]
        rows["stored"], rows["raw"] = 100, 4096
        listed = np.zeros(len(leaves), LEAF_ROW)
        listed["index"] = leaves
    with pytest.raises(Corrupt, match="contradicts itself"):
        Page.decode(Page(rows, listed, ["0" * 32]).encode(), 0, 4 * LEAF, subject="x")


def test_a_run_past_the_end_of_the_disk_is_refused_though_its_leaf_is_not() -> None:
    """A page of a record reaches to the end of its last leaf; its runs do not."""
    sound = page([(0, 1000, 0)], [])
    assert Page.decode(sound.encode(), 0, 1000, subject="x").zero_bytes() == 1000
    with pytest.raises(Corrupt, match=r"^x: a page of the layer record contradicts itself"):
        Page.decode(page([(0, 1001, 0)], []).encode(), 0, 1000, subject="x")
    with pytest.raises(Corrupt, match=r"^x: a page of the layer record contradicts itself"):
        Page.decode(page([(0, 10, 0), (1000, 1, 0)], []).encode(), 0, 1000, subject="x")


def test_the_builder_keeps_packs_apart_that_the_parts_numbered_alike() -> None:
    builder = PageBuilder()
    for part in range(3):
        one = page([(part * LEAF, 512, 100)], [part])
        builder.add(one.runs, [f"{part:032x}"], one.leaves)
    taken = builder.take()
    assert taken is not None
    first, stop, built = taken
    assert (first, stop) == (0, 3 * LEAF)
    assert [built.packs[place] for place in built.runs["pack"]] == [f"{part:032x}" for part in range(3)]
    assert builder.take() is None


# ---- layer records


def record(store: MemoryStore, **change: object) -> LayerHeader:
    layer = secrets.token_hex(16)
    header = LayerHeader(
        id=layer,
        size=LEAF,
        time=datetime.now(UTC),
        name="x",
        image_format="qcow2",
        cluster_size=65536,
        data_bytes=0,
        zero_bytes=0,
        content_sum=encode_sum(empty_sum()),
        content_id=content_id(LEAF, empty_sum()),
    )
    body = json.loads(header.model_dump_json()) | change
    _put(store, layer, json.dumps(body).encode(), np.empty(0, PAGE_ROW))
    return header


def _put(store: MemoryStore, layer: str, text: bytes, table: Rows, length: int | None = None) -> None:
    name = layer_name(layer)
    body = (len(text) if length is None else length).to_bytes(4, "little") + text + table.tobytes()
    store.put(name, seal(KEYS, b"L", name, body))


@pytest.mark.parametrize(
    "change",
    [
        {"id": "0" * 32},
        {"size": -1},
        {"size": 2**56 + 1},
        {"size": LEAF + 1},
        {"cluster_size": 0},
        {"content_sum": ""},
        {"content_sum": "AAAA"},
        {"content_sum": "not base64"},
        {"content_id": "0" * 64},
        {"format": 2},
        {"more": 1},
        {"data_bytes": -1},
        {"image_format": "vmdk"},
        {"time": "never"},
    ],
)
def test_records_that_contradict_themselves(change: dict[str, object]) -> None:
    store = MemoryStore()
    header = record(store, **change)
    with pytest.raises((Corrupt, Unsupported), match=f"{header.id}: the layer record"):
        records.read(store, KEYS, header.id)
    records.read(store, KEYS, record(store).id)


@settings(max_examples=100)
@given(rows=st.lists(st.tuples(_NUMBER, _NUMBER), max_size=4))
def test_page_tables_with_any_numbers(rows: list[tuple[int, int]]) -> None:
    store = MemoryStore()
    header = record(store)
    table = np.zeros(len(rows), PAGE_ROW)
    table["first"], table["stop"] = [row[0] for row in rows], [row[1] for row in rows]
    _put(store, header.id, header.model_dump_json().encode(), table)
    ends = [0, *(number for row in rows for number in row)]
    sound = ends == sorted(ends) and all(first < stop for first, stop in rows) and ends[-1] <= LEAF
    if sound:
        assert len(records.read(store, KEYS, header.id)[1]) == len(rows)
    else:
        with pytest.raises(Corrupt, match=f"{header.id}: the layer record contradicts itself"):
            records.read(store, KEYS, header.id)


@settings(max_examples=150)
@given(body=st.binary(max_size=300), length=st.integers(0, 2**32 - 1))
def test_any_body_is_corrupt(body: bytes, length: int) -> None:
    store = MemoryStore()
    layer = "ab" * 16
    name = layer_name(layer)
    for text in (body, length.to_bytes(4, "little") + body):
        store.put(name, seal(KEYS, b"L", name, text))
        with pytest.raises(Corrupt, match=f"{layer}: the layer record is"):
            records.read(store, KEYS, layer)


def test_a_missing_record_and_an_id_that_is_none() -> None:
    store = MemoryStore()
    for layer in ("ab" * 16, "", "../config", "AB" * 16, "x"):
        with pytest.raises(Corrupt, match=r"this is no layer id|missing from the store"):
            records.read(store, KEYS, layer)


def test_a_page_in_the_cache_is_checked_again_for_another_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hostile record may give a sound page of one place to another: `first`, `stop` and size belong to the key."""
    shipped = ship([drawn(4 * LEAF, [Run(LEAF, LEAF, 1)], b"")])
    layer = shipped.layers[0]
    layer.extents()
    for first, stop in ((LEAF + 512, 2 * LEAF), (LEAF, 2 * LEAF - 512)):
        row = layer.table[0].copy()
        row["first"], row["stop"] = first, stop
        with pytest.raises(Corrupt, match=r"^x: .*: a page .* contradicts itself"):
            shipped.repository._pages.get(np.array([row]), 4 * LEAF, subject="x")
    with pytest.raises(Corrupt, match=r"^x: .*: a page .* contradicts itself"):
        shipped.repository._pages.get(layer.table[:1], LEAF + 512, subject="x")


def test_a_small_cache_reads_again_and_says_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    shuffle = random.Random(1)
    runs = [Run(shuffle.randrange(40 * LEAF), 512, 3000 + n) for n in range(200)]
    shipped = ship([drawn(40 * LEAF, runs, b"")])
    monkeypatch.setattr("snapchain.repository.layers._CACHED_BYTES", 100)
    assert shipped.shows(shipped.layers) == shipped.stack[0].shown
    assert shipped.layers[0].extents() == shipped.layers[0].extents()
