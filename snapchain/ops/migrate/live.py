"""migrate of a running guest: everything cold goes ahead, then the guest itself, paused for as short as was allowed.

    rounds of seal and ship, as `sync`            the guest runs; nothing here depends on the destination
    overlays there, empty                         record "moving", watchdog
    QEMU there, awaiting                          ended again by the other side when we are gone
    mirrors READY, memory under way               the guest runs, its writes follow at once
    -- paused --                                  mirrors drained, device state sent
    record "switching", tops marked here          from now on only the destination knows which host has the guest
    GIVE: its record says that it has the guest   the one moment that decides
    QEMU here ended, RUN                          -- it runs there --
    record "switched", all files marked, record removed

Up to "switching" anything that fails, and Ctrl-C, ends with the guest running here as before (`live_settle`).
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

from pydantic import JsonValue

from snapchain.errors import Conflict, SnapchainError, Unavailable, Unsupported
from snapchain.guest import journal
from snapchain.guest.address import GuestAddress
from snapchain.guest.disks import active_path, disks_to_protect
from snapchain.guest.protocol import Definition, GuestDisk
from snapchain.guest.qemu_files import QemuFiles
from snapchain.guest.qmp_guest import QmpGuest
from snapchain.guest.qmp_migration import MemoryLook, Outgoing, look_at_memory, measured_dirty_rate, version_of
from snapchain.host import run_directory
from snapchain.host.hooks import missing, run_hook
from snapchain.host.processes import held_back
from snapchain.image import ImageChain
from snapchain.model.convergence import Rules, judge
from snapchain.model.disk_name import LARGEST_EPOCH
from snapchain.model.events import Notice, OnEvent, Progress, ignore
from snapchain.ops.migrate import live_settle
from snapchain.ops.migrate.live_check import (
    check_destination,
    check_guest,
    check_pause,
    per_second,
    switch_seconds,
)
from snapchain.ops.migrate.live_request import (
    AbortReport,
    LiveDisk,
    LiveDiskPlan,
    LivePlan,
    LiveReport,
    LiveRequest,
    SettledMove,
)
from snapchain.ops.migrate.live_settle import MoveRecord, MovingDisk
from snapchain.ops.migrate.live_watchdog import MoveWatchdog
from snapchain.ops.migrate.look import look_at, opened
from snapchain.ops.migrate.ready import active_of, make_overlay
from snapchain.ops.migrate.request import MigrateRequest, Move as MovedImage
from snapchain.ops.restore.changed_definition import Changes, NewDisk
from snapchain.ops.restore.qemu_argv import change_for_incoming
from snapchain.ops.sync.guests import requests_of
from snapchain.ops.sync.request import SetReport
from snapchain.ops.sync.run import check_set, sync_set
from snapchain.replica.client import guest_at
from snapchain.replica.endpoint import GuestEndpoint
from snapchain.replica.guest_client import GuestMove, moving
from snapchain.replica.guest_server import NBD, RAM, cpu_digest
from snapchain.replica.stream.messages import HandedDisk, MoveStep, Moving
from snapchain.source import ownership
from snapchain.source.notes import Given
from snapchain.source.protocol import Scope

_REST_SECONDS = 10.0
"""What the active layers may still hold when the mirrors begin: they copy it while the guest runs."""
_GIVE_UP_SECONDS = 3.0
"""For mirrors to end while their link is still there; where that hangs, they end when it is closed."""
_SWITCH_SECONDS = 10.0
"""How much longer than was allowed each of the two steps of QEMU's switch may take, before they are undone."""
_MEMORY_RULES = Rules(rounds=40, stalled=10, growth=4.0, grace=3)
"""Rounds over the memory without --auto-converge; with it, QEMU throttles the guest a little more each round."""
_THROTTLED_RULES = Rules(rounds=120, stalled=120, growth=1000.0)
_SMALL_REST = 1 << 20
"""Bytes, whatever the rate: that of a few pages of memory says little."""
_MEASURED_BYTES = 16 << 20
_QMP = "qmp"


