"""serve beside restore, and beside qemu-nbd on the restored file: `make bench ARGS='-k serve'`.

A disk of SNAPCHAIN_BENCH_MIB (1024) in a repository in a directory, whose packs are in the page cache. Each server is
read by the same stock clients: nbdcopy for all of it, `qemu-img bench` for 4 KiB here and there, 16 at a time.
"""

from __future__ import annotations

import json
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.bench.measure import KiB, MiB, mixed, qemu_img, run, snapchain, warm
from tests.servers import DIE_WITH_PARENT, greets
from tests.waiting import wait_until

pytestmark = [pytest.mark.bench, pytest.mark.timeout(1800)]

SIZE = int(os.environ.get("SNAPCHAIN_BENCH_MIB", "1024")) * MiB
ROUNDS = int(os.environ.get("SNAPCHAIN_BENCH_ROUNDS", "3"))
REQUESTS, STEP = 100_000, 17 * 4 * KiB
SNAPCHAIN = Path(sys.executable).with_name("snapchain")


@contextmanager
def served(folder: Path, *options: str) -> Iterator[tuple[str, int]]:
    """The URI, and the process."""
    words = [str(SNAPCHAIN), "serve", "repo::web1/vda", "--socket", str(folder / "s"), "--json", *options]
    environment = {**os.environ, "SNAPCHAIN_PASSWORD": "x"}
    with subprocess.Popen(words, cwd=folder, stdout=subprocess.PIPE, text=True, env=environment) as child:
        assert child.stdout is not None
        try:
            yield json.loads(child.stdout.readline())["exports"][0]["uri"], child.pid
        finally:
            child.terminate()
            child.communicate()


@contextmanager
def by_qemu(image: Path, form: str) -> Iterator[str]:
    """qemu-nbd on a file."""
    path = image.with_suffix(".sock")
    words = [
        "qemu-nbd",
        "--read-only",
        "--persistent",
        "-e",
        "8",
        "-f",
        form,
        "-x",
        "disk",
        "-k",
        str(path),
        str(image),
    ]
    with subprocess.Popen([*DIE_WITH_PARENT, *words]) as child:
        try:
            wait_until(lambda: greets(path), alive=lambda: child.poll() is None)
            yield f"nbd+unix:///disk?socket={path}"
        finally:
            child.kill()


def copied(uri: str, folder: Path) -> float:
    """Seconds to read all data."""
    return run(["nbdcopy", uri, "null:"], folder).seconds


def scattered(uri: str, folder: Path) -> float:
    """4 KiB reads a second."""
    words = ["qemu-img", "bench", "-c", str(REQUESTS), "-d", "16", "-s", "4096", "-S", str(STEP), "-f", "raw", uri]
    found = re.search(r"completed in ([0-9.]+) seconds", run(words, folder).out)
    assert found is not None
    return REQUESTS / float(found[1])


def resident(pid: int) -> int:
    """Bytes at most."""
    return int(re.findall(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())[0]) * KiB


def test_serve_beside_restore_and_qemu_nbd(tmp_path: Path) -> None:
    mixed(tmp_path / "disk.raw", SIZE)
    qemu_img("convert", "-f", "raw", "-O", "qcow2", tmp_path / "disk.raw", tmp_path / "disk.qcow2")
    (tmp_path / "disk.raw").unlink()
    snapchain(tmp_path, "init", "repo")
    snapchain(tmp_path, "ship", "disk.qcow2", "repo::web1/vda")
    found: dict[str, list[float]] = {}

    def note(what: str, value: float) -> None:
        found.setdefault(what, []).append(value)

    for _ in range(ROUNDS):
        warm(*(path for path in (tmp_path / "repo" / "packs").rglob("*") if path.is_file()))
        for form in ("raw", "qcow2"):
            (tmp_path / f"out.{form}").unlink(missing_ok=True)
            cost = snapchain(tmp_path, "restore", "repo::web1/vda", f"out.{form}", "--quiet")
            note(f"restore to {form}, s", cost.seconds)
        with served(tmp_path, "--cache-size", f"{2 * SIZE}") as (uri, _):
            note("nbdcopy from serve, first time, s", copied(uri, tmp_path))
            note("nbdcopy from serve, from cache, s", copied(uri, tmp_path))
            note("scattered 4 KiB from serve, from cache, 1/s", scattered(uri, tmp_path))
        with served(tmp_path, "--cache-size", "64M") as (uri, pid):
            note("resident before, cache of 64 MiB, MiB", resident(pid) / MiB)
            note("nbdcopy from serve, cache of 64 MiB, s", copied(uri, tmp_path))
            note("resident at most, cache of 64 MiB, MiB", resident(pid) / MiB)
        for form in ("raw", "qcow2"):
            with by_qemu(tmp_path / f"out.{form}", form) as uri:
                note(f"nbdcopy from qemu-nbd on {form}, s", copied(uri, tmp_path))
                note(f"scattered 4 KiB from qemu-nbd on {form}, 1/s", scattered(uri, tmp_path))
    print(f"\na disk of {SIZE // MiB} MiB")
    middle = {what: statistics.median(values) for what, values in found.items()}
    for what, value in middle.items():
        print(f"  {what:<50} {value:10.2f}")
    speed = min(middle[f"restore to {form}, s"] for form in ("raw", "qcow2"))
    grown = middle["resident at most, cache of 64 MiB, MiB"] - middle["resident before, cache of 64 MiB, MiB"]
    rate = middle["scattered 4 KiB from serve, from cache, 1/s"]
    for promise, share in (
        ("sequential read at 0.8 x the speed of restore", speed / middle["nbdcopy from serve, first time, s"] / 0.8),
        ("20,000 reads of 4 KiB a second from cache", rate / 20_000),
        ("memory grows by 2 x a cache of 64 MiB at most", 128 / grown),
    ):
        print(f"  promised: {promise}: {'held' if share >= 1 else 'MISSED'}, {share:.2f} of it")
    for form in ("raw", "qcow2"):
        first = middle[f"nbdcopy from qemu-nbd on {form}, s"] / middle["nbdcopy from serve, first time, s"]
        warm_ = middle[f"nbdcopy from qemu-nbd on {form}, s"] / middle["nbdcopy from serve, from cache, s"]
        small = rate / middle[f"scattered 4 KiB from qemu-nbd on {form}, 1/s"]
        print(f"  beside qemu-nbd on {form}: all of it {first:.2f} x, from cache {warm_:.2f} x; 4 KiB {small:.2f} x")
