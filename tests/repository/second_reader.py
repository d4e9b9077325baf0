"""A second reader of repositories in a directory, written from docs/format.md alone: no code of the package is used.

It shows that the document is enough.  It is written to be compared with it, section by section, not to be fast: a
disk is held in memory, and there is no Python below the level of a run or a leaf that could be left out.
"""

from __future__ import annotations

import base64
import json
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import zstandard
from blake3 import blake3
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.argon2 import Argon2id
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

LEAF = 65536
MiB = 1 << 20

# Section 1, "Versions": what else is there was made by a newer program.
CONFIG_FIELDS = {"format", "id", "created", "encryption", "block_size", "conditional_put"}
SLOT_FIELDS = {"format", "kdf", "memory_kib", "iterations", "lanes", "salt", "wrapped"}
LAYER_FIELDS = {
    "format", "id", "size", "time", "name", "image_format", "cluster_size", "sources", "replaces",
    "data_bytes", "zero_bytes", "content_sum", "content_id",
}  # fmt: skip
CATALOGUE_FIELDS = {
    "format", "disk", "generation", "previous", "nonce", "time", "epoch", "next_point", "points", "parents",
}  # fmt: skip
POINT_FIELDS = {"point", "time", "labels", "layer", "size", "content_id"}

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


@dataclass(frozen=True)
class Run:
    """where: None for ZERO."""

    start: int
    length: int
    blob: bytes
    where: Location | None
    skip: int


