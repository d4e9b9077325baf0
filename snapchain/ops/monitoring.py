"""status for monitoring: one line and an exit code as Nagios plugins give them, and metrics for Prometheus."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from enum import IntEnum
from pathlib import Path

from snapchain.errors import SnapchainError
from snapchain.host.terminal import counted, printable
from snapchain.ops import exposition
from snapchain.ops.exposition import Family, Labels
from snapchain.ops.status import DiskStatus, StatusReport

_NAMED = 3
"""Disks that a line names; the others are counted."""


class Level(IntEnum):
    """The exit codes of Nagios plugins."""

    OK = 0
    WARNING = 1
    CRITICAL = 2
    UNKNOWN = 3


def nagios(report: StatusReport) -> tuple[Level, str]:
    """The level, and the line with its performance data.

    CRITICAL: a disk is late or cannot be read. UNKNOWN: a destination cannot be asked, or nothing is there.
    WARNING: points of the future, or a guest of which something is owed.
    """
    unread = [each for each in report.disks if each.trouble is not None]
    future = [each for each in report.disks if each.points_of_the_future]
    silent = [each for each in report.destinations if each.trouble is not None]
    owing = [each for each in report.guests if each.owed or each.fault]
    found = [
        (Level.CRITICAL, len(report.late), f"{counted(len(report.late), 'disk')} late ({_named(report.late)})"),
        (Level.CRITICAL, len(unread), f"{counted(len(unread), 'disk')} unreadable ({_named(unread)})"),
        (
            Level.UNKNOWN,
            len(silent),
            ", ".join(f"{each.destination}: {each.trouble.message}" for each in silent if each.trouble is not None),
        ),
        (Level.WARNING, len(future), f"{counted(len(future), 'disk')} with points of the future ({_named(future)})"),
        (Level.WARNING, len(owing), f"something owed of {', '.join(each.guest for each in owing[:_NAMED])}"),
    ]
    wrong = [(level, words) for level, count, words in found if count]
    if not wrong and not report.disks:
        wrong = [(Level.UNKNOWN, "no disk is there")]
    ages = [each.age_seconds for each in report.disks if each.age_seconds is not None]
    level = next((level for level, _ in wrong), Level.OK)
    words = "; ".join(words for _, words in wrong) or f"{counted(len(report.disks), 'disk')}, all readable" + (
        " and none late" if report.max_age_seconds is not None else ""
    )
    limit = "" if report.max_age_seconds is None else f"{report.max_age_seconds:.0f}"
    values = [
        f"disks={len(report.disks)};;;0",
        f"late={len(report.late)};;0;0",
        f"unreadable={len(unread)};;0;0",
        f"future={len(future)};0;;0",
        *([f"oldest_age={max(ages):.0f}s;;{limit};0"] if ages else []),
    ]
    return level, _line(level, words, values)


def nagios_failure(error: SnapchainError) -> tuple[Level, str]:
    """The same where nothing could be found out."""
    return Level.UNKNOWN, _line(Level.UNKNOWN, str(error), ())


def _line(level: Level, words: str, values: Sequence[str]) -> str:
    """One line: a bar would begin the performance data."""
    text = printable(words).replace("|", "\\x7c")
    return f"SNAPCHAIN {level.name} - {text}" + (f" | {' '.join(values)}" if values else "")


def _named(disks: Sequence[DiskStatus]) -> str:
    names = ", ".join(each.disk for each in disks[:_NAMED])
    return names + (f" and {len(disks) - _NAMED} more" if len(disks) > _NAMED else "")


def metrics(report: StatusReport) -> bytes:
    """The report in Prometheus' text format. Each series has the destination as label `destination`."""
    return exposition.encode(_families(report))


def _families(report: StatusReport) -> Iterator[Family]:
    up = {each.destination: each.trouble is None for each in report.destinations}
    when = report.time.timestamp()
    asked, reached = "When the destination was asked.", "Whether the destination could be asked."
    yield Family("status_timestamp_seconds", asked, [({"destination": each}, when) for each in up])
    yield Family("status_up", reached, [({"destination": each}, float(is_up)) for each, is_up in up.items()])
    newest = Family("status_disk_newest_timestamp_seconds", "When the newest point was taken; 0: there is none.")
    readable = Family("status_disk_readable", "Whether what is recorded of the disk can be read.")
    points = Family("status_disk_points", "Points of the disk.")
    future = Family("status_disk_points_of_the_future", "Points that are dated later than the clock.")
    size = Family("status_disk_virtual_bytes", "Virtual size of the newest point.")
    verified = Family(
        "status_disk_verified_timestamp_seconds", "When all data that the disk had was read and found good; 0: unknown."
    )
    late = Family("status_disk_late", "Whether the newest point is older than was stated.")
    # A destination may have been named in two ways: no series may come twice.
    for each in {(each.destination, each.disk): each for each in report.disks}.values():
        own: Labels = {"destination": each.destination, "disk": each.disk}
        readable.rows.append((own, float(each.trouble is None)))
        if each.trouble is not None:
            continue
        newest.rows.append((own, 0.0 if each.time is None else each.time.timestamp()))
        points.rows.append((own, float(each.points)))
        verified.rows.append((own, 0.0 if each.verified is None else each.verified.timestamp()))
        future.rows.append((own, float(len(each.points_of_the_future))))
        if each.virtual_size is not None:
            size.rows.append((own, float(each.virtual_size)))
        if each.late is not None:
            late.rows.append((own, float(each.late)))
    yield from (newest, readable, points, future, size, verified, late)
    yield Family(
        "status_guest_owed",
        "What is left to be done about the guest.",
        [({"destination": each.destination, "guest": each.guest}, float(len(each.owed))) for each in report.guests],
    )


def write_metrics(path: str, report: StatusReport) -> bytes | None:
    """Replace the file at `path`, or return the text for a single '-'. Raises what the place raises."""
    text = metrics(report)
    if path == "-":
        return text
    exposition.write(Path.cwd() / path, text)
    return None
