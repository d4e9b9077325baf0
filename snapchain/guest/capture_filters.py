"""The filters of a capture above the disks of a guest, all switched on at one instant, and their exports.

    device -> root                                        before
    device -> pass-through -> root                        qom-set, disk by disk; changes nothing
    device -> pass-through -> copy-before-write -> root   blockdev-reopen of all pass-throughs at once: the instant
                                   |
                                   +-> scratch            old data, before the guest overwrites them
              snapshot-access -> copy-before-write        what is exported

`transaction` cannot insert filters, and the backup job that it can start lets the guest's write fail where its scratch
file is full (QEMU 7.2).  `blockdev-reopen` takes all disks in one call and holds their I/O while it works, so the
instant is one.  The filter has `on-cbw-error=break-snapshot` and a timeout: the guest's write goes on in any case.

QEMU 7.2 (hbitmap_status) takes a piece of the saved data for unsaved when a request goes on behind its end: it reads
what the guest has written since.  So no read crosses a boundary of the filter's clusters (`CLUSTER`), and of the map
nothing is believed where the guest has written since the instant.  The scratch file has no backing file, as that of a
backup job has: with a node that has two ways to the root, `blockdev-reopen` ends QEMU 7.2 by an assertion.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from snapchain.errors import Busy, InvalidInput, SnapchainError, Unavailable, Unsupported
from snapchain.guest.capture import BitmapSet, CaptureRequest, Freeze, Reached, dirty
from snapchain.guest.capture_bitmaps import add_new, copied_new, drop_unnamed
from snapchain.guest.capture_record import CaptureInFlight, DiskInFlight, Monitor
from snapchain.guest.nbd_client import NbdExport
from snapchain.guest.protocol import GuestDisk
from snapchain.host.directory import Directory
from snapchain.host.files import free_bytes
from snapchain.host.os_errors import os_errors
from snapchain.host.processes import run
from snapchain.model.extents import Extents

_DIRECTORY = ".snapchain-capture-"
_LONGEST_SOCKET = 107
_METADATA = 16 << 20
"""Bytes that a scratch file may have beyond the size of its disk and a hundredth of it."""


def check_supported(monitor: Monitor, *, guest: str) -> None:
    """Raises Unsupported for a QEMU without the filter (before 7.2), and for a guest with I/O threads."""
    schema = monitor.execute("query-qmp-schema")
    named = {each["name"] for each in schema if each["meta-type"] == "command"}
    filters = any(
        {"on-cbw-error", "cbw-timeout"} <= {member["name"] for member in each.get("members", ())}
        for each in schema
        if each["meta-type"] == "object"
    )
    access = any("snapshot-access" in each.get("values", ()) for each in schema if each["meta-type"] == "enum")
    if not (filters and access and {"blockdev-reopen", "block-export-add"} <= named):
        raise Unsupported(
            "the guest's QEMU lacks the filter that a capture without overlays needs",
            subject=guest,
            hint="use QEMU 7.2 or newer, or ship it without --bitmap",
        )
    # QEMU 7.2 crashes when a filter is opened above a node that an I/O thread has.
    if monitor.execute("query-iothreads"):
        raise Unsupported(
            "the guest has I/O threads, and QEMU 7.2 crashes when a filter is added to a disk of one",
            subject=guest,
            hint="ship it without --bitmap: a snapshot with overlays needs no filter",
        )


def check_server(monitor: Monitor, *, guest: str) -> None:
    """Raises Busy where exports of somebody else use the guest's NBD server, which is one for all."""
    others = [each for each in monitor.execute("query-block-exports") if each["type"] == "nbd"]
    if others:
        names = ", ".join(f"{each['id']} of node {each['node-name']}" for each in others[:3])
        raise Busy(
            f"the NBD server in the guest's QEMU is in use for the export {names}",
            subject=guest,
            hint="wait until that backup has ended, or remove the export",
        )


