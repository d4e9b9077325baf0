"""Carrying out merges: settle what killed ones have left, lock, decide again, make the result, remove the inputs.

Nobody can start a guest on any of the files meanwhile (QEMU's own locks).  Killed at any moment: the image reads as
before, and the next run finishes or undoes by the journal.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from snapchain.errors import Conflict, SnapchainError, Unavailable
from snapchain.host import files
from snapchain.host.locks import ImageLock, LockMode
from snapchain.host.openers import OpenFiles
from snapchain.host.path_resolution import place_to_change
from snapchain.host.terminal import shell_word
from snapchain.image import ImageChain, scan
from snapchain.merge import live_settle, settle
from snapchain.merge.inputs import KeptFile
from snapchain.merge.journal import LiveMerge, MergeJournal, taken, unsettled
from snapchain.merge.methods import Method
from snapchain.merge.plan import NOTHING, MergePlan
from snapchain.merge.rates import remember as remember_rate
from snapchain.merge.request import MergeRequest
from snapchain.merge.step import MergeStep, decide, plan_step
from snapchain.model.events import Event, Notice, OnEvent, Progress, ignore
from snapchain.model.merging import Strategy
from snapchain.source.counted_sums import carry_over
from snapchain.source.lineage import record
from snapchain.source.notes import Notes


class StepReport(BaseModel):
    """What `run_step` did. Sizes in bytes.

    bytes_moved: shared with or copied into the result's file; bytes_freed: allocated by the inputs that went, less what
    the result allocates (below 0 when inputs were kept); removed, kept: the inputs; finished: results of earlier,
    killed merges; incomplete: what the search for other users of the inputs could not look at, a sentence
    """

    model_config = ConfigDict(frozen=True)

    image: Path
    result: Path
    strategy: Strategy
    layers_before: int
    layers_after: int
    bytes_moved: int
    bytes_freed: int
    removed: tuple[Path, ...]
    kept: tuple[KeptFile, ...]
    finished: tuple[Path, ...]
    incomplete: str | None = None


class _Shown(BaseModel):
    model_config = ConfigDict(frozen=True)


class Fault(_Shown):
    """A merge that was not done, and why. kind, message: of the error; layers: its files, lowest first."""

    layers: tuple[Path, ...]
    kind: str
    message: str


class MergeReport(_Shown):
    """What `run` did. Sizes in bytes.

    result: the one of a single merge; strategy: of all merges, joined by '+'; bytes_moved, bytes_freed: of all
    merges, lowest first, those that were done; failed: the others; removed, kept: inputs of all
    finished: results of earlier, killed merges
    incomplete: what the search for other users of the inputs could not look at, a sentence
    """

    image: Path
    result: Path | None
    strategy: str
    layers_before: int
    layers_after: int
    bytes_moved: int
    bytes_freed: int
    seconds: float
    requests: int
    removed: tuple[Path, ...]
    kept: tuple[KeptFile, ...]
    finished: tuple[Path, ...]
    merges: tuple[StepReport, ...]
    failed: tuple[Fault, ...]
    incomplete: str | None = None


def run(planned: MergePlan, *, on_event: OnEvent = ignore) -> MergeReport:
    """Do it. A merge that failed is in the report, where another merge of the plan was done.

    Raises Unavailable when the room does not suffice, before anything is moved; what merge.run.run raises, when
    nothing was merged; Conflict when the chain is no longer as planned.
    """
    planned.check_room()
    done: list[StepReport] = []
    failed: list[Fault] = []
    first_error: SnapchainError | None = None
    settled: list[Path] = []
    began = time.monotonic()
    for number, each in enumerate(reversed(planned.steps), start=1):
        listener = numbered(on_event, number, len(planned.steps))
        try:
            current = each if number == 1 else _again(each)
            done.append(_timed(current, listener))
        except SnapchainError as error:
            first_error = first_error or error
            failed.append(Fault(layers=each.layers, kind=error.kind, message=str(error)))
            if number < len(planned.steps):
                on_event(Notice(f"{each.result.name} was not merged, the others are: {error}"))
    if first_error is not None and not done:
        raise first_error
    if not planned.steps:
        settled = _settle_idle(planned, on_event)
    return report_all(
        planned,
        done[::-1],
        failed[::-1],
        settled=settled,
        finished=planned.unfinished,
        seconds=time.monotonic() - began,
    )


def _timed(planned: MergeStep, on_event: OnEvent) -> StepReport:
    began = time.monotonic()
    report = run_step(planned, on_event=on_event)
    remember_rate(
        planned.result.parent,
        planned.strategy.value,
        moved=report.bytes_moved,
        seconds=time.monotonic() - began,
        shared=planned.shares_extents,
    )
    return report


def _again(step: MergeStep) -> MergeStep:
    """One merge planned again after those above it were done. Raises Conflict when others changed its files."""
    now = plan_step(step.request)
    if now.layers != step.layers:
        raise Conflict("its chain was changed meanwhile", subject=step.image, hint="run it again")
    return now


def _settle_idle(planned: MergePlan, on_event: OnEvent) -> list[Path]:
    """Nothing is to be merged; what killed merges have left is put in order all the same."""
    if planned.idle is None or not planned.unfinished:
        return []
    return list(run_step(planned.idle, on_event=on_event).removed)


def numbered(on_event: OnEvent, number: int, count: int) -> OnEvent:
    """Each merge of several has phases of its own."""
    if count == 1:
        return on_event

    def listen(event: Event) -> None:
        if isinstance(event, Progress):
            event = replace(event, phase=f"{event.phase} {number}/{count}")
        on_event(event)

    return listen


def report_all(
    planned: MergePlan,
    done: Sequence[StepReport],
    failed: Sequence[Fault],
    *,
    settled: Sequence[Path],
    finished: Sequence[Path],
    seconds: float,
    image: Path | None = None,
) -> MergeReport:
    """The report on the merges of a plan. done, failed: lowest first; image: where it is another one than planned

    settled, finished: inputs that were removed for earlier, killed merges, and the results of those
    """
    return MergeReport(
        image=image or planned.image,
        result=done[0].result if len(done) == 1 else None,
        strategy="+".join(dict.fromkeys(each.strategy.value for each in done)) or NOTHING,
        layers_before=planned.layers_before,
        layers_after=planned.layers_before - sum(each.layers_before - each.layers_after for each in done),
        bytes_moved=sum(each.bytes_moved for each in done),
        bytes_freed=sum(each.bytes_freed for each in done),
        seconds=round(seconds, 3),
        requests=0,
        removed=(*settled, *(path for each in reversed(done) for path in each.removed)),
        kept=tuple(kept for each in reversed(done) for kept in each.kept),
        finished=tuple(finished),
        merges=tuple(done),
        failed=tuple(failed),
        incomplete=next(filter(None, (each.incomplete for each in done)), None),
    )


def run_step(planned: MergeStep, *, noted: bool = True, on_event: OnEvent = ignore) -> StepReport:
    """Do it. noted: what the result was made of is recorded beside it (source/notes.py).

    Raises Busy when a file of the chain is open elsewhere, Conflict when it is no longer as planned, Unavailable when
    room would not suffice, Corrupt when the result is not the same as the inputs: then nothing was changed.
    """
    leftovers = _settle(planned, on_event)
    if planned.strategy is Strategy.NOTHING:
        return _report(planned, leftovers)
    with _locks(planned, on_event) as locks, _chain(planned) as (old, method):
        _check_room(planned)
        for sentence in Notes().ignored(file.resolved for file in old.files):
            on_event(Notice(sentence))
        # The uppermost input goes, too, unless it gets a second name.
        gone = [*planned.remove, *([] if planned.kept_as else [planned.result])]
        before = sum(_allocated(path) for path in gone)
        journal = method.make(planned, old, locks=locks, on_event=on_event)
        if journal.unmarked is not None:
            on_event(Notice.of(planned.result, f"its journal bears no mark of this user: {journal.unmarked}"))
        if noted:
            _note(planned, old, on_event)
        settled = settle.finish(journal)
        _forget_live(planned)
        if noted:
            _carry_over(planned, old, on_event)
    return _report(
        planned,
        settle.Settled(
            [*leftovers.removed, *settled.removed],
            (*leftovers.kept, *settled.kept),
            leftovers.incomplete or settled.incomplete,
        ),
        moved=method.bytes_moved,
        freed=before - sum(_allocated(path) for path in [planned.result, *planned.remove]),
    )


def _forget_live(planned: MergeStep) -> None:
    """The records of live merges that this one has taken the files of."""
    for journal in unsettled(place_to_change(path) for path in planned.chain[planned.first : planned.last + 1]):
        if journal.live is not None:
            live_settle.remove_record(journal)


def _note(planned: MergeStep, old: ImageChain, on_event: OnEvent) -> None:
    """Record what the result was made of, so that a shipment recognises the inputs in it. The merge is done already."""
    try:
        is_top = planned.last == len(old.files) - 1
        record(old.files[planned.first : planned.last + 1], planned.result, is_top=is_top)
    except SnapchainError as error:
        on_event(Notice(f"{planned.result}: cannot note what it was made of, so it is shipped as a whole: {error}"))


def _carry_over(planned: MergeStep, old: ImageChain, on_event: OnEvent) -> None:
    """Keep the content sums of the views, so that a sender need not read the result again."""
    request = planned.request
    try:
        carry_over(
            request.image,
            old,
            lambda: scan(request.image, format=request.image_format, image_dirs=request.image_dirs),
            first=planned.first,
            last=planned.last,
            on_event=on_event,
        )
    except SnapchainError as error:
        on_event(Notice(f"{planned.result}: it is read again when it is sent: {error}"))


def _settle(planned: MergeStep, on_event: OnEvent) -> settle.Settled:
    """Finish or undo what killed merges have left in this chain."""
    removed: list[Path] = []
    kept: list[KeptFile] = []
    incomplete: str | None = None
    for journal in unsettled(place_to_change(path) for path in planned.chain):
        if _is_done_again(planned, journal):
            on_event(Notice(f"{journal.replaced.path}: an interrupted merge is taken up again"))
            continue
        _check_goes_on(planned, journal)
        if _goes_on(planned, journal):
            settle.take_up(journal)
            on_event(Notice(f"{journal.replaced.path}: an interrupted merge is taken up again"))
            continue
        done = "finished" if settle.switched(journal) else "undone"
        settled = settle.settle(journal)
        removed += settled.removed
        kept += settled.kept
        incomplete = incomplete or settled.incomplete
        on_event(Notice(f"{journal.replaced.path}: an interrupted merge was {done}"))
    return settle.Settled(removed, tuple(kept), incomplete)


def _is_done_again(planned: MergeStep, journal: MergeJournal) -> bool:
    """Whether this merge takes all files of a live one that was killed halfway; its record goes with them."""
    live = journal.live
    if live is None or not live_settle.must_be_done_again(journal, live):
        return False
    live_settle.check_not_switched(journal, live)
    paths = [place_to_change(path) for path in planned.chain[planned.first : planned.last + 1]]
    return all(entry.path in paths for entry in live.inputs)


def _check_goes_on(planned: MergeStep, journal: MergeJournal) -> None:
    """Raises Conflict where a killed commit must be done to its end first: its lowest input alone reads wrong.

    Raises Busy where it is not killed, but at work.
    """
    if journal.stage != "committing" or settle.switched(journal):
        return
    paths = [place_to_change(path) for path in planned.chain[planned.first : planned.last + 1]]
    if journal.lowest not in paths or journal.replaced.path not in paths:
        with taken(journal):
            raise Conflict(
                f"a merge from {journal.lowest.name} to it was killed, and comes first",
                subject=journal.replaced.path,
                hint=f"`snapchain doctor {shell_word(journal.replaced.path)}` finishes it",
            )


def _goes_on(planned: MergeStep, journal: MergeJournal) -> bool:
    """Whether it is the same commit, killed before its switch."""
    return (
        planned.strategy is Strategy.COMMIT
        and journal.stage == "committing"
        and not settle.switched(journal)
        and journal.replaced.path == planned.result
        and journal.lowest == place_to_change(planned.chain[planned.first])
    )


@contextmanager
def _locks(planned: MergeStep, on_event: OnEvent) -> Iterator[list[ImageLock]]:
    """Locks all files against writers, and the inputs against everybody once; the inputs' locks."""
    with ExitStack() as stack:
        inputs: list[ImageLock] = []
        open_files = OpenFiles()
        for number, path in enumerate(planned.chain):
            is_input = planned.first <= number <= planned.last
            lock = stack.enter_context(
                ImageLock(path, LockMode.WRITE if is_input else LockMode.READ, open_files=open_files)
            )
            if is_input:
                if not planned.strategy.writes_inputs:
                    lock.change(LockMode.READ)  # others may read it until the switch
                inputs.append(lock)
            if not lock.enforced:
                on_event(Notice.no_locks(path.parent))
        yield inputs


