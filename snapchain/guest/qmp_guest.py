"""A bare QEMU as a Guest: changed through its own monitor, never one that libvirt manages.

New overlays are opened in QEMU first (`blockdev-add` with no backing), which may take a while.  One transaction then
makes them the active layers of all disks, in about a millisecond.  Their nodes have names of ours, which carry the
process that opened them: what a snapchain that died left open is found, and closed.
"""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from snapchain.errors import Busy, Conflict, InvalidInput, NotFound, SnapchainError, Unavailable, Unsupported
from snapchain.guest import graph
from snapchain.guest.address import GuestAddress
from snapchain.guest.disks import no_such_disk
from snapchain.guest.graph import DiskView
from snapchain.guest.machine_view import devices_of
from snapchain.guest.protocol import (
    Activity,
    Agent,
    Definition,
    DiskStatistics,
    GuestDisk,
    JobKind,
    Layer,
    NewOverlay,
    Outcome,
    State,
)
from snapchain.guest.qemu_files import Located, QemuFiles, drive_options, with_thread
from snapchain.guest.qmp import Monitor, Refused, not_understood
from snapchain.guest.qmp_definition import definition, socket_of
from snapchain.guest.qmp_jobs import QmpJob, begin, in_the_way
from snapchain.host.process_identity import identity
from snapchain.host.terminal import printable, shell_word
from snapchain.image.backing import Place
from snapchain.image.file import ImageFile
from snapchain.image.opening import open_image
from snapchain.image.physical import RunBudget
from snapchain.model.disk_name import is_disk_name
from snapchain.model.events import Notice, OnEvent, ignore
from snapchain.model.extents import ABSENT

OURS = "sc-"
"""Ids of jobs and names of nodes that snapchain made begin so."""
_OVERLAY_NODE = re.compile(r"sc-([0-9a-f]{1,8})-[0-9a-f]{12}")
_LIBVIRT_NODE = re.compile(r"libvirt-\d+-(?:format|storage|filter)")
_AGENT_PORT = "org.qemu.guest_agent.0"
_TRIES = 5
_WAITING = {"inmigrate", "postmigrate", "finish-migrate", "colo"}
_MIGRATING = {
    "setup", "active", "pre-switchover", "device", "postcopy-active", "postcopy-paused", "postcopy-recover",
    "postcopy-recover-setup", "wait-unplug", "cancelling", "colo",
}  # fmt: skip
_ELSEWHERE = ("vhost-user-blk", "vhost-user-scsi", "vhost-scsi", "vhost-user-fs")
"""Devices whose data another process or the kernel serves: QEMU has no image of them."""


