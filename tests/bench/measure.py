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

KiB = 1 << 10
MiB = 1 << 20
GiB = 1 << 30


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
    began = time.monotonic()
    with said.open("wb") as out:
        child = subprocess.Popen(
            [str(word) for word in argv],
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            env={**os.environ, "SNAPCHAIN_PASSWORD": "x", "RESTIC_PASSWORD": "x", **environment},
        )
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.monotonic() - began
    text = said.read_text(errors="replace")
    assert child.returncode == 0, f"{argv}: {text}"
    return Cost(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024, text)


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
    """A file of `size` bytes as disks hold them, by MiB: 4 in 10 noise, 4 text, 1 zeroes, 1 a repetition."""
    draw = random.Random(seed)
    text = [_text(draw) for _ in range(16)]
    recent: list[bytes] = []
    with path.open("wb") as file:
        for _ in range(size // MiB):
            kind = draw.randrange(10)
            if kind < 4:
                block = draw.randbytes(MiB)
            elif kind < 8:
                start = draw.randrange(MiB)
                page = text[draw.randrange(len(text))]
                block = draw.randbytes(4096) + page[start:] + page[: start - 4096] if start > 4096 else page
            elif kind < 9 or not recent:
                block = bytes(MiB)
            else:
                block = draw.choice(recent)
            recent = [*recent[-31:], block]
            file.write(block)


def _text(draw: random.Random) -> bytes:
    words = [bytes(draw.choices(b"etaoinshrdlucmfwypvbgkjqxz", k=draw.randrange(2, 10))) for _ in range(3000)]
    lines = b""
    while len(lines) < MiB:
        lines += b" ".join(draw.choices(words, k=5000)) + b"\n"
    return lines[:MiB]


def warm(*paths: Path) -> None:
    """Read files once, so that the page cache treats every contender alike."""
    for path in paths:
        with path.open("rb") as file:
            while file.read(16 * MiB):
                pass
