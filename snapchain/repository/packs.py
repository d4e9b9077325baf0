"""Packs: many blobs in one object, of at most 16 MiB unless the repository or the command says otherwise.

    0   16  head (envelope.py), kind P
    16      blobs, one after the other: cipher text and tag; nonce = the blob's offset as u96 little endian
    ...     directory: cipher text and tag of (zstd of ids and BLOB_ROWs); nonce = its offset
    -16 4   stored bytes of the directory, u32 little endian
    -12 4   how many blobs, u32
    -8  8   "SNAPEND1"

The pack's 16 random bytes of name are the salt of its key: a reader needs nothing from a pack but the blob.
A blob is stored as a zstd frame where that is shorter, else as it is; which of the two follows from its lengths.
The directory makes a pack speak for itself: an index can always be made again from the packs.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import zstandard

from snapchain.errors import Corrupt
from snapchain.objects.store import ObjectStore
from snapchain.repository.crypto import TAG_BYTES, Cipher, Keyring, decrypt
from snapchain.repository.envelope import EXPANSIONS, HEAD_BYTES, check_head, decompress, head
from snapchain.repository.format import (
    BLOB_ROW,
    ID_BYTES,
    PACK_BYTES,
    fresh_id,
    pack_name,
)

KIND = b"P"
FIRST_BLOB = HEAD_BYTES
TRAILER = struct.Struct("<II8s")
_END = b"SNAPEND1"
LARGEST_BLOB = 4 * 1024 * 1024
_LARGEST_DIRECTORY = 64 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Location:
    """Where a blob lies. offset and stored: bytes in the pack, tag included; raw: its plain bytes."""

    pack: str
    offset: int
    stored: int
    raw: int


@dataclass(frozen=True, slots=True)
class ClosedPack:
    """A finished pack: its object's parts, and which blobs it holds (in order of offset)."""

    pack: str
    parts: list[bytes]
    size: int
    ids: npt.NDArray[np.uint8]
    rows: npt.NDArray[np.void]


class OpenPack:
    """A pack that is being filled, in memory. limit: bytes of the whole object. Not thread-safe."""

    def __init__(self, keys: Keyring, *, limit: int | None = None) -> None:
        self.pack = fresh_id()
        self._limit = PACK_BYTES if limit is None else limit
        self._keys = keys
        self._cipher: Cipher = keys.pack_cipher(bytes.fromhex(self.pack))
        self._parts: list[bytes] = [head(KIND)]
        self._ids: list[bytes] = []
        self._rows: list[tuple[int, int, int, int]] = []
        self.size = FIRST_BLOB

    def add(self, blob: bytes, payload: bytes, raw: int) -> Location:
        """Append one blob.

        blob: its id; payload: its plain bytes, or a zstd frame of them that is shorter; raw: plain bytes
        """
        offset = self.size
        text = self._cipher.encrypt(_nonce(offset), payload, _bound(self._keys, self.pack, blob, raw))
        self._parts.append(text)
        self._ids.append(blob)
        self._rows.append((0, offset, len(text), raw))
        self.size += len(text)
        return Location(self.pack, offset, len(text), raw)

    def has_room(self, payload: int) -> bool:
        """Whether a blob of so many bytes still fits. A blob that is larger than the limit has a pack of its own."""
        blobs = len(self._rows) + 1
        directory = _most_compressed(blobs * (ID_BYTES + BLOB_ROW.itemsize)) + TAG_BYTES
        return self.is_empty or self.size + payload + TAG_BYTES + directory + TRAILER.size <= self._limit

    @property
    def is_empty(self) -> bool:
        return not self._rows

    def close(self) -> ClosedPack:
        """The whole object. The pack takes no more blobs after this."""
        rows = np.array(self._rows, BLOB_ROW)
        ids = np.frombuffer(b"".join(self._ids), np.uint8).reshape(-1, ID_BYTES)
        body = zstandard.ZstdCompressor(level=3).compress(ids.tobytes() + rows.tobytes())
        text = self._cipher.encrypt(_nonce(self.size), body, _bound(self._keys, self.pack, b"directory", len(rows)))
        trailer = TRAILER.pack(len(text), len(rows), _END)
        parts = [*self._parts, text, trailer]
        return ClosedPack(self.pack, parts, self.size + len(text) + len(trailer), ids, rows)


