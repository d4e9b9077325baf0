"""This tree against an earlier commit, whole processes in turns: `make bench ARGS='-k side_by_side'`.

BEFORE names the commit (default: the last release tag, else e78b667, the end of version 0.1). A worktree of it runs
with the packages of this environment. A disk of 120 layers is shipped, sent, merged by plan and for real, and restored.
The bar: no more than 1.05 times the time (median) and the peak memory.
"""

from __future__ import annotations

import os
import random
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.bench.measure import Cost, MiB, qemu_io, run, warm

pytestmark = [pytest.mark.bench, pytest.mark.timeout(7200)]

ROOT = Path(__file__).resolve().parents[2]
LAYERS = int(os.environ.get("SNAPCHAIN_BENCH_LAYERS", "120"))
ROUNDS = int(os.environ.get("SNAPCHAIN_BENCH_ROUNDS", "5"))
BAR = 1.05
TOP = "disk.qcow2"
Tree = Callable[[Path, list[str]], Cost]


def commit_before() -> str:
    if named := os.environ.get("BEFORE"):
        return named
    tags = subprocess.run(
        ["git", "describe", "--tags", "--abbrev=0", "HEAD^"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return tags.stdout.strip() or "e78b667"


@pytest.fixture(scope="module")
def trees(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Tree]]:
    """How to run snapchain of both trees. `-P` and PYTHONPATH choose the tree, whatever is installed."""
    place = tmp_path_factory.mktemp("before") / "tree"
    subprocess.run(["git", "worktree", "add", "--quiet", "--detach", place, commit_before()], cwd=ROOT, check=True)

    def of(tree: Path) -> Tree:
        def command(folder: Path, words: list[str]) -> Cost:
            argv = [sys.executable, "-P", "-m", "snapchain", *words]
            homes = {"XDG_STATE_HOME": str(folder / ".state"), "XDG_CACHE_HOME": str(folder / ".cache")}
            return run(argv, folder, PYTHONPATH=str(tree), **homes)

        return command

    try:
        yield {"before": of(place), "now": of(ROOT)}
    finally:
        subprocess.run(["git", "worktree", "remove", "--force", place], cwd=ROOT, check=True)


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a disk of 8 GiB in LAYERS files, each with 4 MiB of data that partly hides what is below."""
    folder = tmp_path_factory.mktemp("chain")
    draw = random.Random(3)
    noise = folder.with_name("noise")
    noise.write_bytes(draw.randbytes(8 * MiB))
    below: list[str] = []
    for number in range(LAYERS):
        name = TOP if number == LAYERS - 1 else f"{number}.qcow2"
        size = [] if below else ["8G"]
        # From inside the folder: backing files are named relative to it.
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", *below, name, *size], cwd=folder, check=True)
        places = [draw.randrange(1024) for _ in range(8)]
        qemu_io(folder / name, [f"write -q -s {noise} {place * 512}k 512k" for place in places])
        below = ["-b", name, "-F", "qcow2"]
    return folder


def test_side_by_side(trees: dict[str, Tree], chain: Path, tmp_path: Path) -> None:
    replica = f"dir:{tmp_path}/work/replica::disk"
    jobs = {
        "ship": ["ship", f"chain/{TOP}", "repo::disk"],
        "send": ["send", f"chain/{TOP}", replica],
        "restore": ["restore", "repo::disk", "out.qcow2"],
        "merge --dry-run": ["merge", f"chain/{TOP}", "--max-layers", "10", "--dry-run"],
        "merge": ["merge", f"chain/{TOP}", "--max-layers", "10"],
    }
    costs: dict[tuple[str, str], list[Cost]] = {}
    for number in range(ROUNDS):
        for tree in ("before", "now") if number % 2 else ("now", "before"):
            folder = tmp_path / "work"
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            subprocess.run(["cp", "-r", "--reflink=auto", chain, folder / "chain"], check=True)
            warm(*sorted((folder / "chain").iterdir()))
            trees[tree](folder, ["init", "repo", "--no-encryption"])
            for job, words in jobs.items():
                costs.setdefault((job, tree), []).append(trees[tree](folder, words))
    worst = 0.0
    print(f"\n{'':16} {'before':>18} {'now':>18} {'time':>6} {'memory':>7}   (median of {ROUNDS})")
    for job in jobs:
        (old, old_peak), (new, new_peak) = (_medians(costs[job, tree]) for tree in ("before", "now"))
        shown = [f"{seconds:6.2f} s {peak / MiB:6.0f} MiB" for seconds, peak in ((old, old_peak), (new, new_peak))]
        print(f"{job:16} {shown[0]:>18} {shown[1]:>18} {new / old:6.2f} {new_peak / old_peak:7.2f}")
        worst = max(worst, new / old, new_peak / old_peak)
    assert worst <= BAR


def _medians(costs: list[Cost]) -> tuple[float, float]:
    return statistics.median(each.seconds for each in costs), statistics.median(each.peak for each in costs)
