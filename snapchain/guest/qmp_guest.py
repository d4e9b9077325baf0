"""A bare QEMU as a Guest: changed through its own monitor, never one that libvirt manages."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any, Literal

from snapchain.errors import Busy, Conflict, InvalidInput, NotFound
from snapchain.guest.address import GuestAddress
from snapchain.guest.protocol import (
    Activity,
    Agent,
    Definition,
    DiskStatistics,
    GuestDisk,
    JobKind,
    Layer,
    NewOverlay,
    State,
)
from snapchain.guest.qmp import Monitor, Refused, not_understood
from snapchain.guest.qmp_activities import at_work
from snapchain.guest.qmp_definition import definition, socket_of
from snapchain.guest.qmp_graph import QmpGraph, node_names, word
from snapchain.guest.qmp_jobs import QmpJob, begin
from snapchain.guest.qmp_snapshot import QmpOverlays, QmpSwitch
from snapchain.host.files import identity_of
from snapchain.host.terminal import shell_word
from snapchain.model.disk_name import is_disk_name
from snapchain.model.events import OnEvent, ignore

_LIBVIRT_NODE = re.compile(r"libvirt-\d+-(?:format|storage|filter)")
_AGENT_PORT = "org.qemu.guest_agent.0"
_WAITING = {"inmigrate", "postmigrate", "finish-migrate", "colo"}
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
        self._address = address
        self._path = address.qmp.absolute()
        self._monitor = monitor or Monitor(self._path)
        try:
            given = self._monitor.fields("query-name").get("name")
            self._check_not_libvirts(given if isinstance(given, str) else "")
            self.name = address.name or _guest_name(given, self._path)
        except BaseException:
            self._monitor.close()
            raise
        self._graph = QmpGraph(self._monitor, self.name)
        self.overlays = QmpOverlays(self._monitor, self._graph, self.name, on_event)

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
        if word(answer, "status") in _WAITING:
            return State.INCOMING
        return State.RUNNING if answer.get("running") is True else State.PAUSED

    def process(self) -> tuple[int, int] | None:
        """See `Guest`."""
        found = self._graph.process()
        return (found.pid, found.started) if found.pid is not None and found.started is not None else None

    def disks(self) -> Sequence[GuestDisk]:
        """See `Guest`. Beside a stream job, the bitmaps of the layers below the active one are not known."""
        devices = self._graph.devices()
        elsewhere = (
            GuestDisk(path.rpartition("/")[2], "", (), (), read_only=False, left_out=kind.partition("-pci")[0])
            for path, kind in devices.items()
            if kind.startswith(_ELSEWHERE)
        )
        return (*(view.disk for view in self._graph.views(devices)), *elsewhere)

    def _check_not_libvirts(self, name: str) -> None:
        """Raises InvalidInput. A change behind libvirt's back makes its next start lose what was written since."""
        labels = {word(each, "label") for each in self._monitor.rows("query-chardev")}
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
        return at_work(self._monitor, self._graph.views())

    def statistics(self, disk: str) -> DiskStatistics:
        """See `Guest`. Raises NotFound for a disk that it has not."""
        if disk not in self._graph.keys:
            self._graph.named(disk)
        for each in self._monitor.rows("query-blockstats"):
            if (word(each, "qdev"), word(each, "device")) == self._graph.keys[disk]:
                return _statistics(each.get("stats"), self._path)
        raise NotFound("the disk is gone", subject=self._label(disk))

    def definition(self, *, with_secrets: bool) -> Definition:
        """See `Guest`."""
        return definition(
            self._monitor, self.name, self._graph.process(), self._graph.devices(), with_secrets=with_secrets
        )

    def agent(self) -> Agent | None:
        """See `Guest`."""
        path = self._address.agent or self._agent_socket()
        if path is None:
            return None
        from snapchain.guest.agent import open_agent

        agent: Agent = open_agent({"kind": "socket", "path": str(path)})
        return agent

    def _agent_socket(self) -> Path | None:
        for path, kind in self._graph.devices().items():
            if kind != "virtserialport" or self._property(path, "name") != _AGENT_PORT:
                continue
            chardev = self._property(path, "chardev")
            if isinstance(chardev, str):
                return socket_of(self._monitor, self._graph.process(), chardev)
        return None

    def _property(self, path: str, name: str) -> object:
        with suppress(Refused):
            return self._monitor.execute("qom-get", {"path": path, "property": name})
        return None

    # --- Snapshots.

    def prepared(self, overlays: Sequence[NewOverlay]) -> AbstractContextManager[QmpSwitch]:
        """See `QmpOverlays.prepared`. Raises Busy for a guest that is not here."""
        self._check_not_elsewhere()
        return self.overlays.prepared(overlays)

    def release(self, unused: Sequence[Path]) -> None:
        """See `QmpOverlays.release`."""
        self.overlays.release(unused)

    def _check_not_elsewhere(self) -> None:
        if self.state() is State.INCOMING:
            raise Busy(
                "the guest waits for a migration or was migrated away: its images are not its own",
                subject=self.name,
                hint="run the command where the guest runs",
            )

    def _label(self, disk: str) -> str:
        return f"{self.name}/{disk}"

    # --- Live merges.

    def start(
        self, kind: JobKind, disk: str, *, lowest: Path, uppermost: Path, backing: str | None, job_id: str, speed: int
    ) -> QmpJob:
        """See `Guest`. Raises Conflict when the chain has no such layers, Refused."""
        self._check_not_elsewhere()
        process = self._graph.process()
        view = self._graph.named(disk, process=process)
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
            return node_names(self._graph.named(disk).disk)

        return QmpJob(
            self._monitor, job_id, kind, nodes=nodes, all_nodes=all_nodes, after_dismiss=self.overlays.close_orphans
        )


def _place(chain: Sequence[Layer], path: Path, label: str) -> int:
    identity = identity_of(path)
    for number, layer in enumerate(chain):
        if identity is not None and layer.identity == identity:
            return number
    raise Conflict(
        "the file is no layer of the disk any more", subject=path, hint=f"`snapchain guests` shows the chain of {label}"
    )


def _statistics(stats: object, path: Path) -> DiskStatistics:
    names = (
        "rd_operations", "wr_operations", "flush_operations",
        "rd_total_time_ns", "wr_total_time_ns", "flush_total_time_ns",
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
