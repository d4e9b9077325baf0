"""A second reader of repositories in a directory, written from docs/format.md alone: no code of the package is used.

It shows that the document is enough.  It is written to be compared with it, section by section, not to be fast: a
disk is held in memory, and there is no Python below the level of a run or a leaf that could be left out.
"""

from __future__ import annotations

import base64
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from blake3 import blake3

from tests.repository.second_keys import (
    Damaged,
    Json,
    Keys,
    Location,
    Newer,
    check_fields,
    load_json,
    master_key,
    public_master,
    salt_of,
)

LEAF = 65536

# Section 1, "Versions": what else is there was made by a newer program.
CONFIG_FIELDS = {"format", "id", "created", "encryption", "block_size", "conditional_put"}
LAYER_FIELDS = {
    "format", "id", "size", "time", "name", "image_format", "cluster_size", "sources", "replaces",
    "data_bytes", "zero_bytes", "content_sum", "content_id", "made_by",
}  # fmt: skip
CATALOGUE_FIELDS = {
    "format", "disk", "generation", "previous", "nonce", "time", "epoch", "owner", "next_point", "points", "parents",
    "renamed_to", "renamed_from",
}  # fmt: skip
POINT_FIELDS = {
    "point", "time", "labels", "layer", "size", "content_id", "holds", "instant", "consistency", "made_by",
}  # fmt: skip
SLOT_LIST_FIELDS = {"format", "generation", "time", "slots", "removed", "made_by"}
LISTED_SLOT_FIELDS = {"slot", "salt", "digest", "created", "host", "label", "recovery", "made_by"}
REMOVED_SLOT_FIELDS = {"slot", "salt", "time", "host"}
HOLD_FIELDS = {"tag", "since", "reason"}
WORDS = {"offline", "application", "filesystem", "crash", None}
INDEX_NAME = "[0-9]{10}-[0-9a-f]{32}"
MAY_BE_MISSING = {"epoch", "owner", "holds", "instant", "consistency", "made_by", "renamed_to", "renamed_from"}


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
            text = slot.read_bytes()
            master = master_key(text, passphrase or "", config)
            if master is not None and salt_of(text) not in self._removed(Keys(suite, repository, master)):
                return master
        raise Damaged("no slot opens with this passphrase")

    def _removed(self, keys: Keys) -> set[str]:
        """The salts of the slots that were removed (end of section 4)."""
        found = self.slots(keys)
        return {each["salt"] for each in found["removed"]} if found else set()

    def slots(self, keys: Keys | None = None) -> Json | None:
        """The newest list of key slots that can be read."""
        numbers = [each.name for each in self._root.glob("slots/*") if len(each.name) == 20 and each.name.isdecimal()]
        for number in sorted((each for each in numbers if int(each) <= 10**12), reverse=True):
            name = f"slots/{number}"
            try:
                found = load_json((keys or self.keys).unseal(b"K", name, self._get(name)), SLOT_LIST_FIELDS)
            except Damaged:
                continue
            for each in found["slots"]:
                check_fields(each, LISTED_SLOT_FIELDS)
            for each in found["removed"]:
                check_fields(each, REMOVED_SLOT_FIELDS)
            if found["generation"] == int(number):
                return found
        return None

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
        found = load_json(self.keys.unseal(b"C", name, self._get(name)), CATALOGUE_FIELDS, MAY_BE_MISSING)
        if found["generation"] != int(number) or self.keys.folder(found["disk"]) != folder:
            raise Damaged("generation")
        for point in found["points"]:
            check_fields(point, POINT_FIELDS, MAY_BE_MISSING)
            if point.get("consistency") not in WORDS:
                raise Newer("consistency")
            for hold in point.get("holds", ()):
                check_fields(hold, HOLD_FIELDS)
        return found

    # 8. Layers

    def layer(self, layer: str) -> Layer:
        name = f"layers/{layer}"
        body = self.keys.unseal(b"L", name, self._get(name))
        (length,) = struct.unpack_from("<I", body)
        header = load_json(body[4 : 4 + length], LAYER_FIELDS, MAY_BE_MISSING)
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
        """The plain bytes, from another place where this one is damaged (section 7, "Damage")."""
        try:
            return self._blob_at(blob, where)
        except (Damaged, FileNotFoundError) as error:
            for copy in self.copies(blob):
                if copy.pack != where.pack and copy.raw == where.raw:
                    try:
                        return self._blob_at(blob, copy)
                    except (Damaged, FileNotFoundError):
                        continue
            raise Damaged("blob") from error

    def copies(self, blob: bytes) -> list[Location]:
        return [where for found, where in self.indexed(strict=False) if found == blob]

    def damaged(self) -> set[str]:
        """Packs that a record of damage lists."""
        found: set[str] = set()
        for path in sorted((self._root / "index").glob("damaged-*")):
            body = self.keys.unseal(b"D", f"index/{path.name}", path.read_bytes())
            found.update(load_json(body, {"format", "time", "packs", "made_by"}, {"made_by"})["packs"])
        return found

    def verified(self) -> dict[str, int]:
        """Packs and layers that were found good -> seconds since 1970."""
        found: dict[str, int] = {}
        for path in sorted((self._root / "verified").glob("*")):
            body = self.keys.unseal(b"V", f"verified/{path.name}", path.read_bytes())
            at = 4 + struct.unpack_from("<I", body)[0]
            load_json(body[4:at], {"format", "time", "readings", "disks", "made_by"}, {"made_by"})
            for each, time in struct.iter_unpack("<16sQ", body[at:]):
                found[each.hex()] = max(time, found.get(each.hex(), 0))
        return {each: time for each, time in found.items() if each not in self.damaged()}

    def first_reads(self, disk: str) -> list[tuple[int, int]]:
        """(first leaf, number of leaves) that clients of a disk read first; nothing where that cannot be read."""
        name = f"reads/{self.keys.folder(disk)}"
        try:
            body = self.keys.unseal(b"R", name, (self._root / name).read_bytes())
            rows = list(struct.iter_unpack("<QQ", body))
        except (Damaged, FileNotFoundError, struct.error):
            return []
        return rows if all(count for _, count in rows) and sum(count for _, count in rows) <= 4096 else []

    def _blob_at(self, blob: bytes, where: Location) -> bytes:
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

    def sampled(self) -> Iterator[tuple[bytes, str]]:
        """(first 5 bytes of an id, name of an index that has it) of all samples."""
        for path in sorted((self._root / "index").glob("sampled-*")):
            body = self.keys.unseal(b"S", f"index/{path.name}", path.read_bytes())
            indexes, replaced, ids = struct.unpack_from("<III", body)
            names = [struct.unpack_from("<Q16s", body, 12 + 24 * n) for n in range(indexes)]
            at = 12 + 24 * (indexes + replaced)
            if len(body) != at + 8 * ids:
                raise Damaged("samples")
            for (key,) in struct.iter_unpack("<Q", body[at:]):
                era, name = names[key & 0xFFFFFF]
                yield (key >> 24).to_bytes(5, "big"), f"{era:010d}-{name.hex()}"

    def indexed(self, *, strict: bool = True, only: str = "") -> Iterator[tuple[bytes, Location]]:
        """Every blob that an index lists, or all do.

        strict: each pack must be there, with the size that is listed; only: the name of one index
        """
        found = sorted(path for path in (self._root / "index").iterdir() if re.fullmatch(INDEX_NAME, path.name))
        for path in (path for path in found if path.name[:10] == found[-1].name[:10] and path.name.startswith(only)):
            body = self.keys.unseal(b"I", f"index/{path.name}", path.read_bytes())
            packs, blobs = struct.unpack_from("<II", body)
            table = [struct.unpack_from("<16sQ", body, 8 + 24 * n) for n in range(packs)]
            at, rows = 8 + 24 * packs, 8 + 24 * packs + 32 * blobs
            if len(body) != rows + 16 * blobs:
                raise Damaged("index")
            for pack, size in table if strict else ():
                if self._root.joinpath("packs", pack.hex()[:2], pack.hex()).stat().st_size != size:
                    raise Damaged("size of a pack")
            for n in range(blobs):
                pack, offset, stored, raw = struct.unpack_from("<IIII", body, rows + 16 * n)
                yield body[at + 32 * n : at + 32 * n + 32], Location(table[pack][0].hex(), offset, stored, raw)
