"""A run in Prometheus' text format, for node_exporter's textfile collector; replaced whole, so never half there.

What a run did not reach keeps what is known of it: a disk that nobody works on shows as a growing lag.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from snapchain.host import files
from snapchain.host.os_errors import os_errors
from snapchain.ops.nightly.report import NightlyReport, Outcome
from snapchain.ops.nightly.state import State

_READABLE = 0o644
Labels = dict[str, str]


@dataclass(slots=True)
class _Family:
    """One metric, all of its series."""

    name: str
    help: str
    rows: list[tuple[Labels, float]] = field(default_factory=list)

    def lines(self) -> Iterator[str]:
        if not self.rows:
            return
        yield f"# HELP snapchain_{self.name} {_escaped(self.help)}"
        yield f"# TYPE snapchain_{self.name} gauge"
        for labels, value in self.rows:
            told = ",".join(f'{name}="{_escaped(text, quote=True)}"' for name, text in labels.items())
            yield f"snapchain_{self.name}{{{told}}} {float(value)!r}"


def _escaped(text: str, *, quote: bool = False) -> str:
    plain = text.replace("\\", "\\\\").replace("\n", "\\n")
    return plain.replace('"', '\\"') if quote else plain


def write(path: Path, report: NightlyReport, state: State) -> None:
    """Replace the file. Raises what the directory raises."""
    with os_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        files.remove_temporaries(path, purpose=files.NEW)
        temporary = files.temporary_beside(path, purpose=files.NEW)
        with os.fdopen(files.open_new(temporary), "wb") as file:
            # Whatever the umask: the exporter runs as somebody else.
            os.fchmod(file.fileno(), _READABLE)
            file.write(text(report, state).encode())
        files.publish(temporary, path)


def text(report: NightlyReport, state: State) -> str:
    """All metrics of a run. Every series bears the configuration's name as label `nightly`."""
    lines = [line for family in _families(report, state) for line in family.lines()]
    return "\n".join(lines) + "\n"


def _families(report: NightlyReport, state: State) -> Iterator[_Family]:
    own = {"nightly": report.name}
    now = report.finished
    yield _Family("last_run_timestamp_seconds", "When the last run ended.", [(own, now.timestamp())])
    success = float(report.complete)
    yield _Family("last_run_success", "Whether the last run did all that was to be done.", [(own, success)])
    yield _Family("duration_seconds", "How long the last run took.", [(own, report.seconds)])
    counts = [({**own, "outcome": each.value}, float(report.counts.get(each, 0))) for each in Outcome]
    yield _Family("disks", "Disks of the last run by outcome.", counts)
    yield from _of_disks(report, state, own, now)
    yield from _of_destinations(report, own)


def _of_disks(report: NightlyReport, state: State, own: Labels, now: datetime) -> Iterator[_Family]:
    this_run = {each.disk: each for each in report.disks}
    outcome = _Family("disk_success", "Whether the last run did all that was to be done for the disk.")
    seconds = _Family("disk_duration_seconds", "How long the last run worked on the disk.")
    length = _Family("chain_length", "Files of the local chain, root and top included.")
    shadowed = _Family("shadowed_bytes", "Data in the local chain that layers above hide.")
    freed = _Family("merge_freed_bytes", "What the last local merge freed.")
    success = _Family("last_success_timestamp_seconds", "When what the destination holds of the disk was current.")
    lag = _Family("rpo_lag_seconds", "How old that was when the last run ended: what a loss of the source would cost.")
    shipped = _Family("shipped_bytes", "Guest bytes read for the last shipment of the disk.")
    stored = _Family("stored_bytes", "What the last shipment of the disk took at the destination.")
    points = _Family("points", "Points of the disk at the destination.")
    layers = _Family("layers", "Layers of the disk at the destination.")
    for name in dict.fromkeys([*this_run, *state.disks]):
        labels = {**own, "disk": name}
        known, row = state.disks.get(name), this_run.get(name)
        if row is not None:
            outcome.rows.append((labels, float(row.outcome is Outcome.OK)))
            seconds.rows.append((labels, row.seconds))
        if known is None:
            continue
        if known.chain_length is not None:
            length.rows.append((labels, known.chain_length))
        if known.shadowed_bytes is not None:
            shadowed.rows.append((labels, known.shadowed_bytes))
        freed.rows.append((labels, known.merge_freed_bytes))
        for destination, reached in known.destinations.items():
            there = {**labels, "destination": destination}
            success.rows.append((there, reached.captured.timestamp()))
            lag.rows.append((there, max((now - reached.captured).total_seconds(), 0.0)))
            shipped.rows.append((there, reached.shipped_bytes))
            stored.rows.append((there, reached.stored_bytes))
            points.rows.append((there, reached.points))
            layers.rows.append((there, reached.layers))
    yield from (outcome, seconds, length, shadowed, freed, success, lag, shipped, stored, points, layers)


def _of_destinations(report: NightlyReport, own: Labels) -> Iterator[_Family]:
    success = _Family("destination_success", "Whether the last run could use and keep up the destination.")
    freed = _Family("gc_freed_bytes", "What the last gc gave back.")
    checked = _Family("verified_bytes", "Guest bytes of the sample that the last run read and compared.")
    findings = _Family("verify_findings", "What the last run found damaged or missing.")
    for each in report.destinations:
        labels = {**own, "destination": each.destination}
        success.rows.append((labels, float(each.outcome is Outcome.OK)))
        if each.gc is not None:
            freed.rows.append((labels, each.gc.bytes_freed))
        checked.rows.append((labels, sum(result.checked_bytes for result in each.verified)))
        findings.rows.append((labels, sum(len(result.findings) for result in each.verified)))
    yield from (success, freed, checked, findings)