def plan_live(
    guest: QmpGuest, request: LiveRequest, endpoint: GuestEndpoint, *, on_event: OnEvent = ignore
) -> LivePlan:
    """What `migrate_live` would do; changes nothing on either side. Raises as its checks."""
    request.check()
    disks = disks_to_protect(guest)
    check_guest(guest, Outgoing(guest.monitor, "0" * 32, [disk.name for disk in disks]), disks)
    requests, _ = requests_of(
        guest, prefix=request.prefix, migrating=lambda _: None, image_dirs=request.image_dirs, on_event=on_event
    )
    stands = check_set(requests, endpoint, on_event=on_event)
    return LivePlan(
        guest=guest.name,
        destination=endpoint.url,
        disks=tuple(
            LiveDiskPlan(disk=each.disk, image=each.image, bytes_to_send=each.bytes_to_send, bytes_left=each.bytes_left)
            for each in stands.disks
        ),
        max_downtime=request.max_downtime,
        memory_dirty_rate=measured_dirty_rate(guest.monitor),
    )


def settle_left(guest: QmpGuest, *, is_gone: bool = False, on_event: OnEvent = ignore) -> list[SettledMove]:
    """End what killed runs have left of moves of this guest. Raises as `live_settle.settle`."""
    return [
        live_settle.settle(found, monitor=guest.monitor, is_gone=is_gone, on_event=on_event)
        for found in live_settle.abandoned(guest.name, guest.process())
    ]


def abort(address: GuestAddress, *, is_gone: bool = False, on_event: OnEvent = ignore) -> AbortReport:
    """As `settle_left`, also for a guest whose QEMU has ended."""
    qmp = None if address.qmp is None else str(address.qmp.absolute())
    settled = [
        live_settle.settle(found, is_gone=is_gone, on_event=on_event)
        for found in journal.find(operation=live_settle.OPERATION)[0]
        if found.record.qmp == qmp and found.record.is_abandoned
    ]
    return AbortReport(settled=tuple(settled))


def migrate_live(
    guest: QmpGuest, request: LiveRequest, endpoint: GuestEndpoint, *, on_event: OnEvent = ignore
) -> LiveReport:
    """Move it; all disks or none.

    Raises Conflict, Unsupported or Busy for what stands in the way, before anything is done; Conflict with the figures
    where the pause cannot be kept below the bound; Unavailable for what fails on the way. Then the guest runs here as
    before, unless the error says that only the destination knows.
    """
    begun = time.monotonic()
    request.check()
    for which, hook in (("before", request.before), ("after", request.after)):
        if hook and (fault := missing(which, hook)):
            raise fault
    for settled in settle_left(guest, on_event=on_event):
        on_event(Notice.of(guest.name, f"an interrupted migration was ended first: {settled.says}"))
        if settled.moved:
            raise Conflict(
                f"an interrupted migration has ended now: {settled.says}", subject=f"{guest.name} at {endpoint.url}"
            )
    token = secrets.token_hex(16)
    disks = disks_to_protect(guest)
    outgoing = Outgoing(guest.monitor, token, [disk.name for disk in disks])
    definition = check_guest(guest, outgoing, disks)
    if definition.argv is None and not request.command:
        raise Unsupported("; ".join(definition.unreadable), subject=guest.name, hint="or give --start-command")
    facts = {"guest": guest.name, "destination": endpoint.url, "disks": len(disks)}
    if request.before:
        run_hook("before", request.before, facts)
    shipped = _ship(guest, request, endpoint, on_event)
    work = _Work(guest, request, endpoint, token, outgoing, definition, on_event)
    moved = work.run(_prepare(guest, request, endpoint, token, on_event), shipped)
    report = moved.report(shipped, seconds=time.monotonic() - begun)
    if request.after:
        run_hook("after", request.after, {**facts, "pause": report.pause, "qmp": report.qmp})
    return report


