"""What a destination gets after all disks: the room that nobody needs any more, and a look at a sample of the data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from typing import Any

from snapchain.errors import Corrupt
from snapchain.ops import gc
from snapchain.ops.events import Event, Notice, OnEvent, Progress
from snapchain.ops.gc import GcReport
from snapchain.ops.nightly.disk import Night
from snapchain.ops.nightly.place import Place
from snapchain.ops.nightly.report import DestinationReport, Outcome, VerifyResult
from snapchain.ops.nightly.steps import Steps
from snapchain.ops.verify import verify

_NEVER = datetime.min.replace(tzinfo=UTC)


def turns(disks: Sequence[str], verified: Mapping[str, datetime], count: int) -> list[str]:
    """The next `count` disks to be verified: those that were not for longest, new ones first."""
    return sorted(disks, key=lambda disk: verified.get(disk, _NEVER))[:count]


class Upkeep:
    """One destination in one run. `run` does not raise for what is wrong with it: it reports."""

    def __init__(self, night: Night, place: Place, disks: Sequence[str]) -> None:
        """disks: of the configuration that go there."""
        self._night, self._place, self._disks = night, place, disks
        self._steps = Steps()
        self._report = DestinationReport(destination=place.name, outcome=Outcome.OK)

    def run(self) -> DestinationReport:
        """Collect, then verify, as configured."""
        steps, config = self._steps, self._place.config
        if steps.attempt("open", self._place.open).outcome is Outcome.OK:
            if config.gc:
                self._show(gc=steps.attempt("gc", self._collect).value)
            if config.verify is not None:
                steps.attempt("verify", self._verify)
        return self._report.model_copy(
            update={"outcome": steps.outcome, "faults": tuple(steps.faults), "left": tuple(steps.left)}
        )

    def _collect(self) -> GcReport:
        self._night.limits.check()
        with self._place.turn() as repository:
            return gc.run(repository, on_event=self._on_event)

    def _verify(self) -> None:
        config = self._place.config.verify
        assert config is not None
        with self._place.turn() as repository:
            there = {catalogue.disk for catalogue in repository.catalogues()}
            known = self._night.state.now.verified.get(self._place.name, {})
            for disk in turns([each for each in self._disks if each in there], known, config.disks):
                self._night.limits.check()
                found = verify(repository, disk=disk, share=config.share, on_event=self._on_event)
                findings = tuple(f"{each.subject}: {each.message}" for each in found.findings)
                result = VerifyResult(disk=disk, checked_bytes=found.checked_bytes, findings=findings)
                self._show(verified=(*self._report.verified, result))
                self._night.state.put_verified(self._place.name, disk, self._night.clock())
                if findings:
                    self._steps.attempt(f"verify {disk}", partial(_refuse, result))

    def _show(self, **values: Any) -> None:
        self._report = self._report.model_copy(update=values)

    def _on_event(self, event: Event) -> None:
        on_event: OnEvent = self._night.on_event
        match event:
            case Notice(message):
                on_event(Notice(f"{self._place.name}: {message}"))
            case Progress(phase, done, total):
                on_event(Progress(f"{phase} {self._place.name}", done, total))


def _refuse(result: VerifyResult) -> None:
    count = len(result.findings)
    raise Corrupt(
        f"{count} findings, the first: {result.findings[0]}",
        subject=result.disk,
        hint="snapchain verify shows them all",
    )
