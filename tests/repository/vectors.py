"""The known answers of docs/format.md, section 15, made with the package from fixed keys, ids and salts.

`python -m tests.repository.vectors` writes them into the document.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import numpy as np
import zstandard
from blake3 import blake3

from snapchain.model.content import LEAF_BYTES, ZERO_LEAF, Sum, content_id, leaf_hash, sum_of
from snapchain.repository import keys as slots
from snapchain.repository.crypto import AES, CHACHA, NONE, Keyring, derive
from snapchain.repository.envelope import seal
from snapchain.repository.format import LEAF_ROW, RUN_ROW
from snapchain.repository.packs import ClosedPack, OpenPack, packed
from snapchain.repository.pages import Page

DOCUMENT = Path(__file__).parents[2] / "docs" / "format.md"
PASSPHRASE = "correct horse battery staple"
REPOSITORY = bytes(range(16)).hex()
MASTER = bytes(range(0x20, 0x40))
SALT = bytes(range(0x60, 0x80))
PACK = bytes(range(0x80, 0x90)).hex()
RECORD_NAME = "disks/00/00000000000000000001"
BODY = b"snapchain"
CONFIG = (
    f'{{"format":1,"id":"{REPOSITORY}","created":"2026-01-02T03:04:05Z","encryption":"aes-256-gcm",'
    '"block_size":262144,"conditional_put":true}'
)
BLOBS = (BODY, bytes(1000))
_BLOCK = re.compile(r"(?<=```text\n)(?:@@VECTORS@@|repository = .*?)\n(?=```)", re.DOTALL)


def pattern(count: int) -> bytes:
    """The bytes that stand for guest data."""
    return bytes(at * at % 251 for at in range(count))


def keyring(suite: str) -> Keyring:
    return Keyring(suite, REPOSITORY, Keyring.public_master(REPOSITORY) if suite == NONE else MASTER)


def blob_id(keys: Keyring, plain: bytes) -> bytes:
    return keys.blob_id(b"".join(blake3(plain[at : at + 65536]).digest() for at in range(0, len(plain), 65536)))


def vectors() -> dict[str, str]:
    """All vectors, in the order of the document."""
    aes = keyring(AES)
    found = {
        "repository": REPOSITORY,
        "master": MASTER.hex(),
        "config": CONFIG,
        "slot": _slot(),
        "pack root": derive(MASTER, "pack").hex(),
        "record root": derive(MASTER, "record").hex(),
        "id key": derive(MASTER, "id").hex(),
        "name key": derive(MASTER, "name").hex(),
        "none.master": Keyring.public_master(REPOSITORY).hex(),
        "DISK of web1/vda": aes.disk_key("web1/vda"),
    }
    found |= {f"id of pattern({n})": blob_id(aes, pattern(n)).hex() for n in (1, 65536, 65537, 200000)}
    for suite in (AES, CHACHA, NONE):
        with mock.patch("snapchain.repository.envelope.secrets.token_bytes", return_value=SALT):
            found[f"record {suite}"] = seal(keyring(suite), b"C", RECORD_NAME, BODY).hex()
    found["pack.id"] = PACK
    for suite in (AES, CHACHA, NONE):
        found[f"pack {suite}"] = b"".join(closed_pack(suite).parts).hex()
    found["page"] = _page(closed_pack(AES)).hex()
    for name, size, disk in disks():
        found[f"content id of {name}"] = content_id(size, content_sum(disk))
    found["first lanes of the last sum"] = content_sum(pattern(200000))[:8].astype("<u2").tobytes().hex()
    return found


def disks() -> Iterator[tuple[str, int, bytes]]:
    """(what it is, size, content)"""
    yield "a disk of 0 bytes", 0, b""
    for size in (65535, 65536):
        yield f"{size} zeroes", size, bytes(size)
    yield "pattern(512)", 512, pattern(512)
    yield "65536 zeroes and pattern(512)", 66048, bytes(65536) + pattern(512)
    yield "pattern(200000)", 200000, pattern(200000)


def content_sum(disk: bytes) -> Sum:
    hashes = [leaf_hash(disk[at : at + LEAF_BYTES]) for at in range(0, len(disk), LEAF_BYTES)]
    index = np.array([at for at, digest in enumerate(hashes) if digest != ZERO_LEAF], np.int64)
    shown = b"".join(digest for digest in hashes if digest != ZERO_LEAF)
    return sum_of(index, np.frombuffer(shown, np.uint8).reshape(-1, 32))


def closed_pack(suite: str) -> ClosedPack:
    keys = keyring(suite)
    with mock.patch("snapchain.repository.packs.fresh_id", return_value=PACK):
        pack = OpenPack(keys)
    for plain in BLOBS:
        pack.add(blob_id(keys, plain), packed(zstandard.ZstdCompressor(level=1), plain), len(plain))
    return pack.close()


def _slot() -> str:
    salt = base64.b64encode(SALT).decode()
    slot = slots.KeySlot(memory_kib=65536, iterations=3, lanes=4, salt=salt, wrapped="")
    with mock.patch("snapchain.repository.keys.KeySlot", return_value=slot):
        return slots.wrap(MASTER, PASSPHRASE, CONFIG.encode()).model_dump_json()


def _page(pack: ClosedPack) -> bytes:
    runs = np.zeros(3, RUN_ROW)
    runs["start"] = 0, 65536, 131072
    runs["length"] = 4096, 9, 100
    for run, blob in ((1, 0), (2, 1)):
        runs["id"][run] = pack.ids[blob]
        for column in ("offset", "stored", "raw"):
            runs[column][run] = pack.rows[column][blob]
    runs["skip"] = 0, 0, 100
    leaves = np.zeros(1, LEAF_ROW)
    leaves["index"] = 1
    leaves["hash"] = np.frombuffer(leaf_hash(BODY), np.uint8)
    return Page(runs, leaves, [PACK]).encode()


def read_document() -> dict[str, str]:
    """The vectors as they stand in the document."""
    (block,) = _BLOCK.findall(DOCUMENT.read_text())
    found: dict[str, str] = {}
    name = ""
    for line in block.splitlines():
        if line.startswith("  "):
            found[name] += line.strip()
        else:
            name, _, value = line.partition(" = ")
            found[name] = value
    return found


def _written(name: str, value: str) -> str:
    if len(name) + len(value) < 115 or value.startswith("{"):
        return f"{name} = {value}\n"
    return f"{name} = \n" + "".join(f"  {value[at : at + 112]}\n" for at in range(0, len(value), 112))


def main() -> None:
    """Write the vectors into the document."""
    block = "".join(_written(name, value) for name, value in vectors().items())
    text, count = _BLOCK.subn(lambda _: block, DOCUMENT.read_text())
    assert count == 1
    DOCUMENT.write_text(text)


if __name__ == "__main__":
    main()
