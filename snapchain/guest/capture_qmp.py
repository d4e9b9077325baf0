"""Capture the disks of a guest through QEMU's monitor: filters above the disks, all switched on at one instant.

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

Names in the guest: `sc-<p|c|a|s>-<id>-<number of the disk>`, throttle group `sc-t-<id>`, export `sc-e-<id>-<number>`;
bitmaps as guest/capture.py has them.  A journal record names all of it before it is made, so `undo` can remove what a
killed run has left: each step looks first at what is there.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field

from snapchain.errors import Busy, Conflict, InvalidInput, NotFound, SnapchainError, Unavailable, Unsupported
from snapchain.guest import journal
from snapchain.guest.capture import (
    CLUSTER,
    PREFIX,
    BitmapSet,
    CapturedDisk,
    CaptureRequest,
    Freeze,
    Reached,
    as_it_comes,
    bitmap_name,
    dirty,
    parsed_name,
)
from snapchain.guest.nbd_client import NbdExport
from snapchain.guest.protocol import Bitmap, GuestDisk, Layer
from snapchain.guest.qmp_guest import QmpGuest
from snapchain.host.directory import Directory
from snapchain.host.files import free_bytes
from snapchain.host.os_errors import os_errors
from snapchain.host.process_identity import own_identity
from snapchain.host.processes import run
from snapchain.image.file import fingerprint_of
from snapchain.model.events import Notice, OnEvent, ignore
from snapchain.model.extents import Extents
from snapchain.model.fingerprint import Fingerprint

_NEW = f"{PREFIX}new-"
_COPY = f"{PREFIX}copy-"
_DIRECTORY = ".snapchain-capture-"
_SOCKET = "nbd"
_LONGEST_SOCKET = 107
_METADATA = 16 << 20
"""Bytes that a scratch file may have beyond the size of its disk and a hundredth of it."""


class Monitor(Protocol):
    """QEMU's monitor."""

    def execute(self, command: str, arguments: Mapping[str, Any] | None = None, /) -> Any:
        """What a command returns. Raises a SnapchainError with QEMU's words, Unavailable where the answer is lost."""
        ...


Journal = Callable[["CaptureInFlight"], Callable[[], None]]
OPERATION = "capture"
"""The journal's word."""


class DiskInFlight(BaseModel):
    """device: QOM path that has the property `drive`; root: node that it reads; active: format node of the bitmaps."""

    model_config = ConfigDict(frozen=True)

    name: str
    device: str
    root: str
    active: str


class CaptureInFlight(BaseModel):
    """What a capture makes: in the guest, and on this host. directory: private, with scratch files and socket."""

    model_config = ConfigDict(frozen=True)

    id: str = Field(pattern=r"^[0-9a-f]{8}$")
    directory: str
    disks: tuple[DiskInFlight, ...]

    def node(self, role: Literal["p", "c", "a", "s"], number: int) -> str:
        """The name of a node of ours."""
        return f"sc-{role}-{self.id}-{number}"

    def export(self, number: int) -> str:
        """The id and the name of the export of a disk."""
        return f"sc-e-{self.id}-{number}"

    def later(self, number: int) -> str:
        """Of the export that shows what was written since the instant, and of the bitmap copy that does."""
        return f"{_COPY}{self.id}-late-{number}"

    @property
    def exports(self) -> list[str]:
        """Of all disks."""
        return [name for number in range(len(self.disks)) for name in (self.export(number), self.later(number))]

    @property
    def group(self) -> str:
        """The throttle group of the pass-throughs; it has no limits."""
        return f"sc-t-{self.id}"

    @property
    def socket(self) -> Path:
        """Of the NBD server."""
        return Path(self.directory) / _SOCKET