class QmpGuest:
    """See `Guest`."""

    kind: Literal["qmp"] = "qmp"
    streams = True

    def __init__(self, address: GuestAddress, *, on_event: OnEvent = ignore, monitor: Monitor | None = None) -> None:
        """Connect. Raises as `Monitor`; InvalidInput for a guest that libvirt manages."""
        if address.qmp is None:
            raise InvalidInput("no QMP socket is named", hint="give one: --qmp SOCKET")
        self.option = f"--qmp {shell_word(address.qmp)}"
        self._address, self._on_event = address, on_event
        self._path = address.qmp.absolute()
        self._opened: set[str] = set()
        self._keys: dict[str, tuple[str, str]] = {}
        self._monitor = monitor or Monitor(self._path)
        try:
            given = self._monitor.fields("query-name").get("name")
            self._check_not_libvirts(given if isinstance(given, str) else "")
            self.name = address.name or _guest_name(given, self._path)
        except BaseException:
            self._monitor.close()
            raise

    def close(self) -> None:
        """See `Guest`. Idempotent."""
        self._monitor.close()

    @property
    def address(self) -> GuestAddress:
        """See `Guest`."""
        return self._address

    @property
    def monitor(self) -> Monitor:
        """QEMU's own, for what no other kind of guest has."""
        return self._monitor

    # --- What it is.

    def state(self) -> State:
        """See `Guest`."""
        answer = self._monitor.fields("query-status")
        if _word(answer, "status") in _WAITING:
            return State.INCOMING
        return State.RUNNING if answer.get("running") is True else State.PAUSED

    def process(self) -> tuple[int, int] | None:
        """See `Guest`. Checked against the number of a thread that QEMU itself gives."""
        found = self._process()
        return (found.pid, found.started) if found.pid is not None and found.started is not None else None

    def _process(self) -> QemuFiles:
        peer = self._monitor.peer
        cpus = self._monitor.rows("query-cpus-fast")
        threads = [thread for each in cpus if isinstance(thread := each.get("thread-id"), int)]
        return QemuFiles(with_thread(threads[0], peer=peer) if threads else peer)

    def disks(self) -> Sequence[GuestDisk]:
        """See `Guest`. Beside a stream job, the bitmaps of the layers below the active one are not known."""
        devices = self._devices()
        elsewhere = (
            GuestDisk(path.rpartition("/")[2], "", (), (), read_only=False, left_out=kind.partition("-pci")[0])
            for path, kind in devices.items()
            if kind.startswith(_ELSEWHERE)
        )
        return (*(view.disk for view in self._views(devices)), *elsewhere)

    def _views(self, devices: Mapping[str, str] | None = None, process: QemuFiles | None = None) -> list[DiskView]:
        process = process or self._process()
        devices = self._devices() if devices is None else devices
        known: dict[str, Located] = {}

        def locate(name: str) -> Located:
            if name not in known:
                known[name] = process.locate(name)
            return known[name]

        for _ in range(_TRIES):
            block, stats = self._monitor.rows("query-block"), self._monitor.rows("query-blockstats")
            try:
                views = list(graph.disks(block, stats, self._nodes(), locate=locate, types=devices))
            except graph.Inconsistent:
                continue
            except graph.Misread as error:
                raise not_understood("query-block", str(error), subject=self._path) from error
            views = [graph.with_sharing(view) if self._is_shared(view) else view for view in views]
            self._keys = {view.disk.name: (view.qdev, view.device) for view in views}
            return views
        raise Busy("the block graph of the guest keeps changing", subject=self.name, hint="run the command again")

    def _is_shared(self, view: DiskView) -> bool:
        """Whether its device lets other processes write to the image."""
        is_disk = view.disk.left_out is None and view.disk.obstacle is None
        return is_disk and self._property(graph.device_path(view.qdev), "share-rw") is True

    def _nodes(self) -> list[Mapping[str, Any]] | None:
        """All nodes; None beside a stream job: a QEMU 7.2 might not survive it."""
        try:
            return self._monitor.rows("query-named-block-nodes", {"flat": True})
        except Busy:
            return None
        except Refused as refused:
            if "'flat' is unexpected" not in refused.words:
                raise
            return self._monitor.rows("query-named-block-nodes")  # QEMU before 5.0

    def _devices(self) -> dict[str, str]:
        return devices_of(self._monitor)

    def _check_not_libvirts(self, name: str) -> None:
        """Raises InvalidInput. A change behind libvirt's back makes its next start lose what was written since."""
        labels = {_word(each, "label") for each in self._monitor.rows("query-chardev")}
        nodes = [
            str(inserted.get("node-name"))
            for each in self._monitor.rows("query-block")
            if isinstance(inserted := each.get("inserted"), Mapping)
        ]
        if "charmonitor" in labels or any(map(_LIBVIRT_NODE.fullmatch, nodes)):
            raise InvalidInput(
                "libvirt manages this guest; it would not notice a change through QEMU's monitor",
                subject=self._path,
                hint=f"name it instead: --domain {shell_word(name or 'NAME')}",
            )

    # --- What is at work in it.

    def activities(self) -> Sequence[Activity]:
        """See `Guest`."""
        return self._at_work(self._views())

    def _at_work(self, views: Sequence[DiskView]) -> list[Activity]:
        return [*self._jobs(views), *self._exports(), *_fleecing(views), *self._migration()]

    def _jobs(self, views: Sequence[DiskView]) -> Iterator[Activity]:
        jobs = self._monitor.rows("query-jobs")
        linked = self._nodes_of_jobs(views) if jobs else {}
        for each in jobs:
            name, kind = _word(each, "id"), _word(each, "type")
            yield _activity(name, kind, linked.get(name), f"block job {name} ({kind}, {_word(each, 'status')})")

    def _nodes_of_jobs(self, views: Sequence[DiskView]) -> dict[str, str]:
        """Of each block job, a node that it works on, by QEMU's debugging view, where it has that one."""
        if not self._monitor.has("x-debug-query-block-graph"):
            return {}
        seen = self._monitor.fields("x-debug-query-block-graph")
        nodes, edges = seen.get("nodes"), seen.get("edges")
        if not isinstance(nodes, list) or not isinstance(edges, list):
            return {}
        named = {_word(each, "id"): each for each in nodes if isinstance(each, Mapping)}
        chains = {layer.node for view in views for layer in view.disk.chain}
        found: dict[str, str] = {}
        for edge in edges:
            job = named.get(_word(edge, "parent"), {}) if isinstance(edge, Mapping) else {}
            if job.get("type") == "block-job":
                node = _word(named.get(_word(edge, "child"), {}), "name")
                if node in chains:
                    found.setdefault(_word(job, "name"), node)
        return found

    def _exports(self) -> Iterator[Activity]:
        for each in self._monitor.rows("query-block-exports") if self._monitor.has("query-block-exports") else ():
            name, node = _word(each, "id"), _word(each, "node-name")
            yield _activity(name, "export", node, f"{_word(each, 'type')} export {name} of node {node}")

    def _migration(self) -> Iterator[Activity]:
        status = _word(self._monitor.fields("query-migrate"), "status")
        if status in _MIGRATING:
            yield Activity("migration", "migration", False, None, f"migration ({status})")

    def statistics(self, disk: str) -> DiskStatistics:
        """See `Guest`. Raises NotFound for a disk that it has not."""
        if disk not in self._keys:
            self._view_named(disk)
        for each in self._monitor.rows("query-blockstats"):
            if (_word(each, "qdev"), _word(each, "device")) == self._keys[disk]:
                return _statistics(each.get("stats"), self._path)
        raise NotFound("the disk is gone", subject=self._label(disk))

    def _view_named(self, disk: str) -> DiskView:
        return _named(self._views(), disk, self.name)

    def definition(self, *, with_secrets: bool) -> Definition:
        """See `Guest`."""
        return definition(self._monitor, self.name, self._process(), self._devices(), with_secrets=with_secrets)

    def agent(self) -> Agent | None:
        """See `Guest`."""
        path = self._address.agent or self._agent_socket()
        if path is None:
            return None
        from snapchain.guest.agent import open_agent

        agent: Agent = open_agent({"kind": "socket", "path": str(path)})
        return agent

    def _agent_socket(self) -> Path | None:
        for path, kind in self._devices().items():
            if kind != "virtserialport" or self._property(path, "name") != _AGENT_PORT:
                continue
            chardev = self._property(path, "chardev")
            if isinstance(chardev, str):
                return socket_of(self._monitor, self._process(), chardev)
        return None

    def _property(self, path: str, name: str) -> object:
        with suppress(Refused):
            return self._monitor.execute("qom-get", {"path": path, "property": name})
        return None

    # --- Snapshots.

    @contextmanager
    def prepared(self, overlays: Sequence[NewOverlay]) -> Iterator[QmpSwitch]:
        """See `Guest`. Raises Conflict for an overlay that is not empty, or not of the disk's exact size.

        Raises Busy, Unsupported for a disk with an obstacle, NotFound for one that is not there.
        """
        self._check_not_elsewhere()
        self.close_orphans()
        process = self._process()
        views = self._views(process=process)
        chosen = [_named(views, each.disk, self.name) for each in overlays]
        self._check_idle([view.disk for view in chosen], self._at_work(views))
        switch = QmpSwitch(self, self._monitor, self._on_event)
        try:
            for overlay, view in zip(overlays, chosen, strict=True):
                self._open(overlay, view, process, switch)
            yield switch
        finally:
            switch.close()
            self._opened.clear()

    def _check_not_elsewhere(self) -> None:
        if self.state() is State.INCOMING:
            raise Busy(
                "the guest waits for a migration or was migrated away: its images are not its own",
                subject=self.name,
                hint="run the command where the guest runs",
            )

    def _check_idle(self, disks: Sequence[GuestDisk], at_work: Sequence[Activity]) -> None:
        """Raises Busy for what others do in a disk, and Unsupported for its obstacles."""
        for disk in disks:
            if disk.left_out is not None or disk.obstacle is not None:
                why = disk.obstacle or f"it is not a disk to protect ({disk.left_out})"
                raise Unsupported(f"no snapshot of a running guest can be taken: {why}", subject=self._label(disk.name))
        for activity in at_work:
            if activity.is_ours or activity.kind == "export":  # whether an export is in the way, QEMU decides
                continue
            for disk in disks:
                if activity.node is None or activity.node in {layer.node for layer in disk.chain}:
                    raise Busy(activity.says, subject=self._label(disk.name), hint="wait until it has ended, or end it")

    def _label(self, disk: str) -> str:
        return f"{self.name}/{disk}"

    def _open(self, overlay: NewOverlay, view: DiskView, process: QemuFiles, switch: QmpSwitch) -> None:
        identity = _check_overlay(overlay, view.disk)
        options = drive_options(process.argv, {text for layer in view.disk.chain for text in _mentions(layer)})
        node = f"{OURS}{os.getpid():x}-{secrets.token_hex(6)}"
        switch.add(_Opened(node, view.disk.active.node, view.disk.name, overlay.path, identity))
        self._opened.add(node)
        description = overlay_node(node, overlay.path, view, options)
        try:
            self._monitor.execute("blockdev-add", description)
        except Refused as refused:
            if "aio" not in options:
                raise _not_opened(refused, overlay.path) from refused
            # This QEMU, or the filesystem of the new file, lacks what the old one has.
            description["file"].pop("aio")
            try:
                self._monitor.execute("blockdev-add", description)
            except Refused as again:
                raise _not_opened(again, overlay.path) from again
        opened = QemuFiles(process.pid).open_files
        if opened is not None and identity not in opened:
            raise Conflict(
                "QEMU opened another file under this path",
                subject=overlay.path,
                hint="QEMU sees other directories than snapchain does, as in a container: run snapchain there",
            )

    def close_orphans(self) -> None:
        """Close overlays that a snapchain which is no more opened in QEMU, and layers of ours that left their chains.

        QEMU refuses to close what something still uses.
        """
        nodes = self._nodes()
        named = [name for each in nodes or () if (name := _word(each, "node-name")).startswith(OURS)]
        if not named:
            return
        used = self.nodes_in_use()
        for name in named:
            made_by = _OVERLAY_NODE.fullmatch(name)
            if made_by is None or name in used or name in self._opened:
                continue
            pid = int(made_by[1], 16)
            if pid == os.getpid() or identity(pid) is None:
                self._close(name)

    def release(self, unused: Sequence[Path]) -> None:
        """See `Guest`. Also closes what any snapchain that is no more left open.

        A merged layer that QEMU opened under a name, such as the image of its command line, stays open until then.
        """
        self.close_orphans()
        files = {_identity(each) for each in unused} - {None}
        used = self.nodes_in_use()
        # A format node before the node of its file, which it uses.
        for node in sorted(self._nodes() or (), key=lambda each: each.get("drv") in {"file", "host_device"}):
            name, path = _word(node, "node-name"), graph.source_of(_word(node, "file")).path
            if name not in used and path is not None and _identity(Path(path)) in files:
                self._close(name)

    def _close(self, node: str) -> None:
        with suppress(Refused):  # something still uses it
            self._monitor.execute("blockdev-del", {"node-name": node})

    def nodes_in_use(self) -> set[str]:
        """The names of all nodes of its disks' chains."""
        return {name for view in self._views() for name in (*view.disk.filters, *_node_names(view.disk))}

    # --- Live merges.

    def start(
        self, kind: JobKind, disk: str, *, lowest: Path, uppermost: Path, backing: str | None, job_id: str, speed: int
    ) -> QmpJob:
        """See `Guest`. Raises Conflict when the chain has no such layers, Refused."""
        self._check_not_elsewhere()
        process = self._process()
        view = _named(self._views(process=process), disk, self.name)
        chain, label = view.disk.chain, self._label(disk)
        low, high = _place(chain, lowest, label), _place(chain, uppermost, label)
        for layer in chain[low : high + 1]:
            if (problem := process.locate(str(layer.path)).problem) is not None:
                raise Conflict(problem, subject=layer.path, hint="give QEMU's file its path back")
        if low >= high:
            raise InvalidInput("the lowest layer is not below the uppermost", subject=label)
        if (kind is JobKind.ACTIVE_COMMIT) != (high == len(chain) - 1) and kind is not JobKind.STREAM:
            raise InvalidInput("an active commit is one of the layer that the guest writes to", subject=label)
        common = {"job-id": job_id, "speed": speed}
        if kind is JobKind.STREAM:
            below = {"base-node": chain[low - 1].node} if low else {}
            arguments: dict[str, Any] = {**common, "device": chain[high].node, **below}
            begin(self._monitor, kind, "block-stream", arguments, backing=backing if low else None)
        else:
            # Without its top-node, an active commit would take the filters above the active layer away.
            arguments = {
                **common, "device": view.disk.root, "top-node": chain[high].node, "base-node": chain[low].node,
            }  # fmt: skip
            begin(
                self._monitor,
                kind,
                "block-commit",
                arguments,
                backing=None if kind is JobKind.ACTIVE_COMMIT else backing,
            )
        changed = chain[high] if kind is JobKind.STREAM else chain[low]
        above = [chain[high + 1].node] if kind is JobKind.COMMIT else []
        return self._job(job_id, kind, disk, [changed.node, *above])

    def job(self, job_id: str, kind: JobKind, disk: str) -> QmpJob:
        """See `Guest`."""
        return self._job(job_id, kind, disk, [])

    def _job(self, job_id: str, kind: JobKind, disk: str, nodes: Sequence[str]) -> QmpJob:
        def all_nodes() -> Sequence[str]:
            return _node_names(self._view_named(disk).disk)

        return QmpJob(self._monitor, job_id, kind, nodes=nodes, all_nodes=all_nodes, after_dismiss=self.close_orphans)


