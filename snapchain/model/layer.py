"""A layer: a partial map from guest bytes to ABSENT, ZERO or DATA, with an identity and a parent.

One qcow2 file is one layer.  A `Layer` is sealed: nobody writes it any more, so its map is a value and its id
stands for its content.  Layers with one id are the same layer wherever they are found.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from snapchain.errors import InvalidInput
from snapchain.model.extents import ABSENT, DATA, Extents


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
