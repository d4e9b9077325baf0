"""A small world that cases spoil: images, an encrypted and a plain repository, a replica, and what each point shows.

    ROOT/case        where a case runs: all paths that are recorded anywhere are the same in each case
    ROOT/stages/N    copies of it as it was after N nights; then merged and collected; then given to another host
    ROOT/truth       raw files: what each point shows

Ids and salts are drawn from a seed, so that the same world, and the same case, can be made again.
"""

from __future__ import annotations

import os
import random
import secrets
import shutil
import stat
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Annotated

from pydantic import Field

from snapchain.repository import keys
from tests.hostile import child

PASSPHRASE = "correct horse"
WEB, DB = "web1/vda", "db/vda"
NIGHTS = 4
MERGED, GIVEN = "merged", "given"
STAGES = (*map(str, range(1, NIGHTS + 1)), MERGED, GIVEN)
EXPECTED = frozenset({"images", "enc", "plain", "replica", "outside", "state", "cache", "home", "nightly.toml", "out"})
SIZE = (3 << 20) - 512
_NIGHTLY = """\
state = "{case}/state/nightly.json"
[keep]
last = 2
[verify]
sample = "20%"
[[destinations]]
name = "enc"
url = "{case}/enc"
[[destinations]]
name = "plain"
url = "{case}/plain"
[[disks]]
path = "{case}/images/web1.qcow2"
name = "web1/vda"
merge_above = 3
[[disks]]
path = "{case}/images/db.qcow2"
name = "db/vda"
"""


class CheapSlot(keys.KeySlot):
    """Takes a millisecond where a real one takes a fifth of a second."""

    memory_kib: Annotated[int, Field(ge=8, le=1024 * 1024)] = 8
    iterations: Annotated[int, Field(ge=1, le=16)] = 1
    lanes: Annotated[int, Field(ge=1, le=16)] = 1


Standing = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class World:
    """points: of each disk, the numbers that every stage from the second night on can have"""

    root: Path

    @property
    def case(self) -> Path:
        return self.root / "case"

    def truth(self, disk: str, point: int) -> Path:
        """A raw file of what it shows."""
        return self.root / "truth" / f"{disk.replace('/', '-')}.{point}"

    def truths(self, disk: str) -> dict[int, Path]:
        found = ((point, self.truth(disk, point)) for point in range(1, NIGHTS + 1))
        return {point: path for point, path in found if path.exists()}

    def stage(self, name: str) -> Path:
        return self.root / "stages" / name

    def set_up(self, stage: str, parts: tuple[str, ...]) -> None:
        """Make the case's directory anew with some parts of a stage."""
        _remove(self.case)
        self.case.mkdir()
        for part in ("outside", "state", "cache", "home", "out", *parts):
            source = self.stage(stage) / part
            if source.is_dir():
                shutil.copytree(source, self.case / part, symlinks=True)
            elif source.exists():
                shutil.copy2(source, self.case / part)

    def environment(self) -> dict[str, str]:
        """What a command is run with."""
        return {
            "HOME": str(self.case / "home"),
            "XDG_STATE_HOME": str(self.case / "state"),
            "XDG_CACHE_HOME": str(self.case / "cache"),
            "SNAPCHAIN_PASSWORD": PASSPHRASE,
            "PATH": os.environ["PATH"],
            "COLUMNS": "200",
            "TZ": "UTC",
            "AWS_ACCESS_KEY_ID": "x",
            "AWS_SECRET_ACCESS_KEY": "y",
            "AWS_EC2_METADATA_DISABLED": "true",
        }


def enter(world: World, draw: random.Random) -> None:
    """In a child: its environment, and ids that come from the case's seed."""
    environment = world.environment()
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(world.case)
    os.umask(0o022)
    os.fsync = os.fdatasync = _no_sync  # type: ignore[assignment]
    secrets.token_bytes = lambda nbytes=32: draw.randbytes(32 if nbytes is None else nbytes)
    keys.KeySlot = CheapSlot  # type: ignore[misc]


def _no_sync(_descriptor: object) -> None:
    """Nothing here loses power."""


