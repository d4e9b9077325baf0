"""Collapsing keeps every kept view, keeps only what kept points need, and never stores a shared layer twice."""

from collections.abc import Collection, Mapping, Sequence

import numpy as np
import pytest
from hypothesis import given, strategies as st

from snapchain.errors import InvalidInput
from snapchain.model.collapse import Group, collapse, collapse_tree
from snapchain.model.extents import ABSENT, DATA, ZERO, Extents, fold
from snapchain.testing.reference import bytewise, reads, walk
from snapchain.testing.strategies import extents, stacks

Trees = tuple[dict[str, str | None], set[str]]
MAPS = extents(max_size=24)


def merge_group(layers: Sequence[Extents], *, root: bool) -> Extents:
    """The map of a group's merged layer: only at the root may a ZERO be dropped."""
    merged = fold(layers)
    if not root:
        return merged
    return merged.mapped(np.where(merged.val == ZERO, np.int64(ABSENT), merged.val))


@st.composite
def trees(draw: st.DrawFn, *, roots: bool = False) -> Trees:
    """Parents of up to 10 layers, in any order, and a few kept ones."""
    count = draw(st.integers(1, 10))
    parents: dict[str, str | None] = {"l0": None}
    for n in range(1, count):
        below = draw(st.integers(-1 if roots else 0, n - 1))
        parents[f"l{n}"] = None if below < 0 else f"l{below}"
    shuffled = draw(st.permutations(list(parents)))
    keep = draw(st.sets(st.sampled_from(sorted(parents)), min_size=1, max_size=4))
    return {layer: parents[layer] for layer in shuffled}, keep


def path_to(top: str, parents: Mapping[str, str | None]) -> list[str]:
    path: list[str] = []
    layer: str | None = top
    while layer is not None:
        path.insert(0, layer)
        layer = parents[layer]
    return path


def spelled(groups: Collection[Group]) -> str:
    return " ".join(f"[{' '.join(group.members)}]" for group in groups)


@pytest.mark.parametrize(
    ("keep", "want"),
    [
        ("f", "[a b c d e f]"),
        ("a b c d e f", "[a] [b] [c] [d] [e] [f]"),
        ("c f", "[a b c] [d e f]"),
        ("a f", "[a] [b c d e f]"),
        ("c e", "[a b c] [d e]"),
        ("a", "[a]"),
    ],
)
def test_chains(keep: str, want: str) -> None:
    assert spelled(collapse(list("abcdef"), keep.split())) == want


@pytest.mark.parametrize(
    ("tree", "keep", "want"),
    [
        ("a< b<a c<b d<c x<b y<x", "d y", "[a b] [c d] [x y]"),
        ("a< b<a c<b d<c x<b y<x", "d", "[a b c d]"),
        ("a< b<a c<b d<c x<b y<x", "b y", "[a b] [x y]"),
        ("a< b<a c<b d<c x<b y<x", "a c x", "[a] [b] [c] [x]"),
        ("d<c c<b b<a a< y<x x<b", "d y", "[a b] [c d] [x y]"),
        ("a< b<a p< q<p", "b q", "[a b] [p q]"),
    ],
    ids=["junction-stays", "dead-branch", "junction-kept", "junction-between", "any-order", "two-roots"],
)
def test_trees(tree: str, keep: str, want: str) -> None:
    parents = {layer: below or None for layer, below in (word.split("<") for word in tree.split())}
    assert spelled(collapse_tree(parents, keep.split())) == want


@given(trees(roots=True))
def test_groups_are_the_needed_layers_once_each_and_hang_together(tree: Trees) -> None:
    parents, keep = tree
    groups = collapse_tree(parents, keep)
    members = [layer for group in groups for layer in group.members]
    assert sorted(members) == sorted({layer for top in keep for layer in path_to(top, parents)})
    seen: set[str] = set()
    for group in groups:
        assert group.parent is None or group.parent in seen
        for below, layer in zip([group.parent, *group.members], group.members, strict=False):
            assert parents[layer] == below
        seen.add(group.top)
    assert keep <= seen


