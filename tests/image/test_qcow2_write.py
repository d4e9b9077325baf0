"""The qcow2 writer, judged by stock QEMU: `check` has nothing to say, `compare` and `map` see what was meant."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from snapchain.errors import InvalidInput, Unavailable
from snapchain.image.qcow2 import encode
from snapchain.image.qcow2.aligned import aligned
from snapchain.image.qcow2.format import CompressionType, HeaderFields
from snapchain.image.qcow2.header import Backing
from snapchain.image.qcow2.layout import Layout, Packed, plan
from snapchain.image.qcow2.write import Qcow2Writer
from snapchain.image.scan import scan
from snapchain.model.extents import ABSENT, DATA, ZERO, Extents, fold

BYTES = np.random.default_rng(7).integers(1, 256, 4 << 20, dtype=np.uint8).tobytes()
CLUSTER_SIZES = [512, 1024, 4096, 65536, 1 << 21]

some = settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])


def content(seed: int, length: int) -> bytes:
    """Bytes without a zero among them, different for neighbouring seeds."""
    shift = seed * 7919 % 100003
    if shift + length <= len(BYTES):
        return BYTES[shift : shift + length]
    return (BYTES * (length // len(BYTES) + 2))[shift : shift + length]


@st.composite
def maps(draw: st.DrawFn, grain: int, *, cells: int = 24, size: int | None = None) -> Extents:
    """A map whose runs start on `grain`; its size is a multiple of 512."""
    if size is None:
        whole = draw(st.integers(0, cells)) * grain
        size = max(0, whole - draw(st.integers(0, grain // 512 - 1)) * 512)
    count = -(-size // grain)
    val = draw(st.lists(st.sampled_from([ABSENT, ZERO, DATA]), min_size=count, max_size=count))
    return Extents.from_starts(size, np.arange(count, dtype=np.int64) * grain, val)


def qemu(*argv: object) -> subprocess.CompletedProcess[str]:
    words = ["qemu-img", *map(str, argv)]
    return subprocess.run(words, capture_output=True, text=True, env={**os.environ, "LC_ALL": "C"}, check=False)


def fresh(path: Path) -> int:
    path.unlink(missing_ok=True)
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)


def write(path: Path, layout: Layout, view: bytes, *, step: int = 100_000) -> None:
    """Write a layer whose DATA bytes are those of `view`, back to front and in pieces."""
    if layout.data_bytes:
        view = view.ljust(layout.size, b"\0")  # a size that was rounded up
    fd = fresh(path)
    with Qcow2Writer(fd, layout) as writer:
        for guest, length in reversed(list(zip(layout.guest.tolist(), layout.length.tolist(), strict=True))):
            for at in reversed(range(guest, guest + length, step)):
                writer.write(at, view[at : min(at + step, guest + length)])
    assert os.fstat(fd).st_size == layout.file_bytes
    os.close(fd)


def seen(extents: Extents, below: bytes, seed: int) -> bytes:
    """What a guest reads from a layer on top of `below`, byte by byte."""
    view = bytearray(below[: extents.size].ljust(extents.size, b"\0"))
    for start, length, val in extents.runs():
        if val != ABSENT:
            view[start : start + length] = content(seed, length) if val >= DATA else bytes(length)
    return bytes(view)


def assert_sound(path: Path) -> None:
    done = qemu("check", "-f", "qcow2", "--output", "json", path)
    said = json.loads(done.stdout)
    wrong = {key for key in ("check-errors", "leaks", "corruptions", "leaks-fixed") if said.get(key)}
    assert done.returncode == 0, done.stdout + done.stderr
    assert not wrong


def assert_reads(path: Path, view: bytes) -> None:
    raw = path.with_suffix(".raw")
    raw.write_bytes(view)
    assert HeaderFields.unpack(path.read_bytes()[:112]).size == len(view)  # compare overlooks zeroes at the end
    done = qemu("compare", "-f", "qcow2", "-F", "raw", path, raw)
    assert done.returncode == 0, done.stdout + done.stderr


def answers(path: Path, size: int) -> Extents:
    """What the file alone says, by `qemu-img map`: depth 0 is its own."""
    said = json.loads(qemu("map", "-f", "qcow2", "--output", "json", path).stdout) if size else []
    runs = []
    for run in said:
        own = run["depth"] == 0 and run["present"]
        runs.append((run["start"], run["length"], (ZERO if run["zero"] else DATA) if own else ABSENT))
    return Extents.from_runs(size, runs)


def scanned(path: Path) -> Extents:
    """What our own parser finds in the tables of the file alone, whether the file stores the data or not."""
    with scan(path) as chain:
        return chain.files[-1].physical.extents()


@some
@given(data=st.data(), cluster_size=st.sampled_from(CLUSTER_SIZES))
def test_a_lone_image_reads_as_planned(tmp_path: Path, data: st.DataObject, cluster_size: int) -> None:
    extents = data.draw(maps(cluster_size, cells=10 if cluster_size > 65536 else 200))
    view = seen(extents, b"", 1)
    path = tmp_path / "a.qcow2"
    layout = plan(extents, cluster_size=cluster_size)
    write(path, layout, view)
    assert_sound(path)
    assert_reads(path, view)
    assert layout.data_bytes == extents.data_bytes
    root_law = extents.mapped(np.where(extents.val == ZERO, ABSENT, extents.val))
    assert answers(path, extents.size) == root_law


@some
@given(data=st.data(), cluster_size=st.sampled_from(CLUSTER_SIZES))
def test_placement_covers_the_data_once(data: st.DataObject, cluster_size: int) -> None:
    extents = data.draw(maps(cluster_size, cells=200))
    layout = plan(extents, cluster_size=cluster_size, backing=Backing("below", "raw"))
    runs = [(start, length, DATA) for start, length in zip(layout.guest.tolist(), layout.length.tolist(), strict=True)]
    kept = extents.mapped(np.where(extents.val == ZERO, ABSENT, extents.val))
    assert Extents.from_runs(extents.size, runs) == kept
    clusters = -(-layout.length // cluster_size) * cluster_size
    assert (layout.host[1:] == (layout.host + clusters)[:-1]).all()
    assert not len(layout.host) or layout.host[0] == layout.data_offset
    assert int(clusters.sum()) + layout.data_offset == layout.file_bytes
    offsets = np.arange(0, extents.size, 512, dtype=np.int64)
    host = layout.host_of(offsets)
    assert ((host >= 0) == (extents.values_at(offsets) == DATA)).all()
    held = np.flatnonzero(host >= 0)
    assert (np.diff(host[held]) > 0).all()


@some
@given(data=st.data())
def test_a_chain_of_ours_reads_like_the_model(tmp_path: Path, data: st.DataObject) -> None:
    """Layers of any size and cluster size, with maps finer than their clusters, rounded out by `aligned`."""
    views = [b""]
    layers: list[Extents] = []
    for number in range(data.draw(st.integers(2, 4))):
        cluster_size = data.draw(st.sampled_from([512, 4096, 65536]))
        grain = data.draw(st.sampled_from([512, 4096]))
        extents = data.draw(maps(grain, cells=60))
        layers.append(extents)
        views.append(seen(extents, views[-1], number))
        whole = aligned(extents, fold(layers), cluster_size=cluster_size)
        backing = Backing(f"{number - 1}.qcow2", "qcow2") if number else None
        path = tmp_path / f"{number}.qcow2"
        write(path, plan(whole, cluster_size=cluster_size, backing=backing), views[-1])
    for number in range(len(layers)):
        assert_sound(tmp_path / f"{number}.qcow2")
        assert_reads(tmp_path / f"{number}.qcow2", views[number + 1])


@some
@given(data=st.data(), cluster_size=st.sampled_from([16384, 65536]))
def test_subclusters_survive(tmp_path: Path, data: st.DataObject, cluster_size: int) -> None:
    grain = cluster_size // 32
    below = content(9, data.draw(st.sampled_from([70, 150])) * grain)
    (tmp_path / "below.raw").write_bytes(below)
    extents = data.draw(maps(grain, cells=150))
    view = seen(extents, below, 2)
    path = tmp_path / "a.qcow2"
    write(path, plan(extents, cluster_size=cluster_size, backing=Backing("below.raw", "raw"), extended_l2=True), view)
    assert_sound(path)
    assert_reads(path, view)
    assert scanned(path) == extents
    if len(below) >= extents.size:  # past its end `map` mixes two layers
        assert answers(path, extents.size) == extents


@some
@given(data=st.data(), cluster_size=st.sampled_from([512, 4096, 65536]))
def test_zero_clusters_hide_what_is_below(tmp_path: Path, data: st.DataObject, cluster_size: int) -> None:
    below = content(9, data.draw(st.sampled_from([20, 40])) * cluster_size)
    (tmp_path / "below.raw").write_bytes(below)
    extents = data.draw(maps(cluster_size, cells=40))
    view = seen(extents, below, 2)
    path = tmp_path / "a.qcow2"
    write(path, plan(extents, cluster_size=cluster_size, backing=Backing("below.raw", "raw")), view)
    assert_sound(path)
    assert_reads(path, view)
    assert scanned(path) == extents
    if len(below) >= extents.size:  # past its end `map` mixes two layers
        assert answers(path, extents.size) == extents


@some
@given(data=st.data(), cluster_size=st.sampled_from([512, 4096, 65536]), extended_l2=st.booleans())
def test_compressed_clusters_travel_compressed(
    tmp_path: Path, data: st.DataObject, cluster_size: int, extended_l2: bool
) -> None:
    """Packed as QEMU packs them, byte behind byte over sector and cluster borders, in one chosen order."""
    extended_l2 = extended_l2 and cluster_size >= 16384
    whole_sectors = data.draw(st.booleans())
    extents = data.draw(maps(cluster_size, cells=60))
    view = seen(extents, b"", 3)
    halved = bytes(byte if number % 4 else 1 for number, byte in enumerate(view))
    clusters = np.arange(0, extents.size, cluster_size, dtype=np.int64)
    clusters = clusters[extents.values_at(clusters) == DATA]
    chosen = clusters[
        np.array(data.draw(st.lists(st.booleans(), min_size=len(clusters), max_size=len(clusters))), bool)
    ]
    view = b"".join(
        (halved if at in chosen else view)[at : at + cluster_size] for at in range(0, extents.size, cluster_size)
    )
    pieces = []
    for at in chosen.tolist():
        squeeze = zlib.compressobj(6, zlib.DEFLATED, -12)
        piece = squeeze.compress(view[at : at + cluster_size].ljust(cluster_size, b"\0")) + squeeze.flush()
        # From another image the exact length is not known, only the sector where it ends.
        pieces.append(piece.ljust(-(-len(piece) // 512) * 512, b"\0") if whole_sectors else piece)
    stored = np.array([len(piece) for piece in pieces], np.int64)
    packed = Packed(chosen, np.cumsum(stored) - stored, stored, int(stored.sum()))
    layout = plan(extents, cluster_size=cluster_size, packed=packed, extended_l2=extended_l2)
    path = tmp_path / "a.qcow2"
    fd = fresh(path)
    with Qcow2Writer(fd, layout) as writer:
        for guest, length in zip(layout.guest.tolist(), layout.length.tolist(), strict=True):
            writer.write(guest, view[guest : guest + length])
        os.pwrite(fd, b"".join(pieces), layout.packed_offset)
    os.close(fd)
    assert_sound(path)
    assert_reads(path, view)
    said = json.loads(qemu("check", "-f", "qcow2", "--output", "json", path).stdout)
    assert said.get("compressed-clusters", 0) == len(chosen)
    with scan(path) as chain:
        buffer = bytearray(len(view))
        chain.read_into(0, memoryview(buffer))
        assert buffer == view


def test_zstd_is_recorded(tmp_path: Path) -> None:
    import zstandard

    body = zstandard.ZstdCompressor().compress(bytes(range(256)) * 256)
    guest = np.array([65536], np.int64)
    packed = Packed(guest, guest * 0, guest * 0 + len(body), len(body), CompressionType.ZSTD)
    layout = plan(Extents.from_runs(200 * 1024, [(65536, 65536, DATA)]), packed=packed)
    path = tmp_path / "a.qcow2"
    fd = fresh(path)
    with Qcow2Writer(fd, layout):
        os.pwrite(fd, body, layout.packed_offset)
    os.close(fd)
    assert_sound(path)
    assert_reads(path, bytes(65536) + bytes(range(256)) * 256 + bytes(72 * 1024))


@pytest.mark.parametrize("cluster_size", CLUSTER_SIZES)
@pytest.mark.parametrize("size", [0, 512, 5 << 20, 8 << 30])
def test_an_empty_disk(tmp_path: Path, cluster_size: int, size: int) -> None:
    layout = plan(Extents.absent(size), cluster_size=cluster_size)
    path = tmp_path / "a.qcow2"
    write(path, layout, b"")
    assert_sound(path)
    assert layout.data_offset == layout.file_bytes
    said = json.loads(qemu("info", "-f", "qcow2", "--output", "json", path).stdout)
    assert (said["virtual-size"], said["cluster-size"]) == (size, cluster_size)
    assert "backing-filename" not in said


def test_a_guest_may_write_on(tmp_path: Path) -> None:
    """A finished file takes allocating writes, grows its tables, and stays sound."""
    layout = plan(Extents.from_runs(4 << 20, [(0, 1 << 20, DATA)]), cluster_size=512)
    path = tmp_path / "a.qcow2"
    write(path, layout, content(1, 1 << 20))
    done = subprocess.run(
        ["qemu-io", "-f", "qcow2", "-c", "write -P 7 512K 3M", str(path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert_sound(path)
    assert_reads(path, content(1, 512 << 10) + b"\7" * (3 << 20) + bytes(512 << 10))


def test_the_backing_link_is_recorded(tmp_path: Path) -> None:
    path = tmp_path / "a.qcow2"
    write(path, plan(Extents.absent(1 << 20), backing=Backing("./a:b é.raw", "raw")), b"")
    said = json.loads(qemu("info", "-U", "-f", "qcow2", "--output", "json", path).stdout)
    assert (said["backing-filename"], said["backing-filename-format"]) == ("./a:b é.raw", "raw")


@pytest.mark.parametrize("name", ["", "nbd://host/x", "json:{}", "a:b", "a\nb", "a\0b", "x" * 1024, "\udcff"])
def test_a_name_that_is_no_plain_file_is_refused(name: str) -> None:
    with pytest.raises(InvalidInput, match=r"not a backing name that QEMU takes|must be UTF-8"):
        encode.header(plan(Extents.absent(512), backing=Backing(name, "raw")))


def test_a_link_without_a_format_is_refused() -> None:
    with pytest.raises(InvalidInput, match="probed"):
        encode.header(plan(Extents.absent(512), backing=Backing("a.raw", None)))


def test_a_name_must_fit_the_header_cluster() -> None:
    with pytest.raises(InvalidInput, match="does not fit"):
        encode.header(plan(Extents.absent(512), cluster_size=512, backing=Backing("x" * 500, "raw")))


@pytest.mark.parametrize(
    ("extents", "cluster_size", "words"),
    [
        (Extents.absent(512), 256, "cluster size of 256"),
        (Extents.absent(512), 65537, "cluster size of 65537"),
        (Extents.absent(512), 4 << 20, "cluster size of 4194304"),
        (Extents.from_runs(1 << 20, [(512, 65536, DATA)]), 65536, "does not start a cell"),
        (Extents.absent((128 << 30) + 512), 512, "too large for clusters of 512"),
        (Extents.constant(128 << 30, DATA), 512, "larger than qcow2 allows"),  # its L1 fits, not its refcount table
    ],
)
def test_what_qcow2_cannot_hold_is_refused(extents: Extents, cluster_size: int, words: str) -> None:
    with pytest.raises(InvalidInput, match=words):
        plan(extents, cluster_size=cluster_size)


def test_a_small_cluster_is_too_small_for_subclusters() -> None:
    with pytest.raises(InvalidInput, match="cluster size of 8192 bytes is not allowed"):
        plan(Extents.absent(512), cluster_size=8192, extended_l2=True)


def test_the_largest_disk_of_the_smallest_clusters(tmp_path: Path) -> None:
    extents = Extents.from_runs(128 << 30, [((128 << 30) - 512, 512, DATA)])
    path = tmp_path / "a.qcow2"
    fd = fresh(path)
    with Qcow2Writer(fd, plan(extents, cluster_size=512)) as writer:
        writer.write(extents.size - 512, content(1, 512))
    os.close(fd)
    assert_sound(path)
    assert answers(path, extents.size) == extents


def test_an_odd_size_is_rounded_up_only_without_backing(tmp_path: Path) -> None:
    extents = Extents.from_runs(1000, [(0, 1000, DATA)])
    path = tmp_path / "a.qcow2"
    layout = plan(extents, cluster_size=512)
    assert layout.size == 1024
    write(path, layout, content(1, 1000))
    assert_sound(path)
    assert_reads(path, content(1, 1000) + bytes(24))
    with pytest.raises(InvalidInput, match="1000 bytes is no multiple of 512"):
        plan(extents, cluster_size=512, backing=Backing("below", "raw"))


def test_writes_outside_data_are_refused(tmp_path: Path) -> None:
    layout = plan(Extents.from_runs(1 << 20, [(65536, 131072, DATA)]))
    fd = fresh(tmp_path / "a.qcow2")
    writer = Qcow2Writer(fd, layout)
    with pytest.raises(InvalidInput, match="65536\\+1 are not all data"):
        writer.write(65536, b"x")  # not begun
    with pytest.raises(InvalidInput, match="the writer of this image is new"):
        writer.finish()
    with writer:
        for offset, length in [(0, 1), (65535, 2), (65536, 131073), (196608, 1), (1 << 20, 1)]:
            with pytest.raises(InvalidInput, match=f"{offset}\\+{length} are not all data"):
                writer.write(offset, bytes(length))
        writer.write(65536, b"")
    with pytest.raises(InvalidInput, match="only written to an empty file"):
        Qcow2Writer(fd, layout).begin()  # not empty
    os.close(fd)


def test_the_header_is_the_last_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    pwrite, fsync = os.pwrite, os.fsync

    def spied_pwrite(fd: int, data: memoryview, offset: int) -> int:
        calls.append("header" if offset < 65536 else "body")
        return pwrite(fd, data[: max(1, len(data) // 2)], offset)  # and a kernel that writes less than asked

    def spied_fsync(fd: int) -> None:
        calls.append("flush")
        fsync(fd)

    monkeypatch.setattr(os, "pwrite", spied_pwrite)
    monkeypatch.setattr(os, "fsync", spied_fsync)
    path = tmp_path / "a.qcow2"
    write(path, plan(Extents.constant(1 << 20, DATA)), content(1, 1 << 20))
    once = [call for number, call in enumerate(calls) if not number or calls[number - 1] != call]
    assert once == ["body", "flush", "header", "flush"]
    assert_sound(path)
    assert_reads(path, content(1, 1 << 20))


@pytest.mark.parametrize("moment", ["begun", "written", "tables"])
def test_a_torn_file_is_no_image(tmp_path: Path, moment: str) -> None:
    """Killed outright before the header: nothing takes the file for qcow2."""
    path = tmp_path / "a.qcow2"
    script = f"""
