"""How a live migration ends, whoever has died: at the source by its journal, at the destination by its record.

    stage        what may have happened there             which host has the guest
    moving       it was never asked to take the guest     the source
    switching    it may have been asked, and have it      as its record says, and nothing else
    switched     it has it                                the destination

The stage is on the disk before the step that it names.  After the destination was asked, the guest goes on at the
source only when the destination has ended its own QEMU, and will not take the guest any more.  The destination runs
the guest only after it has recorded that.  In between the guest is paused on both sides, and nothing is guessed.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from enum import Enum
from pathlib import Path
from typing import Literal, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from snapchain.destinations import replica_at
from snapchain.errors import Busy, Conflict, Corrupt, NotFound, SnapchainError, Unavailable
from snapchain.guest import journal
from snapchain.guest.qmp import Monitor
from snapchain.guest.qmp_migration import Outgoing
from snapchain.host import run_directory
from snapchain.host.process_identity import boot_id, still_runs
from snapchain.model.events import Notice, OnEvent, ignore
from snapchain.ops.migrate.live_request import SettledMove
from snapchain.ops.migrate.look import opened
from snapchain.ops.migrate.request import MigrateRequest, Move as MovedImage
from snapchain.replica.guest_client import MovingGuest, moving
from snapchain.replica.stream.guest_messages import HandedDisk, MoveStep, Moving, MovingDomain
from snapchain.source import ownership
from snapchain.source.notes import Given

OPERATION = "migration"
"""Of the journal's records."""
ASK_SECONDS = 90.0
"""For a question whose answer decides: longer than the other side needs to give up a peer that is silent."""
TELL_SECONDS = 10.0
"""For an end that the other side comes to by itself, too."""
_QUIT_SECONDS = 10.0
_POLL_SECONDS = 0.005
_AGAIN_SECONDS = 1.0
Answer = TypeVar("Answer")


class MovingDisk(BaseModel):
    """One disk of a move. name: in the guest; image: its active layer here, in its format; handed: as is asked there"""

    model_config = ConfigDict(frozen=True, extra="ignore")

    name: str
    image: Path
    format: str | None = None
    handed: HandedDisk
    mark: Given

    @property
    def moved(self) -> MovedImage:
        """For opening it."""
        return MovedImage(self.image, self.mark.disk, self.format)


class LeavingRecord(BaseModel):
    """What is recorded of a domain of libvirt. is_lasting: whether it has a definition that lasts

    max_downtime: libvirt's bound before the move, milliseconds; starts_with_host: libvirt starts it at boot
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    name: str
    uuid: str
    is_lasting: bool
    max_downtime: int
    starts_with_host: bool = False


class MoveRecord(BaseModel):
    """What the journal records of a move.

    name: of the guest at the destination; directory: of the sockets here; capabilities: of the source, as before
    domain: of libvirt, None for a bare QEMU
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    token: str
    destination: str
    name: str
    disks: tuple[MovingDisk, ...]
    stage: Literal["moving", "switching", "switched"]
    directory: Path
    capabilities: dict[str, bool] = {}
    domain: LeavingRecord | None = None
    image_dirs: tuple[Path, ...] = ()

    @property
    def request(self) -> MigrateRequest:
        """For opening the images."""
        moves = [each.moved for each in self.disks]
        return MigrateRequest(moves=moves, running=True, image_dirs=self.image_dirs)

    @property
    def names(self) -> list[str]:
        """Of the disks, in the guest."""
        return [each.name for each in self.disks]

    @property
    def what(self) -> MovingGuest:
        """As the destination is told."""
        of = self.domain
        domain = None if of is None else MovingDomain(name=of.name, uuid=of.uuid, starts_with_host=of.starts_with_host)
        return MovingGuest(self.token, self.name, [each.handed for each in self.disks], self.names, domain)


class Verdict(Enum):
    """What is to be done with a move that was interrupted."""

    STAY = "stay"
    """The guest goes on here; there everything is ended first."""
    COMPLETE = "complete"
    """It is not given, but only its QEMU there can go on with it: give it, then as MOVED; if it is refused, STAY."""
    MOVED = "moved"
    """The guest is the destination's."""
    UNKNOWN = "unknown"
    """Only the destination knows, and it does not answer."""


def judge(stage: str, there: Moving | None, *, runs_here: bool) -> Verdict:
    """Who has the guest. there: how the move stands at the destination, None without an answer

    runs_here: whether the QEMU here, with the guest's memory, still is there
    """
    if stage == "moving":
        return Verdict.STAY
    if stage == "switched":
        return Verdict.MOVED
    if there is None:
        return Verdict.UNKNOWN
    # Without a record of the move, a guest that was given has run there.
    never_ran = there.directory != "" and not there.ran
    if there.given:
        return Verdict.STAY if never_ran and not there.alive and runs_here else Verdict.MOVED
    # Where its memory is lost here, and there whole, that is the better copy.
    return Verdict.COMPLETE if there.alive and not runs_here else Verdict.STAY


