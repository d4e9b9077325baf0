"""A run in Prometheus' text format.

What a run did not reach keeps what is known of it: a disk that nobody works on shows as a growing lag, and one that
was never shipped as an infinite one.  Damage that a sample has found stays until it is found repaired.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TypeVar

from snapchain.model.consistency import Consistency
from snapchain.ops import exposition as text
from snapchain.ops.exposition import Family, Labels
from snapchain.ops.nightly.config import Nightly
from snapchain.ops.nightly.report import NightlyReport, Outcome, TurnReport
from snapchain.ops.nightly.state import DestinationState, GuestReached, Reached, State

R = TypeVar("R", Reached, GuestReached)


def write(path: Path, report: NightlyReport, config: Nightly, state: State, *, former: Collection[str] = ()) -> None:
    """Replace the file. former: disks of earlier runs that nobody expects any more. Raises what the place raises."""
    text.write(path, exposition(report, config, state, former=former))


def exposition(report: NightlyReport, config: Nightly, state: State, *, former: Collection[str] = ()) -> bytes:
    """All metrics of a run. Every series has the configuration's name as label `nightly`."""
    return text.encode(_families(report, config, state, former))


def _families(report: NightlyReport, config: Nightly, state: State, former: Collection[str]) -> Iterator[Family]:
    own = {"nightly": report.name}
    now = report.finished
    yield Family("last_run_timestamp_seconds", "When the last run ended.", [(own, now.timestamp())])
    success = float(report.complete)
    yield Family("last_run_success", "Whether the last run did all that was to be done.", [(own, success)])
    yield Family("duration_seconds", "How long the last run took.", [(own, report.seconds)])
    yield Family("disks", "Disks of the last run by outcome.", _counts([each.outcome for each in report.disks], own))
    if config.guests:
        outcomes = [each.outcome for each in report.guests]
        yield Family("guests", "Guests of the last run by outcome.", _counts(outcomes, own))
    faults = len(report.faults) + sum(len(each.faults) for each in report.disks)
    faults += sum(len(each.faults) for each in report.tests)
    faults += sum(len(each.faults) for each in report.guests) + sum(len(each.faults) for each in report.destinations)
    yield Family("faults", "What went wrong in the last run.", [(own, faults)])
    gone = len(report.no_longer_selected)
    yield Family("disks_gone", "Disks that earlier runs have shipped and the last one did not find.", [(own, gone)])
    yield from _of_disks(report, config, state, former, own)
    yield from _of_guests(report, config, state, former, own)
    yield from _of_destinations(report, state, former, own)
    yield from _of_tests(config, state, former, own)


def _counts(outcomes: Sequence[Outcome], own: Labels) -> list[tuple[Labels, float]]:
    return [({**own, "outcome": each.value}, float(outcomes.count(each))) for each in Outcome]


@dataclass(frozen=True, slots=True)
class _Held:
    """What a destination holds of a disk or a guest."""

    success: Family
    lag: Family
    shipped: Family
    stored: Family
    points: Family

    def add(self, there: Labels, reached: Reached | GuestReached | None, now: datetime) -> None:
        """A row of each. reached: what is known of it; None where it has never got there"""
        self.success.rows.append((there, reached.captured.timestamp() if reached else 0.0))
        self.lag.rows.append((there, max((now - reached.captured).total_seconds(), 0.0) if reached else math.inf))
        if reached is not None:
            self.shipped.rows.append((there, reached.shipped_bytes))
            self.stored.rows.append((there, reached.stored_bytes))
            self.points.rows.append((there, reached.points))

    @property
    def families(self) -> tuple[Family, ...]:
        """All of them."""
        return self.success, self.lag, self.shipped, self.stored, self.points


def _reached(row: TurnReport | None, held: Mapping[str, R], config: Nightly) -> Iterator[tuple[str, R | None]]:
    """The destinations of a disk or a guest in this run and earlier ones, with what is known of each."""
    wanted: list[str] = [each.destination for each in row.destinations] if row is not None else []
    for destination in dict.fromkeys([*wanted, *held]):
        # One that is no more in the configuration is left out: its lag would only grow.
        if destination in (*wanted, *(each.name for each in config.destinations)):
            yield destination, held.get(destination)


def _of_disks(
    report: NightlyReport, config: Nightly, state: State, former: Collection[str], own: Labels
) -> Iterator[Family]:
    this_run = {each.disk: each for each in report.disks}
    outcome = Family("disk_success", "Whether the last run did all that was to be done for the disk.")
    seconds = Family("disk_duration_seconds", "How long the last run worked on the disk.")
    length = Family("chain_length", "Files of the local chain, root and top included.")
    shadowed = Family("shadowed_bytes", "Data in the local chain that layers above hide.")
    freed = Family("merge_freed_bytes", "What the last local merge freed.")
    held = _Held(
        success=Family(
            "last_success_timestamp_seconds", "When what the destination holds of the disk was current; 0: never."
        ),
        lag=Family(
            "rpo_lag_seconds", "How old that was when the last run ended: what a loss of the source would cost."
        ),
        shipped=Family("shipped_bytes", "Guest bytes read for the last shipment of the disk."),
        stored=Family("stored_bytes", "What the last shipment of the disk took at the destination."),
        points=Family("points", "Points of the disk at the destination."),
    )
    layers = Family("layers", "Layers of the disk at the destination.")
    for name in dict.fromkeys([*this_run, *state.disks]):
        if name in former:
            continue
        labels = {**own, "disk": name}
        known, row = state.disks.get(name), this_run.get(name)
        if row is not None:
            outcome.rows.append((labels, float(row.outcome in (Outcome.OK, Outcome.MOVED))))
            seconds.rows.append((labels, row.seconds))
        if known is not None:
            if known.chain_length is not None:
                length.rows.append((labels, known.chain_length))
            if known.shadowed_bytes is not None:
                shadowed.rows.append((labels, known.shadowed_bytes))
            freed.rows.append((labels, known.merge_freed_bytes))
        for destination, reached in _reached(row, {} if known is None else known.destinations, config):
            there = {**labels, "destination": destination}
            held.add(there, reached, report.finished)
            if reached is not None:
                layers.rows.append((there, reached.layers))
    yield from (outcome, seconds, length, shadowed, freed, *held.families, layers)


