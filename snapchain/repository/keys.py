"""Key slots: the master key, wrapped by a key that Argon2id makes from a passphrase.

Several slots may wrap the same master key.  The hash of `config` is bound to each, so that a store that alters one byte
of the configuration (say, the suite or the repository's id) makes every passphrase fail instead of being believed.  A
configuration without encryption has no slot that could fail: Repository.open and known.py check for that.

A store can plant slots.  What a slot costs is bounded from above, so that a planted one does not stall us, and from
below, so that it is no cheaper test of a guessed passphrase than the true slot; all slots together have a budget.  The
cipher does not commit to its key: docs/decisions/0080-planted-key-slots.md says why the exact length is enough.
"""

from __future__ import annotations

import base64
import secrets
import threading
from itertools import islice
from typing import Annotated, Literal

import blake3
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.kdf.argon2 import Argon2id
from pydantic import Field

from snapchain.errors import Corrupt, InvalidInput, Unsupported
from snapchain.objects.store import ObjectStore
from snapchain.repository.crypto import KEY_BYTES, SALT_BYTES, TAG_BYTES
from snapchain.repository.envelope import StoredModel, parse as parse_stored

MEMORY_KIB = 64 * 1024
ITERATIONS = 3
MOST_WORK = 16.0
"""Work of all slots that one passphrase is tried on, as KeySlot.cost: some three seconds."""
_WRAPPED_BYTES = KEY_BYTES + TAG_BYTES
_NONCE = bytes(12)
_MOST_SLOTS = 64
_MOST_NAMES = 10_000
_deriving = threading.Lock()
"""OpenSSL's own threads, one a lane, wait for each other for ever when two derivations of one process overlap."""


class KeySlot(StoredModel):
    """keys/SLOT, JSON in plain text.

    memory_kib, iterations, lanes: the cost of Argon2id (RFC 9106), from what is written to four times that
    """

    format: Literal[1] = 1
    kdf: Literal["argon2id"] = "argon2id"
    memory_kib: Annotated[int, Field(ge=MEMORY_KIB, le=4 * MEMORY_KIB)] = MEMORY_KIB
    iterations: Annotated[int, Field(ge=ITERATIONS, le=4 * ITERATIONS)] = ITERATIONS
    lanes: Annotated[int, Field(ge=1, le=16)] = 4
    salt: str = Field(max_length=64)
    wrapped: str = Field(max_length=128)

    @property
    def cost(self) -> float:
        """Its work, as a multiple of a slot that this program writes."""
        return self.memory_kib * self.iterations / (MEMORY_KIB * ITERATIONS)

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
        _check_lengths(slot, text)
        return ChaCha20Poly1305(slot.wrapping_key(passphrase)).decrypt(_NONCE, text, _bound(config))
    except InvalidTag:
        return None
    except (ValueError, MemoryError) as error:
        raise Corrupt(f"the key slot is damaged: {error}", subject=subject) from error


def _check_lengths(slot: KeySlot, wrapped: bytes) -> None:
    """A longer text could be made to open with many keys at once (docs/decisions/0080)."""
    if len(wrapped) != _WRAPPED_BYTES or len(base64.b64decode(slot.salt, validate=True)) != SALT_BYTES:
        raise ValueError("a salt or a wrapped key of another length")


def unlock(store: ObjectStore, secret: str, config: bytes, *, first: str | None = None) -> tuple[bytes, str]:
    """The master key, and the name of the slot that held it.

    first: the slot that opened it before, which is tried before all others; then the oldest, by the store's clock
    Raises InvalidInput when no slot opens, and Corrupt or Unsupported when some cannot be read.
    """
    found = sorted(
        islice(store.list("keys/"), _MOST_NAMES), key=lambda info: (info.name != first, info.modified or 0.0)
    )
    if not found:
        raise Corrupt("the repository has no key slot: its master key is lost", subject=store.url)
    work = 0.0
    damaged: Corrupt | Unsupported | None = None
    untried = 0
    for place, info in enumerate(found):
        if work >= MOST_WORK or place >= _MOST_SLOTS:
            untried = len(found) - place
            break
        try:
            slot = parse(store.get(info.name), subject=info.name)
            if work + slot.cost > MOST_WORK:
                untried += 1
                continue
            work += slot.cost
            master = unwrap(slot, secret, config, subject=info.name)
        except (Corrupt, Unsupported) as error:
            damaged = error  # another slot may hold the same key
            continue
        if master is not None:
            return master, info.name
    if untried:
        raise InvalidInput(
            f"wrong passphrase, or planted key slots: {untried} of {len(found)} slots were not tried",
            subject=store.url,
            hint="check the passphrase. If it is right, somebody has planted slots: remove those under keys/ that are "
            "newer than the object config, and keep a copy of each",
        )
    raise damaged or wrong_passphrase(store.url)


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
