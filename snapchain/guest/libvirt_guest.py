"""A libvirt domain as a `Guest`. Everything goes through virsh (host/virsh.py); QEMU's monitor is never asked.

The live XML says what QEMU has open: libvirt writes the whole chain there, with the number of each node.  So no
`qemu-monitor-command` is needed, which would mark the domain as tainted.  A change is asked of libvirt, and judged by
the XML afterwards: docs/decisions/0116.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal
from xml.etree import ElementTree as ET

from snapchain.errors import Busy, Conflict, NotFound, SnapchainError, ToolFailed, Unavailable, Unsupported
from snapchain.guest import domain_xml, libvirt_jobs
from snapchain.guest.address import GuestAddress
from snapchain.guest.domain_xml import XmlDisk, XmlLayer
from snapchain.guest.libvirt_agent import LibvirtAgent
from snapchain.guest.libvirt_definition import definition_of
from snapchain.guest.protocol import (
    Activity,
    Agent,
    Definition,
    DiskStatistics,
    GuestDisk,
    Job,
    JobKind,
    Layer,
    NewOverlay,
    Outcome,
    State,
    Switch,
)
from snapchain.host import libvirt
from snapchain.host.os_errors import os_errors
from snapchain.host.qemu_processes import open_images, qemu_processes
from snapchain.host.terminal import shell_word
from snapchain.host.virsh import Virsh, is_not_running, parsed
from snapchain.host.virsh_session import VirshSession
from snapchain.image import scan
from snapchain.image.backing import Place
from snapchain.image.opening import open_image
from snapchain.image.pread import file_bytes
from snapchain.image.qcow2.header import read_header
from snapchain.model.events import OnEvent, ignore

_OFF = {"shut off", "no state"}
_MIGRATING = re.compile(r"\((?:migrating|post-copy|post-copy failed)\)")
"""Not `running (migrated)`: so libvirt calls a domain that has come here, until it is paused or ends."""
_SAVED = "(saved)"
_NOT_IN_CHAIN = "is not in this backing file chain"
"""QEMU's words for a layer that has left the chain."""
_KINDS = {
    "Block Commit": "commit",
    "Active Block Commit": "active-commit",
    "Block Pull": "stream",
    "Block Copy": "mirror",
    "Backup": "backup",
}
"""virsh's word for a type of block job -> ours."""
_SECONDS_TO_CHANGE = 120.0
"""Deadline of a command that changes the graph. libvirt itself waits 30 seconds for its lock on the domain."""


@dataclass(frozen=True, slots=True)
class BlockJob:
    """A block job as libvirt lists it. done, total: bytes"""

    kind: str
    done: int
    total: int


