"""The service of systemd that a process belongs to, and whether systemd starts it again when it ends.

A QEMU that is ended because its guest has moved must not come back on the files that it left.
Sources: systemd.service(5), Restart=; cgroups(7), /proc/PID/cgroup.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from snapchain.errors import ToolFailed
from snapchain.host.processes import run

_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Service:
    """name: as in web1.service; restart: its Restart=, '' where systemd does not say"""

    name: str
    restart: str


def service_of(pid: int) -> Service | None:
    """The service that ends when the process ends. None where there is none, as for a program of a login session.

    The service that this snapchain runs in itself does not count: cron or an sshd, which started both.
    """
    name = service_in(_cgroups(pid))
    if name is None or name == service_in(_cgroups("self")):
        return None
    said = _ask_systemd(name)
    main = said.get("MainPID", "")
    if main.isdigit() and int(main) not in (0, *_ancestors(pid)):
        return None  # it goes on without this process
    return Service(name, said.get("Restart", ""))


def service_in(cgroups: str) -> str | None:
    """The innermost unit in the text of a /proc/PID/cgroup, if it is a service. systemd never starts a scope again."""
    for line in cgroups.splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if (number == "0" and not controllers) or controllers == "name=systemd":
            units = [part for part in path.split("/") if part.endswith((".service", ".scope"))]
            if units:
                return units[-1] if units[-1].endswith(".service") else None
    return None


def _cgroups(pid: int | str) -> str:
    try:
        return Path(f"/proc/{pid}/cgroup").read_text(encoding="utf-8", errors="replace")
    except OSError:  # it has ended, or this kernel has no cgroups
        return ""


def _ancestors(pid: int) -> list[int]:
    """The process, its parent, and so on."""
    found: list[int] = []
    while pid > 0 and pid not in found:
        found.append(pid)
        try:
            text = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
        except OSError:
            break
        pid = int(text.rpartition(")")[2].split()[1])
    return found


def _ask_systemd(name: str) -> dict[str, str]:
    """What the system's manager says of a service that it knows; nothing for one that it does not, or no answer."""
    if shutil.which("systemctl") is None:
        return {}
    argv = ["systemctl", "show", "--property=LoadState,MainPID,Restart", "--", name]
    try:
        text = run(argv, timeout=_SECONDS).stdout.decode(errors="replace")
    except ToolFailed:  # systemd is not what runs here
        return {}
    said = dict(line.split("=", 1) for line in text.splitlines() if "=" in line)
    return said if said.get("LoadState") == "loaded" else {}