@contextmanager
def _chain(planned: MergeStep) -> Iterator[tuple[ImageChain, Method]]:
    """The chain, scanned under the locks and still as planned."""
    request = planned.request
    with scan(request.image, format=request.image_format, image_dirs=request.image_dirs) as chain:
        decision = decide(chain, request)
        if not planned.is_still(decision.step):
            raise Conflict("it was changed after the merge was planned", subject=request.image, hint="run it again")
        assert decision.method is not None
        yield chain, decision.method


def _check_room(planned: MergeStep) -> None:
    room = files.free_bytes(planned.result.parent)
    if planned.needs_bytes > room:
        raise Unavailable(
            f"the merged file needs {planned.needs_bytes} bytes beside its inputs, and {room} are free",
            subject=planned.result.parent,
            hint=f"free {planned.needs_bytes - room} bytes more, or merge fewer layers at a time (--from, --to)",
        )


def _allocated(path: Path) -> int:
    try:
        return path.stat().st_blocks * 512
    except FileNotFoundError:
        return 0


def _report(planned: MergeStep, inputs: settle.Settled, *, moved: int = 0, freed: int = 0) -> StepReport:
    stayed = (*planned.keep, *(each for each in inputs.kept if each.path not in {known.path for known in planned.keep}))
    if planned.kept_as is not None:
        stayed = (KeptFile(path=planned.kept_as, reason=f"the former {planned.result.name}"), *stayed)
    return StepReport(
        image=planned.image,
        result=planned.result,
        strategy=planned.strategy,
        layers_before=planned.layers_before,
        layers_after=planned.layers_after,
        bytes_moved=moved,
        bytes_freed=freed,
        removed=tuple(inputs.removed),
        kept=stayed,
        finished=planned.unfinished,
        incomplete=planned.incomplete or inputs.incomplete,
    )


