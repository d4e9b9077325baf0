"""What is done at a destination after all disks: it is copied to, collected, and verified."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from functools import partial
from typing import Any

from snapchain.destination.protocol import Destination
from snapchain.destination.records import GcReport
from snapchain.errors import Corrupt, NotFound, SnapchainError
from snapchain.host.terminal import counted
from snapchain.model.events import Event, Notice, OnEvent, Progress
from snapchain.ops import guest_verify
from snapchain.ops.guest_points import find_guest, guests_of, records_of
from snapchain.ops.nightly.mirror import Mirror
from snapchain.ops.nightly.open_destination import OpenDestination
from snapchain.ops.nightly.plan import order
from snapchain.ops.nightly.report import DestinationReport, Outcome, VerifyResult
from snapchain.ops.nightly.steps import Steps
from snapchain.ops.nightly.turn import TRIES, Night

_LEAST_SAMPLE = 64 << 20
"""Guest bytes."""


def turns(
    disks: Sequence[str],
    verified: Mapping[str, datetime],
    count: int,
    *,
    damaged: Collection[str] = (),
    now: datetime | None = None,
) -> list[str]:
    """The disks to be verified: the damaged ones, and `count` that were not for longest, new ones first.

    A sample that happens to miss the damage must not make it forgotten.
    """
    others = order([disk for disk in disks if disk not in damaged], str, verified, now=now)
    return [*(disk for disk in disks if disk in damaged), *others[:count]]


class Maintenance:
    """One destination in one run. `run` does not raise for what is wrong with it: it reports."""

    def __init__(
        self, night: Night, place: OpenDestination, disks: Sequence[str], *, guests: Sequence[str] = ()
    ) -> None:
        """disks, guests: of the configuration that go there. A guest is verified whole, with all its disks."""
        self._night, self._place, self._disks, self._guests = night, place, disks, guests
        self._steps = Steps()
        self._report = DestinationReport(destination=place.name, outcome=Outcome.OK, copy_of=place.config.copy_of)

    def run(self) -> None:
        """Copy, collect, then verify, as configured. An interrupt passes; `report` has what was done before it."""
        steps, config = self._steps, self._place.config
        if steps.attempt("open", self._place.open).outcome is Outcome.OK:
            if config.copy_of is not None:
                steps.attempt(f"copy of {config.copy_of}", self._copy)
            if config.gc and self._place.traits.needs_collecting:
                self._show(gc=steps.attempt("gc", self._collect).value)
                self._note_damage()
            if config.verify is not None:
                steps.attempt("verify", self._verify)

    @property
    def report(self) -> DestinationReport:
        """The report of what was done so far."""
        steps = self._steps
        values = {"outcome": steps.outcome, "faults": tuple(steps.faults), "left": tuple(steps.left)}
        return self._report.model_copy(update=values)

    def _copy(self) -> None:
        """Disks and guests that the source does not have yet have failed there, which their own reports say."""
        mirror = Mirror(self._night, self._place, guests=self._guests)
        with mirror.source.turn() as source:
            there = [*_disks_there(source, self._disks), *_guests_there(source, self._guests)]
        for name in there:
            try:
                self._steps.attempt(f"copy {name} of {mirror.source.name}", partial(mirror.copy, name), tries=TRIES)
            finally:
                self._show(copied=tuple(mirror.results))

    def _collect(self) -> GcReport:
        self._night.limits.check()
        with self._place.turn() as destination:
            done = destination.collecting().run(on_event=self._on_event)
        self._night.state.put_destination(self._place.name, gc_at=self._night.clock(), gc_freed_bytes=done.bytes_freed)
        return done

    def _note_damage(self) -> None:
        """gc works around damage, but damage is still a fault of the run."""
        findings = self._report.gc.findings if self._report.gc else ()
        if findings:
            first = findings[0]
            words = f"{counted(len(findings), 'finding')}, the first: {first.subject}: {first.message}"
            self._steps.note("gc", Corrupt(words, subject=first.disk, hint="snapchain verify shows them all"))

    @property
    def damaged(self) -> frozenset[str]:
        """The disks of which this run found something to be lost, be it by gc or by verify."""
        collected = self._report.gc.findings if self._report.gc else ()
        verified = (each.disk for each in self._report.verified if each.findings)
        return frozenset(each.disk for each in collected if each.disk is not None).union(verified)

    @property
    def damaged_guests(self) -> frozenset[str]:
        """The guests one of whose disks is damaged, or a record."""
        return frozenset(
            guest for guest in self._guests if any(f"{each}/".startswith(f"{guest}/") for each in self.damaged)
        )

    def _verify(self) -> None:
        config, known = self._place.config.verify, self._night.state.destination(self._place.name)
        assert config is not None
        self._night.limits.check()
        with self._place.turn() as destination:
            there = [*_disks_there(destination, self._disks), *_guests_there(destination, self._guests)]
        wanted = turns(there, known.verified, config.disks, now=self._night.clock(), damaged=known.damaged)
        for disk in wanted:
            self._steps.attempt(f"verify {disk}", partial(self._look_at, disk, 1.0 if disk in known.damaged else None))
        checked = sum(result.checked_bytes for result in self._report.verified)
        self._night.state.put_destination(self._place.name, checked_bytes=checked)

    def _look_at(self, disk: str, share: float | None) -> None:
        """Raises Corrupt for damage, which is remembered until the disk was read whole without any."""
        config = self._place.config.verify
        assert config is not None
        self._night.limits.check()

        def heard(event: Event) -> None:
            self._on_event(event)
            self._night.limits.check()

        with self._place.turn() as destination:
            names = _disks_of(destination, disk) if disk in self._guests else [disk]
            share = max(_of_some_size(destination, each, config.share) for each in names) if share is None else share
            found = guest_verify.verify(destination, disk, share=share, on_event=heard)
        findings = tuple(f"{each.subject}: {each.message}" for each in found.findings)
        self._show(
            verified=(
                *self._report.verified,
                VerifyResult(disk=disk, checked_bytes=found.checked_bytes, findings=findings),
            )
        )
        self._night.state.put_destination(
            self._place.name, verified={disk: self._night.clock()}, damaged={disk: len(findings)}
        )
        if findings:
            raise Corrupt(
                f"{counted(len(findings), 'finding')}, the first: {findings[0]}",
                subject=disk,
                hint="snapchain verify shows them all; the next runs read this disk whole until there are none",
            )

    def _show(self, **values: Any) -> None:
        self._report = self._report.model_copy(update=values)

    def _on_event(self, event: Event) -> None:
        on_event: OnEvent = self._night.on_event
        match event:
            case Notice():
                if self._night.is_new(event.text):
                    on_event(event.within(self._place.name))
            case Progress(phase):
                on_event(replace(event, phase=f"{phase} {self._place.name}"))


def _of_some_size(destination: Destination, disk: str, share: float) -> float:
    """Five per cent of a small disk may be nothing at all: a share that is large enough to be a sample."""
    if not share:
        return share
    try:
        with destination.reader(disk, chain=True, maps_only=True) as point:
            data = point.data_bytes
    except SnapchainError:
        return share  # the check itself reports it
    return min(max(share, _LEAST_SAMPLE / data), 1.0) if data else share


def _disks_of(destination: Destination, guest: str) -> Sequence[str]:
    """The disks of a guest there, at least one name."""
    view = find_guest(destination, guest)
    return view.disks if view is not None and view.disks else [guest]


def _guests_there(destination: Destination, guests: Sequence[str]) -> list[str]:
    """Those of the guests that have a guest point there."""
    if not guests:
        return []
    try:
        known = {view.name for view in guests_of(records_of(destination, guests)) if view.points}
    except NotFound:
        return []
    except SnapchainError:  # the check of each reports it
        return list(guests)
    return [guest for guest in guests if guest in known]


def _disks_there(destination: Destination, disks: Sequence[str]) -> list[str]:
    """Those of the disks that have a record there. One whose record is damaged counts: its check reports it."""
    if not destination.traits.streams:  # it may have 10,000 others
        return [disk for disk in disks if _is_there(destination, disk)]
    try:
        known = {each.name for each in destination.disks()}
        return [disk for disk in disks if disk in known]
    except NotFound:
        return []
    except SnapchainError:
        return [disk for disk in disks if _is_there(destination, disk)]


def _is_there(destination: Destination, disk: str) -> bool:
    try:
        destination.disks(disk)
    except NotFound:
        return False
    except SnapchainError:
        return True
    return True
