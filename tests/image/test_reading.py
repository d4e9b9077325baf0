"""Reading bytes of opened images: any offset, many threads, and files that change under us."""

from __future__ import annotations

import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from fixtures import qcow2_bytes as q
from fixtures.qcow2_bytes import COMPRESSED, KiB, MiB
from snapchain.errors import Busy, Corrupt, InvalidInput
from snapchain.image import scan
from snapchain.image.qcow2 import mapping
from snapchain.model.extents import ABSENT, DATA, ZERO
from snapchain.model.fingerprint import Fingerprint, same_file
from tests.image.oracle import our_bytes, their_bytes


def squeezed(directory: Path, kind: str = "zlib") -> Path:
    """Half compressed, half plain; each 16 KiB of its own pattern."""
    path = directory / "disk.qcow2"
    q.create(path, 2 * MiB, compression_type=kind)
    packed = [f"write -c -P {n + 1} {n * 64}k 64k" for n in range(16)]
    plain = [f"write -P {n + 100} {MiB // KiB + n * 16}k 16k" for n in range(64)]
    q.qemu_io(path, *packed, *plain)
    return path


@pytest.mark.parametrize("kind", ["zlib", "zstd"])
def test_many_threads_read_one_file(tmp_path: Path, kind: str) -> None:
    path = squeezed(tmp_path, kind)
    theirs = their_bytes(path, "qcow2", tmp_path)
    rng = np.random.default_rng(1)
    places = [(int(a), int(b)) for a, b in rng.integers(0, 2 * MiB, (400, 2))]
    with scan(path) as chain, ThreadPoolExecutor(8) as pool:

        def read(place: tuple[int, int]) -> bool:
            start, stop = min(place), max(place)
            got = np.empty(stop - start, np.uint8)
            chain.read_into(start, got.data)
            return np.array_equal(got, theirs[start:stop])

        assert all(pool.map(read, places))


