"""Key slots: the master key, wrapped by a key that Argon2id makes from a passphrase.

Several slots may wrap the same master key.  The hash of `config` is bound to each, so that a store that alters one byte
of the configuration (say, the suite or the repository's id) makes every passphrase fail instead of being believed.  One
that says there is no encryption has no slot to fail: Repository.open and known.py see to that.
"""

from __future__ import annotations

import base64
import secrets
import threading
from typing import Annotated, Literal

import blake3
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.kdf.argon2 import Argon2id
from pydantic import BaseModel, ConfigDict, Field

from snapchain.errors import Corrupt, InvalidInput
from snapchain.repository.crypto import KEY_BYTES, SALT_BYTES
from snapchain.repository.stored import parse as parse_stored

_NONCE = bytes(12)
_deriving = threading.Lock()
"""OpenSSL's own threads, one a lane, wait for each other for ever when two derivations of one process overlap."""


class KeySlot(BaseModel):
    """keys/SLOT, JSON in plain text.

    memory_kib, iterations, lanes: the cost of Argon2id (RFC 9106).  The bounds keep a hostile store from
    making us allocate or compute without end.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal[1] = 1
    kdf: Literal["argon2id"] = "argon2id"
    memory_kib: Annotated[int, Field(ge=8, le=1024 * 1024)] = 64 * 1024
    iterations: Annotated[int, Field(ge=1, le=16)] = 3
    lanes: Annotated[int, Field(ge=1, le=16)] = 4
    salt: str
    wrapped: str

    def wrapping_key(self, passphrase: str) -> bytes:
        """The key that wraps the master key; 0.1 s on purpose."""
        salt = base64.b64decode(self.salt, validate=True)
        derivation = Argon2id(
            salt=salt, length=KEY_BYTES, iterations=self.iterations, lanes=self.lanes, memory_cost=self.memory_kib
        )
        with _deriving:
            return derivation.derive(passphrase.encode())


def wrap(master: bytes, passphrase: str, config: bytes) -> KeySlot:
    """A new slot for `master`."""
    salt = base64.b64encode(secrets.token_bytes(SALT_BYTES)).decode()
    slot = KeySlot(salt=salt, wrapped="")
    text = ChaCha20Poly1305(slot.wrapping_key(passphrase)).encrypt(_NONCE, master, _bound(config))
    return slot.model_copy(update={"wrapped": base64.b64encode(text).decode()})


def unwrap(slot: KeySlot, passphrase: str, config: bytes, *, subject: str) -> bytes | None:
    """The master key, or None when the passphrase (or `config`) is not the one that this slot was made with."""
    try:
        text = base64.b64decode(slot.wrapped, validate=True)
        return ChaCha20Poly1305(slot.wrapping_key(passphrase)).decrypt(_NONCE, text, _bound(config))
    except InvalidTag:
        return None
    except (ValueError, MemoryError) as error:
        raise Corrupt(f"the key slot is damaged: {error}", subject=subject) from error


def parse(data: bytes, *, subject: str) -> KeySlot:
    """A slot as stored. Raises Corrupt, or Unsupported for one that a newer snapchain made."""
    return parse_stored(KeySlot, data, what="the key slot", subject=subject)


def wrong_passphrase(url: str) -> InvalidInput:
    """The error for a passphrase that opens no slot."""
    return InvalidInput(
        "wrong passphrase, or the repository's configuration was altered",
        subject=url,
        hint="give the passphrase by SNAPCHAIN_PASSWORD, --password-file or --password-command",
    )


def _bound(config: bytes) -> bytes:
    return b"snapchain 1 key slot" + blake3.blake3(config).digest()
