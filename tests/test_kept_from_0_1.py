"""What version 0.1 stored is read, continued, merged and collected by this version.

`fixtures/0.1` was made once by version 0.1. No inode and no time of a file there survives unpacking, so nothing is
recognised by its source identity: each ship has to compare contents.
"""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zstandard

from snapchain.cli import main

FIXTURES = Path(__file__).parents[1] / "fixtures" / "0.1"
TRUTH = json.loads((FIXTURES / "truth.json").read_text())
DESTINATIONS = ["encrypted", "plain", "replica"]
POINTS = [
    (destination, disk, point)
    for disk, places in TRUTH["points"].items()
    for destination, points in places.items()
    for point in points
]

Run = Callable[..., Any]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command in a directory into which everything was unpacked; returns its JSON."""
    monkeypatch.chdir(tmp_path)
    for name in (*DESTINATIONS, "images"):
        data = zstandard.ZstdDecompressor().decompress((FIXTURES / f"{name}.tar.zst").read_bytes())
        with tarfile.open(fileobj=io.BytesIO(data)) as archive:
            archive.extractall(tmp_path, filter="data")

    def command(*words: str | Path, status: int = 0) -> Any:
        capsys.readouterr()
        if any(str(word).startswith("encrypted") for word in words):
            monkeypatch.setenv("SNAPCHAIN_PASSWORD", TRUTH["passphrase"])
        ended = main([*map(str, words), "--json"])
        out, err = capsys.readouterr()
        assert ended == status, out + err
        return json.loads(out)

    return command


def at(destination: str) -> str:
    """The address of a destination in the current directory."""
    return f"dir:{Path(destination).absolute()}" if destination == "replica" else destination


def sha256(image: Path) -> str:
    """The SHA-256 of what QEMU reads from a qcow2 image."""
    subprocess.run(["qemu-img", "convert", "-f", "qcow2", "-O", "raw", image, "hashed.raw"], check=True)
    return hashlib.sha256(Path("hashed.raw").read_bytes()).hexdigest()


def write(image: Path, *commands: str) -> None:
    subprocess.run(["qemu-io", "-f", "qcow2", image], input="\n".join(commands), text=True, check=True)


def same(one: Path, other: Path) -> bool:
    compare = ["qemu-img", "compare", "-f", "qcow2", "-F", "qcow2", str(one), str(other)]
    return subprocess.run(compare, check=False, capture_output=True).returncode == 0


def restored(run: Run, destination: str, disk: str, point: str) -> tuple[str, str]:
    """The SHA-256 and the content id of a point that is restored."""
    out = Path(f"back-{destination}-{point}.qcow2")
    report = run("restore", f"{at(destination)}::{disk}@{point}", out, "--force")
    return sha256(out), report["content_id"]


def check_old_points(run: Run, destination: str, disk: str, points: list[str]) -> None:
    for point in points:
        known = TRUTH["points"][disk][destination][point]
        assert restored(run, destination, disk, point) == (known["sha256"], known["content_id"])


def contains(now: Any, then: Any) -> bool:
    """Whether everything that `then` holds is in `now`; objects may have more fields."""
    if isinstance(then, dict):
        return isinstance(now, dict) and all(name in now and contains(now[name], each) for name, each in then.items())
    if isinstance(then, list):
        return isinstance(now, list) and len(now) == len(then) and all(map(contains, now, then))
    return bool(now == then)


@pytest.mark.parametrize("destination", DESTINATIONS)
def test_log(run: Run, destination: str) -> None:
    assert contains(run("log", at(destination))["disks"], TRUTH["log"][destination])


@pytest.mark.parametrize("destination", DESTINATIONS)
def test_verify_reads_all_of_it(run: Run, destination: str) -> None:
    report = run("verify", at(destination), "--read-data")
    assert report["ok"]
    assert report["findings"] == []
    assert report["checked_bytes"] > 256 << 10


@pytest.mark.parametrize(("destination", "disk", "point"), POINTS)
def test_every_point_is_restored(run: Run, destination: str, disk: str, point: str) -> None:
    assert run("inspect", f"{at(destination)}::{disk}@{point}")["layers"]
    check_old_points(run, destination, disk, [point])


@pytest.mark.parametrize("destination", DESTINATIONS)
def test_damage_to_what_0_1_stored_is_found(run: Run, destination: str) -> None:
    largest = max((path for path in Path(destination).rglob("[!.]*") if path.is_file()), key=size)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 1
    largest.chmod(0o600)
    largest.write_bytes(data)
    assert run("verify", at(destination), "--read-data", status=5)["findings"]


def size(path: Path) -> int:
    return path.stat().st_size


@pytest.mark.parametrize("destination", DESTINATIONS)
def test_shipped_to_merged_and_collected(run: Run, destination: str) -> None:
    """A further change, a merge by rules, gc: the new point is right, and so are the old ones that the rules keep."""
    image = Path("images/web1.qcow2")
    assert sha256(image) == TRUTH["images"]["web1.qcow2"]
    run("snapshot", image)
    write(image, "write -P 77 3M 300k", "write -z 6M 200k")
    address = f"{at(destination)}::web1/vda"
    report = run("ship", image, address, "--label", "after")
    assert report["point"] == 7
    # Nothing is recognised by its source identity, yet the 5 MiB that were there are not stored again.
    assert report["bytes_stored"] < 512 << 10, report
    run("restore", address, "newest.qcow2")
    assert same(Path("newest.qcow2"), image)
    check_old_points(run, destination, "web1/vda", list(TRUTH["points"]["web1/vda"][destination]))

    merged = run("merge", address, "--keep-last", "1", "--keep-label", "friday")
    held = [3] if destination == "encrypted" else []
    assert merged["points_kept"] == [*held, 5, 7]
    if destination != "replica":
        assert run("gc", destination)["bytes_freed"] > 0
    assert run("verify", at(destination), "--read-data")["ok"]
    check_old_points(run, destination, "web1/vda", [str(point) for point in merged["points_kept"][:-1]])
    run("restore", address, "merged.qcow2")
    assert same(Path("merged.qcow2"), image)


@pytest.mark.parametrize("replica", ["fresh", "replica"])
def test_a_saved_stream_is_received(run: Run, replica: str) -> None:
    """Into a new replica, and into the one in which version 0.1 was interrupted while it received this stream."""
    stream = zstandard.ZstdDecompressor().decompress((FIXTURES / "late.stream.zst").read_bytes())
    argv = [sys.executable, "-m", "snapchain", "receive", replica]
    subprocess.run(argv, input=stream, check=True)
    _check_late(run, replica)


def test_an_interrupted_transfer_is_finished(run: Run) -> None:
    report = run("send", "images/late.qcow2", f"{at('replica')}::late/vda", "--each-layer")
    assert (report["point"], report["layers_sent"]) == (1, 1)
    _check_late(run, "replica")


def _check_late(run: Run, replica: str) -> None:
    address = f"dir:{Path(replica).absolute()}"
    run("restore", f"{address}::late/vda", "late.qcow2")
    assert sha256(Path("late.qcow2")) == TRUTH["images"]["late.qcow2"]
    assert run("verify", f"{address}::late/vda", "--read-data")["ok"]
    assert not list(Path(replica).rglob(".incoming*"))


def test_the_note_of_a_hold_from_another_host_still_counts(run: Run) -> None:
    """Notes beside images have the inodes and the mark of the host that wrote them; a hold forbids all the same."""
    held = Path("images/web1.2.qcow2")
    before = held.read_bytes()
    report = run("merge", "images/web1.qcow2", "--max-layers", "2")
    assert report["layers_after"] < 6
    assert held.read_bytes() == before
    assert sha256(Path("images/web1.qcow2")) == TRUTH["images"]["web1.qcow2"]


def test_a_held_file_of_a_replica(run: Run) -> None:
    """A merge at the replica meets the note that `hold` wrote beside one of its files."""
    held = Path(TRUTH["held_file"])
    before = held.read_bytes()
    address = f"{at('replica')}::db1/data"
    assert run("merge", address, "--keep-last", "1")["points_kept"] == [3]
    assert held.read_bytes() == before
    check_old_points(run, "replica", "db1/data", ["3"])
    assert run("verify", address, "--read-data")["ok"]