import os, signal
from snapchain.image.qcow2 import encode
from snapchain.image.qcow2.aligned import aligned
from snapchain.image.qcow2.layout import plan
from snapchain.image.qcow2.write import Qcow2Writer
from snapchain.image.scan import scan
from snapchain.model.extents import DATA, Extents
layout = plan(Extents.constant(1 << 20, DATA))
fd = os.open({str(path)!r}, os.O_RDWR | os.O_CREAT)
writer = Qcow2Writer(fd, layout)
writer.begin()
if {moment!r} != "begun":
    writer.write(0, b"x" * (1 << 20))
if {moment!r} == "tables":
    os.fsync = lambda fd: os.kill(os.getpid(), signal.SIGKILL)
    writer.finish()
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", script], check=False, cwd=Path(__file__).parents[2])
    assert done.returncode == -9
    assert path.stat().st_size > 1 << 20
    for verb in ("info", "check", "map"):
        told = qemu(verb, "-f", "qcow2", path)
        assert told.returncode != 0
        assert "not in qcow2 format" in told.stderr


def test_an_exception_leaves_no_header(tmp_path: Path) -> None:
    path = tmp_path / "a.qcow2"
    fd = fresh(path)
    with pytest.raises(KeyError), Qcow2Writer(fd, plan(Extents.absent(512))):
        raise KeyError
    os.close(fd)
    assert qemu("info", "-f", "qcow2", path).returncode != 0


