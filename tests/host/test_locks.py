"""Image locks against QEMU's own, in both directions."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from snapchain.errors import Busy, Conflict, InvalidInput, NotFound
from snapchain.host.locks import ImageLock, LockMode
from snapchain.host.openers import OpenFiles
from tests.servers import qemu_nbd


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", path, "4M"], check=True)
    return path


@contextmanager
def qemu_io(image: Path, *options: str) -> Iterator[subprocess.Popen[bytes]]:
    """A qemu-io that has the image open and waits for commands."""
    process = subprocess.Popen(
        ["qemu-io", *options, "-f", "qcow2", image], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(b"length\n")
    process.stdin.flush()
    assert b"4 MiB" in process.stdout.readline()
    try:
        yield process
    finally:
        process.communicate(b"quit\n")


def qemu_can(image: Path, *, write: bool) -> bool:
    access = ["-c", "write 0 512"] if write else ["-r", "-c", "read 0 512"]
    done = subprocess.run(["qemu-io", "-f", "qcow2", *access, image], capture_output=True, check=False)
    if done.returncode:
        assert b"lock" in done.stderr
    return done.returncode == 0


@pytest.mark.parametrize("mode", LockMode)
def test_refused_while_qemu_writes(mode: LockMode, image: Path) -> None:
    with qemu_io(image) as user, pytest.raises(Busy, match="has it open for resizing") as caught:
        ImageLock(image, mode)
    assert f"qemu-io (pid {user.pid})" in str(caught.value)
    ImageLock(image, mode).release()


@pytest.mark.parametrize("mode", LockMode)
def test_refused_while_an_export_writes(mode: LockMode, image: Path) -> None:
    with qemu_nbd(image) as user, pytest.raises(Busy, match="qemu-nbd") as caught:
        ImageLock(image, mode)
    assert str(user.pid) in str(caught.value)


def test_readers_share_and_exclude_the_lock_for_writing(image: Path) -> None:
    with qemu_nbd(image, "--read-only"):
        with ImageLock(image, LockMode.READ) as lock:
            assert lock.enforced
            assert qemu_can(image, write=False)
        with pytest.raises(Busy, match="qemu-nbd"):
            ImageLock(image, LockMode.WRITE)


def test_a_backing_file_of_a_running_overlay_may_be_read(image: Path, tmp_path: Path) -> None:
    overlay = tmp_path / "top.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-b", image, "-F", "qcow2", overlay], check=True)
    with qemu_io(overlay):
        ImageLock(image, LockMode.READ).release()
        with pytest.raises(Busy, match=r"qemu-io .* has it open for reading"):
            ImageLock(image, LockMode.WRITE)


def test_qemu_is_refused_while_we_hold_it(image: Path) -> None:
    with ImageLock(image, LockMode.READ):
        assert qemu_can(image, write=False)
        assert not qemu_can(image, write=True)
    with ImageLock(image, LockMode.WRITE):
        assert not qemu_can(image, write=False)
        assert not qemu_can(image, write=True)
    assert qemu_can(image, write=True)


def test_changing_the_mode(image: Path) -> None:
    with ImageLock(image, LockMode.READ) as lock:
        lock.change(LockMode.WRITE)
        assert not qemu_can(image, write=False)
        lock.change(LockMode.READ)
        assert qemu_can(image, write=False)
        assert not qemu_can(image, write=True)


def test_a_refused_change_keeps_the_old_mode(image: Path) -> None:
    with ImageLock(image, LockMode.READ) as lock:
        with qemu_io(image, "-r"):
            with pytest.raises(Busy, match="qemu-io"):
                lock.change(LockMode.WRITE)
            assert qemu_can(image, write=False)
        assert lock.mode is LockMode.READ
        assert qemu_can(image, write=False)
        assert not qemu_can(image, write=True)


def test_the_lock_follows_a_rename(image: Path) -> None:
    with ImageLock(image, LockMode.READ) as lock:
        image.rename(image.with_name("sealed.qcow2"))
        assert not qemu_can(image.with_name("sealed.qcow2"), write=True)
        assert lock.same_file(image.with_name("sealed.qcow2"))
        assert not lock.same_file(image)


@pytest.mark.parametrize("mode", LockMode)
@pytest.mark.parametrize("left", ["another file", "nothing"])
def test_a_name_that_changes_hands_while_it_is_locked(
    mode: LockMode, left: str, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between open and lock a merge, a snapshot or a restore may put another file there."""
    real = fcntl.fcntl
    old = image.with_name("old.qcow2")

    def replaced(*arguments: Any) -> Any:
        if not old.exists():
            image.rename(old)
            if left == "another file":
                image.write_bytes(old.read_bytes())
        return real(*arguments)

    before = len(list(Path("/proc/self/fd").iterdir()))
    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "fcntl", replaced)
        with pytest.raises(Conflict, match="another file took its name") as caught:
            ImageLock(image, mode)
    assert caught.value.subject == str(image)
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    assert qemu_can(old, write=True)


