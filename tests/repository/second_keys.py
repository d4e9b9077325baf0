"""The second reader's keys and ciphers: sections 4 to 6 of docs/format.md, without any code of the package."""

from __future__ import annotations

import base64
import json
import struct
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any

import zstandard
from blake3 import blake3
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.argon2 import Argon2id
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

MiB = 1 << 20
SLOT_FIELDS = {"format", "kdf", "memory_kib", "iterations", "lanes", "salt", "wrapped"}

Json = dict[str, Any]


class Damaged(Exception):
    """The repository is not as the document says."""


class Newer(Exception):
    """The repository was made by a newer program."""


@dataclass(frozen=True)
class Location:
    pack: str
    offset: int
    stored: int
    raw: int


def load_json(text: bytes, fields: set[str], optional: AbstractSet[str] = frozenset()) -> Json:
    found = json.loads(text)
    if found["format"] > 1:
        raise Newer("format")
    check_fields(found, fields, optional)
    return dict(found)


def check_fields(found: Json, fields: set[str], optional: AbstractSet[str] = frozenset()) -> None:
    if fields - set(found) - optional:
        raise Damaged("json")
    if set(found) - fields:
        raise Newer("json")


# 4. Key slots


def master_key(slot: bytes, passphrase: str, config: bytes) -> bytes | None:
    """The master key, None when the slot is another passphrase's."""
    found = load_json(slot, SLOT_FIELDS)
    memory, iterations, lanes = found["memory_kib"], found["iterations"], found["lanes"]
    if found["kdf"] != "argon2id" or not (8 <= memory <= 1 << 20 and 1 <= iterations <= 16 and 1 <= lanes <= 16):
        raise Newer("slot")
    salt, wrapped = base64.b64decode(found["salt"]), base64.b64decode(found["wrapped"])
    kdf = Argon2id(salt=salt, length=32, iterations=iterations, lanes=lanes, memory_cost=memory)
    bound = b"snapchain 1 key slot" + blake3(config).digest()
    try:
        return ChaCha20Poly1305(kdf.derive(passphrase.encode())).decrypt(bytes(12), wrapped, bound)
    except InvalidTag:
        return None


def salt_of(slot: bytes) -> str:
    """The salt of a slot, as the list of key slots has it."""
    return base64.b64decode(load_json(slot, SLOT_FIELDS)["salt"]).hex()


def digest_of(slot: bytes) -> str:
    """The digest of a slot, as the list of key slots has it."""
    found = load_json(slot, SLOT_FIELDS)
    costs = struct.pack("<III", found["memory_kib"], found["iterations"], found["lanes"])
    return blake3(base64.b64decode(found["salt"]) + base64.b64decode(found["wrapped"]) + costs).hexdigest()


# 5. Keys and suites


def hkdf(key: bytes, salt: bytes, use: str) -> bytes:
    return HKDF(algorithm=SHA256(), length=32, salt=salt or None, info=b"snapchain 1 " + use.encode()).derive(key)


def public_master(repository: bytes) -> bytes:
    return hkdf(repository, b"", "no encryption")


class Keys:
    def __init__(self, suite: str, repository: bytes, master: bytes) -> None:
        if suite not in {"aes-256-gcm", "chacha20-poly1305", "none"}:
            raise Newer(suite)
        self.suite, self.repository = suite, repository
        self.pack_root, self.record_root = hkdf(master, b"", "pack"), hkdf(master, b"", "record")
        self.id_key, self.name_key = hkdf(master, b"", "id"), hkdf(master, b"", "name")

    def folder(self, disk: str) -> str:
        return blake3(disk.encode(), key=self.name_key).hexdigest()[:32]

    def blob_id(self, plain: bytes) -> bytes:
        pieces = b"".join(blake3(plain[at : at + 65536]).digest() for at in range(0, len(plain), 65536))
        return blake3(pieces, key=self.id_key).digest()

    def decrypt(self, key: bytes, nonce: bytes, text: bytes, bound: bytes) -> bytes:
        try:
            if self.suite == "aes-256-gcm":
                return AESGCM(key).decrypt(nonce, text, bound)
            if self.suite == "chacha20-poly1305":
                return ChaCha20Poly1305(key).decrypt(nonce, text, bound)
        except InvalidTag as error:
            raise Damaged("tag") from error
        plain, tag = text[:-16], text[-16:]
        if blake3(struct.pack("<Q", len(bound)) + bound + nonce + plain, key=key).digest()[:16] != tag:
            raise Damaged("tag")
        return plain

    # Sealed records

    def unseal(self, kind: bytes, name: str, data: bytes) -> bytes:
        check_head(data, kind)
        head, salt, text = data[:16], data[16:48], data[48:]
        key = hkdf(self.record_root, salt, "record")
        return unpack(self.decrypt(key, bytes(12), text, head + self.repository + name.encode()), 256 * MiB)

    # 6. Packs, blobs, ids

    def blob(self, blob: bytes, where: Location, text: bytes) -> bytes:
        if where.raw > 4 * MiB or where.stored > where.raw + 16:
            raise Damaged("limits")
        payload = self._in_pack(where.pack, where.offset, text, where.raw, blob)
        if len(payload) == where.raw:
            return payload
        plain = unpack(payload, 4 * MiB)
        if len(plain) != where.raw:
            raise Damaged("raw")
        return plain

    def directory(self, pack: str, data: bytes) -> list[tuple[bytes, Location]]:
        check_head(data, b"P")
        stored, count, end = struct.unpack("<II8s", data[-16:])
        if end != b"SNAPEND1":
            raise Damaged("trailer")
        at = len(data) - 16 - stored
        body = unpack(self._in_pack(pack, at, data[at : at + stored], count, b"directory"), 64 * MiB)
        if len(body) != count * 48:
            raise Damaged("directory")
        found = []
        for n in range(count):
            _, offset, size, raw = struct.unpack_from("<IIII", body, count * 32 + n * 16)
            found.append((body[n * 32 : n * 32 + 32], Location(pack, offset, size, raw)))
        return found

    def _in_pack(self, pack: str, offset: int, text: bytes, raw: int, blob: bytes) -> bytes:
        salt = bytes.fromhex(pack)
        bound = b"snapchain 1 blob" + self.repository + salt + struct.pack("<Q", raw) + blob
        return self.decrypt(hkdf(self.pack_root, salt, "pack"), offset.to_bytes(12, "little"), text, bound)


def check_head(data: bytes, kind: bytes) -> None:
    if data[:7] != b"SNAPCH" + kind:
        raise Damaged("head")
    if data[7] != 1 or data[8:16] != bytes(8):
        raise Newer("head")


def unpack(frame: bytes, limit: int) -> bytes:
    try:
        size = zstandard.frame_content_size(frame)
        if not 0 <= size <= limit:
            raise Damaged("frame")
        return zstandard.ZstdDecompressor().decompress(frame, max_output_size=limit)
    except zstandard.ZstdError as error:
        raise Damaged("frame") from error