class LibvirtGuest:
    """Implements `protocol.Guest`."""

    kind: Literal["libvirt"] = "libvirt"
    streams = False

    def __init__(self, address: GuestAddress, *, on_event: OnEvent = ignore) -> None:
        """Find the domain. Raises NotFound, Unavailable where libvirt does not answer, Unsupported for another host."""
        assert address.domain is not None
        self.address = address
        self._virsh = Virsh(address.connect)
        self._on_event = on_event
        self.uuid, self.name = _found(self._virsh, address.domain)

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
        disks = [self._disk(each, lasting, opened, is_off=state is State.OFF) for each in shown]
        disks = _with_common_files(disks)
        if _SAVED in said:
            why = "The memory of the guest is saved on disk, and must find the disk unchanged. Start the guest first."
            disks = [_hindered(each, why) for each in disks]
        return disks

    def disk(self, name: str) -> GuestDisk | None:
        """One disk as it is now; None where there is none of this name."""
        return next((each for each in self.disks() if each.name == name), None)

    def _xml(self, *words: str) -> ET.Element:
        return self._virsh.xml("dumpxml", "--domain", self.uuid, *words, subject=self.name)

    def _disk(
        self, shown: XmlDisk, lasting: list[XmlDisk], opened: dict[tuple[int, int], bool] | None, *, is_off: bool
    ) -> GuestDisk:
        left_out = domain_xml.left_out(shown)
        why = None if left_out else domain_xml.obstacle(shown)
        layers, fault = self._layers(shown, is_off=is_off)
        if not left_out and why is None:
            why = (None if is_off else _not_as_opened(layers, opened)) or fault
        if not left_out and why is None and layers and lasting:
            mine = {layer.identity for layer in layers}
            same = any(_identity(self._path(disk.layers[0])) in mine for disk in lasting if disk.layers)
            why = domain_xml.persistent_obstacle(shown, lasting, is_same_file=same)
        node = layers[-1].node if layers else ""
        filters = tuple(f"throttle:{group}" for group in shown.filters)
        return GuestDisk(
            name=shown.target,
            root=filters[0] if filters else node,
            filters=filters,
            chain=layers,
            read_only=shown.read_only,
            obstacle=why,
            left_out=left_out,
        )

    def _layers(self, shown: XmlDisk, *, is_off: bool) -> tuple[tuple[Layer, ...], str | None]:
        """Root first, and what hinders, as a sentence."""
        fault: str | None = None
        layers: list[Layer] = []
        for each in reversed(shown.layers):
            layer, why = self._layer(each)
            layers.append(layer)
            fault = why or fault
        if layers and layers[-1].path is not None and not shown.is_whole and fault is None:
            if not is_off:
                return tuple(layers), "libvirt does not describe its chain to the end; start the guest again."
            return _scanned(layers[-1])
        return tuple(layers), fault

    def _layer(self, shown: XmlLayer) -> tuple[Layer, str | None]:
        path, image_format = self._path(shown), shown.image_format or "unknown"
        node = f"libvirt-{shown.index}-format" if shown.index else ""
        is_block = shown.kind == "block"
        if path is None:
            return Layer(node, None, None, image_format, 0), None
        try:
            size, is_block = _size(path, image_format)
        except SnapchainError as error:
            return Layer(node, path, _identity(path), image_format, 0, (), is_block), f"{path}: {error.message}."
        return Layer(node, path, _identity(path), image_format, size, (), is_block), None

    def _path(self, layer: XmlLayer) -> Path | None:
        if layer.volume is None:
            return layer.path
        pool, volume = layer.volume
        said = self._virsh.text("vol-path", "--pool", pool, "--vol", volume, subject=self.name).strip("\n")
        return Path(said) if said else None

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
        return {record.lowest, record.uppermost} <= {self._path(layer) for layer in shown.layers}

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
        return {disk: _block_job(said) for disk, said in zip(disks, found, strict=True)}

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

    # --- snapshots

    @contextmanager
    def prepared(self, overlays: Sequence[NewOverlay]) -> Iterator[Switch]:
        disks = {disk.name: disk for disk in self.disks()}
        for overlay in overlays:
            _check_overlay(self.name, disks.get(overlay.disk), overlay)
        for activity in self.activities():
            busy = {disk.chain[-1].node for disk in disks.values() if disk.chain and disk.name in _names(overlays)}
            if activity.node is None or activity.node in busy:
                raise Busy(activity.says, subject=self.name, hint="wait until that is done, then run it again")
        # What is no disk of the request is named too: libvirt would snapshot it otherwise.
        others = [name for name in disks if name not in _names(overlays)]
        with VirshSession(self._virsh) as session:
            session.ready()  # the guest will be frozen while it works
            yield _LibvirtSwitch(self, session, tuple(overlays), others)
        # After the block, since the guest may be frozen in it.
        self._check_next_start(overlays)

    def _check_next_start(self, overlays: Sequence[NewOverlay]) -> None:
        """Raises Conflict where the next start of the domain would write to a layer that is sealed by now."""
        lasting = {disk.target: disk for disk in domain_xml.disks_of(self._xml("--inactive"))}
        for disk in self.disks():
            new = next((each for each in overlays if each.disk == disk.name), None)
            shown = lasting.get(disk.name)
            if new is None or shown is None or not shown.layers or not _is_active(disk, new.path):
                continue
            starts_with = _identity(self._path(shown.layers[0]))
            if starts_with != disk.active.identity and starts_with in {layer.identity for layer in disk.chain}:
                raise Conflict(
                    f"the definition for the guest's next start does not name {new.path}",
                    subject=f"{self.name}/{disk.name}",
                    hint="correct it by `virsh edit` before the guest is started again, or what it writes is lost",
                )

    def release(self, unused: Sequence[Path]) -> None:
        """Nothing was opened in QEMU: libvirt opens and switches in one command."""

    # --- live merges

    def start(
        self, kind: JobKind, disk: str, *, lowest: Path, uppermost: Path, backing: str | None, job_id: str, speed: int
    ) -> Job:
        found = self.disk(disk)
        if found is None:
            raise NotFound("the guest has no disk of this name", subject=f"{self.name}/{disk}")
        for activity in self.activities():
            if activity.node in (None, found.chain[-1].node):
                raise Busy(activity.says, subject=self.name, hint="wait until that is done, then run it again")
        inputs = _inputs(f"{self.name}/{disk}", found, lowest, uppermost)
        if kind is JobKind.COMMIT:
            self._check_visible()
        words = _job_words(kind, disk, found, inputs)
        if speed:
            words += ["--bandwidth", str(speed), "--bytes"]
        record = libvirt_jobs.note(self, job_id, kind, disk, inputs)
        job = libvirt_jobs.LibvirtJob(self, job_id, kind, disk, record)
        try:
            self._begin(words, keep_relative=backing is not None and not backing.startswith("/"))
        except Unavailable:
            raise  # it may have begun: its record stays
        except SnapchainError:
            job.dismiss()
            raise
        return job

    def _check_visible(self) -> None:
        """Raises Unsupported where nobody could tell afterwards whether QEMU has written out the result."""
        process = self.process()
        if process is None or open_images(process[0]) is None:
            raise Unsupported(
                "this user may not see which files the guest's QEMU has open, and a live merge relies on that",
                subject=self.name,
                hint="run it as root",
            )

    def _begin(self, words: list[str], *, keep_relative: bool) -> None:
        try:
            self._order(words, keep_relative=keep_relative)
        except ToolFailed as error:
            if _NOT_IN_CHAIN not in error.message:
                raise
            raise Conflict(
                "libvirt lists layers that QEMU has merged already: libvirtd died at the end of that merge",
                subject=self.name,
                hint="shut the guest down and start it again, so that libvirt reads its chains anew; then run it again",
            ) from error

    def _order(self, words: list[str], *, keep_relative: bool) -> None:
        verb, *more = words
        if keep_relative and "--active" not in words:
            try:
                self.command(verb, *more, "--keep-relative", timeout=_SECONDS_TO_CHANGE)
            except ToolFailed as error:
                # libvirt keeps relative names only where all of them are.
                if "relative" not in error.message:
                    raise
            else:
                return
        self.command(verb, *more, timeout=_SECONDS_TO_CHANGE)

    def check_not_defined(self, merged: Sequence[Path]) -> None:
        """Raises Unavailable where the definition for the next start names one of these files."""
        lasting = domain_xml.disks_of(self._xml("--inactive"))
        named = {self._path(layer) for disk in lasting for layer in disk.layers} & set(merged)
        if named:
            raise Unavailable(
                "the definition for the guest's next start still names merged files, which stay: "
                f"{', '.join(sorted(map(str, named)))}",
                subject=self.name,
                hint="correct it by `virsh edit`, then run it again",
            )

    def job(self, job_id: str, kind: JobKind, disk: str) -> Job:
        record = next((each for each in libvirt_jobs.records(self) if each.id == job_id), None)
        return libvirt_jobs.LibvirtJob(self, job_id, kind, disk, record)


