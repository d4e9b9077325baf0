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
import threading

import zstandard

from snapchain.errors import Corrupt, Unsupported
from snapchain.repository.crypto import SALT_BYTES, TAG_BYTES, Keyring, decrypt
from snapchain.repository.format import FORMAT

MAGIC = b"SNAPCH"
HEAD_BYTES = 16
_NONCE = bytes(12)
LONGEST_RECORD = 256 * 1024 * 1024
"""Plain bytes; a bound for what a hostile store can make us allocate."""


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
    """`body` compressed, encrypted and bound to its name."""
    salt = secrets.token_bytes(SALT_BYTES)
    first = head(kind)
    text = zstandard.ZstdCompressor(level=3).compress(body)
    return first + salt + keys.record_cipher(salt).encrypt(_NONCE, text, first + keys.repository + name.encode())


def unseal(keys: Keyring, kind: bytes, name: str, data: bytes) -> bytes:
    """The body of a sealed record. Raises Corrupt when it was altered or put here from elsewhere."""
    check_head(data, kind, subject=name)
    if len(data) < HEAD_BYTES + SALT_BYTES + TAG_BYTES:
        raise Corrupt("the record is cut short", subject=name)
    first, salt, text = data[:HEAD_BYTES], data[HEAD_BYTES : HEAD_BYTES + SALT_BYTES], data[HEAD_BYTES + SALT_BYTES :]
    packed = decrypt(keys.record_cipher(salt), _NONCE, text, first + keys.repository + name.encode(), subject=name)
    return decompress(packed, LONGEST_RECORD, subject=name)


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
