"""Every way in which one field of a good image can be wrong, and the refusal that names it.

The corpus of fixtures/ holds whole hostile images; here are the fields and entries that those do not cover, and the
limits on both sides: the last legal value is accepted.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest

from fixtures import qcow2_bytes as q
from fixtures.qcow2_bytes import CLUSTER, COMPRESSED, COPIED, MiB
from snapchain.errors import Corrupt, SnapchainError, Unsupported
from snapchain.image import scan

Change = Callable[[Path], object]


def refused(path: Path) -> SnapchainError:
    try:
        scan(path).close()
    except SnapchainError as caught:
        error = caught
    else:
        pytest.fail("it was accepted")
    assert error.subject == str(path)
    return error


def changed(directory: Path, change: Change, **options: str) -> Path:
    path = directory / "disk.qcow2"
    q.sample(path, 4 * MiB, **options)
    with scan(path):
        pass
    change(path)
    return path


def fields(**values: int) -> Change:
    return lambda path: q.put(path, **values)


def l1(value: Callable[[Path], int]) -> Change:
    return lambda path: q.put_u64(path, q.l1_entry(path), value(path))


def l2(value: Callable[[Path], int], cluster: int = 0) -> Change:
    return lambda path: q.put_u64(path, q.l2_entry(path, cluster), value(path))


def first_l2(path: Path) -> int:
    return q.l2_entry(path)


def first_data(path: Path) -> int:
    return q.u64(path, q.l2_entry(path)) & 0x00FFFFFFFFFFFE00


def refcount_entry(value: int) -> Change:
    return lambda path: q.put_u64(path, q.get(path, "refcount_table_offset") + 8, value)


def twice(path: Path) -> None:
    q.put_extensions(path, (q.UNKNOWN_EXTENSION, b"a"), (q.UNKNOWN_EXTENSION, b"b"))


def bitmaps(*, count: int = 1, size: int = 32, offset: int | None = None, reserved: int = 0) -> Change:
    def change(path: Path) -> None:
        at = q.append(path, bytes(CLUSTER)) if offset is None else offset
        body = struct.pack(">IIQQ", count, reserved, size, at)
        q.put_extensions(path, (q.BITMAPS_EXTENSION, body))
        q.put(path, autoclear_features=1)

    return change


CORRUPT: dict[str, tuple[Change, str]] = {
    "size above what any L1 maps": (fields(size=1 << 62), "virtual size"),
    "size just above the L1": (fields(size=(512 << 20) + 1), "L1 table .* too small"),
    "L1 in the header": (fields(l1_table_offset=0), "L1 table is at offset 0"),
    "L1 ends behind the file": (fields(l1_size=4 << 20), "L1 table .* outside the file"),
    "refcount table of 16 MiB": (fields(refcount_table_clusters=256), "refcount table takes"),
    "snapshots without a table": (fields(nb_snapshots=1, snapshots_offset=0), "snapshot table"),
    "snapshot table off a cluster": (fields(nb_snapshots=1, snapshots_offset=CLUSTER + 8), "snapshot table"),
    "header length off 8": (fields(header_length=108), "header_length is 108"),
    "zstd without its bit": (fields(compression_type=1), "compression"),
    "zlib with the bit": (fields(incompatible_features=8), "compression"),
    "extension twice": (twice, "twice"),
    "format name of 16 bytes": (lambda path: q.put_backing(path, b"x", b"q" * 16), "backing format"),
    "format name that is none": (lambda path: q.put_backing(path, b"x", b"ra\nw"), "backing format"),
    "backing name in the fixed fields": (fields(backing_file_offset=8, backing_file_size=8), "backing file name"),
    "bitmaps: none": (bitmaps(count=0), "0 bitmaps"),
    "bitmaps: too many": (bitmaps(count=65536), "65536 bitmaps"),
    "bitmaps: reserved": (bitmaps(reserved=1), "bitmaps"),
    "bitmaps: directory too large": (bitmaps(size=(64 << 20) + 1), "bitmaps"),
    "bitmaps: directory off a cluster": (bitmaps(offset=CLUSTER + 8), "bitmap directory"),
    "bitmaps: directory is the L1": (bitmaps(offset=3 * CLUSTER), "overlap.*bitmap directory"),
    "refcount block off a cluster": (refcount_entry(CLUSTER + 512), "refcount block .* not aligned"),
    "refcount block outside": (refcount_entry(1 << 40), "refcount block .* outside"),
    "refcount block with reserved bits": (refcount_entry(CLUSTER + 1), "refcount table entry has reserved"),
    "refcount block is the L1": (refcount_entry(3 * CLUSTER), "overlap.*L1 table.*refcount block"),
    "L1 is the refcount table": (fields(l1_table_offset=CLUSTER), "overlap.*L1 table.*refcount table"),
    "snapshot table is the L1": (fields(nb_snapshots=1, snapshots_offset=3 * CLUSTER), "overlap.*snapshot table"),
    "L2 cut off": (lambda path: os.truncate(path, first_l2(path) + 4096), "L2 table .* outside the file"),
    "L2 is the refcount block": (l1(lambda _: COPIED | 2 * CLUSTER), "overlap.*refcount block.*L2 table"),
    "L1 entry with bit 56": (l1(lambda path: first_l2(path) | 1 << 56), "L1 entry 0 .* reserved"),
    "L2 entry with bit 1": (l2(lambda path: first_data(path) | 2), "L2 entry with reserved bits.*guest offset 0"),
    "L2 entry with bit 61": (l2(lambda path: first_data(path) | 1 << 61, 1), "reserved bits.*guest offset 65536"),
    "data is the header's cluster, refcounted": (l2(lambda _: COPIED | 3 * CLUSTER), "overlap.*L1 table.*data"),
    "data is a refcount block": (l2(lambda _: 2 * CLUSTER), "overlap.*refcount block"),
    "preallocated zeroes outside": (l2(lambda _: 1 << 40 | 1), "data cluster at offset .* outside the file"),
    "preallocated zeroes twice": (l2(lambda path: first_data(path) | 1, 9), "referenced twice"),
    "compressed with the copied flag": (l2(lambda path: COPIED | COMPRESSED | first_data(path)), "copied flag"),
    "compressed inside plain data": (l2(lambda path: COMPRESSED | first_data(path) + 700, 9), "overlap.*compressed"),
    "compressed inside the L2": (l2(lambda path: COMPRESSED | first_l2(path) + 8, 9), "overlap.*compressed"),
    "compressed one sector outside": (
        l2(lambda path: COMPRESSED | 1 << 54 | path.stat().st_size - 512, 9),
        "compressed cluster .* outside the file",
    ),
    "cut inside the last data": (lambda path: os.truncate(path, path.stat().st_size - 512), "cut off"),
    "cut one cluster": (lambda path: os.truncate(path, path.stat().st_size - CLUSTER), "outside the file"),
}


@pytest.mark.parametrize("name", CORRUPT)
def test_broken_images_are_refused_by_what_is_broken(tmp_path: Path, name: str) -> None:
    change, words = CORRUPT[name]
    error = refused(changed(tmp_path, change))
    assert isinstance(error, Corrupt)
    assert_says(error, words)


def assert_says(error: SnapchainError, words: str) -> None:
    with pytest.raises(type(error), match=words):
        raise error


V2: dict[str, tuple[Change, type[SnapchainError], str]] = {
    "zero cluster": (l2(lambda _: 1), Corrupt, "zero cluster in a version 2"),
    "encrypted": (fields(crypt_method=1), Unsupported, "encrypted"),
}


@pytest.mark.parametrize("name", V2)
def test_version_2(tmp_path: Path, name: str) -> None:
    change, kind, words = V2[name]
    error = refused(changed(tmp_path, change, compat="0.10"))
    assert isinstance(error, kind)
    assert_says(error, words)


def extended(descriptor: Callable[[Path], int], bitmap: int, entry: int = 0) -> Change:
    def change(path: Path) -> None:
        q.put_bytes(path, first_l2(path) + 16 * entry, struct.pack(">QQ", descriptor(path), bitmap))

    return change


def compressed(path: Path) -> int:
    """A descriptor of compressed data at the file's end, which by itself is legal."""
    return COMPRESSED | q.append(path, bytes(CLUSTER))


