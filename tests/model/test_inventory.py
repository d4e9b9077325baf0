"""What to send, in a one-line language.

`a b` are two layers; `ab[a b]` is one layer: at the destination made from a and b, at the source replacing them;
`x[?]` was made from nobody knows what.
"""

import re
from collections.abc import Iterator, Sequence
from itertools import pairwise

import pytest
from hypothesis import given, strategies as st

from snapchain.errors import InvalidInput
from snapchain.model.extents import Extents, fold
from snapchain.model.inventory import Collapse, Diverged, Held, Inside, Missing, Send, Span, UpToDate, Wanted, missing
from snapchain.testing.strategies import stacks


def want(text: str) -> tuple[Wanted, ...]:
    return _layers(iter(re.findall(r"\w+|[][]", text)))


def _layers(words: Iterator[str]) -> tuple[Wanted, ...]:
    found: list[Wanted] = []
    for word in words:
        if word == "]":
            break
        found.append(Wanted(found.pop().source, _layers(words)) if word == "[" else Wanted(word))
    return tuple(found)


def have(text: str) -> tuple[Held, ...]:
    found = []
    for name, sources in re.findall(r"(\w+)(?:\[([^]]*)\])?", text):
        found.append(Held(name, () if sources == "?" else tuple(sources.split()) or (name,)))
    return tuple(found)


def inside(rest: str, base_count: int, first: int) -> Inside:
    return Inside(tuple(rest.split()), base_count, first)


def parted(base_count: int, first: int, ours: str, theirs: str) -> Diverged:
    return Diverged(base_count, first, tuple(ours.split()), tuple(theirs.split()))


@pytest.mark.parametrize(
    ("there", "here", "answer"),
    [
        # nothing to do
        ("a b c", "a b c", UpToDate(3)),
        ("ab[a b] c", "a b c", UpToDate(2)),
        ("abc[a b c]", "a b c", UpToDate(1)),
        ("ab c", "ab[a b] c", UpToDate(2)),
        ("m[a b] c", "ab[a b] c", UpToDate(2)),
        ("a bc[b c]", "ab[a b] c", UpToDate(2)),  # no merge would make them alike, and they read alike
        # layers to send
        ("", "a b c", Send(0, 0)),
        ("a", "a b c", Send(1, 1)),
        ("a b", "a b c", Send(2, 2)),
        ("ab[a b]", "a b c d", Send(1, 2)),
        ("a", "a bc[b c] d", Send(1, 1)),
        ("a bc[b c]", "ab[a b] c d", Send(2, 2)),
        # the source merged beyond what the destination has
        ("a b", "abc[a b c]", Send(2, 0, inside("c", 0, 0))),
        ("a b", "a bcd[b c d] e", Send(2, 1, inside("c d", 1, 1))),
        ("a bc[b c]", "ab[a b] cd[c d]", Send(2, 1, inside("d", 0, 0))),
        ("a bcd[b c d]", "a b cd[c d] ef[e f]", Send(2, 3)),
        ("a bcd[b c d]", "a b c de[d e]", Send(2, 3, inside("e", 1, 1))),
        ("a b c", "abcd[ab[a b] cd[c d]] e", Send(3, 0, inside("d", 0, 0))),
        # behind by a merge
        ("a b c", "ab[a b] c", Collapse((Span(0, 2, 0),), 3, 2)),
        ("a b", "ab[a b]", Collapse((Span(0, 2, 0),), 2, 1)),
        ("a b", "ab[a b] c d", Collapse((Span(0, 2, 0),), 2, 1)),
        ("a b c d e", "a bc[b c] de[d e] f", Collapse((Span(1, 3, 1), Span(3, 5, 2)), 5, 3)),
        ("a b c", "abc[ab[a b] c]", Collapse((Span(0, 3, 0),), 3, 1)),
        ("ab c", "abc[ab[a b] c]", Collapse((Span(0, 2, 0),), 2, 1)),
        ("ab[a b] c", "abc[ab[a b] c]", Collapse((Span(0, 2, 0),), 2, 1)),
        ("ab[a b] c d", "ab[a b] cd[c d]", Collapse((Span(1, 3, 1),), 3, 2)),
        ("a b c", "ab[a b] cd[c d] e", Collapse((Span(0, 2, 0),), 3, 1, inside("d", 2, 1))),
        # the ways part
        ("a b c", "a b d", parted(2, 2, "d", "c")),
        ("x", "a b", parted(0, 0, "a b", "x")),
        ("a x y", "a b c", parted(1, 1, "b c", "x y")),
        ("a bx[b x]", "a b c", parted(1, 1, "b c", "bx")),
        ("a b x", "ab[a b] c", parted(2, 1, "c", "x")),
        ("a x c", "abc[a b c]", parted(0, 0, "abc", "a x c")),
        ("a b", "ab", parted(0, 0, "ab", "a b")),  # merged by a tool that kept no record
        ("a b[?] c", "a b c", parted(1, 1, "b c", "b c")),
        # the destination is ahead
        ("a b c", "a b", parted(2, 2, "", "c")),
        ("a bcd[b c d]", "a b c", parted(1, 1, "", "bcd")),
        ("a b c d", "ab[a b] c", parted(3, 2, "", "d")),
        ("a b[?]", "a", parted(1, 1, "", "b")),
    ],
)
def test_examples(there: str, here: str, answer: Missing) -> None:
    assert missing(have(there), want(here)) == answer


