"""Carrying out live merges: journal, block job, proof, note, and only then the removal of the inputs.

The journal (merge/journal.py, stage `live`) lies beside the result before the job begins, so commands for images at
rest do not trust the files meanwhile.  Killed at any moment, the next run finds the job by it, and goes on: a job
outlives the monitor.  Where QEMU is gone as well, `live_settle` judges by the headers.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path

from snapchain.errors import Busy, Conflict, NotFound, SnapchainError, Unavailable
from snapchain.guest.address import GuestAddress
from snapchain.guest.jobs import End, Ended, OnLook, drive, give_up
from snapchain.guest.protocol import Activity, Guest, GuestDisk, Job, JobKind, JobProgress, JobStatus
from snapchain.host import files
from snapchain.host.path_resolution import real_path
from snapchain.image import ImageChain
from snapchain.image.dependent_search import search_directories
from snapchain.merge import settle
from snapchain.merge.inputs import KeptFile, numbers
from snapchain.merge.journal import FileId, LiveMerge, MergeJournal, OpenJournal, taken, unsettled
from snapchain.merge.live import LiveMergePlan, LivePlanner, LiveStep, plan
from snapchain.merge.live_chain import disk_to_merge, opened, paths_of
from snapchain.merge.live_settle import check_covers, inputs_of, note_result, remove_record
from snapchain.merge.pace import Pace
from snapchain.merge.prove import prove
from snapchain.merge.request import MergeRequest
from snapchain.merge.run import Fault, MergeReport, StepReport, numbered, report_all
from snapchain.model.choice import MergeRange
from snapchain.model.events import Notice, OnEvent, ignore
from snapchain.model.merging import Strategy
from snapchain.source.counted_sums import carry_over, guest_key
from snapchain.source.lineage import note_of, sealed_at
from snapchain.source.notes import Notes, Sealed


def run(guest: Guest, planned: LiveMergePlan, *, on_event: OnEvent = ignore, pace: Pace | None = None) -> MergeReport:
    """Do it, the uppermost merge first. A merge that failed is in the report, where another one was done.

    pace: how fast, None for as fast as can be
    Raises Unavailable when room does not suffice, Busy for something else at work on the disk, Conflict when the chain
    is no longer as planned, Corrupt when a result differs from its inputs: then all files stay.
    """
    pace = pace or Pace()
    began = time.monotonic()
    finished = settle_disk(guest, planned.disk, planned.request, on_event=on_event, pace=pace)
    if finished:
        planned = _replanned(guest, planned)
    planned.check_room()
    done: list[StepReport] = []
    failed: list[Fault] = []
    first_error: SnapchainError | None = None
    count = len(planned.live_steps)
    for number, each in enumerate(reversed(planned.live_steps), start=1):
        try:
            request = replace(each.step.request, strategy=each.step.strategy)
            listener = numbered(on_event, number, count)
            done.append(_run_step(guest, planned.disk, request, each.step.layers, pace, listener))
        except SnapchainError as error:
            first_error = first_error or error
            failed.append(Fault(layers=each.step.layers, kind=error.kind, message=str(error)))
            if number < count:
                on_event(Notice(f"{each.step.result.name} was not merged, the others are: {error}"))
    if first_error is not None and not done:
        raise first_error
    return report_all(
        planned,
        done[::-1],
        failed[::-1],
        settled=[path for each in finished for path in each.removed],
        finished=[each.result for each in finished],
        seconds=time.monotonic() - began,
        image=paths_of(disk_to_merge(guest, planned.disk))[-1],
    )


def _replanned(guest: Guest, planned: LiveMergePlan) -> LiveMergePlan:
    """The plan after an earlier merge was finished, whose inputs the request may have named: then nothing is left."""
    try:
        return plan(guest, planned.disk, planned.request)
    except NotFound:
        nothing = replace(planned.request, from_layer=None, to_layer=None, flatten=False, max_layers=1 << 30)
        return plan(guest, planned.disk, nothing)


# --- One merge.


def _run_step(
    guest: Guest,
    disk_name: str,
    request: MergeRequest,
    layers: Sequence[Path] | None,
    pace: Pace,
    on_event: OnEvent,
    *,
    again: LiveMerge | None = None,
) -> StepReport:
    """One range. layers: paths of its files as planned; again: the record of this merge, if it was begun before."""
    disk = disk_to_merge(guest, disk_name)
    check_idle(guest, disk)
    with opened(disk, image_dirs=request.image_dirs) as old:
        first, last = numbers(old, request, ())
        decided = LivePlanner(guest, disk, old, request).plan(MergeRange(first, last))
        step = decided.step
        if layers is not None and tuple(layers) != step.layers:
            raise Conflict(
                "the chain was changed after the merge was planned", subject=disk.active.path, hint="run it again"
            )
        for sentence in Notes().ignored(file.resolved for file in old.files):
            on_event(Notice(sentence))
        journal = _journal(guest, disk, old, decided, again)
        gone = [*journal.remove, journal.result]
        before = sum(_allocated(entry.path) for entry in gone)
        with ExitStack() as records:
            held = records.enter_context(OpenJournal(journal))
            if held.unmarked is not None:
                on_event(Notice.of(step.result, f"its journal bears no mark of this user: {held.unmarked}"))
            journal = _do(guest, disk, decided, journal, records, pace, on_event, was_begun=again is not None)
            settled = _finish(guest, journal, old, records, on_event)
        if last < len(old.files) - 1:
            _carry_over(guest, disk_name, request, old, first, last, on_event)
        return StepReport(
            image=old.top.path,
            result=step.result,
            strategy=step.strategy,
            layers_before=len(old.files),
            layers_after=len(old.files) - (last - first),
            bytes_moved=step.bytes_to_move,
            bytes_freed=before - sum(_allocated(entry.path) for entry in gone),
            removed=tuple(settled.removed),
            kept=(*step.keep, *(each for each in settled.kept if each.path not in {known.path for known in step.keep})),
            finished=(),
            incomplete=step.incomplete or settled.incomplete,
        )


def check_idle(guest: Guest, disk: GuestDisk) -> None:
    """Raises Busy, with who and what, when something is at work on a disk or in the whole guest."""
    nodes = {disk.root, *disk.filters, *(layer.node for layer in disk.chain)}
    for each in guest.activities():
        if each.node is None or each.node in nodes:
            raise Busy(
                f"the disk cannot be merged now: {each.says}",
                subject=f"{guest.name}/{disk.name}",
                hint=_remedy(guest, each),
            )


def _remedy(guest: Guest, activity: Activity) -> str:
    if activity.is_ours:
        return f"wait for its end; what a killed run has left is ended by `snapchain merge {guest.option}`"
    return f"wait for the end of {activity.kind} {activity.id}, or end it with what began it"


def _journal(
    guest: Guest, disk: GuestDisk, old: ImageChain, decided: LiveStep, again: LiveMerge | None
) -> MergeJournal:
    step, kind = decided.step, decided.kind
    chosen = old.files[step.first : step.last + 1]
    above = None if decided.above is None else FileId.of(old.files[decided.above].real_path).whatever_written()
    is_top = step.last == len(old.files) - 1
    time_of, labels = (None, ()) if is_top else sealed_at(chosen[-1], note_of(chosen[-1], Notes()))
    ids = [FileId.of(file.real_path) for file in chosen]
    written = {0 if kind is not JobKind.STREAM else len(ids) - 1, *([len(ids) - 1] if is_top else [])}
    ids = [each.whatever_written() if place in written else each for place, each in enumerate(ids)]
    result = ids[0] if kind is not JobKind.STREAM else ids[-1]
    remove = [entry for entry in reversed(ids) if entry.path in step.remove]
    fingerprints = tuple(file.fingerprint for file in chosen)
    above_sealed = _above_sealed(old, decided)
    if again is not None and [each.path for each in again.inputs] == [each.path for each in ids]:
        fingerprints, time_of, labels = again.sources, again.time, again.labels
        above_sealed = again.above_sealed
    address = guest.address
    return MergeJournal(
        stage="live",
        replaced=result,
        result=result,
        lowest=ids[0].path,
        link=step.backing,
        remove=tuple(remove),
        search=search_directories(old, step.request.image_dirs),
        top=old.files[-1].path,
        links=tuple(file.path for file in old.files if file.real_path in step.remove and file.path != file.real_path),
        confirmed=step.confirmed,
        live=LiveMerge(
            kind=kind.value,
            job_id=f"sc-merge-{''.join(c if c.isalnum() else '-' for c in disk.name)[:60]}-{secrets.token_hex(4)}",
            guest=guest.name,
            option=guest.option,
            disk=disk.name,
            domain=address.domain,
            connect=address.connect,
            qmp=None if address.qmp is None else address.qmp.absolute(),
            process=guest.process(),
            inputs=tuple(ids),
            above=above,
            above_sealed=above_sealed,
            formats=tuple(file.format for file in chosen),
            sources=fingerprints,
            time=time_of,
            labels=labels,
        ),
    )


def _above_sealed(old: ImageChain, decided: LiveStep) -> Sealed | None:
    """What is known of the sealed file whose header a commit changes: it would not be recognised by its time after."""
    place = decided.above
    if place is None or place == len(old.files) - 1 or decided.kind is JobKind.STREAM:
        return None
    file = old.files[place]
    time_of, labels = sealed_at(file, note_of(file, Notes()))
    return Sealed(time=time_of, labels=labels, file=file.fingerprint)


def _do(
    guest: Guest,
    disk: GuestDisk,
    decided: LiveStep,
    journal: MergeJournal,
    records: ExitStack,
    pace: Pace,
    on_event: OnEvent,
    *,
    was_begun: bool,
) -> MergeJournal:
    """Run the job to its end. The journal that counts from then on; newer ones are held by `records`.

    was_begun: an earlier run had begun this merge
    The chain is as before when this raises; once a commit was begun the files between are invalid, and the journal
    stays.
    """
    live = journal.live
    assert live is not None
    paths, step = paths_of(disk), decided.step
    try:
        look = pace.begin(guest, disk.name)
        job = guest.start(
            decided.kind,
            disk.name,
            lowest=paths[step.first],
            uppermost=paths[step.last],
            backing=None if step.backing is None or decided.kind is JobKind.ACTIVE_COMMIT else step.backing.name,
            job_id=live.job_id,
            speed=pace.first_speed,
        )
    except SnapchainError:
        # Refused, or the answer was lost: then the job may be there.
        job, look = guest.job(live.job_id, decided.kind, disk.name), _no_look
        if job.progress().status is JobStatus.GONE:
            if not was_begun:
                remove_record(journal)
            raise
    except BaseException as error:  # interrupted
        with suppress(SnapchainError):
            give_up(guest.job(live.job_id, decided.kind, disk.name), on_event=on_event, because=error)
        _forget_stream(guest, journal, live)
        raise
    return _drive(guest, job, journal, records, look, on_event)


def _no_look(_job: Job, _now: JobProgress) -> None:
    """Nothing, at each look at a job."""


def _drive(
    guest: Guest, job: Job, journal: MergeJournal, records: ExitStack, look: OnLook, on_event: OnEvent
) -> MergeJournal:
    live = journal.live
    assert live is not None
    recording = _Recording(job, journal, records)
    try:
        ended = drive(recording, phase="merge", on_event=on_event, on_look=look)
    except BaseException:
        _forget_stream(guest, journal, live)
        raise
    if ended.end is End.FAILED:
        _forget_stream(guest, journal, live)
        raise _failure(ended, recording.journal)
    return recording.journal


class _Recording:
    """A job whose pivot is recorded before it is asked for: from then on the guest may write to the lowest input."""

    def __init__(self, job: Job, journal: MergeJournal, records: ExitStack) -> None:
        self._job, self.journal, self._records = job, journal, records

    @property
    def id(self) -> str:
        return self._job.id

    @property
    def kind(self) -> JobKind:
        return self._job.kind

    def progress(self) -> JobProgress:
        return self._job.progress()

    def wait(self, seconds: float) -> None:
        self._job.wait(seconds)

    def set_speed(self, bytes_per_second: int) -> None:
        self._job.set_speed(bytes_per_second)

    def complete(self) -> None:
        self.journal = _with_pivot(self.journal, "asked for", self._records)
        self._job.complete()

    def flush(self) -> None:
        self._job.flush()

    def finalize(self) -> None:
        self._job.finalize()

    def dismiss(self) -> None:
        self._job.dismiss()

    def cancel(self) -> None:
        self._job.cancel()


def _with_pivot(journal: MergeJournal, pivot: str, records: ExitStack) -> MergeJournal:
    """The journal with what is known of the switch, on the disk."""
    assert journal.live is not None
    newer = journal.model_copy(update={"live": journal.live.model_copy(update={"pivot": pivot})})
    records.enter_context(OpenJournal(newer))
    return newer


def _forget_stream(guest: Guest, journal: MergeJournal, live: LiveMerge) -> None:
    """After a stream that was given up all layers are as they were: nothing is left to be done."""
    if live.kind != "stream":
        return
    with suppress(SnapchainError):
        if guest.job(live.job_id, JobKind.STREAM, live.disk).progress().status is JobStatus.GONE:
            _check_switched(disk_to_merge(guest, live.disk), live, wanted=False)
            remove_record(journal)


def _failure(ended: Ended, journal: MergeJournal) -> Unavailable:
    hint = "the chain reads as before; run it again"
    if "space" in (ended.error or "").lower():
        hint = f"free room in {journal.result.path.parent}; the chain reads as before"
    return Unavailable(f"QEMU could not merge the layers: {ended.error}", subject=journal.result.path, hint=hint)


def _is_switched(disk: GuestDisk, live: LiveMerge) -> bool:
    """Whether the graph of a running guest is the one after the merge."""
    chain = {layer.identity for layer in disk.chain}
    ids = [(entry.device, entry.inode) for entry in live.inputs]
    result, others = (ids[-1], ids[:-1]) if live.kind == "stream" else (ids[0], ids[1:])
    return result in chain and not any(each in chain for each in others)


def _check_switched(disk: GuestDisk, live: LiveMerge, *, wanted: bool) -> None:
    if _is_switched(disk, live) is not wanted:
        raise Conflict(
            "QEMU's chain is not the one that the merge was to leave; all files stay",
            subject=f"{live.guest}/{live.disk}",
            hint=f"`snapchain guests` shows it; `snapchain merge {live.option}` looks at it again",
        )


# --- The end: proof, note, removal.


def _finish(
    guest: Guest, journal: MergeJournal, old: ImageChain | None, records: ExitStack, on_event: OnEvent
) -> settle.Settled:
    """Of a job that is dismissed. old: the chain before it, None after a restart.

    Raises Conflict when the graph is not the new one, Corrupt when the result reads differently: then all files stay.
    """
    live = journal.live
    assert live is not None
    disk = disk_to_merge(guest, live.disk)
    _check_switched(disk, live, wanted=True)
    missing = any(not entry.still() for entry in live.inputs)
    with opened(disk, image_dirs=journal.search) as new:
        _check_result(new, journal, live)
        if not missing:
            _prove(new, journal, live, old, on_event)
        for path in (journal.result.path, *([live.above.path] if live.above is not None else [])):
            files.fsync_file(path)
        if not missing:
            _note(journal, live, on_event)
    if live.kind == "active-commit":
        journal = _with_pivot(journal.model_copy(update={"top": paths_of(disk)[-1]}), "done", records)
    # QEMU keeps what it was given by name: an image of its command line stays open, and its space is not freed.
    guest.release([entry.path for entry in journal.remove])
    try:
        return settle.remove_inputs(journal)
    except Busy as error:
        on_event(Notice(f"{error}; it is removed by the next run"))
        return settle.Settled([], tuple(KeptFile(path=entry.path, reason="in use") for entry in journal.remove))


def _place_of(new: ImageChain, journal: MergeJournal) -> int:
    return next(
        place for place, file in enumerate(new.files) if file.device == (journal.result.device, journal.result.inode)
    )


def _check_result(new: ImageChain, journal: MergeJournal, live: LiveMerge) -> None:
    """Raises Conflict unless the headers record what was asked for. `opened` has compared the files with QEMU's."""
    changed = journal.result if live.kind == "stream" else live.above
    if changed is None:
        return
    for place, file in enumerate(new.files):
        if file.device == (changed.device, changed.inode):
            link = file.backing
            below = new.files[place - 1] if place else None
            if (link is None) != (below is None) or (link and below and link.format != below.format):
                raise Conflict(
                    "the header of the file does not record the chain that QEMU has open",
                    subject=file.path,
                    hint="run it again",
                )


