"""A run in Prometheus' text format, for node_exporter's textfile collector; replaced whole, so never half there.

What a run did not reach keeps what is known of it: a disk that nobody works on shows as a growing lag, and one that
was never shipped as an infinite one.  Damage that a sample has found stays until it is found repaired.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import GaugeMetricFamily

from snapchain.host import files
from snapchain.host.temporary_names import NEW
from snapchain.host.terminal import printable
from snapchain.ops.nightly.config import Nightly
from snapchain.ops.nightly.report import NightlyReport, Outcome
from snapchain.ops.nightly.state import DestinationState, State

_READABLE = 0o644
Labels = dict[str, str]


@dataclass(slots=True)
class _Family:
    """One metric, all of its series."""

    name: str
    help: str
    rows: list[tuple[Labels, float]] = field(default_factory=list)

    def gauge(self) -> GaugeMetricFamily:
        """As prometheus_client has it. A label may be shown by `cat`: control characters of a name are escaped."""
        names = list(self.rows[0][0])
        made = GaugeMetricFamily(f"snapchain_{self.name}", self.help, labels=names)
        for labels, value in self.rows:
            made.add_metric([printable(labels[name]) for name in names], value)
        return made


@dataclass(frozen=True, eq=False)
class _Run:
    """A collector of what one run found."""

    families: list[_Family]

    def collect(self) -> Iterator[GaugeMetricFamily]:
        return (family.gauge() for family in self.families if family.rows)


def write(path: Path, report: NightlyReport, config: Nightly, state: State, *, former: Collection[str] = ()) -> None:
    """Replace the file. former: disks of earlier runs that nobody expects any more. Raises what the place raises."""
    files.make_directories(path.parent, mode=0o755)
    files.remove_temporaries(path, purpose=NEW)
    # Whatever the umask: the exporter runs as somebody else.
    data = exposition(report, config, state, former=former)
    files.write_atomically(path, data, mode=_READABLE, whatever_the_umask=True)


def exposition(report: NightlyReport, config: Nightly, state: State, *, former: Collection[str] = ()) -> bytes:
    """All metrics of a run. Every series has the configuration's name as label `nightly`."""
    registry = CollectorRegistry()
    registry.register(_Run(list(_families(report, config, state, former))))
    return generate_latest(registry)


def _families(report: NightlyReport, config: Nightly, state: State, former: Collection[str]) -> Iterator[_Family]:
    own = {"nightly": report.name}
    now = report.finished
    yield _Family("last_run_timestamp_seconds", "When the last run ended.", [(own, now.timestamp())])
    success = float(report.complete)
    yield _Family("last_run_success", "Whether the last run did all that was to be done.", [(own, success)])
    yield _Family("duration_seconds", "How long the last run took.", [(own, report.seconds)])
    counts = [({**own, "outcome": each.value}, float(report.counts.get(each, 0))) for each in Outcome]
    yield _Family("disks", "Disks of the last run by outcome.", counts)
    faults = len(report.faults) + sum(len(each.faults) for each in report.disks)
    faults += sum(len(each.faults) for each in report.destinations)
    yield _Family("faults", "What went wrong in the last run.", [(own, faults)])
    gone = len(report.no_longer_selected)
    yield _Family("disks_gone", "Disks that earlier runs have shipped and the last one did not find.", [(own, gone)])
    yield from _of_disks(report, config, state, former, own)
    yield from _of_destinations(report, state, former, own)


def _of_disks(
    report: NightlyReport, config: Nightly, state: State, former: Collection[str], own: Labels
) -> Iterator[_Family]:
    this_run, now = {each.disk: each for each in report.disks}, report.finished
    outcome = _Family("disk_success", "Whether the last run did all that was to be done for the disk.")
    seconds = _Family("disk_duration_seconds", "How long the last run worked on the disk.")
    length = _Family("chain_length", "Files of the local chain, root and top included.")
    shadowed = _Family("shadowed_bytes", "Data in the local chain that layers above hide.")
    freed = _Family("merge_freed_bytes", "What the last local merge freed.")
    success = _Family(
        "last_success_timestamp_seconds", "When what the destination holds of the disk was current; 0: never."
    )
    lag = _Family("rpo_lag_seconds", "How old that was when the last run ended: what a loss of the source would cost.")
    shipped = _Family("shipped_bytes", "Guest bytes read for the last shipment of the disk.")
    stored = _Family("stored_bytes", "What the last shipment of the disk took at the destination.")
    points = _Family("points", "Points of the disk at the destination.")
    layers = _Family("layers", "Layers of the disk at the destination.")
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
        held = known.destinations if known is not None else {}
        wanted = [each.destination for each in row.destinations] if row is not None else []
        for destination in dict.fromkeys([*wanted, *held]):
            if destination not in (*wanted, *(each.name for each in config.destinations)):
                continue  # no more in the configuration: its lag would only grow
            there, reached = {**labels, "destination": destination}, held.get(destination)
            success.rows.append((there, reached.captured.timestamp() if reached else 0.0))
            lag.rows.append((there, max((now - reached.captured).total_seconds(), 0.0) if reached else math.inf))
            if reached is not None:
                shipped.rows.append((there, reached.shipped_bytes))
                stored.rows.append((there, reached.stored_bytes))
                points.rows.append((there, reached.points))
                layers.rows.append((there, reached.layers))
    yield from (outcome, seconds, length, shadowed, freed, success, lag, shipped, stored, points, layers)


def _of_destinations(report: NightlyReport, state: State, former: Collection[str], own: Labels) -> Iterator[_Family]:
    success = _Family("destination_success", "Whether the last run could use and keep up the destination.")
    collected = _Family("gc_timestamp_seconds", "When the last gc ended; 0: never.")
    freed = _Family("gc_freed_bytes", "What the last gc gave back.")
    checked = _Family("verified_bytes", "Guest bytes that the last sample read and compared.")
    findings = _Family("verify_findings", "What was found damaged or missing, of disks that are not yet found whole.")
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
