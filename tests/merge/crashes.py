"""What a file may hold after a crash: its writes are recorded as system calls, and every legal remainder is built.

A killed process leaves the writes up to some point.  A machine without power leaves all that was flushed and any part
of what came after the last flush, down to single sectors of a write.
"""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import pytest

SECTOR = 512
_ALL_SUBSETS_UP_TO = 4


@dataclass(frozen=True)
class Op:
    """A write of `data` at `offset`, a change of the length to `offset`, or a flush."""

    kind: str
    offset: int = 0
    data: bytes = b""

    def apply(self, content: bytearray) -> None:
        if self.kind == "truncate":
            del content[self.offset :]
            content.extend(bytes(self.offset - len(content)))
        elif self.kind == "write":
            content.extend(bytes(max(0, self.offset + len(self.data) - len(content))))
            content[self.offset : self.offset + len(self.data)] = self.data


class Recorder:
    """The calls that change one file, in order; may fail the one of number `fail_at`."""

    def __init__(self, fd: int, *, fail_at: int | None = None, error: int = errno.ENOSPC) -> None:
        self.fd = fd
        self.ops: list[Op] = []
        self._fail_at = fail_at
        self._error = error

    @contextmanager
    def recording(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        with monkeypatch.context() as patch:
            # One after another, so that two runs are alike.
            patch.setattr("snapchain.image.threads.AT_MOST", 1)
            for name in ("pwrite", "pwritev", "copy_file_range", "fsync", "ftruncate"):
                patch.setattr(os, name, self._wrapped(name, getattr(os, name)))
            yield

    def _wrapped(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            place = 1 if name == "copy_file_range" else 0
            if args[place] != self.fd:
                return real(*args)
            if len(self.ops) == self._fail_at:
                raise OSError(self._error, os.strerror(self._error))
            done = real(*args)
            if name == "fsync":
                self.ops.append(Op("sync"))
            elif name == "ftruncate":
                self.ops.append(Op("truncate", args[1]))
            elif done:
                offset = args[4] if name == "copy_file_range" else args[2]
                self.ops.append(Op("write", offset, os.pread(self.fd, done, offset)))
            return done

        return call


def after(start: bytes, ops: Sequence[Op]) -> bytes:
    """The file after all of these."""
    content = bytearray(start)
    for op in ops:
        op.apply(content)
    return bytes(content)


def remainders(start: bytes, ops: Sequence[Op]) -> Iterator[tuple[str, bytes]]:
    """(what happened, the file's bytes) for every kill and every loss of power; no content twice."""
    seen: set[bytes] = set()
    for name, content in _remainders(start, ops):
        if content not in seen:
            seen.add(content)
            yield name, content


def _remainders(start: bytes, ops: Sequence[Op]) -> Iterator[tuple[str, bytes]]:
    for number in range(len(ops) + 1):
        yield f"killed before call {number}", after(start, ops[:number])
    flushed = start
    pending: list[Op] = []
    for number, op in enumerate([*ops, Op("sync")]):
        if op.kind != "sync":
            pending.append(op)
            continue
        for name, subset in _subsets(pending):
            yield f"power lost before flush {number}: {name}", after(flushed, subset)
        flushed = after(flushed, pending)
        pending = []


def _subsets(pending: list[Op]) -> Iterator[tuple[str, list[Op]]]:
    count = len(pending)
    if count <= _ALL_SUBSETS_UP_TO:
        for size in range(count + 1):
            for chosen in combinations(range(count), size):
                yield f"kept {chosen}", [pending[place] for place in chosen]
    else:
        dice = random.Random(count)
        for place in range(count):
            yield f"kept only {place}", [pending[place]]
            yield f"lost only {place}", pending[:place] + pending[place + 1 :]
            yield f"kept from {place} on", pending[place:]
        for _ in range(8):
            some = [place for place in range(count) if dice.random() < 0.5]
            yield f"kept {some}", [pending[place] for place in some]
    for place, op in enumerate(pending):
        for part in _torn(op):
            yield f"tore {place}", [*pending[:place], part, *pending[place + 1 :]]
            yield f"tore {place}, lost the others", [part]


def _torn(op: Op) -> Iterator[Op]:
    """The first half, the second, and every other sector (all sectors are written whole)."""
    first = op.offset // SECTOR
    sectors = -(-(op.offset + len(op.data)) // SECTOR) - first
    if op.kind != "write" or sectors < 2:
        return
    middle = (first + sectors // 2) * SECTOR - op.offset
    yield Op("write", op.offset, op.data[:middle])
    yield Op("write", op.offset + middle, op.data[middle:])