EXTENDED: dict[str, tuple[Change, str]] = {
    "subcluster both allocated and zero": (extended(first_data, 1 << 32 | 1), "contradicts"),
    "subcluster of no cluster": (extended(lambda _: 0, 1, entry=9), "contradicts"),
    "zero flag in the descriptor": (extended(lambda path: first_data(path) | 1, 1), "reserved bits"),
    "compressed, with one subcluster allocated": (extended(compressed, 1, entry=9), "contradicts"),
    "compressed, with one subcluster zero": (extended(compressed, 1 << 32, entry=9), "contradicts"),
    "compressed, with all subclusters zero": (extended(compressed, 0xFFFFFFFF << 32, entry=9), "contradicts"),
    "compressed, with the last bit set": (extended(compressed, 1 << 63, entry=9), "contradicts"),
    "clusters of 8 KiB": (fields(cluster_bits=13), "16 KiB"),
    "one cluster, different subclusters": (extended(first_data, 1 << 31, entry=9), "twice"),
}


def test_a_compressed_cluster_among_subclusters_is_legal_without_a_bitmap(tmp_path: Path) -> None:
    with scan(changed(tmp_path, extended(compressed, 0, entry=9), extended_l2="on")) as chain:
        assert int((chain.top.physical.stored > 0).sum()) == 1


