"""restore --match PATTERN DEST DIR: all disks and guests of a destination that match, below one directory.

    DIR/web1/vda.qcow2  web1.xml     guest web1, as `restore DEST::web1 DIR/web1` makes it
    DIR/db/vda.qcow2                 disk db/vda, which is of no guest

One that cannot be restored is reported, and the others are restored. No file is replaced. Until everything
is restored, a small note in DIR records which points were chosen, and which files are finished. The next run takes the
same points, even if newer ones have come.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, computed_field

from snapchain.destination.address import in_full
from snapchain.destination.guest_record import guest_of
from snapchain.destination.reading import ReadableDestination
from snapchain.destination.records import DiskRecord
from snapchain.errors import Conflict, NotFound, SnapchainError, Unavailable
from snapchain.host.files import UNCHANGED, Standing, free_bytes, make_directories
from snapchain.host.note_file import NoteFile
from snapchain.host.terminal import shell_word
from snapchain.model.events import Event, OnEvent, Progress, ignore
from snapchain.model.points import chosen_point
from snapchain.ops.guest_points import GuestView, guests_of
from snapchain.ops.restore.cost import RestoreCost, cost_of, total
from snapchain.ops.restore.guest import (
    DiskRestorePlan,
    FinishedFile,
    GuestRestoration,
    GuestRestoreReport,
    GuestRestoreRequest,
    finished_file,
    is_restored,
    is_still,
)
from snapchain.ops.restore.guest_definition import safe_name, unique_name
from snapchain.ops.restore.run import Restoration
from snapchain.ops.restore.target import Format, RestoreReport

_NOTE_NAME = ".snapchain-restore-several"
_NOTE_PURPOSE = "restored-several"
_NOTE_CAP = 64 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class SeveralRequest:
    """directory: where to, made where it is missing; patterns: of disks and guests, as a shell matches names

    point: the text after '@' of an address, for each of them; None for the newest
    format: of all disks, qcow2 by default; standing: owner and mode of the files of disks
    """

    directory: Path
    patterns: tuple[str, ...]
    point: str | None = None
    format: Format | None = None
    standing: Standing = UNCHANGED


class _Shown(BaseModel):
    model_config = ConfigDict(frozen=True)


class FailedRestore(_Shown):
    """A disk or a guest that is not restored. kind, message: of the error"""

    name: str
    kind: str
    message: str
    hint: str | None = None


class PlannedRestore(_Shown):
    """A disk or a guest that would be restored.

    point: of the disk, or guest point; output: a file, or the guest's directory; disks: with their files
    """

    name: str
    is_guest: bool
    point: int
    time: datetime
    output: str
    disks: tuple[DiskRestorePlan, ...]


class SeveralPlan(_Shown):
    """What `run` would do. Sizes in bytes; requests, bytes_to_fetch and seconds are null where they are not known.

    restored_before: by an earlier run, which ended before all was done; bytes_free: where DIR is
    """

    source: str
    directory: str
    items: tuple[PlannedRestore, ...]
    restored_before: tuple[str, ...]
    failed: tuple[FailedRestore, ...]
    bytes_to_write: int
    bytes_free: int
    requests: int | None
    bytes_to_fetch: int | None
    seconds: float | None

    @computed_field  # type: ignore[prop-decorator]
    @property
    def ok(self) -> bool:
        """Whether all of them can be restored."""
        return not self.failed


class SeveralReport(_Shown):
    """What was restored: disks of no guest, and guests. Fields as of SeveralPlan; seconds: it took."""

    source: str
    directory: str
    disks: tuple[RestoreReport, ...]
    guests: tuple[GuestRestoreReport, ...]
    restored_before: tuple[str, ...]
    failed: tuple[FailedRestore, ...]
    bytes_written: int
    bytes_resumed: int
    seconds: float

    @computed_field  # type: ignore[prop-decorator]
    @property
    def ok(self) -> bool:
        """Whether all of them are restored."""
        return not self.failed


class _Note(BaseModel):
    """What a restore of several has chosen and done.

    points: number of the point, by name; begun: what is being restored; done: its files, by name
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: Literal[1] = 1
    source: str
    point: str | None
    points: dict[str, int] = {}
    begun: str | None = None
    done: dict[str, dict[str, FinishedFile]] = {}


