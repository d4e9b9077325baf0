"""Two hosts as an operator has them: each with a name, an sshd, a state, sockets and a replica of its own.

    with two_sites(folder, delay=0.04) as pair:
        pair.a.snapchain("migrate", "--qmp", qmp, pair.b.url)

A guest can so move forth and back, and each host knows only what it was told.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.guest.counting_guest import arrived
from tests.libvirtd import LibvirtHost
from tests.net.commands import started
from tests.net.libvirt_host import libvirt_host
from tests.net.namespaces import Cable, Host, two_hosts
from tests.net.sshd import SshHost, sshd
from tests.waiting import started_with, wait_until

PATIENCE = 600.0
"""Seconds for one command."""
_AS = 'hostname "$0" && exec "$@"'


@dataclass
class Site:
    """One host. run: of its sockets, a short path; sshd: by which the other one reaches it; libvirt: if it has one"""

    name: str
    host: Host
    folder: Path
    run: Path
    sshd: SshHost
    libvirt: LibvirtHost | None = None
    peer: Site | None = field(default=None, repr=False)

    @property
    def inside(self) -> tuple[str, ...]:
        """What goes before an argument list to run it there."""
        return self.host.inside if self.libvirt is None else self.libvirt.inside

    @property
    def replica(self) -> Path:
        return self.folder / "replica"

    @property
    def url(self) -> str:
        """Of its replica, from the other host."""
        return self.sshd.url(self.replica)

    @property
    def environment(self) -> dict[str, str]:
        """What makes a snapchain this host's."""
        return {
            "XDG_STATE_HOME": str(self.folder / "state"),
            "XDG_CACHE_HOME": str(self.folder / "cache"),
            "XDG_RUNTIME_DIR": str(self.run),
            "PYTHONPATH": ":".join(filter(None, sys.path)),
        }

    @property
    def served(self) -> str:
        """The command of a shell over here that is `snapchain`, as SNAPCHAIN_REMOTE takes it."""
        words = ["unshare", "--uts", "sh", "-c", _AS, self.name, sys.executable, "-m", "snapchain"]
        return shlex.join(["env", *(f"{key}={value}" for key, value in self.environment.items()), *words])

    def begin(self, *words: object, **more: str) -> subprocess.Popen[str]:
        """A snapchain on this host. more: of its environment"""
        peer = self.peer
        there = {"SNAPCHAIN_SSH": shlex.join(peer.sshd.ssh), "SNAPCHAIN_REMOTE": peer.served} if peer else {}
        inside = [*self.inside, "unshare", "--uts", "sh", "-c", _AS, self.name]
        return started(words, environment={**os.environ, **self.environment, **there, **more}, inside=inside)

    def snapchain(self, *words: object, **more: str) -> tuple[int, str, str]:
        """Its exit code, and what it said on both streams."""
        with self.begin(*words, **more) as child:
            try:
                out, error = child.communicate(timeout=PATIENCE)
            except subprocess.TimeoutExpired:
                os.killpg(child.pid, signal.SIGKILL)
                raise
        assert "Traceback" not in error, error
        return child.returncode, out, error

    def report(self, *words: object, **more: str) -> Any:
        """What a command that succeeds reports."""
        status, out, error = self.snapchain(*words, "--json", **more)
        assert status == 0, f"{words}: {out}{error}"
        return json.loads(out)

    def processes(self) -> list[int]:
        """All that works for it: snapchain, watchdogs, and QEMUs that arrived here."""
        return [int(process.name) for process in started_with(self.run)]

    def left(self) -> list[Path]:
        """Records of what is under way, and directories of sockets."""
        return [*self.run.glob("snapchain/*"), *(self.folder / "state").glob("snapchain/guests/*.json")]

    def sent(self) -> int:
        """Bytes that it has put on the cable."""
        argv = ["ip", "-n", self.host.namespace, "-s", "-j", "link"]
        rows = json.loads(subprocess.run(argv, check=True, capture_output=True).stdout)
        return sum(row["stats64"]["tx"]["bytes"] for row in rows if row["ifname"] != "lo")


@dataclass
class Sites:
    """a: where a guest starts; b: the other one."""

    a: Site
    b: Site
    cable: Cable

    def other(self, site: Site) -> Site:
        return self.b if site is self.a else self.a


@contextmanager
def two_sites(
    folder: Path, *, delay: float = 0.0, loss: float = 0.0, rate: float = 0.0, libvirt: bool = False
) -> Iterator[Sites]:
    """The cable as Cable.set has it; libvirt: each has one. QEMUs that arrived on either are ended. Needs root."""
    with (
        two_hosts(delay=delay, loss=loss, rate=rate) as (near, far, cable),
        tempfile.TemporaryDirectory(prefix="sc") as short,
        ExitStack() as stack,
    ):
        hosts = {"kvm1": near, "kvm2": far}
        daemons = {
            name: stack.enter_context(libvirt_host(host, folder / name / "libvirt", name)) if libvirt else None
            for name, host in hosts.items()
        }
        inside = {name: (daemons[name] or host).inside for name, host in hosts.items()}
        sites = []
        for name, other in (("kvm1", "kvm2"), ("kvm2", "kvm1")):
            run = Path(short) / name[-1]
            run.mkdir()
            address = hosts[name].address
            way = sshd(folder / name / "sshd", alias=name, address=address, there=inside[name], here=inside[other])
            sites.append(Site(name, hosts[name], folder / name, run, stack.enter_context(way), daemons[name]))
        a, b = sites
        a.peer, b.peer = b, a
        try:
            yield Sites(a, b, cable)
        finally:
            for pid in arrived(Path(short)):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            wait_until(lambda: not arrived(Path(short)))
