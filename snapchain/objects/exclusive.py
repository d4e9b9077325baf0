"""Create an object that must not exist, on any store.

Where the store's `create` is atomic, that is all.  Elsewhere writers claim the name first (Lamport's flags): each puts
`<name>.claim.<nonce>` and then lists the claims; a writer that sees no other claim may write.  Of two writers, at
least the one that lists last sees the other's claim, so they never both write.

Guaranteed, when every writer comes through here, and puts are visible to lists and reads at once: of all concurrent
calls for one name at most one says True, and what it wrote is never overwritten.

Not guaranteed:
- A claim older than CLAIM_LIFE by the store's clock is taken for a dead writer's and removed.  A writer that stalled
  longer than LONGEST_STALL before its write gives up by itself; but a single PUT that is delayed *on its way* for the
  rest of CLAIM_LIFE (a virtual machine frozen between the look at the clock and the send) can still land late.
- A writer that dies between claim and write blocks that name for CLAIM_LIFE; others get Conflict meanwhile.
- Another program that writes the name is noticed only when it does so between our write and our reading back.
"""

from __future__ import annotations

import random
import re
import secrets
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from snapchain.errors import Conflict, NotFound, SnapchainError, Unavailable
from snapchain.objects.store import Data, ObjectInfo, ObjectStore, Refused, joined, valid_name

CLAIM_LIFE = 600.0
LONGEST_STALL = 60.0
PATIENCE = 30.0
"""Seconds: how long a call contends for a name before it gives up with Conflict."""
RELIST = 0.05
LONGEST_PAUSE = 1.0

_CLAIM = re.compile(r".+\.claim\.[0-9a-f]{16}")


def boot_time() -> float:
    """Seconds since boot, counting the time that the machine slept: a stall is a stall."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


@dataclass(frozen=True, slots=True)
class Clockwork:
    """Time as the protocol sees it; tests put their own."""

    now: Callable[[], float] = boot_time
    sleep: Callable[[float], None] = time.sleep


def is_claim(name: str) -> bool:
    """Whether an object is a claim: no content, and garbage once it is older than CLAIM_LIFE."""
    return _CLAIM.fullmatch(name) is not None


def create_exclusively(
    store: ObjectStore,
    name: str,
    data: Data,
    *,
    conditional: bool,
    clockwork: Clockwork = Clockwork(),
) -> bool:
    """True: the object is there with our bytes, and was not before.  False: somebody else's is.

    conditional: what the probe found.  `data` should hold something that only this writer writes (a nonce), by which a
    lost reply is distinguished from a lost race.  Raises Conflict when the name stays contended for PATIENCE;
    Unavailable when it is not known whether the object was made.
    """
    body = joined(data)
    valid_name(name)
    if conditional:
        try:
            return store.create(name, body)
        except Unavailable as doubt:
            return _settled(store, name, body, doubt)
    until = clockwork.now() + PATIENCE
    pause = RELIST
    while True:
        if store.size(name) is not None:
            return False
        outcome = _Claim(store, name, body, clockwork).outcome(until)
        if outcome is not None:
            return outcome
        if clockwork.now() > until:
            raise Conflict(
                "others hold claims on this name",
                subject=name,
                hint=f"run it again; the claim of a writer that died ends after {CLAIM_LIFE / 60:.0f} minutes",
            )
        clockwork.sleep(random.uniform(0, pause))  # noqa: S311
        pause = min(LONGEST_PAUSE, 2 * pause)


class _Claim:
    """One attempt to be alone with a name."""

    def __init__(self, store: ObjectStore, name: str, body: bytes, clockwork: Clockwork) -> None:
        self._store = store
        self._name = name
        self._body = body
        self._clockwork = clockwork
        self._claim = valid_name(f"{name}.claim.{secrets.token_hex(8)}")
        self._writing = False

    def outcome(self, until: float) -> bool | None:
        """As create_exclusively; None when another claim has to go first."""
        begun = self._clockwork.now()
        try:
            self._store.put(self._claim, b"")
            if not self._alone(min(until, begun + LONGEST_STALL / 2)):
                return None
            if self._store.size(self._name) is not None:
                return False
            if self._clockwork.now() - begun > LONGEST_STALL:
                return None
            self._write()
            return True
        finally:
            # A write that may still be on its way keeps its claim, which keeps the others away until it is dead.
            if not self._writing:
                retire(self._store, self._claim)  # where it stays, it is garbage

    def _alone(self, until: float) -> bool:
        """Whether no other claim lives; the one with the lowest name waits for the others to withdraw."""
        while True:
            listed = self._store.list(f"{self._name}.claim.")
            claims = {info.name: info.modified for info in listed if not is_retired(info)}
            if self._claim not in claims:  # somebody held us for dead
                return False
            ours = claims.pop(self._claim)
            for claim, modified in list(claims.items()):
                if ours is not None and modified is not None and ours - modified > CLAIM_LIFE:
                    retire(self._store, claim)
                    del claims[claim]
            if not claims:
                return True
            if min(claims) < self._claim or self._clockwork.now() > until:
                return False
            self._clockwork.sleep(RELIST * random.uniform(0.5, 1))  # noqa: S311

    def _write(self) -> None:
        self._writing = True
        try:
            self._store.put(self._name, self._body)
        except Unavailable as doubt:
            if not _settled(self._store, self._name, self._body, doubt):
                raise
        there = self._store.get(self._name)
        self._writing = False
        if there != self._body:
            raise Conflict("another program overwrote the object", subject=self._name)


def _settled(store: ObjectStore, name: str, body: bytes, doubt: Unavailable) -> bool:
    """Whether the object that is there is ours; raises `doubt` when none is."""
    try:
        return store.get(name) == body
    except NotFound:
        raise doubt from None


# --- Take back a lease or a claim, also where nothing can be deleted.
#
# A key without the permission to delete, or a bucket whose objects are locked, would leave leases and claims as if
# their holders were at work, and block others until they count as dead. So one that cannot be deleted is overwritten
# with RETIRED, and an object of exactly that size counts as gone. gc deletes it.

RETIRED = b"retired\n"
"""No lease or claim has this size: a sealed lease is longer than 64 bytes, a claim is empty."""


def retire(store: ObjectStore, name: str) -> SnapchainError | None:
    """Delete the object, or else make it count as gone. Returns why it could not be deleted. Raises nothing."""
    try:
        store.delete(name)
    except SnapchainError as error:
        if isinstance(error, Refused):
            with suppress(SnapchainError):  # then its age decides
                store.put(name, RETIRED)
        return error
    return None


def stays(size: int | None) -> bool:
    """Whether an object of this size (None: no object) does not count as gone."""
    return size is not None and size != len(RETIRED)


def is_retired(info: ObjectInfo) -> bool:
    """Whether the object counts as gone."""
    return not stays(info.size)