@given(trees(roots=True))
def test_every_layer_that_stays_is_kept_or_a_junction(tree: Trees) -> None:
    parents, keep = tree
    groups = collapse_tree(parents, keep)
    for group in groups:
        branches = sum(other.parent == group.top for other in groups)
        assert group.top in keep or branches > 1


@given(trees(), st.data())
def test_every_kept_point_reads_the_same(tree: Trees, data: st.DataObject) -> None:
    parents, keep = tree
    numbers = {layer: n for n, layer in enumerate(parents)}
    maps = {layer: data.draw(MAPS).owned_by(n) for layer, n in numbers.items()}
    groups = collapse_tree(parents, keep)
    merged = {g.top: merge_group([maps[m] for m in g.members], root=g.is_root) for g in groups}
    stands_on = {g.top: g.parent for g in groups}
    for top in keep:
        before = fold([maps[layer] for layer in path_to(top, parents)])
        after = fold([merged[layer] for layer in path_to(top, stands_on)])
        assert [max(v, ZERO) for v in bytewise(after)] == [max(v, ZERO) for v in bytewise(before)]


@given(stacks(min_layers=2), st.data())
def test_a_merge_in_the_middle_keeps_its_zeroes(stack: list[Extents], data: st.DataObject) -> None:
    first = data.draw(st.integers(1, len(stack) - 1))
    merged = merge_group(stack[first:], root=False)
    assert reads([*stack[:first], merged]) == [ZERO if v == ZERO else min(v, first) for v in reads(stack)]


@given(stacks())
def test_a_merged_root_has_no_zeroes_and_reads_the_same(stack: list[Extents]) -> None:
    merged = merge_group([layer.owned_by(n) for n, layer in enumerate(stack)], root=True)
    assert merged.zero_bytes == 0
    assert [max(v, ZERO) for v in bytewise(merged)] == [max(v, ZERO) for v in walk(stack)]


@given(trees(roots=True))
def test_collapsing_twice_changes_nothing(tree: Trees) -> None:
    parents, keep = tree
    once = {group.top: group.parent for group in collapse_tree(parents, keep)}
    twice = collapse_tree(once, keep)
    assert not any(group.is_merge for group in twice)
    assert {group.top: group.parent for group in twice} == once


def test_the_root_law_by_hand() -> None:
    zeroed = Extents.from_runs(4, [(0, 2, ZERO), (2, 1, DATA)])
    assert merge_group([zeroed], root=True) == Extents.from_runs(4, [(2, 1, DATA)])
    assert merge_group([zeroed], root=False) == zeroed
    assert merge_group([zeroed], root=True).val.dtype == np.int64
    assert merge_group([Extents.absent(2), Extents.absent(4)], root=False) == Extents.from_runs(4, [(2, 2, ZERO)])
    assert merge_group([Extents.absent(2), Extents.absent(4)], root=True) == Extents.constant(4, ABSENT)


@pytest.mark.parametrize(
    ("chain", "keep", "message"),
    [
        ("a b a", "a", "twice"),
        ("a b", "c", "does not exist"),
        ("a b", "", "nothing would remain"),
    ],
)
def test_refused_chains(chain: str, keep: str, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        collapse(chain.split(), keep.split())


@pytest.mark.parametrize(
    ("parents", "message"), [({"a": "b", "b": "a"}, "loop"), ({"a": "gone"}, "another one depends on it")]
)
def test_refused_trees(parents: dict[str, str | None], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        collapse_tree(parents, {"a"})


def test_a_chain_of_ten_thousand_layers() -> None:
    ids = [str(n) for n in range(10_000)]
    groups = collapse(ids, ids[999::1000])
    assert [len(group.members) for group in groups] == [1000] * 10
