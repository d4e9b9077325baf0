"""A libvirt domain as a `Guest`. Everything goes through virsh (host/virsh.py); QEMU's monitor is never asked.

The live XML says what QEMU has open: libvirt writes the whole chain there, with the number of each node.  So no
`qemu-monitor-command` is needed, which would mark the domain as tainted.  A change is asked of libvirt, and judged by
the XML afterwards: docs/decisions/0116.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Literal
from xml.etree import ElementTree as ET

from snapchain.errors import Busy, NotFound, ToolFailed
from snapchain.guest import domain_xml, libvirt_jobs, libvirt_snapshot
from snapchain.guest.address import GuestAddress
from snapchain.guest.domain_xml import XmlDisk, XmlLayer
from snapchain.guest.libvirt_agent import LibvirtAgent
from snapchain.guest.libvirt_definition import definition_of
from snapchain.guest.libvirt_disks import DomainDisks, hindered
from snapchain.guest.libvirt_jobs import BlockJob, block_job
from snapchain.guest.protocol import (
    Activity,
    Agent,
    Definition,
    DiskStatistics,
    GuestDisk,
    Job,
    JobKind,
    NewOverlay,
    State,
    Switch,
)
from snapchain.host.qemu_processes import open_images, qemu_processes
from snapchain.host.terminal import shell_word
from snapchain.host.virsh import Virsh, is_not_running, parsed
from snapchain.host.virsh_session import VirshSession

_OFF = {"shut off", "no state"}
_MIGRATING = re.compile(r"\((?:migrating|post-copy|post-copy failed)\)")
"""Not `running (migrated)`: so libvirt calls a domain that has come here, until it is paused or ends."""
_SAVED = "(saved)"


class LibvirtGuest:
    """Implements `protocol.Guest`."""

    kind: Literal["libvirt"] = "libvirt"
    streams = False

    def __init__(self, address: GuestAddress) -> None:
        """Find the domain. Raises NotFound, Unavailable where libvirt does not answer, Unsupported for another host."""
        assert address.domain is not None
        self.address = address
        self._virsh = Virsh(address.connect)
        self.uuid, self.name = _found(self._virsh, address.domain)
        self._disks = DomainDisks(self._virsh, self.name)

    @property
    def option(self) -> str:
        """With --connect, where the environment does not name the daemon."""
        connect = f" --connect {shell_word(self.address.connect)}" if self.address.connect is not None else ""
        return f"--domain {shell_word(self.name)}{connect}"

    @property
    def uri(self) -> str:
        """Of the daemon that has it."""
        return self._virsh.uri

    def close(self) -> None:
        """Nothing is open between two calls."""

    def command(self, verb: str, *words: str, timeout: float | None = None) -> str:
        """A virsh command on this domain. The UUID names it: a name of digits could be another domain's id."""
        return self._virsh.text(verb, "--domain", self.uuid, *words, timeout=timeout, subject=self.name)

    def _texts(self, *commands: Sequence[str]) -> list[str]:
        """Several commands on this domain at once."""
        whole = [[verb, "--domain", self.uuid, *words] for verb, *words in commands]
        return self._virsh.texts(*whole, subject=self.name)

    # --- what it is

    def state(self) -> State:
        return state_of(self.command("domstate", "--reason"))

    def has_autostart(self) -> bool:
        """Whether libvirt starts it by itself when its daemon or the host starts."""
        return dict(_pairs(self.command("dominfo"))).get("Autostart") == "enable"

    def process(self) -> tuple[int, int] | None:
        for each in qemu_processes():
            if each.arguments.is_libvirt and each.arguments.uuid == self.uuid and each.arguments.name == self.name:
                return each.pid, each.started
        return None

    def disks(self) -> Sequence[GuestDisk]:
        said, live, inactive = self._texts(["domstate", "--reason"], ["dumpxml"], ["dumpxml", "--inactive"])
        state = state_of(said)
        shown = domain_xml.disks_of(parsed(live, ["dumpxml"]))
        lasting = domain_xml.disks_of(parsed(inactive, ["dumpxml"])) if state is not State.OFF else []
        process = self.process() if state is not State.OFF else None
        opened = None if process is None else open_images(process[0])
        disks = self._disks.look(shown, lasting, opened, is_off=state is State.OFF)
        if _SAVED in said:
            why = "The memory of the guest is saved on disk, and must find the disk unchanged. Start the guest first."
            disks = [hindered(each, why) for each in disks]
        return disks

    def disk(self, name: str) -> GuestDisk | None:
        """One disk as it is now; None where there is none of this name."""
        return next((each for each in self.disks() if each.name == name), None)

    def lasting_disks(self) -> list[XmlDisk]:
        """The disks of the definition for its next start."""
        return domain_xml.disks_of(self._xml("--inactive"))

    def path_of(self, layer: XmlLayer) -> Path | None:
        """See `DomainDisks`."""
        return self._disks.path_of(layer)

    def _xml(self, *words: str) -> ET.Element:
        return self._virsh.xml("dumpxml", "--domain", self.uuid, *words, subject=self.name)

    # --- what is at work in it

    def activities(self) -> Sequence[Activity]:
        said, live = self._texts(["domstate", "--reason"], ["dumpxml"])
        if state_of(said) is State.OFF:
            return ()
        found: list[Activity] = []
        shown_disks = [disk for disk in domain_xml.disks_of(parsed(live, ["dumpxml"])) if disk.layers]
        operation, jobs = self._operation(), self._block_jobs([disk.target for disk in shown_disks])
        if operation is not None:
            kind = "migration" if "migration" in operation.lower() else operation.lower()
            found.append(Activity(f"libvirt:{kind}", kind, False, None, f"libvirt does this: {operation.lower()}"))
        ours = {record.disk: record for record in libvirt_jobs.records(self)}
        for shown in shown_disks:
            job = jobs[shown.target]
            if job is None and shown.mirror is not None:
                job = BlockJob({"copy": "mirror"}.get(shown.mirror[0], shown.mirror[0]), 0, 0)
            if job is None or (job.kind == "backup" and operation == "Backup"):
                continue
            record = ours.get(shown.target)
            node = f"libvirt-{shown.layers[0].index}-format"
            if record is not None and record.kind.value == job.kind and self._is_of(record, shown):
                says = f"snapchain merges layers of {shown.target}: {job.kind}"
                found.append(Activity(record.id, job.kind, True, node, says))
            else:
                says = f"a block job of another program works on {shown.target}: {job.kind}"
                found.append(Activity(f"{job.kind}-{shown.target}", job.kind, False, node, says))
        return tuple(found)

    def _is_of(self, record: libvirt_jobs.JobRecord, shown: XmlDisk) -> bool:
        """Whether the inputs of a job of ours are still in the chain: only then it is the one that runs."""
        return {record.lowest, record.uppermost} <= {self.path_of(layer) for layer in shown.layers}

    def _operation(self) -> str | None:
        """The operation of libvirt on the whole domain, such as `Outgoing migration` or `Backup`; None for none."""
        try:
            said = self.command("domjobinfo")
        except ToolFailed as error:
            if is_not_running(error):
                return None
            raise
        values = dict(_pairs(said))
        if values.get("Job type", "None") in {"None", "Completed"}:
            return None
        return values.get("Operation", "Unknown operation")

    def block_job(self, disk: str) -> BlockJob | None:
        """The block job of a disk; None for none, and where the domain does not run."""
        return self._block_jobs([disk])[disk]

    def _block_jobs(self, disks: Sequence[str]) -> dict[str, BlockJob | None]:
        if not disks:
            return {}
        try:
            found = self._texts(*(["blockjob", "--path", disk, "--raw"] for disk in disks))
        except ToolFailed as error:
            if is_not_running(error):
                return dict.fromkeys(disks)
            raise
        return {disk: block_job(said) for disk, said in zip(disks, found, strict=True)}

    def is_ready(self, disk: str) -> bool:
        """Whether the copy or the active commit of a disk can be pivoted to."""
        shown = next((each for each in domain_xml.disks_of(self._xml()) if each.target == disk), None)
        return shown is not None and shown.mirror is not None and shown.mirror[1]

    def statistics(self, disk: str) -> DiskStatistics:
        values = dict(_pairs(self.command("domstats", "--block"), "="))
        for key, value in values.items():
            if value == disk and (found := re.fullmatch(r"block\.(\d+)\.name", key)):
                part = {name: int(values.get(f"block.{found[1]}.{name}", "0")) for name in _COUNTERS}
                return DiskStatistics(*part.values())
        raise NotFound("the guest has no statistics of this disk", subject=f"{self.name}/{disk}")

    def definition(self, *, with_secrets: bool) -> Definition:
        secret = ["--security-info"] if with_secrets else []
        is_off = self.state() is State.OFF
        lasts = self.uuid not in self._virsh.names("list", "--all", "--transient", "--uuid")
        return definition_of(
            self.name,
            self.uuid,
            live=None if is_off else self.command("dumpxml", *secret),
            inactive=self.command("dumpxml", "--inactive", *secret) if lasts else None,
            with_secrets=with_secrets,
            is_session=self.uri.partition("?")[0].endswith("/session"),
        )

    def agent(self) -> Agent | None:
        if not domain_xml.has_agent(self._xml()):
            return None
        return LibvirtAgent(self._virsh, self.uuid, self.name)

    def check_idle(self, disks: Sequence[GuestDisk]) -> None:
        """Raises Busy where something is at work in one of these disks, or in the whole domain."""
        nodes = {disk.chain[-1].node for disk in disks if disk.chain}
        for activity in self.activities():
            if activity.node is None or activity.node in nodes:
                raise Busy(activity.says, subject=self.name, hint="wait until that is done, then run it again")

    # --- snapshots

    def prepared(self, overlays: Sequence[NewOverlay]) -> AbstractContextManager[Switch]:
        return libvirt_snapshot.prepared(self, overlays)

    def session(self) -> VirshSession:
        """A virsh that is connected already."""
        return VirshSession(self._virsh)

    def release(self, unused: Sequence[Path]) -> None:
        """Nothing was opened in QEMU: libvirt opens and switches in one command."""

    # --- live merges

    def start(
        self, kind: JobKind, disk: str, *, lowest: Path, uppermost: Path, backing: str | None, job_id: str, speed: int
    ) -> Job:
        return libvirt_jobs.start(
            self, kind, disk, lowest=lowest, uppermost=uppermost, backing=backing, job_id=job_id, speed=speed
        )

    def job(self, job_id: str, kind: JobKind, disk: str) -> Job:
        record = next((each for each in libvirt_jobs.records(self) if each.id == job_id), None)
        return libvirt_jobs.LibvirtJob(self, job_id, kind, disk, record)