def record_of(found: journal.Found) -> MoveRecord:
    """The details of a record. Raises Corrupt for one of another shape."""
    try:
        return MoveRecord.model_validate(found.record.details)
    except ValidationError as error:
        raise Corrupt("not the record of a migration", subject=found.path, hint="remove it") from error


def current(found: journal.Found) -> journal.Found | None:
    """The record as it is now; None where it is gone."""
    return next((each for each in journal.find(operation=OPERATION)[0] if each.path == found.path), None)


def restaged(found: journal.Found, stage: Literal["moving", "switching", "switched"]) -> journal.Found:
    """The record with another stage, durably."""
    details = {**found.record.details, "stage": stage}
    record = found.record.model_copy(update={"details": details})
    journal.replace(found.path, record)
    return journal.Found(found.path, record)


def settle(
    found: journal.Found, *, monitor: Monitor | None = None, is_gone: bool = False, on_event: OnEvent = ignore
) -> SettledMove:
    """End a move that was interrupted, from whatever stage.

    monitor: of the guest here, where one is open; is_gone: a user vouches that the destination never runs the guest
    Raises Unavailable when only the destination knows who has the guest, and it does not answer: the guest is paused
    then, and the record stays.
    """
    record = record_of(found)
    if record.domain is not None:
        from snapchain.ops.migrate.live_domain import settle_domain  # inside: it builds on this

        return settle_domain(found, is_gone=is_gone, on_event=on_event)
    ours = None
    try:
        if monitor is None or found.record.qemu_runs is False:
            monitor = ours = _monitor_of(found)
        end = _End(found, record, monitor, on_event)
        there = None
        if record.stage == "switching" and not is_gone:
            there = end.ask(ASK_SECONDS)
        verdict = judge(record.stage, there, runs_here=monitor is not None)
        if is_gone and record.stage == "switching":
            verdict = Verdict.STAY
        match verdict:
            case Verdict.UNKNOWN:
                raise Unavailable(
                    "the destination does not answer, and only it knows whether it has the guest; the guest is paused",
                    subject=record.destination,
                    hint="bring the link up, then run it again, or with --abort; if that host is gone for good, say "
                    "--abort --destination-is-gone",
                )
            case Verdict.STAY:
                return end.stay(there, is_gone=is_gone)
            case Verdict.COMPLETE if not end.give():
                return end.stay(there, is_gone=False)
            case _:
                return end.moved()
    finally:
        if ours is not None:
            ours.close()


def _monitor_of(found: journal.Found) -> Monitor | None:
    """None where the QEMU here has ended."""
    if found.record.qemu_runs is False:
        return None
    assert found.record.qmp is not None
    try:
        return Monitor(Path(found.record.qmp))
    except (NotFound, Unavailable):
        if found.record.qemu_runs:
            raise
        return None