def _prove(new: ImageChain, journal: MergeJournal, live: LiveMerge, old: ImageChain | None, on_event: OnEvent) -> None:
    """Compare the result with its inputs, which are whole but for the one that was written to.

    A sealed result is compared to the byte.  An active layer is written to by its guest all the time: of it is shown
    that nothing of the sealed inputs is missing.
    """
    place = _place_of(new, journal)
    view = new.at(place)
    below = new.at(place - 1) if place else None
    is_top = live.above is None
    with ExitStack() as stack:
        if old is not None and not is_top:
            last = place + len(live.inputs) - 1
            before = old.at(last)
        else:
            before = stack.enter_context(inputs_of(live, below, view.top))
        if live.kind == "active-commit":
            check_covers(view, before)
            return
        prove(before, view, shared=place, subject=journal.result.path, on_event=on_event)


def _note(journal: MergeJournal, live: LiveMerge, on_event: OnEvent) -> None:
    """Record what the result was made of, so that a shipment recognises the inputs in it. The merge is done already."""
    try:
        note_result(journal, live)
    except SnapchainError as error:
        on_event(
            Notice(f"{journal.result.path}: cannot note what it was made of, so it is shipped as a whole: {error}")
        )


def _carry_over(
    guest: Guest, disk_name: str, request: MergeRequest, old: ImageChain, first: int, last: int, on_event: OnEvent
) -> None:
    """Keep the content sums of the views, so that a sender need not read the result again."""
    try:
        with opened(disk_to_merge(guest, disk_name), image_dirs=request.image_dirs) as new:
            found = ImageChain(new.files, owned=False)
            carry_over(guest_key(guest.name, disk_name), old, lambda: found, first=first, last=last, on_event=on_event)
    except SnapchainError as error:
        on_event(Notice(f"{old.files[last].path}: it is read again when it is sent: {error}"))