@pytest.mark.parametrize("name", EXTENDED)
def test_extended_l2(tmp_path: Path, name: str) -> None:
    change, words = EXTENDED[name]
    error = refused(changed(tmp_path, change, extended_l2="on"))
    assert isinstance(error, Corrupt)
    assert_says(error, words)


def test_compressed_clusters_may_share_a_host_cluster_but_not_their_first_byte(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    q.create(path)
    q.qemu_io(path, "write -c -P 1 0 64k", "write -c -P 2 64k 64k", "write -c -P 3 128k 64k")
    with scan(path) as chain:
        host = chain.top.physical.host
        assert len({int(at) // CLUSTER for at in host[:3]}) == 1
    q.put_u64(path, q.l2_entry(path, 2), q.u64(path, q.l2_entry(path, 1)))
    assert_says(refused(path), "compressed cluster at offset .* referenced twice")


def test_crypto_header_extension_is_refused(tmp_path: Path) -> None:
    path = changed(tmp_path, lambda path: q.put_extensions(path, (0x0537BE77, bytes(16))))
    error = refused(path)
    assert isinstance(error, Unsupported)
    assert_says(error, "encryption")


def stale_bitmaps(path: Path) -> None:
    bitmaps(count=0)(path)
    q.put(path, autoclear_features=0)


LEGAL: dict[str, Change] = {
    "unknown compatible and autoclear bits": fields(compatible_features=1 << 40, autoclear_features=1 << 41),
    "unknown extension": lambda path: q.put_extensions(path, (q.UNKNOWN_EXTENSION, b"hello")),
    "header length 104": fields(header_length=104),
    "stale bitmaps": stale_bitmaps,
    "copied flag on nothing": l2(lambda _: COPIED, 9),
    "preallocated zeroes": l2(lambda path: first_data(path) | 1),
    "L1 longer than the size needs": fields(size=1 * MiB),
}


@pytest.mark.parametrize("name", LEGAL)
def test_odd_but_legal_images_are_accepted(tmp_path: Path, name: str) -> None:
    with scan(changed(tmp_path, LEGAL[name])) as chain:
        assert len(chain.top.physical)


def test_a_size_that_is_no_multiple_of_512_is_cut_as_qemu_cuts_it(tmp_path: Path) -> None:
    path = changed(tmp_path, fields(size=4 * MiB - 100))
    with scan(path) as chain:
        assert chain.size == 4 * MiB - 512


def test_snapshots_and_bitmaps_are_reported(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    q.sample(path)
    q.qemu_img("snapshot", "-c", "one", path)
    q.qemu_img("bitmap", "-f", "qcow2", "--add", "-g", "128k", path, "daily")
    q.qemu_img("bitmap", "-f", "qcow2", "--add", path, "nächtlich")
    with scan(path) as chain:
        header = chain.top.header
        assert header is not None
        assert header.snapshots == 1
        assert [(bitmap.name, bitmap.granularity) for bitmap in header.bitmaps] == [
            ("daily", 128 << 10),
            ("nächtlich", 64 << 10),
        ]


def test_a_compressed_cluster_that_unpacks_to_gigabytes_gives_one_cluster(tmp_path: Path) -> None:
    packer = zlib.compressobj(9, zlib.DEFLATED, -12)
    bomb = b"".join([packer.compress(bytes(MiB)) for _ in range(64)]) + packer.flush()
    assert len(bomb) < 128 << 10

    def change(path: Path) -> None:
        at = q.append(path, bomb + bytes(-len(bomb) % 512))
        q.put_u64(path, q.l2_entry(path, 9), COMPRESSED | 255 << 54 | at)

    path = changed(tmp_path, change)
    os.truncate(path, (path.stat().st_size // CLUSTER + 5) * CLUSTER)
    with scan(path) as chain:
        data = bytearray(b"x" * CLUSTER)
        chain.read_into(9 * CLUSTER, memoryview(data))
        assert not any(data)