def recover(
    journal: MergeJournal, *, image_dirs: Sequence[Path] = (), noted: bool = True, on_event: OnEvent
) -> settle.Settled:
    """Finish a killed merge, or undo it. Errors as `settle.settle` and `run_step`.

    image_dirs: as of `settle.settle`; noted: as of `run_step`
    """
    live = journal.live
    if live is not None and live_settle.must_be_done_again(journal, live):
        return _recover_live(journal, live, image_dirs, noted=noted, on_event=on_event)
    if journal.stage != "committing" or settle.switched(journal):
        return settle.settle(journal, image_dirs=image_dirs)
    step = plan_step(
        MergeRequest(
            image=journal.replaced.path,
            image_format="qcow2",
            image_dirs=(*journal.search, *image_dirs),
            from_layer=str(journal.lowest),
            strategy=Strategy.COMMIT,
            drop_bitmaps=True,
            remove=journal.confirmed,
        )
    )
    report = run_step(step, noted=noted, on_event=on_event)
    return settle.Settled(list(report.removed), report.kept, report.incomplete)


def _recover_live(
    journal: MergeJournal, live: LiveMerge, image_dirs: Sequence[Path], *, noted: bool, on_event: OnEvent
) -> settle.Settled:
    """Merge the files of a live merge whose guest has ended, as images at rest; the result has the uppermost's path."""
    top = live.inputs[-1].path if journal.top is None else journal.top
    request = MergeRequest(
        image=top,
        image_format="qcow2",
        image_dirs=(*journal.search, *image_dirs),
        drop_bitmaps=True,
        remove=journal.confirmed,
    )
    step = plan_step(request.of_range(live.inputs[0].path, live.inputs[-1].path))
    report = run_step(step, noted=noted, on_event=on_event)
    return settle.Settled(list(report.removed), report.kept, report.incomplete)