@dataclass(frozen=True, slots=True)
class Chosen:
    """A disk, or a guest. view: of a guest; path: its file or directory, below DIR."""

    name: str
    record: DiskRecord | None
    view: GuestView | None
    path: Path


def choose(
    url: str, disks: Sequence[DiskRecord], patterns: Sequence[str], *, suffix: str = ".qcow2"
) -> tuple[Chosen, ...]:
    """The guests and the disks of no guest that match, by name, each with a place below DIR. Pure.

    disks: all of the destination. A guest is chosen if its own name matches, or all its disks match. If only some disks
    of a guest match, they are restored like disks of no guest.
    Raises NotFound for a pattern that nothing matches.
    """
    unmatched = set(patterns)

    def fits(name: str) -> bool:
        hits = {pattern for pattern in patterns if fnmatchcase(name, pattern)}
        unmatched.difference_update(hits)
        return bool(hits)

    guests = [guest for guest in guests_of(disks) if guest.points and _is_chosen(guest, fits)]
    within = {name for guest in guests for point in guest.points for name in point.disks}
    alone = [disk for disk in disks if disk.points and guest_of(disk.name) is None and disk.name not in within]
    found = [(guest.name, None, guest) for guest in guests]
    named = sorted([*found, *((disk.name, disk, None) for disk in alone if fits(disk.name))], key=lambda each: each[0])
    if unmatched:
        raise NotFound(
            "no disk or guest with a point has such a name",
            subject=min(unmatched),
            hint=f"`snapchain log {shell_word(url)}` lists them; a pattern fits the whole name: 'web1*', not web1",
        )
    taken: set[str] = set()
    return tuple(
        Chosen(name, record, view, Path(_place(name, "" if view is not None else suffix, taken)))
        for name, record, view in named
    )


def _is_chosen(guest: GuestView, fits: Callable[[str], bool]) -> bool:
    parts = [fits(name) for name in guest.disks]  # all are looked at: a pattern that matches one is no mistake
    return fits(guest.name) or (bool(parts) and all(parts))


def _place(name: str, suffix: str, taken: set[str]) -> str:
    """A path below DIR for the name of a disk or a guest: it leads nowhere else, and to no other's."""
    parts = [safe_name(part, "disk") for part in name.split("/")]
    return unique_name("/".join(parts), suffix, taken)


