"""A libvirt domain that moves: libvirt's own migration, begun, watched and aborted by virsh; and who has the domain.

    virsh        this host's libvirt          the destination's
    Begin     -> the definition
    Prepare                                -> its QEMU is started; ended again when virsh's connection is lost
    Perform   -> mirrors, memory; the guest is paused. Where it fails, it goes on here
    Finish                                 -> defined there, and it runs     <- this decides
    (Confirm)    would end it here, or let it go on where the answer to Finish was lost: never made (libvirt_rpc.py)

virsh is the only one that sends Finish.  So once virsh has ended, and the destination has neither the domain nor a
QEMU that waits for it, it can never run there: tried with libvirt 9.0 by killing virsh before and after each call.
After Perform, the domain stays paused here until whoever knows what became of Finish ends it, or lets it go on.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from snapchain.errors import NotFound, SnapchainError, ToolFailed, Unavailable
from snapchain.host.process_channel import ProcessChannel
from snapchain.host.processes import minimal_environment
from snapchain.host.virsh import Virsh, environment, explained, is_not_running
from snapchain.host.virsh_session import VirshSession

_INCOMING = re.compile(r"paused \((?:migrating|starting up|post-copy|post-copy failed)\)|running \(post-copy\)")
_NONE, _COMPLETED = "0", "3"
_MIB = 1 << 20
_DIRTY_SECONDS = 1


class Presence(Enum):
    """How libvirt has a domain. PAUSED and WAITING: both are paused; by somebody, or in a migration."""

    ABSENT = "absent"
    DEFINED = "defined"
    WAITING = "waiting"
    PAUSED = "paused"
    RUNNING = "running"


def presence(virsh: Virsh, uuid: str) -> Presence:
    """How this daemon has a domain. Raises Unavailable where it does not answer."""
    try:
        said = virsh.text("domstate", "--domain", uuid, "--reason").strip()
    except NotFound:
        return Presence.ABSENT
    if _INCOMING.search(said):
        return Presence.WAITING
    word = said.partition(" (")[0]
    if word in {"shut off", "no state"} or (word == "crashed" and "panicked" not in said):
        return Presence.DEFINED
    return Presence.RUNNING if word in {"running", "in shutdown", "idle"} else Presence.PAUSED


def names_taken(virsh: Virsh, uuid: str, name: str) -> list[str]:
    """What the daemon already calls so: sentences."""
    rows = [line.split(" ", 1) for line in virsh.names("list", "--all", "--uuid", "--name") if " " in line]
    return [
        f"libvirt there already has a domain with {'this UUID' if other == uuid else 'this name'}: {title.strip()}"
        for other, title in rows
        if other == uuid or title.strip() == name
    ]


def host_uuid(virsh: Virsh) -> str:
    """By which a daemon tells that it is another host's."""
    return (virsh.xml("capabilities").findtext("host/uuid") or "").strip()


@dataclass(frozen=True, slots=True)
class Arrived:
    """How a domain has come, as libvirt measured it. pause: seconds in which it did not run; memory: bytes sent"""

    pause: float
    memory: int
    rounds: int


def arrival_of(virsh: Virsh, uuid: str) -> Arrived | None:
    """None where libvirt has no record of it."""
    with suppress(SnapchainError, KeyError, ValueError):
        values = _values(virsh.text("domjobinfo", "--domain", uuid, "--completed", "--rawstats"))
        numbers = [int(values[name]) for name in ("downtime", "memory_processed", "memory_iteration")]
        return Arrived(numbers[0] / 1000, numbers[1], numbers[2])
    return None


def start_with_host(virsh: Virsh, uuid: str) -> None:
    """Have libvirt start a domain when this host boots. Raises as `Virsh.text`."""
    virsh.text("autostart", "--domain", uuid)


@dataclass(frozen=True, slots=True)
class DomainLook:
    """How a domain travels. Bytes, bytes a second. round: over its memory; 0 while only its disks are mirrored.

    is_active: whether a migration is under way
    """

    is_active: bool
    disk_total: int = 0
    disk_left: int = 0
    memory_left: int = 0
    memory_sent: int = 0
    rate: float = 0.0
    round: int = 0
    dirty_rate: float = 0.0

    @property
    def disk_done(self) -> int:
        """Bytes that the mirrors have copied, of `disk_total`, which grows as the guest writes."""
        return self.disk_total - self.disk_left


