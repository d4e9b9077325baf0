"""Read the JSON that a repository stores: unknown fields come from a newer snapchain, malformed text is damage.

The difference matters to the reader of the message: an upgrade cures the first, nothing cures the second.

A hostile store must not make reading expensive. A parser that collects every error of a text takes 500 times the memory
of that text, so each list stops at its first error, and an object with absurdly many fields is one error.
"""

from __future__ import annotations

import functools
import secrets
import struct
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import metadata
from typing import Annotated, Any, TypeVar

import zstandard
from pydantic import BaseModel, ConfigDict, FailFast, ValidationError, model_validator

from snapchain.errors import Corrupt, SnapchainError, Unsupported
from snapchain.objects.store import largest
from snapchain.repository.crypto import SALT_BYTES, TAG_BYTES, Keyring, decrypt
from snapchain.repository.format import FORMAT

Stored = TypeVar("Stored", bound=BaseModel)
Item = TypeVar("Item")
Many = Annotated[tuple[Item, ...], FailFast()]
"""A stored list."""
_MOST_FIELDS = 64
"""Of one JSON object with named fields. No record has half as many."""
_SPARSE_MARKS = 10_000
_BYTES_A_MARK = 4
"""A text has at most one comma, colon or bracket in so many bytes, beyond the first _SPARSE_MARKS: objects of Python
take 60 bytes each, and records have 10 bytes a mark."""
_MARKS = b",:[{"
_UNKNOWN = frozenset({"extra_forbidden", "literal_error", "enum"})
"""pydantic's names for a field that the model does not have, and for a word that is none of those it knows."""


class StoredModel(BaseModel):
    """A record that a repository stores as JSON. An unknown field comes from a newer snapchain."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _has_few_fields(cls, fields: Any) -> Any:
        if isinstance(fields, dict) and len(fields) > _MOST_FIELDS:
            raise ValueError(f"an object has {len(fields)} fields")
        return fields


def check_density(text: bytes, *, what: str, subject: str) -> None:
    """Raises Corrupt for a JSON text whose values would take far more memory than the text."""
    marks = sum(text.count(mark) for mark in (_MARKS[at : at + 1] for at in range(len(_MARKS))))
    if marks > _SPARSE_MARKS + len(text) // _BYTES_A_MARK:
        raise Corrupt(f"{what} is damaged: {marks} values in {len(text)} bytes are not plausible", subject=subject)


def parse(model: type[Stored], text: bytes, *, what: str, subject: str) -> Stored:
    """`text` as a `model`, whose unknown fields are forbidden.

    what: for people, e.g. `the catalogue`. Raises Corrupt, or Unsupported for what only a newer snapchain writes: a
    higher `format`, an unknown field, an unknown word where there is a list of words.
    """
    check_density(text, what=what, subject=subject)
    try:
        return model.model_validate_json(text)
    except ValidationError as error:
        raise _judged(error.errors(include_url=False, include_context=False), what, subject) from error


def newer(what: str, subject: str) -> Unsupported:
    """The error for a record that only a newer program can read."""
    return Unsupported(f"{what} was written by a newer snapchain", subject=subject, hint="use a newer snapchain")


@functools.cache
def made_by() -> str:
    """The program name in new records, e.g. `snapchain 0.1.0`."""
    try:
        return f"snapchain {metadata.version('snapchain')}"
    except metadata.PackageNotFoundError:  # run from a source tree that was not installed
        return "snapchain"


def _judged(errors: Iterable[Any], what: str, subject: str) -> SnapchainError:
    found = [(tuple(each["loc"]), str(each["type"]), each["input"], str(each["msg"])) for each in errors]
    for where, _, given, _ in found:
        if where == ("format",) and type(given) is int and given > FORMAT:
            return newer(what, subject)
    for where, kind, given, words in found:
        if kind not in _UNKNOWN or where == ("format",) or not (kind == "extra_forbidden" or isinstance(given, str)):
            return Corrupt(f"{what} is damaged: {'.'.join(map(str, where)) or 'JSON'}: {words}", subject=subject)
    return newer(what, subject)


# --- Sealed records: an index, a layer record, a catalogue or a lease as one object.
#
#     0   6   "SNAPCH"
#     6   1   kind: I index, D damage, L layer, C catalogue, E lease, G state of a guest, K list of key slots,
#             V what was verified, R what was read first, X what is to be deleted, S samples of indexes;
#             P begins a pack (packs.py)
#     7   1   format, 1
#     8   8   zero
#     16  32  salt
#     48      cipher text of (zstd frame), and its tag; nonce zero, since the salt gives the key one use
#
# Bound by the tag besides the text: the first 16 bytes, the repository's id and the object's name.  So a hostile
# store can neither alter a record nor put one in another's place.

MAGIC = b"SNAPCH"
HEAD_BYTES = 16
_NONCE = bytes(12)

_MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Expansion:
    """The largest unpacked size of a kind of record: `most` bytes, and `ratio` times the stored size.

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
    b"G": _JSON,
    b"X": _JSON,
    b"K": _JSON,
    b"I": Expansion(64 * _MIB, 8, _MIB // 4),
    b"S": Expansion(64 * _MIB, 8, _MIB // 4),
    b"L": Expansion(128 * _MIB, 8, _MIB // 4),
    b"V": _JSON,
    b"R": _JSON,
}
"""By kind. Two thirds of an index and half of a page table are hashes, which do not compress: true ones unpack to two
or three times their size."""


def head(kind: bytes) -> bytes:
    """The 16 bytes that begin every object of this kind."""
    return MAGIC + kind + bytes([FORMAT]) + bytes(8)


def check_head(data: bytes, kind: bytes, *, subject: str) -> None:
    """Raises Corrupt or Unsupported unless `data` begins like an object of this kind."""
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
    """`body` as a zstd frame of raw blocks (RFC 8878): a reader refuses text that compresses too well, as a bomb."""
    yield struct.pack("<IBQ", zstandard.MAGIC_NUMBER, 0xE0, len(body))  # single segment, content size of 8 bytes
    for at in range(0, max(len(body), 1), zstandard.BLOCKSIZE_MAX):
        piece = body[at : at + zstandard.BLOCKSIZE_MAX]
        is_last = at + zstandard.BLOCKSIZE_MAX >= len(body)
        yield (len(piece) << 3 | is_last).to_bytes(3, "little")
        yield piece


def decompress(packed: bytes, limit: int, *, subject: str) -> bytes:
    """Decompress one zstd frame with a recorded size of at most `limit`. Raises Corrupt otherwise."""
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
