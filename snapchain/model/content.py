"""The content id: equal exactly when two disks show the same bytes and have the same size.

A disk is cut into leaves of 64 KiB (the last one is filled up with zeroes).  Each leaf that is not all zero
adds one element to a sum; the id is the hash of the size and the sum.

    element(index, leaf)  keyed BLAKE3-XOF(index as u64 little endian | BLAKE3(leaf)), read as 1024 u16 lanes
    sum                   lane by lane, modulo 2**16                                  (2048 bytes: LtHash16)
    content id            keyed BLAKE3(size as u64 little endian | sum)

The two keys are the BLAKE3 hashes of the names below: they separate the uses and hide nothing.

So layering, cluster sizes, compression and the way zeroes are stored cannot change it.  A sum can be kept up:
subtract the old element of each changed leaf and add the new one, in any order and on any number of threads.
That makes the id of the next point cost what changed, where a hash tree would have to be stored and rewritten.
LtHash16 with 1024 lanes: Lewi, Kim, Maykov, Weis, "Securing Update Propagation with Homomorphic Hashing"
(2019), with about 200 bits of security against finding two sets with one sum.
"""

from __future__ import annotations

import base64
from typing import Annotated

import blake3
import numpy as np
import numpy.typing as npt
from pydantic import StringConstraints

from snapchain.model.extents import Int64s

LEAF_BYTES = 64 * 1024
HASH_BYTES = 32
SUM_BYTES = 2048
_LANES = SUM_BYTES // 2
_ELEMENT_KEY = blake3.blake3(b"snapchain content element").digest()
_CONTENT_ID_KEY = blake3.blake3(b"snapchain content id").digest()

Sum = npt.NDArray[np.uint16]
Hashes = npt.NDArray[np.uint8]
SumText = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9+/]{2731}=$")]
"""A content sum as it is stored: 2,048 bytes in base64."""

ZERO_LEAF = blake3.blake3(bytes(LEAF_BYTES)).digest()


def leaf_hash(leaf: bytes | memoryview) -> bytes:
    """32 bytes that stand for one leaf; a short last leaf counts as filled up with zeroes."""
    if len(leaf) == LEAF_BYTES:
        return blake3.blake3(leaf).digest()
    return blake3.blake3(leaf).update(bytes(LEAF_BYTES - len(leaf))).digest()


def empty_sum() -> Sum:
    """The sum of a disk that is all zero."""
    return np.zeros(_LANES, np.uint16)


def sum_of(index: Int64s, hashes: Hashes) -> Sum:
    """The elements of many leaves added up.

    index:  int64[n], leaf numbers
    hashes: uint8[n, 32], their leaf hashes; none of them the hash of an all-zero leaf
    """
    total = empty_sum()
    head = np.empty((len(index), 8 + HASH_BYTES), np.uint8)
    head[:, :8] = index.astype("<u8").view(np.uint8).reshape(-1, 8)
    head[:, 8:] = hashes
    for row in head:
        element = blake3.blake3(row.tobytes(), key=_ELEMENT_KEY).digest(length=SUM_BYTES)
        total += np.frombuffer(element, "<u2")
    return total


def content_id(size: int, total: Sum) -> str:
    """64 hex digits that name the guest-visible content."""
    body = size.to_bytes(8, "little") + total.astype("<u2").tobytes()
    return blake3.blake3(body, key=_CONTENT_ID_KEY).hexdigest()


def encode_sum(total: Sum) -> str:
    """The base64 form of a content sum."""
    return base64.b64encode(total.astype("<u2").tobytes()).decode()


def decode_sum(text: str) -> Sum:
    """uint16[1024]. Raises ValueError for a text that is not of the form SumText."""
    raw = base64.b64decode(text, validate=True)
    if len(raw) != SUM_BYTES:
        raise ValueError("not a content sum")
    return np.frombuffer(raw, "<u2").astype(np.uint16)
