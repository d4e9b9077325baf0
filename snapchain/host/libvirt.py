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

from snapchain.errors import SnapchainError
from snapchain.host.virsh import Virsh, has_any_daemon, parsed, reachable

_COUNTS_FOR = 10.0
"""An answer counts for so many times as long as asking took."""
SECONDS = 10.0
"""The longest that all questions together may take."""
_DIRECTORY_POOLS = {"dir", "fs", "netfs", "gluster", "vstorage"}
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
    asked_for = (program, *reachable())
    if _last is None or _last[0] != asked_for or began >= _last[1]:
        found = _ask_all()
        ended = time.monotonic()
        _last = asked_for, ended + _COUNTS_FOR * (ended - began), found
    return _last[2]


_last: tuple[tuple[str, ...], float, Definitions] | None = None
"""What was asked for, until when the answer counts, and the answer."""


def forget() -> None:
    """Ask again next time: a definition was changed."""
    global _last  # noqa: PLW0603 - as above
    _last = None


def _ask_all() -> Definitions:
    found = [_asked(uri, time.monotonic() + SECONDS) for uri in reachable()]
    return Definitions(
        domains=tuple(domain for each in found for domain in each.domains),
        directories=tuple(dict.fromkeys(path for each in found for path in each.directories)),
        volumes=tuple(dict.fromkeys(path for each in found for path in each.volumes)),
        fault=next((each.fault for each in found if each.fault), None),
    )


@dataclass(slots=True)
class _Questions:
    """Questions to one daemon that share a deadline. A failure is noted, and answers None."""

    uri: str
    deadline: float
    faults: list[str] = field(default_factory=list)

    @property
    def slow(self) -> bool:
        """Whether the time is up."""
        return time.monotonic() >= self.deadline

    def text(self, *words: str) -> str | None:
        """What a command prints."""
        left = self.deadline - time.monotonic()
        if left <= 0:
            self.faults.append(_SLOW)
            return None
        try:
            # Anybody may look; for more, libvirt would ask for a password.
            return Virsh(self.uri, read_only=os.geteuid() != 0).text(*words, timeout=left)
        except SnapchainError as error:
            self.faults.append(_SLOW if self.slow else error.message)
            return None

    def names(self, *words: str) -> list[str]:
        return [line.strip() for line in (self.text(*words) or "").splitlines() if line.strip()]

    def xml(self, *words: str) -> ET.Element | None:
        text = self.text(*words)
        if text is None:
            return None
        try:
            return parsed(text, words)
        except SnapchainError as error:
            self.faults.append(error.message)
            return None


def _asked(uri: str, deadline: float) -> Definitions:
    virsh = _Questions(uri, deadline)
    names = virsh.names("list", "--all", "--name")
    if virsh.faults:
        return Definitions(fault=_fault(virsh.faults) if virsh.slow or has_any_daemon() else None)
    running = set(virsh.names("list", "--name"))
    directories: list[Path] = []
    volumes: dict[tuple[str, str], Path] = {}
    for pool in virsh.names("pool-list", "--name"):
        directories += _pool_directory(virsh.xml("pool-dumpxml", "--pool", pool))
        volumes.update(((pool, name), path) for name, path in _volumes(virsh.text("vol-list", "--pool", pool) or ""))
    domains = []
    for name in names:
        runs = name in running
        asked = [(virsh.xml("dumpxml", "--domain", name), not runs)]
        if runs:
            asked.append((virsh.xml("dumpxml", "--domain", name, "--inactive"), True))
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
