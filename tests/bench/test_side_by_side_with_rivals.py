"""snapchain, restic and borg on one real disk, its generations and its clones: `make bench ARGS='-k with_rivals'`.

Prints what each one stores, and how long it takes, all in one run on one disk (tests/bench/rivals.py). Every program
has its defaults, with encryption; borg has `-C zstd`, since its default is lz4. Times are the best of two rounds in
turns (SNAPCHAIN_BENCH_ROUNDS). snapchain reads the overlays of generations, as a guest leaves them; the others read the
raw disks, as they must. Clones are raw disks for all: no chain tells what a clone has in common with its base.

Sizes do not depend on the load of the machine, and decide: after three generations no more than the better one stores,
and with ten clones at most 60 % of it. Times, and the size of the first ship, are printed beside what was promised.
Processor time is compared too: on a busy machine it varies less than the wall clock.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.bench.measure import Cost, MiB, qemu_img, run, snapchain, warm
from tests.bench.rivals import clones, generations, weight

pytestmark = [pytest.mark.bench, pytest.mark.timeout(7200)]

ROUNDS = int(os.environ.get("SNAPCHAIN_BENCH_ROUNDS", "2"))
NAMES = ("snapchain", "restic", "borg")
BORG = {"BORG_PASSPHRASE": "x", "BORG_BASE_DIR": ".borg"}
STEPS = {"first ship": 2.0, "second ship": 1.5, "third ship": 1.5, "restore": 2.0}
"""How many times as fast as the better of the others each was promised to be."""
WEIGHT, CLONED = 1.0, 0.6
"""The most that may be stored, as a share of what the better of the others stores."""
Program = Callable[..., Cost]


@dataclass(frozen=True)
class Round:
    """One program, once: what each step took, and what was stored after each ship."""

    costs: Mapping[str, Cost]
    stored: Sequence[int]


def ship(name: str, folder: Path, image: Path, raw: Path, disk: str = "disk") -> Cost:
    """Back an image up. The raw disk has one path for restic and borg, so that they know it again."""
    if name == "snapchain":
        return snapchain(folder, "ship", image, f"snapchain::{disk}")
    path = folder / f"{disk}.raw"
    path.unlink(missing_ok=True)
    path.hardlink_to(raw)
    if name == "restic":
        return run(["restic", "backup", "-q", "-r", "restic", path.name], folder, RESTIC_CACHE_DIR=".cache")
    return run(["borg", "create", "-C", "zstd", f"borg::{disk}-{{now:%s.%f}}", path.name], folder, **BORG)


def begin(name: str, folder: Path) -> None:
    for left in (name, "back", ".cache"):
        shutil.rmtree(folder / left, ignore_errors=True)
    match name:
        case "snapchain":
            snapchain(folder, "init", "snapchain")
        case "restic":
            run(["restic", "init", "-q", "--repository-version", "2", "-r", "restic"], folder)
        case "borg":
            run(["borg", "init", "-e", "repokey", "borg"], folder, **BORG)


def restore(name: str, folder: Path) -> tuple[Cost, Path]:
    """The newest generation, and the file that it is in."""
    back = folder / "back"
    back.mkdir()
    match name:
        case "snapchain":
            return snapchain(folder, "restore", "snapchain::disk", back / "disk.raw"), back / "disk.raw"
        case "restic":
            words = ["restic", "restore", "-q", "-r", "restic", "latest", "--target", "back"]
            return run(words, folder, RESTIC_CACHE_DIR=".cache"), back / "disk.raw"
    last = run(["borg", "list", "--short", "--last", "1", "borg"], folder, **BORG).out.split()[-1]
    away = {**BORG, "BORG_BASE_DIR": str(folder / ".borg")}
    return run(["borg", "extract", f"{folder}/borg::{last}"], back, **away), back / "disk.raw"


def one_round(name: str, folder: Path, made: Sequence[tuple[Path, Path]]) -> Round:
    begin(name, folder)
    costs, stored = {}, []
    for step, (image, raw) in zip(STEPS, made, strict=False):
        costs[step] = ship(name, folder, image, raw)
        stored.append(weight(folder / name))
    costs["restore"], back = restore(name, folder)
    qemu_img("compare", "-f", "raw", "-F", "raw", back, made[-1][1])
    shutil.rmtree(folder / "back")
    return Round(costs, stored)


def test_side_by_side_with_rivals(tmp_path: Path) -> None:
    made = generations(tmp_path)
    warm(*(path for pair in made for path in pair))
    rounds: dict[str, list[Round]] = {name: [] for name in NAMES}
    for number in range(ROUNDS):  # in turns, so that a busy moment of the machine hits all
        for name in NAMES if number % 2 else reversed(NAMES):
            rounds[name].append(one_round(name, tmp_path, made))
    print(
        f"\n\n{'':14}"
        + "".join(f"{name:>18}" for name in NAMES)
        + f"{'times as fast':>16}{'of its cpu':>12} {'promised':>9}"
    )
    for step, promised in STEPS.items():
        walls = {name: min(each.costs[step].seconds for each in rounds[name]) for name in NAMES}
        cpus = {name: min(each.costs[step].cpu for each in rounds[name]) for name in NAMES}
        cells = "".join(f"{walls[name]:8.1f} s {cpus[name]:5.1f} cpu" for name in NAMES)
        ratio = min(walls[name] for name in NAMES[1:]) / walls["snapchain"]
        share = cpus["snapchain"] / min(cpus[name] for name in NAMES[1:])
        print(f"{step:14}{cells}{ratio:16.2f}{share:12.2f} {promised:9.1f}", flush=True)
    sizes = {name: rounds[name][-1].stored for name in NAMES}
    for number, step in enumerate(list(STEPS)[:3]):
        sized("after " + step, {name: sizes[name][number] for name in NAMES}, WEIGHT)
    disks = [raw for _, raw in (made[0], *clones(tmp_path, made[0]))]
    for name in NAMES:
        begin(name, tmp_path)
        for number, raw in enumerate(disks):
            ship(name, tmp_path, raw, raw, f"like{number}")
    cloned = {name: weight(tmp_path / name) for name in NAMES}
    sized("and 10 clones", cloned, CLONED)
    assert sizes["snapchain"][-1] <= WEIGHT * min(sizes["restic"][-1], sizes["borg"][-1])
    assert cloned["snapchain"] <= CLONED * min(cloned["restic"], cloned["borg"])


def sized(what: str, stored: Mapping[str, int], promised: float) -> None:
    cells = "".join(f"{stored[name] / MiB:14.1f} MiB" for name in NAMES)
    share = stored["snapchain"] / min(stored[name] for name in NAMES[1:])
    print(f"{what:18}{cells}   {share:.3f} of the better one, promised {promised:.2f}", flush=True)
