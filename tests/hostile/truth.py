"""The content id of raw bytes, from its definition in docs/format.md and from nothing of the package."""

from __future__ import annotations

import numpy as np
from blake3 import blake3

_LEAF = 65536


def content_id(shown: bytes) -> str:
    """Hex."""
    total = np.zeros(1024, np.uint16)
    element_key = blake3(b"snapchain content element").digest()
    for index in range(-(-len(shown) // _LEAF)):
        leaf = shown[index * _LEAF : (index + 1) * _LEAF].ljust(_LEAF, b"\0")
        if leaf.strip(b"\0"):
            element = blake3(index.to_bytes(8, "little") + blake3(leaf).digest(), key=element_key).digest(length=2048)
            total += np.frombuffer(element, "<u2")
    id_key = blake3(b"snapchain content id").digest()
    return blake3(len(shown).to_bytes(8, "little") + total.astype("<u2").tobytes(), key=id_key).hexdigest()
