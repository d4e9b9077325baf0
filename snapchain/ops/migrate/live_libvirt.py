"""A domain of libvirt moves: libvirt carries it, through sockets that our ssh forwards, and decides who runs it.

    there: disks locked, overlays empty           record "moving"
    record "switching", tops marked here          from now on libvirt may give it away at any moment
    virsh migrate                                 mirrors, memory; paused; it runs there
    GIVE: its record says that it has the guest
    record "switched", ended here, all files made read-only, record removed

What runs here must stay writable until libvirt has decided: QEMU opens its images again where the guest goes on.  So
the tops are only marked, which every snapchain command and the hook of `fence` heed; they become read-only afterwards.
A migration that ends in any other way is settled by asking both sides (`live_domain`).
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from statistics import median
from xml.etree import ElementTree as ET

from snapchain.errors import Conflict, SnapchainError, Unavailable, Unsupported
from snapchain.guest import journal
from snapchain.guest.libvirt_guest import LibvirtGuest
from snapchain.guest.libvirt_migration import DomainLook, LeavingDomain, Route, host_uuid
from snapchain.guest.protocol import GuestDisk
from snapchain.host import run_directory
from snapchain.host.directory import Directory
from snapchain.host.files import write_in
from snapchain.host.libvirt_rpc import without_confirm
from snapchain.host.os_errors import os_errors
from snapchain.host.process_channel import ProcessChannel
from snapchain.host.processes import held_back
from snapchain.host.terminal import shell_word
from snapchain.host.virsh import Virsh, socket_of
from snapchain.host.virsh_session import VirshSession
from snapchain.model.events import Progress
from snapchain.ops.migrate import live_settle
from snapchain.ops.migrate.live_check import (
    MemoryWatch,
    MirrorWatch,
    check_cpu,
    check_guest,
    check_pause,
    check_room,
    first_pause,
)
from snapchain.ops.migrate.live_kind import Asked, Moved
from snapchain.ops.migrate.live_prepare import check_same_layers, link_rate
from snapchain.ops.migrate.live_request import SettledMove
from snapchain.ops.migrate.live_settle import LeavingRecord, MoveRecord
from snapchain.ops.migrate.look import opened
from snapchain.ops.restore import domain_xml
from snapchain.ops.restore.changed_definition import NewDisk
from snapchain.ops.sync.request import SetReport
from snapchain.replica.guest_client import GuestMove, moving
from snapchain.replica.incoming_qemu import cpu_digest
from snapchain.replica.stream.compression import Link
from snapchain.replica.stream.guest_messages import DomainPresence, MoveStep, Moving
from snapchain.source import ownership

_LOOK_SECONDS = 0.5
_GIVE_UP_SECONDS = 10.0
"""For libvirt to end a migration that is given up; what is left then is ended by `live_domain`."""
_SUFFIX = ".tunnelmigrate.dest."
"""AppArmor lets QEMU use such a socket below /run/libvirt: it is what libvirt's own tunnel is called there."""

_DEVICE_STATE_SECONDS = 0.06
"""Of a pause: devices, the ends of the mirrors, libvirt's work on both hosts. Seven pauses of one disk took 0.05 to
0.12 s, with questions of a few milliseconds."""
_ROUND_TRIPS = 4
"""Of a pause."""
_QUESTIONS = 5
"""How often a round trip is measured: a busy machine is late with some answers."""


