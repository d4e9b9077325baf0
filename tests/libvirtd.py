"""A libvirtd of its own for tests: what it keeps under fixed paths lies in a mount namespace, guests need no KVM.

    with libvirtd(folder, name="kvm1") as here: here.virsh("list")

These paths are directories of `folder`, where the test reaches them too: the socket (`here.uri`), pid files, logs.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.waiting import gone, wait_until

_KEPT = ("run", "var/lib", "var/log", "var/cache", "etc")
_SUBREAPER = "import ctypes, os, sys; ctypes.CDLL(None).prctl(36, 1); os.execvp(sys.argv[1], sys.argv[1:])"
_GROUPS = (("libvirt-qemu", 64055), ("kvm", 64056))


@dataclass(frozen=True)
class LibvirtHost:
    """inside: what goes before an argument list to run it there."""

    inside: tuple[str, ...]
    folder: Path
    keeper: subprocess.Popen[str]
    """Starts libvirtd, and is the parent of whatever libvirtd leaves: it collects guests that ended, as init does."""

    @property
    def log(self) -> Path:
        """libvirtd's own, at level info."""
        return self.folder / "log"

    @property
    def uri(self) -> str:
        """For programs outside."""
        return f"qemu+unix:///system?socket={self.folder}/run/libvirt-sock"

    @property
    def pid(self) -> int:
        """Of libvirtd."""
        return int((self.folder / "libvirtd.pid").read_text())

    def guest_pid(self, domain: str) -> int:
        """Of the QEMU of a domain."""
        return int((self.folder / "run" / "qemu" / f"{domain}.pid").read_text())

    def run(self, *argv: str | Path, timeout: float = 120, **more: object) -> subprocess.CompletedProcess[str]:
        """A program over there; its failure is the test's, with its words."""
        words = [*self.inside, *map(str, argv)]
        done = subprocess.run(  # type: ignore[call-overload]
            words, check=False, capture_output=True, text=True, timeout=timeout, **more
        )
        assert done.returncode == 0, f"{argv}: {done.stderr}{done.stdout}"
        return done  # type: ignore[no-any-return]

    def virsh(self, *words: str | Path, timeout: float = 120) -> str:
        return self.run("virsh", "-c", self.uri, *words, timeout=timeout).stdout

    def start(self) -> None:
        """Start libvirtd, and wait until it answers. Guests that run meanwhile are found again."""
        assert self.keeper.stdin is not None
        assert self.keeper.stdout is not None
        self.keeper.stdin.write("start\n")
        self.keeper.stdin.flush()
        assert self.keeper.stdout.readline() == "started\n", (self.folder / "errors").read_text()
        self.virsh("list")

    def kill(self) -> None:
        """SIGKILL to libvirtd; guests run on."""
        pid = self.pid
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: gone(pid))


@contextmanager
def libvirtd(
    folder: Path, *, name: str = "kvm1", inside: Sequence[str] = (), qemu_conf: str = ""
) -> Iterator[LibvirtHost]:
    """inside: what goes before an argument list to run it on its host; name: of that host; qemu_conf: more settings.

    At the end, also that of a killed test, its guests and libvirtd are killed.
    """
    folder.mkdir(parents=True)
    for place in _KEPT:
        (folder / place).mkdir(parents=True)
    (folder / "libvirtd.conf").write_text(
        f'host_uuid = "{uuid.uuid4()}"\nlog_outputs = "1:file:{folder}/log"\nlog_level = 3\nauth_unix_rw = "none"\n'
    )
    (folder / "etc" / "qemu.conf").write_text(
        'user = "root"\ngroup = "root"\nsecurity_driver = "none"\nnamespaces = []\ncgroup_controllers = []\n'
        f'stdio_handler = "file"\ndynamic_ownership = 0\nremember_owner = 0\n{qemu_conf}'
    )
    script = "\n".join(
        [
            "set -e",
            *(f"mkdir -p /{place}/libvirt; mount --bind {folder}/{place} /{place}/libvirt" for place in _KEPT),
            # Users that the package libvirt-daemon-system would make; libvirtd does not start without them.
            *(f"cp /etc/{file} {folder}/{file}" for file in ("passwd", "group")),
            f"grep -q ^libvirt-qemu: /etc/passwd || echo libvirt-qemu:x:64055:64055::/:/bin/false >>{folder}/passwd",
            *(f"grep -q ^{group}: /etc/group || echo {group}:x:{gid}: >>{folder}/group" for group, gid in _GROUPS),
            *(f"mount --bind {folder}/{file} /etc/{file}" for file in ("passwd", "group")),
            f"hostname {name}",
            "echo ready",
            "while read -r; do",  # until the test closes its end, or is killed
            f"  libvirtd --daemon --config {folder}/libvirtd.conf --pid-file {folder}/libvirtd.pid >/dev/null",
            "  echo started",
            "done",
            # libvirtd and its guests have become children of this shell.
            "kill -KILL $(cat /proc/$$/task/$$/children) || true",
        ]
    )
    words = [
        *inside,
        sys.executable,
        "-c",
        _SUBREAPER,
        "unshare",
        "--mount",
        "--uts",
        "--propagation",
        "private",
        "bash",
        "-c",
        script,
    ]
    with (folder / "errors").open("w") as errors:
        # A session of its own: a signal to the test's process group must not end who collects libvirtd and its guests.
        child = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, start_new_session=True
        )
    assert child.stdin is not None
    assert child.stdout is not None
    there = LibvirtHost((*inside, "nsenter", f"--target={child.pid}", "--mount", "--uts", "--"), folder, child)
    try:
        assert child.stdout.readline() == "ready\n", (folder / "errors").read_text()
        there.start()
        yield there
    finally:
        child.stdin.close()
        child.wait()
        child.stdout.close()
