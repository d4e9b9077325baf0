"""A libvirtd of its own on a host of a test: its own directories, its own name, guests without KVM.

    with two_hosts() as (near, far, _), libvirt_host(near, folder / "near") as here: here.virsh("list")

What libvirt keeps under fixed paths lies in a mount namespace, so hosts share nothing but the files of the test.
"""

from __future__ import annotations

import subprocess
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.net.namespaces import Host
from tests.servers import DIE_WITH_PARENT, PATIENCE

_KEPT = ("/run/libvirt", "/var/lib/libvirt", "/var/log/libvirt", "/var/cache/libvirt", "/etc/libvirt")
_GROUPS = (("libvirt-qemu", 64055), ("kvm", 64056))


@dataclass(frozen=True)
class LibvirtHost:
    """inside: what goes before an argument list to run it there."""

    inside: tuple[str, ...]
    log: Path

    def run(self, *argv: str | Path, timeout: float = 120, **more: object) -> subprocess.CompletedProcess[str]:
        """A program over there; its failure is the test's, with its words."""
        words = [*self.inside, *map(str, argv)]
        done = subprocess.run(  # type: ignore[call-overload]
            words, check=False, capture_output=True, text=True, timeout=timeout, **more
        )
        assert done.returncode == 0, f"{argv}: {done.stderr}{done.stdout}"
        return done  # type: ignore[no-any-return]

    def virsh(self, *words: str | Path, timeout: float = 120) -> str:
        return self.run("virsh", "-c", "qemu:///system", *words, timeout=timeout).stdout


@contextmanager
def libvirt_host(host: Host, folder: Path, name: str) -> Iterator[LibvirtHost]:
    """libvirtd in the host's network. name: of the host, as its guests' other homes know it."""
    folder.mkdir(parents=True)
    (folder / "libvirtd.conf").write_text(
        f'host_uuid = "{uuid.uuid4()}"\nlog_outputs = "1:file:{folder}/log"\nlog_level = 3\n'
    )
    (folder / "qemu.conf").write_text(
        'user = "root"\ngroup = "root"\nsecurity_driver = "none"\nnamespaces = []\ncgroup_controllers = []\n'
        f'stdio_handler = "file"\nmigration_host = "{host.address}"\nmigration_address = "0.0.0.0"\n'
        "dynamic_ownership = 0\nremember_owner = 0\n"
    )
    script = "\n".join(
        [
            "set -e",
            *(f"mkdir -p {place}; mount -t tmpfs none {place}" for place in _KEPT),
            f"cp {folder}/qemu.conf /etc/libvirt/",
            # Users that the package libvirt-daemon-system would make; libvirtd does not start without them.
            *(f"cp /etc/{file} {folder}/{file}" for file in ("passwd", "group")),
            f"grep -q ^libvirt-qemu: /etc/passwd || echo libvirt-qemu:x:64055:64055::/:/bin/false >>{folder}/passwd",
            *(f"grep -q ^{name}: /etc/group || echo {name}:x:{gid}: >>{folder}/group" for name, gid in _GROUPS),
            *(f"mount --bind {folder}/{file} /etc/{file}" for file in ("passwd", "group")),
            f"hostname {name}",
            "echo ready",
            f"exec libvirtd --config {folder}/libvirtd.conf --pid-file /run/libvirt/libvirtd.pid",
        ]
    )
    argv = [
        *host.inside,
        *DIE_WITH_PARENT,
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
        child = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors, text=True)
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n", (folder / "errors").read_text()
        inside = (*host.inside, "nsenter", f"--target={child.pid}", "--mount", "--uts", "--")
        there = LibvirtHost(inside, folder / "log")
        _wait(there, child, folder)
        yield there
        _clear(there)
    finally:
        child.kill()
        child.wait()
        if child.stdout is not None:
            child.stdout.close()


def _wait(host: LibvirtHost, child: subprocess.Popen[str], folder: Path) -> None:
    until = time.monotonic() + PATIENCE
    while True:
        assert child.poll() is None, (folder / "errors").read_text()
        try:
            host.virsh("list", timeout=10)
        except AssertionError:
            if time.monotonic() > until:
                raise
            time.sleep(0.2)
        else:
            return


def _clear(host: LibvirtHost) -> None:
    for domain in host.virsh("list", "--name").split():
        host.virsh("destroy", domain)
