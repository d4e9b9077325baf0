"""restore to a stream: the raw disk in guest order, whatever order it is read in, and never a wrong byte unnoticed."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, strategies as st

from snapchain.errors import Corrupt, OutputFailed
from snapchain.model.content import content_id, empty_sum, leaf_hash, sum_of
from snapchain.ops.restore.stream import InOrder, StreamedRestoration
from tests.ops.shipping import DISK
from tests.ops.test_restore_targets import LAYERS, Source, delivered

LEAF = 64 * 1024
SIZES = st.sampled_from([1, 512, LEAF - 1, LEAF, 16 * LEAF, 16 * LEAF + 1, 33 * LEAF + 700])


@pytest.fixture(scope="module", params=["repository", "replica"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Source:
    return delivered(request.param, tmp_path_factory.mktemp(request.param), LAYERS)


@given(size=SIZES, seed=st.integers(0, 2**32))
def test_pieces_in_any_order_become_one_stream(size: int, seed: int) -> None:
    chance = random.Random(seed)
    disk, pieces, at = bytearray(size), list[tuple[int, memoryview]](), 0
    while at < size:
        length = min(chance.choice([1, 511, 4096, LEAF, 3 * LEAF]), size - at)
        if chance.random() < 0.6:
            body = chance.choice([bytes(length), chance.randbytes(length)])
            disk[at : at + length] = body
            pieces.append((at, memoryview(body)))
        at += length
    written = bytearray()
    stream = InOrder(size, written.extend)
    cut = chance.randrange(size + 1)
    below = [piece for piece in pieces if piece[0] < cut]
    chance.shuffle(below)
    stream.take([*(piece for piece in pieces if piece[0] >= cut), *below])  # those above come too early
    stream.advance(cut)
    assert len(written) <= max([cut, *(offset + len(body) for offset, body in below)])
    assert written == disk[: len(written)]
    shown = stream.finish()
    assert written == disk.ljust(-(-size // 512) * 512, b"\0")
    total = empty_sum()
    for number in range(-(-size // LEAF)):
        leaf = bytes(disk[number * LEAF : (number + 1) * LEAF])
        if any(leaf):
            total += sum_of(np.array([number]), np.frombuffer(leaf_hash(leaf), np.uint8).reshape(1, 32))
    assert shown == content_id(size, total)


def test_the_stream_is_the_point(source: Source) -> None:
    written = bytearray()
    work = StreamedRestoration(source.destination, DISK)
    plan = work.plan()
    report = work.run(written.extend)
    assert written == source.shown.read_bytes()
    assert report.content_id == plan.content_id == source.content_id
    assert report.bytes_written == plan.bytes_to_write
    assert (report.output, report.files, report.damaged) == ("-", (), ())


def test_a_stream_that_is_not_the_point_is_an_error(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if a replica sent other bytes than it announced."""
    monkeypatch.setattr("snapchain.ops.restore.stream.leaf_hash", lambda leaf: leaf_hash(bytes(len(leaf) - 1) + b"\1"))
    with pytest.raises(Corrupt, match=f"the content id of the stream is [0-9a-f]*, but {source.content_id} is record"):
        StreamedRestoration(source.destination, DISK).run(bytearray().extend)


def test_a_stream_that_cannot_be_written_ends_the_restore(source: Source) -> None:
    def full(_: memoryview) -> None:
        raise OutputFailed("full")

    with pytest.raises(OutputFailed, match="full"):
        StreamedRestoration(source.destination, DISK).run(full)


def test_a_file_named_by_a_dash_is_not_made(source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    StreamedRestoration(source.destination, DISK).run(bytearray().extend)
    assert list(tmp_path.iterdir()) == []
