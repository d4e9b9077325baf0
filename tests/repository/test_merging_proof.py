"""No merge inside a repository is believed: a composed window that says anything else than its layers is refused."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest

from snapchain.errors import Corrupt
from snapchain.repository import merging
from snapchain.repository.format import RUN_ROW, layer_name
from snapchain.repository.merging import Part, Piece, compose, merge_layers
from snapchain.repository.packer import Packer
from tests.repository.synthetic import LEAF, Run, drawn, ship


def without_zeroes(piece: Piece) -> Piece:
    """Lets old data of the layers below show through."""
    return replace(piece, runs=piece.runs[piece.runs["stored"] != 0])


def with_another_zero(piece: Piece) -> Piece:
    """Hides what the group leaves to the layers below."""
    zero = np.zeros(1, RUN_ROW)
    zero["start"], zero["length"] = LEAF, LEAF
    return replace(piece, runs=np.concatenate([piece.runs[:1], zero, piece.runs[1:]]))


def without_a_leaf(piece: Piece) -> Piece:
    return replace(piece, leaves=piece.leaves[1:])


def with_another_leaf(piece: Piece) -> Piece:
    leaves = piece.leaves.copy()
    leaves["index"][0] += 1
    return replace(piece, leaves=leaves)


def with_another_hash(piece: Piece) -> Piece:
    leaves = piece.leaves.copy()
    leaves["hash"][0, 0] ^= 1
    return replace(piece, leaves=leaves)


WRONG = [without_zeroes, with_another_zero, without_a_leaf, with_another_leaf, with_another_hash]


@pytest.mark.parametrize("wrong", WRONG, ids=lambda function: function.__name__)
def test_a_merge_is_proved_before_it_is_believed(
    wrong: Callable[[Piece], Piece], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Leaf by leaf, and also in what a group above the root leaves to the layers below it (its second leaf)."""
    stack = [drawn(4 * LEAF, [Run(0, 4 * LEAF, 1)], b"")]
    stack.append(drawn(4 * LEAF, [Run(0, LEAF, 2), Run(3 * LEAF, 512, 3)], stack[-1].shown))
    stack.append(drawn(4 * LEAF, [Run(2 * LEAF, LEAF, None), Run(3 * LEAF, 4096, 4)], stack[-1].shown))
    shipped = ship(stack)
    repository = shipped.repository
    before = [info.name for info in repository.store.list("layers/")]
    pieces: list[Piece] = []

    def composed(layers: Sequence[Part], first: int, stop: int, *, root: bool) -> Piece:
        pieces.append(wrong(compose(layers, first, stop, root=root)))
        return pieces[-1]

    monkeypatch.setattr(merging, "compose", composed)
    said = f"would not show what the layers show between 0 and {4 * LEAF}; nothing was changed"
    with (
        Packer(repository.store, repository.keys, repository.index()) as packer,
        pytest.raises(Corrupt, match=said) as caught,
    ):
        merge_layers(repository, shipped.layers[1:], packer, root=False)
    assert len(pieces) == 1
    assert caught.value.subject == layer_name(shipped.layers[-1].id)
    assert [info.name for info in repository.store.list("layers/")] == before