def test_the_one_line_language() -> None:
    assert want("a bc[b c[d]] e") == (
        Wanted("a"),
        Wanted("bc", (Wanted("b"), Wanted("c", (Wanted("d"),)))),
        Wanted("e"),
    )
    assert have("a bc[b c] x[?]") == (Held("a", ("a",)), Held("bc", ("b", "c")), Held("x", ()))


def test_who_is_ahead_and_who_is_related() -> None:
    ahead = missing(have("a b"), want("a"))
    assert isinstance(ahead, Diverged)
    assert ahead.is_ahead
    assert ahead.is_related
    stranger = missing(have("x"), want("a"))
    assert isinstance(stranger, Diverged)
    assert not stranger.is_ahead
    assert not stranger.is_related


def test_a_source_without_layers_is_a_mistake() -> None:
    with pytest.raises(InvalidInput, match="the source has no layers"):
        missing(have("a"), ())


def test_keys_are_compared_as_told() -> None:
    def same(left: object, right: object) -> bool:
        return str(left).lower() == str(right).lower()

    assert missing(have("A B"), want("a b c"), same=same) == Send(2, 2)
    assert missing(have("A B"), want("ab[a b]"), same=same) == Collapse((Span(0, 2, 0),), 2, 1)
    assert isinstance(missing(have("A B"), want("a b c")), Diverged)


def test_years_of_nightly_merges_may_be_nested() -> None:
    layer = Wanted("0")
    for night in range(1, 5000):
        layer = Wanted(f"m{night}", (layer, Wanted(str(night))))
    held = [Held(str(night), (str(night),)) for night in range(5000)]
    assert missing(held, [layer]) == Collapse((Span(0, 5000, 0),), 5000, 1)
    rest = tuple(str(night) for night in range(3000, 5000))
    assert missing(held[:3000], [layer]) == Send(3000, 0, Inside(rest, 0, 0))


# ---------------------------------------------------------------- the answers, carried out on real maps


def cut(count: int, places: set[int]) -> list[range]:
    ends = sorted({0, count, *(place for place in places if place < count)})
    return [range(start, stop) for start, stop in pairwise(ends)]


@st.composite
def histories(draw: st.DrawFn) -> tuple[list[Extents], list[range], list[range]]:
    """Layers as they were written, and the runs of them that source and destination hold merged."""
    written = draw(stacks(min_layers=1, max_layers=7, max_size=16))
    cuts = st.sets(st.integers(1, 7))
    here = cut(len(written), draw(cuts))
    there = cut(draw(st.integers(0, len(written))), draw(cuts))
    return written, here, there


def source(here: Sequence[range]) -> list[Wanted]:
    return [Wanted(r[0]) if len(r) == 1 else Wanted((r[0], r[-1]), tuple(map(Wanted, r))) for r in here]


def destination(there: Sequence[range]) -> list[Held]:
    return [Held(f"{r[0]}-{r[-1]}", tuple(r)) for r in there]


@given(histories())
def test_what_is_sent_makes_the_destination_read_like_the_source(
    history: tuple[list[Extents], list[range], list[range]],
) -> None:
    written, here, there = history
    maps = [layer.owned_by(n) for n, layer in enumerate(written)]
    sources = [fold([maps[n] for n in r]) for r in here]
    base = [fold([maps[n] for n in r]) for r in there]
    answer = missing(destination(there), source(here))
    assert not isinstance(answer, Diverged)
    if isinstance(answer, UpToDate):
        assert fold(base) == fold(sources)
        assert answer.base_count == len(there)
        return
    assert fold([*base[: answer.base_count], *sources[answer.first :]]) == fold(sources)
    if answer.inside is not None:
        lower = answer.inside
        assert (lower.base_count == 0) is (lower.first == 0)
        if lower.first:
            assert fold(base[: lower.base_count]) == fold(sources[: lower.first])
        known = [part for r in there for part in r]
        assert [*known, *lower.rest] == [part for r in here[: answer.first + 1] for part in r]
    if isinstance(answer, Collapse):
        for span in answer.merges:
            assert span.stop - span.first > 1
            assert fold(base[span.first : span.stop]) == sources[span.wanted]
    else:
        assert answer.first < len(here)


@given(histories(), st.integers(0, 6), st.integers(1, 3))
def test_a_foreign_layer_never_goes_unseen(
    history: tuple[list[Extents], list[range], list[range]], keep: int, foreign: int
) -> None:
    written, here, there = history
    there = there[:keep]
    held = [*destination(there), *(Held(f"x{n}", (f"x{n}",)) for n in range(foreign))]
    answer = missing(held, source(here))
    assert isinstance(answer, Diverged)
    assert answer.theirs[-foreign:] == tuple(f"x{n}" for n in range(foreign))
    assert answer.base_count <= len(there)
    common = [n for r in there[: answer.base_count] for n in r]
    assert common == [n for r in here[: answer.first] for n in r]
    assert answer.is_ahead == (sum(map(len, there)) == len(written))
