"""A merge inside a repository: every kept point shows what it showed, and no guest data moves."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence

import pytest
from hypothesis import given, settings, strategies as st

from snapchain.model.collapse import collapse_tree
from snapchain.model.extents import ABSENT, DATA, ZERO
from snapchain.repository import merging, pages, tasks as worklist
from snapchain.repository.chain import ChainView
from snapchain.repository.format import pack_name
from snapchain.repository.layer_writer import LayerUpload
from snapchain.repository.layers import StoredLayer
from snapchain.repository.merging import merge_layers
from snapchain.repository.packer import Packer
from snapchain.repository.replay import Replay
from snapchain.repository.repository import Repository
from tests.repository.counting import CountingStore
from tests.repository.synthetic import LEAF, ORIGIN, Drawn, Run, again, content_id_of, drawn, nothing, ship, stacks

SOME = settings(max_examples=40)


@pytest.fixture(scope="module", params=["usual", "tiny"], autouse=True)
def _pages(request: pytest.FixtureRequest) -> Iterator[None]:
    """Everything again with tasks of one leaf, pages of one run, and windows of one page."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "tiny":
            patch.setattr(worklist, "WINDOW", LEAF)
            patch.setattr(pages, "PAGE_LEAVES", 1)
            patch.setattr(pages, "PAGE_RUNS", 1)
            patch.setattr(merging, "PAGE_LEAVES", 1)
            patch.setattr(merging, "PAGE_RUNS", 2)
            patch.setattr(merging, "_WINDOW", 1)
        yield


def merged(repository: Repository, layers: Sequence[StoredLayer], kept: Iterable[int]) -> dict[int, list[StoredLayer]]:
    """The chain of each kept layer after a merge."""
    ids = [layer.id for layer in layers]
    groups = collapse_tree(dict(zip(ids, [None, *ids], strict=False)), {ids[at] for at in kept})
    chain: list[StoredLayer] = []
    found: dict[int, list[StoredLayer]] = {}
    with Packer(repository.store, repository.keys, repository.index()) as packer:
        for group in groups:
            members = [repository.layer(layer) for layer in group.members]
            made = members[0]
            if group.is_merge:
                made = merge_layers(repository, members, packer, root=group.is_root)
            chain.append(made)
            found[ids.index(group.top)] = chain[:]
    return found


def data_packs(layers: Iterable[StoredLayer]) -> set[str]:
    """Object names of the packs that hold guest data of these layers."""
    return {pack_name(pack) for layer in layers for page in layer.pages(0, layer.size) for pack in page.packs}


def data_ranges(layer: StoredLayer) -> list[tuple[int, int]]:
    return [(start, length) for start, length, val in layer.extents().runs() if val == DATA]


@SOME
@given(stack=stacks(max_layers=6), data=st.data())
def test_every_kept_point_shows_the_same_bytes_and_no_data_moves(stack: list[Drawn], data: st.DataObject) -> None:
    shipped = ship(stack)
    kept = data.draw(st.sets(st.integers(0, len(stack) - 1), min_size=1))
    store = CountingStore(shipped.repository.store)
    watched = again(shipped.repository, store)
    after = merged(watched, shipped.layers, kept)
    guest_data = data_packs(shipped.layers)
    assert not guest_data.intersection(each.name for each in store.of("get"))
    assert data_packs(layer for chain in after.values() for layer in chain) <= guest_data
    for place in kept:
        assert shipped.shows(after[place]) == stack[place].shown
        assert after[place][-1].header.content_id == content_id_of(stack[place].shown)
        fresh = again(shipped.repository)
        chain = [fresh.layer(layer.id) for layer in after[place]]
        for page in (page for layer in chain for page in layer.pages(0, layer.size)):
            rows = page.runs
            zero = rows[rows["stored"] == 0]
            used = set(rows["pack"][rows["stored"] != 0].tolist())
            assert used == set(range(len(page.packs))), "no pack is named for nothing"
            assert not any(zero[name].any() for name in ("id", "pack", "offset", "raw", "skip")), "docs/format.md"
        view = ChainView(chain, fresh.blobs)
        Replay(view, view.extents.owned_by(0)).run(nothing)


@SOME
@given(stack=stacks(max_layers=6), data=st.data())
def test_merging_in_steps_is_merging_at_once(stack: list[Drawn], data: st.DataObject) -> None:
    """Associativity, on stored layers: any neighbours may be merged first."""
    shipped = ship(stack)
    top = len(stack) - 1
    first = merged(shipped.repository, shipped.layers, data.draw(st.sets(st.integers(0, top))) | {top})[top]
    twice = merged(shipped.repository, first, [len(first) - 1])[len(first) - 1]
    once = merged(shipped.repository, shipped.layers, [top])[top]
    assert len(once) == len(twice) == 1
    assert shipped.shows(twice) == shipped.shows(once) == stack[-1].shown
    assert data_ranges(once[0]) == data_ranges(twice[0])  # at the root ZERO and ABSENT are one


@SOME
@given(stack=stacks(max_layers=4))
def test_only_at_the_root_does_a_zero_become_absent(stack: list[Drawn]) -> None:
    """Elsewhere that would bring old data back: the layers above the root are merged without it."""
    below = drawn(3 * LEAF, [Run(0, 3 * LEAF, 1)], b"")
    upper, shown = [], below.shown
    for layer in stack:
        said = (run for run in layer.extents.runs() if run[2] > ABSENT)
        runs = [Run(start, length, None if val == ZERO else 9) for start, length, val in said]
        upper.append(drawn(layer.size, runs, shown))
        shown = upper[-1].shown
    shipped = ship([below, *upper])
    chain = merged(shipped.repository, shipped.layers, {0, len(upper)})[len(upper)]
    assert len(chain) == 2
    assert shipped.shows(chain) == shown


