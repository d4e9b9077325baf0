"""Byte-wise reference models: slow, obvious, and written without the code that they judge."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from snapchain.model.extents import ABSENT, ZERO, Extents


def assert_canonical(extents: Extents) -> None:
    """AssertionError unless the map has the one form that equal maps share; see `Extents`."""
    at, val = extents.at, extents.val
    assert at.dtype == val.dtype == np.int64, (at.dtype, val.dtype)
    assert len(at) == len(val), extents
    assert (len(at) == 0) == (extents.size == 0), extents
    if len(at):
        assert at[0] == 0, extents
        assert at[-1] < extents.size, extents
        assert (np.diff(at) > 0).all(), extents
        assert (np.diff(val) != 0).all(), extents


def bytewise(extents: Extents) -> list[int]:
    """The value of every guest byte; for maps of a few hundred bytes."""
    values: list[int] = []
    for _, length, value in extents.runs():
        values.extend([value] * length)
    return values


def walk(layers: Sequence[Extents]) -> list[int]:
    """What QEMU answers for each byte of a stack, root first: the owner's place, ZERO, or ABSENT when none knows.

    A layer that does not reach the byte answers with zeroes, whatever is below it (block/io.c: reads of a
    backing file past its end).
    """
    maps = [bytewise(layer) for layer in layers]
    answers = []
    for offset in range(len(maps[-1])):
        answer = ABSENT
        for place in range(len(maps) - 1, -1, -1):
            if offset >= len(maps[place]):
                answer = ZERO
                break
            if maps[place][offset] != ABSENT:
                answer = ZERO if maps[place][offset] == ZERO else place
                break
        answers.append(answer)
    return answers


def reads(layers: Sequence[Extents]) -> list[int]:
    """As `walk`, for a guest, who cannot tell a zero that is stored from one that nobody stored."""
    return [max(answer, ZERO) for answer in walk(layers)]
