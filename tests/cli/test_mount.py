"""`snapchain mount` as a process of its own: files as the restored ones, and gone when it is told to, or unmounted."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

import snapchain
from snapchain.host.openers import OpenFiles
from tests.cli.conftest import Run, qemu_img, spawned, write
from tests.cli.test_serve import leases
from tests.waiting import HANG, wait_until

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(not Path("/dev/fuse").exists(), reason="this host has no /dev/fuse"),
]

DISK = "web1/vda"
MiB = 1 << 20


@pytest.fixture
def history(run: Run, tmp_path: Path) -> Path:
    """A repository with two points of a disk; N.raw: what each shows; an empty directory."""
    image = tmp_path / "web1.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", image, str(9 * MiB + 512))
    (tmp_path / "noise").write_bytes(os.urandom(3 * MiB))
    snapchain.create_repository(tmp_path / "repo", encryption="none")
    for number, command in enumerate((f"write -s {tmp_path}/noise 4M 3M", "write -P 5 4M 3M"), 1):
        write(image, command)
        qemu_img("convert", "-O", "raw", image, tmp_path / f"{number}.raw")
        assert run("ship", str(image), f"repo::{DISK}").status == 0
        snapchain.snapshot(image)
    (tmp_path / "mnt").mkdir()
    return tmp_path


@contextmanager
def mounted(folder: Path, *words: str, **more: Any) -> Iterator[subprocess.Popen[str]]:
    with spawned(["mount", "repo", "mnt", "--json", *words], folder, **more) as child:
        assert child.stdout is not None
        try:
            assert json.loads(child.stdout.readline())["directory"] == str(folder / "mnt")
            yield child
        finally:
            child.kill()
            child.wait(HANG)
            if is_mounted(folder / "mnt"):
                subprocess.run(["umount", "-l", folder / "mnt"], check=True)


def is_mounted(directory: Path) -> bool:
    return f" {directory} fuse.snapchain " in Path("/proc/self/mounts").read_text()


def ended(child: subprocess.Popen[str]) -> tuple[int, Any]:
    out, err = child.communicate(timeout=HANG)
    assert not err or err.startswith("Ignoring invalid max threads"), "libfuse 3.14 says so of its own default"
    return child.returncode, json.loads(out)


@pytest.mark.parametrize("library", ["fuse", "fuse3"])
def test_the_points_are_files_for_several_readers_at_once(history: Path, library: str) -> None:
    has_it = "import sys; from ctypes.util import find_library; sys.exit(not find_library(sys.argv[1]))"
    if subprocess.run([sys.executable, "-c", has_it, library], check=False).returncode:
        pytest.skip(f"lib{library} is not installed")
    with mounted(history, env={**os.environ, "FUSE_LIBRARY_NAME": library}) as child:
        folder = history / "mnt" / "web1" / "vda"
        assert sorted(each.name for each in folder.iterdir()) == ["1.raw", "2.raw", "by-time", "latest.raw"]
        assert (folder / "latest.raw").readlink() == Path("2.raw")
        status = (folder / "1.raw").stat()
        assert (status.st_size, status.st_mode & 0o777) == (9 * MiB + 512, 0o400)
        (recorded, _) = snapchain.open_destination(history / "repo").disks(DISK)[0].points
        assert status.st_mtime_ns == pytest.approx(recorded.time.timestamp() * 1e9, abs=1000)

        def compare(number: int) -> None:
            subprocess.run(["cmp", folder / f"{number}.raw", history / f"{number}.raw"], check=True)
            qemu_img("compare", "-f", "raw", "-F", "raw", folder / f"{number}.raw", history / f"{number}.raw")

        with ThreadPoolExecutor(6) as pool:
            list(pool.map(compare, [1, 2] * 3))
        # The kernel asks again after a second.
        assert wait_until(lambda: (folder / "1.raw").stat().st_blocks * 512 < 4 * MiB), "holes are none of its space"
        with pytest.raises(OSError, match="Read-only"):
            (folder / "1.raw").open("r+b")
        child.send_signal(signal.SIGTERM)
        code, report = ended(child)
    assert (code, report["opened"] >= 12, report["failed_reads"]) == (0, True, 0)
    assert leases(history) == []


def test_an_open_file_keeps_its_bytes_from_gc_and_no_signal_waits_for_it(run: Run, history: Path) -> None:
    with mounted(history) as child:
        fd = os.open(history / "mnt/web1/vda/1.raw", os.O_RDONLY)
        try:
            assert leases(history)
            assert run("forget", f"repo::{DISK}@1").status == 0
            assert run("gc", "repo").status == 0
            assert os.pread(fd, 10 * MiB, 0) == (history / "1.raw").read_bytes()
            child.send_signal(signal.SIGINT)
            assert ended(child)[0] == 0
            assert not is_mounted(history / "mnt")
        finally:
            with suppress(OSError):  # it is not connected any more
                os.close(fd)


def test_lost_bytes_are_an_error_and_never_zeroes(history: Path) -> None:
    for pack in (history / "repo" / "packs").rglob("*"):
        if pack.is_file():
            damaged = bytearray(pack.read_bytes())
            damaged[len(damaged) // 2] ^= 1
            pack.chmod(0o600)
            pack.write_bytes(damaged)
    raw = (history / "1.raw").read_bytes()
    with mounted(history, "--quiet") as child:
        path, failed = history / "mnt/web1/vda/1.raw", 0
        with path.open("rb", buffering=0) as file:
            for offset in range(0, len(raw), 4096):
                try:
                    assert os.pread(file.fileno(), 4096, offset) == raw[offset : offset + 4096]
                except OSError as error:
                    failed += error.errno == errno.EIO
        child.send_signal(signal.SIGTERM)
        code, report = ended(child)
    assert 0 < failed < len(raw) // 4096
    assert (code, report["failed_reads"] > 0) == (10, True)
    assert any("web1/vda/1.raw: bytes" in words for words in report["notices"])


def test_who_unmounts_it_ends_it_and_a_killed_one_is_said(run: Run, history: Path) -> None:
    with mounted(history) as child:
        program = "fusermount3" if shutil.which("fusermount3") else "fusermount"
        subprocess.run([program, "-u", history / "mnt"], check=True)
        assert ended(child)[0] == 0
    with mounted(history) as child:
        child.kill()
        child.wait(HANG)
        again = run("mount", "repo", "mnt")
        assert (again.status, "whose program has ended" in again.err, "umount" in again.err) == (4, True, True)


def test_a_dry_run_and_what_is_refused(run: Run, history: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = run("mount", "repo::web1/vda", "mnt", "--dry-run", "--json").json["plan"]
    assert (said["disks"], said["points"], said["directory"]) == (1, 2, str(history / "mnt"))
    assert not is_mounted(history / "mnt")
    for words, status, why in (
        (["repo", "repo"], 4, "not empty"),
        (["repo", "none"], 3, "no such directory"),
        (["repo", "1.raw"], 2, "no directory"),
        (["repo::none", "mnt"], 3, "none"),
        (["repo", "mnt", "--cache-size", "1M"], 2, "at least 16 MiB"),
    ):
        refused = run("mount", *words)
        assert (refused.status, why in refused.err) == (status, True), refused.err
    for missing, why in ((ImportError(), "snapchain[mount]"), (OSError(), "apt-get install fuse3")):

        def find(name: str, *_: object, error: BaseException = missing) -> None:
            if name == "mfusepy":
                raise error

        monkeypatch.delitem(sys.modules, "mfusepy", raising=False)
        finder = type("Finder", (), {"find_spec": staticmethod(find)})
        monkeypatch.setattr(sys, "meta_path", [finder, *sys.meta_path])
        refused = run("mount", "repo", "mnt")
        assert (refused.status, why in refused.err) == (6, True), refused.err
        monkeypatch.undo()
        monkeypatch.chdir(history)


def test_points_that_come_later_appear(run: Run, history: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from snapchain.model.events import ignore
    from snapchain.ops.mount import run as module
    from snapchain.ops.mount.tree import files_of
    from snapchain.ops.readings import PointReadings, ReadLog

    monkeypatch.setattr(module, "LISTED_SECONDS", 0.0)
    monkeypatch.setattr(module, "_LISTING_SHARE", 0)
    monkeypatch.setattr(module, "_WAIT_SECONDS", HANG)
    place = snapchain.open_destination(history / "repo")
    with PointReadings(cache=32 * MiB, patience=0, on_event=ignore) as readings:
        tree = module.PointTree(place, None, files_of(place.disks()), readings, ReadLog(ignore))
        assert tree.target("/web1/vda/latest.raw") == "2.raw"
        with pytest.raises(FileNotFoundError, match=r"3\.raw"):
            tree.open("/web1/vda/3.raw")
        assert run("ship", "web1.qcow2", f"repo::{DISK}").status == 0
        handle = tree.open("/web1/vda/3.raw")
        assert tree.read(handle, 9 * MiB, 4096) == bytes(512)
        assert tree.target("/web1/vda/latest.raw") == "3.raw"
        tree.close(handle)
        tree.end()


def test_a_mount_that_hangs_hangs_nobody_who_looks_for_open_files(history: Path) -> None:
    """Merges look for programs that have an image open, and must not wait for each file system of the host."""
    with mounted(history) as child, (history / "mnt" / "web1" / "vda" / "1.raw").open("rb") as file:
        reader = subprocess.Popen(["sleep", str(HANG)], stdin=file)
        try:
            child.send_signal(signal.SIGSTOP)
            time.sleep(1.5)  # the kernel answers from its memory for a second
            with ThreadPoolExecutor(1) as pool:
                found = pool.submit(OpenFiles)
                try:
                    assert found.result(HANG).openers((history / "1.raw").stat()) == []
                finally:
                    child.kill()  # which wakes a thread that waits
        finally:
            reader.kill()
            reader.wait(HANG)