def _of_guests(
    report: NightlyReport, config: Nightly, state: State, former: Collection[str], own: Labels
) -> Iterator[Family]:
    this_run = {each.guest: each for each in report.guests}
    gone = Family("guests_gone", "Guests that earlier runs have shipped, and that are not defined any more.")
    outcome = Family("guest_success", "Whether the last run did all that was to be done for the guest.")
    seconds = Family("guest_duration_seconds", "How long the last run worked on the guest.")
    frozen = Family("guest_frozen_seconds", "How long the guest's filesystems were frozen for the last snapshot.")
    length = Family("guest_chain_length", "Files of the local chain of the guest's disk, root and top included.")
    freed = Family("guest_merge_freed_bytes", "What the last local merges of the guest's disks freed.")
    held = _Held(
        success=Family(
            "guest_last_success_timestamp_seconds",
            "When the newest guest point at the destination was taken; 0: never.",
        ),
        lag=Family("guest_rpo_lag_seconds", "How old that was when the last run ended."),
        shipped=Family("guest_shipped_bytes", "Guest bytes read for the last shipment of all disks."),
        stored=Family("guest_stored_bytes", "What that shipment took at the destination."),
        points=Family("guest_points", "Guest points at the destination."),
    )
    level = Family("guest_consistency", "1 for the consistency of the newest guest point at the destination, 0 else.")
    if config.guests:
        gone.rows.append((own, float(len(report.guests_gone))))
    for name in dict.fromkeys([*this_run, *state.guests]):
        if name in former:
            continue
        labels = {**own, "guest": name}
        known, row = state.guests.get(name), this_run.get(name)
        if row is not None:
            outcome.rows.append((labels, float(row.outcome in (Outcome.OK, Outcome.MOVED))))
            seconds.rows.append((labels, row.seconds))
        if known is not None:
            length.rows += [({**labels, "disk": disk}, count) for disk, count in sorted(known.chain_lengths.items())]
            freed.rows.append((labels, known.merge_freed_bytes))
            if known.frozen_seconds is not None:
                frozen.rows.append((labels, known.frozen_seconds))
        for destination, reached in _reached(row, {} if known is None else known.destinations, config):
            there = {**labels, "destination": destination}
            held.add(there, reached, report.finished)
            if reached is not None:
                level.rows += [
                    ({**there, "consistency": each.value}, float(each is reached.consistency)) for each in Consistency
                ]
    yield from (gone, outcome, seconds, frozen, length, freed, *held.families, level)


def _of_destinations(report: NightlyReport, state: State, former: Collection[str], own: Labels) -> Iterator[Family]:
    success = Family("destination_success", "Whether the last run could use and keep up the destination.")
    collected = Family("gc_timestamp_seconds", "When the last gc ended; 0: never.")
    freed = Family("gc_freed_bytes", "What the last gc gave back.")
    checked = Family("verified_bytes", "Guest bytes that the last sample read and compared.")
    findings = Family("verify_findings", "What was found damaged or missing, of disks that are not yet found whole.")
    for each in report.destinations:
        labels, known = {**own, "destination": each.destination}, state.destinations.get(each.destination)
        success.rows.append((labels, float(each.outcome is Outcome.OK)))
        known = known or DestinationState()
        collected.rows.append((labels, known.gc_at.timestamp() if known.gc_at else 0.0))
        freed.rows.append((labels, known.gc_freed_bytes))
        checked.rows.append((labels, known.checked_bytes))
        damaged = sum(count for disk, count in known.damaged.items() if disk not in former)
        findings.rows.append((labels, damaged))
    yield from (success, collected, freed, checked, findings)


def _of_tests(config: Nightly, state: State, former: Collection[str], own: Labels) -> Iterator[Family]:
    success = Family("guest_boot_test_success", "Whether the last clone of the guest from the destination booted.")
    tested = Family("guest_boot_test_timestamp_seconds", "When that was.")
    seconds = Family("guest_boot_test_duration_seconds", "How long that clone took to boot.")
    places = {each.name for each in config.destinations}
    for key, test in state.tests.items() if config.test is not None else ():
        guest, _, destination = key.rpartition("@")
        if guest in former or destination not in places or test.tested is None:
            continue
        labels = {**own, "guest": guest, "destination": destination}
        success.rows.append((labels, float(test.ok is True)))
        tested.rows.append((labels, test.tested.timestamp()))
        if test.boot_seconds is not None:
            seconds.rows.append((labels, test.boot_seconds))
    yield from (success, tested, seconds)