def look_of(text: str) -> DomainLook:
    """From what `domjobinfo --rawstats` prints."""
    values = _values(text)

    def number(name: str) -> int:
        value = values.get(name, "0")
        return int(value) if value.isdigit() else 0

    return DomainLook(
        is_active=values.get("Job type", _NONE) not in (_NONE, _COMPLETED),
        disk_total=number("disk_total"),
        disk_left=number("disk_remaining"),
        memory_left=number("memory_remaining"),
        memory_sent=number("memory_processed"),
        rate=float(number("memory_bps")),
        round=number("memory_iteration"),
        dirty_rate=float(number("memory_dirty_rate") * number("memory_page_size")),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """Where a domain goes. uri: of libvirt there; here: socket of the one here, without Confirm
    memory, disks: sockets, of the same path on both hosts

    live, lasting: files with its definitions as they are to be there; mirrored: targets of its disks
    bandwidth: bytes a second, for the memory and for each mirror
    """

    uri: str
    here: Path
    memory: Path
    disks: Path
    live: Path
    lasting: Path
    mirrored: Sequence[str]
    bandwidth: int | None
    auto_converge: bool


class LeavingDomain:
    """The domain on its old host. Each call raises as `Virsh.text`."""

    def __init__(self, virsh: Virsh, uuid: str, name: str) -> None:
        self._virsh, self.uuid, self.name = virsh, uuid, name
        self._session = VirshSession(virsh)

    def close(self) -> None:
        """Idempotent."""
        self._session.close()

    def _text(self, verb: str, *words: str, timeout: float | None = None) -> str:
        return self._session.text(verb, "--domain", self.uuid, *words, timeout=timeout, subject=self.name)

    def presence(self) -> Presence:
        """How libvirt here has it. Of PAUSED and WAITING, neither says who has paused it."""
        return presence(self._virsh, self.uuid)

    def start(self, route: Route) -> ProcessChannel:
        """Begin to migrate it: a virsh that ends with us, and without which nothing can end well there.

        It exits with 0 where Finish has succeeded.
        """
        words = [
            "migrate", "--domain", self.uuid, "--desturi", route.uri, "--live", "--persistent", "--undefinesource",
            "--abort-on-error", "--copy-storage-inc", "--migrate-disks", ",".join(route.mirrored),
            "--migrateuri", f"unix://{route.memory}", "--disks-uri", f"unix://{route.disks}",
            "--xml", str(route.live), "--persistent-xml", str(route.lasting),
        ]  # fmt: skip
        if route.bandwidth is not None:
            words += ["--bandwidth", str(-(-route.bandwidth // _MIB))]
        if route.auto_converge:
            words += ["--auto-converge"]
        argv = Virsh(f"qemu+unix:///system?socket={route.here}").argv(*words)

        def diagnose(status: int, stderr: str) -> SnapchainError:
            failed = ToolFailed("failed", argv=argv, status=status, stderr=stderr, subject="virsh")
            return explained(failed, words, uri=self._virsh.uri, name=self.name)

        return ProcessChannel(argv, peer="virsh", diagnose=diagnose, env=minimal_environment(environment()))

    def look(self) -> DomainLook:
        """How it travels now."""
        try:
            return look_of(self._text("domjobinfo", "--rawstats"))
        except (NotFound, ToolFailed) as error:
            if isinstance(error, NotFound) or is_not_running(error):
                return DomainLook(is_active=False)
            raise

    def abort(self, *, seconds: float) -> None:
        """Have libvirt give the migration up, and wait until none is under way. Raises Unavailable where it goes on.

        libvirt refuses that once all is sent; then it ends by itself.
        """
        until = time.monotonic() + seconds
        while self.look().is_active:
            with suppress(NotFound, ToolFailed):
                self._text("domjobabort")
            if time.monotonic() >= until:
                raise Unavailable("libvirt does not end the migration", subject=self.name, hint="virsh domjobabort")
            time.sleep(0.1)

    def max_downtime(self) -> int:
        """Milliseconds that libvirt allows for the last part of the memory."""
        said = self._text("migrate-getmaxdowntime").strip()
        return int(said) if said.isdigit() else 0

    def set_max_downtime(self, milliseconds: int) -> None:
        self._text("migrate-setmaxdowntime", "--downtime", str(max(1, milliseconds)))

    def starts_with_host(self) -> bool:
        """Whether libvirt here starts it when the host boots."""
        values = _values(self._virsh.text("dominfo", "--domain", self.uuid, subject=self.name))
        return values.get("Autostart") == "enable"

    def dirty_rate(self) -> float | None:
        """Bytes of memory a second that it dirties, over a second; None where libvirt cannot measure it."""
        try:
            self._text("domdirtyrate-calc", "--seconds", str(_DIRTY_SECONDS))
            until = time.monotonic() + 10 * _DIRTY_SECONDS
            while time.monotonic() < until:
                values = _values(self._text("domstats", "--dirtyrate"), "=")
                if values.get("dirtyrate.calc_status") == "2":
                    return float(int(values["dirtyrate.megabytes_per_second"]) * _MIB)
                time.sleep(0.1)
        except (ToolFailed, KeyError, ValueError):
            return None
        return None

    def resume(self) -> None:
        """Let it go on here. The caller knows that no other host has it or will have it."""
        self._text("resume", timeout=60.0)

    def end(self, *, is_lasting: bool) -> None:
        """It is another host's: end its QEMU here, and forget its definition. Idempotent.

        is_lasting: whether it had a definition that lasts
        """
        if self.presence() not in (Presence.ABSENT, Presence.DEFINED):
            with suppress(NotFound):
                self._text("destroy", timeout=60.0)
        if is_lasting and self.presence() is Presence.DEFINED:
            with suppress(NotFound):
                self._text("undefine", "--managed-save", "--keep-nvram")


def _values(text: str, mark: str = ":") -> Mapping[str, str]:
    rows = (line.partition(mark) for line in text.splitlines())
    return {key.strip(): value.strip() for key, found, value in rows if found}
