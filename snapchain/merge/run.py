"""Carrying out a merge: settle what killed ones have left, lock, look again, work by the strategy, remove the inputs.

Nobody can start a guest on any of the files meanwhile (QEMU's own locks).  Killed at any moment: the image reads as
before, and the next run finishes or undoes by the journal.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from snapchain.errors import Conflict, SnapchainError, Unavailable
from snapchain.host import files
from snapchain.host.directory import place_to_change
from snapchain.host.locks import ImageLock, LockMode
from snapchain.host.openers import OpenFiles
from snapchain.host.terminal import shell_word
from snapchain.image import ImageChain, scan
from snapchain.merge import in_place, new_file, settle
from snapchain.merge.amendment import Amendment
from snapchain.merge.inputs import KeptFile
from snapchain.merge.journal import MergeJournal, taken, unsettled
from snapchain.merge.methods import Method
from snapchain.merge.step import Asked, MergeStep, decide
from snapchain.model.events import Notice, OnEvent, ignore
from snapchain.model.merging import Strategy
from snapchain.source.counted_sums import carry_over
from snapchain.source.lineage import record
from snapchain.source.notes import Notes


class StepReport(BaseModel):
    """What `run` did. Sizes in bytes.

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


def run(planned: MergeStep, *, noted: bool = True, on_event: OnEvent = ignore) -> StepReport:
    """Do it. noted: what the result was made of is recorded beside it (source/notes.py).

    Raises Busy when somebody has a file of the chain open, Conflict when it is no longer as planned, Unavailable when
    room would not suffice, Corrupt when the result is not the same as the inputs: then nothing was changed.
    """
    leftovers = _settle(planned, on_event)
    if planned.strategy is Strategy.NOTHING:
        return _report(planned, leftovers)
    with _locks(planned, on_event) as locks, _chain(planned) as (old, way):
        _check_room(planned)
        for sentence in Notes().ignored(file.resolved for file in old.files):
            on_event(Notice(sentence))
        # The uppermost input goes, too, unless it gets a second name.
        gone = [*planned.remove, *([] if planned.kept_as else [planned.result])]
        before = sum(_allocated(path) for path in gone)
        if isinstance(way.work, Amendment):
            journal = in_place.make(planned, way.work, old, locks=locks, on_event=on_event)
        else:
            journal = new_file.make(planned, way.work, old, locks=locks, on_event=on_event)
        if journal.unmarked is not None:
            on_event(Notice.of(planned.result, f"its journal bears no mark of this user: {journal.unmarked}"))
        if noted:
            _note(planned, old, on_event)
        settled = settle.finish(journal)
        if noted:
            _carry_over(planned, old, on_event)
        removed = settled.removed
        if planned.strategy is Strategy.COMMIT:
            removed.append(journal.journal.lowest)
    return _report(
        planned,
        settle.Settled(
            [*leftovers.removed, *removed],
            (*leftovers.kept, *settled.kept),
            leftovers.incomplete or settled.incomplete,
        ),
        moved=way.bytes_moved,
        freed=before - sum(_allocated(path) for path in [planned.result, *planned.remove]),
    )


def _note(planned: MergeStep, old: ImageChain, on_event: OnEvent) -> None:
    """So that a shipment knows the inputs again in the result. The merge is done, with this or without."""
    try:
        is_top = planned.last == len(old.files) - 1
        record(old.files[planned.first : planned.last + 1], planned.result, is_top=is_top)
    except SnapchainError as error:
        on_event(Notice(f"{planned.result}: cannot note what it was made of, so it is shipped as a whole: {error}"))


def _carry_over(planned: MergeStep, old: ImageChain, on_event: OnEvent) -> None:
    """So that a sender need not read the result again to know what it shows."""
    try:
        carry_over(
            planned.image,
            old,
            lambda: scan(planned.image, format=planned.image_format, image_dirs=planned.image_dirs),
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
    """All files locked against writers, the inputs once found free of anybody; gives the inputs' locks."""
    with ExitStack() as stack:
        inputs: list[ImageLock] = []
        open_files = OpenFiles()
        for number, path in enumerate(planned.chain):
            is_input = planned.first <= number <= planned.last
            lock = stack.enter_context(
                ImageLock(path, LockMode.WRITE if is_input else LockMode.READ, open_files=open_files)
            )
            if is_input:
                if planned.strategy is Strategy.NEW:
                    lock.change(LockMode.READ)  # others may read it until the switch
                inputs.append(lock)
            if not lock.enforced:
                on_event(Notice.no_locks(path.parent))
        yield inputs


@contextmanager
def _chain(planned: MergeStep) -> Iterator[tuple[ImageChain, Method]]:
    """The chain, scanned under the locks and still as planned."""
    asked = Asked(
        image=planned.image,
        flatten=False,
        from_layer=str(planned.chain[planned.first]),
        to_layer=str(planned.chain[planned.last]),
        strategy=planned.strategy,
        cluster_size=planned.cluster_size if planned.strategy is Strategy.NEW else None,
        keep_inputs=planned.keep_inputs,
        drop_bitmaps=planned.drop_bitmaps,
        image_format=planned.image_format,
        image_dirs=planned.image_dirs,
        confirmed=planned.confirmed,
    )
    # What room there is, what killed merges had left, and how far the search came, may be otherwise now.
    passing: dict[str, object] = {
        "free_bytes": 0,
        "needs_bytes": 0,
        "unfinished": (),
        "kept_as": None,
        "incomplete": None,
    }
    with scan(planned.image, format=planned.image_format, image_dirs=planned.image_dirs) as chain:
        decision = decide(chain, asked)
        if decision.plan.model_copy(update=passing) != planned.model_copy(update=passing):
            raise Conflict("it was changed after the merge was planned", subject=planned.image, hint="run it again")
        assert decision.way is not None
        yield chain, decision.way


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
