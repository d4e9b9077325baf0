"""The files that a layer was made of, when they are too many to be told in full: eight bytes tell one again.

A layer that takes in another one each night for years is made of thousands of files.  Those that came last are told in
full, the older ones by a hash each.  It is asked whether one file, in its place in a row of files, is the one that is
meant: nobody chooses among many, so 64 bits do.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from blake3 import blake3

from snapchain.model.fingerprint import Fingerprint
from snapchain.replica.stream.messages import MAX_LAYERS, MOST_OLDER, SHORT_KEY_BYTES, HeldLayer

_FIELDS = struct.Struct("<QQqqqq")
_LOW = (1 << 32) - 1


@dataclass(frozen=True, slots=True)
class ShortKey:
    """A file, by its hash."""

    raw: bytes


def short_key(source: Fingerprint) -> ShortKey:
    """Equal for two looks at a file between which nothing was written to it (model/fingerprint.py)."""
    inode, size, mtime, ctime = source.content_key
    times = (mtime >> 32, mtime & _LOW, ctime >> 32, ctime & _LOW)
    return ShortKey(blake3(_FIELDS.pack(inode, size, *times)).digest(SHORT_KEY_BYTES))


def keys_of(layer: HeldLayer) -> tuple[ShortKey | Fingerprint, ...]:
    """All files that a layer was made of, lowest first; none where that is not known."""
    raw = bytes.fromhex(layer.older)
    edges = pairwise(range(0, len(raw) + 1, SHORT_KEY_BYTES))
    return (*(ShortKey(raw[first:stop]) for first, stop in edges), *layer.sources)


def joined(members: Sequence[HeldLayer]) -> tuple[str, tuple[Fingerprint, ...]]:
    """(`older`, `sources`) of a layer that several became, lowest first; none where one of them has none."""
    parts = [keys_of(layer) for layer in members]
    found = [key for part in parts for key in part]
    if not all(parts) or len(found) > MOST_OLDER:
        return "", ()
    whole: list[Fingerprint] = []
    for key in found[: -2 * MAX_LAYERS - 1 : -1]:
        if isinstance(key, ShortKey):
            break
        whole.append(key)
    older = found[: len(found) - len(whole)]
    raw = b"".join((key if isinstance(key, ShortKey) else short_key(key)).raw for key in older)
    return raw.hex(), tuple(reversed(whole))