def test_a_full_disk_is_told() -> None:
    fd = os.open("/dev/full", os.O_RDWR)
    writer = Qcow2Writer(fd, plan(Extents.constant(65536, DATA)), subject="/dev/full")
    with pytest.raises(InvalidInput, match="invalid argument"):  # a device has no size to give
        writer.begin()
    writer._state = type(writer._state)("open")
    with pytest.raises(Unavailable, match="/dev/full: no space left"):
        writer.write(0, b"x")
    os.close(fd)


def test_many_threads_write_in_any_order(tmp_path: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    rng = np.random.default_rng(3)
    cells = rng.integers(0, 2, 512)
    extents = Extents.from_starts(512 * 4096, np.arange(512) * 4096, np.where(cells, DATA, ABSENT))
    view = seen(extents, b"", 4)
    path = tmp_path / "a.qcow2"
    fd = fresh(path)
    cuts = [at for at in range(0, extents.size, 1024) if extents.at_offset(at) == DATA]
    rng.shuffle(cuts)
    with Qcow2Writer(fd, plan(extents, cluster_size=4096)) as writer, ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda at: writer.write(at, memoryview(view)[at : at + 1024]), cuts))
    os.close(fd)
    assert_sound(path)
    assert_reads(path, view)


@pytest.mark.parametrize("extended_l2", [False, pytest.param(True, marks=pytest.mark.soak)])
def test_a_fragmented_terabyte(tmp_path: Path, extended_l2: bool) -> None:
    """Two million extents: planned and written without a Python object for each, in bounded memory."""
    import time
    import tracemalloc

    size, cluster = 1 << 40, 65536
    rng = np.random.default_rng(5)
    at = np.unique(np.append(rng.integers(1, size // cluster, 2_200_000), 0)) * cluster
    extents = Extents.from_starts(size, at, np.arange(len(at)) % 3 - 2)
    assert len(extents) > 2_000_000
    path = tmp_path / "a.qcow2"
    fd = fresh(path)
    tracemalloc.start()
    started = time.monotonic()
    layout = plan(extents, cluster_size=cluster, backing=Backing("below.raw", "raw"), extended_l2=extended_l2)
    planned = time.monotonic()
    with Qcow2Writer(fd, layout):
        pass
    finished = time.monotonic()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    os.close(fd)
    print(f"plan {planned - started:.2f} s, tables {finished - planned:.2f} s, peak {peak >> 20} MiB")
    assert peak < 300 << 20
    (tmp_path / "below.raw").touch()
    os.truncate(tmp_path / "below.raw", size)
    assert_answers_in_windows(path, extents, rng)
    assert scanned(path) == extents


def assert_answers_in_windows(path: Path, extents: Extents, rng: np.random.Generator) -> None:
    """`qemu-img map` of a few windows, against the map."""
    for start in (rng.integers(0, extents.size >> 26, 5) << 26).tolist():
        argv = ("map", "-f", "qcow2", "--output", "json", f"--start-offset={start}", f"--max-length={1 << 26}", path)
        runs = [
            (run["start"] - start, run["length"], (DATA if "offset" in run else ZERO) if run["depth"] == 0 else ABSENT)
            for run in json.loads(qemu(*argv).stdout)
        ]
        assert Extents.from_runs(1 << 26, runs) == extents.window(start, start + (1 << 26))


@some
@given(data=st.data(), grain=st.sampled_from([1, 3, 4]), cluster=st.sampled_from([4, 8]))
def test_aligned_by_its_definition(data: st.DataObject, grain: int, cluster: int) -> None:
    size = data.draw(st.integers(0, 40))
    layers = []
    for _ in range(data.draw(st.integers(1, 3))):
        cells = -(-size // grain)
        val = data.draw(st.lists(st.sampled_from([ABSENT, ZERO, DATA]), min_size=cells, max_size=cells))
        layers.append(Extents.from_starts(size, np.arange(cells) * grain, val))
    resolved = fold(layers)
    got = aligned(layers[-1], resolved, cluster_size=cluster)
    assert got.size == size
    for start in range(0, size, cluster):
        cell = range(start, min(start + cluster, size))
        own = {layers[-1].at_offset(at) for at in cell}
        through = {resolved.at_offset(at) for at in cell}
        want = DATA if DATA in own else own.pop() if len(own) == 1 else DATA if DATA in through else ZERO
        assert {got.at_offset(at) for at in cell} == {want}
