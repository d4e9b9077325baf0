"""Hostile images: the metadata of a chain's files altered, and every command that meets them.

tests/image/test_scan_fuzz.py alters the bytes of one image and reads it; here whole commands run over a chain.
"""

from __future__ import annotations

import json
import random
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

from tests.hostile.child import Outcome, Shell
from tests.hostile.judge import Plan, unlike
from tests.hostile.mutate import Draw, number, spoil
from tests.hostile.world import DB, MERGED, WEB, World, enter, standing

_HEADER = ("magic", "version", "backing_at", "backing_length", "cluster_bits", "size", "crypt", "l1_size", "l1_at",
           "refcounts_at", "refcount_clusters", "snapshots", "snapshots_at", "incompatible", "compatible", "autoclear",
           "refcount_order", "header_length")  # fmt: skip
_FORMAT = struct.Struct(">4sIQIIQIIQQIIQQQQII")


def plan(world: World, draw: Draw) -> Plan:
    """One case."""
    return _of_a_replica(world, draw) if draw.random() < 0.35 else _of_a_guest(world, draw)


def _of_a_replica(world: World, draw: Draw) -> Plan:
    """Its files are altered where they lie: what is proven there tells, or the bytes are right all the same."""
    stage = draw.choice(["4", MERGED])
    world.set_up(stage, ("images", "replica"))
    there, out = f"dir:{world.case}/replica::{WEB}", world.case / "out"
    files = sorted((world.case / "replica" / "web1%2Fvda").glob("*.qcow2"))
    told = [_altered(draw.choice(files), draw, world) for _ in range(draw.choice([1, 1, 2]))]
    point = draw.choice([2, 3])
    between: list[list[str | Path]] = [
        ["verify", there, "--read-data"], ["verify", there], ["merge", there, "--keep-last", "1"], ["log", there],
        ["send", world.case / "images" / "web1.qcow2", there], ["inspect", there],
        ["send", world.case / "images" / "db.qcow2", there, "--cut-replica"],
        ["sync", world.case / "images" / "web1.qcow2", there, "--prove"],
    ]  # fmt: skip
    commands: list[list[str | Path]] = [
        [
            "restore",
            f"{there}@{point}",
            *_output(out, draw),
        ],
        *draw.sample(between, 2),
        ["restore", f"{there}@{point}", out / "two.raw"],
    ]

    def run(shell: Shell) -> None:
        enter(world, random.Random(draw.random()))
        for words in commands:
            shell.run(*words)

    def judge(outcome: Outcome) -> Iterator[str]:
        for step in outcome.steps:
            path = Path(step.words[-1] if step.words[-1] != "--chain" else step.words[-2])
            given = step.words[0] == "restore" and step.code == 0
            if given and unlike(path, [world.truth(WEB, point)], path.suffix[1:]):
                yield f"{' '.join(step.words)}: exit 0 and other bytes ({told})"

    return Plan(run, judge)


def _output(out: Path, draw: Draw) -> list[str | Path]:
    return draw.choice([[out / "one.raw"], [out / "a.qcow2"], [out / "a.qcow2", "--chain"]])


def _of_a_guest(world: World, draw: Draw) -> Plan:
    world.set_up(draw.choice(["4", MERGED]), ("images", "replica", "enc"))
    case = world.case
    images = case / "images"
    web, db = images / "web1.qcow2", images / "db.qcow2"
    files = sorted(images.glob("*.qcow2"))
    told = [_altered(draw.choice(files), draw, world) for _ in range(draw.choice([1, 1, 1, 2, 3]))]
    before = standing(images)
    shown = {disk: _shown(path, world.root / "build" / f"shown-{path.stem}") for path, disk in ((web, WEB), (db, DB))}
    disk, image = draw.choice([(WEB, web), (DB, db)])
    changing: list[list[str | Path]] = [
        ["snapshot", image],
        ["merge", image],
        ["merge", image, "--keep-last", "1"],
        ["merge", image, "--flatten"],
    ]
    reading: list[list[str | Path]] = [
        ["inspect", image], ["ship", image, f"{case}/enc::{disk}"], ["ship", image, f"{case}/enc::new", "--each-layer"],
        ["send", image, f"dir:{case}/replica::{disk}"], ["send", image, f"dir:{case}/replica::new", "--each-layer"],
        ["diff", image, f"{case}/enc::{disk}"], ["doctor", images], ["sync", image, f"dir:{case}/replica::{disk}",
        "--check"],
        ["ship", image, f"{case}/enc::new"],
    ]  # fmt: skip
    commands: list[list[str | Path]] = draw.sample(reading, 2) + draw.sample(changing, draw.choice([0, 1]))
    outputs = {"ship": f"{case}/enc", "send": f"dir:{case}/replica"}

    def run(shell: Shell) -> None:
        enter(world, random.Random(draw.random()))
        (case / "home" / "told").write_text(json.dumps(told))
        for words in commands:
            done = shell.run(*words, *(["--json"] if draw.random() < 0.3 else []))
            if done.code == 0 and done.words[0] in outputs:
                shell.run(
                    "restore", done.words[2], case / "out" / f"{done.words[0]}-{len(done.words[2])}.raw", "--force"
                )

    def judge(outcome: Outcome) -> Iterator[str]:
        changed = False
        for step in outcome.steps:
            given = step.words[0] == "restore" and step.code == 0 and not changed
            if given and (truth := shown[disk]) is not None and unlike(Path(step.words[2]), [truth], "raw"):
                yield f"{' '.join(step.words)}: other bytes than qemu-img reads ({told})"
            changed = changed or step.words[0] in ("snapshot", "merge")
        if changed:
            truth = shown[disk]
            if truth is not None and outcome.steps[-1].code is not None:
                now = _shown(image, world.root / "build" / "now")
                if now is None or now.read_bytes() != truth.read_bytes():
                    yield f"the image shows something else than before ({told})"
        elif before != (now_there := standing(images)):
            altered = sorted(
                name
                for name in {*before, *now_there}
                if before.get(name) != now_there.get(name) and name.endswith("qcow2")
            )
            if altered:
                yield f"images were changed by who only reads: {altered}"

    return Plan(run, judge)