@dataclass(frozen=True, slots=True)
class _Opened:
    """An overlay that is open in QEMU as `node`, for the disk whose active layer was `under`."""

    node: str
    under: str
    disk: str
    path: Path
    identity: tuple[int, int]


class QmpSwitch:
    """See `Switch`."""

    def __init__(self, guest: QmpGuest, monitor: Monitor, on_event: OnEvent) -> None:
        self._guest, self._monitor, self._on_event = guest, monitor, on_event
        self._overlays: list[_Opened] = []

    def add(self, overlay: _Opened) -> None:
        """One more, before it is opened: its answer may be lost."""
        self._overlays.append(overlay)

    def run(self) -> None:
        """See `Switch`. The graph is looked at later: the guest's filesystems may be frozen now."""
        actions = [
            {"type": "blockdev-snapshot", "data": {"node": each.under, "overlay": each.node}} for each in self._overlays
        ]
        try:
            self._monitor.execute("transaction", {"actions": actions})
        except Refused as refused:
            raise in_the_way(refused) from refused

    def outcome(self) -> Outcome:
        """See `Switch`. DONE as soon as one overlay is part of a chain: a transaction does all or nothing."""
        in_use = {layer.identity for disk in self._guest.disks() for layer in disk.chain}
        return Outcome.DONE if any(each.identity in in_use for each in self._overlays) else Outcome.NOT_DONE

    def close(self) -> None:
        """Close what the guest does not use. What cannot be closed now, the next snapshot closes."""
        try:
            used = self._guest.nodes_in_use()
            for each in self._overlays:
                if each.node not in used:
                    with suppress(Refused):  # it was never opened
                        self._monitor.execute("blockdev-del", {"node-name": each.node})
        except SnapchainError as error:
            self._on_event(Notice.of(self._guest.name, f"new overlays may still be open in QEMU: {error}"))