@dataclass(frozen=True)
class Layer:
    header: Json
    runs: Sequence[Run]
    leaves: Mapping[int, bytes]
    pages: Sequence[tuple[int, int, Location]]

    @property
    def size(self) -> int:
        return int(self.header["size"])

    def touched(self) -> set[int]:
        return {leaf for run in self.runs for leaf in range(run.start // LEAF, -(-(run.start + run.length) // LEAF))}


# ---------------------------------------------------------------------------------------------- 5. keys and suites


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


def load_json(text: bytes, fields: set[str]) -> Json:
    found = json.loads(text)
    if found["format"] != 1 or set(found) - fields:
        raise Newer("json")
    if fields - set(found):
        raise Damaged("json")
    return dict(found)


# ------------------------------------------------------------------------------------------------------ 8. pages


def parse_page(body: bytes) -> tuple[list[Run], dict[int, bytes]]:
    packs, runs, leaves, _ = struct.unpack_from("<IIII", body)
    at = 16 + 16 * packs
    if len(body) != at + 68 * runs + 40 * leaves:
        raise Damaged("page")
    table = [body[place : place + 16].hex() for place in range(16, at, 16)]
    found = []
    for n in range(runs):
        start, length, blob, pack, offset, stored, raw, skip = struct.unpack_from("<QQ32sIIIII", body, at + 68 * n)
        if length == 0 or (stored and skip + length > raw):
            raise Damaged("run")
        found.append(Run(start, length, blob, Location(table[pack], offset, stored, raw) if stored else None, skip))
    at += 68 * runs
    return found, dict(struct.unpack_from("<Q32s", body, at + 40 * n) for n in range(leaves))


# ------------------------------------------------------------------------------------------------ 10. content id


def leaf_hash(leaf: bytes) -> bytes:
    return blake3(leaf + bytes(LEAF - len(leaf))).digest()


def sum_of(leaves: Mapping[int, bytes]) -> list[int]:
    key = blake3(b"snapchain content element").digest()
    total = [0] * 1024
    for index, digest in leaves.items():
        element = struct.unpack("<1024H", blake3(struct.pack("<Q", index) + digest, key=key).digest(length=2048))
        total = [(one + other) & 0xFFFF for one, other in zip(total, element, strict=True)]
    return total


def content_id_of(size: int, total: Sequence[int]) -> str:
    key = blake3(b"snapchain content id").digest()
    return blake3(struct.pack("<Q1024H", size, *total), key=key).hexdigest()


def leaves_of(disk: bytes) -> dict[int, bytes]:
    pieces = ((at // LEAF, disk[at : at + LEAF]) for at in range(0, len(disk), LEAF))
    return {index: leaf_hash(leaf) for index, leaf in pieces if any(leaf)}


def content_id(disk: bytes) -> str:
    return content_id_of(len(disk), sum_of(leaves_of(disk)))


def leaves_shown(layers: Sequence[Layer]) -> dict[int, bytes]:
    """The leaves of a chain, composed from those that its layers list (end of section 9)."""
    found: dict[int, bytes] = {}
    touched = [layer.touched() for layer in layers]
    for leaf in range(-(-layers[-1].size // LEAF)):
        for layer, touches in zip(reversed(layers), reversed(touched), strict=True):
            if layer.size <= leaf * LEAF:
                break
            if leaf in touches:
                if leaf in layer.leaves:
                    found[leaf] = layer.leaves[leaf]
                break
    return found


# ---------------------------------------------------------------------------------------------------- the reader


def master_key(slot: bytes, passphrase: str, config: bytes) -> bytes | None:
    """4. Key slots."""
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


class Reader:
    """A repository in a directory."""

    def __init__(self, root: Path, passphrase: str | None = None) -> None:
        self._root = root
        text = self._get("config")
        self.config = load_json(text, CONFIG_FIELDS)
        suite, repository = self.config["encryption"], bytes.fromhex(self.config["id"])
        if suite == "none" and passphrase is not None:
            raise Damaged("a passphrase was given, and the repository says that it has none")
        self.keys = Keys(suite, repository, self._master(text, passphrase, suite, repository))

    def _get(self, name: str) -> bytes:
        return self._root.joinpath(name).read_bytes()

    def _master(self, config: bytes, passphrase: str | None, suite: str, repository: bytes) -> bytes:
        if suite == "none":
            return public_master(repository)
        for slot in sorted((self._root / "keys").iterdir()):
            master = master_key(slot.read_bytes(), passphrase or "", config)
            if master is not None:
                return master
        raise Damaged("no slot opens with this passphrase")

    # 9. Catalogues

    def disks(self) -> dict[str, Json]:
        """The newest catalogue of each disk, by name."""
        newest = [self._newest(folder.name) for folder in sorted(self._root.glob("disks/*"))]
        return {catalogue["disk"]: catalogue for catalogue in newest}

    def generations(self, disk: str) -> list[Json]:
        """All generations that are there, oldest first; the links between them are checked."""
        folder = self._root / "disks" / self.keys.folder(disk)
        numbers = sorted(entry.name for entry in folder.iterdir() if len(entry.name) == 20 and entry.name.isdecimal())
        found, before = [], ""
        for number in numbers:
            found.append(self._catalogue(folder.name, number))
            if before and found[-1]["previous"] != before:
                raise Damaged("previous")
            before = blake3(self._get(f"disks/{folder.name}/{number}")).hexdigest()
        return found

    def _newest(self, folder: str) -> Json:
        entries = (self._root / "disks" / folder).iterdir()
        return self._catalogue(folder, max(e.name for e in entries if len(e.name) == 20 and e.name.isdecimal()))

    def _catalogue(self, folder: str, number: str) -> Json:
        name = f"disks/{folder}/{number}"
        found = load_json(self.keys.unseal(b"C", name, self._get(name)), CATALOGUE_FIELDS)
        if found["generation"] != int(number) or self.keys.folder(found["disk"]) != folder:
            raise Damaged("generation")
        for point in found["points"]:
            if set(point) != POINT_FIELDS:
                raise Newer("point")
        return found

    # 8. Layers

    def layer(self, layer: str) -> Layer:
        name = f"layers/{layer}"
        body = self.keys.unseal(b"L", name, self._get(name))
        (length,) = struct.unpack_from("<I", body)
        header = load_json(body[4 : 4 + length], LAYER_FIELDS)
        total = struct.unpack("<1024H", base64.b64decode(header["content_sum"]))
        if header["id"] != layer or content_id_of(header["size"], total) != header["content_id"]:
            raise Damaged("header")
        runs: list[Run] = []
        leaves: dict[int, bytes] = {}
        pages, data_bytes, zero_bytes = [], 0, 0
        for first, stop, blob, pack, offset, stored, raw, data, zero in struct.iter_unpack(
            "<QQ32s16sIIIQQ", body[4 + length :]
        ):
            where = Location(pack.hex(), offset, stored, raw)
            page_runs, page_leaves = parse_page(self.blob(blob, where))
            if page_runs and not (first <= page_runs[0].start and page_runs[-1].start + page_runs[-1].length <= stop):
                raise Damaged("page range")
            if data != sum(run.length for run in page_runs if run.where):
                raise Damaged("data")
            if zero != sum(run.length for run in page_runs if not run.where):
                raise Damaged("zero")
            runs += page_runs
            leaves |= page_leaves
            pages.append((first, stop, where))
            data_bytes, zero_bytes = data_bytes + data, zero_bytes + zero
        if any(lower.start + lower.length > upper.start for lower, upper in pairwise(runs)):
            raise Damaged("runs overlap")
        if (data_bytes, zero_bytes) != (header["data_bytes"], header["zero_bytes"]):
            raise Damaged("header sums")
        return Layer(header, runs, leaves, pages)

    def blob(self, blob: bytes, where: Location) -> bytes:
        with self._root.joinpath("packs", where.pack[:2], where.pack).open("rb") as file:
            file.seek(where.offset)
            return self.keys.blob(blob, where, file.read(where.stored))

    # 9. Reading a point

    def chain(self, disk: str, number: int) -> list[Layer]:
        catalogue = self.disks()[disk]
        (point,) = [point for point in catalogue["points"] if point["point"] == number]
        chain: list[str] = []
        at = point["layer"]
        while at is not None:
            if at in chain or at not in catalogue["parents"]:
                raise Damaged("chain")
            chain.append(at)
            at = catalogue["parents"][at]
        layers = [self.layer(layer) for layer in reversed(chain)]
        if (layers[-1].size, layers[-1].header["content_id"]) != (point["size"], point["content_id"]):
            raise Damaged("point")
        return layers

    def restore(self, disk: str, number: int) -> bytes:
        """The guest-visible bytes of a point."""
        return self.compose(self.chain(disk, number))

    def compose(self, layers: Sequence[Layer]) -> bytes:
        view = bytearray()
        for layer in layers:
            del view[layer.size :]
            view += bytes(layer.size - len(view))
            for run in layer.runs:
                stop = min(run.start + run.length, layer.size)
                plain = self.blob(run.blob, run.where) if run.where else bytes(run.length)
                view[run.start : stop] = plain[run.skip : run.skip + stop - run.start] if run.where else plain
        return bytes(view)

    # 6 and 7. What only writers and repair tools read

    def directories(self) -> Iterator[tuple[bytes, Location]]:
        """Every blob in every pack, by the packs' own directories."""
        for path in sorted(self._root.glob("packs/??/*")):
            yield from self.keys.directory(path.name, path.read_bytes())

    def indexed(self) -> Iterator[tuple[bytes, Location]]:
        """Every blob that an index lists."""
        for path in sorted((self._root / "index").iterdir()):
            body = self.keys.unseal(b"I", f"index/{path.name}", path.read_bytes())
            packs, blobs = struct.unpack_from("<II", body)
            table = [struct.unpack_from("<16sQ", body, 8 + 24 * n) for n in range(packs)]
            at, rows = 8 + 24 * packs, 8 + 24 * packs + 32 * blobs
            if len(body) != rows + 16 * blobs:
                raise Damaged("index")
            for pack, size in table:
                if self._root.joinpath("packs", pack.hex()[:2], pack.hex()).stat().st_size != size:
                    raise Damaged("size of a pack")
            for n in range(blobs):
                pack, offset, stored, raw = struct.unpack_from("<IIII", body, rows + 16 * n)
                yield body[at + 32 * n : at + 32 * n + 32], Location(table[pack][0].hex(), offset, stored, raw)
