"""Hostile records: notes, journals, states, catalogues and temporaries that are not what snapchain left there.

Some cases begin with a command that is killed somewhere in its work, so that there are journals to spoil. Then records
are changed by their structure, with their checks made again; then commands meet them.
"""

from __future__ import annotations

import json
import os
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from blake3 import blake3

from snapchain.cli import main
from tests.hostile.child import Outcome, Shell
from tests.hostile.judge import Plan, same, unlike
from tests.hostile.mutate import Draw, Pool, document, spoil
from tests.hostile.world import DB, GIVEN, MERGED, NIGHTS, WEB, World, enter

_CHECK = re.compile(rb',\n "check": "([0-9a-f]{64})"\n}\n\Z')
_CALLS = ("fsync", "rename", "replace", "unlink", "remove", "link", "ftruncate", "truncate", "fchmod", "fdatasync")
_STATE = {
    "version": 1,
    "disks": {
        WEB: {
            "image": "{case}/images/web1.qcow2", "reached": "2026-11-28T02:00:00Z", "outcome": "ok", "seconds": 2.5,
            "chain_length": 4, "layers": ["{case}/images/web1.3.qcow2", "{case}/images/web1.2.qcow2"],
            "destinations": {
                "enc": {"captured": "2026-11-28T01:00:00Z", "point": 4, "points": 3, "layers": 3,
                "shipped_bytes": 1, "stored_bytes": 2}
            },
        },
        DB: {"image": "{case}/images/db.qcow2", "begun": "2026-11-28T02:00:00Z"},
    },
    "destinations": {"enc": {"verified": {WEB: "2026-11-27T00:00:00Z"}, "damaged": {DB: 1},
    "gc_at": "2026-11-01T00:00:00Z"}},
}  # fmt: skip


def plan(world: World, draw: Draw) -> Plan:
    """One case."""
    stage = draw.choice(["4", MERGED, MERGED, GIVEN, GIVEN])
    parts = ["images", "replica", "nightly.toml"]
    if draw.random() < 0.5:
        parts += ["enc", "plain"]
    world.set_up(stage, tuple(parts))
    (world.case / "state" / "nightly.json").write_text(json.dumps(_STATE).replace("{case}", str(world.case)))
    _notes_as_their_files(world.case / "images")
    case = world.case
    web, db, there = case / "images" / "web1.qcow2", case / "images" / "db.qcow2", f"dir:{case}/replica"
    killed = draw.choice([None, *_interruptible(world)]) if draw.random() < 0.7 else None
    commands = _commands(world, draw)
    point = draw.choice([2, 3])
    seed = draw.random()

    def run(shell: Shell) -> None:
        own = random.Random(seed)
        enter(world, own)
        told: list[str] = []
        if killed is not None:
            told.append(f"killed {killed[0]} {_killed(killed, own.randrange(1, 40))}")
        told += [_spoilt(world, own) for _ in range(own.choice([1, 1, 2, 3]))]
        (case / "home" / "told").write_text(json.dumps(told))
        for words in commands:
            shell.run(*words, *(["--json"] if own.random() < 0.5 else []))
        shell.run("restore", f"{there}::{WEB}@{point}", case / "out" / "again.raw")

    def judge(outcome: Outcome) -> Iterator[str]:
        told = (case / "home" / "told").read_text() if (case / "home" / "told").exists() else ""
        for image, disk, last in ((web, WEB, NIGHTS), (db, DB, 2)):
            if not image.exists():
                yield f"{image.name} is gone ({told})"
            elif not same(image, world.truth(disk, last)):
                yield f"{image.name} shows something else ({told})"
        last_step = outcome.steps[-1] if outcome.steps else None
        given = last_step is not None and last_step.words[0] == "restore" and last_step.code == 0
        if given and unlike(case / "out" / "again.raw", [world.truth(WEB, point)], "raw"):
            yield f"point {point} of the replica is not what it was ({told})"

    return Plan(run, judge)