# --- Before the move.


def _ship(guest: QmpGuest, request: LiveRequest, endpoint: GuestEndpoint, on_event: OnEvent) -> SetReport:
    """Seal and ship in rounds. Raises Conflict, with the figures, where the guest writes faster than it goes."""
    requests, sealer = requests_of(
        guest,
        prefix=request.prefix,
        migrating=lambda _: None,
        labels=request.labels,
        divergence=request.divergence,
        image_dirs=request.image_dirs,
        limit_rate=request.bandwidth,
        rounds=request.rounds,
        target_downtime=_REST_SECONDS,
        on_event=on_event,
    )
    disks = disks_to_protect(guest)
    named = [
        replace(each, overlay_name=_overlay_name(disk.name, _epoch_here(guest, disk, request)))
        for each, disk in zip(requests, disks, strict=True)
    ]
    report = sync_set(named, endpoint, sealer=sealer, on_event=on_event)
    if not report.ready:
        missing_layers = [what for disk in report.disks for what in disk.missing]
        raise Conflict(f"the destination is not ready: {'; '.join(missing_layers)}", subject=endpoint.url)
    if report.on_target is False:
        raise Conflict(
            f"the guest writes faster to its disks than the link carries: {report.bytes_left} bytes are left after "
            f"{len(report.disks[0].rounds)} rounds, at {per_second(report.rate or 0)}",
            subject=guest.name,
            hint="wait for a quieter hour, or raise --bandwidth",
        )
    return report


def _epoch_here(guest: QmpGuest, disk: GuestDisk, request: LiveRequest) -> int:
    move = MovedImage(active_path(disk, guest=guest), "disk")
    return look_at(MigrateRequest(moves=[move], running=True, image_dirs=_image_dirs([move], request)), move).epoch


def _overlay_name(disk: str, epoch: int) -> str:
    """Another one after each handover: a disk that comes back finds the old one in its place."""
    return f"{disk}-{epoch + 1}.qcow2"


def _image_dirs(moves: Sequence[MovedImage], request: LiveRequest) -> tuple[Path, ...]:
    return (*request.image_dirs, *dict.fromkeys(move.image.parent for move in moves))


def _prepare(
    guest: QmpGuest, request: LiveRequest, endpoint: GuestEndpoint, token: str, on_event: OnEvent
) -> MoveRecord:
    """Have the overlays made; what is recorded of the move."""
    disks = disks_to_protect(guest)
    name = request.prefix or guest.name
    moves = [MovedImage(active_path(disk, guest=guest), f"{name}/{disk.name}") for disk in disks]
    images = MigrateRequest(
        moves=moves, running=True, divergence=request.divergence, image_dirs=_image_dirs(moves, request)
    )
    images.check()
    overlays, epochs = [], []
    for disk, move in zip(disks, moves, strict=True):
        look = look_at(images, move)
        with opened(images, move) as chain:
            ownership.check_not_given(chain)
            ownership.check_can_be_given(chain, image_dirs=images.image_dirs)
        file = _overlay_name(disk.name, look.epoch)
        overlay, there = make_overlay(images, move, look, Scope.SEALED, endpoint, on_event, name=file)
        overlays.append(overlay)
        epochs += [look.epoch, there]
    # One for all its disks: the guest has one master.
    standing, _ = guest_at(endpoint, name)
    epoch = max(*epochs, standing.epoch) + 1
    if epoch + 1 > LARGEST_EPOCH:
        raise Unsupported(f"its epoch is {epoch - 1}, and there is none after it", subject=guest.name)
    found = []
    for disk, move, overlay in zip(disks, moves, overlays, strict=True):
        mark = Given(
            destination=endpoint.url,
            disk=move.disk,
            epoch=epoch,
            token=token,
            time=datetime.now(UTC),
            overlay=overlay,
            together=tuple(each.disk for each in moves),
        )
        handed = HandedDisk(disk=move.disk, epoch=epoch, overlay=active_of(overlay))
        found.append(MovingDisk(name=disk.name, image=move.image, handed=handed, mark=mark))
    return MoveRecord(
        token=token,
        destination=endpoint.url,
        name=name,
        disks=tuple(found),
        stage="moving",
        directory=run_directory.base() / "none",
        capabilities={},
        image_dirs=images.image_dirs,
    )