# --- What killed runs have left.


def settle_disk(
    guest: Guest, disk_name: str, request: MergeRequest, *, on_event: OnEvent = ignore, pace: Pace | None = None
) -> list[StepReport]:
    """Finish the live merges of a disk that killed runs have left. What was done.

    Raises Busy while another process is at one, and as `run`.
    """
    disk = disk_to_merge(guest, disk_name)
    reports = []
    for journal in unsettled(real_path(path) for path in paths_of(disk)):
        if journal.live is None:
            settle.settle(journal)
        elif (report := settle_live(guest, journal, request=request, on_event=on_event, pace=pace)) is not None:
            reports.append(report)
    return reports


def note_switch(guest: Guest, journal: MergeJournal) -> MergeJournal:
    """Of a guest that is off: where its definition names the lowest input of an active commit, it was switched.

    That it names the active layer proves nothing: the pivot may have come before libvirt wrote it down.
    """
    live = journal.live
    if live is None or live.pivot != "asked for":
        return journal
    active = disk_to_merge(guest, live.disk).active
    lowest = live.inputs[0]
    if active.identity != (lowest.device, lowest.inode):
        return journal
    with ExitStack() as records:
        records.enter_context(taken(journal))
        return _with_pivot(journal.model_copy(update={"top": active.path}), "done", records)


