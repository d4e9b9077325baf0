"""Many pieces written at once make the file that one write for each would make."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import pytest

from snapchain.errors import InvalidInput
from snapchain.host.batches import MOST_BUFFERS, MOST_BYTES, batches, rest
from snapchain.image.pread import write_vector
from snapchain.image.qcow2.layout import Layout, plan
from snapchain.image.qcow2.write import Qcow2Writer
from snapchain.model.extents import DATA, Extents

CLUSTER = 512
Pieces = list[tuple[int, memoryview]]


def fragmented(count: int) -> tuple[Layout, Pieces]:
    """A map with `count` runs of one to three clusters, gaps between them, and the bytes of all runs."""
    runs: list[tuple[int, int, int]] = []
    at = CLUSTER
    for number in range(count):
        length = (1 + number % 3) * CLUSTER
        runs.append((at, length, DATA))
        at += length + CLUSTER
    pieces = [(start, memoryview(os.urandom(length))) for start, length, _ in runs]
    return plan(Extents.from_runs(at, runs), cluster_size=CLUSTER), pieces


def written(path: Path, layout: Layout, batches: Sequence[Pieces]) -> bytes:
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
    try:
        with Qcow2Writer(fd, layout) as writer:
            for batch in batches:
                writer.write_pieces(batch)
    finally:
        os.close(fd)
    return path.read_bytes()


@pytest.mark.parametrize("count", [1, 5, 3000])
def test_together_or_one_by_one(tmp_path: Path, count: int) -> None:
    layout, pieces = fragmented(count)
    one_by_one = written(tmp_path / "one", layout, [[piece] for piece in pieces])
    assert written(tmp_path / "together", layout, [pieces]) == one_by_one
    # Every second piece leaves holes in the file: nothing lies together any more.
    assert written(tmp_path / "halves", layout, [pieces[::2], pieces[1::2]]) == one_by_one


def test_pieces_outside_the_data_are_refused(tmp_path: Path) -> None:
    layout, pieces = fragmented(10)
    start, data = pieces[5]
    for wrong in (0, start - CLUSTER, start + CLUSTER, layout.size):
        with pytest.raises(InvalidInput, match="not data of this image"):
            written(tmp_path / f"at{wrong}", layout, [[*pieces[:5], (wrong, data), *pieces[6:]]])


def test_a_short_write_is_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = [os.urandom(length) for length in (3, 1, 700, 20, 5)]
    whole = b"".join(parts)
    real = os.pwritev
    for short in range(1, len(whole)):
        monkeypatch.setattr(
            os, "pwritev", lambda fd, batch, offset, short=short: real(fd, [b"".join(batch)[:short]], offset)
        )
        path = tmp_path / "out"
        with path.open("w+b") as file:
            write_vector(file.fileno(), parts, 7)
        assert path.read_bytes() == bytes(7) + whole


def test_batches_are_bounded_and_whole() -> None:
    parts = [os.urandom(length) for length in (0, MOST_BYTES * 2 + 5, 1, MOST_BYTES - 6, 3)] + [b"x"] * 3000
    found = list(batches(parts))
    assert b"".join(b"".join(batch) for batch in found) == b"".join(parts)
    assert all(0 < len(batch) <= MOST_BUFFERS and sum(map(len, batch)) <= MOST_BYTES for batch in found)
    for done in range(9):
        assert b"".join(rest([memoryview(b"abc"), memoryview(b"defgh")], done)) == b"abcdefgh"[done:]
