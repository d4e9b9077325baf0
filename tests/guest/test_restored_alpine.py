"""A real Linux is shipped while it runs, by both kinds of guest, restored, and boots from what was restored."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from snapchain.cli import main
from tests.guest.libvirt import definition
from tests.libvirtd import libvirtd
from tests.net import alpine
from tests.ops.stacks import qemu_img
from tests.servers import DIE_WITH_PARENT
from tests.waiting import wait_until

APPEND = "root=/dev/vda rootfstype=ext4 modules=ext4,virtio_blk,virtio_pci console=ttyS0 quiet init=/bin/sh"
WRITE = (
    "mount -o remount,rw / && echo altered while it ran >/etc/issue && sync && mount -o remount,ro / && echo 'is' there"
)


class Console:
    """The serial console of a guest on a pipe."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.process, self.said = process, bytearray()

    def until(self, words: str, *, patience: float = 240) -> str:
        assert self.process.stdout is not None
        deadline, begun = time.monotonic() + patience, len(self.said)
        while words.encode() not in self.said[begun:]:
            piece = os.read(self.process.stdout.fileno(), 1 << 16)
            assert piece, f"it ended: {self.said[-2000:].decode(errors='replace')}"
            self.said += piece
            assert time.monotonic() < deadline, self.said[-2000:].decode(errors="replace")
        return self.said[begun:].decode(errors="replace")

    def type(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{line}\n".encode())
        self.process.stdin.flush()


@contextmanager
def started(argv: Sequence[str]) -> Iterator[Console]:
    words = [*DIE_WITH_PARENT, *argv]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        try:
            yield Console(process)
        finally:
            process.kill()


def disk(tmp_path: Path) -> Path:
    """A chain of two files, as a guest has after a snapshot."""
    root, top = tmp_path / "images" / "root.qcow2", tmp_path / "images" / "web1.qcow2"
    root.parent.mkdir()
    shutil.copyfile(alpine.part(".qcow2"), root)
    qemu_img("create", "-q", "-f", "qcow2", "-b", root.name, "-F", "qcow2", top)
    return top


def is_clean(image: Path, tmp_path: Path) -> None:
    raw = tmp_path / "checked.raw"
    qemu_img("convert", "-O", "raw", image, raw)
    done = subprocess.run(["e2fsck", "-fn", raw], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    raw.unlink()


@pytest.mark.soak
def test_a_linux_that_qemu_ran_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    top, repository = disk(tmp_path), tmp_path / "repository"
    monkeypatch.setenv("SNAPCHAIN_PASSWORD", "secret")
    argv = [
        "qemu-system-x86_64", "-accel", "tcg", "-m", "256", "-nographic", "-no-reboot", "-nodefaults",
        "-name", "web1", "-serial", "stdio", "-qmp", f"unix:{tmp_path}/qmp,server=on,wait=off",
        "-kernel", str(alpine.part(".kernel")), "-initrd", str(alpine.part(".initrd")), "-append", APPEND,
        "-blockdev", f"driver=qcow2,node-name=disk,file.driver=file,file.filename={top}",
        "-device", "virtio-blk-pci,drive=disk,id=vda",
    ]  # fmt: skip
    assert main(["init", str(repository)]) == 0
    with started(argv) as console:
        console.until("# ")
        console.type(WRITE)
        console.until("is there")
        assert main(["ship", "--qmp", f"{tmp_path}/qmp", str(repository)]) == 0
        console.type("echo it goes 'on'")
        console.until("goes on")
    shutil.rmtree(top.parent)
    assert main(["verify", f"{repository}::web1", "--read-data"]) == 0
    assert main(["restore", f"{repository}::web1", str(tmp_path / "out")]) == 0
    is_clean(tmp_path / "out" / "vda.qcow2", tmp_path)
    with started(["sh", str(tmp_path / "out" / "web1.sh")]) as console:
        console.until("# ")
        console.type("cat /etc/issue")
        assert "altered while it ran" in console.until("while it ran")
    assert not (tmp_path / "images").exists()


@pytest.mark.soak
@pytest.mark.root
def test_a_linux_of_libvirt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    top, repository = disk(tmp_path), tmp_path / "repository"
    monkeypatch.setenv("SNAPCHAIN_PASSWORD", "secret")
    boot = (
        f"<kernel>{alpine.part('.kernel')}</kernel><initrd>{alpine.part('.initrd')}</initrd><cmdline>{APPEND}</cmdline>"
    )
    serial = f"<serial type='pty'><log file='{tmp_path}/console' append='off'/></serial>"
    xml = definition("web1", {"vda": top}, more=serial, os_more=boot).replace(">32</memory>", ">256</memory>")
    (tmp_path / "web1.xml").write_text(xml)
    assert main(["init", str(repository)]) == 0

    def booted() -> bool:
        return b"# " in (tmp_path / "console").read_bytes()

    with libvirtd(tmp_path / "host") as host:
        host.virsh("define", tmp_path / "web1.xml")
        host.virsh("start", "web1")
        wait_until(booted)
        words = ["--domain", "web1", "--connect", host.uri]
        assert main(["ship", *words, str(repository)]) == 0
        host.virsh("destroy", "web1")
        host.virsh("undefine", "web1")
        shutil.rmtree(top.parent)
        (tmp_path / "console").unlink()
        out = tmp_path / "out"
        assert main(["restore", f"{repository}::web1", str(out), "--define", "--connect", host.uri]) == 0
        is_clean(out / "vda.qcow2", tmp_path)
        host.virsh("start", "web1")
        wait_until(booted)
        host.virsh("destroy", "web1")