def planned(monitor: Monitor, disks: Sequence[GuestDisk], request: CaptureRequest, *, guest: str) -> CaptureInFlight:
    """Names for all of it, and an empty private directory. Raises Unsupported where QEMU could not use that."""
    devices = {
        each["inserted"]["node-name"]: each.get("qdev") for each in monitor.execute("query-block") if "inserted" in each
    }
    found = []
    for disk in disks:
        device = devices.get(disk.root)
        if not device:
            raise Unsupported(
                f"disk {disk.name} belongs to no device that can be switched",
                subject=guest,
                hint="ship it without --bitmap",
            )
        qom = device if device.startswith("/") else f"/machine/peripheral/{device}"
        found.append(DiskInFlight(name=disk.name, device=qom, root=disk.root, active=disk.active.node))
    identity = secrets.token_hex(4)
    path = _place(disks, request) / f"{_DIRECTORY}{identity}"
    plan = CaptureInFlight(id=identity, directory=str(path), disks=tuple(found))
    if len(os.fsencode(plan.socket)) > _LONGEST_SOCKET:
        raise Unsupported(
            "the path of the directory is too long for a socket", subject=path.parent, hint="name another by --scratch"
        )
    return plan


def take_instant(
    monitor: Monitor, plan: CaptureInFlight, disks: Sequence[GuestDisk], request: CaptureRequest, freeze: Freeze
) -> tuple[datetime, Reached]:
    """Put everything in place, and take the instant."""
    _make_scratch(plan, disks, request)
    monitor.execute("object-add", {"qom-type": "throttle-group", "id": plan.group})
    for number, disk in enumerate(plan.disks):
        scratch = {
            "driver": "qcow2",
            "node-name": plan.node("s", number),
            "discard": "unmap",
            # Of a fixed size: a scratch file must never take the space that the guest's images grow into.
            "file": {
                "driver": "raw",
                "size": (Path(plan.directory) / f"{number}.qcow2").stat().st_size,
                "file": {"driver": "file", "filename": str(Path(plan.directory) / f"{number}.qcow2")},
            },
        }
        monitor.execute("blockdev-add", scratch)
        monitor.execute("blockdev-add", _pass_through(plan, number, disk.root))
        drive = {"path": disk.device, "property": "drive", "value": plan.node("p", number)}
        monitor.execute("qom-set", drive)
        before_write = {
            "driver": "copy-before-write",
            "node-name": plan.node("c", number),
            "file": disk.root,
            "target": plan.node("s", number),
            "on-cbw-error": "break-snapshot",
            "cbw-timeout": request.stall_seconds,
            "discard": "unmap",
        }
        monitor.execute("blockdev-add", before_write)
    # They record a little from before the instant, too: that is read once more next time, and loses nothing.
    add_new(monitor, plan, disks)
    with freeze() as reached:
        _switch(monitor, plan, range(len(plan.disks)), filtered=True)
        time = datetime.now(UTC)
    return time, reached


def export_views(monitor: Monitor, plan: CaptureInFlight, bitmaps: Sequence[BitmapSet]) -> None:
    """Export the view of each disk, with copies of bitmaps. Raises Busy where another program has the NBD server."""
    address = {"type": "unix", "data": {"path": str(plan.socket)}}
    try:
        monitor.execute("nbd-server-start", {"addr": address})
    except Unavailable:
        raise
    except SnapchainError as error:
        raise Busy(
            f"the NBD server in the guest's QEMU cannot be started: {error.message}",
            hint="another backup may use it: wait for its end",
        ) from error
    for number in range(len(plan.disks)):
        access = {"driver": "snapshot-access", "node-name": plan.node("a", number), "file": plan.node("c", number)}
        monitor.execute("blockdev-add", access)
        names = [context.removeprefix("qemu:dirty-bitmap:") for context in bitmaps[number].contexts.values()]
        _export(monitor, plan, number, plan.export(number), names)


def written_since(monitor: Monitor, plan: CaptureInFlight, number: int) -> Extents:
    """DATA where the guest may have written between the instant and now."""
    name = copied_new(monitor, plan, number)
    _export(monitor, plan, number, name, [name])
    with NbdExport(plan.socket, name, connections=1) as export:
        return dirty(export, f"qemu:dirty-bitmap:{name}")


