"""Bytes of metadata overwritten at random: the image is read, or refused by an error of ours; nothing else happens."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import example, given, strategies as st

from fixtures import qcow2_bytes as q
from fixtures.qcow2_bytes import KiB, MiB
from snapchain.errors import Corrupt, InvalidInput, NotFound, SnapchainError, Unsupported
from snapchain.image import scan

VARIANTS = {
    "plain": {"cluster_size": "512"},
    "extended": {"cluster_size": "16k", "extended_l2": "on"},
    "zstd": {"cluster_size": "4k", "compression_type": "zstd"},
    "old": {"cluster_size": "1k", "compat": "0.10"},
}


@pytest.fixture(scope="module", params=VARIANTS)
def image(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("fuzz") / "disk.qcow2"
    q.create(path, 256 * KiB, **VARIANTS[request.param])
    q.qemu_io(path, "write -c -P 1 0 64k", "write -P 2 64k 20k", "write -z 128k 64k", "write -P 3 200k 700")
    if request.param != "old":
        q.qemu_img("bitmap", "-f", "qcow2", "--add", path, "b")
    return path


words = st.one_of(
    st.binary(min_size=1, max_size=8),
    st.sampled_from([b"\0", b"\xff", b"\xff" * 8, bytes(8), b"\x7f" + b"\xff" * 7]),
    st.integers(0, 400).map(lambda n: (n * 512).to_bytes(8, "big")),
    st.integers(0, 400).map(lambda n: (n * 512 | 1 << 63).to_bytes(8, "big")),
    st.integers(0, 200_000).map(lambda n: (n | 1 << 62).to_bytes(8, "big")),
)
places = st.one_of(
    st.integers(0, 112),
    st.integers(0, 13).map(lambda field: 8 * field),
    st.integers(0, 8191).map(lambda entry: 8 * entry),
    st.integers(0, 1 << 16),
)


def test_any_metadata_is_read_or_refused(image: Path) -> None:
    path = image.with_name("fuzzed.qcow2")
    whole = image.read_bytes()
    ends: Counter[str] = Counter()

    @given(st.lists(st.tuples(places, words), min_size=1, max_size=4), st.one_of(st.none(), st.integers(0, 1 << 18)))
    @example([(24, (1 << 61).to_bytes(8, "big"))], None)
    @example([(24, (128 << 10).to_bytes(8, "big"))], None)  # half the size
    def one(changes: list[tuple[int, bytes]], cut: int | None) -> None:
        data = bytearray(whole)
        for place, word in changes:
            data[place : place + len(word)] = word
        path.write_bytes(data[:cut])
        os.utime(path, ns=(1, 1_000_000_001))  # old: no wait for the clock
        error = read_through(path)
        ends["read" if error is None else "refused"] += 1
        if error is None:
            return
        if isinstance(error, (Corrupt, Unsupported)):
            assert error.subject == str(path)
        else:
            # Eight bytes of the header may come to name a backing file.
            assert isinstance(error, (InvalidInput, NotFound))
            assert "backing" in error.message

    one()
    assert ends.keys() == {"read", "refused"}


def read_through(path: Path) -> SnapchainError | None:
    try:
        with scan(path) as chain:
            extents = chain.top.extents
            assert extents.from_starts(chain.size, extents.at, extents.val) == extents
            chain.read_into(0, memoryview(bytearray(min(chain.size, 4 * MiB))))
    except SnapchainError as error:
        return error
    return None