# --- The move.


@dataclass(slots=True)
class _Moved:
    """What was done, for the report."""

    record: MoveRecord
    guest: str
    max_downtime: float
    qmp: str = ""
    overlays: tuple[str, ...] = ()
    fenced: list[tuple[Path, ...]] = field(default_factory=list)
    memory: MemoryLook | None = None
    predicted: float = 0.0
    pause: float | None = None

    def report(self, shipped: SetReport, *, seconds: float) -> LiveReport:
        memory = self.memory
        return LiveReport(
            guest=self.guest,
            destination=self.record.destination,
            token=self.record.token,
            qmp=self.qmp,
            disks=tuple(
                LiveDisk(
                    disk=each.mark.disk,
                    image=str(each.image),
                    epoch=each.mark.epoch,
                    overlay=overlay,
                    fenced=tuple(map(str, fenced)),
                )
                for each, overlay, fenced in zip(self.record.disks, self.overlays, self.fenced, strict=True)
            ),
            bytes_sent=sum(disk.bytes_sent for disk in shipped.disks),
            memory_bytes=0 if memory is None else memory.transferred,
            memory_rounds=0 if memory is None else memory.round,
            memory_rate=0.0 if memory is None else memory.rate,
            predicted_pause=self.predicted,
            pause=self.pause,
            pause_within=None if self.pause is None else self.pause <= self.max_downtime,
            max_downtime=self.max_downtime,
            seconds=seconds,
        )