def test_pages_that_no_other_layer_touches_are_taken_unread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two layers that meet in one place of a large disk: the merge reads the pages of that place."""
    monkeypatch.setattr(worklist, "WINDOW", 2 * LEAF)
    monkeypatch.setattr(pages, "PAGE_LEAVES", 2)
    size = 400 * LEAF
    root = drawn(size, [Run(0, size, 1), *(Run(at * LEAF, LEAF, 2000 + at) for at in range(400))], b"")
    top = drawn(size, [Run(200 * LEAF, LEAF, 5000)], root.shown)
    shipped = ship([root, top])
    store = CountingStore(shipped.repository.store)
    after = merged(again(shipped.repository, store), shipped.layers, {1})[1]
    assert len(shipped.layers[0].table) >= 100
    assert store.bytes_of("get", "packs/") < 20_000
    assert shipped.shows(after) == top.shown


def test_merged_records_remember_their_sources() -> None:
    """So that a later shipment of the same files knows them again."""
    stack = [drawn(LEAF, [Run(0, LEAF, 1)], b"")]
    stack += [drawn(LEAF, [Run(0, 512 * n, n + 1)], stack[-1].shown) for n in range(1, 4)]
    shipped = ship(stack)
    (made,) = merged(shipped.repository, shipped.layers, {3})[3]
    assert [source.inode for source in made.header.sources] == [1, 2, 3, 4]
    assert made.header.replaces == tuple(layer.id for layer in shipped.layers)
    assert (made.header.data_bytes, made.header.zero_bytes) == (made.extents().data_bytes, made.extents().zero_bytes)


def test_many_tiny_runs_are_cut_into_pages_that_can_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """512-byte grains alternating between two layers: far more runs than a page takes."""
    shuffle = random.Random(1)
    size = 6 * 1024 * 1024
    root = drawn(size, [Run(0, size, 77)], b"")
    grains = shuffle.sample(range(size // 512), 5000)
    top = drawn(size, [Run(at * 512, 512, 1 + at % 200) for at in grains], root.shown)
    shipped = ship([root, top])
    monkeypatch.setattr(merging, "PAGE_RUNS", 256)
    after = merged(shipped.repository, shipped.layers, {1})[1]
    assert shipped.shows(after) == top.shown
    assert after[0].header.content_id == content_id_of(top.shown)


def test_a_wide_gap_costs_by_what_is_there_and_not_by_its_width() -> None:
    """A layer shrunk to one leaf and grown to 8 TiB: the size law's zeroes are one run, not one a window."""
    size = 8 << 40
    root = drawn(4 * LEAF, [Run(0, 4 * LEAF, 1)], b"")
    shrunk = drawn(LEAF, [], root.shown)
    shipped = ship([root, shrunk])

    class Grown(Drawn):
        def read_into(self, offset: int, buffer: memoryview) -> None:
            buffer[:] = self.shown[offset : offset + len(buffer)].ljust(len(buffer), b"\0")

    grown = drawn(LEAF, [Run(100, 100, 3)], shrunk.shown)
    huge = Grown(grown.extents.resized(size, ABSENT), grown.shown)
    with LayerUpload(shipped.repository) as deposit:
        top = deposit.add(huge, shipped.layers[:], ORIGIN, on_bytes=nothing, confirm=nothing)
    after = merged(shipped.repository, [*shipped.layers, top], {0, 2})[2]
    assert len(after) == 2
    assert len(after[1].table) < 2000
    assert after[1].size == size
    assert after[1].extents().zero_bytes > size // 2
    assert after[1].header.content_id == top.header.content_id


@pytest.mark.parametrize("sizes", [(LEAF + 100, 3 * LEAF), (LEAF + 100, LEAF + 300), (100, 3 * LEAF), (LEAF, 3 * LEAF)])
@pytest.mark.parametrize("below", [LEAF // 2, LEAF + 100, LEAF + 50, 3 * LEAF])
@pytest.mark.parametrize("between", [None, LEAF // 2, LEAF + 60])
def test_a_group_that_grows_from_inside_a_leaf_that_only_the_chain_below_knows(
    sizes: tuple[int, int], below: int, between: int | None
) -> None:
    """The merged layer may neither claim that leaf as zero nor let what a shorter layer hid come back."""
    stack = [drawn(below, [Run(0, below, 7)], b"")]
    for size in (*(() if between is None else (between,)), *sizes):
        stack.append(drawn(size, [], stack[-1].shown))
    shipped = ship(stack)
    for kept in ({0, len(stack) - 1}, {0, 1, len(stack) - 1}):
        chain = merged(shipped.repository, shipped.layers, kept)[len(stack) - 1]
        assert shipped.shows(chain) == stack[-1].shown
        view = ChainView(
            [again(shipped.repository).layer(layer.id) for layer in chain], again(shipped.repository).blobs
        )
        Replay(view, view.extents.owned_by(0)).run(nothing)
        for top in range(1, len(chain) + 1):
            Replay(ChainView(chain[:top], shipped.repository.blobs), chain[top - 1].extents()).on(chain[: top - 1]).run(
                nothing
            )