def build(root: Path) -> World:
    """Make it. Raises AssertionError where a command fails that should not."""
    world = World(root)
    _remove(root)
    for path in (world.case, root / "stages", root / "truth", root / "build"):
        path.mkdir(parents=True)
    for part in ("images", "outside", "state", "cache", "home", "out"):
        (world.case / part).mkdir()
    (world.case / "outside" / "canary").write_bytes(b"nobody's business\n" * 100)
    _qemu_img("create", "-q", "-f", "qcow2", world.case / "outside" / "canary.qcow2", "1M")
    (world.case / "nightly.toml").write_text(_NIGHTLY.format(case=world.case))

    def first(shell: child.Shell) -> None:
        enter(world, random.Random(1))
        _all_well(shell.run("init", world.case / "enc"))
        _all_well(shell.run("init", world.case / "plain", "--no-encryption"))

    _built(first, root)
    for night in range(1, NIGHTS + 1):
        _guests_write(world, night)
        _built(lambda shell, night=night: _one_night(world, shell, night), root)
        shutil.copytree(world.case, world.stage(str(night)), symlinks=True)

    def merging(shell: child.Shell) -> None:
        enter(world, random.Random(2))
        for repository in ("enc", "plain"):
            _all_well(shell.run("hold", f"{world.case}/{repository}::{WEB}@2", "--tag", "audit", "--reason", "why"))
            _all_well(shell.run("merge", f"{world.case}/{repository}::{WEB}", "--keep-last", "2"))
            _all_well(shell.run("gc", f"{world.case}/{repository}"))
        _all_well(shell.run("merge", f"dir:{world.case}/replica::{WEB}", "--keep-last", "2"))
        _all_well(shell.run("hold", world.case / "images" / "web1.1.qcow2", "--tag", "keep"))

    _built(merging, root)
    shutil.copytree(world.case, world.stage(MERGED), symlinks=True)

    def giving(shell: child.Shell) -> None:
        enter(world, random.Random(3))
        _all_well(shell.run("migrate", "--offline", f"{world.case}/images/db.qcow2", f"dir:{world.case}/replica::{DB}"))

    _built(giving, root)
    shutil.copytree(world.case, world.stage(GIVEN), symlinks=True)
    return world


def _one_night(world: World, shell: child.Shell, night: int) -> None:
    enter(world, random.Random(night))
    case = world.case
    for name, disk in (("web1", WEB), ("db", DB)):
        if name == "db" and night > 2:
            continue
        image = case / "images" / f"{name}.qcow2"
        _all_well(shell.run("ship", image, f"{case}/enc::{disk}", "--label", f"n{night}"))
        _all_well(shell.run("ship", image, f"{case}/plain::{disk}", "--label", f"n{night}"))
        if night < NIGHTS:  # the last one is what cases send
            _all_well(shell.run("send", image, f"dir:{case}/replica::{disk}", "--label", f"n{night}"))
            _all_well(shell.run("snapshot", image, "--label", f"n{night}"))


def _guests_write(world: World, night: int) -> None:
    images = world.case / "images"
    noise = world.root / "build" / "noise"
    noise.write_bytes(random.Random(night).randbytes(200_000))
    for name, disk, options in (("web1", WEB, ["-o", "cluster_size=64k"]), ("db", DB, ["-o", "cluster_size=4k"])):
        if name == "db" and night > 2:
            continue
        path = images / f"{name}.qcow2"
        if night == 1:
            _qemu_img("create", "-q", "-f", "qcow2", *options, path, str(SIZE if name == "web1" else 1 << 20))
        at = night * 150 << 10
        words = [
            f"write -s {noise} {at} 200k", f"write -P {night} 0 64k", f"write -z {at + (300 << 10)} 64k",
            f"write -P {night + 64} {night * 64}k 5k",
        ]  # fmt: skip
        given = [part for command in words for part in ("-c", command)]
        subprocess.run(["qemu-io", "-t", "unsafe", "-f", "qcow2", *given, str(path)], check=True, capture_output=True)
        _qemu_img("convert", "-f", "qcow2", "-O", "raw", path, world.truth(disk, night))


def _built(work: object, root: Path) -> None:
    place = root / "build" / secrets.token_hex(4)
    done = child.run(work, place, limited=False)  # type: ignore[arg-type]
    assert not done.failure, (done.failure, done.steps[-1:])


def _all_well(step: child.Step) -> None:
    assert step.code == 0, (step.words, step.err)


def _qemu_img(*words: str | Path) -> None:
    subprocess.run(["qemu-img", *map(str, words)], check=True, capture_output=True)


def standing(directory: Path, *, but: frozenset[str] = frozenset()) -> Standing:
    """Of each entry below it: kind and mode, owner, size, and a digest of its bytes. but: top-level names left out."""
    return {str(path.relative_to(directory)): _look(path) for path in _entries(directory, but)}


def _entries(directory: Path, but: frozenset[str]) -> Iterator[Path]:
    for path in sorted(directory.iterdir()) if directory.is_dir() else ():
        if path.name not in but:
            yield path
            if path.is_dir() and not path.is_symlink():
                yield from _entries(path, frozenset())


def _look(path: Path) -> tuple[int, ...]:
    found = path.lstat()
    digest = 0
    if stat.S_ISREG(found.st_mode) and found.st_size < 64 << 20:
        digest = int.from_bytes(blake2b(path.read_bytes(), digest_size=8).digest())
    return found.st_mode, found.st_uid, found.st_gid, 0 if stat.S_ISDIR(found.st_mode) else found.st_size, digest


def _remove(path: Path) -> None:
    if path.exists():
        shutil.rmtree(path)
