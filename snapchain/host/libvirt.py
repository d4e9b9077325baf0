"""Files that libvirt's definitions name: those of its domains, and the volumes of its pools.

Asks `virsh`, which changes nothing by these commands.  A host without virsh has no libvirt to ask.  One whose daemon
does not answer is a fact that the caller must be able to tell the user, so it is returned and not raised.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from shutil import which
from xml.etree import ElementTree as ET

from snapchain.errors import SnapchainError, ToolFailed
from snapchain.host.processes import run
from snapchain.host.terminal import shell_line

SECONDS = 10.0
"""The longest that all questions together may take."""
_DIRECTORY_POOLS = {"dir", "fs", "netfs", "gluster", "vstorage"}
_SOCKETS = ("libvirt-sock", "virtqemud-sock", "libvirt-sock-ro", "virtqemud-sock-ro")
_OUTPUT_CAP = 8 << 20
_SLOW = "it did not answer in time"


@dataclass(frozen=True, slots=True)
class NamedFile:
    """A file that a domain's definition names.

    disk: its target, such as vda; source: the file that the guest itself opens, where this is a backing file of that
    is_lasting: in the definition by which the domain starts the next time, and not only in the one that runs now
    """

    path: Path
    disk: str | None = None
    source: Path | None = None
    is_lasting: bool = True


@dataclass(frozen=True, slots=True)
class Domain:
    """A domain, running or not, with every path of its definitions: the running one and the one of the next start."""

    name: str
    files: tuple[NamedFile, ...]


@dataclass(frozen=True, slots=True)
class Definitions:
    """directories, volumes (devices too): of active pools; fault: what could not be asked, as a sentence."""

    domains: tuple[Domain, ...] = ()
    directories: tuple[Path, ...] = ()
    volumes: tuple[Path, ...] = ()
    fault: str | None = None


def definitions() -> Definitions:
    """Ask every libvirt daemon that this user's virsh reaches, each for SECONDS at most.

    An answer is given again for ten times as long as asking took: with many domains that takes seconds, and a night
    asks for each of its disks.
    """
    global _last  # noqa: PLW0603 - one libvirt, one answer
    program, began = which("virsh"), time.monotonic()
    if program is None:
        return Definitions()
    asked_for = (program, *(uri for env in _connections() for uri in env.values()))
    if _last is None or _last[0] != asked_for or began >= _last[1]:
        found = _ask_all()
        ended = time.monotonic()
        _last = asked_for, ended + 10 * (ended - began), found
    return _last[2]


_last: tuple[tuple[str, ...], float, Definitions] | None = None
"""What was asked for, until when the answer counts, and the answer."""


def _ask_all() -> Definitions:
    found = [_asked(env, time.monotonic() + SECONDS) for env in _connections()]
    return Definitions(
        domains=tuple(domain for each in found for domain in each.domains),
        directories=tuple(dict.fromkeys(path for each in found for path in each.directories)),
        volumes=tuple(dict.fromkeys(path for each in found for path in each.volumes)),
        fault=next((each.fault for each in found if each.fault), None),
    )


def _connections() -> list[Mapping[str, str]]:
    """What tells virsh whom to ask: the user's own choice, else the system's daemon and this user's, if it runs."""
    chosen = os.environ.get("LIBVIRT_DEFAULT_URI") or os.environ.get("VIRSH_DEFAULT_CONNECT_URI")
    if chosen:
        return [{"LIBVIRT_DEFAULT_URI": chosen}]
    uris: list[Mapping[str, str]] = [{"LIBVIRT_DEFAULT_URI": "qemu:///system"}]
    # Asking for a session that does not run would start its daemon.
    if os.geteuid() != 0 and any(socket.exists() for socket in _session_sockets()):
        uris.append({"LIBVIRT_DEFAULT_URI": "qemu:///session", "XDG_RUNTIME_DIR": os.environ["XDG_RUNTIME_DIR"]})
    return uris


def _session_sockets() -> list[Path]:
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    return [Path(runtime) / "libvirt" / name for name in _SOCKETS] if runtime else []


def _is_there() -> bool:
    """Whether a libvirt daemon has a socket here."""
    sockets = [*(Path("/run/libvirt") / name for name in _SOCKETS), *_session_sockets()]
    return any(socket.exists() for socket in sockets)


