"""What is taken in reads back as it was, has the content id of its bytes, and says which leaves it shows."""

from __future__ import annotations

import random
from collections.abc import Sequence

import blake3
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from snapchain.destination.reading import Sink
from snapchain.errors import Corrupt
from snapchain.model.content import content_id
from snapchain.model.extents import ABSENT, DATA, ZERO, Extents, fold
from snapchain.repository import pages, tasks as worklist
from snapchain.repository.chain import ChainView
from snapchain.repository.crypto import AES, CHACHA, NONE
from snapchain.repository.layer_writer import LayerUpload
from snapchain.repository.layers import leaves_shown, resolve
from snapchain.repository.replay import Replay
from snapchain.repository.repository import Repository
from tests.repository.synthetic import (
    LEAF,
    ORIGIN,
    Drawn,
    Run,
    again,
    content_id_of,
    drawn,
    nothing,
    repository,
    ship,
    stacks,
)

SOME = settings(max_examples=60)


def leaves_of(content: bytes) -> dict[int, bytes]:
    """Number -> hash of each leaf that is not all zero."""
    found = {}
    for number in range(-(-len(content) // LEAF)):
        leaf = content[number * LEAF : (number + 1) * LEAF].ljust(LEAF, b"\0")
        if leaf.strip(b"\0"):
            found[number] = blake3.blake3(leaf).digest()
    return found


@SOME
@given(stack=stacks(), suite=st.sampled_from([AES, CHACHA, NONE]), block=st.sampled_from([LEAF, 4 * LEAF]))
def test_every_layer_reads_back_and_has_the_content_id_of_its_bytes(stack: list[Drawn], suite: str, block: int) -> None:
    shipped = ship(stack, repository(suite=suite, block_size=block))
    for number, layer in enumerate(stack):
        chain = shipped.layers[: number + 1]
        assert chain[-1].header.content_id == content_id_of(layer.shown)
        assert shipped.shows(chain) == layer.shown


@SOME
@given(stack=stacks(), data=st.data())
def test_any_range_reads_the_same(stack: list[Drawn], data: st.DataObject) -> None:
    shipped = ship(stack)
    view = ChainView(shipped.layers, again(shipped.repository).blobs)
    shown = stack[-1].shown
    for _ in range(5):
        first = data.draw(st.integers(0, len(shown)))
        stop = data.draw(st.integers(first, len(shown)))
        buffer = memoryview(bytearray(b"\xaa" * (stop - first)))
        view.read_into(first, buffer)
        assert bytes(buffer) == shown[first:stop]


@SOME
@given(stack=stacks(), data=st.data())
def test_leaves_shown_are_those_of_the_bytes(stack: list[Drawn], data: st.DataObject) -> None:
    shipped = ship(stack)
    for number, layer in enumerate(stack):
        chain = shipped.layers[: number + 1]
        want = leaves_of(layer.shown)
        index, hashes = leaves_shown(chain, 0, layer.size)
        assert dict(zip(index.tolist(), map(bytes, hashes), strict=True)) == want
        first = data.draw(st.integers(0, layer.size // LEAF))
        stop = data.draw(st.integers(first * LEAF, layer.size))
        index, hashes = leaves_shown(chain, first * LEAF, stop)
        found = dict(zip(index.tolist(), map(bytes, hashes), strict=True))
        assert found == {leaf: want[leaf] for leaf in want if first <= leaf < -(-stop // LEAF)}


@SOME
@given(stack=stacks())
def test_the_stored_map_says_what_the_layer_said(stack: list[Drawn]) -> None:
    """But for leaves of DATA that are all zero, which become ZERO, and the last leaf of a layer that is cut short."""
    shipped = ship(stack)
    for number, layer in enumerate(stack):
        stored = shipped.layers[number].extents()
        shortened = number > 0 and layer.size < stack[number - 1].size
        cut = layer.size // LEAF * LEAF if shortened else layer.size
        mine, theirs = layer.extents.window(0, cut), stored.window(0, cut)
        assert [run[:2] for run in _held(mine)] == [run[:2] for run in _held(theirs)]
        for start, length, val in theirs.runs():
            assert val != ZERO or not layer.shown[start : start + length].strip(b"\0")
        header = shipped.layers[number].header
        assert (header.data_bytes, header.zero_bytes) == (stored.data_bytes, stored.zero_bytes)


def _held(extents: Extents) -> list[tuple[int, int, int]]:
    """Runs that are not ABSENT, DATA and ZERO alike."""
    return [run for run in extents.mapped(np.where(extents.val == ABSENT, ABSENT, DATA)).runs() if run[2] == DATA]


@SOME
@given(stack=stacks(max_layers=5), data=st.data())
def test_the_content_id_does_not_know_how_the_bytes_are_layered(stack: list[Drawn], data: st.DataObject) -> None:
    """The same disk as one raw layer, as composed neighbours, and layer by layer."""
    shown = stack[-1].shown
    flat = ship([_whole(shown)])
    assert flat.layers[-1].header.content_id == content_id_of(shown)
    cuts = sorted(data.draw(st.sets(st.integers(1, len(stack)), max_size=3)) | {len(stack)})
    composed = [
        Drawn(fold(layer.extents for layer in stack[first:stop]), stack[stop - 1].shown)
        for first, stop in zip([0, *cuts], cuts, strict=False)
    ]
    shipped = ship(composed)
    assert shipped.layers[-1].header.content_id == flat.layers[-1].header.content_id
    assert shipped.shows(shipped.layers) == shown


def _whole(shown: bytes) -> Drawn:
    return Drawn(Extents.constant(len(shown), DATA), shown)


def test_content_ids_differ_where_bytes_or_sizes_differ() -> None:
    contents = [b"", bytes(1), bytes(2), bytes(LEAF), b"\1", b"\1\0", b"\0\1", bytes(LEAF) + b"\1", b"\1" + bytes(LEAF)]
    ids = {ship([_whole(content)]).layers[0].header.content_id for content in contents}
    assert len(ids) == len(contents)


@SOME
@given(stack=stacks())
def test_a_replay_writes_every_byte_that_is_not_zero(stack: list[Drawn]) -> None:
    shipped = ship(stack)
    view = ChainView(shipped.layers, again(shipped.repository).blobs)
    out = bytearray(view.size)

    def put(pieces: Sequence[tuple[int, memoryview]]) -> None:
        for offset, data in pieces:
            out[offset : offset + len(data)] = data

    Replay(view, view.extents.owned_by(0), Sink(put)).run(nothing)
    assert bytes(out) == stack[-1].shown


@SOME
@given(stack=stacks())
def test_a_replay_on_a_used_device_also_zeroes(stack: list[Drawn]) -> None:
    """What a device held before must not shine through: DATA leaves that are all zero are named to the sink."""
    shipped = ship(stack)
    view = ChainView(shipped.layers, again(shipped.repository).blobs)
    out = bytearray(b"\xee" * view.size)

    def put(pieces: Sequence[tuple[int, memoryview]]) -> None:
        for offset, data in pieces:
            out[offset : offset + len(data)] = data

    def zero(offset: int, length: int) -> None:
        out[offset : offset + length] = bytes(length)

    extents = view.extents.owned_by(0)
    for start, length, val in extents.runs():
        if val < DATA:
            zero(start, length)
    Replay(view, extents, Sink(put, zero)).run(nothing)
    assert bytes(out) == stack[-1].shown


def test_equal_data_is_stored_once_wherever_it_lies() -> None:
    """Between layers, between disks, and within one; at block boundaries."""
    noise = random.Random(1).randbytes(4 * LEAF)
    repo = repository(block_size=LEAF)
    ship([_whole(noise)], repo)
    before = _pack_bytes(repo)
    ship([_whole(noise + noise)], repo)
    assert _pack_bytes(repo) - before < LEAF // 8, "only records, no data"


def test_an_overlay_that_repeats_what_is_below_stores_no_data() -> None:
    noise = random.Random(2).randbytes(4 * LEAF)
    root = _whole(noise)
    shipped = ship([root])
    before = _pack_bytes(shipped.repository)
    repeated = drawn(4 * LEAF, [Run(LEAF, LEAF, 1)], noise)
    same = Drawn(repeated.extents, noise)
    again_shipped = ship([root, same], shipped.repository)
    assert _pack_bytes(shipped.repository) - before < LEAF // 8
    assert again_shipped.layers[1].header.content_id == shipped.layers[0].header.content_id


def _pack_bytes(repo: Repository) -> int:
    return sum(info.size for info in repo.store.list("packs/"))


def test_a_leaf_that_turned_to_zero_leaves_the_sum() -> None:
    noise = random.Random(3).randbytes(3 * LEAF)
    for run in (Run(LEAF, LEAF, None), Run(LEAF, LEAF, 0)):
        top = drawn(3 * LEAF, [run], noise)
        shipped = ship([_whole(noise), top])
        assert shipped.layers[1].header.content_id == content_id_of(top.shown)
        assert shipped.layers[1].extents().zero_bytes == LEAF


def test_nothing_is_read_for_zeroes_that_cover_whole_leaves() -> None:
    class Unreadable(Drawn):
        def read_into(self, offset: int, buffer: memoryview) -> None:
            raise AssertionError(offset, len(buffer))

    size = 1 << 44  # 16 TiB
    layer = Unreadable(Extents.from_starts(size, [0, LEAF, size - LEAF], [-2, ZERO, -2]), b"")
    shipped = ship([layer])
    assert shipped.layers[0].header.zero_bytes == size - 2 * LEAF
    assert len(shipped.layers[0].table) == 1
    assert shipped.layers[0].header.content_id == content_id(size, np.zeros(1024, np.uint16))


def test_a_source_that_changed_is_not_recorded() -> None:
    def changed() -> None:
        raise Corrupt("changed meanwhile")

    repo = repository()
    with pytest.raises(Corrupt, match="changed meanwhile"), LayerUpload(repo) as deposit:
        deposit.add(_whole(b"x" * LEAF), [], ORIGIN, on_bytes=nothing, confirm=changed)
    assert list(repo.store.list("layers/")) == []


def test_on_bytes_is_told_all_that_is_read() -> None:
    told: list[int] = []
    content = random.Random(4).randbytes(20 * 1024 * 1024 + 77)
    with LayerUpload(repository()) as deposit:
        deposit.add(_whole(content), [], ORIGIN, on_bytes=told.append, confirm=nothing)
        assert sum(told) == deposit.bytes_read == len(content)


def test_a_disk_of_no_bytes() -> None:
    shipped = ship([_whole(b""), drawn(LEAF, [Run(0, 10, 3)], b""), _whole(b"")])
    assert [len(shipped.shows(shipped.layers[: n + 1])) for n in range(3)] == [0, LEAF, 0]
    assert resolve(shipped.layers) == Extents.absent(0)


def test_many_tasks_and_pages_keep_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """More tasks than fit in flight, more leaves than fit into a page, results out of order."""
    monkeypatch.setattr(worklist, "WINDOW", 4 * LEAF)
    monkeypatch.setattr(pages, "PAGE_LEAVES", 7)
    monkeypatch.setattr(pages, "PAGE_RUNS", 5)
    shuffle = random.Random(5)
    size = 300 * LEAF
    runs = [
        Run(shuffle.randrange(size), shuffle.randrange(1, 3 * LEAF), shuffle.choice([None, 1, 2000 + n]))
        for n in range(200)
    ]
    root = drawn(size, runs, b"")
    top = drawn(size - 5, [Run(shuffle.randrange(size), 4096, 3000 + n) for n in range(100)], root.shown)
    shipped = ship([root, top])
    assert len(shipped.layers[0].table) > 20
    for number, layer in enumerate(shipped.stack):
        assert shipped.shows(shipped.layers[: number + 1]) == layer.shown
        assert shipped.layers[number].header.content_id == content_id_of(layer.shown)


def test_a_layer_cut_inside_a_leaf_knows_what_a_page_past_the_cut_said_of_that_leaf() -> None:
    """The middle layer zeroes the second half of a leaf; the top ends in its first half."""
    root = drawn(2 * LEAF, [Run(LEAF // 2, 100, 1)], b"")
    middle = drawn(2 * LEAF, [Run(LEAF // 2, LEAF // 2, None)], root.shown)
    top = drawn(100, [], middle.shown)
    shipped = ship([root, middle, top])
    assert [layer.header.content_id for layer in shipped.layers] == [
        content_id_of(layer.shown) for layer in (root, middle, top)
    ]