_COUNTERS = (
    "rd.reqs", "wr.reqs", "fl.reqs", "rd.bytes", "wr.bytes", "rd.times", "wr.times", "fl.times",
)  # fmt: skip
"""In the order of DiskStatistics."""


class _LibvirtSwitch:
    """Implements `protocol.Switch`."""

    def __init__(
        self, guest: LibvirtGuest, session: VirshSession, overlays: tuple[NewOverlay, ...], others: list[str]
    ) -> None:
        self._guest, self._session, self._overlays, self._others = guest, session, overlays, others

    def run(self) -> None:
        libvirt.forget()
        disks = [_disk_spec(each.disk, each.path) for each in self._overlays]
        disks += [_disk_spec(name, None) for name in self._others]
        self._session.text(
            "snapshot-create-as", "--domain", self._guest.uuid, "--disk-only", "--atomic", "--no-metadata",
            "--reuse-external", *disks, timeout=_SECONDS_TO_CHANGE, subject=self._guest.name,
        )  # fmt: skip

    def outcome(self) -> Outcome:
        """By the definition that runs, and by the one of the next start.

        Raises Conflict where libvirt and QEMU do not have the same files open, or only some disks were switched: then
        no file may be removed.
        """
        name = self._guest.name
        is_off = self._guest.state() is State.OFF
        disks = {disk.name: disk for disk in self._guest.disks()}
        switched = {each.disk for each in self._overlays if _is_active(disks.get(each.disk), each.path)}
        if switched == _names(self._overlays):
            return Outcome.DONE
        if switched:
            raise Conflict(f"only {', '.join(sorted(switched))} has its new layer", subject=name, hint=_LOOK)
        process = None if is_off else self._guest.process()
        opened = (open_images(process[0]) if process is not None else None) or {}
        for each in self._overlays:
            if opened.get(_identity(each.path) or (-1, -1), False):
                raise Conflict(f"QEMU writes to {each.path}, and libvirt does not know it", subject=name, hint=_LOOK)
        return Outcome.NOT_DONE


