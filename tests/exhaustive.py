"""What `make test` samples and `make soak` runs whole: the same tests, with one switch.

A test that enumerates inside itself is marked `sampled` and asks here how much to do:

    @pytest.mark.sampled
    def test_a_fault_at_any_call():
        for number in some(range(calls), each=5): ...

    @pytest.mark.sampled
    @settings(max_examples=examples(20))
    @given(...)

A parameter that is too much for `make test` is marked `soak` alone: pytest.param(4, marks=pytest.mark.soak).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from typing import TypeVar

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