def _shown(image: Path, target: Path) -> Path | None:
    """What qemu-img reads of it; None where it does not, or where it finds faults."""
    argv = ["prlimit", f"--as={2 << 30}", "--cpu=5", f"--fsize={64 << 20}", "qemu-img"]
    told = subprocess.run([*argv, "info", "--output=json", "-f", "qcow2", str(image)], check=False, capture_output=True)
    if told.returncode or json.loads(told.stdout)["virtual-size"] > 16 << 20:
        return None
    done = subprocess.run(
        [*argv, "convert", "-f", "qcow2", "-O", "raw", str(image), str(target)], check=False, capture_output=True
    )
    return None if done.returncode else target


def _altered(path: Path, draw: Draw, world: World) -> str:
    data = bytearray(path.read_bytes())
    if len(data) < 4096:
        return "nothing"
    fields = list(_FORMAT.unpack_from(data))
    kind = draw.choice(
        ["header", "header", "l1", "l2", "l2", "refcounts", "cut", "spoil", "backing", "extension", "grown"]
    )
    bits = fields[4] if 9 <= fields[4] <= 21 else 16
    match kind:
        case "header":
            at = draw.randrange(1, len(fields))
            fields[at] = number(fields[at], draw, bits=32 if isinstance(fields[at], int) and _width(at) == 4 else 64)
            _FORMAT.pack_into(data, 0, *fields)
            kind = f"header {_HEADER[at]}={fields[at]}"
        case "l1":
            _word(data, int(fields[8]) + 8 * draw.randrange(max(1, min(64, int(fields[7])))), draw)
        case "l2":
            (entry,) = struct.unpack_from(">Q", data, int(fields[8])) if fields[8] + 8 <= len(data) else (0,)
            table = entry & 0x00FFFFFFFFFFFE00
            _word(data, table + 8 * draw.randrange(1 << min(bits - 3, 6)), draw)
        case "refcounts":
            _word(data, int(fields[9]) + 8 * draw.randrange(4), draw)
        case "cut":
            del data[draw.randrange(len(data)) // 512 * 512 :]
        case "grown":
            data += bytes(draw.choice([1, 512, 1 << 20]))
        case "backing":
            names = [
                "",
                "/etc/passwd",
                "/dev/zero",
                "json:{}",
                "nbd://127.0.0.1:9/x",
                path.name,
                "../outside/canary.qcow2",
                "../outside/canary",
                "db.qcow2",
                "x" * 1023,
                "a\0b",
                "\x1b[2J",
                f"{world.case}/outside/canary.qcow2",
                "web1.1.qcow2",
            ]
            name = draw.choice(names).encode()
            data[1024 : 1024 + len(name)] = name
            struct.pack_into(">QI", data, 8, 1024, len(name))
        case "extension":
            struct.pack_into(
                ">II",
                data,
                104,
                draw.choice([0xE2792ACA, 0x6803F857, 0x23852875, 0x0537BE77, 0x44415441, 1]),
                number(8, draw, bits=32),
            )
        case _:
            data[: 1 << 16] = spoil(bytes(data[: 1 << 16]), draw)
    path.write_bytes(data)
    return f"{path.name}: {kind}"


def _width(at: int) -> int:
    return {"I": 4, "Q": 8}["IQIIQIIQQIIQQQQII"[at - 1]]


def _word(data: bytearray, at: int, draw: Draw) -> None:
    if 0 <= at <= len(data) - 8:
        (word,) = struct.unpack_from(">Q", data, at)
        flags = draw.choice([1 << 63, 1 << 62, 1, 0])
        struct.pack_into(
            ">Q", data, at, draw.choice([number(word, draw), word ^ flags, draw.randrange(64) << 16 | flags])
        )