_COUNTERS = ("rd.reqs", "wr.reqs", "fl.reqs", "rd.times", "wr.times", "fl.times")
"""In the order of DiskStatistics."""


def state_of(said: str) -> State:
    """What `domstate --reason` says. Such as `running (booted)`."""
    word = said.strip().partition(" (")[0]
    if _MIGRATING.search(said):
        return State.INCOMING if word != "shut off" else State.OFF
    if word in _OFF or (word == "crashed" and "panicked" not in said):
        return State.OFF
    return State.PAUSED if word in {"paused", "pmsuspended", "crashed"} else State.RUNNING


def _found(virsh: Virsh, wanted: str) -> tuple[str, str]:
    """(UUID, name) of a domain, by either. By our own comparison: virsh takes a name of digits for an id."""
    rows = [line.split(" ", 1) for line in virsh.names("list", "--all", "--uuid", "--name") if " " in line]
    by_uuid = {uuid: name.strip() for uuid, name in rows}
    for uuid, name in by_uuid.items():
        if name == wanted:
            return uuid, name
    if wanted.lower() in by_uuid:
        return wanted.lower(), by_uuid[wanted.lower()]
    raise NotFound("libvirt has no such domain", subject=wanted, hint="`snapchain guests` lists them")


def _pairs(text: str, mark: str = ":") -> Iterator[tuple[str, str]]:
    for line in text.splitlines():
        key, found, value = line.partition(mark)
        if found:
            yield key.strip(), value.strip()