def _interruptible(world: World) -> list[list[str]]:
    case = world.case
    web = str(case / "images" / "web1.qcow2")
    return [
        ["merge", web, "--from", str(case / "images" / "web1.2.qcow2"), "--to",
        str(case / "images" / "web1.3.qcow2"), "--strategy", strategy]
        for strategy in ("new-file", "absorb", "commit")
    ] + [
        ["snapshot", web],
        ["merge", web],
        ["send", web, f"dir:{case}/replica::{WEB}"],
        ["merge", f"dir:{case}/replica::{WEB}", "--keep-last", "1"],
        ["merge", f"dir:{case}/replica::{WEB}", "--keep-last", "1"],
        ["migrate", "--offline", web, f"dir:{case}/replica::{WEB}"],
        ["restore", f"dir:{case}/replica::{WEB}", str(case / "images" / "new.qcow2")],
    ]  # fmt: skip


def _commands(world: World, draw: Draw) -> list[list[str]]:
    case = world.case
    images, web, db = case / "images", str(case / "images" / "web1.qcow2"), str(case / "images" / "db.qcow2")
    there = f"dir:{case}/replica"
    every = [
        ["snapshot", web], ["snapshot", web, "--label", "x"], ["snapshot", db],
        ["merge", web, "--keep-last", "1"], ["merge", web], ["merge", web, "--flatten", "--dry-run"],
        ["merge", web, "--keep-last", "1", "--at", f"{there}::{WEB}"],
        ["doctor", str(images)], ["doctor", str(images)], ["doctor", web, "--dry-run"], ["doctor",
        str(case / "replica" / "web1%2Fvda")],
        ["inspect", web], ["inspect", db],
        ["send", web, f"{there}::{WEB}"], ["send", db, f"{there}::{DB}"], ["send", web, f"{there}::new/disk",
        "--each-layer"],
        ["log", there], ["verify", there], ["verify", there, "--read-data"], ["inspect", f"{there}::{WEB}"],
        ["restore", f"{there}::{DB}", str(case / "out" / "db.qcow2"), "--chain"],
        ["merge", f"{there}::{WEB}", "--keep-last", "1"],
        ["migrate", "--take-back", db, f"{there}::{DB}"], ["migrate", "--take-back", db, f"{there}::{DB}"],
        ["migrate", "--take-back", "--destination-is-gone", db, f"{there}::{DB}"],
        ["migrate", "--offline", web, f"{there}::{WEB}"], ["migrate", "--offline", db, f"{there}::{DB}"],
        ["sync", web, f"{there}::{WEB}", "--check"],
        ["hold", web, "--tag", "x"], ["release", str(images / "web1.1.qcow2"), "--tag", "keep"],
        ["receive", str(case / "replica")],
    ]  # fmt: skip
    if (case / "enc").exists():
        every += [
            ["ship", web, f"{case}/enc::{WEB}"], ["ship", web, f"{case}/plain::{WEB}"], ["log", f"{case}/enc"],
            ["nightly", str(case / "nightly.toml"), "--any-time"], ["nightly", str(case / "nightly.toml"),
            "--any-time"],
            ["merge", web, "--keep-last", "1", "--at", f"{case}/enc::{WEB}"], ["gc", f"{case}/enc"],
        ]  # fmt: skip
    return draw.sample(every, draw.choice([1, 2, 2, 3]))


def _notes_as_their_files(images: Path) -> None:
    """Copied files have other inodes than their notes say: as if they had been written here."""
    for note in images.glob(".snapchain-layer-*.json"):
        said = json.loads(note.read_text())
        status = (images / said["name"]).stat()
        said.update(inode=status.st_ino, size=status.st_size, mtime_ns=status.st_mtime_ns)
        note.write_text(json.dumps(said, indent=1))


