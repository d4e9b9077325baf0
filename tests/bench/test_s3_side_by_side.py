"""snapchain and restic beside one S3 server, and how pack sizes do over a slow way: `make bench ARGS='-k s3_side'`.

The server is `rclone serve s3` on this machine, so its share of the processor is in all times, for both programs alike.
It ignores conditional writes: snapchain makes up for that by claims, which cost it some requests more. Each program has
its defaults, with encryption. A way of 20 ms is a proxy that holds each request back; it copies all bytes, and costs
processor itself, so times there tell one pack size from another and nothing else.

The disk is the one of tests/bench/rivals.py, SNAPCHAIN_BENCH_SCALE (1) times as large. Times are the best of
SNAPCHAIN_BENCH_ROUNDS (2) rounds in turns.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from tests.bench import rivals
from tests.bench.measure import Cost, MiB, qemu_img, run, snapchain, warm
from tests.objects.proxy import counting_proxy
from tests.servers import S3Server, rclone_s3

pytestmark = [pytest.mark.bench, pytest.mark.timeout(7200)]

SCALE = float(os.environ.get("SNAPCHAIN_BENCH_SCALE", "1"))
ROUNDS = int(os.environ.get("SNAPCHAIN_BENCH_ROUNDS", "2"))
LATENCY = 0.02
PACK_SIZES = ("4M", "8M", "16M", "32M", "64M")
STEPS = ("first ship", "second ship", "restore")
Made = Sequence[tuple[Path, Path]]


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Made:
    monkeypatch.setattr(rivals, "FILES", int(rivals.FILES * SCALE))
    monkeypatch.setattr(rivals, "CHANGED", int(rivals.CHANGED * SCALE))
    monkeypatch.setattr(rivals, "DISK", f"{int(1920 * SCALE)}M")
    made = rivals.generations(tmp_path)[:2]
    warm(*(path for pair in made for path in pair))
    return made


def fastest(rounds: Sequence[dict[str, Cost]], step: str) -> Cost:
    return min((each[step] for each in rounds), key=lambda cost: cost.seconds)


def with_snapchain(folder: Path, url: str, made: Made, *words: str) -> dict[str, Cost]:
    """What each step costs. words: of `init`"""
    shutil.rmtree(folder / "back", ignore_errors=True)
    (folder / "back").mkdir()
    snapchain(folder, "init", url, *words)
    costs = {
        step: snapchain(folder, "ship", image, f"{url}::disk", "--json")
        for step, (image, _) in zip(STEPS, made, strict=False)
    }
    costs["restore"] = snapchain(folder, "restore", f"{url}::disk", folder / "back/disk.raw", "--json")
    qemu_img("compare", "-f", "raw", "-F", "raw", folder / "back/disk.raw", made[-1][1])
    return costs


def with_restic(folder: Path, url: str, made: Made) -> dict[str, Cost]:
    """What each step costs."""
    shutil.rmtree(folder / "back", ignore_errors=True)
    cache = {"RESTIC_CACHE_DIR": str(folder / f".cache-{url.rpartition('/')[2]}")}
    run(["restic", "init", "-q", "--repository-version", "2", "-r", url], folder, **cache)
    costs = {}
    path = folder / "disk.raw"
    for step, (_, raw) in zip(STEPS, made, strict=False):
        path.unlink(missing_ok=True)
        path.hardlink_to(raw)
        costs[step] = run(["restic", "backup", "-q", "-r", url, path.name], folder, **cache)
    costs["restore"] = run(["restic", "restore", "-q", "-r", url, "latest", "--target", "back"], folder, **cache)
    qemu_img("compare", "-f", "raw", "-F", "raw", folder / "back/disk.raw", made[-1][1])
    return costs


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    with rclone_s3(tmp_path / "rclone") as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        yield server


def test_s3_side_by_side_with_restic(tmp_path: Path, made: Made, server: S3Server) -> None:
    programs: dict[str, Callable[[], dict[str, Cost]]] = {
        "snapchain": lambda: with_snapchain(tmp_path, f"s3://{server.new_bucket()}/r", made),
        "restic": lambda: with_restic(tmp_path, f"s3:{server.endpoint}/{server.new_bucket()}", made),
    }
    rounds: dict[str, list[dict[str, Cost]]] = {name: [] for name in programs}
    for number in range(ROUNDS):  # in turns, so that a busy moment of the machine hits both
        for name in programs if number % 2 else reversed(programs):
            rounds[name].append(programs[name]())
    print(f"\n\n{'':14}{'snapchain':>20}{'restic':>20}{'times as fast':>16}")
    for step in STEPS:
        best = {
            name: min((each[step] for each in done), key=lambda cost: cost.seconds) for name, done in rounds.items()
        }
        cells = "".join(f"{cost.seconds:10.1f} s {cost.cpu:5.1f} cpu" for cost in best.values())
        print(f"{step:14}{cells}{best['restic'].seconds / best['snapchain'].seconds:16.2f}", flush=True)


def test_s3_side_by_side_by_pack_size(
    tmp_path: Path, made: Made, server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    print(f"\n\neach request held back for {LATENCY * 1000:.0f} ms\n")
    print(f"{'pack size':>10}" + "".join(f"{step:>14}{'requests':>10}" for step in STEPS) + f"{'read':>12}")
    with counting_proxy(server.endpoint, latency=LATENCY) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", proxy.endpoint)
        for size in PACK_SIZES:
            done = [
                with_snapchain(tmp_path, f"s3://{server.new_bucket()}/r", made, "--pack-size", size)
                for _ in range(ROUNDS)
            ]
            cells = ""
            for step in STEPS:
                best = fastest(done, step)
                report = next(line for line in best.out.splitlines() if line.startswith("{"))
                (bill,) = json.loads(report)["traffic"]
                requests = sum(bill[kind] for kind in ("puts", "lists", "gets", "heads", "deletes"))
                cells += f"{best.seconds:12.1f} s{requests:10}"
            print(f"{size:>10}{cells}{bill['bytes_down'] / MiB:8.1f} MiB", flush=True)
