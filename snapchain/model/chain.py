"""A chain: layers from the root up, each naming the one below; what they read as together, and who hides whom.

    shadowed   what a layer holds and no reader of the top sees: a layer above holds something else there, or a
               shorter layer above hides everything past its end
    visible    what is left of it

`held = visible + shadowed` for every layer, DATA and ZERO counted apart.  All numbers are guest bytes, not bytes
of a file: a compressed cluster counts what it reads as.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from snapchain.errors import InvalidInput
from snapchain.model.extents import ABSENT, DATA, ZERO, Extents, Int64s, fold


@dataclass(frozen=True, slots=True, eq=False)
class ByteCounts:
    """Guest bytes of each layer, root first: int64[layers] each."""

    data: Int64s
    zero: Int64s

    def __sub__(self, other: ByteCounts) -> ByteCounts:
        return ByteCounts(self.data - other.data, self.zero - other.zero)


@dataclass(frozen=True, slots=True)
class LayerUse:
    """What one layer of a chain holds, in guest bytes; the `inspect` fields of the same names.

    shadowed_bytes counts hidden DATA, shadowed_zero_bytes hidden ZERO.
    """

    id: str
    virtual_size: int
    data_bytes: int
    zero_bytes: int
    shadowed_bytes: int
    shadowed_zero_bytes: int


@dataclass(frozen=True, slots=True)
class Chain:
    """Layers root first. Raises InvalidInput unless the first is a root and each other names its left neighbour."""

    layers: tuple[Layer, ...] = field()

    def __init__(self, layers: Sequence[Layer]) -> None:
        object.__setattr__(self, "layers", tuple(layers))
        if not self.layers:
            raise InvalidInput("a chain has at least one layer")
        below: str | None = None
        for layer in self.layers:
            if layer.parent != below:
                raise InvalidInput(f"its parent is {layer.parent}, but below it lies {below}", subject=layer.id)
            below = layer.id
        if len(set(self.ids)) != len(self.layers):
            raise InvalidInput("a layer stands in the chain twice", subject=self.top.id)

    def __len__(self) -> int:
        return len(self.layers)

    @property
    def ids(self) -> tuple[str, ...]:
        """Layer ids, root first."""
        return tuple(layer.id for layer in self.layers)

    @property
    def root(self) -> Layer:
        """The lowest layer."""
        return self.layers[0]

    @property
    def top(self) -> Layer:
        """The uppermost layer."""
        return self.layers[-1]

    @property
    def size(self) -> int:
        """Virtual size of the top, in bytes."""
        return self.top.size

    def resolve(self) -> Extents:
        """What the chain reads as: DATA is the place of the owning layer, 0 for the root."""
        return fold(layer.extents.owned_by(place) for place, layer in enumerate(self.layers))

    def held(self) -> ByteCounts:
        """What each layer holds by itself."""
        return ByteCounts(
            np.array([layer.data_bytes for layer in self.layers], np.int64),
            np.array([layer.zero_bytes for layer in self.layers], np.int64),
        )

    def visible(self) -> ByteCounts:
        """What each layer gives to a reader of the top."""
        # DATA of layer n becomes 2n, its ZERO 2n+1.  The zeroes that `over` adds where a layer is too short keep
        # their -1: they are nobody's.
        marked = []
        for place, layer in enumerate(self.layers):
            val = layer.extents.val
            codes = np.where(val == DATA, np.int64(2 * place), np.where(val == ZERO, np.int64(2 * place + 1), val))
            marked.append(layer.extents.mapped(codes))
        seen = fold(marked)
        counts = np.zeros(2 * len(self.layers), np.int64)
        owned = seen.val >= 0
        np.add.at(counts, seen.val[owned], seen.lengths[owned])
        return ByteCounts(counts[0::2], counts[1::2])

    def shadowed(self) -> ByteCounts:
        """What each layer holds that layers above it hide."""
        return self.held() - self.visible()

    def usage(self) -> tuple[LayerUse, ...]:
        """The numbers of `inspect`, root first."""
        held = self.held()
        hidden = held - self.visible()
        columns = (held.data.tolist(), held.zero.tolist(), hidden.data.tolist(), hidden.zero.tolist())
        return tuple(
            LayerUse(layer.id, layer.size, *numbers) for layer, *numbers in zip(self.layers, *columns, strict=True)
        )


# --- A layer: a partial map from guest bytes to ABSENT, ZERO or DATA, with an identity and a parent.
#
# One qcow2 file is one layer.  A `Layer` is sealed: nobody writes it any more, so its map is a value and its id
# stands for its content.  Layers with one id are the same layer wherever they are found.


@dataclass(frozen=True, slots=True)
class Layer:
    """A sealed layer.

    id:      names the layer's content and place; never empty
    extents: the layer alone, DATA written as 0
    parent:  id of the layer below, None for a root

    Raises InvalidInput for an empty id, a layer that is its own parent, or a map that names owners.
    """

    id: str
    extents: Extents = field(hash=False)
    parent: str | None = None

    def __post_init__(self) -> None:
        if not self.id:
            raise InvalidInput("a layer needs an id")
        if self.parent == self.id:
            raise InvalidInput("a layer cannot be its own parent", subject=self.id)
        values = self.extents.val
        if len(values) and not ABSENT <= int(values.min()) <= int(values.max()) <= DATA:
            raise InvalidInput("the map of a lone layer names no owners", subject=self.id)

    @property
    def size(self) -> int:
        """Virtual size in bytes."""
        return self.extents.size

    @property
    def data_bytes(self) -> int:
        """Guest bytes that this layer holds."""
        return self.extents.data_bytes

    @property
    def zero_bytes(self) -> int:
        """Guest bytes that this layer says are zero."""
        return self.extents.zero_bytes

    @property
    def is_root(self) -> bool:
        """Whether nothing is below."""
        return self.parent is None