@dataclass(slots=True)
class _Virsh:
    env: Mapping[str, str]
    deadline: float
    faults: list[str] = field(default_factory=list)

    @property
    def slow(self) -> bool:
        """Whether the time is up."""
        return time.monotonic() >= self.deadline

    @staticmethod
    def _access() -> list[str]:
        """Anybody may look; for more, libvirt would ask for a password."""
        return [] if os.geteuid() == 0 else ["--readonly"]

    def text(self, *words: str) -> str | None:
        """What a command prints; None when it fails, which is noted."""
        left = self.deadline - time.monotonic()
        if left <= 0:
            self.faults.append(_SLOW)
            return None
        try:
            done = run(["virsh", *self._access(), *words], env=self.env, timeout=left, output_cap=_OUTPUT_CAP)
        except ToolFailed as error:
            self.faults.append(_SLOW if self.slow else error.message)
            return None
        except SnapchainError as error:  # a name that no program can be given
            self.faults.append(str(error))
            return None
        return done.stdout.decode("utf-8", "surrogateescape")

    def names(self, *words: str) -> list[str]:
        return [line.strip() for line in (self.text(*words) or "").splitlines() if line.strip()]

    def xml(self, *words: str) -> ET.Element | None:
        text = self.text(*words)
        if text is None:
            return None
        try:
            return ET.fromstring(text.encode("utf-8", "surrogateescape"))  # noqa: S314 - libvirt's own words
        except ET.ParseError as error:
            self.faults.append(f"`{shell_line(['virsh', *words])}` printed no XML: {error}")
            return None


def _asked(env: Mapping[str, str], deadline: float) -> Definitions:
    virsh = _Virsh(env, deadline)
    names = virsh.names("list", "--all", "--name")
    if virsh.faults:
        return Definitions(fault=_fault(virsh.faults) if virsh.slow or _is_there() else None)
    running = set(virsh.names("list", "--name"))
    directories: list[Path] = []
    volumes: dict[tuple[str, str], Path] = {}
    for pool in virsh.names("pool-list", "--name"):
        directories += _pool_directory(virsh.xml("pool-dumpxml", pool))
        volumes.update(((pool, name), path) for name, path in _volumes(virsh.text("vol-list", pool) or ""))
    domains = []
    for name in names:
        runs = name in running
        asked = [(virsh.xml("dumpxml", name), not runs)]
        if runs:
            asked.append((virsh.xml("dumpxml", name, "--inactive"), True))
        files = [file for xml, lasts in asked if xml is not None for file in _files(xml, volumes, is_lasting=lasts)]
        domains.append(Domain(name, tuple(dict.fromkeys(files))))
    return Definitions(tuple(domains), tuple(directories), tuple(volumes.values()), _fault(virsh.faults))


def _fault(faults: list[str]) -> str | None:
    return f"libvirt could not be asked about all of its domains and pools: {faults[0]}." if faults else None


def _pool_directory(pool: ET.Element | None) -> list[Path]:
    if pool is None or pool.get("type") not in _DIRECTORY_POOLS:
        return []
    path = (pool.findtext("target/path") or "").strip()
    return [Path(path)] if path.startswith("/") else []


def _volumes(table: str) -> Iterator[tuple[str, Path]]:
    """(name, path) from the table that vol-list prints: two columns, names and paths may hold blanks."""
    for line in table.splitlines():
        name, slash, path = line.strip().partition(" /")
        if slash:
            yield name.strip(), Path("/" + path.strip())


def _files(domain: ET.Element, volumes: Mapping[tuple[str, str], Path], *, is_lasting: bool) -> Iterator[NamedFile]:
    inside: set[ET.Element] = set()
    for disk in domain.iterfind("devices/disk"):
        target = disk.find("target")
        name = None if target is None else target.get("dev")
        inside.update(disk.iter())
        opened = next((path for source in disk.findall("source") for path in _sources(source, volumes)), None)
        for source in disk.iter("source"):
            of = None if source in list(disk) else opened
            for path in _sources(source, volumes):
                yield NamedFile(path, name, of, is_lasting)
    # Firmware, kernels, whatever else: a path is a path.
    for element in domain.iter():
        if element not in inside:
            for value in (*element.attrib.values(), (element.text or "").strip()):
                if value.startswith("/") and len(value) > 1:
                    yield NamedFile(Path(value), is_lasting=is_lasting)


def _sources(source: ET.Element, volumes: Mapping[tuple[str, str], Path]) -> list[Path]:
    volume = volumes.get((source.get("pool") or "", source.get("volume") or ""))
    paths = [Path(value) for value in source.attrib.values() if value.startswith("/")]
    return [*paths, *([volume] if volume else [])]
