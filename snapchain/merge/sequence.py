"""One merge of a set after the other, uppermost first: a failure of one leaves the others done, and says so."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from snapchain.errors import Conflict, SnapchainError
from snapchain.merge import rates, run as merge_run, step as merge_plan
from snapchain.merge.inputs import KeptFile
from snapchain.merge.plan import NOTHING, MergePlan
from snapchain.merge.run import StepReport
from snapchain.merge.step import MergeStep
from snapchain.model.events import Event, Notice, OnEvent, Progress, ignore
from snapchain.model.merging import Strategy


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
    """Do it. What cannot be merged is told in the report, when another merge of the set was done.

    Raises Unavailable when the room does not suffice, before anything is moved; what merge.run.run raises, when
    nothing was merged; Conflict when the chain is no longer as planned.
    """
    planned.check_room()
    done: list[StepReport] = []
    failed: list[Fault] = []
    first_error: SnapchainError | None = None
    settled: list[Path] = []
    began = time.monotonic()
    for number, each in enumerate(reversed(planned.plans), start=1):
        listener = _numbered(on_event, number, len(planned.plans))
        try:
            current = each if number == 1 else _again(each)
            done.append(_timed(current, listener))
        except SnapchainError as error:
            first_error = first_error or error
            failed.append(Fault(layers=each.chain[each.first : each.last + 1], kind=error.kind, message=str(error)))
            if number < len(planned.plans):
                on_event(Notice(f"{each.result.name} was not merged, the others are: {error}"))
    if first_error is not None and not done:
        raise first_error
    if not planned.plans:
        settled = _settle(planned, on_event)
    return _report(planned, done[::-1], failed[::-1], settled, time.monotonic() - began)


def _timed(planned: MergeStep, on_event: OnEvent) -> StepReport:
    began = time.monotonic()
    report = merge_run.run(planned, on_event=on_event)
    rates.remember(
        planned.result.parent,
        planned.strategy.value,
        moved=report.bytes_moved,
        seconds=time.monotonic() - began,
        shared=planned.shares_extents,
    )
    return report


def _again(planned: MergeStep) -> MergeStep:
    """The plan of one merge after those above it were done. Raises Conflict when others changed its files."""
    files = planned.chain[planned.first : planned.last + 1]
    now = merge_plan.plan(
        planned.image,
        from_layer=str(files[0]),
        to_layer=str(files[-1]),
        strategy=planned.strategy,
        cluster_size=planned.cluster_size if planned.strategy is Strategy.NEW else None,
        keep_inputs=planned.keep_inputs,
        drop_bitmaps=planned.drop_bitmaps,
        image_format=planned.image_format,
        image_dirs=planned.image_dirs,
        confirmed=planned.confirmed,
    )
    if now.chain[now.first : now.last + 1] != files:
        raise Conflict("its chain was changed meanwhile", subject=planned.image, hint="run it again")
    return now


def _settle(planned: MergePlan, on_event: OnEvent) -> list[Path]:
    """Nothing is to be merged; what killed merges have left is put in order all the same."""
    if planned.idle is None or not planned.unfinished:
        return []
    return list(merge_run.run(planned.idle, on_event=on_event).removed)


def _numbered(on_event: OnEvent, number: int, count: int) -> OnEvent:
    """Each merge of several has phases of its own."""
    if count == 1:
        return on_event

    def listen(event: Event) -> None:
        if isinstance(event, Progress):
            event = replace(event, phase=f"{event.phase} {number}/{count}")
        on_event(event)

    return listen


def _report(
    planned: MergePlan,
    done: Sequence[StepReport],
    failed: Sequence[Fault],
    settled: Sequence[Path],
    seconds: float,
) -> MergeReport:
    return MergeReport(
        image=planned.image,
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
        finished=planned.unfinished,
        merges=tuple(done),
        failed=tuple(failed),
        incomplete=next(filter(None, (each.incomplete for each in done)), None),
    )