def test_a_file_answers_for_what_it_holds_only(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    q.create(path)
    q.qemu_io(path, "write -P 5 64k 64k", "write -z 128k 64k")
    with scan(path) as chain:
        top = chain.top
        buffer = bytearray(b"?" * (128 * KiB))
        top.read_into(64 * KiB, memoryview(buffer))
        assert buffer == b"\x05" * (64 * KiB) + bytes(64 * KiB)
        with pytest.raises(InvalidInput, match="offset 196608 is not in this file"):
            top.read_into(128 * KiB, memoryview(buffer))
        with pytest.raises(InvalidInput, match="outside"):
            top.read_into(4 * MiB - 1, memoryview(bytearray(2)))
        with pytest.raises(InvalidInput, match="outside"):
            chain.read_into(-1, memoryview(bytearray(2)))
        chain.read_into(4 * MiB, memoryview(bytearray()))


def test_views_of_a_chain_show_older_moments(tmp_path: Path) -> None:
    lower, upper = tmp_path / "lower.qcow2", tmp_path / "upper.qcow2"
    q.create(lower, MiB)
    q.qemu_io(lower, "write -P 1 0 128k")
    q.create(upper, 2 * MiB, backing="lower.qcow2")
    q.qemu_io(upper, "write -P 2 64k 64k", "write -z 0 64k")
    with scan(upper) as chain:
        assert list(chain.resolve().runs()) == [
            (0, 64 * KiB, ZERO),
            (64 * KiB, 64 * KiB, 1),
            (128 * KiB, MiB - 128 * KiB, ABSENT),
            (MiB, MiB, ZERO),
        ]
        with chain.at(0) as older:
            assert next(iter(older.resolve().runs())) == (0, 128 * KiB, DATA)
            assert our_bytes(older)[: 128 * KiB].tolist() == [1] * (128 * KiB)
        assert chain.resolve(upto=0).size == MiB
        # The view has not closed the files.
        assert our_bytes(chain)[64 * KiB] == 2


def test_bytes_that_vanish_after_the_scan_are_not_read_as_zeroes(tmp_path: Path) -> None:
    path = squeezed(tmp_path)
    with scan(path) as chain:
        os.truncate(path, 128 * KiB)
        buffer = memoryview(bytearray(64 * KiB))
        for offset in (0, 15 * 64 * KiB, MiB, 2 * MiB - 64 * KiB):
            with pytest.raises(Corrupt, match=r"cut off|ends at offset") as caught:
                chain.read_into(offset, buffer)
            assert caught.value.subject == str(path)
        assert chain.changed() == (chain.top,)


@pytest.mark.parametrize("kind", ["zlib", "zstd"])
@pytest.mark.parametrize("damage", ["garbage", "short"])
def test_damaged_compressed_clusters_name_file_and_offset(tmp_path: Path, kind: str, damage: str) -> None:
    path = squeezed(tmp_path, kind)
    entry = q.u64(path, q.l2_entry(path, 3))
    host = entry & ((1 << 54) - 1)
    assert entry & COMPRESSED
    q.put_bytes(path, host, b"\xff" * 16 if damage == "garbage" else bytes(16))
    with scan(path) as chain:
        with pytest.raises(Corrupt, match=rf"offset {host} of the file, guest offset {3 * 64 * KiB}") as caught:
            chain.read_into(3 * 64 * KiB, memoryview(bytearray(10)))
        assert caught.value.subject == str(path)


def test_a_write_a_replacement_or_a_removal_is_noticed(tmp_path: Path) -> None:
    path = squeezed(tmp_path)
    with scan(path) as chain:
        assert not chain.top.changed()
        os.chown(path, os.getuid(), os.getgid())
        assert not chain.top.changed(), "libvirt chowns backing files at every start"
        with path.open("r+b") as file:
            file.seek(path.stat().st_size - 1)
            file.write(b"x")
        assert chain.top.changed()
    copy = path.with_name("copy.qcow2")
    copy.write_bytes(path.read_bytes())
    with scan(path) as chain:
        copy.rename(path)
        assert chain.top.changed()
    with scan(path) as chain:
        path.unlink()
        assert chain.top.changed()


def test_a_write_in_the_tick_before_the_scan_cannot_hide_a_later_one(tmp_path: Path) -> None:
    path = squeezed(tmp_path)
    for _ in range(20):
        q.put_u64(path, 1 << 18, 0)
        with scan(path) as chain:
            assert time.time_ns() - path.stat().st_mtime_ns > 15_000_000
            q.put_u64(path, 1 << 18, 0)
            assert chain.top.changed()


def test_an_image_that_changes_while_it_is_read_is_busy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = squeezed(tmp_path)
    real = mapping.map_image

    def meanwhile(*args: object, **given: object) -> object:
        physical = real(*args, **given)  # type: ignore[arg-type]
        os.utime(path)
        return physical

    monkeypatch.setattr("snapchain.image.file.map_image", meanwhile)
    with pytest.raises(Busy, match="changes while"):
        scan(path)


def test_scanning_leaves_no_descriptor_and_no_thread(tmp_path: Path) -> None:
    path = squeezed(tmp_path)
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    threads = set(threading.enumerate())  # of other tests, as a server that one of them stops
    with scan(path):
        assert len(os.listdir("/proc/self/fd")) == before + 1  # noqa: PTH208
    q.put(path, l1_table_offset=8)
    for _ in range(3):
        with pytest.raises(Corrupt, match="L1 table is at offset 8"):
            scan(path)
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208
    assert set(threading.enumerate()) <= threads


SECOND = 1_000_000_000


@pytest.mark.parametrize(
    ("left", "right", "same"),
    [
        ((1, 2, 5, 6), (1, 2, 5, 9), True),
        ((1, 2, 5, 6), (1, 2, 7, 6), False),
        ((1, 2, 5, 6), (1, 3, 5, 6), False),
        ((1, 2, 5, 6), (4, 2, 5, 6), False),
        ((1, 2, SECOND, 6), (1, 2, SECOND, 6), True),
        ((1, 2, SECOND, 6), (1, 2, SECOND, 7), False),
    ],
)
def test_a_whole_second_needs_the_ctime_too(left: tuple[int, ...], right: tuple[int, ...], same: bool) -> None:
    names = ("inode", "size", "mtime_ns", "ctime_ns")
    one, other = (Fingerprint.model_validate(dict(zip(names, each, strict=True))) for each in (left, right))
    assert one.same_content_as(other) is same
    assert other.same_content_as(one) is same
    assert same_file(one, other) is same
    assert not same_file(*(each.model_copy(update={"size": 0}) for each in (one, one)))


def test_a_coarse_mtime_is_waited_out(tmp_path: Path) -> None:
    path = squeezed(tmp_path)
    now = time.time_ns() // SECOND * SECOND
    os.utime(path, ns=(now, now))
    with scan(path) as chain:
        assert chain.top.fingerprint.is_coarse
        assert time.time_ns() - now >= SECOND