class QmpCapture:
    """Implements `guest.capture.Capture`."""

    def __init__(
        self, monitor: Monitor, plan: CaptureInFlight, disks: Sequence[CapturedDisk], time: datetime, how: Reached
    ) -> None:
        self._monitor, self._plan = monitor, plan
        self.disks, self.time = tuple(disks), time
        self.consistency, self.why_not, self.frozen_seconds = how.consistency, how.why_not, how.frozen_seconds

    def name_bitmaps(self, names: Mapping[str, tuple[str, str]]) -> None:
        """See `Capture`."""
        present = bitmaps_of(self._monitor, [disk.active for disk in self._plan.disks])
        actions: list[dict[str, Any]] = []
        for disk in self._plan.disks:
            if disk.name not in names:
                continue
            new = next((each for each in present[disk.active] if each.name == _NEW + self._plan.id), None)
            if new is None:
                continue  # somebody removed it: the next time all is compared
            name = bitmap_name(*names[disk.name])
            old = next((each for each in present[disk.active] if each.name == name), None)
            if old is not None and _fault(old) is not None:
                self._monitor.execute("block-dirty-bitmap-remove", {"node": disk.active, "name": name})
                old = None
            if old is not None:  # the content is the same again
                actions.append(_action("clear", node=disk.active, name=name))
            else:
                how = {"granularity": new.granularity, "persistent": new.persistent}
                actions.append(_action("add", node=disk.active, name=name, **how))
            actions += [
                _action("merge", node=disk.active, target=name, bitmaps=[new.name]),
                _action("remove", node=disk.active, name=new.name),
            ]
        if actions:
            self._monitor.execute("transaction", {"actions": actions})

    def drop_bitmaps(self, names: Mapping[str, tuple[str, str]]) -> None:
        """See `Capture`."""
        present = bitmaps_of(self._monitor, [disk.active for disk in self._plan.disks])
        actions = []
        for disk in self._plan.disks:
            place, content_id = names.get(disk.name, ("", ""))
            for each in present[disk.active]:
                parsed = parsed_name(each.name)
                if parsed is not None and parsed[0] == place and parsed[1] != content_id:
                    actions.append(_action("remove", node=disk.active, name=each.name))
        if actions:
            self._monitor.execute("transaction", {"actions": actions})


@contextmanager
def capture_of(
    guest: QmpGuest, request: CaptureRequest, *, freeze: Freeze = as_it_comes, on_event: OnEvent = ignore
) -> Iterator[QmpCapture]:
    """See `capture.capture_of`."""
    settle(guest)
    disks = to_capture(guest, request)
    with captured(
        guest.monitor,
        disks,
        request,
        guest=guest.name,
        journal=partial(_journalled, guest),
        freeze=freeze,
        on_event=on_event,
    ) as found:
        yield found


def to_capture(guest: QmpGuest, request: CaptureRequest) -> list[GuestDisk]:
    """The disks that a capture takes. Raises as `capture_of` does before anything is made."""
    check_supported(guest.monitor, guest=guest.name)
    for each in journal.find(guest=guest.name, operation=OPERATION)[0]:
        if not each.record.is_abandoned and each.record.writer != own_identity():
            raise Busy(
                f"another snapchain (pid {each.record.writer[0]}) captures the guest now",
                subject=guest.name,
                hint="wait for its end",
            )
    at_work = [each for each in guest.activities() if each.kind != "export"]
    if at_work:
        raise Busy(f"something is at work in the guest: {at_work[0].says}", subject=guest.name, hint="wait for its end")
    check_server(guest.monitor, guest=guest.name)
    found = [disk for disk in guest.disks() if disk.left_out is None and disk.chain]
    for name in request.disks:
        if name not in {disk.name for disk in found}:
            raise NotFound(
                f"the guest has no disk {name} that can be captured",
                subject=guest.name,
                hint=f"it has {', '.join(disk.name for disk in found) or 'none'}",
            )
    chosen = [disk for disk in found if not request.disks or disk.name in request.disks]
    if not chosen:
        raise NotFound("the guest has no disk that can be captured", subject=guest.name, hint="see `snapchain guests`")
    return chosen


def settle(guest: QmpGuest) -> None:
    """Remove what killed runs have left in a guest. Raises what QEMU refuses it with."""
    for found in journal.abandoned(guest=guest.name, process=guest.process(), operations=(OPERATION,)):
        settle_record(found, guest)


def settle_record(found: journal.Found, guest: QmpGuest | None) -> None:
    """Undo the capture of a killed run. guest: None where its QEMU has ended: then only files are left."""
    plan = CaptureInFlight.model_validate(found.record.details)
    if guest is not None and found.record.qemu_runs is not False:
        undo(guest.monitor, plan)
    remove_files(plan)
    journal.remove(found.path)


def _journalled(guest: QmpGuest, plan: CaptureInFlight) -> Callable[[], None]:
    record = journal.begun(guest, OPERATION, **plan.model_dump(mode="json"))
    return partial(journal.remove, journal.write(record))