class SeveralRestoration:
    """Disks and guests of a destination, and a directory that they go to. Which ones is looked up at once."""

    def __init__(
        self, destination: ReadableDestination, request: SeveralRequest, *, on_event: OnEvent = ignore
    ) -> None:
        """Raises NotFound for a pattern that nothing matches, and as listing the destination."""
        self._destination, self._request, self._on_event = destination, request, on_event
        self._directory = request.directory.absolute()
        self._format: Format = request.format or "qcow2"
        self._wanted = in_full(request.point)
        self._chosen = choose(destination.url, destination.disks(), request.patterns, suffix=f".{self._format}")
        self._note_file = NoteFile(self._directory, _NOTE_NAME, _Note, _NOTE_PURPOSE, _NOTE_CAP)
        note = self._note_file.read()
        # The text as it was typed: what `yesterday` means may have changed since, and the points stay those of then.
        same = note is not None and (note.source, note.point) == (destination.url, request.point)
        self._note = note if same and note is not None else _Note(source=destination.url, point=request.point)

    # --- looking

    def plan(self) -> SeveralPlan:
        """What `run` will do; reads maps, and the beginning of one disk's data, to tell how long all of it takes."""
        items: list[PlannedRestore] = []
        before: list[str] = []
        failed: list[FailedRestore] = []
        costs: list[RestoreCost] = []
        sample: RestoreCost | None = None
        for each in self._chosen:
            if self._is_done(each):
                before.append(each.name)
                continue
            try:
                planned, cost = self._planned(each, samples=sample is None)
            except SnapchainError as error:
                self._check_answers(error)
                failed.append(_failure(each.name, error))
                continue
            sample = sample or (cost if cost.data_bytes else None)
            items.append(planned)
            costs.append(cost)
        whole = total(costs).at_the_pace_of(sample)
        return SeveralPlan(
            source=self._destination.url,
            directory=str(self._directory),
            items=tuple(items),
            restored_before=tuple(before),
            failed=tuple(failed),
            bytes_to_write=whole.data_bytes,
            bytes_free=free_bytes(next(path for path in (self._directory, *self._directory.parents) if path.is_dir())),
            requests=whole.requests,
            bytes_to_fetch=whole.bytes_to_fetch,
            seconds=whole.seconds,
        )

    def _planned(self, chosen: Chosen, *, samples: bool) -> tuple[PlannedRestore, RestoreCost]:
        path, number = self._directory / chosen.path, self._number(chosen)
        if chosen.view is not None:
            plan = self._guest(chosen, number).plan()
            row = PlannedRestore(
                name=chosen.name, is_guest=True, point=number, time=plan.time, output=str(path), disks=plan.disks
            )
            costs = [
                self._cost(disk.disk, disk.point, samples=samples and at == 0) for at, disk in enumerate(plan.disks)
            ]
            whole = total(costs)
            return row, whole.at_the_pace_of(costs[0]) if samples else whole
        self._check_free(path)
        cost = self._cost(chosen.name, number, samples=samples)
        assert chosen.record is not None
        point = next(each for each in chosen.record.points if each.point == number)
        disk = DiskRestorePlan(
            name=chosen.name,
            disk=chosen.name,
            point=number,
            virtual_size=point.virtual_size,
            content_id=point.content_id,
            output=str(path),
            data_bytes=cost.data_bytes,
        )
        row = PlannedRestore(
            name=chosen.name, is_guest=False, point=number, time=point.time, output=str(path), disks=(disk,)
        )
        return row, cost

    def _cost(self, disk: str, point: int, *, samples: bool) -> RestoreCost:
        clusters = self._format != "raw"
        with self._destination.reader(disk, str(point), clusters=clusters, maps_only=True) as reader:
            return cost_of(reader.layers(), samples=samples)

    # --- doing

    def run(self) -> SeveralReport:
        """Restore one after the other; what failed is in the report.

        Raises Unavailable when the destination does not answer any more: the next run continues. Raises as `plan`.
        """
        begun = time.monotonic()
        make_directories(self._directory, mode=0o755)
        disks: list[RestoreReport] = []
        guests: list[GuestRestoreReport] = []
        before: list[str] = []
        failed: list[FailedRestore] = []
        for each in self._chosen:
            try:
                if self._is_done(each) or self._was_just_finished(each):
                    before.append(each.name)
                    continue
                done = self._restored(each)
            except SnapchainError as error:
                self._check_answers(error)
                failed.append(_failure(each.name, error))
                continue
            if isinstance(done, GuestRestoreReport):
                guests.append(done)
            else:
                disks.append(done)
        if not failed:
            self._note_file.remove()
        return SeveralReport(
            source=self._destination.url,
            directory=str(self._directory),
            disks=tuple(disks),
            guests=tuple(guests),
            restored_before=tuple(before),
            failed=tuple(failed),
            bytes_written=sum(each.bytes_written for each in disks) + sum(each.bytes_written for each in guests),
            bytes_resumed=sum(each.bytes_resumed for each in disks) + sum(each.bytes_resumed for each in guests),
            seconds=time.monotonic() - begun,
        )

    def _restored(self, chosen: Chosen) -> RestoreReport | GuestRestoreReport:
        number = self._number(chosen)
        if chosen.view is None:
            self._check_free(self._directory / chosen.path)
        self._write_note(points={**self._note.points, chosen.name: number}, begun=chosen.name)
        done: RestoreReport | GuestRestoreReport
        if chosen.view is not None:
            done = self._guest(chosen, number).run()
            files = [disk.output for disk in done.disks]
        else:
            path = self._directory / chosen.path
            make_directories(path.parent, mode=0o755)
            done = Restoration(
                self._destination,
                chosen.name,
                path,
                point=str(number),
                format=self._format,
                standing=self._request.standing,
            ).run(on_event=self._heard(chosen.name))
            files = [done.output]
        self._note_done(chosen, files)
        return done

    def _guest(self, chosen: Chosen, number: int) -> GuestRestoration:
        assert chosen.view is not None
        request = GuestRestoreRequest(
            directory=self._directory / chosen.path,
            point=str(number),
            format=self._format,
            standing=self._request.standing,
        )
        return GuestRestoration(self._destination, chosen.view, request, on_event=self._heard(chosen.name))

    def _heard(self, name: str) -> OnEvent:
        def heard(event: Event) -> None:
            if isinstance(event, Progress):
                self._on_event(Progress(name, event.done, event.total, event.unit))
            else:
                self._on_event(event.within(name))

        return heard

    # --- what an earlier run has done

    def _number(self, chosen: Chosen) -> int:
        """Of the point, which is that of an earlier run as long as it is there. Raises NotFound."""
        points = chosen.view.points if chosen.view is not None else chosen.record.points if chosen.record else ()
        noted = self._note.points.get(chosen.name)
        if noted is not None and any(each.point == noted for each in points):
            return noted
        if chosen.view is not None:
            return chosen.view.point(self._wanted).point
        assert chosen.record is not None
        return chosen_point(chosen.name, chosen.record.points, self._wanted).point

    def _is_done(self, chosen: Chosen) -> bool:
        files = self._note.done.get(chosen.name, {})
        return bool(files) and all(is_still(self._directory / name, file) for name, file in files.items())

    def _was_just_finished(self, chosen: Chosen) -> bool:
        """Whether an earlier run was killed after its last file was in place, and before that was noted."""
        if self._note.begun != chosen.name or chosen.name not in self._note.points:
            return False
        number = self._number(chosen)
        if chosen.view is not None:
            guest = self._guest(chosen, number)
            if guest.is_begun or not guest.is_finished():
                return False
            self._note_done(chosen, [str(path) for path in guest.outputs.values()])
            return True
        assert chosen.record is not None
        path = self._directory / chosen.path
        point = next(each for each in chosen.record.points if each.point == number)
        if not is_restored(path, self._format, point, self._request.standing):
            return False
        self._note_done(chosen, [str(path)])
        return True

    def _note_done(self, chosen: Chosen, files: Sequence[str]) -> None:
        found = {os.path.relpath(file, self._directory): finished_file(Path(file)) for file in files}
        self._write_note(begun=None, done={**self._note.done, chosen.name: found})

    def _write_note(self, **changes: object) -> None:
        self._note = self._note.model_copy(update=changes)
        self._note_file.write(self._note)

    def _check_free(self, path: Path) -> None:
        """Raises Conflict for a file that would be replaced."""
        if os.path.lexists(path):
            raise Conflict(
                "it exists already, and a restore of several replaces no file",
                subject=path,
                hint="restore into another directory",
            )

    def _check_answers(self, error: SnapchainError) -> None:
        """Raise the error of a destination that answers nobody any more: all others would fail likewise."""
        if isinstance(error, Unavailable):
            try:
                self._destination.disks()
            except SnapchainError as gone:
                gone.hint = gone.hint or "run it again: it continues"
                raise


def _failure(name: str, error: SnapchainError) -> FailedRestore:
    return FailedRestore(name=name, kind=error.kind, message=str(error), hint=error.hint)