def _killed(words: list[str], at: int) -> str:
    """Run a command in a process that ends, as by SIGKILL, at the call of this number that changes a file."""
    pid = os.fork()
    if pid == 0:
        try:
            for descriptor in (1, 2):
                os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
            _end_at(at)
            main(words)
        finally:
            os._exit(0)
    _, status = os.waitpid(pid, 0)
    return "in its work" if os.waitstatus_to_exitcode(status) == 9 else "after its end"


def _end_at(at: int) -> None:
    count = 0

    def counted(real: Any) -> Any:
        def call(*arguments: Any, **named: Any) -> Any:
            nonlocal count
            count += 1
            if count == at:
                os._exit(9)
            return real(*arguments, **named)

        return call

    for name in _CALLS:
        setattr(os, name, counted(getattr(os, name)))


# ---- what is spoilt


def _records(world: World) -> list[Path]:
    every = [path for part in ("images", "replica", "state") for path in sorted((world.case / part).rglob("*"))]
    return [
        path
        for path in every
        if path.is_file() and not path.is_symlink() and (path.suffix != ".qcow2" or path.name.startswith("."))
    ]


def _spoilt(world: World, draw: Draw) -> str:
    records = _records(world)
    # Those that are rare and say what to do, more often than those that are always there.
    rare = [
        path
        for path in records
        if "merge" in path.name or "merging" in path.name or "incoming" in path.name or "nightly" in path.name
    ]
    path = draw.choice(rare if rare and draw.random() < 0.5 else records)
    told = str(path.relative_to(world.case))
    deed = draw.choice(["body"] * 12 + ["spoil", "spoil", "drop", "swap", "copy", "odd", "huge", "planted", "planted"])
    match deed:
        case "drop":
            path.unlink()
        case "spoil":
            path.write_bytes(spoil(_some(path), draw))
        case "swap":
            other = draw.choice(records)
            here, there = _some(path), _some(other)
            path.write_bytes(there)
            other.write_bytes(here)
        case "copy":
            names = [
                ".catalogue.json.new-0011aabb",
                "x" + path.name,
                path.name + ".json",
                f".web1.qcow2.{draw.choice(['merge', 'snapshot', 'active', 'new'])}-01234567",
                ".db.qcow2.snapchain-part",
                ".snapchain-merge-web1.qcow2.json",
                ".snapchain-merge-db.qcow2.json",
                ".merging.json",
                ".incoming.json",
            ]
            path.with_name(draw.choice(names)).write_bytes(_some(path))
        case "odd":
            path.unlink()
            match draw.choice(["link", "fifo", "folder", "loop"]):
                case "link":
                    path.symlink_to(
                        draw.choice([world.case / "outside" / "canary", Path("/dev/zero"), Path("/etc/passwd")])
                    )
                case "fifo":
                    os.mkfifo(path)
                case "folder":
                    path.mkdir()
                case _:
                    path.symlink_to(path.name)
        case "huge":
            with path.open("r+b") as file:
                file.truncate(draw.choice([17 << 20, 65 << 20, 1 << 33]))
        case "planted":
            told = _planted(world, draw)
        case _:
            _rewritten(path, world, draw)
    return f"{deed} {told}"


def _some(path: Path) -> bytes:
    """Of its beginning: an earlier deed may have made it huge."""
    with path.open("rb") as file:
        return file.read(8 << 20)


def _rewritten(path: Path, world: World, draw: Draw) -> None:
    """A record by its structure; its check is made again."""
    if path.stat().st_size > 4 << 20:
        return
    text = path.read_bytes()
    checked = _CHECK.search(text)
    if checked is not None:
        text = text[: checked.start()] + b"}"
    try:
        said = json.loads(text)
    except ValueError:
        path.write_bytes(spoil(text, draw))
        return
    changed = document(said, draw, _pool(world, said))
    if checked is not None and changed.endswith(b"}") and draw.random() < 0.95:
        body = changed[:-1]
        changed = b'%b,\n "check": "%b"\n}\n' % (body, blake3(body).hexdigest().encode())
    path.write_bytes(changed)


