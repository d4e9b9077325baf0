"""A bare QEMU moves: snapchain starts the one at the destination, mirrors the disks, and switches.

    QEMU there, awaiting                          ended again by the other side when we are gone
    mirrors READY, memory under way               the guest runs, its writes follow at once
    -- paused --                                  mirrors drained, device state sent; beside that:
    record "switching", tops marked here          the destination may be asked from now on
    GIVE_AND_RUN: its record says that it has     the one moment that decides
    the guest, and the guest is let run           -- it runs there --
    record "switched", QEMU here ended, all files marked, record removed

Up to GIVE_AND_RUN anything that fails, and Ctrl-C, ends with the guest running here as before (`live_settle`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from snapchain.errors import Conflict, SnapchainError, Unsupported
from snapchain.guest import journal
from snapchain.guest.machine_view import machine_view
from snapchain.guest.protocol import GuestDisk
from snapchain.guest.qemu_files import QemuFiles
from snapchain.guest.qmp_guest import QmpGuest
from snapchain.guest.qmp_migration import MemoryLook, Outgoing, look_at_memory, measured_dirty_rate, version_of
from snapchain.host import run_directory
from snapchain.host.priority import urgent
from snapchain.host.processes import held_back
from snapchain.host.service_unit import service_of
from snapchain.image import ImageChain
from snapchain.model.events import Notice, Progress
from snapchain.model.pause import switch_seconds
from snapchain.ops.migrate import live_settle
from snapchain.ops.migrate.live_check import (
    SMALL_REST,
    MemoryWatch,
    MirrorWatch,
    check_destination,
    check_files,
    check_guest,
    check_pause,
    check_service,
    first_pause,
    per_second,
)
from snapchain.ops.migrate.live_kind import Asked, Moved
from snapchain.ops.migrate.live_prepare import check_same_layers, link_rate
from snapchain.ops.migrate.live_request import SettledMove
from snapchain.ops.migrate.live_settle import MoveRecord
from snapchain.ops.migrate.look import opened
from snapchain.ops.restore.changed_definition import Changes, NewDisk
from snapchain.ops.restore.qemu_argv import IncomingCommand, change_for_incoming
from snapchain.ops.sync.request import SetReport
from snapchain.replica.guest_client import GuestMove, moving
from snapchain.replica.incoming_qemu import NBD, RAM, cpu_digest
from snapchain.replica.stream.guest_messages import MoveStep, Moving
from snapchain.source import ownership

_GIVE_UP_SECONDS = 3.0
"""For mirrors to end while their link is still there; where that hangs, they end when it is closed."""
_SWITCH_SECONDS = 10.0
"""How much longer than was allowed each of the two steps of QEMU's switch may take, before they are undone."""
_LOOKS = 11
"""Rehearsals. The guest still runs beside them, and is late with some; in the pause it does not."""
_REST_SECONDS = 0.03
"""Before each: in the pause, too, each of the processes has slept until it is its turn."""
_CLOCKS_APART = 1.0
"""Seconds from which on the user is told."""
_QMP = "qmp"