class LibvirtKind:
    """Implements `LiveKind` for a domain of libvirt."""

    def __init__(self, asked: Asked, guest: LibvirtGuest) -> None:
        self._guest, self._request, self._endpoint, self._token = guest, asked.request, asked.endpoint, asked.token
        self._on_event = asked.on_event
        self._virsh = Virsh(guest.address.connect)
        self._leaving = LeavingDomain(self._virsh, guest.uuid, guest.name)
        self._process = guest.process()

    def check(self, disks: Sequence[GuestDisk]) -> None:
        """See `LiveKind`."""
        if self._endpoint.link is Link.LOCAL:
            raise Unsupported(
                "libvirt moves a guest to another host only",
                subject=self._endpoint.url,
                hint="name its replica by ssh://host/path",
            )
        if self._request.command:
            raise Unsupported("--start-command is for a guest without libvirt", subject=self._guest.name)
        self._definition = check_guest(self._guest, disks)
        for what, verb in (("snapshots", "snapshot-list"), ("checkpoints", "checkpoint-list")):
            if names := self._guest.command(verb, "--name").split():
                raise Unsupported(
                    f"libvirt cannot take its {what} along: {', '.join(names)}",
                    subject=self._guest.name,
                    hint=f"`virsh {verb.removesuffix('-list')}-delete --metadata` has libvirt forget them; see first "
                    "who needs them",
                )

    def dirty_rate(self) -> float | None:
        """See `LiveKind`."""
        try:
            return self._leaving.dirty_rate()
        finally:
            self._leaving.close()

    def begin(self, record: MoveRecord) -> MoveRecord:
        """See `LiveKind`."""
        domain = LeavingRecord(
            name=self._guest.name,
            uuid=self._guest.uuid,
            is_lasting=self._definition.inactive is not None,
            max_downtime=self._leaving.max_downtime(),
            starts_with_host=self._leaving.starts_with_host(),
        )
        run_directory.make_for_libvirt(self._token)
        directory = run_directory.make(f"{self._guest.name}-out", self._token)
        return record.model_copy(update={"domain": domain, "directory": directory})

    def settle(self, found: journal.Found) -> SettledMove:
        """See `LiveKind`."""
        return live_settle.settle(found, on_event=self._on_event)

    def move(self, found: journal.Found, moved: Moved, shipped: SetReport) -> None:
        """See `LiveKind`."""
        record = moved.record
        try:
            with ExitStack() as stack:
                there = stack.enter_context(moving(self._endpoint, record.what))
                prepared = there.step(MoveStep.PREPARE)
                moved.overlays = prepared.overlays
                route = self._route(stack, prepared, record)
                round_trip = _round_trip(route.uri)
                self._check(prepared, shipped)
                limit = check_pause(
                    max_downtime=self._request.max_downtime,
                    switch=_switch_seconds(round_trip),
                    round_trip=round_trip,
                    dirty_rate=self.dirty_rate(),
                    link_rate=self._request.bandwidth or link_rate(shipped),
                    auto_converge=self._request.auto_converge,
                    subject=self._guest.name,
                )
                self._leaving.set_max_downtime(int(first_pause(limit) * 1000))
                found = live_settle.restaged(found, "switching")
                for each in record.disks:
                    with opened(record.request, each.moved) as chain:
                        ownership.fence(chain, each.mark, top_only=True, stays_writable=True)
                last = self._migrate(route, record, there, limit)
                moved.memory_rate = last.rate
                moved.predicted = _switch_seconds(round_trip) + (last.memory_left / last.rate if last.rate else 0.0)
                with held_back():
                    came = there.step(MoveStep.GIVE)
                    moved.pause, moved.memory_bytes, moved.memory_rounds = came.pause, came.memory, came.rounds
                    found = live_settle.restaged(found, "switched")
                    there.stop()
                    assert record.domain is not None
                    self._leaving.end(is_lasting=record.domain.is_lasting)
                    moved.fenced = live_settle.fence_all(record)
                    live_settle.remove_directories(record)
                    journal.remove(found.path)
                if came.domain is not DomainPresence.HERE:
                    raise Unavailable(
                        "the guest is this destination's now, and libvirt does not run it there any more",
                        subject=self._endpoint.url,
                        hint=f"look at its log there, and start it there: virsh start {shell_word(self._guest.name)}",
                    )
        finally:
            self._leaving.close()

    def _route(self, stack: ExitStack, prepared: Moving, record: MoveRecord) -> Route:
        """Forward the sockets, and write down the definitions for the destination.

        QEMU's user may do what it likes in the directory of its sockets. The daemons' sockets and the definitions are
        in one of this user alone.
        """
        shared = run_directory.for_libvirt(self._token)
        if prepared.directory != str(shared):
            raise Unsupported("its directory for sockets is another one", subject=prepared.directory)
        if self._process is not None:
            run_directory.give_to(shared, Path(f"/proc/{self._process[0]}").stat().st_uid)
        memory, disks = (shared / f"{name}{_SUFFIX}{self._guest.name}" for name in ("ram", "nbd"))
        if max(len(os.fsencode(path)) for path in (memory, disks)) > run_directory.LONGEST_SOCKET:
            memory, disks = shared / "ram", shared / "nbd"
        stack.enter_context(self._endpoint.forwarded([memory, disks], shared))
        uri = self._request.dest_uri
        if uri is None:
            (daemon,) = stack.enter_context(self._endpoint.forwarded([Path(prepared.libvirt)], record.directory))
            uri = f"qemu+unix:///system?socket={daemon}"
        other = host_uuid(Virsh(uri, elsewhere=True))
        if other != prepared.host:
            raise Conflict(
                "this is not the libvirt of the replica's host", subject=uri, hint="name that one by --dest-uri"
            )
        overlays = {
            each.name: NewDisk(Path(path), "qcow2") for each, path in zip(record.disks, prepared.overlays, strict=True)
        }
        files = [record.directory / "live.xml", record.directory / "lasting.xml"]
        texts = [self._guest.command("dumpxml", "--migratable", "--security-info")]
        texts.append(
            self._guest.command("dumpxml", "--migratable", "--security-info", "--inactive")
            if self._definition.inactive is not None
            else texts[0]
        )
        for path, text in zip(files, texts, strict=True):
            changed = domain_xml.change_for_migration(text, overlays, subject=self._guest.name)
            with os_errors(path), Directory.open(path.parent) as place:
                write_in(place, path.name, changed.encode("utf-8", "surrogateescape"))
        return Route(
            uri=uri,
            here=record.directory / "here",
            memory=memory,
            disks=disks,
            live=files[0],
            lasting=files[1],
            mirrored=record.names,
            bandwidth=self._request.bandwidth,
            auto_converge=self._request.auto_converge,
        )

    def _check(self, prepared: Moving, shipped: SetReport) -> None:
        text = self._definition.live or ""
        cpu = ET.fromstring(text.encode("utf-8", "surrogateescape")).find("cpu") if text else None  # noqa: S314
        is_hosts = cpu is not None and cpu.get("mode") in ("host-passthrough", "maximum")
        check_cpu(prepared, cpu_digest(), is_hosts=is_hosts, subject=self._endpoint.url)
        check_room(prepared, shipped.bytes_left, subject=self._endpoint.url)

    def _migrate(self, route: Route, record: MoveRecord, there: GuestMove, limit: float) -> DomainLook:
        """Until virsh has ended well; the last look at it.

        Raises what virsh failed with, and Conflict for a layer that was sealed since the overlays were made: only the
        tops are mirrored.
        """
        last = DomainLook(is_active=False)
        watch = self._watch(there, limit)

        def check() -> None:
            check_same_layers(self._guest, record)

        with (
            without_confirm(route.here, socket_of(self._virsh.uri), check) as carried,
            self._virsh_at_work(route) as virsh,
        ):
            while not virsh.has_ended(_LOOK_SECONDS):
                look = self._leaving.look()
                if look.is_active:
                    last = look
                    watch(look)
            if virsh.status != 0:
                raise carried.fault or virsh.end_error()
        return last

    @contextmanager
    def _virsh_at_work(self, route: Route) -> Iterator[ProcessChannel]:
        """Where the block raises, libvirt gives the migration up, and virsh is ended."""
        virsh = self._leaving.start(route)
        try:
            yield virsh
        except BaseException:
            with held_back(), suppress(SnapchainError):  # it is done again, and reported, by `live_domain`
                if not virsh.has_ended(0.0):
                    self._leaving.abort(seconds=_GIVE_UP_SECONDS)
            raise
        finally:
            virsh.abort()
            virsh.has_ended(_GIVE_UP_SECONDS)

    def _watch(self, there: GuestMove, limit: float) -> Callable[[DomainLook], None]:
        """Reports each look; raises Conflict, with the figures, where more rounds bring the pause no nearer."""
        watch = MemoryWatch(
            limit=limit,
            max_downtime=self._request.max_downtime,
            auto_converge=self._request.auto_converge,
            subject=self._guest.name,
            allow=lambda seconds: self._leaving.set_max_downtime(int(seconds * 1000)),
        )

        mirrors = MirrorWatch(subject=self._guest.name, must_be_level=True)

        def on_look(look: DomainLook) -> None:
            there.keep_alive()
            if not look.round:
                self._on_event(Progress("mirror", look.disk_done, look.disk_total))
                mirrors.look(look.disk_done, look.disk_total)
                return
            total = look.memory_sent + look.memory_left
            self._on_event(Progress(f"memory, round {look.round}", look.memory_sent, total))
            watch.look(round=look.round, left=look.memory_left, dirty_rate=look.dirty_rate, rate=look.rate)

        return on_look


def _switch_seconds(round_trip: float) -> float:
    """What a pause lasts besides the last of the memory. round_trip: seconds of a question to the destination"""
    return _DEVICE_STATE_SECONDS + _ROUND_TRIPS * round_trip


def _round_trip(uri: str) -> float:
    """Seconds of a question to a daemon of libvirt, as most of them take."""
    took = []
    with VirshSession(Virsh(uri, elsewhere=True)) as session:
        session.ready()
        for _ in range(_QUESTIONS):
            begun = time.monotonic()
            session.text("hostname")
            took.append(time.monotonic() - begun)
    return median(took)