def undo(monitor: Monitor, plan: CaptureInFlight) -> None:
    """Remove all that a capture has made in a guest, in whatever state it is. Idempotent.

    Raises Unavailable where the monitor is gone, and with QEMU's words what it refuses.
    """
    exports = {each["id"] for each in monitor.execute("query-block-exports")}
    for name in plan.exports:
        if name in exports:
            with suppress(SnapchainError):  # it may go by itself once its last client has gone
                monitor.execute("block-export-del", {"id": name, "mode": "hard"})
    # The server is ours where its socket is in our directory: nobody else may make a name there.
    if os.path.lexists(plan.socket) and not any(
        each["type"] == "nbd" and each["id"] not in plan.exports for each in monitor.execute("query-block-exports")
    ):
        with suppress(SnapchainError):  # it was never started, or is stopped already
            monitor.execute("nbd-server-stop")
    nodes = {each["node-name"] for each in monitor.execute("query-named-block-nodes", {"flat": True})}
    numbers = range(len(plan.disks))
    _delete(monitor, nodes, [plan.node("a", number) for number in numbers])
    switched = [number for number in numbers if plan.node("p", number) in nodes]
    # The filter lets nobody else write to the root: it goes before the device gets the root back.
    _switch(monitor, plan, switched, filtered=False)
    _delete(monitor, nodes, [plan.node("c", number) for number in numbers])
    roots = {each["inserted"]["node-name"] for each in monitor.execute("query-block") if each.get("inserted")}
    for number in switched:
        if plan.node("p", number) in roots:
            disk = plan.disks[number]
            monitor.execute("qom-set", {"path": disk.device, "property": "drive", "value": disk.root})
    _delete(monitor, nodes, [plan.node(role, number) for role in ("p", "s") for number in numbers])
    with suppress(SnapchainError):  # it is not there: a group is in use as long as a node of it exists
        monitor.execute("object-del", {"id": plan.group})
    drop_unnamed(monitor, plan, nodes)


def remove_files(plan: CaptureInFlight) -> None:
    """Remove the scratch files, the socket and their directory. Idempotent."""
    path = Path(plan.directory)
    if not path.name.startswith(_DIRECTORY):
        raise InvalidInput("it is no directory of a capture", subject=path)
    with suppress(FileNotFoundError), os_errors(path), Directory.open(path.parent) as parent:
        with suppress(FileNotFoundError), parent.open_directory(path.name) as directory:
            for name in directory.names():
                directory.remove(name)
        parent.remove_directory(path.name)


def _place(disks: Sequence[GuestDisk], request: CaptureRequest) -> Path:
    if request.scratch_dir is not None:
        return request.scratch_dir.absolute()
    for disk in disks:
        if disk.active.path is not None and not disk.active.is_block_device:
            return disk.active.path.parent
    return Path("/var/tmp")  # noqa: S108 - a private directory is made in it


def _make_scratch(plan: CaptureInFlight, disks: Sequence[GuestDisk], request: CaptureRequest) -> None:
    path = Path(plan.directory)
    with os_errors(path), Directory.open(path.parent) as parent:
        parent.make_directory(path.name, mode=0o700, whatever_the_umask=True)
        share = free_bytes(path.parent) // (2 * len(disks))
        with parent.open_directory(path.name) as directory:
            for number, disk in enumerate(disks):
                size = disk.active.virtual_size
                limit = request.scratch_bytes or min(share, size + size // 100 + _METADATA)
                fd = directory.create(f"{number}.qcow2")
                try:
                    image = path / f"{number}.qcow2"
                    run(["qemu-img", "create", "-q", "-f", "qcow2", f"file:{image}", str(size)])
                    os.ftruncate(fd, max(limit // 512 * 512, os.fstat(fd).st_size))
                finally:
                    os.close(fd)


def _switch(monitor: Monitor, plan: CaptureInFlight, numbers: Sequence[int], *, filtered: bool) -> None:
    """All pass-throughs at once, to the filter or back to the disk."""
    options = [
        _pass_through(plan, number, plan.node("c", number) if filtered else plan.disks[number].root)
        for number in numbers
    ]
    if options:
        monitor.execute("blockdev-reopen", {"options": options})


def _pass_through(plan: CaptureInFlight, number: int, below: str) -> dict[str, Any]:
    return {
        "driver": "throttle",
        "node-name": plan.node("p", number),
        "throttle-group": plan.group,
        "file": below,
        "discard": "unmap",
    }


def _export(monitor: Monitor, plan: CaptureInFlight, number: int, name: str, bitmaps: Sequence[str]) -> None:
    export = {
        "type": "nbd",
        "id": name,
        "node-name": plan.node("a", number),
        "name": name,
        "writable": False,
        "bitmaps": [{"node": plan.disks[number].active, "name": bitmap} for bitmap in bitmaps],
    }
    monitor.execute("block-export-add", export)


def _delete(monitor: Monitor, nodes: set[str], names: Sequence[str]) -> None:
    for name in names:
        if name in nodes:
            monitor.execute("blockdev-del", {"node-name": name})
