"""Key slots: the master key, wrapped by a key that Argon2id makes from a passphrase.

Several slots may wrap the same master key.  The hash of `config` is bound to each, so that a store that alters one byte
of the configuration (say, the suite or the repository's id) makes every passphrase fail instead of being believed.  A
configuration without encryption has no slot that could fail: Repository.open and known.py check for that.

A store can plant slots, and put removed ones back (slot_list.py).  What a slot costs is bounded from above, so that a
planted one does not stall us, and from below, so that it is no cheaper test of a guessed passphrase than the true slot;
all slots together have a budget.  The cipher does not commit to its key: docs/decisions/0080-planted-key-slots.md says
why the exact length is enough.
"""

from __future__ import annotations

import base64
import secrets
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Annotated, Literal

import blake3
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.kdf.argon2 import Argon2id
from pydantic import Field

from snapchain.errors import Corrupt, NotFound, SnapchainError, Unsupported, WrongPassphrase
from snapchain.objects.store import ObjectStore
from snapchain.repository.crypto import KEY_BYTES, SALT_BYTES, TAG_BYTES
from snapchain.repository.envelope import StoredModel, parse as parse_stored
from snapchain.repository.format import fresh_id
from snapchain.repository.recovery_key import canonical, mistyped_groups

MEMORY_KIB = 64 * 1024
ITERATIONS = 3
COSTS = {
    1: (MEMORY_KIB, ITERATIONS),
    2: (2 * MEMORY_KIB, ITERATIONS),
    4: (4 * MEMORY_KIB, ITERATIONS),
    8: (4 * MEMORY_KIB, 2 * ITERATIONS),
}
"""What a new slot may cost, as a multiple of the least -> KiB of memory, iterations."""
MOST_WORK = 16.0
"""Work of all slots that one passphrase is tried on, as KeySlot.cost: some three seconds."""
_WRAPPED_BYTES = KEY_BYTES + TAG_BYTES
_NONCE = bytes(12)
_MOST_SLOTS = 64
_MOST_NAMES = 10_000
_LOOKS = 3
"""A slot may be replaced while it is read, or tried: then its follower is in the next listing."""
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

    @property
    def salt_hex(self) -> str:
        """The salt, by which the slot is known: whoever changes it cannot make it fit the wrapped key."""
        try:
            return base64.b64decode(self.salt, validate=True).hex()
        except ValueError:
            return ""

    @property
    def digest(self) -> str:
        """Of all that opening takes, in hex: how the list of key slots knows that no byte was changed."""
        try:
            salt, wrapped = (base64.b64decode(text, validate=True) for text in (self.salt, self.wrapped))
        except ValueError:
            return ""
        costs = b"".join(number.to_bytes(4, "little") for number in (self.memory_kib, self.iterations, self.lanes))
        return blake3.blake3(salt + wrapped + costs).hexdigest()

    def wrapping_key(self, passphrase: str) -> bytes:
        """The key that wraps the master key; 0.1 s on purpose."""
        salt = base64.b64decode(self.salt, validate=True)
        derivation = Argon2id(
            salt=salt, length=KEY_BYTES, iterations=self.iterations, lanes=self.lanes, memory_cost=self.memory_kib
        )
        with _deriving:
            return derivation.derive(passphrase.encode())


@dataclass(frozen=True, slots=True)
class Unlocked:
    """What a passphrase opened. name: of the slot's object"""

    master: bytes
    name: str
    slot: KeySlot


def wrap(master: bytes, passphrase: str, config: bytes, *, cost: int = 1) -> KeySlot:
    """A new slot for `master`. cost: a key of COSTS. A recovery key is taken in its canonical form."""
    salt = base64.b64encode(secrets.token_bytes(SALT_BYTES)).decode()
    slot = KeySlot(salt=salt, wrapped="")
    if cost != 1:
        memory_kib, iterations = COSTS[cost]
        slot = slot.model_copy(update={"memory_kib": memory_kib, "iterations": iterations})
    passphrase = canonical(passphrase)
    text = ChaCha20Poly1305(slot.wrapping_key(passphrase)).encrypt(_NONCE, master, _bound(config))
    return slot.model_copy(update={"wrapped": base64.b64encode(text).decode()})


@dataclass(frozen=True, slots=True)
class NamedSlot:
    """A slot that was stored. name: of the object"""

    name: str
    slot: KeySlot


def put(store: ObjectStore, master: bytes, passphrase: str, config: bytes, *, cost: int = 1) -> NamedSlot:
    """Store a new slot, as `wrap`."""
    name, slot = f"keys/{fresh_id()}", wrap(master, passphrase, config, cost=cost)
    store.put(name, slot.model_dump_json().encode())
    return NamedSlot(name, slot)


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