class QmpKind:
    """Implements `LiveKind` for a bare QEMU."""

    def __init__(self, asked: Asked, guest: QmpGuest, disks: Sequence[GuestDisk]) -> None:
        self._guest, self._request, self._endpoint, self._token = guest, asked.request, asked.endpoint, asked.token
        self._on_event = asked.on_event
        self._outgoing = Outgoing(guest.monitor, asked.token, [disk.name for disk in disks])
        self._process = guest.process()

    def check(self, disks: Sequence[GuestDisk]) -> None:
        """See `LiveKind`."""
        self._definition = check_guest(self._guest, disks)
        check_files(self._guest, self._definition)
        service = None if self._process is None else service_of(self._process[0])
        if (words := check_service(service, subject=self._guest.name)) is not None:
            self._on_event(Notice.of(self._guest.name, words))
        self._outgoing.check()
        if not self._request.command:
            if self._definition.argv is None:
                words = "; ".join(self._definition.unreadable)
                raise Unsupported(words, subject=self._guest.name, hint="or give --start-command")
            overlays = {disk.name: Path(f"/{disk.name}") for disk in disks}
            self._command(overlays, [Path(f"/{file.name}") for file in self._definition.files], Path("/run"))
        if bitmaps := sorted(self._outgoing.named_bitmaps()):
            words = f"its dirty bitmaps ({', '.join(bitmaps)}) stay with the layers that are sealed now"
            self._on_event(Notice.of(self._guest.name, f"{words}: the next `ship --bitmap` there reads all disks once"))

    def dirty_rate(self) -> float | None:
        """See `LiveKind`."""
        return measured_dirty_rate(self._guest.monitor)

    def begin(self, record: MoveRecord) -> MoveRecord:
        """See `LiveKind`."""
        directory = run_directory.make(f"{self._guest.name}-out", self._token)
        before = {"capabilities": self._outgoing.capabilities(), "limits": self._outgoing.limits()}
        return record.model_copy(update={"directory": directory, **before})

    def move(self, found: journal.Found, moved: Moved, shipped: SetReport) -> None:
        """See `LiveKind`."""
        self._found, self._moved = found, moved
        self._move(moved.record, shipped)

    def settle(self, found: journal.Found) -> SettledMove:
        """See `LiveKind`."""
        return live_settle.settle(found, monitor=self._guest.monitor, on_event=self._on_event)

    def _move(self, record: MoveRecord, shipped: SetReport) -> None:
        with ExitStack() as stack:
            there = stack.enter_context(moving(self._endpoint, record.what))
            stack.enter_context(self._goes_on_at_once(record))
            prepared = there.step(MoveStep.PREPARE, nvram=[len(file.data) for file in self._definition.files])
            self._moved.overlays = prepared.overlays
            self._start(there, prepared, shipped)
            switch = switch_seconds(self._rehearse(there))
            self._compare_clocks(there)
            limit = check_pause(
                max_downtime=self._request.max_downtime,
                switch=switch,
                round_trip=there.round_trip,
                dirty_rate=measured_dirty_rate(self._outgoing.monitor),
                link_rate=self._request.bandwidth or link_rate(shipped),
                auto_converge=self._request.auto_converge,
                subject=self._guest.name,
            )
            far = [Path(prepared.directory) / name for name in (NBD, RAM)]
            give_access(record.directory, self._process)
            nbd, ram = stack.enter_context(self._endpoint.forwarded(far, record.directory))
            chains = [stack.enter_context(opened(record.request, each.moved)) for each in record.disks]
            self._outgoing.mirror(nbd, speed=self._request.bandwidth or 0)
            check_same_layers(self._guest, record)
            self._outgoing.wait_until_mirrored(self._report_mirrors(there))
            self._outgoing.send_memory(
                ram,
                pause_limit=first_pause(limit),
                bandwidth=self._request.bandwidth,
                auto_converge=self._request.auto_converge,
            )
            with urgent():  # it mostly waits, until the guest is paused and waits for it
                last = self._outgoing.wait_for_switchover(self._watch_memory(there, limit))
                rest = last.remaining + self._check_rest(last, limit)
                self._moved.predicted = switch + (rest / last.rate if last.rate else 0.0)
                with held_back():
                    self._switch(there, chains, record)
                    there.stop()

    @contextmanager
    def _goes_on_at_once(self, record: MoveRecord) -> Iterator[None]:
        """Where it fails before the destination was asked, the guest need not wait until all connections are closed."""
        try:
            yield
        except BaseException:
            if live_settle.record_of(self._found).stage == "moving":
                with held_back(), suppress(SnapchainError):  # it is done again, and reported, by `_settle`
                    self._outgoing.undo(record.capabilities, record.limits, seconds=_GIVE_UP_SECONDS)
            raise

    def _rehearse(self, there: GuestMove) -> float:
        """Seconds that the destination's work takes now, with the way there and back, when nothing delays it."""
        took = []
        with urgent():  # as in the pause
            for _ in range(_LOOKS):
                time.sleep(_REST_SECONDS)
                begun = time.monotonic()
                there.step(MoveStep.LOOK)
                took.append(time.monotonic() - begun)
        return min(took)

    def _compare_clocks(self, there: GuestMove) -> None:
        self._moved.clock_ahead = there.clock_ahead
        if abs(there.clock_ahead) >= _CLOCKS_APART:
            words = f"its clock is {abs(there.clock_ahead):.1f} s {'ahead of' if there.clock_ahead > 0 else 'behind'}"
            why = "a guest that takes its time from the host sees time jump when it moves; see that both run NTP"
            self._on_event(Notice.of(self._endpoint.url, f"{words} the clock here: {why}"))

    def _start(self, there: GuestMove, prepared: Moving, shipped: SetReport) -> None:
        """Start the QEMU at the destination, and check that it is the same machine."""
        directory = Path(prepared.directory)
        record = self._moved.record
        overlays = dict(zip((each.name for each in record.disks), prepared.overlays, strict=True))
        if self._request.command:
            qmp = directory / _QMP
            argv = ["env", *_facts(record, overlays, prepared, qmp), *self._request.command]
            started_in = None
        else:
            files = {name: Path(path) for name, path in overlays.items()}
            made = self._command(files, [Path(path) for path in prepared.nvram], directory)
            argv, qmp = list(made.argv), made.qmp
            place = QemuFiles(self._process[0]).directory if self._process is not None else None
            started_in = None if place is None else str(place)
        self._moved.qmp = str(qmp)
        started = there.step(MoveStep.START, argv=argv, directory=started_in, qmp=str(qmp))
        check_destination(
            started,
            self._definition,
            version=version_of(self._outgoing.monitor),
            view=machine_view(self._outgoing.monitor),
            cpu=cpu_digest(),
            bytes_left=shipped.bytes_left,
            subject=self._endpoint.url,
        )

    def _command(self, overlays: Mapping[str, Path], nvram: Sequence[Path], directory: Path) -> IncomingCommand:
        """That of the QEMU there, from the one here. Raises Unsupported for what it cannot have there."""
        argv, qmp = self._definition.argv, self._guest.address.qmp
        assert argv is not None
        assert qmp is not None
        changes = Changes(
            disks={name: NewDisk(path, "qcow2") for name, path in overlays.items()},
            old_paths={disk.name: named_path(argv, disk) for disk in self._guest.disks() if disk.name in overlays},
            nvram={file.name: path for file, path in zip(self._definition.files, nvram, strict=True)},
            directory=directory,
        )
        made = change_for_incoming(argv, changes, monitor=qmp.absolute(), subject=self._guest.name)
        if made.lacking:
            raise Unsupported("; ".join(made.lacking), subject=self._guest.name, hint="give --start-command")
        return made

    def _report_mirrors(self, there: GuestMove) -> Callable[[int, int], bool]:
        watch = MirrorWatch(subject=self._guest.name)

        def on_look(done: int, total: int) -> bool:
            there.keep_alive()
            self._on_event(Progress("mirror", min(done, total), total))
            return watch.look(done, total)

        return on_look

    def _watch_memory(self, there: GuestMove, limit: float) -> Callable[[MemoryLook], None]:
        """Reports each look; raises Conflict, with the figures, where more rounds bring the pause no nearer."""
        watch = MemoryWatch(
            limit=limit,
            max_downtime=self._request.max_downtime,
            auto_converge=self._request.auto_converge,
            subject=self._guest.name,
            allow=self._outgoing.allow_pause,
        )
        furthest = 0

        def on_look(look: MemoryLook) -> None:
            nonlocal furthest
            there.keep_alive()
            furthest = max(furthest, look.transferred)
            if look.total:
                self._on_event(Progress(f"memory, round {look.round}", furthest, furthest + look.remaining))
            watch.look(round=look.round, left=look.remaining, dirty_rate=look.dirty_rate, rate=look.rate)

        return on_look

    def _check_rest(self, look: MemoryLook, limit: float) -> int:
        """Bytes that the mirrors are behind.

        Raises Conflict where that is so much that the guest, which is paused by now, would wait.
        """
        left = self._outgoing.mirrors_left()
        if left > max(SMALL_REST, limit * look.rate):
            raise Conflict(
                f"the guest writes faster to its disks than the link carries: {left} bytes were left when it was "
                f"paused, at {per_second(look.rate)}, and --max-downtime is {self._request.max_downtime:g}",
                subject=self._guest.name,
                hint="wait for a quieter hour, or allow a longer pause",
            )
        return left

    def _switch(self, there: GuestMove, chains: Sequence[ImageChain], record: MoveRecord) -> None:
        """The guest is paused. A signal that comes now waits until it runs again."""
        outgoing, patience = self._outgoing, _SWITCH_SECONDS + self._request.max_downtime
        try:
            with ThreadPoolExecutor(1) as beside:  # neither waits for the other: QEMU sends, and this writes
                marked = beside.submit(self._mark, chains, record)
                outgoing.end_mirrors(seconds=patience)
                outgoing.switch_over(seconds=patience)
                marked.result()
        except BaseException:
            with suppress(SnapchainError):  # else `settle` does it, when it has asked the destination
                self._unmark(record)
            raise
        running = there.step(MoveStep.GIVE_AND_RUN)
        stopped = outgoing.monitor.time_of("STOP")
        if stopped is not None and running.resumed is not None:
            self._moved.pause = max(0.0, running.resumed - there.clock_ahead - stopped)
        self._found = live_settle.restaged(self._found, "switched")
        with suppress(SnapchainError):  # it is only for the report
            memory = look_at_memory(outgoing.monitor)
            self._moved.memory_bytes, self._moved.memory_rounds = memory.transferred, memory.round
            self._moved.memory_rate = memory.rate
        live_settle.end_source(outgoing.monitor, self._process, record)
        self._moved.fenced = live_settle.fence_all(record)
        run_directory.remove(record.directory)
        run_directory.remove_of(outgoing.monitor.path)  # where that QEMU had come here by a move, too
        journal.remove(self._found.path)

    def _mark(self, chains: Sequence[ImageChain], record: MoveRecord) -> None:
        """All that must be on the disk here before the destination may be asked."""
        self._found = live_settle.restaged(self._found, "switching")
        for chain, each in zip(chains, record.disks, strict=True):
            ownership.fence(chain, each.mark, top_only=True)

    def _unmark(self, record: MoveRecord) -> None:
        """It was not asked, so the guest can go on here without its answer."""
        live_settle.unfence_all(record)
        self._found = live_settle.restaged(self._found, "moving")


