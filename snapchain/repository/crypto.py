"""Keys and ciphers.  The store sees no plaintext, no hash of plaintext and no name; every altered byte is noticed.

One random master key, from it by HKDF-SHA256 a key for each use:

    id        keyed BLAKE3 of a blob's plaintext: the same data gives the same id here, and nowhere else
    name      keyed BLAKE3 of a disk's name: the folder of its catalogue
    pack      with the pack's random salt: the key of its blobs; nonce = the blob's offset in the pack
    record    with the record's random salt: the key of one index, layer record or catalogue; used once

A key for each object makes nonces unique by construction: no counter to persist, no birthday bound of random 96-bit
nonces.  It rests on random names and salts that do not come twice: a machine that is cloned in the middle of filling a
pack has two of one name (docs/decisions/0014).

Without encryption the same container is used with suite `none`: keys come from the repository's public id, and
a 16-byte BLAKE3 tag finds every accidental change.  It protects from rot, not from people.
"""

from __future__ import annotations

import hmac
from typing import Protocol

import blake3
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from snapchain.errors import Corrupt, Unsupported

KEY_BYTES = 32
SALT_BYTES = 32
TAG_BYTES = 16

AES = "aes-256-gcm"
CHACHA = "chacha20-poly1305"
NONE = "none"
SUITES = (AES, CHACHA, NONE)


class Cipher(Protocol):
    """Authenticated encryption under one key; the shape of `cryptography`'s AEAD classes."""

    def encrypt(self, nonce: bytes, data: bytes, associated_data: bytes | None, /) -> bytes:
        """Ciphertext and a tag of 16 bytes."""
        ...

    def decrypt(self, nonce: bytes, data: bytes | memoryview, associated_data: bytes | None, /) -> bytes:
        """The plaintext. Raises InvalidTag."""
        ...


class _Tagged:
    """Suite `none`: the data as they are, and a tag that finds accidental changes."""

    def __init__(self, key: bytes) -> None:
        self._key = key

    def encrypt(self, nonce: bytes, data: bytes, associated_data: bytes | None, /) -> bytes:
        return b"".join((data, self._tag(nonce, data, associated_data or b"")))

    def decrypt(self, nonce: bytes, data: bytes | memoryview, associated_data: bytes | None, /) -> bytes:
        body, tag = data[:-TAG_BYTES], data[-TAG_BYTES:]
        if not hmac.compare_digest(tag, self._tag(nonce, body, associated_data or b"")):
            raise InvalidTag
        return bytes(body)

    def _tag(self, nonce: bytes, data: bytes | memoryview, extra: bytes) -> bytes:
        hasher = blake3.blake3(len(extra).to_bytes(8, "little"), key=self._key)
        return hasher.update(extra).update(nonce).update(data).digest(length=TAG_BYTES)


def cipher(suite: str, key: bytes) -> Cipher:
    """The suite's cipher under a 32-byte key. Raises Unsupported for an unknown suite."""
    if suite == AES:
        return AESGCM(key)
    if suite == CHACHA:
        return ChaCha20Poly1305(key)
    if suite == NONE:
        return _Tagged(key)
    raise Unsupported(f"unknown encryption {suite!r}", hint="this repository was made by a newer snapchain")


def derive(master: bytes, use: str, salt: bytes = b"") -> bytes:
    """A 32-byte key for one use (HKDF-SHA256, RFC 5869)."""
    info = b"snapchain 1 " + use.encode()
    return HKDF(algorithm=SHA256(), length=KEY_BYTES, salt=salt or None, info=info).derive(master)


class Keyring:
    """The master key of an open repository, and what is derived from it. master: for new key slots"""

    def __init__(self, suite: str, repository: str, master: bytes) -> None:
        self.suite = suite
        self.master = master
        self.repository = bytes.fromhex(repository)
        self._pack = derive(master, "pack")
        self._record = derive(master, "record")
        self._id = derive(master, "id")
        self._name = derive(master, "name")

    @staticmethod
    def public_master(repository: str) -> bytes:
        """The master key of an unencrypted repository: a function of its public id."""
        return derive(bytes.fromhex(repository), "no encryption")

    def blob_id(self, pieces: bytes) -> bytes:
        """The id of a blob, from the BLAKE3 hashes of its pieces of 64 KiB, one after the other."""
        return blake3.blake3(pieces, key=self._id).digest()

    def disk_key(self, name: str) -> str:
        """32 hex digits that stand for a disk's name in object names."""
        return blake3.blake3(name.encode(), key=self._name).hexdigest(length=16)

    def pack_cipher(self, salt: bytes) -> Cipher:
        """The cipher of one pack."""
        return cipher(self.suite, derive(self._pack, "pack", salt))

    def record_cipher(self, salt: bytes) -> Cipher:
        """The cipher of one record."""
        return cipher(self.suite, derive(self._record, "record", salt))


def decrypt(cipher: Cipher, nonce: bytes, data: bytes | memoryview, extra: bytes, *, subject: str) -> bytes:
    """Decrypt and check. Raises Corrupt naming `subject` when a byte was altered."""
    try:
        return cipher.decrypt(nonce, data, extra)
    except (InvalidTag, ValueError) as error:
        raise Corrupt("the stored bytes were altered or belong elsewhere", subject=subject) from error