class _End:
    def __init__(self, found: journal.Found, record: MoveRecord, monitor: Monitor | None, on_event: OnEvent) -> None:
        self._found, self._record, self._monitor, self._on_event = found, record, monitor, on_event
        self._endpoint = replica_at(record.destination)

    def ask(self, seconds: float) -> Moving | None:
        """How the move stands there; None without an answer: a replica that is not there is none."""
        with suppress(Unavailable, Busy, NotFound):
            return persisted(lambda: self._step(MoveStep.LOOK), seconds)
        return None

    def stay(self, there: Moving | None, *, is_gone: bool) -> SettledMove:
        """The guest goes on here."""
        record = self._record
        was_asked = record.stage == "switching"
        if was_asked and not is_gone:
            persisted(lambda: self._step(MoveStep.END), ASK_SECONDS)
        elif not is_gone and self._monitor is not None:
            # Never asked to take the guest, it cannot run it: the guest here need not wait for it.
            self._go_on()
            self._tell_end()
        elif not is_gone:
            self._tell_end()
        if was_asked:
            # Where it had been given, its disks there are an epoch further by now.
            unfence_all(record, was_given=is_gone or (there is not None and there.given))
        if self._monitor is not None:
            self._go_on()
        words = "it goes on here, as before" if self._monitor is not None else "its QEMU here has ended; start it here"
        return self._done(moved=False, says=words)

    def give(self) -> bool:
        """Whether the destination has taken the guest now; not where it has not got all of its memory."""
        try:
            return self._step(MoveStep.GIVE).given
        except Conflict:
            return False

    def moved(self) -> SettledMove:
        """The guest is the destination's."""
        with moving(self._endpoint, self._record.what) as move:
            self._found = restaged(self._found, "switched")
            if self._monitor is not None:
                end_source(self._monitor, self._found.record.process, self._record)
                self._monitor.close()
            there = move.step(MoveStep.LOOK)
            if there.directory and there.alive:
                # Also where it may have run: "ran" is recorded before `cont`, and the record goes after it.
                there = move.step(MoveStep.RUN)
            is_lost = bool(there.directory) and not there.alive and not there.ran
            move.stop()
        fence_all(self._record)
        lost = "the QEMU that had got it has ended: start it there on the overlays of its disks"
        return self._done(moved=True, says=lost if is_lost else "it is the destination's")

    def _go_on(self) -> None:
        assert self._monitor is not None
        outgoing = Outgoing(self._monitor, self._record.token, self._record.names)
        outgoing.undo(self._record.capabilities)

    def _tell_end(self) -> None:
        try:
            persisted(lambda: self._step(MoveStep.END), TELL_SECONDS)
        except SnapchainError as error:
            words = f"it was not told that the guest stays, and ends by itself what was made there: {error}"
            self._on_event(Notice.of(self._record.destination, words))

    def _done(self, *, moved: bool, says: str) -> SettledMove:
        run_directory.remove(self._record.directory)
        if moved and self._found.record.qmp is not None:
            run_directory.remove_of(Path(self._found.record.qmp))
        journal.remove(self._found.path)
        guest = self._found.record.guest
        return SettledMove(guest=guest, destination=self._record.destination, moved=moved, says=says)

    def _step(self, step: MoveStep) -> Moving:
        with moving(self._endpoint, self._record.what) as move:
            there = move.step(step)
            move.stop()
        return there


def end_source(monitor: Monitor, process: tuple[int, int] | None, record: MoveRecord) -> None:
    """End the QEMU here, whose guest is the destination's, and wait for it. Raises Unavailable where it stays."""
    Outgoing(monitor, record.token, record.names).quit()
    boot = boot_id()
    until, killed = time.monotonic() + _QUIT_SECONDS, False
    while _is_there(monitor, process, boot):
        if time.monotonic() >= until:
            if killed or process is None:
                raise Unavailable("the QEMU here does not end", subject=monitor.path, hint="end it; it must not go on")
            # It was told to quit, its images are read-only by now, and the guest waits.
            with suppress(ProcessLookupError, PermissionError):
                os.kill(process[0], signal.SIGKILL)
            until, killed = time.monotonic() + _QUIT_SECONDS, True
        time.sleep(_POLL_SECONDS)


def _is_there(monitor: Monitor, process: tuple[int, int] | None, boot: str) -> bool:
    if process is not None:
        return still_runs(process, boot=boot)
    try:
        monitor.execute("query-status")
    except (NotFound, Unavailable):
        return False
    return True


def fence_all(record: MoveRecord) -> list[tuple[Path, ...]]:
    """Mark all files of the disks, and note that the destination has them; the files, by disk. May be repeated."""
    fenced = []
    for each in record.disks:
        with opened(record.request, each.moved) as chain:
            fenced.append(tuple(ownership.fence(chain, each.mark, image_dirs=record.image_dirs)))
            ownership.confirm(chain, record.token, started=True)
    return fenced


def remove_directories(record: MoveRecord) -> None:
    """Those of its sockets here. May be repeated."""
    run_directory.remove(record.directory)
    if record.domain is not None:
        run_directory.remove(run_directory.for_libvirt(record.token))


def unfence_all(record: MoveRecord, *, was_given: bool = False) -> None:
    """The opposite of `fence_all`. was_given: to the destination, which has ended that. May be repeated."""
    for each in record.disks:
        with opened(record.request, each.moved) as chain:
            ownership.unfence(chain, record.token, epoch=each.mark.epoch + 1 if was_given else 1)


def persisted(attempt: Callable[[], Answer], seconds: float) -> Answer:
    """Try again while the other side does not answer, or is still busy with the stream that was cut."""
    until = time.monotonic() + seconds
    while True:
        try:
            return attempt()
        except (Unavailable, Busy):
            if time.monotonic() + _AGAIN_SECONDS >= until:
                raise
        time.sleep(_AGAIN_SECONDS)


def abandoned(guest: str, process: tuple[int, int] | None) -> Sequence[journal.Found]:
    """The moves of this guest that killed runs have left."""
    return journal.abandoned(guest=guest, process=process, operations=[OPERATION])


__all__ = ["MoveRecord", "MovingDisk", "Verdict", "abandoned", "judge", "settle"]