def named_path(argv: Sequence[str], disk: GuestDisk) -> str:
    """The path of the layer that a command line names; QEMU was started on it, and snapshots lie on it since."""
    paths = [str(layer.path) for layer in reversed(disk.chain) if layer.path is not None]
    return next((path for path in paths if any(path in word for word in argv)), "")


def give_access(directory: Path, process: tuple[int, int] | None) -> None:
    """Let the user of QEMU reach the sockets in a directory of ours."""
    if process is not None:
        run_directory.give_to(directory, Path(f"/proc/{process[0]}").stat().st_uid)


def _facts(record: MoveRecord, overlays: dict[str, str], prepared: Moving, qmp: Path) -> Iterator[str]:
    """For a command of the user's: it must start QEMU with -S -incoming defer, on these files, with this monitor."""
    yield f"SNAPCHAIN_DIRECTORY={prepared.directory}"
    yield f"SNAPCHAIN_QMP={qmp}"
    yield f"SNAPCHAIN_DISKS={len(record.disks)}"
    for number, each in enumerate(record.disks, 1):
        yield f"SNAPCHAIN_DISK_{number}={each.name}"
        yield f"SNAPCHAIN_OVERLAY_{number}={overlays[each.name]}"
    for number, path in enumerate(prepared.nvram, 1):
        yield f"SNAPCHAIN_NVRAM_{number}={path}"
