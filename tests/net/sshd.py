"""A real sshd for tests: own keys, own configuration, own port, gone when the block ends or the test run is killed.

    with sshd(folder) as host:
        subprocess.run([*host.ssh, host.alias, "uname"])

`host.ssh` reads nothing but the configuration made here: neither the user's, nor the machine's, nor any agent.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.servers import DIE_WITH_PARENT, PATIENCE, free_port
from tests.waiting import HANG

SSHD = "/usr/sbin/sshd"  # it starts itself anew for each connection, and wants to know where it is


@dataclass(frozen=True)
class SshHost:
    """A running sshd. ssh: the client's argument list before the host; both run in their own network namespaces."""

    alias: str
    address: str
    port: int
    folder: Path
    ssh: tuple[str, ...]
    server: int
    inside: tuple[str, ...]

    @property
    def config(self) -> Path:
        return self.folder / "ssh_config"

    @property
    def log(self) -> str:
        """What the server said."""
        return (self.folder / "sshd.log").read_text(errors="replace")

    def url(self, path: str | Path) -> str:
        return f"ssh://{self.alias}{path}"

    def run(self, *words: str, **more: object) -> subprocess.CompletedProcess[str]:
        """A command over there, by its login shell."""
        argv = [*self.ssh, self.alias, *words]
        return subprocess.run(argv, capture_output=True, text=True, timeout=HANG, check=True, **more)  # type: ignore[call-overload,no-any-return]

    def sessions(self) -> list[int]:
        """Process ids of the server's connections."""
        listed = Path(f"/proc/{self.server}/task/{self.server}/children").read_text().split()
        return [int(pid) for pid in listed]


@contextmanager
def sshd(
    folder: Path,
    *,
    alias: str = "there",
    address: str = "127.0.0.1",
    there: Sequence[str] = (),
    here: Sequence[str] = (),
    settings: Sequence[str] = (),
) -> Iterator[SshHost]:
    """One server. there, here: what goes before sshd's and ssh's argument lists, such as `nsenter --net=...`.

    settings: further lines of sshd_config, which win over those given here.
    """
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)  # privilege separation; the service's start makes it
    for key in ("host_key", "user_key"):
        if not (folder / key).exists():
            argv = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", key, "-f", folder / key]
            subprocess.run(argv, check=True, capture_output=True, timeout=PATIENCE)
    port = free_port()
    _write_server_config(folder, address, port, settings)
    _write_client_config(folder, alias, address, port)
    ssh = (*here, "ssh", "-F", str(folder / "ssh_config"))
    argv = [*DIE_WITH_PARENT, *there, SSHD, "-D", "-e", "-f", str(folder / "sshd_config")]
    with (folder / "sshd.log").open("wb") as log:
        child = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    host = SshHost(alias, address, port, folder, ssh, child.pid, tuple(there))
    sessions: list[int] = []
    try:
        _wait_until_it_answers(child, host)
        yield host
    finally:
        with contextlib.suppress(OSError):  # it may have been killed by the test
            sessions = host.sessions()
        child.kill()
        child.wait()
        for session in sessions:
            with contextlib.suppress(ProcessLookupError):
                os.kill(session, signal.SIGKILL)


def _write_server_config(folder: Path, address: str, port: int, settings: Sequence[str]) -> None:
    (folder / "authorized_keys").write_bytes((folder / "user_key.pub").read_bytes())
    ours = [
        f"ListenAddress {f'[{address}]' if ':' in address else address}:{port}",
        f"HostKey {folder}/host_key",
        f"AuthorizedKeysFile {folder}/authorized_keys",
        f"PidFile {folder}/sshd.pid",
        "AuthenticationMethods publickey",
        "PermitRootLogin prohibit-password",
        "UsePAM no",
        "StrictModes no",  # temporary folders are under /tmp, which everybody may write
        "UseDNS no",
        "PrintMotd no",
        "MaxStartups 50",
        "MaxSessions 50",
        "LogLevel VERBOSE",
    ]
    # For most of them sshd takes the first line, for MaxStartups the last.
    given = {line.split()[0] for line in settings}
    lines = [*settings, *(line for line in ours if line.split()[0] not in given)]
    (folder / "sshd_config").write_text("\n".join(lines) + "\n")


def _write_client_config(folder: Path, alias: str, address: str, port: int) -> None:
    key = " ".join((folder / "host_key.pub").read_text().split()[:2])
    (folder / "known_hosts").write_text(f"{alias}-key {key}\n")
    lines = [
        f"Host {alias}",
        f"  HostName {address}",
        f"  Port {port}",
        f"  HostKeyAlias {alias}-key",
        "Host *",
        f"  IdentityFile {folder}/user_key",
        "  IdentitiesOnly yes",
        "  IdentityAgent none",
        f"  UserKnownHostsFile {folder}/known_hosts",
        "  GlobalKnownHostsFile /dev/null",
        "  StrictHostKeyChecking yes",
    ]
    (folder / "ssh_config").write_text("\n".join(lines) + "\n")


def _wait_until_it_answers(child: subprocess.Popen[bytes], host: SshHost) -> None:
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until:
        if child.poll() is not None:
            raise RuntimeError(f"sshd ended with {child.returncode}: {host.log}")
        if f"port {host.port}" in host.log:  # "Server listening on ..."
            return
        time.sleep(0.02)
    raise RuntimeError(f"sshd does not answer after {PATIENCE} s: {host.log}")