def _pool(world: World, said: Any) -> Pool:
    case = world.case
    outside = [case / "outside" / "canary", case / "outside" / "canary.qcow2", case / "outside"]
    inside = sorted((case / "images").iterdir())[:20]
    names = [each.name for each in sorted((case / "replica").rglob("*")) if each.is_file()][:20]
    pool = Pool([*map(str, outside), *map(str, inside), *names, "../../outside/canary", WEB, DB, f"dir:{case}/outside"])
    pool.learn(said)
    return pool


def _planted(world: World, draw: Draw) -> str:
    """A record where there was none, which names what is not its business."""
    case = world.case
    images = case / "images"
    target, victim = (
        images / draw.choice(["web1.qcow2", "web1.3.qcow2", "db.qcow2"]),
        draw.choice(
            [
                case / "outside" / "canary",
                case / "outside" / "canary.qcow2",
                images / "web1.1.qcow2",
                images / "web1.2.qcow2",
            ]
        ),
    )
    kind = draw.randrange(4)
    if kind <= 1:
        result = target if draw.random() < 0.5 else victim
        said = {
            "version": 2, "stage": draw.choice(["switching", "absorbing", "committing"]), "replaced": _file(target),
            "result": _file(result), "lowest": str(images / "web1.1.qcow2"),
            "link": draw.choice([None, {"name": "web1.1.qcow2", "format": "qcow2"}]), "remove": [_file(victim)],
            "kept_as": draw.choice([None, str(case / "outside" / "kept"), str(images / "web1.9.qcow2")]),
            "search": [str(case / "outside")], "top": str(images / "web1.qcow2"), "links": [str(victim)],
            "confirmed": [str(victim)],
        }  # fmt: skip
        path = images / f".snapchain-merge-{target.name}.json"
    elif kind == 2:
        catalogue = case / "replica" / "web1%2Fvda" / "catalogue.json"
        layers = json.loads(catalogue.read_bytes()).get("layers", []) if catalogue.is_file() else []
        ids = [layer["id"] for layer in layers if isinstance(layer, dict) and "id" in layer] or ["0" * 32]
        said = {"format": 1, "members": draw.choice([ids, ids[:1], ids * 2, ids[::-1], [*ids, "0" * 32]])}
        path = catalogue.with_name(".merging.json")
    else:
        name = draw.choice(["web1.qcow2", "web1.2.qcow2", "db.qcow2"])
        status = (images / name).stat() if (images / name).exists() else (case / "outside" / "canary").stat()
        said = {
            "version": 1, "name": name, "inode": status.st_ino, "size": status.st_size,
            "mtime_ns": status.st_mtime_ns, "epoch": draw.choice([1, 2, 1 << 31, 1 << 62]),
            "given": draw.choice([None, {
                "destination": f"dir:{case}/{draw.choice(['replica', 'outside'])}", "disk": WEB, "epoch": 2,
                "token": "0" * 32, "time": "2026-11-29T00:00:00Z",
                "overlay": {"name": "../../outside/canary", "layer": "0" * 32, "virtual_size": 1 << 40,
                "cluster_size": 65536, "extended_l2": False},
                "together": [WEB], "mode": 0o6777, "confirmed": True, "started": False,
            }]),
            "holds": [{"tag": "x", "since": "2026-11-29T00:00:00Z"}],
        }  # fmt: skip
        path = images / f".snapchain-layer-{name}-{status.st_ino}.json"
    path.write_bytes(
        json.dumps(said, indent=1).encode() if draw.random() < 0.7 else document(said, draw, _pool(world, said))
    )
    return str(path.relative_to(case))


def _file(path: Path) -> dict[str, object]:
    status = path.stat() if path.exists() else Path("/").stat()
    return {"path": str(path), "device": status.st_dev, "inode": status.st_ino}