def overlay_node(node: str, path: Path, view: DiskView, options: Mapping[str, str]) -> dict[str, Any]:
    """The arguments of `blockdev-add` for an overlay: cached, read and discarded as the active layer it will cover.

    options: aio and discard, from the command line
    """
    cache = {"direct": view.direct, "no-flush": view.no_flush}
    file = {"driver": "file", "filename": str(path), "cache": cache}
    if "aio" in options:
        file["aio"] = options["aio"]
    discard = options.get("discard", "unmap")
    zeroes = view.detect_zeroes if discard == "unmap" or view.detect_zeroes != "unmap" else "on"
    return {
        "driver": "qcow2",
        "node-name": node,
        "backing": None,
        "cache": cache,
        "discard": discard,
        "detect-zeroes": zeroes,
        "file": file,
    }


def _check_overlay(overlay: NewOverlay, disk: GuestDisk) -> tuple[int, int]:
    """The identity of an overlay that fits the disk. QEMU would take one that is smaller, or holds data. Raises."""
    active = disk.active
    try:
        str(overlay.path).encode()
    except UnicodeEncodeError as error:
        raise Unsupported(
            "QMP cannot name a path that is not UTF-8",
            subject=overlay.path,
            hint="rename the image while the guest is off",
        ) from error
    if _identity(overlay.backing) != active.identity or active.identity is None:
        raise Conflict(
            f"the active layer of {disk.name} is {active.path}, not {overlay.backing}",
            subject=overlay.path,
            hint="something changed the chain meanwhile: run the command again",
        )
    place = Place.of(overlay.path)
    fd = open_image(place.real, subject=overlay.path)
    with ImageFile(place, fd, format="qcow2", budget=RunBudget()) as file:
        backing = file.backing
        if file.size != active.virtual_size:
            raise Conflict(
                f"the overlay has {file.size} bytes, and the disk {active.virtual_size}", subject=overlay.path
            )
        if backing is None or ":" in backing.name.split("/", 1)[0]:
            raise Conflict("the overlay names no backing file", subject=overlay.path)
        if _identity(overlay.path.parent / backing.name) != active.identity or backing.format != active.image_format:
            raise Conflict(
                f"the overlay is based on {backing.name} ({backing.format}), not on {active.path}"
                f" ({active.image_format})",
                subject=overlay.path,
            )
        if (file.extents.val != ABSENT).any():
            raise Conflict("the overlay is not empty", subject=overlay.path)
        return file.device