def test_two_of_us(image: Path) -> None:
    with ImageLock(image, LockMode.READ):
        ImageLock(image, LockMode.READ).release()
        with pytest.raises(Busy, match=r"somebody .* for reading"):
            ImageLock(image, LockMode.WRITE)
    with ImageLock(image, LockMode.WRITE), pytest.raises(Busy, match=r"somebody .* for resizing"):
        ImageLock(image, LockMode.READ)


def test_a_writer_without_locks_is_seen(image: Path) -> None:
    with subprocess.Popen(["sh", "-c", f"exec 9<>{image}; echo ok; exec sleep 1000"], stdout=subprocess.PIPE) as user:
        assert user.stdout is not None
        user.stdout.readline()
        with pytest.raises(Busy, match=rf"(sh|sleep) \(pid {user.pid}\)"):
            ImageLock(image, LockMode.WRITE)
        ImageLock(image, LockMode.READ).release()
        user.kill()


@pytest.mark.parametrize("options", [[], ["--read-only"]])
def test_a_loop_device_has_its_file_open_in_the_kernel(image: Path, options: list[str]) -> None:
    attached = subprocess.run(["losetup", *options, "--find", "--show", image], capture_output=True, check=False)
    if attached.returncode:
        pytest.skip("no loop device")
    device = attached.stdout.decode().strip()
    try:
        (opener,) = OpenFiles().openers(image.stat())
        assert (str(opener), opener.writing) == (device, not options)
        if not options:
            with pytest.raises(Busy, match=f"{device} has it open"):
                ImageLock(image, LockMode.WRITE)
    finally:
        subprocess.run(["losetup", "-d", device], check=True)
    ImageLock(image, LockMode.WRITE).release()


def test_a_filesystem_without_locks_leaves_proc_to_ask(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_arguments: object) -> bytes:
        raise OSError(errno.ENOTSUP, "no locks")

    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "fcntl", refuse)
        with ImageLock(image, LockMode.WRITE) as lock:
            assert not lock.enforced
        with qemu_io(image, "-r"):
            ImageLock(image, LockMode.READ).release()
            with pytest.raises(Busy, match="qemu-io"):
                ImageLock(image, LockMode.WRITE)


def test_what_is_no_image_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for name in ("fifo", "."):
        with pytest.raises(InvalidInput, match=r"a (FIFO|directory), not a regular file or block device"):
            ImageLock(tmp_path / name, LockMode.READ)
    with pytest.raises(NotFound, match="none: no such file"):
        ImageLock(tmp_path / "none", LockMode.READ)


def test_no_descriptor_is_left_behind(image: Path) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    with ImageLock(image, LockMode.WRITE):
        for _ in range(3):
            with pytest.raises(Busy, match=r"somebody .* for resizing"):
                ImageLock(image, LockMode.READ)
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_a_released_lock_is_gone_though_a_forked_child_has_the_descriptor_still(image: Path) -> None:
    lock = ImageLock(image, LockMode.READ)
    copy = os.dup(lock._fd)  # what a fork in another thread makes, until its exec
    try:
        lock.release()
        ImageLock(image, LockMode.WRITE).release()
    finally:
        os.close(copy)
