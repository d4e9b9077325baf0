"""Runs a command and says what it cost; makes data that is neither all noise nor all zeroes."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

KiB = 1 << 10
MiB = 1 << 20
GiB = 1 << 30


_LAUNCHER = Path(__file__).with_name("launcher.py")


@dataclass(frozen=True)
class Cost:
    """One run of a program, and the children that it waited for.

    seconds: wall clock; cpu: seconds of all processors; peak: bytes resident at most
    """

    seconds: float
    cpu: float
    peak: int
    out: str


def run(argv: Sequence[str | Path], folder: Path, **environment: str) -> Cost:
    """Run a program to its end; it must succeed."""
    said = folder / ".said"
    told = folder / ".usage"
    began = time.monotonic()
    with said.open("wb") as out:
        # Through a small process: a child's peak memory begins with that of whoever forks it.
        status = subprocess.run(
            [sys.executable, "-I", "-S", _LAUNCHER, told, *argv],
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            env={**os.environ, "SNAPCHAIN_PASSWORD": "x", "RESTIC_PASSWORD": "x", **environment},
            check=False,
        ).returncode
    seconds = time.monotonic() - began
    text = said.read_text(errors="replace")
    assert status == 0, f"{argv}: {text}"
    cpu, peak = told.read_text().split()
    return Cost(seconds, float(cpu), int(peak), text)


def snapchain(folder: Path, *words: str | Path) -> Cost:
    """Run the snapchain command of this environment."""
    return run([Path(sys.executable).with_name("snapchain"), *words], folder)


def qemu_img(*words: str | Path) -> None:
    subprocess.run(["qemu-img", *map(str, words)], check=True, capture_output=True)


def qemu_io(image: Path, words: Sequence[str]) -> None:
    """Have QEMU carry out some commands on a qcow2 image, as a guest would write."""
    argv = ["qemu-io", "-f", "qcow2", "-t", "writeback", str(image)]
    subprocess.run(argv, input="\n".join(words), text=True, check=True, capture_output=True)


def mixed(path: Path, size: int, *, seed: int = 1) -> None:
    """A file of `size` bytes as disks hold them: half real files of this machine, a third noise, some zeroes.

    The same on the same machine. Noise stands for what is compressed or encrypted already.
    """
    draw = random.Random(seed)
    files = real_files(size // 2, seed=seed)
    with path.open("wb") as file:
        while file.tell() < size:
            kind = draw.randrange(5)
            if kind < 3 and files:
                begin = file.tell()
                while files and file.tell() < begin + 8 * MiB:
                    file.write(files.pop().read_bytes())
                    file.write(bytes(-file.tell() % 4096))
            elif kind < 4:
                for _ in range(12):
                    file.write(draw.randbytes(MiB))
            else:
                file.write(bytes(draw.randrange(16) * MiB))
        file.truncate(size)


def real_files(size: int, *, seed: int) -> list[Path]:
    """Some of the files under /usr and of this Python, `size` bytes in all if there are as many."""
    found: set[Path] = set()
    for root in ("/usr/bin", "/usr/lib", "/usr/share", sys.prefix, sys.base_prefix):
        for folder, _, names in os.walk(root):
            found.update(Path(folder, name) for name in names)
    chosen: list[Path] = []
    everything = sorted(path for path in found if not path.is_symlink() and path.is_file())
    random.Random(seed).shuffle(everything)
    for path in everything:
        length = path.stat().st_size
        if size > 0 and 0 < length < 64 * MiB and os.access(path, os.R_OK):
            chosen.append(path)
            size -= length
    return chosen


def fragmented(path: Path, *, extents: int, cluster_size: int) -> None:
    """A qcow2 image in which every second cluster is written: `extents` of them. QEMU would take an hour."""
    from snapchain.image.qcow2.layout import plan
    from snapchain.image.qcow2.write import Qcow2Writer
    from snapchain.model.extents import ABSENT, DATA, Extents

    at = np.arange(2 * extents, dtype=np.int64) * cluster_size
    layout = plan(
        Extents.from_starts(2 * extents * cluster_size, at, np.tile(np.array([DATA, ABSENT]), extents)),
        cluster_size=cluster_size,
    )
    draw = np.random.default_rng(5)
    with path.open("x+b") as file, Qcow2Writer(file.fileno(), layout):
        for start in range(layout.data_offset, layout.file_bytes, 16 * MiB):
            # 312 bytes of noise in each 512: neither incompressible nor the same twice.
            block = draw.integers(0, 256, (16 * MiB // 512, 512), dtype=np.uint8)
            block[:, :200] = 65
            os.pwrite(file.fileno(), block.tobytes()[: layout.file_bytes - start], start)


def warm(*paths: Path) -> None:
    """Read files once, so that the page cache treats every contender alike."""
    for path in paths:
        with path.open("rb") as file:
            while file.read(16 * MiB):
                pass
