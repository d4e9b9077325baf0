"""guests: the guests of this host, their disks, what protects them, and what stands in the way of a live snapshot.

libvirt's domains come from every daemon that this user reaches, running or not; the others are QEMU processes, found in
/proc.  All are asked side by side.  A guest or a daemon that does not answer is a line of the report.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from snapchain.destination.guest_record import record_disk
from snapchain.destination.reading import ReadableDestination
from snapchain.destination.records import DiskRecord
from snapchain.errors import InvalidInput, NotFound, SnapchainError, Unavailable
from snapchain.guest import journal
from snapchain.guest.address import GuestAddress, open_guest
from snapchain.guest.protocol import Guest, GuestDisk, State
from snapchain.guest.socket_peers import clients_of
from snapchain.host import virsh
from snapchain.host.deadman import is_stopped
from snapchain.host.process_identity import identity
from snapchain.host.qemu_processes import QemuProcess, qemu_processes
from snapchain.host.virsh import Virsh
from snapchain.model.consistency import Consistency
from snapchain.ops.guest_points import guest_named
from snapchain.ops.lease_notes import note_of

_AT_ONCE = 8
"""Guests that are asked at the same time."""
_LIST_SECONDS = 10.0
_PING_SECONDS = 2.0
_ADD_MONITOR = "It has no QMP socket. Start it with `-qmp unix:PATH,server=on,wait=off` for `--qmp PATH`."
_OTHER_DAEMON = "Another libvirt daemon manages it: name that daemon by LIBVIRT_DEFAULT_URI."
_DENIED_DAEMON = (
    "A libvirt daemon that this user cannot ask manages it: run as root, or name that daemon by LIBVIRT_DEFAULT_URI."
)
_SECOND_MONITOR = "QMP serves one client; give QEMU a second -qmp socket for snapchain"
_LIBVIRTS_OWN = "blockjob"
"""Records of jobs that libvirt does for us; `merge` has one of its own."""

AgentState = Literal["answers", "silent", "none", "unknown"]


class _Shown(BaseModel):
    model_config = ConfigDict(frozen=True, defer_build=True)


class DiskRow(_Shown):
    """A disk. path: of its active layer, None where it is no local file; layers: of its chain

    virtual_size, file_bytes: bytes, file_bytes of all files of the chain
    left_out: why it is none to protect; obstacle: why it can have no live snapshot
    """

    name: str
    path: str | None
    format: str | None
    layers: int
    virtual_size: int
    file_bytes: int
    chain: tuple[str, ...]
    left_out: str | None = None
    obstacle: str | None = None


class Protection(_Shown):
    """What a destination has of a guest. guest_point: the newest, None where there is none; age_seconds: since its time

    disks: names of its disks there; fault: why the destination could not be asked
    """

    destination: str
    guest_point: int | None = None
    time: datetime | None = None
    age_seconds: float | None = None
    consistency: Consistency | None = None
    disks: tuple[str, ...] = ()
    fault: str | None = None


class GuestRow(_Shown):
    """A guest. kind: libvirt or qemu; option: what names it on the command line, None where nothing can

    agent: whether its guest agent answers; in_the_way: why a live snapshot of all its disks would fail, sentences
    owed: operations of killed runs that `doctor` finishes; fault: why it could not be asked
    lease: a sentence about the lease under which it runs; without one a watch holds none
    """

    name: str
    kind: Literal["libvirt", "qemu"]
    state: Literal["running", "paused", "incoming", "off", "unknown"]
    option: str | None
    pid: int | None
    agent: AgentState
    disks: tuple[DiskRow, ...]
    activities: tuple[str, ...] = ()
    in_the_way: tuple[str, ...] = ()
    owed: tuple[str, ...] = ()
    protected: tuple[Protection, ...] = ()
    fault: str | None = None
    lease: str | None = None


class GuestsReport(_Shown):
    """All guests, those that run first, then by name. faults: daemons and destinations that could not be asked."""

    guests: tuple[GuestRow, ...]
    faults: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Found:
    """A guest before it is asked. ways: addresses to try in turn; reason: why there is none"""

    name: str
    kind: Literal["libvirt", "qemu"]
    ways: tuple[GuestAddress, ...]
    pid: int | None = None
    reason: str | None = None


def guests(
    name: str | None = None,
    *,
    at: Mapping[str, Callable[[], ReadableDestination]] | None = None,
    now: datetime | None = None,
) -> GuestsReport:
    """Ask all guests, or those of one name. at: destinations to look at, by address; now: for ages

    Raises NotFound where a name is given and no guest has it, InvalidInput for the address of no destination.
    """
    found, faults = _find()
    if name is not None:
        found = [each for each in found if each.name == name]
        if not found:
            hint = "; ".join(faults) or "`snapchain guests` lists all guests of this host"
            raise NotFound("no guest of this host has this name", subject=name, hint=hint)
    owed, now = _owed(), now or datetime.now(UTC)
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        looks = [pool.submit(_look, each, owed.get(each.name, ())) for each in found]
        places = [pool.submit(_protections, url, opened, now) for url, opened in (at or {}).items()]
        rows = [look.result() for look in looks]
        protections = [place.result() for place in places]
    rows = [row.model_copy(update={"protected": tuple(each(row.name) for each in protections)}) for row in rows]
    order = {"running": 0, "paused": 0, "incoming": 0, "unknown": 1, "off": 2}
    return GuestsReport(guests=tuple(sorted(rows, key=lambda row: (order[row.state], row.name))), faults=tuple(faults))


# --- which guests there are


def _find() -> tuple[list[_Found], list[str]]:
    domains, known, faults = _domains()
    processes = [each for each in qemu_processes() if not (each.arguments.is_libvirt and each.arguments.uuid in known)]
    return [*domains, *map(_of_process, processes)], faults


def _domains() -> tuple[list[_Found], set[str], list[str]]:
    """The domains of all daemons, their UUIDs, and why a daemon could not be asked."""
    found: list[_Found] = []
    uuids: set[str] = set()
    faults: list[str] = []
    uris = [uri for uri in virsh.reachable() if virsh.has_daemon(uri)] if virsh.is_installed() else []
    for uri in uris:
        # A chosen daemon needs no --connect: the environment names it for every command.
        connect = None if uri == virsh.default_uri() else uri
        try:
            rows = Virsh(connect, seconds=_LIST_SECONDS).names("list", "--all", "--uuid", "--name")
        except SnapchainError as error:
            faults.append(f"{error}")
            continue
        for uuid, _, name in (row.partition(" ") for row in rows):
            uuids.add(uuid.lower())
            found.append(_Found(name.strip(), "libvirt", (GuestAddress(domain=name.strip(), connect=connect),)))
    return found, uuids, faults


def _of_process(process: QemuProcess) -> _Found:
    name = process.arguments.name or f"pid-{process.pid}"
    if process.arguments.is_libvirt:
        return _Found(name, "libvirt", (), process.pid, _OTHER_DAEMON if os.geteuid() == 0 else _DENIED_DAEMON)
    given = None if process.arguments.name else name
    ways = tuple(GuestAddress(qmp=path, agent=process.agent, name=given) for path in process.qmp)
    return _Found(name, "qemu", ways, process.pid, None if ways else _ADD_MONITOR)


# --- one guest


def _look(found: _Found, owed: tuple[str, ...]) -> GuestRow:
    fault = found.reason
    lease = None if found.pid is None else note_of(identity(found.pid))
    stopped = lease is not None and is_stopped(lease.process)  # its monitor would not answer
    for address in found.ways if not stopped else ():
        if address.qmp is not None and (clients := clients_of(address.qmp)):
            # A second connection waits, and would be served as soon as the first one is given up, in the place of its
            # own client, which connects again.
            others = ", ".join(clients)
            fault = fault or f"its monitor {address.qmp} is in use by {others} ({_SECOND_MONITOR})"
            continue
        try:
            with open_guest(address) as guest:
                return _row(guest, found, owed)
        except SnapchainError as error:
            fault = fault or f"{error.message}" + (f" ({error.hint})" if error.hint else "")
    return GuestRow(
        name=found.name,
        kind=found.kind,
        state="paused" if stopped else "unknown",
        option=found.ways[0].option if found.ways else None,
        pid=found.pid,
        agent="unknown",
        disks=(),
        owed=owed,
        fault=fault,
        lease=None if lease is None else lease.describe(),
    )


def _row(guest: Guest, found: _Found, owed: tuple[str, ...]) -> GuestRow:
    state = guest.state()
    process = guest.process()
    disks = guest.disks()
    activities = guest.activities()
    agent = _agent(guest, state)
    in_the_way = [f"{disk.name}: {disk.obstacle}" for disk in disks if disk.obstacle and not disk.left_out]
    in_the_way += [each.says for each in activities if not each.is_ours]
    if state is State.INCOMING:
        in_the_way.append("It waits for a migration, or was migrated away.")
    return GuestRow(
        name=guest.name,
        kind=found.kind,
        state=state.value,
        option=guest.option,
        pid=process[0] if process is not None else found.pid,
        agent=agent,
        disks=tuple(map(_disk_row, disks)),
        activities=tuple(each.says for each in activities),
        in_the_way=tuple(in_the_way),
        owed=owed,
        lease=None if (note := note_of(process)) is None else note.describe(),
    )


def _agent(guest: Guest, state: State) -> AgentState:
    agent = guest.agent() if state is not State.OFF else None
    if agent is None:
        return "none"
    if state is not State.RUNNING:
        return "silent"
    try:
        agent.ping(timeout=_PING_SECONDS)
    except Unavailable:
        return "silent"
    except SnapchainError:
        return "unknown"
    return "answers"


def _disk_row(disk: GuestDisk) -> DiskRow:
    active = disk.chain[-1] if disk.chain else None
    return DiskRow(
        name=disk.name,
        path=None if active is None or active.path is None else str(active.path),
        format=None if active is None else active.image_format,
        layers=len(disk.chain),
        virtual_size=0 if active is None else active.virtual_size,
        file_bytes=sum(_file_bytes(layer.path) for layer in disk.chain),
        chain=tuple(str(layer.path) if layer.path is not None else layer.node for layer in disk.chain),
        left_out=disk.left_out,
        obstacle=disk.obstacle,
    )


def _file_bytes(path: Path | None) -> int:
    """What a file occupies; 0 for what cannot be seen, and for a device."""
    if path is None:
        return 0
    try:
        return path.stat().st_blocks * 512
    except OSError:
        return 0


def _owed() -> dict[str, tuple[str, ...]]:
    """What killed runs have left, by the name of the guest."""
    found, _ = journal.find()
    owed: dict[str, tuple[str, ...]] = {}
    for each in found:
        record = each.record
        if record.operation != _LIBVIRTS_OWN and record.is_abandoned:
            owed[record.guest] = (*owed.get(record.guest, ()), f"an interrupted {record.operation}")
    return owed


# --- what protects it


def _protections(url: str, opened: Callable[[], ReadableDestination], now: datetime) -> Callable[[str], Protection]:
    """What a destination has of a guest, as a function of its name."""
    try:
        disks: Sequence[DiskRecord] = tuple(opened().disks())
    except InvalidInput:  # an address that is none
        raise
    except SnapchainError as error:
        fault = str(error)
        return lambda _name: Protection(destination=url, fault=fault)

    def of(name: str) -> Protection:
        here = tuple(disk.name for disk in disks if disk.name.startswith(f"{name}/") and disk.name != record_disk(name))
        view = guest_named(disks, name)
        if view is None or not view.points:
            return Protection(destination=url, disks=here)
        newest = view.points[-1]
        return Protection(
            destination=url,
            guest_point=newest.point,
            time=newest.time,
            age_seconds=max(0.0, (now - newest.time).total_seconds()),
            consistency=newest.consistency,
            disks=here,
        )

    return of
