"""Merging measured against the recipes of qemu-img, whole processes in turns: `make bench ARGS='-k merge'`.

6 overlays hold 2.2 GiB, of which 1.2 GiB survive.  Each contender begins with the same files, flushed and read once.
SNAPCHAIN_BENCH_ON chooses filesystems (ext4,xfs,btrfs), SNAPCHAIN_BENCH_PIECE the KiB of a guest write (1024).
"""

from __future__ import annotations

import os
import random
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.bench.measure import Cost, GiB, KiB, MiB, qemu_img, qemu_io, run, warm
from tests.image.mounts import mounted

pytestmark = [pytest.mark.bench, pytest.mark.root, pytest.mark.timeout(3600)]

FILESYSTEMS = os.environ.get("SNAPCHAIN_BENCH_ON", "ext4,xfs,btrfs").split(",")
PIECE = int(os.environ.get("SNAPCHAIN_BENCH_PIECE", "1024")) * KiB
ROUNDS = int(os.environ.get("SNAPCHAIN_BENCH_ROUNDS", "3"))
SNAPCHAIN = Path(sys.executable).with_name("snapchain")
TOP = "top.qcow2"


def build(folder: Path, *, overlays: int, allocated: int, space: int, piece: int, seed: int = 7) -> None:
    """A root with 1 GiB, and overlays that write `allocated` bytes together, anywhere in the first `space` bytes."""
    folder.mkdir()
    noise = folder.with_name("noise")
    noise.write_bytes(random.Random(seed).randbytes(64 * MiB))
    root = folder / "root.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", root, str(16 * GiB))
    qemu_io(root, [f"write -q -s {noise} {at} 64M" for at in range(0, GiB, 64 * MiB)])
    draw = random.Random(seed)
    below = root
    data = noise.read_bytes()
    for number in range(overlays):
        path = folder / (TOP if number == overlays - 1 else f"{number + 1}.qcow2")
        qemu_img("create", "-q", "-f", "qcow2", "-b", below.name, "-F", "qcow2", path)
        places = draw.sample(range(space // piece), allocated // overlays // piece)
        source = folder.with_name("piece")
        source.write_bytes(data[number * 4096 : number * 4096 + piece])
        qemu_io(path, [f"write -q -s {source} {place * piece} {piece}" for place in places])
        below = path


def copy(source: Path, target: Path) -> None:
    """Files as they were, on the disk, and in the page cache."""
    shutil.rmtree(target, ignore_errors=True)
    subprocess.run(["cp", "-r", "--reflink=auto", "--sparse=auto", source, target], check=True)
    os.sync()
    warm(*sorted(target.iterdir()))


@dataclass(frozen=True)
class Contender:
    """A way to make one overlay of all; `result`: the file that then shows what the top showed."""

    name: str
    commands: tuple[tuple[str, ...], ...]
    result: str


def contenders(overlays: int) -> list[Contender]:
    names = [*(f"{n + 1}.qcow2" for n in range(overlays - 1)), TOP]
    commit = ("qemu-img", "commit", "-q", "-d", "-f", "qcow2")
    relink = ("qemu-img", "rebase", "-q", "-u", "-f", "qcow2", "-F", "qcow2", "-b", names[0])
    bottom_up: list[tuple[str, ...]] = [(*commit, names[1])]
    for above in names[2:]:
        bottom_up += [(*relink, above), (*commit, above)]
    return [
        *(
            Contender(
                f"snapchain {strategy}", ((str(SNAPCHAIN), "merge", TOP, "--quiet", "--strategy", strategy),), TOP
            )
            for strategy in ("new-file", "absorb", "commit")
        ),
        Contender("snapchain (its own choice)", ((str(SNAPCHAIN), "merge", TOP, "--quiet"),), TOP),
        Contender(
            "qemu-img rebase -b root",
            (("qemu-img", "rebase", "-q", "-f", "qcow2", "-F", "qcow2", "-b", "root.qcow2", TOP),),
            TOP,
        ),
        Contender(
            "qemu-img commit -b 1", (("qemu-img", "commit", "-q", "-f", "qcow2", "-b", names[0], TOP),), names[0]
        ),
        Contender("pairwise commits, bottom-up", tuple(bottom_up), names[0]),
        Contender("pairwise commits, top-down", tuple((*commit, name) for name in names[:0:-1]), names[0]),
    ]


def measured(contender: Contender, folder: Path) -> tuple[float, float]:
    """Seconds of the wall, and of the processors."""
    costs: list[Cost] = [run(command, folder) for command in contender.commands]
    return sum(cost.seconds for cost in costs), sum(cost.cpu for cost in costs)


@pytest.fixture(params=FILESYSTEMS)
def filesystem(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    with mounted(request.param, tmp_path, size=24 * GiB) as place:
        yield place


def test_six_overlays(filesystem: Path) -> None:
    pristine, work = filesystem / "pristine", filesystem / "work"
    build(pristine, overlays=6, allocated=int(2.2 * GiB), space=int(1.61 * GiB), piece=PIECE)
    seen: dict[str, list[tuple[float, float]]] = {}
    for turn in range(ROUNDS):
        for contender in contenders(6):
            copy(pristine, work)
            seen.setdefault(contender.name, []).append(measured(contender, work))
            if not turn:
                qemu_img("compare", "-f", "qcow2", "-F", "qcow2", pristine / TOP, work / contender.result)
                qemu_img("check", "-q", "-f", "qcow2", work / contender.result)
    best = {name: min(wall for wall, _ in costs) for name, costs in seen.items()}
    left = surviving(pristine) / GiB
    stock = min(wall for name, wall in best.items() if name.startswith("qemu-img"))
    print(f"\n{filesystem.name}: 6 overlays, 2.2 GiB in writes of {PIECE // KiB} KiB, {left:.2f} GiB survive")
    for name, costs in seen.items():
        walls = " ".join(f"{wall:6.2f}" for wall, _ in costs)
        cpu = statistics.median(cpu for _, cpu in costs)
        print(f"  {name:<30} wall {walls} s   cpu {cpu:5.2f} s   {stock / best[name]:6.1f} x the better recipe")
    chosen, pairwise = best["snapchain (its own choice)"], min(best[name] for name in best if "pairwise" in name)
    start = min(run([SNAPCHAIN, "merge", "--help"], work).seconds for _ in range(3))
    wanted = 50 if filesystem.name == "xfs" else 1
    for promise, found in [
        (f"{wanted} x the better recipe", stock / chosen / wanted),
        ("4 x pairwise", pairwise / chosen / 4),
    ]:
        print(f"  promised: {promise}: {'held' if found >= 1 else 'MISSED'}, {found:.2f} of it")
    print(f"  starting the program alone takes {start:.2f} s")


def surviving(folder: Path) -> int:
    """Bytes that the overlays show together."""
    from snapchain.image import scan
    from snapchain.merge.assembly import merged_extents

    with scan(folder / TOP, format="qcow2") as chain:
        return merged_extents(chain, 1).data_bytes


@pytest.mark.parametrize("overlays", [4, 16, 64])
def test_many_overlays(filesystem: Path, overlays: int) -> None:
    """As much survives of 64 overlays as of 4: time follows that, not layers times bytes."""
    pristine, work = filesystem / "pristine", filesystem / "work"
    build(pristine, overlays=overlays, allocated=GiB, space=int(0.75 * GiB), piece=256 * KiB)
    walls = []
    for _ in range(ROUNDS):
        copy(pristine, work)
        walls.append(run([SNAPCHAIN, "merge", TOP, "--quiet"], work).seconds)
    shown = " ".join(f"{wall:.2f}" for wall in walls)
    print(f"\n{filesystem.name}: {overlays} overlays, {surviving(pristine) / MiB:.0f} MiB survive: {shown} s", end="")
