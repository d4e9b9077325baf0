"""What `make test` samples and `make soak` runs whole: the same tests, with one switch.

A test that enumerates inside itself is marked `sampled` and asks here how much to do:

    @pytest.mark.sampled
    def test_a_fault_at_any_call():
        for number in some(range(calls), each=5): ...

    @pytest.mark.sampled
    @settings(max_examples=examples(20))
    @given(...)

Of parameters that are too many, `cases` marks all but the representative ones `soak`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

import pytest

EXHAUSTIVE = bool(os.environ.get("EXHAUSTIVE"))
"""Set by `make soak`."""

T = TypeVar("T")


def chosen(number: int, *, each: int) -> bool:
    """Whether the case of this number, from 0 on, is run: one in `each`, or every one."""
    return EXHAUSTIVE or number % each == 0


def some(items: Iterable[T], *, each: int) -> Iterator[T]:
    """The first of every `each` items, or all of them."""
    return (item for number, item in enumerate(items) if chosen(number, each=each))


def examples(count: int, *, times: int = 10) -> int:
    """How many examples hypothesis tries: `count`, or `times` as many."""
    return count * times if EXHAUSTIVE else count


def cases(values: Sequence[Any], *, each: int) -> list[Any]:
    """Parameters of which `make test` runs one in `each`, and `make soak` the others.

    values: arguments of a test with one parameter, or tuples of them
    """
    return [
        value
        if number % each == 0
        else pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=pytest.mark.soak)
        for number, value in enumerate(values)
    ]