@contextmanager
def captured(
    monitor: Monitor,
    disks: Sequence[GuestDisk],
    request: CaptureRequest,
    *,
    guest: str,
    journal: Journal,
    freeze: Freeze = as_it_comes,
    on_event: OnEvent = ignore,
) -> Iterator[QmpCapture]:
    """A block in which the disks of a guest can be read as they were at one instant.

    disks: those to capture, looked at now; guest: for people
    journal: stores what is about to be made, durably, and returns what forgets it
    Raises Unsupported for a QEMU without the filter, Busy where something else is at work on a disk or somebody else
    has the NBD server, Unavailable where the view broke or the monitor is gone.
    """
    check_supported(monitor, guest=guest)
    check_server(monitor, guest=guest)
    chosen = [disk for disk in disks if not request.disks or disk.name in request.disks]
    if not chosen:
        raise InvalidInput("there is no disk to capture", subject=guest)
    plan = _planned(monitor, chosen, request, guest=guest)
    forget = journal(plan)
    try:
        with ExitStack() as stack:
            time, how = _instant(monitor, plan, chosen, request, freeze)
            bitmaps = _copied(monitor, plan)
            _exported(monitor, plan, bitmaps)
            found = [
                CapturedDisk(
                    disk.name,
                    path=disk.active.path,
                    image_format="raw" if disk.active.image_format == "raw" else "qcow2",
                    sources=_sources(disk.chain),
                    export=stack.enter_context(NbdExport(plan.socket, plan.export(number), unit=CLUSTER)),
                    written_since=partial(_written_since, monitor, plan, number),
                    bitmaps=bitmaps[number],
                )
                for number, disk in enumerate(chosen)
            ]
            yield QmpCapture(monitor, plan, found, time, how)
    finally:
        try:
            undo(monitor, plan)
            remove_files(plan)
            forget()
        except SnapchainError as fault:
            # The guest goes on with the filters. What ended the block is the better error, where there is one.
            on_event(
                Notice.of(guest, f"the filters of its capture are still there, and the next run removes them: {fault}")
            )


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
    _drop_unnamed(monitor, plan, nodes)


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


def bitmaps_of(monitor: Monitor, nodes: Sequence[str]) -> dict[str, list[Bitmap]]:
    """The dirty bitmaps of some nodes."""
    found: dict[str, list[Bitmap]] = {node: [] for node in nodes}
    for each in monitor.execute("query-named-block-nodes", {"flat": True}):
        if each["node-name"] in found:
            found[each["node-name"]] = [
                Bitmap(
                    name=bitmap["name"],
                    granularity=bitmap["granularity"],
                    recording=bitmap["recording"],
                    persistent=bitmap["persistent"],
                    inconsistent=bitmap.get("inconsistent", False),
                    busy=bitmap["busy"],
                )
                for bitmap in each.get("dirty-bitmaps", ())
                if "name" in bitmap
            ]
    return found


# --- the steps


def _planned(monitor: Monitor, disks: Sequence[GuestDisk], request: CaptureRequest, *, guest: str) -> CaptureInFlight:
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
    if len(os.fsencode(path / _SOCKET)) > _LONGEST_SOCKET:
        raise Unsupported(
            "the path of the directory is too long for a socket", subject=path.parent, hint="name another by --scratch"
        )
    return CaptureInFlight(id=identity, directory=str(path), disks=tuple(found))


def _place(disks: Sequence[GuestDisk], request: CaptureRequest) -> Path:
    if request.scratch_dir is not None:
        return request.scratch_dir.absolute()
    for disk in disks:
        if disk.active.path is not None and not disk.active.is_block_device:
            return disk.active.path.parent
    return Path("/var/tmp")  # noqa: S108 - a private directory is made in it