def _not_opened(refused: Refused, path: Path) -> SnapchainError:
    hint = "give the new file the owner and mode of the old one" if "denied" in refused.words.lower() else None
    return Unavailable(f"QEMU cannot open the new overlay: {refused.words}", subject=path, hint=hint)


def _identity(path: Path) -> tuple[int, int] | None:
    with suppress(OSError):
        status = path.stat()
        return status.st_dev, status.st_ino
    return None


def _place(chain: Sequence[Layer], path: Path, label: str) -> int:
    identity = _identity(path)
    for number, layer in enumerate(chain):
        if identity is not None and layer.identity == identity:
            return number
    raise Conflict(
        "the file is no layer of the disk any more", subject=path, hint=f"`snapchain guests` shows the chain of {label}"
    )


def _named(views: Sequence[DiskView], disk: str, guest: str) -> DiskView:
    for view in views:
        if view.disk.name == disk:
            return view
    raise no_such_disk(guest, disk, (view.disk.name for view in views))


def _node_names(disk: GuestDisk) -> list[str]:
    return [layer.node for layer in disk.chain]


def _mentions(layer: Layer) -> Iterator[str]:
    yield layer.node
    if layer.path is not None:
        yield str(layer.path)


def _fleecing(views: Sequence[DiskView]) -> Iterator[Activity]:
    """Backups that are no jobs: a filter that copies what the guest is about to overwrite."""
    for view in views:
        for node, driver in zip(view.disk.filters, view.filter_drivers, strict=True):
            if driver == "copy-before-write":
                says = f"backup of {view.disk.name} (copy-before-write filter {node})"
                yield _activity(node, "backup", view.disk.chain[-1].node if view.disk.chain else None, says)


