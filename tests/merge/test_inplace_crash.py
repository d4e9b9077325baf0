"""In-place merges that are killed, lose power or meet a full disk, at every call: nothing is ever lost.

After each remainder that is legal: `qemu-img check` finds no error, the chain's top reads as before, and the merge
begun again ends as if nothing had happened.
"""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from snapchain.errors import Unavailable
from snapchain.image import scan
from snapchain.merge.amendment import Amendment, fill, relink, settle
from tests.exhaustive import chosen, some
from tests.image.oracle import qemu
from tests.image.test_scan_random import io
from tests.merge.crashes import Op, Recorder, after, remainders
from tests.merge.test_assemble import SHM
from tests.merge.test_inplace import Way, assert_clean, check, flat_of, merge, planned, wrong_view

KiB = 1 << 10
CHECK_ERRORS = {1, 2}
"""Exit codes of `qemu-img check`; 3 is leaks alone."""


@dataclass(frozen=True)
class Stack:
    """Layers above a common root: (options, size in KiB, writes); what is compressed is written first."""

    layers: list[tuple[str, int, list[str]]]
    root: tuple[str, int, list[str]] = field(default_factory=lambda: ("cluster_size=4k", 256, ["write -P 1 0 256k"]))


SMALL = "cluster_size=4k"
STACKS = {
    "plain": Stack(
        [
            (SMALL, 256, ["write -P 2 10k 30k", "write -P 3 100k 8k"]),
            (SMALL, 256, ["write -P 4 20k 9k", "write -z 104k 4k", "write -z 200k 8k", "write -P 5 150k 1k"]),
        ]
    ),
    "narrow": Stack(
        [
            ("cluster_size=512,refcount_bits=64", 96, ["write -P 2 0 20k"]),
            ("cluster_size=512,refcount_bits=64", 96, ["write -P 3 60k 30k"]),
        ]
    ),
    "compressed": Stack(
        [
            (SMALL, 256, [f"write -c -P {n} {n * 4}k 4k" for n in range(8)]),
            (SMALL, 256, ["write -c -P 19 4k 4k", "write -P 20 13k 2k", "write -z 16k 4k", "write -P 21 22k 1k"]),
        ]
    ),
    "subclusters": Stack(
        [
            ("extended_l2=on,cluster_size=16k", 512, ["write -P 2 1k 3k", "write -z 64k 1k", "write -P 3 200k 40k"]),
            ("extended_l2=on,cluster_size=16k", 512, ["write -P 4 5k 1k", "write -P 5 65k 1k", "write -z 204k 2k"]),
        ]
    ),
    "grown": Stack(
        [
            ("cluster_size=512", 64, ["write -P 2 10k 20k", "write -P 3 63k 1k"]),
            ("cluster_size=512", 200, ["write -P 4 30k 2k", "write -P 5 190k 3k"]),
        ],
    ),
    "shrunk": Stack(
        [(SMALL, 256, ["write -P 2 90k 100k"]), (SMALL, 98, ["write -P 4 30k 9k", "write -P 5 97k 1k"])],
    ),
}


def built(stack: Stack, directory: Path) -> list[Path]:
    paths: list[Path] = []
    for number, (options, size, commands) in enumerate([stack.root, *stack.layers]):
        path = directory / f"{number}.qcow2"
        link = ["-b", paths[-1].name, "-F", "qcow2"] if paths else []
        qemu("qemu-img", "create", "-q", "-f", "qcow2", "-o", options, *link, path, f"{size}k")
        io(path, [command for command in commands if " -c " in command])
        io(path, [command for command in commands if " -c " not in command])
        paths.append(path)
    return paths


@dataclass(frozen=True)
class Recorded:
    """A merge up to the uppermost file that ran to its end; start: what its target held before."""

    paths: list[Path]
    flat: Path
    target: Path
    start: bytes
    ops: list[Op]


def carry_out(work: Amendment, fd: int) -> None:
    fill(work, fd)
    relink(work, fd)
    settle(fd)


