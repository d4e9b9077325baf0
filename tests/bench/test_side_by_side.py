"""This tree against an earlier commit, whole processes in turns: `make bench ARGS='-k side_by_side'`.

BEFORE names the commit (default: the last release tag, else e78b667, the end of version 0.1). A worktree of it runs
with the interpreter and the packages of this environment, and the modules of both trees are compiled beforehand.
Two chains are shipped, sent, restored and merged: a large one of SNAPCHAIN_BENCH_LAYERS files (120), and a small one of
3, which costs little more than the start of the process. SNAPCHAIN_BENCH_ROUNDS sets the rounds (9), and
SNAPCHAIN_BENCH_JOBS is a pattern of jobs to measure, such as 'large merge'.

Each round runs every job with both trees, one right after the other. The bar is 1.05 times the processor time, the wall
clock and the peak memory. Load of others only ever adds time, so a time is compared twice: by medians and by minima.
A job is too slow if both ratios pass the bar by more than the noise: twice the standard error of the median of the
ratios of all rounds. Peak memory has no such excuse: its median decides.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.bench.measure import Cost, MiB, qemu_io, run

pytestmark = [pytest.mark.bench, pytest.mark.timeout(7200)]

ROOT = Path(__file__).resolve().parents[2]
LAYERS = int(os.environ.get("SNAPCHAIN_BENCH_LAYERS", "120"))
ROUNDS = int(os.environ.get("SNAPCHAIN_BENCH_ROUNDS", "9"))
JOBS = os.environ.get("SNAPCHAIN_BENCH_JOBS", "")
BAR = 1.05
TOP = "disk.qcow2"
Tree = Callable[[Path, list[str]], Cost]
MERGES = {
    "merge --max-layers": ["--max-layers", "2"],
    "merge new-file": ["--strategy", "new-file"],
    "merge absorb": ["--strategy", "absorb"],
    "merge commit": ["--strategy", "commit"],
    "merge --flatten": ["--flatten"],
}
"""A real merge of an image -> its options. Each merges a fresh copy of the chain."""


@dataclass(frozen=True)
class Job:
    """What is measured: a command, and whether the chain that it is given must be a fresh copy."""

    words: list[str]
    fresh: bool = False


def jobs(folder: Path) -> dict[str, Job]:
    """In this order: later ones read what earlier ones wrote. An unselected job runs in the first round if needed."""
    image, replica = f"chain/{TOP}", f"dir:{folder}/replica"
    return {
        "ship": Job(["ship", image, "repo::disk"]),
        "ship again": Job(["ship", image, "repo::disk"]),
        "send": Job(["send", image, f"{replica}::disk"]),
        "restore": Job(["restore", "repo::disk", "out.qcow2"]),
        "restore replica": Job(["restore", f"{replica}::disk", "out.qcow2"]),
        "inspect": Job(["inspect", image]),
        "merge --dry-run": Job(["merge", image, "--max-layers", "2", "--dry-run"]),
        **{name: Job(["merge", image, *options], fresh=True) for name, options in MERGES.items()},
    }


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
        # Otherwise each start would compile the modules anew where the environment forbids to keep them.
        subprocess.run([sys.executable, "-m", "compileall", "-q", tree / "snapchain"], check=True)

        def command(folder: Path, words: list[str]) -> Cost:
            argv = [sys.executable, "-P", "-m", "snapchain", *words]
            homes = {"XDG_STATE_HOME": str(folder / ".state"), "XDG_CACHE_HOME": str(folder / ".cache")}
            return run(argv, folder, PYTHONPATH=str(tree), PYTHONDONTWRITEBYTECODE="", **homes)

        return command

    try:
        yield {"before": of(place), "now": of(ROOT)}
    finally:
        subprocess.run(["git", "worktree", "remove", "--force", place], cwd=ROOT, check=True)


def make_chain(folder: Path, layers: int, writes: int) -> Path:
    """A folder with a disk of 8 GiB in `layers` files, each with writes of 512 KiB that partly hide what is below."""
    folder.mkdir()
    draw = random.Random(3)
    noise = folder.with_name("noise")
    noise.write_bytes(draw.randbytes(8 * MiB))
    below: list[str] = []
    for number in range(layers):
        name = TOP if number == layers - 1 else f"{number}.qcow2"
        size = [] if below else ["8G"]
        # From inside the folder: backing files are named relative to it.
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", *below, name, *size], cwd=folder, check=True)
        places = [draw.randrange(1024) for _ in range(writes)]
        qemu_io(folder / name, [f"write -q -s {noise} {place * 512}k 512k" for place in places])
        below = ["-b", name, "-F", "qcow2"]
    return folder


@pytest.mark.parametrize(("size", "layers", "writes"), [("small", 3, 2), ("large", LAYERS, 8)])
def test_side_by_side(trees: dict[str, Tree], tmp_path: Path, size: str, layers: int, writes: int) -> None:
    if not any(re.search(JOBS, f"{size} {name}") for name in jobs(tmp_path)):
        return
    chain = make_chain(tmp_path / "pristine", layers, writes)
    folders = {tree: tmp_path / tree for tree in trees}
    costs: dict[tuple[str, str], list[Cost]] = {}
    for number in range(ROUNDS + 1):
        turn = ("before", "now") if number % 2 else ("now", "before")
        for tree, folder in folders.items():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            copy(chain, folder)
            trees[tree](folder, ["init", "repo", "--no-encryption"])
        for name in jobs(tmp_path):
            chosen = bool(re.search(JOBS, f"{size} {name}"))
            for tree in turn:
                job = jobs(folders[tree])[name]
                if not (chosen or (name in {"ship", "send"} and "restore" in JOBS)):
                    continue
                if job.fresh:
                    copy(chain, folders[tree])
                (folders[tree] / "out.qcow2").unlink(missing_ok=True)
                cost = trees[tree](folders[tree], job.words)
                if chosen and number:  # the first round fills the page cache
                    costs.setdefault((name, tree), []).append(cost)
    failed = table(size, costs)
    assert not failed


def copy(chain: Path, folder: Path) -> None:
    """A fresh copy of the chain in a folder, on the disk already: writing it back is no part of a measurement."""
    shutil.rmtree(folder / "chain", ignore_errors=True)
    subprocess.run(["cp", "-r", "--reflink=auto", chain, folder / "chain"], check=True)
    for path in (folder / "chain").iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())


def table(size: str, costs: dict[tuple[str, str], list[Cost]]) -> list[str]:
    """Print a line a job, and return the jobs that are too slow or too large."""
    columns = (
        f"{'processor s (median)':>21} {'ratio, of minima':>17} {'noise':>6} {'wall':>6} {'of minima':>10} {'noise':>6}"
    )
    print(f"\n{f'{size}, {ROUNDS} rounds':20} {columns} {'peak MiB':>11} {'ratio':>6}", flush=True)
    failed = []
    for job in dict.fromkeys(job for job, _ in costs):
        old, new = costs[job, "before"], costs[job, "now"]
        cpu = Comparison.of([each.cpu for each in old], [each.cpu for each in new])
        wall = Comparison.of([each.seconds for each in old], [each.seconds for each in new])
        memory = Comparison.of([float(each.peak) for each in old], [float(each.peak) for each in new])
        bad = cpu.too_much() or wall.too_much() or memory.ratio > BAR
        print(
            f"{job:20} {cpu.before:9.2f} -> {cpu.now:8.2f} {cpu.ratio:8.2f} {cpu.of_minima:8.2f} {cpu.noise:6.2f} "
            f"{wall.ratio:6.2f} {wall.of_minima:10.2f} {wall.noise:6.2f} "
            f"{memory.before / MiB:4.0f} -> {memory.now / MiB:3.0f} {memory.ratio:6.2f}  {'FAIL' if bad else 'pass'}",
            flush=True,
        )
        failed += [job] if bad else []
    return failed


@dataclass(frozen=True)
class Comparison:
    """Two series of one quantity: their medians, the ratios of medians and of minima, and how far noise moves those."""

    before: float
    now: float
    ratio: float
    of_minima: float
    noise: float

    @classmethod
    def of(cls, old: list[float], new: list[float]) -> Comparison:
        before, now = statistics.median(old), statistics.median(new)
        ratios = [later / earlier for earlier, later in zip(old, new, strict=True)]
        middle = statistics.median(ratios)
        deviation = 1.4826 * statistics.median(abs(each - middle) for each in ratios)
        return cls(before, now, now / before, min(new) / min(old), 2 * 1.2533 * deviation / len(ratios) ** 0.5)

    def too_much(self) -> bool:
        """Both ratios pass the bar by more than the noise."""
        return min(self.ratio, self.of_minima) > BAR + self.noise