def address_of(live: LiveMerge) -> GuestAddress:
    """How the guest of a killed merge is reached."""
    return GuestAddress(
        domain=live.domain, connect=live.connect, qmp=live.qmp, name=live.guest if live.qmp is not None else None
    )


def settle_live(
    guest: Guest,
    journal: MergeJournal,
    *,
    request: MergeRequest | None = None,
    on_event: OnEvent = ignore,
    pace: Pace | None = None,
) -> StepReport | None:
    """Go on with a live merge that a killed run has left in a running guest; None where nothing was to be done.

    Raises Busy while that run lives, and as `run`.
    """
    live, pace = journal.live, pace or Pace()
    assert live is not None
    kind = JobKind(live.kind)
    with ExitStack() as records:
        records.enter_context(taken(journal))
        if not journal.result.still():
            remove_record(journal)
            return None
        job = guest.job(live.job_id, kind, live.disk)
        if job.progress().status is not JobStatus.GONE:
            on_event(Notice(f"{guest.name}/{live.disk}: an interrupted merge goes on"))
            journal = _drive(guest, job, journal, records, pace.begin(guest, live.disk), on_event)
        disk = disk_to_merge(guest, live.disk)
        if _is_switched(disk, live):
            before = sum(_allocated(entry.path) for entry in [*journal.remove, journal.result])
            settled = _finish(guest, journal, None, records, on_event)
            count = len(disk.chain)
            return StepReport(
                image=paths_of(disk)[-1],
                result=journal.result.path,
                strategy=Strategy.ABSORB if kind is JobKind.STREAM else Strategy.COMMIT,
                layers_before=count + len(live.inputs) - 1,
                layers_after=count,
                bytes_moved=0,
                bytes_freed=before - sum(_allocated(entry.path) for entry in [*journal.remove, journal.result]),
                removed=tuple(settled.removed),
                kept=settled.kept,
                finished=(journal.result.path,),
                incomplete=settled.incomplete,
            )
        if kind is JobKind.STREAM:
            remove_record(journal)
            return None
    # The files between are invalid by now: only the same merge makes the chain a clean one.
    lowest, uppermost = live.inputs[0].path, live.inputs[-1].path
    request = request or MergeRequest(image=uppermost, image_dirs=journal.search)
    wanted = replace(
        request.of_range(lowest, uppermost), strategy=Strategy.COMMIT, drop_bitmaps=True, remove=journal.confirmed
    )
    on_event(Notice(f"{guest.name}/{live.disk}: an interrupted merge is continued"))
    return _run_step(guest, live.disk, wanted, None, pace, on_event, again=live)


def _allocated(path: Path) -> int:
    try:
        return path.stat().st_blocks * 512
    except FileNotFoundError:
        return 0