def record(stack: Stack, way: Way, first: int, directory: Path, monkeypatch: pytest.MonkeyPatch) -> Recorded:
    paths = built(stack, directory)
    flat = flat_of(paths[-1], directory)
    with scan(paths[-1]) as chain:
        work = planned(way, chain, first, len(paths) - 1)
        target = paths[work.target]
        start = target.read_bytes()
        with target.open("r+b", buffering=0) as file:
            recorder = Recorder(file.fileno())
            with recorder.recording(monkeypatch):
                carry_out(work, file.fileno())
    assert target.read_bytes() == after(start, recorder.ops)
    assert not wrong_view(target, flat)
    assert_clean(target)
    return Recorded(paths, flat, target, start, recorder.ops)


def go_on(way: Way, paths: list[Path], first: int, target: Path) -> None:
    """What a caller does after a crash: an absorb that was switched is settled, all else is done again."""
    with scan(paths[-1]) as chain:
        switched = len(chain.files) < len(paths)
    if switched:
        assert way == "absorb"
        with target.open("r+b", buffering=0) as file:
            settle(file.fileno())
    else:
        merge(way, paths, first, len(paths) - 1)


def judge(way: Way, first: int, found: Recorded, content: bytes, *, again: bool) -> str:
    """What is wrong with a remainder; empty for nothing."""
    found.target.write_bytes(content)
    code, words = check(found.target)
    if code in CHECK_ERRORS:
        return words
    if wrong := wrong_view(found.paths[-1], found.flat):
        return wrong
    if again:
        go_on(way, found.paths, first, found.target)
        assert_clean(found.target)
        return wrong_view(found.paths[-1], found.flat) or wrong_view(found.target, found.flat)
    return ""


CASES = [(name, way, first) for name in STACKS for way in ("absorb", "commit") for first in (1, 0)]


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[Path]:
    """In memory where that is possible: thousands of images are written and read."""
    if SHM is None:
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=SHM, prefix="snapchain-inplace-") as name:
        yield Path(name)


@pytest.mark.sampled
@pytest.mark.parametrize(("name", "way", "first"), CASES)
def test_every_remainder_is_whole(
    directory: Path, monkeypatch: pytest.MonkeyPatch, name: str, way: Way, first: int
) -> None:
    found = record(STACKS[name], way, first, directory, monkeypatch)
    for number, (what, content) in enumerate(remainders(found.start, found.ops)):
        again = chosen(number, each=11)
        if again or (what.startswith("killed") and chosen(number, each=4)):
            wrong = judge(way, first, found, content, again=again)
            assert not wrong, f"{what}: {wrong}"


@pytest.mark.sampled
@pytest.mark.parametrize(("name", "way", "first"), CASES)
def test_every_call_may_fail(directory: Path, monkeypatch: pytest.MonkeyPatch, name: str, way: Way, first: int) -> None:
    """A full or failing disk is told, the view stays, and settling alone leaves nothing behind."""
    found = record(STACKS[name], way, first, directory, monkeypatch)
    failed = 0
    for number in some(range(len(found.ops)), each=5):  # odd, for both errors
        found.target.write_bytes(found.start)
        error = errno.ENOSPC if number % 2 else errno.EIO
        with scan(found.paths[-1]) as chain, found.target.open("r+b", buffering=0) as file:
            work = planned(way, chain, first, len(found.paths) - 1)
            recorder = Recorder(file.fileno(), fail_at=number, error=error)
            with recorder.recording(monkeypatch), pytest.raises(Unavailable, match=os.strerror(error).lower()):
                carry_out(work, file.fileno())
            failed += 1
            assert recorder.ops == found.ops[:number]
            assert check(found.target)[0] not in CHECK_ERRORS
            settle(file.fileno())
        assert_clean(found.target)
        assert not wrong_view(found.paths[-1], found.flat)
        go_on(way, found.paths, first, found.target)
        assert_clean(found.target)
        assert not wrong_view(found.target, found.flat)
    assert failed > 1
