"""Sealed records: an index, a layer record, a catalogue or a lease as one object.

    0   6   "SNAPCH"
    6   1   kind: I index, D damage, L layer, C catalogue, E lease     (P begins a pack, see packs.py)
    7   1   format, 1
    8   8   zero
    16  32  salt
    48      cipher text of (zstd frame), and its tag; nonce zero, since the salt gives the key one use

Bound by the tag besides the text: the first 16 bytes, the repository's id and the object's name.  So a hostile
store can neither alter a record nor put one in another's place.
"""

from __future__ import annotations

import secrets
import struct
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import zstandard

from snapchain.errors import Corrupt, Unsupported
from snapchain.objects.limits import largest
from snapchain.repository.crypto import SALT_BYTES, TAG_BYTES, Keyring, decrypt
from snapchain.repository.format import FORMAT

MAGIC = b"SNAPCH"
HEAD_BYTES = 16
_NONCE = bytes(12)

_MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Expansion:
    """What a record of one kind may unpack to: `most` bytes, and not more than `ratio` times what is stored.

    Up to `free` bytes any ratio is allowed.
    """

    most: int
    ratio: int
    free: int

    def limit(self, packed: int) -> int:
        """Plain bytes that so many packed bytes may have."""
        return min(self.most, max(self.free, self.ratio * packed))


_JSON = Expansion(16 * _MIB, 64, _MIB)
EXPANSIONS: dict[bytes, Expansion] = {
    b"C": _JSON,
    b"D": _JSON,
    b"E": _JSON,
    b"I": Expansion(64 * _MIB, 8, _MIB // 4),
    b"L": Expansion(128 * _MIB, 8, _MIB // 4),
}
"""By kind. Two thirds of an index and half of a page table are hashes, which do not compress: true ones unpack to two
or three times their size."""


def head(kind: bytes) -> bytes:
    """The 16 bytes that begin every object of this kind."""
    return MAGIC + kind + bytes([FORMAT]) + bytes(8)


def check_head(data: bytes, kind: bytes, *, subject: str) -> None:
    """Raises Corrupt or Unsupported when these are not the first bytes of such an object."""
    if len(data) < HEAD_BYTES or data[:7] != MAGIC + kind:
        raise Corrupt("this is not the snapchain object that its name says", subject=subject)
    if data[7] != FORMAT:
        raise Unsupported(f"stored in format {data[7]}; this snapchain reads format {FORMAT}", subject=subject)
    if data[:HEAD_BYTES] != head(kind):
        raise Unsupported("stored in a way that this snapchain does not know", subject=subject)


def seal(keys: Keyring, kind: bytes, name: str, body: bytes) -> bytes:
    """`body` compressed, encrypted and bound to its name. Raises Unsupported where it could not be read again."""
    salt = secrets.token_bytes(SALT_BYTES)
    first = head(kind)
    expansion = EXPANSIONS[kind]
    text = zstandard.ZstdCompressor(level=3).compress(body)
    if len(body) > expansion.limit(len(text)):
        text = b"".join(_plain_frame(body))
    if len(body) > expansion.most or len(text) + HEAD_BYTES + SALT_BYTES + TAG_BYTES > largest(name):
        raise Unsupported(
            f"a record of {len(body)} bytes is larger than any reader accepts; nothing was changed",
            subject=name,
            hint="drop points or merge layers of this disk: snapchain merge DEST::DISK --keep-...",
        )
    return first + salt + keys.record_cipher(salt).encrypt(_NONCE, text, first + keys.repository + name.encode())


def unseal(keys: Keyring, kind: bytes, name: str, data: bytes) -> bytes:
    """The body of a sealed record. Raises Corrupt when it was altered or put here from elsewhere."""
    check_head(data, kind, subject=name)
    if len(data) < HEAD_BYTES + SALT_BYTES + TAG_BYTES:
        raise Corrupt("the record is cut short", subject=name)
    first, salt = data[:HEAD_BYTES], data[HEAD_BYTES : HEAD_BYTES + SALT_BYTES]
    text = memoryview(data)[HEAD_BYTES + SALT_BYTES :]
    packed = decrypt(keys.record_cipher(salt), _NONCE, text, first + keys.repository + name.encode(), subject=name)
    return decompress(packed, EXPANSIONS[kind].limit(len(packed)), subject=name)


def _plain_frame(body: bytes) -> Iterator[bytes]:
    """`body` as a zstd frame of raw blocks (RFC 8878): what compresses too well, a reader takes for a bomb."""
    yield struct.pack("<IBQ", zstandard.MAGIC_NUMBER, 0xE0, len(body))  # single segment, content size of 8 bytes
    for at in range(0, max(len(body), 1), zstandard.BLOCKSIZE_MAX):
        piece = body[at : at + zstandard.BLOCKSIZE_MAX]
        is_last = at + zstandard.BLOCKSIZE_MAX >= len(body)
        yield (len(piece) << 3 | is_last).to_bytes(3, "little")
        yield piece


def decompress(packed: bytes, limit: int, *, subject: str) -> bytes:
    """One zstd frame that says its size, which is at most `limit`. Raises Corrupt otherwise."""
    try:
        size = zstandard.frame_content_size(packed)
        if not 0 <= size <= limit:
            raise Corrupt(f"compressed data claim {size} bytes; at most {limit} are plausible", subject=subject)
        return _decompressor().decompress(packed, max_output_size=limit) if size else b""
    except zstandard.ZstdError as error:
        raise Corrupt(f"compressed data are damaged: {error}", subject=subject) from error


_local = threading.local()


def _decompressor() -> zstandard.ZstdDecompressor:
    """This thread's: making one costs as much as unpacking some KiB, and two threads may not share one."""
    found: zstandard.ZstdDecompressor | None = getattr(_local, "decompressor", None)
    if found is None:
        found = _local.decompressor = zstandard.ZstdDecompressor()
    return found
