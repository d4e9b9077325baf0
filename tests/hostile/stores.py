"""Hostile stores: a repository in a directory whose objects are altered, exchanged, replayed, dropped and made up.

Objects of an encrypted repository are altered as who has no key can; those of a plain one also from within, with their
seals made again: its keys are public.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import socket
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import zstandard
from blake3 import blake3

from snapchain.repository.crypto import NONE, Keyring
from snapchain.repository.envelope import head, seal, unseal
from snapchain.repository.format import BLOB_ROW, PAGE_ROW, RUN_ROW
from snapchain.repository.packs import OpenPack, PackReader
from tests.hostile.child import Outcome, Shell
from tests.hostile.judge import Plan, unlike
from tests.hostile.mutate import Draw, Pool, document, number, spoil
from tests.hostile.wire import bomb
from tests.hostile.world import DB, MERGED, NIGHTS, WEB, World, enter, standing

KINDS = ("config", "keys", "index", "layers", "disks", "packs", "leases", "witness")
_KIND_BYTES = {"index": b"I", "layers": b"L", "disks": b"C", "leases": b"E"}
_STAGES = ("2", "3", "4", MERGED, MERGED)
_LEASE = {
    "host": "elsewhere", "machine": "", "pid": 1, "started": 0, "work": "ship web1/vda",
    "since": "2026-11-29T00:00:00Z",
    "disks": [WEB], "layers": [],
}  # fmt: skip


@dataclass
class Store:
    """A repository's directory.

    keys: None where they are secret
    nights: how many its images have seen
    is_rolled_back: catalogues are gone, so that a shipment may give their points' numbers to what the images show now
    """

    root: Path
    keys: Keyring | None
    nights: int
    is_rolled_back: bool = False

    def objects(self, kind: str) -> list[Path]:
        """Those of a kind; sorted, so that a seed means the same ones each time."""
        found = self.root / kind
        return sorted(path for path in (found.rglob("*") if found.is_dir() else [found]) if path.is_file())

    def name(self, path: Path) -> str:
        return str(path.relative_to(self.root))


def keyring(root: Path) -> Keyring | None:
    """Of a plain repository."""
    config = json.loads((root / "config").read_text())
    if config["encryption"] != NONE:
        return None
    return Keyring(NONE, config["id"], Keyring.public_master(config["id"]))


def plan(world: World, draw: Draw) -> Plan:
    """One case."""
    plain = draw.random() < 0.5
    name = "plain" if plain else "enc"
    stage = draw.choice(_STAGES)
    world.set_up(stage, (name, "images", "nightly.toml"))
    nights = NIGHTS if stage == MERGED else int(stage)
    store = Store(world.case / name, keyring(world.case / name), nights)
    if draw.random() < 0.4:  # a machine that has never seen it
        shutil.rmtree(world.case / "state")
    if draw.random() < 0.7:
        shutil.rmtree(world.case / "cache", ignore_errors=True)
    deeds: list[str] = []
    made_up = False
    for _ in range(draw.choice([1, 1, 1, 1, 2, 3])):
        if store.keys is not None and draw.random() < 0.6:
            made_up = True
            try:
                deeds.append(_from_within(store, draw))
            except Exception as error:  # noqa: BLE001 -- spoilt already, by an earlier deed of this case
                deeds.append(f"nothing: {error!r}"[:100])
        else:
            deeds.append(_from_outside(world, store, draw))
    return commands(
        world,
        draw,
        str(store.root),
        deeds,
        nights=nights,
        made_up=made_up,
        rolled_back=store.is_rolled_back,
    )


def commands(
    world: World,
    draw: Draw,
    url: str,
    deeds: list[str],
    *,
    nights: int,
    made_up: bool,
    rolled_back: bool = False,
    ready: Callable[[], None] = lambda: None,
) -> Plan:
    """What is run over a spoilt repository.

    ready: called in the child before anything is run
    nights: points that it had; those that come show what the image shows, and that is what it showed in the last night
    made_up: by who could say anything: then a point may show another's bytes
    rolled_back: as `Store.is_rolled_back`
    """
    images = standing(world.case / "images")
    out = world.case / "out"
    number_of = draw.randrange(1, NIGHTS + 1)
    points = {f"@{number_of}": (number_of,), f"@n{number_of}": (number_of,), "": tuple(range(1, NIGHTS + 1))}
    given: dict[tuple[str, ...], tuple[str, tuple[int, ...]]] = {}

    def restore(file: str, at: str | None = None, disk: str = WEB) -> list[str]:
        where = draw.choice(list(points)) if at is None else at
        words = [
            "restore",
            f"{url}::{disk}{where}",
            str(out / file),
            *draw.choice([[], ["--chain"]] if file.endswith("qcow2") else [[]]),
        ]
        given[tuple(words)] = (disk, points[where] if at is None else (int(at[1:]),))
        return words

    def look() -> list[str]:
        return draw.choice([["log", url], ["log", f"{url}::{WEB}"], ["inspect", f"{url}::{WEB}"], ["verify", url]])

    change = [
        ["ship", str(world.case / "images" / "web1.qcow2"), f"{url}::{WEB}"],
        ["ship", str(world.case / "images" / "db.qcow2"), f"{url}::{DB}", "--each-layer"],
        ["merge", f"{url}::{WEB}", "--keep-last", "1"],
        ["gc", url],
        ["gc", url],
        ["hold", f"{url}::{WEB}@{number_of}", "--tag", "x"],
        ["release", f"{url}::{WEB}@2", "--tag", "audit"],
    ]
    other = [
        ["diff", f"{url}::{WEB}@2", f"{url}::{WEB}@3"],
        ["diff", f"{url}::{WEB}", str(world.case / "images" / "web1.qcow2")],
        ["init", url, "--no-encryption"],
        ["ship", str(world.case / "images" / "web1.qcow2"), f"{url}::{WEB}", "--dry-run"],
        ["gc", url, "--dry-run"],
        ["merge", f"{url}::{WEB}", "--keep-last", "2", "--dry-run"],
        ["verify", url, "--sample", "30%"],
    ]
    if "://" not in url:
        other.append(["nightly", str(world.case / "nightly.toml"), "--any-time"])
    chosen = [look(), restore("one.raw")] if draw.random() < 0.5 else [restore(draw.choice(["one.raw", "one.qcow2"]))]
    chosen += draw.sample(change, draw.choice([0, 1, 1, 2]))
    if draw.random() < 0.3:
        chosen.append(draw.choice(other))
    if draw.random() < 0.6:
        chosen.append(["verify", url, "--read-data"])
    chosen += [restore("two.raw"), restore("db.raw", "@1", DB)]

    def run(shell: Shell) -> None:
        (world.case / "home" / "told").write_text(json.dumps(deeds))
        enter(world, random.Random(draw.random()))
        ready()
        for words in chosen:
            shell.run(*words, *(["--json"] if draw.random() < 0.5 else []))

    def judge(outcome: Outcome) -> Iterator[str]:
        sound = shipped = False
        for step in outcome.steps:
            words = tuple(word for word in step.words if word != "--json")
            if words[0] == "verify" and "--read-data" in words and step.code == 0:
                sound = True
            shipped |= words[0] in ("ship", "nightly")
            if words not in given:
                continue
            if step.code == 5 and sound:
                yield f"verify --read-data found nothing, and then: {step.err}{step.out}"
            if step.code == 0:
                disk, numbers = given[words]
                known = world.truths(disk)
                last = min(nights, max(known))
                truths = known if made_up else {at: known[min(at, last)] for at in numbers}
                if rolled_back and shipped:
                    truths = {**truths, 0: known[last]}
                path = Path(words[2])
                if unlike(path, truths.values(), path.suffix[1:]) and not (
                    made_up and _is_what_it_says(path, step.words, step.out)
                ):
                    yield f"{' '.join(words)}: exit 0 and other bytes ({deeds})"
        now = standing(world.case / "images")
        changed = [name for name, look in images.items() if name.endswith(".qcow2") and now.get(name) != look]
        if changed and not any(step.words[0] == "nightly" for step in outcome.steps):
            yield f"the images were changed: {changed}"

    return Plan(run, judge)


def _is_what_it_says(path: Path, words: tuple[str, ...], out: str) -> bool:
    """Whether a content id that was reported is that of what was written: counted here, from the definition."""
    from tests.hostile.truth import content_id

    if "--json" not in words or path.suffix != ".raw":
        return True  # it was not told
    return bool(json.loads(out).get("content_id") == content_id(path.read_bytes()))


# ---- what a hostile store does


def _from_outside(world: World, store: Store, draw: Draw) -> str:
    kind = draw.choice(KINDS)
    objects = store.objects(kind)
    if not objects or kind == "leases":
        return _lease(store, draw)
    path = draw.choice(objects[-3:] if draw.random() < 0.5 else objects)
    deed = draw.choice(["spoil"] * 5 + ["swap", "swap", "replay", "drop", "drop", "again", "odd", "json", "sparse"])
    match deed:
        case "swap":
            every = [each for some in (kind, draw.choice(KINDS)) for each in store.objects(some) if each.is_file()]
            other = draw.choice(every or [path])
            here, there = path.read_bytes(), other.read_bytes()
            path.write_bytes(there)
            other.write_bytes(here)
        case "replay":
            _replay(world, store, path, draw)
        case "drop":
            gone = draw.choice([[path], [path], objects])
            for each in gone:
                each.unlink()
            store.is_rolled_back |= kind == "disks"
        case "again":
            name = draw.choice(
                [
                    f"{draw.getrandbits(128):032x}",
                    path.name[:-1] + "0",
                    f"{int(path.name) + draw.choice([1, 2, 1000]):020d}" if path.name.isdecimal() else "x",
                ]
            )
            target = path.with_name(name[:100])
            target.write_bytes(path.read_bytes())
        case "odd":
            path.unlink()
            _odd(path, draw)
        case "json" if kind in ("config", "keys"):
            path.write_bytes(document(json.loads(path.read_text()), draw, Pool([])))
        case "sparse":
            with path.open("r+b") as file:
                file.truncate(draw.choice([300 << 20, 1 << 34, 1 << 39]))
        case _:
            path.write_bytes(spoil(path.read_bytes(), draw))
    return f"{deed} {store.name(path)}"


def _replay(world: World, store: Store, path: Path, draw: Draw) -> None:
    """An object, or all of them, as they were earlier."""
    stage = world.stage(str(min(int(draw.choice(["1", "2", "3"])), store.nights))) / store.root.name
    if draw.random() < 0.3:
        shutil.rmtree(store.root)
        shutil.copytree(stage, store.root)
        store.is_rolled_back = True
        return
    there = Store(stage, store.keys, store.nights).objects(path.relative_to(store.root).parts[0])
    if there:
        shutil.copy2(draw.choice(there), path)


def _odd(path: Path, draw: Draw) -> None:
    match draw.choice(["link", "fifo", "folder", "socket", "loop", "long"]):
        case "link":
            path.symlink_to(draw.choice(["/etc/passwd", "/dev/zero", "../../../outside/canary", "/dev/stdin"]))
        case "fifo":
            os.mkfifo(path)
        case "folder":
            (path / "x").mkdir(parents=True)
        case "socket":
            with socket.socket(socket.AF_UNIX) as made:
                here = os.open(path.parent, os.O_RDONLY)
                made.bind(f"/proc/self/fd/{here}/{path.name}")
                os.close(here)
        case "loop":
            path.symlink_to(path.name)
        case _:
            path.parent.joinpath("x" * 255).write_bytes(b"")
            path.parent.joinpath("\udcff\x1b[31m").write_bytes(b"")


def _lease(store: Store, draw: Draw) -> str:
    """Somebody seems to be at work."""
    name = f"leases/{draw.choice('wgrx')}-{draw.getrandbits(128):032x}"
    path = store.root / name
    path.parent.mkdir(exist_ok=True)
    if store.keys is None:
        path.write_bytes(draw.choice([b"", b"x", draw.randbytes(200)]))
    else:
        path.write_bytes(seal(store.keys, b"E", name, document(_LEASE, draw, Pool([WEB]))))
    if draw.random() < 0.5:
        when = draw.choice([0, 1, 1 << 33, 1_700_000_000])
        os.utime(path, (when, when))
    return f"lease {name}"


def _from_within(store: Store, draw: Draw) -> str:
    """An object of a plain repository, opened, changed and sealed again."""
    assert store.keys is not None
    kind = draw.choice(
        ["index", "layers", "layers", "disks", "disks", "disks", "packs", "page", "page", "leases", "bomb"]
    )
    if kind == "leases":
        return _lease(store, draw)
    if kind == "packs":
        return _other_pack(store, draw)
    if kind == "page":
        return _other_page(store, draw)
    if kind == "bomb":
        return _bomb(store, draw)
    objects = store.objects(kind)
    path = objects[-1] if kind == "disks" and draw.random() < 0.8 else draw.choice(objects)
    name = store.name(path)
    body = unseal(store.keys, _KIND_BYTES[kind], name, path.read_bytes())
    change: dict[str, Callable[[bytes, Draw], bytes]] = {
        "index": _other_index,
        "layers": _other_layer,
        "disks": _other_catalogue,
    }
    changed = change[kind](body, draw)
    if kind == "disks" and draw.random() < 0.3:  # a generation that nobody has made
        path = path.with_name(f"{int(path.name) + draw.choice([1, 1, 2, 10**15]):020d}")
        name = store.name(path)
    path.write_bytes(seal(store.keys, _KIND_BYTES[kind], name, changed))
    return f"within {name}"


def _other_catalogue(body: bytes, draw: Draw) -> bytes:
    said = json.loads(body)
    pool = Pool([WEB, DB, "../../outside/canary"])
    pool.learn(said)
    if draw.random() < 0.15:
        points = said["points"]
        many = draw.choice([300, 20_000])
        last = points[-1]
        said["points"] = points + [{**last, "point": last["point"] + 1 + at} for at in range(many)]
        said["next_point"] = last["point"] + many + 2
        return json.dumps(said).encode()
    if draw.random() < 0.1:
        many = draw.choice([300, 50_000])
        ids = [f"{at:032x}" for at in range(many)]
        said["parents"].update(dict(zip(ids, [*ids[1:], None], strict=True)))
        said["parents"][said["points"][-1]["layer"]] = ids[0]
        return json.dumps(said).encode()
    return document(said, draw, pool)


def _other_layer(body: bytes, draw: Draw) -> bytes:
    (length,) = struct.unpack_from("<I", body)
    text, rows = body[4 : 4 + length], body[4 + length :]
    kind = draw.randrange(5)
    if kind == 0:
        text = document(json.loads(text), draw, Pool([]))
    elif kind == 1:
        rows = spoil(rows, draw)
    elif kind == 2:
        said = json.loads(text)
        said["size"] = draw.choice([0, 1, 512, 1 << 40, 1 << 56, said["size"] + 512])
        text = json.dumps(said).encode()
    elif kind == 3 and len(rows) >= PAGE_ROW.itemsize:
        table = np.frombuffer(rows, PAGE_ROW).copy()
        column = draw.choice(["first", "stop", "offset", "stored", "raw", "data", "zero"])
        at = draw.randrange(len(table))
        table[column][at] = number(int(table[column][at]), draw, bits=8 * table.dtype[column].itemsize)
        rows = table.tobytes()
    else:
        return struct.pack("<I", number(length, draw, bits=32)) + body[4:]
    return struct.pack("<I", len(text)) + text + rows


def _other_index(body: bytes, draw: Draw) -> bytes:
    packs, blobs = struct.unpack_from("<II", body)
    if draw.random() < 0.3 or not blobs:
        return (
            struct.pack(
                "<II", *draw.choice([(number(packs, draw, bits=32), blobs), (packs, number(blobs, draw, bits=32))])
            )
            + body[8:]
        )
    at_rows = len(body) - blobs * BLOB_ROW.itemsize
    rows = np.frombuffer(body, BLOB_ROW, blobs, at_rows).copy()
    if draw.random() < 0.7:
        column = draw.choice(["pack", "offset", "stored", "raw"])
        at = draw.randrange(blobs)
        rows[column][at] = number(int(rows[column][at]), draw, bits=32)
        if draw.random() < 0.3:
            rows[column] = rows[column][at]
        return body[:at_rows] + rows.tobytes()
    return spoil(body, draw)


def _other_pack(store: Store, draw: Draw) -> str:
    """The directory or the trailer of a pack."""
    assert store.keys is not None
    path = draw.choice(store.objects("packs"))
    data = path.read_bytes()
    stored, count, end = struct.unpack("<II8s", data[-16:])
    if draw.random() < 0.5:
        trailer = struct.pack(
            "<II8s",
            *draw.choice([(number(stored, draw, bits=32), count, end), (stored, number(count, draw, bits=32), end)]),
        )
        path.write_bytes(data[:-16] + trailer)
        return f"trailer of {store.name(path)}"
    at = len(data) - 16 - stored
    ids, rows = PackReader(store.keys, path.name).directory(at, count, data[at:-16])
    rows = rows.copy()
    column = draw.choice(["pack", "offset", "stored", "raw"])
    place = draw.randrange(count)
    rows[column][place] = number(int(rows[column][place]), draw, bits=32)
    body = zstandard.ZstdCompressor().compress(ids.tobytes() + rows.tobytes())
    if draw.random() < 0.2:
        body = bomb(draw, count * 48)
    bound = (
        b"snapchain 1 blob"
        + store.keys.repository
        + bytes.fromhex(path.name)
        + count.to_bytes(8, "little")
        + b"directory"
    )
    text = store.keys.pack_cipher(bytes.fromhex(path.name)).encrypt(at.to_bytes(12, "little"), body, bound)
    path.write_bytes(data[:at] + text + struct.pack("<II8s", len(text), count, end))
    return f"directory of {store.name(path)}"


def _other_page(store: Store, draw: Draw) -> str:
    """A page of a layer with other runs, in a pack of its own."""
    assert store.keys is not None
    path = draw.choice(store.objects("layers"))
    name = store.name(path)
    body = unseal(store.keys, b"L", name, path.read_bytes())
    (length,) = struct.unpack_from("<I", body)
    table = np.frombuffer(body, PAGE_ROW, offset=4 + length).copy()
    if not len(table):
        return "no page"
    at = draw.randrange(len(table))
    row = table[at]
    pack = bytes(row["pack"]).hex()
    there = store.root / "packs" / pack[:2] / pack
    if not there.exists():
        return "no pack"
    data = there.read_bytes()
    offset, raw = int(row["offset"]), int(row["raw"])
    text = data[offset : offset + int(row["stored"])]
    try:
        page = PackReader(store.keys, pack).blob(bytes(row["id"]), offset, raw, text)
    except Exception:  # noqa: BLE001 -- spoilt already, by an earlier mutation of this case
        return "spoilt already"
    page = _changed_page(page, draw)
    pieces = b"".join(blake3(page[first : first + 65536]).digest() for first in range(0, len(page), 65536))
    blob = store.keys.blob_id(pieces)
    made = OpenPack(store.keys)
    packed = zstandard.ZstdCompressor().compress(page)
    where = made.add(blob, packed if len(packed) < len(page) else page, len(page))
    closed = made.close()
    target = store.root / "packs" / closed.pack[:2] / closed.pack
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(b"".join(closed.parts))
    row["id"] = np.frombuffer(blob, np.uint8)
    row["pack"] = np.frombuffer(bytes.fromhex(closed.pack), np.uint8)
    row["offset"], row["stored"], row["raw"] = where.offset, where.stored, where.raw
    table[at] = row
    path.write_bytes(seal(store.keys, b"L", name, body[: 4 + length] + table.tobytes()))
    return f"page of {name}"


def _changed_page(page: bytes, draw: Draw) -> bytes:
    packs, runs, leaves, zero = struct.unpack_from("<IIII", page)
    at = 16 + packs * 16
    table = np.frombuffer(page, RUN_ROW, runs, at).copy()
    kind = draw.randrange(6)
    if kind <= 3 and runs:
        column = draw.choice(["start", "length", "pack", "offset", "stored", "raw", "skip"])
        place = draw.randrange(runs)
        table[column][place] = number(int(table[column][place]), draw, bits=8 * table.dtype[column].itemsize)
        if draw.random() < 0.2:
            table = np.concatenate([table] * draw.choice([2, 500]))
            runs = len(table)
        return (
            struct.pack("<IIII", packs, runs, leaves, zero)
            + page[16:at]
            + table.tobytes()
            + page[at + len(table) * RUN_ROW.itemsize :]
        )
    if kind == 4:
        return (
            struct.pack(
                "<IIII",
                *(number(each, draw, bits=32) if draw.random() < 0.5 else each for each in (packs, runs, leaves, zero)),
            )
            + page[16:]
        )
    return spoil(page, draw)


def _bomb(store: Store, draw: Draw) -> str:
    """A small record that unpacks to as much as a record may have, or more; plausible as JSON to its end or not."""
    assert store.keys is not None
    kind = draw.choice(["disks", "layers", "index"])
    path = draw.choice(store.objects(kind))
    name = store.name(path)
    size = draw.choice([8 << 20, 60 << 20, 250 << 20, 257 << 20])
    said = draw.choice([b" ", b"[", b"0,", b'{"a":', b'"x",', b"\0"])
    unit = said * ((1 << 20) // len(said))
    opening = draw.choice([b"", b'{"points":[', b'{"disk":"', b'{"parents":{'])
    compressor = zstandard.ZstdCompressor(level=1).compressobj(size=len(opening) + len(unit) * (size >> 20))
    packed = (
        compressor.compress(opening)
        + b"".join(compressor.compress(unit) for _ in range(size >> 20))
        + compressor.flush()
    )
    salt = draw.randbytes(32)
    first = head(_KIND_BYTES[kind])
    text = store.keys.record_cipher(salt).encrypt(bytes(12), packed, first + store.keys.repository + name.encode())
    path.write_bytes(first + salt + text)
    return f"bomb {name} {size >> 20} MiB of {opening!r} {said!r}"


# ---- by way of S3


def plan_s3(world: World, draw: Draw) -> Plan:
    """One case: the objects are whole, and the server lies."""
    from tests.hostile import s3_server

    stage = draw.choice(_STAGES)
    name = draw.choice(["plain", "enc"])
    world.set_up(stage, ("images", name))
    root = world.case / name
    server = s3_server.scripted(root, world.stage("2") / name, draw)
    shutil.rmtree(root)
    shutil.rmtree(world.case / "state")
    url = f"s3://{s3_server.BUCKET}/repo"

    def ready() -> None:
        hasty()
        server.start()
        os.environ["AWS_ENDPOINT_URL_S3"] = f"http://127.0.0.1:{server.port}"

    nights = NIGHTS if stage == MERGED else int(stage)
    planned = commands(world, draw, url, server.told, nights=nights, made_up=False, ready=ready)

    def run(shell: Shell) -> None:
        planned.run(shell)
        (world.case / "home" / "told").write_text(json.dumps(server.told[:100]))

    return Plan(run, planned.judge)


def hasty() -> None:
    """Servers that are silent are given up soon: by what the program itself waits with."""
    from snapchain.objects import s3_client

    for function, shorter in (
        (s3_client.new_client, {"connect_timeout": 1.0, "read_timeout": 0.6, "attempts": 2}),
        (s3_client.Patience.__init__, {"limit": 1.5}),
    ):
        assert function.__kwdefaults__ is not None
        function.__kwdefaults__.update(shorter)
