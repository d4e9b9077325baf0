"""What came of the boot of a clone, as `failover --test` and `verify --boot` show it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from snapchain.cli import quantities, render
from snapchain.cli.quantities import moment, size

if TYPE_CHECKING:
    from rich.console import Console

    from snapchain.ops.failover.trial import TrialReport, TrialsReport

_BY = {
    "agent": "its agent answers",
    "check": "the check succeeds",
    "console": "its console says so",
    "running": "it runs, and has no agent",
}


def draw_trials(console: Console, report: TrialsReport) -> None:
    """Of several guests."""
    for each in report.guests:
        draw_trial(console, each)


def draw_trial(console: Console, report: TrialReport) -> None:
    """Of one."""
    said = _BY[report.by] if report.ok else report.why_not
    point = f"guest point {report.guest_point} of {moment(report.time)}"
    render.headline(console, f"{report.guest}, {point}: {'booted' if report.ok else 'did not boot'}: {said}")
    took = f"{quantities.duration(report.boot_seconds)} of {quantities.duration(report.seconds)}"
    what = "written by it" if report.served else "restored"
    render.facts(console, [(what, size(report.bytes_written)), ("boot", took)])
    if report.console:
        render.line(console, "the last lines on its console:")
        for line in report.console:
            render.line(console, f"  {line}")
