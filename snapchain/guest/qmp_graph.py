"""The block graph of a bare QEMU as its monitor shows it: asked for at each call, never remembered."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from snapchain.errors import Busy
from snapchain.guest import graph
from snapchain.guest.disks import no_such_disk
from snapchain.guest.graph import DiskView
from snapchain.guest.protocol import GuestDisk
from snapchain.guest.qemu_files import Located, QemuFiles, with_thread
from snapchain.guest.qmp import Monitor, Refused, not_understood
from snapchain.host.terminal import printable

_TRIES = 5


class QmpGraph:
    """The graph of one QEMU. guest: its name, for errors

    keys: of each disk that was seen, the names of its device in `query-blockstats`
    """

    def __init__(self, monitor: Monitor, guest: str) -> None:
        self._monitor, self._guest = monitor, guest
        self.keys: dict[str, tuple[str, str]] = {}

    def process(self) -> QemuFiles:
        """The process of QEMU, and what it has open. Checked against the number of a thread that QEMU itself gives."""
        peer = self._monitor.peer
        cpus = self._monitor.rows("query-cpus-fast")
        threads = [thread for each in cpus if isinstance(thread := each.get("thread-id"), int)]
        return QemuFiles(with_thread(threads[0], peer=peer) if threads else peer)

    def views(self, devices: Mapping[str, str] | None = None, process: QemuFiles | None = None) -> list[DiskView]:
        """Its disks. devices, process: where they are known already. Raises Busy for a graph that keeps changing."""
        process = process or self.process()
        devices = self.devices() if devices is None else devices
        known: dict[str, Located] = {}

        def locate(name: str) -> Located:
            if name not in known:
                known[name] = process.locate(name)
            return known[name]

        for _ in range(_TRIES):
            block, stats = self._monitor.rows("query-block"), self._monitor.rows("query-blockstats")
            try:
                views = list(graph.disks(block, stats, self.nodes(), locate=locate, types=devices))
            except graph.Inconsistent:
                continue
            except graph.Misread as error:
                raise not_understood("query-block", str(error), subject=self._monitor.path) from error
            self.keys = {view.disk.name: (view.qdev, view.device) for view in views}
            return views
        raise Busy("the block graph of the guest keeps changing", subject=self._guest, hint="run the command again")

    def nodes(self) -> list[Mapping[str, Any]] | None:
        """All nodes; None beside a stream job: a QEMU 7.2 might not survive it."""
        try:
            return self._monitor.rows("query-named-block-nodes", {"flat": True})
        except Busy:
            return None
        except Refused as refused:
            if "'flat' is unexpected" not in refused.words:
                raise
            return self._monitor.rows("query-named-block-nodes")  # QEMU before 5.0

    def devices(self) -> dict[str, str]:
        """QOM path -> type, of the devices of the command line and those plugged in later."""
        found = {}
        for folder in ("/machine/peripheral", "/machine/peripheral-anon"):
            for each in self._monitor.rows("qom-list", {"path": folder}):
                kind = re.fullmatch(r"child<(.*)>", str(each.get("type")))
                if kind is not None:
                    found[f"{folder}/{each.get('name')}"] = kind[1]
        return found

    def named(self, disk: str, *, process: QemuFiles | None = None) -> DiskView:
        """One disk. Raises NotFound."""
        return named(self.views(process=process), disk, self._guest)

    def nodes_in_use(self) -> set[str]:
        """The names of all nodes of its disks' chains."""
        return {name for view in self.views() for name in (*view.disk.filters, *node_names(view.disk))}


def named(views: Sequence[DiskView], disk: str, guest: str) -> DiskView:
    """The disk of this name. Raises NotFound."""
    for view in views:
        if view.disk.name == disk:
            return view
    raise no_such_disk(guest, disk, (view.disk.name for view in views))


def node_names(disk: GuestDisk) -> list[str]:
    """Of its chain, root first."""
    return [layer.node for layer in disk.chain]


def word(row: Mapping[str, Any], name: str) -> str:
    """A field as text for messages and comparisons; "" where it is missing."""
    value = row.get(name)
    return printable(str(value))[:200] if value is not None else ""