def _activity(name: str, kind: str, node: str | None, says: str) -> Activity:
    ours = name.startswith(OURS)
    return Activity(name, kind, ours, node, f"{says}, of {'snapchain' if ours else 'another program'}")


def _word(row: Mapping[str, Any], name: str) -> str:
    """A field as text for messages and comparisons; "" where it is missing."""
    value = row.get(name)
    return printable(str(value))[:200] if value is not None else ""


def _statistics(stats: object, path: Path) -> DiskStatistics:
    names = (
        "rd_operations", "wr_operations", "flush_operations", "rd_bytes", "wr_bytes", "rd_total_time_ns",
        "wr_total_time_ns", "flush_total_time_ns",
    )  # fmt: skip
    values = [stats.get(name) for name in names] if isinstance(stats, Mapping) else []
    numbers = [value for value in values if isinstance(value, int)]
    if len(numbers) != len(names):
        raise not_understood("query-blockstats", "counters are missing", subject=path)
    return DiskStatistics(*numbers)


def _guest_name(given: object, path: Path) -> str:
    """The name of `-name`; for a guest without one, that of its socket."""
    name = given if isinstance(given, str) and given else path.stem
    return name if is_disk_name(f"{name}/vda") else re.sub(r"[^A-Za-z0-9._-]", "-", name)[:100] or "guest"
