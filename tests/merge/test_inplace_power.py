"""Power lost in the middle of a merge in place: any part of what was not flushed may be on the disk, torn by sectors.

What was written is recorded with its flushes; then, for each stretch between two flushes, files are made that hold all
before it and some of it.  In each the chain's top must read as before, and `qemu-img check` may find leaks at most.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from snapchain.image import scan, threads
from snapchain.image.qcow2.header import Backing
from snapchain.merge import amendment as in_place
from snapchain.merge.amendment import Amendment
from tests.memory import scratch
from tests.ops.stacks import Layer, build, flat, same

MiB = 1 << 20
SHM = scratch()
SECTOR = 512
SUBSETS = 6


@dataclass
class Recording:
    """Stretches between flushes, each a list of (offset, bytes) or (new size, None)."""

    stretches: list[list[tuple[int, bytes | None]]] = field(default_factory=lambda: [[]])

    def of(self, fd: int, job: Callable[[], object], patch: pytest.MonkeyPatch) -> None:
        """Run `job`, noting what it does to the file behind `fd`."""
        pwrite, copy, truncate, fsync = os.pwrite, os.copy_file_range, os.ftruncate, os.fsync
        inode = os.fstat(fd).st_ino

        def ours(other: int) -> bool:
            return os.fstat(other).st_ino == inode

        def on_pwrite(target: int, data: Any, offset: int) -> int:
            done = pwrite(target, data, offset)
            if ours(target):
                self.stretches[-1].append((offset, bytes(memoryview(data).cast("B")[:done])))
            return done

        def on_copy(source: int, target: int, count: int, at: int, to: int) -> int:
            done = copy(source, target, count, at, to)
            self.stretches[-1].append((to, os.pread(target, done, to)))
            return done

        def on_truncate(target: int, size: int) -> None:
            truncate(target, size)
            self.stretches[-1].append((size, None))

        def on_fsync(target: int) -> None:
            fsync(target)
            if ours(target):
                self.stretches.append([])

        with patch.context() as inner:
            inner.setattr(threads, "AT_MOST", 1)
            for name, call in (
                ("pwrite", on_pwrite), ("copy_file_range", on_copy), ("ftruncate", on_truncate), ("fsync", on_fsync),
            ):  # fmt: skip
                inner.setattr(os, name, call)
            job()

    def states(self, before: bytes, draw: random.Random) -> Iterator[tuple[str, bytes]]:
        """(what it is, the file's bytes)."""
        image = bytearray(before)
        for number, stretch in enumerate(self.stretches):
            pieces = [part for write in stretch for part in _sectors(*write)]
            for subset in range(SUBSETS if pieces else 0):
                share = (0.1, 0.5, 0.9)[subset % 3]
                chosen = [piece for piece in pieces if draw.random() < share]
                if subset == SUBSETS - 1:
                    chosen = pieces[-1:]
                yield f"stretch {number}, {len(chosen)} of {len(pieces)} sectors", bytes(_applied(image, chosen))
            image = _applied(image, stretch)
            yield f"after stretch {number}", bytes(image)


def _sectors(offset: int, data: bytes | None) -> Iterator[tuple[int, bytes | None]]:
    if data is None:
        yield offset, None
        return
    at = 0
    while at < len(data):
        count = min(SECTOR - (offset + at) % SECTOR, len(data) - at)
        yield offset + at, data[at : at + count]
        at += count


def _applied(image: bytearray, writes: list[tuple[int, bytes | None]]) -> bytearray:
    changed = bytearray(image)
    for offset, data in writes:
        if data is None:
            changed = changed[:offset].ljust(offset, b"\0")
        else:
            changed = changed.ljust(offset + len(data), b"\0")
            changed[offset : offset + len(data)] = data
    return changed


def checked(path: Path) -> dict[str, int]:
    done = subprocess.run(
        ["qemu-img", "check", "--output=json", "-f", "qcow2", path], check=False, capture_output=True, text=True
    )
    said: dict[str, int] = json.loads(done.stdout)
    return said


STACK = (
    Layer(4 * MiB, ["write -P 1 0 4M"]),
    Layer(4 * MiB, ["write -P 2 0 1M", "write -z 2M 128k", "write -c -P 8 3M 64k"], "cluster_size=4096"),
    Layer(4 * MiB, ["write -P 3 512k 300k", "write -P 4 1M 2k", "discard 1536k 64k"], "cluster_size=4096"),
    Layer(4 * MiB, ["write -P 5 700k 64k", "write -P 6 3M 1k"], "cluster_size=4096"),
)


@pytest.mark.parametrize("way", ["absorb", "commit"])
@pytest.mark.parametrize("refcount_bits", ["16", "1", "64"])
def test_power_lost_at_any_time(way: str, refcount_bits: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryDirectory(dir=SHM) as name:
        directory = Path(name)
        layers = [with_refcounts(layer, refcount_bits) for layer in STACK]
        paths = build(directory / "vm", layers)
        shown = flat(paths[-1], directory / "shown")
        target = paths[-1] if way == "absorb" else paths[1]
        before = target.read_bytes()
        recording = Recording()
        with scan(paths[-1]) as chain, target.open("r+b") as file:
            fd = file.fileno()
            amendment = planned(way)(chain, 1, backing=Backing("0.qcow2", "qcow2"))

            def job() -> None:
                in_place.fill(amendment, fd)
                in_place.relink(amendment, fd)
                in_place.settle(fd)

            recording.of(fd, job, monkeypatch)
        assert same(paths[-1], shown)
        assert checked(target).get("leaks", 0) == checked(target).get("corruptions", 0) == 0
        assert len([stretch for stretch in recording.stretches if stretch]) >= 2
        alone = directory / "vm" / "alone.qcow2"
        for where, image in recording.states(before, random.Random(5)):
            target.write_bytes(image)
            assert same(paths[-1], shown), where
            assert checked(target).get("corruptions", 0) == 0, where
            # What is left to do after a crash works from any state.
            shutil.copy(target, alone)
            with alone.open("r+b") as file:
                in_place.settle(file.fileno())
            assert checked(alone).get("corruptions", 0) == checked(alone).get("leaks", 0) == 0, where


def with_refcounts(layer: Layer, bits: str) -> Layer:
    """A compressed cluster is counted for itself, which one bit cannot if others share its host cluster."""
    options = ",".join(filter(None, [layer.options, f"refcount_bits={bits}"]))
    writes = [write for write in layer.writes if bits != "1" or "-c" not in write]
    return Layer(layer.size, writes, options)


def planned(way: str) -> Callable[..., Amendment]:
    return in_place.plan_absorb if way == "absorb" else in_place.plan_commit