def _instant(
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
    _add_bitmaps(monitor, plan, disks)
    with freeze() as reached:
        _switch(monitor, plan, range(len(plan.disks)), filtered=True)
        time = datetime.now(UTC)
    return time, reached


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


def _add_bitmaps(monitor: Monitor, plan: CaptureInFlight, disks: Sequence[GuestDisk]) -> None:
    def add(*, persistent: bool) -> None:
        actions = [
            _action(
                "add",
                node=each.active,
                name=_NEW + plan.id,
                persistent=persistent and disk.active.image_format == "qcow2",
            )
            for each, disk in zip(plan.disks, disks, strict=True)
        ]
        monitor.execute("transaction", {"actions": actions})

    try:
        add(persistent=True)
    except Unavailable:
        raise
    except SnapchainError:
        # qcow2 of version 2 cannot store bitmaps: they last as long as this QEMU runs.
        add(persistent=False)


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


def _copied(monitor: Monitor, plan: CaptureInFlight) -> list[BitmapSet]:
    """Copies of our bitmaps that stand still, for export: those themselves go on recording."""
    present = bitmaps_of(monitor, [disk.active for disk in plan.disks])
    actions: list[dict[str, Any]] = []
    found = []
    for disk in plan.disks:
        contexts: dict[str, str] = {}
        faults: dict[str, str] = {}
        for each in present[disk.active]:
            parsed = parsed_name(each.name)
            if parsed is None:
                continue
            fault = _fault(each)
            if fault is not None:
                faults[parsed[1]] = fault
                continue
            copy = f"{_COPY}{plan.id}-{len(contexts)}"
            actions += [
                _action("add", node=disk.active, name=copy, granularity=each.granularity, disabled=True),
                _action("merge", node=disk.active, target=copy, bitmaps=[each.name]),
            ]
            contexts[parsed[1]] = f"qemu:dirty-bitmap:{copy}"
        found.append(BitmapSet(contexts, {key: why for key, why in faults.items() if key not in contexts}))
    if actions:
        monitor.execute("transaction", {"actions": actions})
    return found


def _fault(bitmap: Bitmap) -> str | None:
    if bitmap.inconsistent:
        return "its dirty bitmap is inconsistent, since QEMU did not end in good order"
    if not bitmap.recording:
        return "its dirty bitmap was disabled by somebody"
    if bitmap.busy:
        return "its dirty bitmap is in use by somebody"
    return None


def _exported(monitor: Monitor, plan: CaptureInFlight, bitmaps: Sequence[BitmapSet]) -> None:
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


def _written_since(monitor: Monitor, plan: CaptureInFlight, number: int) -> Extents:
    """DATA where the guest may have written between the instant and now."""
    node, name = plan.disks[number].active, plan.later(number)
    new = next((each for each in bitmaps_of(monitor, [node])[node] if each.name == _NEW + plan.id), None)
    if new is None or not new.recording:
        raise Conflict(
            "the dirty bitmap of the disk was removed or disabled by another program",
            subject=plan.disks[number].name,
            hint="run it again",
        )
    actions = [
        _action("add", node=node, name=name, granularity=new.granularity, disabled=True),
        _action("merge", node=node, target=name, bitmaps=[new.name]),
    ]
    monitor.execute("transaction", {"actions": actions})
    _export(monitor, plan, number, name, [name])
    with NbdExport(plan.socket, name, connections=1) as export:
        return dirty(export, f"qemu:dirty-bitmap:{name}")


def _sources(chain: Sequence[Layer]) -> tuple[Fingerprint, ...]:
    """Keys of the files: those of sealed ones are true; the active one's has its inode, and matches no file."""
    found = []
    for number, layer in enumerate(chain):
        if layer.path is None or layer.is_block_device:
            return ()
        with os_errors(layer.path):
            mark = fingerprint_of(os.stat(layer.path))  # noqa: PTH116 - as image.file has it
        if number == len(chain) - 1:
            mark = Fingerprint(inode=mark.inode, size=0, mtime_ns=0, ctime_ns=0)
        found.append(mark)
    return tuple(found)


def _delete(monitor: Monitor, nodes: set[str], names: Sequence[str]) -> None:
    for name in names:
        if name in nodes:
            monitor.execute("blockdev-del", {"node-name": name})


def _drop_unnamed(monitor: Monitor, plan: CaptureInFlight, nodes: set[str]) -> None:
    """The copies, and the bitmap that got no name: nothing was published that it goes back to."""
    active = [disk.active for disk in plan.disks if disk.active in nodes]
    for node, present in bitmaps_of(monitor, active).items():
        for each in present:
            if each.name == _NEW + plan.id or each.name.startswith(f"{_COPY}{plan.id}-"):
                monitor.execute("block-dirty-bitmap-remove", {"node": node, "name": each.name})


def _action(kind: Literal["add", "clear", "merge", "remove"], **data: object) -> dict[str, Any]:
    return {"type": f"block-dirty-bitmap-{kind}", "data": data}