class _Work:
    """One move, from its record on."""

    def __init__(
        self,
        guest: QmpGuest,
        request: LiveRequest,
        endpoint: GuestEndpoint,
        token: str,
        outgoing: Outgoing,
        definition: Definition,
        on_event: OnEvent,
    ) -> None:
        self._guest, self._request, self._endpoint, self._token = guest, request, endpoint, token
        self._outgoing, self._definition, self._on_event = outgoing, definition, on_event
        self._process = guest.process()

    def run(self, record: MoveRecord, shipped: SetReport) -> _Moved:
        """Do it. Where it fails, it is undone before the error is raised."""
        directory = run_directory.make(f"{self._guest.name}-out", self._token)
        record = record.model_copy(update={"directory": directory, "capabilities": self._outgoing.capabilities()})
        self._moved = _Moved(record, self._guest.name, self._request.max_downtime)
        values: dict[str, JsonValue] = record.model_dump(mode="json")
        begun = journal.begun(self._guest, live_settle.OPERATION, **values)
        self._found = journal.Found(journal.write(begun), begun)
        watchdog = MoveWatchdog(self._found.path)
        try:
            with self._undone_on_error():
                self._move(record, shipped)
        finally:
            watchdog.release()
        return self._moved

    @contextmanager
    def _undone_on_error(self) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            with held_back():
                self._settle(error)
            raise

    def _settle(self, error: BaseException) -> None:
        if not self._found.path.exists():
            return  # it was done; a signal came after that
        try:
            settled = live_settle.settle(self._found, monitor=self._guest.monitor, on_event=self._on_event)
        except SnapchainError as fault:
            words = f"the migration could not be ended, and the next run, or --abort, does that: {fault}"
            self._on_event(Notice.of(self._guest.name, words))
            if isinstance(error, SnapchainError):
                error.hint = fault.hint
        else:
            self._on_event(Notice.of(self._guest.name, f"the migration was given up: {settled.says}"))

    def _move(self, record: MoveRecord, shipped: SetReport) -> None:
        with ExitStack() as stack:
            there = stack.enter_context(moving(self._endpoint, record.what))
            stack.enter_context(self._goes_on_at_once(record))
            prepared = there.step(MoveStep.PREPARE)
            self._moved.overlays = prepared.overlays
            self._start(there, prepared, shipped)
            asked = time.monotonic()
            there.step(MoveStep.LOOK)
            round_trip = time.monotonic() - asked
            limit = check_pause(
                max_downtime=self._request.max_downtime,
                round_trip=round_trip,
                dirty_rate=measured_dirty_rate(self._outgoing.monitor),
                link_rate=self._request.bandwidth or _link_rate(shipped),
                auto_converge=self._request.auto_converge,
                subject=self._guest.name,
            )
            far = [Path(prepared.directory) / name for name in (NBD, RAM)]
            give_access(record.directory, self._process)
            nbd, ram = stack.enter_context(self._endpoint.forwarded(far, record.directory))
            chains = [
                stack.enter_context(opened(record.request, MovedImage(each.image, each.mark.disk)))
                for each in record.disks
            ]
            self._outgoing.mirror(nbd, speed=self._request.bandwidth or 0)
            self._check_same_layers(record)
            self._outgoing.wait_until_mirrored(self._report_mirrors(there))
            self._outgoing.send_memory(
                ram,
                pause_limit=limit,
                bandwidth=self._request.bandwidth,
                auto_converge=self._request.auto_converge,
            )
            last = self._outgoing.wait_for_switchover(self._watch_memory(there, limit))
            rest = last.remaining + self._check_rest(last, limit)
            self._moved.predicted = switch_seconds(round_trip) + (rest / last.rate if last.rate else 0.0)
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
                    self._outgoing.undo(record.capabilities, seconds=_GIVE_UP_SECONDS)
            raise

    def _start(self, there: GuestMove, prepared: Moving, shipped: SetReport) -> None:
        """Start the QEMU at the destination, and check that it is the same machine."""
        directory = Path(prepared.directory)
        record = self._moved.record
        overlays = dict(zip((each.name for each in record.disks), prepared.overlays, strict=True))
        if self._request.command:
            qmp = directory / _QMP
            argv = ["env", *_facts(record, overlays, directory, qmp), *self._request.command]
            started_in = None
        else:
            changes = Changes(
                disks={name: NewDisk(Path(path), "qcow2") for name, path in overlays.items()},
                old_paths={each.name: str(each.image) for each in record.disks},
                directory=directory,
            )
            assert self._definition.argv is not None
            assert self._guest.address.qmp is not None
            made = change_for_incoming(
                self._definition.argv,
                changes,
                monitor=self._guest.address.qmp.absolute(),
                subject=self._guest.name,
            )
            if made.lacking:
                raise Unsupported("; ".join(made.lacking), subject=self._guest.name, hint="give --start-command")
            argv, qmp = list(made.argv), made.qmp
            place = QemuFiles(self._process[0]).directory if self._process is not None else None
            started_in = None if place is None else str(place)
        self._moved.qmp = str(qmp)
        started = there.step(MoveStep.START, argv=argv, directory=started_in, qmp=str(qmp))
        check_destination(
            started,
            self._definition,
            version=version_of(self._outgoing.monitor),
            cpu=cpu_digest(),
            bytes_left=shipped.bytes_left,
            subject=self._endpoint.url,
        )

    def _check_same_layers(self, record: MoveRecord) -> None:
        """Raises Conflict where a layer was sealed since the overlays were made: the mirrors would leave it out.

        From the mirrors on QEMU refuses that.
        """
        now = {disk.name: disk for disk in disks_to_protect(self._guest)}
        for each in record.disks:
            disk = now.get(each.name)
            if disk is None or active_path(disk, guest=self._guest) != each.image:
                raise Conflict(
                    "a snapshot of it was taken while it was being prepared",
                    subject=f"{self._guest.name}/{each.name}",
                    hint="run it again",
                )
        if set(now) != {each.name for each in record.disks}:
            raise Conflict("it has got another disk meanwhile", subject=self._guest.name, hint="run it again")

    def _report_mirrors(self, there: GuestMove) -> Callable[[int, int], None]:
        def on_look(done: int, total: int) -> None:
            there.keep_alive()
            self._on_event(Progress("mirror", min(done, total), total))

        return on_look

    def _watch_memory(self, there: GuestMove, limit: float) -> Callable[[MemoryLook], None]:
        """Reports each look; raises Conflict, with the figures, where more rounds bring the pause no nearer."""
        left: list[int] = []
        seen, furthest = 0, 0
        rules = _THROTTLED_RULES if self._request.auto_converge else _MEMORY_RULES

        def on_look(look: MemoryLook) -> None:
            nonlocal seen, furthest
            there.keep_alive()
            furthest = max(furthest, look.transferred)
            if look.total:
                self._on_event(Progress(f"memory, round {look.round}", furthest, furthest + look.remaining))
            if look.round == seen or look.round < 2:
                return
            seen = look.round
            left.append(look.remaining)
            verdict = judge(left, int(limit * look.rate), rules)
            if verdict.ends and look.remaining > limit * look.rate:
                raise Conflict(
                    f"after {look.round} rounds {look.remaining} bytes of memory are left, the guest dirties "
                    f"{per_second(look.dirty_rate)}, and the link carries {per_second(look.rate)}: a pause within "
                    f"--max-downtime {self._request.max_downtime:g} is not in reach ({verdict.value})",
                    subject=self._guest.name,
                    hint="--auto-converge slows the guest down until it is; or allow a longer pause",
                )

        return on_look

    def _check_rest(self, look: MemoryLook, limit: float) -> int:
        """Bytes that the mirrors are behind. Raises Conflict where the mirrors are so far behind that the guest, which is paused by now, would wait."""
        left = self._outgoing.mirrors_left()
        if left > max(_SMALL_REST, limit * look.rate):
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
            self._unmark(record)
            raise
        asked = time.time()
        running = there.step(MoveStep.GIVE_AND_RUN)
        answered = time.time()
        stopped = outgoing.monitor.time_of("STOP")
        if stopped is not None and running.resumed is not None:
            # The other host's clock, as it was in the middle between the question and its answer.
            ahead = running.clock - (asked + answered) / 2
            self._moved.pause = max(0.0, running.resumed - ahead - stopped)
        self._found = live_settle.restaged(self._found, "switched")
        with suppress(SnapchainError):  # it is for the report
            self._moved.memory = look_at_memory(outgoing.monitor)
        live_settle.end_source(outgoing.monitor, self._process, record)
        self._moved.fenced = live_settle.fence_all(record)
        run_directory.remove(record.directory)
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


def _link_rate(shipped: SetReport) -> float | None:
    """Bytes a second, where so much was shipped that its time was spent on the wire."""
    return shipped.rate if sum(disk.bytes_sent for disk in shipped.disks) >= _MEASURED_BYTES else None


def give_access(directory: Path, process: tuple[int, int] | None) -> None:
    """Let the user of QEMU reach the sockets in a directory of ours."""
    if process is not None:
        run_directory.give_to(directory, Path(f"/proc/{process[0]}").stat().st_uid)


def _facts(record: MoveRecord, overlays: dict[str, str], directory: Path, qmp: Path) -> Iterator[str]:
    """For a command of the user's: it must start QEMU with -S -incoming defer, on these files, with this monitor."""
    yield f"SNAPCHAIN_DIRECTORY={directory}"
    yield f"SNAPCHAIN_QMP={qmp}"
    yield f"SNAPCHAIN_DISKS={len(record.disks)}"
    for number, each in enumerate(record.disks, 1):
        yield f"SNAPCHAIN_DISK_{number}={each.name}"
        yield f"SNAPCHAIN_OVERLAY_{number}={overlays[each.name]}"
