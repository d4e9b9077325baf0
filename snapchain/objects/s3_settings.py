"""How S3 is to keep objects: the storage class of packs, and the encryption at the server. From the environment.

    SNAPCHAIN_S3_STORAGE_CLASS    of packs, which are most of the bytes: STANDARD_IA, GLACIER_IR, or another
    SNAPCHAIN_S3_SSE              encryption at the server: AES256, aws:kms or aws:kms:dsse
    SNAPCHAIN_S3_SSE_KMS_KEY_ID   the key for that, if it is not the bucket's own

Only packs have a storage class: everything else is small and read by every command.  Classes for cold data bill at
least 128 KB an object and 30 days, and a deletion before that.  A class that cannot be read at once is refused: packs
hold the maps of layers, too, which gc, merge and restore read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from snapchain.errors import InvalidInput

STORAGE_CLASS = "SNAPCHAIN_S3_STORAGE_CLASS"
SSE = "SNAPCHAIN_S3_SSE"
KMS_KEY = "SNAPCHAIN_S3_SSE_KMS_KEY_ID"
_ENCRYPTIONS = ("AES256", "aws:kms", "aws:kms:dsse")
_NOT_AT_ONCE = frozenset({"GLACIER", "DEEP_ARCHIVE"})
_PACKS = "packs/"


@dataclass(frozen=True, slots=True)
class S3Settings:
    """storage_class: of packs; encryption, key: at the server; None: as the bucket has it."""

    storage_class: str | None = None
    encryption: str | None = None
    key: str | None = None

    def of(self, name: str) -> dict[str, str]:
        """The arguments of PutObject for an object of this name."""
        found: dict[str, str] = {}
        if self.storage_class is not None and name.startswith(_PACKS):
            found["StorageClass"] = self.storage_class
        if self.encryption is not None:
            found["ServerSideEncryption"] = self.encryption
        if self.key is not None:
            found["SSEKMSKeyId"] = self.key
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
    return S3Settings(storage_class, encryption, key)