_AGAIN = "another program changed the chain meanwhile: run it again"
_LOOK = (
    "keep all of its files, compare `virsh dumpxml` with its open files, and shut the guest down before its next use"
)


def state_of(said: str) -> State:
    """What `domstate --reason` says. Such as `running (booted)`."""
    word = said.strip().partition(" (")[0]
    if _MIGRATING.search(said):
        return State.INCOMING if word != "shut off" else State.OFF
    if word in _OFF or (word == "crashed" and "panicked" not in said):
        return State.OFF
    return State.PAUSED if word in {"paused", "pmsuspended", "crashed"} else State.RUNNING


def _disk_spec(disk: str, overlay: Path | None) -> str:
    """What a snapshot does to a disk, as an option of `snapshot-create-as`. overlay: None leaves the disk as it is."""
    if overlay is None:
        return f"--diskspec={disk},snapshot=no"
    return f"--diskspec={disk},snapshot=external,driver=qcow2,file={str(overlay).replace(',', ',,')}"


def _block_job(said: str) -> BlockJob | None:
    values = dict(line.strip().split("=", 1) for line in said.splitlines() if "=" in line)
    if "type" not in values:
        return None
    return BlockJob(_KINDS.get(values["type"], values["type"]), int(values["cur"]), int(values["end"]))


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


def _identity(path: Path | None) -> tuple[int, int] | None:
    if path is None:
        return None
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _size(path: Path, image_format: str) -> tuple[int, bool]:
    """(virtual size, whether it is a block device). Raises what opening an image and reading its header raise."""
    place = Place.of(path)
    fd = open_image(place.real, subject=place.path, named_by=place.named_by)
    try:
        with os_errors(path):
            is_block = path.is_block_device()
            size = file_bytes(fd) if image_format != "qcow2" else read_header(fd, subject=path).size
    finally:
        os.close(fd)
    return size, is_block


def _scanned(top: Layer) -> tuple[tuple[Layer, ...], str | None]:
    """The chain of an image at rest, by its headers."""
    assert top.path is not None
    try:
        with scan(top.path, format=top.image_format) as chain:
            return tuple(
                Layer("", file.path, file.device, file.format, file.size, (), file.real_path.is_block_device())
                for file in chain.files
            ), None
    except SnapchainError as error:
        return (top,), f"{error}."


def _not_as_opened(layers: Sequence[Layer], opened: dict[tuple[int, int], bool] | None) -> str | None:
    """What hinders where a path names another file than QEMU has open."""
    for layer in layers:
        if layer.path is not None and layer.identity is None:
            return f"{layer.path} was renamed or removed while the guest has it open."
        is_file = layer.identity is not None and not layer.is_block_device
        if opened is not None and is_file and layer.identity not in opened:
            return f"{layer.path} was replaced by another file while the guest had it open."
    return None