def _never(_name: str, _slot: KeySlot, _master: bytes) -> bool:
    return False


def unlock(
    store: ObjectStore,
    secret: str,
    config: bytes,
    *,
    first: str | None = None,
    is_removed: Callable[[str, KeySlot, bytes], bool] = _never,
) -> Unlocked:
    """The master key, and the slot that held it. A recovery key may be spelled as in `recovery_key`.

    first: the slot that opened it before, which is tried before all others; then the oldest, by the store's clock
    is_removed: gets name, slot and master key of a slot that opens, and says whether it was removed: then it counts not
    Raises WrongPassphrase when no slot opens, and Corrupt or Unsupported when some cannot be read.
    """
    trial = _Trial(store, canonical(secret), config, is_removed)
    for _ in range(_LOOKS):
        found = sorted(
            islice(store.list("keys/"), _MOST_NAMES), key=lambda info: (info.name != first, info.modified or 0.0)
        )
        if not found:
            raise Corrupt("the repository has no key slot: its master key is lost", subject=store.url)
        opened = trial.first_of([info.name for info in found])
        if opened is not None:
            return opened
        if not (trial.is_gone or trial.was_removed):
            break
    raise trial.failure(len(found))


class _Trial:
    """One passphrase, tried on slots, each of them once. What all of them cost is bounded.

    is_gone: whether a slot was deleted after it was listed; was_removed: whether one opened that counts as removed
    """

    def __init__(
        self, store: ObjectStore, secret: str, config: bytes, is_removed: Callable[[str, KeySlot, bytes], bool]
    ) -> None:
        self.is_gone = self.was_removed = False
        self._store, self._secret, self._config, self._is_removed = store, secret, config, is_removed
        self._tried: set[str] = set()
        self._work = 0.0
        self._untried = 0
        self._damaged: Corrupt | Unsupported | None = None

    def first_of(self, names: Sequence[str]) -> Unlocked | None:
        """The first of these slots that opens, and was not removed."""
        self._untried = 0
        for place, name in enumerate(names):
            if self._work >= MOST_WORK or place >= _MOST_SLOTS:
                self._untried = len(names) - place
                break
            if name in self._tried:
                continue
            try:
                opened = self._opened(name)
            except NotFound:
                self.is_gone = True
            except (Corrupt, Unsupported) as error:
                self._damaged = error  # another slot may hold the same key
            else:
                if opened is not None:
                    return opened
        return None

    def _opened(self, name: str) -> Unlocked | None:
        slot = parse(self._store.get(name), subject=name)
        if self._work + slot.cost > MOST_WORK:
            self._untried += 1
            return None
        self._work += slot.cost
        self._tried.add(name)
        master = unwrap(slot, self._secret, self._config, subject=name)
        if master is None:
            return None
        if self._is_removed(name, slot, master):
            self.was_removed = True
            return None
        return Unlocked(master, name, slot)

    def failure(self, count: int) -> SnapchainError:
        """Why no slot has opened. count: of the slots that there are"""
        url = self._store.url
        if self.was_removed:
            return WrongPassphrase(
                "this passphrase was removed from the repository, and its key slot is in the store all the same",
                subject=url,
                hint="give another passphrase. `snapchain key list` shows the slot: if no `key` command was "
                "interrupted, somebody has put it back",
            )
        if self._untried:
            return WrongPassphrase(
                f"wrong passphrase, or planted key slots: {self._untried} of {count} slots were not tried",
                subject=url,
                hint="check the passphrase. If it is right, somebody has planted slots: remove those under keys/ that "
                "are newer than the object config, and keep a copy of each",
            )
        return self._damaged or wrong_passphrase(url, mistyped_groups(self._secret))


def parse(data: bytes, *, subject: str) -> KeySlot:
    """A slot as stored. Raises Corrupt, or Unsupported for one that a newer snapchain made."""
    return parse_stored(KeySlot, data, what="the key slot", subject=subject)


def wrong_passphrase(url: str, mistyped: Sequence[int] = ()) -> WrongPassphrase:
    """The error for a passphrase that opens no slot. mistyped: groups of a recovery key, from 1"""
    if mistyped:
        groups = f"group {mistyped[0]} has" if len(mistyped) == 1 else f"groups {', '.join(map(str, mistyped))} have"
        return WrongPassphrase(
            f"wrong passphrase: as a recovery key, its {groups} a mistake",
            subject=url,
            hint="compare each character of the group with the paper",
        )
    return WrongPassphrase(
        "wrong passphrase, or the repository's configuration was altered",
        subject=url,
        hint="check what was typed, or what SNAPCHAIN_PASSWORD, --password-file or --password-command gives",
    )


def _bound(config: bytes) -> bytes:
    return b"snapchain 1 key slot" + blake3.blake3(config).digest()