class PackReader:
    """Decrypts blobs of one pack."""

    def __init__(self, keys: Keyring, pack: str) -> None:
        self.pack = pack
        self._keys = keys
        self._cipher = keys.pack_cipher(bytes.fromhex(pack))

    def blob(self, blob: bytes, offset: int, raw: int, text: bytes | memoryview) -> bytes:
        """The plain bytes of a blob, checked. text: what is stored of it. Raises Corrupt naming pack and offset."""
        subject = f"{pack_name(self.pack)} at {offset}"
        payload = self.payload(blob, offset, raw, text)
        plain = payload if len(payload) == raw else decompress(payload, raw, subject=subject)
        if len(plain) != raw:
            raise Corrupt(f"a blob of {raw} bytes unpacked to {len(plain)}", subject=subject)
        return plain

    def payload(self, blob: bytes, offset: int, raw: int, text: bytes | memoryview) -> bytes:
        """What `OpenPack.add` was given: the plain bytes, or a zstd frame of them. Raises as `blob`."""
        subject = f"{pack_name(self.pack)} at {offset}"
        if raw > LARGEST_BLOB or len(text) > raw + TAG_BYTES:
            raise Corrupt(f"a blob of {raw} bytes cannot be stored in {len(text)}", subject=subject)
        return decrypt(self._cipher, _nonce(offset), text, _bound(self._keys, self.pack, blob, raw), subject=subject)

    def directory(self, offset: int, count: int, text: bytes) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.void]]:
        """ids (uint8[n, 32]) and BLOB_ROWs (column `pack` is 0) of the blobs in the pack."""
        subject = f"{pack_name(self.pack)} directory"
        bound = _bound(self._keys, self.pack, b"directory", count)
        size = count * (ID_BYTES + BLOB_ROW.itemsize)
        if size > _LARGEST_DIRECTORY or size > EXPANSIONS[b"I"].limit(len(text)):
            raise Corrupt(f"a directory of {count} blobs in {len(text)} bytes is not plausible", subject=subject)
        body = decompress(decrypt(self._cipher, _nonce(offset), text, bound, subject=subject), size, subject=subject)
        if len(body) != size:
            raise Corrupt("the pack's directory has another length than its trailer says", subject=subject)
        ids = np.frombuffer(body, np.uint8, count * ID_BYTES).reshape(-1, ID_BYTES)
        return ids, np.frombuffer(body, BLOB_ROW, count, count * ID_BYTES)


def read_directory(
    store: ObjectStore, keys: Keyring, pack: str, size: int
) -> tuple[PackReader, npt.NDArray[np.uint8], npt.NDArray[np.void]]:
    """Open a pack by its own directory. Raises Corrupt."""
    name = pack_name(pack)
    return directory_of(keys, pack, size, lambda offset, length: store.get(name, offset=offset, length=length))


def directory_of(
    keys: Keyring, pack: str, size: int, read: Callable[[int, int], bytes]
) -> tuple[PackReader, npt.NDArray[np.uint8], npt.NDArray[np.void]]:
    """As `read_directory`. read: bytes of the pack, by offset and length."""
    name = pack_name(pack)
    if size < FIRST_BLOB + TRAILER.size:
        raise Corrupt("the pack is cut short", subject=name)
    check_head(read(0, FIRST_BLOB), KIND, subject=name)
    reader = PackReader(keys, pack)
    trailer = read(size - TRAILER.size, TRAILER.size)
    if len(trailer) != TRAILER.size:
        raise Corrupt("the store gave a part of the pack's trailer", subject=name)
    stored, count, end = TRAILER.unpack(trailer)
    offset = size - TRAILER.size - stored
    if end != _END or offset < FIRST_BLOB:
        raise Corrupt("the pack has no trailer: it is cut short or was altered", subject=name)
    if stored > _LARGEST_DIRECTORY:
        raise Corrupt(f"a directory of {stored} bytes is not plausible", subject=name)
    ids, rows = reader.directory(offset, count, read(offset, stored))
    return reader, ids, rows


def packed(compressor: zstandard.ZstdCompressor, plain: bytes | memoryview) -> bytes:
    """A zstd frame of `plain` where that is shorter, else its bytes as they are."""
    frame = compressor.compress(plain)
    return frame if len(frame) < len(plain) else bytes(plain)


def _most_compressed(size: int) -> int:
    """The most bytes of a zstd frame of `size` bytes: zstd's own ZSTD_compressBound."""
    return size + size // 256 + 64


def _nonce(offset: int) -> bytes:
    return offset.to_bytes(12, "little")


def _bound(keys: Keyring, pack: str, blob: bytes, raw: int) -> bytes:
    return b"snapchain 1 blob" + keys.repository + bytes.fromhex(pack) + raw.to_bytes(8, "little") + blob