def _with_common_files(disks: Sequence[GuestDisk]) -> list[GuestDisk]:
    """With a word where the active layer of one disk is part of another's chain."""
    found = []
    for disk in disks:
        others = [
            other.name
            for other in disks
            if other is not disk and disk.chain and disk.active.identity is not None
            and disk.active.identity in {layer.identity for layer in other.chain}
        ]  # fmt: skip
        why = f"Its image is part of the disk {others[0]} too." if others else None
        found.append(_hindered(disk, why) if why else disk)
    return found


def _hindered(disk: GuestDisk, why: str) -> GuestDisk:
    return disk if disk.left_out or disk.obstacle else replace(disk, obstacle=why)


def _names(overlays: Sequence[NewOverlay]) -> set[str]:
    return {each.disk for each in overlays}


def _is_active(disk: GuestDisk | None, path: Path) -> bool:
    return disk is not None and bool(disk.chain) and disk.active.path == path


def _check_overlay(guest: str, disk: GuestDisk | None, overlay: NewOverlay) -> None:
    """Raises Conflict where an overlay was not made for the disk as it is now."""
    if disk is None or not disk.chain:
        raise Conflict("the guest has no disk of this name any more", subject=f"{guest}/{overlay.disk}", hint=_AGAIN)
    if disk.obstacle is not None:
        raise Unsupported(disk.obstacle, subject=f"{guest}/{overlay.disk}")
    if disk.active.identity != _identity(overlay.backing):
        raise Conflict(
            f"the active layer of the disk is {disk.active.path} now, not {overlay.backing}",
            subject=f"{guest}/{overlay.disk}",
            hint=_AGAIN,
        )
    size, _ = _size(overlay.path, "qcow2")
    if size != disk.active.virtual_size:
        raise Conflict(
            f"the overlay has {size} bytes, and the disk {disk.active.virtual_size}",
            subject=f"{guest}/{overlay.disk}",
            hint=_AGAIN,
        )


def _inputs(subject: str, disk: GuestDisk, lowest: Path, uppermost: Path) -> tuple[Layer, ...]:
    """The layers from `lowest` to `uppermost`. Raises Conflict where the chain is another one."""
    numbers = {layer.identity: number for number, layer in enumerate(disk.chain) if layer.identity is not None}
    first, last = numbers.get(_identity(lowest) or (-1, -1)), numbers.get(_identity(uppermost) or (-1, -1))
    if first is None or last is None or first >= last:
        raise Conflict(f"the chain of the disk does not have {lowest} below {uppermost}", subject=subject, hint=_AGAIN)
    if any(layer.path is None for layer in disk.chain[first : last + 1]):
        raise Unsupported("a layer of the chain is no local file", subject=subject, hint="leave the disk out")
    return disk.chain[first : last + 1]


def _job_words(kind: JobKind, disk: str, found: GuestDisk, inputs: tuple[Layer, ...]) -> list[str]:
    """The virsh command that begins a job. Layers are named by libvirt's number, which is exact.

    Raises Unsupported for a stream: nothing but the guest, or QEMU's monitor, can flush its result (decision 0116).
    """
    is_active = inputs[-1] is found.active
    if kind is JobKind.STREAM:
        raise Unsupported(
            "snapchain does not stream through libvirt", subject=disk, hint="merge by a commit: --strategy commit"
        )
    if is_active is not (kind is JobKind.ACTIVE_COMMIT):
        raise Conflict(f"the active layer of the disk is {found.active.path} now", subject=disk, hint=_AGAIN)
    words = ["blockcommit", "--path", disk, "--base", _index(disk, inputs[0])]
    return [*words, "--active"] if is_active else [*words, "--top", _index(disk, inputs[-1])]


def _index(disk: str, layer: Layer) -> str:
    """As libvirt names a layer: vda[3]."""
    found = re.fullmatch(r"libvirt-(\d+)-format", layer.node)
    return f"{disk}[{found[1]}]" if found else str(layer.path)
