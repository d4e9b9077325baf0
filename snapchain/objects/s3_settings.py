"""How S3 is to keep objects: storage class, encryption at the server, Object Lock. From the environment.

    SNAPCHAIN_S3_STORAGE_CLASS    of packs, which are most of the bytes: STANDARD_IA, GLACIER_IR, or another
    SNAPCHAIN_S3_SSE              encryption at the server: AES256, aws:kms or aws:kms:dsse
    SNAPCHAIN_S3_SSE_KMS_KEY_ID   the key for that, if it is not the bucket's own
    SNAPCHAIN_S3_LOCK_MODE        Object Lock of packs, layer records and generations: GOVERNANCE or COMPLIANCE
    SNAPCHAIN_S3_LOCK_DAYS        for so many days after each was written

Only packs have a storage class: everything else is small and read by every command.  Classes for cold data bill at
least 128 KB an object and 30 days, and a deletion before that.  A class that cannot be read at once is refused: packs
hold the maps of layers, too, which gc, merge and restore read.

Locked is what a restore needs and what is written once.  Not leases and claims, which others wait for, and not indexes:
gc puts new ones in the place of all old ones, and they can be made again from the packs.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from snapchain.errors import InvalidInput

STORAGE_CLASS = "SNAPCHAIN_S3_STORAGE_CLASS"
SSE = "SNAPCHAIN_S3_SSE"
KMS_KEY = "SNAPCHAIN_S3_SSE_KMS_KEY_ID"
_ENCRYPTIONS = ("AES256", "aws:kms", "aws:kms:dsse")
_NOT_AT_ONCE = frozenset({"GLACIER", "DEEP_ARCHIVE"})
_PACKS = "packs/"
LOCK_MODE = "SNAPCHAIN_S3_LOCK_MODE"
LOCK_DAYS = "SNAPCHAIN_S3_LOCK_DAYS"
_MODES = ("GOVERNANCE", "COMPLIANCE")
_MOST_DAYS = 36_500
_LOCKED = re.compile(r"packs/.+|layers/[^/.]+|disks/[^/]+/[0-9]{20}", re.ASCII)


@dataclass(frozen=True, slots=True)
class S3Settings:
    """storage_class: of packs; encryption, key: at the server; None: as the bucket has it.

    lock_mode, lock_days: of Object Lock, None and 0 for none
    """

    storage_class: str | None = None
    encryption: str | None = None
    key: str | None = None
    lock_mode: str | None = None
    lock_days: int = 0

    def of(self, name: str, now: datetime) -> dict[str, Any]:
        """The arguments of PutObject for an object of this name. now: with a time zone"""
        found: dict[str, Any] = {}
        if self.storage_class is not None and name.startswith(_PACKS):
            found["StorageClass"] = self.storage_class
        if self.encryption is not None:
            found["ServerSideEncryption"] = self.encryption
        if self.key is not None:
            found["SSEKMSKeyId"] = self.key
        if self.lock_mode is not None and _LOCKED.fullmatch(name):
            found["ObjectLockMode"] = self.lock_mode
            found["ObjectLockRetainUntilDate"] = now + timedelta(days=self.lock_days)
        return found


AS_THE_BUCKET = S3Settings()


def settings_of(environment: Mapping[str, str]) -> S3Settings:
    """What the variables say. Raises InvalidInput for what cannot be meant; an empty one counts as not set."""
    storage_class, encryption, key = (environment.get(name) or None for name in (STORAGE_CLASS, SSE, KMS_KEY))
    if storage_class in _NOT_AT_ONCE:
        raise InvalidInput(
            f"{STORAGE_CLASS}: packs in {storage_class} cannot be read at once, and each gc, merge and restore does",
            hint="GLACIER_IR, STANDARD_IA, or INTELLIGENT_TIERING without its archive tiers",
        )
    if encryption is not None and encryption not in _ENCRYPTIONS:
        raise InvalidInput(f"{SSE}: unknown encryption {encryption!r}", hint=f"one of {', '.join(_ENCRYPTIONS)}")
    if key is not None and (encryption is None or encryption == "AES256"):
        raise InvalidInput(f"{KMS_KEY} is set, and {SSE} names no encryption with such a key", hint=f"{SSE}=aws:kms")
    return S3Settings(storage_class, encryption, key, *_lock_of(environment))


def _lock_of(environment: Mapping[str, str]) -> tuple[str | None, int]:
    mode, days = environment.get(LOCK_MODE) or None, environment.get(LOCK_DAYS) or None
    if mode is None and days is None:
        return None, 0
    if mode is None or days is None:
        missing, other = (LOCK_MODE, LOCK_DAYS) if mode is None else (LOCK_DAYS, LOCK_MODE)
        raise InvalidInput(f"{other} is set, and {missing} is not", hint="Object Lock needs both")
    if mode not in _MODES:
        raise InvalidInput(f"{LOCK_MODE}: unknown mode {mode!r}", hint=f"one of {', '.join(_MODES)}")
    if not days.isascii() or not days.isdecimal() or not 1 <= int(days) <= _MOST_DAYS:
        raise InvalidInput(f"{LOCK_DAYS}: {days!r} is no number of days", hint=f"1 to {_MOST_DAYS}, such as 30")
    return mode, int(days)
