"""What restores would do, and have done, as tables: of a disk, of a guest, of several, and at once."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING

from snapchain.cli import render
from snapchain.cli.quantities import duration, moment, size
from snapchain.host.terminal import counted

if TYPE_CHECKING:
    from rich.console import Console

    from snapchain.ops.instant.guest_images import GuestInstantReport
    from snapchain.ops.instant.run import CopiedImage, InstantPlan
    from snapchain.ops.restore.guest import GuestRestorePlan, GuestRestoreReport
    from snapchain.ops.restore.several import SeveralPlan, SeveralReport
    from snapchain.ops.restore.target import RestorePlan, RestoreReport

STREAM = "-"
"""The output that is standard output."""


def draw_instant_guest(console: Console, report: GuestInstantReport) -> None:
    """The images of a guest, whether they are whole, and whether it runs."""
    is_done = all(each.state == "done" for each in report.disks)
    words = "restored" if is_done else "runs" if report.started else "can be started"
    render.headline(console, f"{report.guest}, guest point {report.guest_point}, {words}: {report.directory}")
    for each in report.disks:
        state = "all of it" if each.state == "done" else "depends on the destination"
        render.line(console, f"{each.output}  {each.disk}@{each.point}, {size(each.virtual_size)}, {state}", indent=2)
    if report.definition is not None:
        render.facts(console, [("definition", report.definition), ("defined", report.defined or "")])
    if report.start_seconds is not None:
        render.facts(console, [("started", f"after {duration(report.start_seconds)}")])
    for words in report.lacking:
        render.line(console, f"note: {words}", style="yellow")
    draw_unproven_disks(console, report)


def draw_unproven_disks(console: Console, report: GuestInstantReport) -> None:
    """The disks of which something is not proven."""
    for each in report.disks:
        draw_unproven(console, each)


def draw_instant_plan(console: Console, plan: InstantPlan) -> None:
    """Which image would be made, or continued, and how much is to copy."""
    verb = "continue" if plan.begun else "make"
    render.headline(console, f"would {verb} {plan.output}, an overlay on {plan.source}::{plan.disk}@{plan.point}")
    rows = [("size", size(plan.virtual_size)), ("to copy", size(plan.data_bytes) if plan.copies else "nothing yet")]
    render.facts(console, rows)


def draw_instant(console: Console, report: CopiedImage) -> None:
    """An image that can be used, or is whole."""
    if report.state == "served":
        render.headline(console, f"{report.output} can be used, and depends on {report.disk}@{report.point}")
        render.facts(console, [("size", size(report.virtual_size)), ("backing", report.backing or "")])
        return
    render.headline(console, f"restored {report.output}: {report.disk}@{report.point}, all of it")
    rows = [("size", size(report.virtual_size))]
    if report.content_id is not None:
        rows.append(("content", report.content_id))
    if report.guest_bytes:
        rows.append(("changed", f"{size(report.guest_bytes)} by a guest; all else is proven to be the point"))
    render.facts(console, rows)
    draw_unproven(console, report)


def draw_unproven(console: Console, report: CopiedImage) -> None:
    """What nobody knows whether a guest wrote."""
    if report.unproven_bytes:
        words = "differ from the point. A guest was killed, so nobody knows whether it wrote all of them"
        render.line(console, f"{size(report.unproven_bytes)} {words}", style="yellow")


def _shown(output: str) -> str:
    return "standard output" if output == STREAM else output


def draw_plan(console: Console, plan: RestorePlan) -> None:
    """What would be written of a disk, and where."""
    what = "replace" if plan.replaces else "write to" if plan.output == STREAM else "make"
    time = moment(datetime.fromisoformat(plan.time), zone=True)
    render.headline(
        console, f"would restore {plan.disk}, point {plan.point} of {time}, and {what} {_shown(plan.output)}"
    )
    render.facts(
        console,
        [("to write", size(plan.bytes_to_write)), ("to fetch", _to_fetch(plan)), ("content", plan.content_id)],
    )
    render.table(
        console,
        ["file", "format", "virtual size>", "data>", "on"],
        [
            (file.path, file.format, size(file.virtual_size), size(file.data_bytes), file.backing or "")
            for file in plan.files
        ],
    )


def draw_several_plan(console: Console, plan: SeveralPlan) -> None:
    """What would be restored of all that match."""
    disks = sum(len(each.disks) for each in plan.items)
    where = render.place(plan.directory)
    render.headline(console, f"would restore {counted(disks, 'disk')} of {render.place(plan.source)} to {where}")
    render.facts(
        console,
        [
            ("to write", f"{size(plan.bytes_to_write)}, {size(plan.bytes_free)} are free"),
            ("to fetch", _to_fetch(plan)),
            ("there already", ", ".join(plan.restored_before)),
        ],
    )
    render.table(
        console,
        ["disk", "point>", "of", "virtual size>?", "data>", "file~"],
        [
            (
                disk.disk,
                str(disk.point),
                moment(each.time),
                size(disk.virtual_size),
                size(disk.data_bytes),
                render.place(disk.output),
            )
            for each in plan.items
            for disk in each.disks
        ],
    )
    if plan.bytes_to_write > plan.bytes_free:
        render.line(console, "note: that is more than is free there", style="yellow")
    draw_failed(console, plan)


def draw_several(console: Console, report: SeveralReport) -> None:
    """What was restored of all that match."""
    count = len(report.disks) + sum(len(each.disks) for each in report.guests)
    render.headline(console, f"restored {counted(count, 'disk')} to {render.place(report.directory)}")
    render.facts(
        console,
        [
            ("written", size(report.bytes_written)),
            ("there already", ", ".join(report.restored_before)),
            ("took", duration(report.seconds)),
        ],
    )
    rows = [(each.disk, each.point, each.bytes_written, each.output) for each in report.disks]
    rows += [(one.disk, one.point, one.bytes_written, one.output) for each in report.guests for one in each.disks]
    render.table(
        console,
        ["disk", "point>", "written>", "file~"],
        [(disk, str(point), size(written), render.place(output)) for disk, point, written, output in sorted(rows)],
    )
    render.facts(console, [("definition", each.definition or "") for each in report.guests])
    for each in report.guests:
        _draw_lacking(console, each.lacking)
    draw_failed(console, report)


def draw_failed(console: Console, done: SeveralPlan | SeveralReport) -> None:
    """What is not restored, and why."""
    shown: set[str] = set()
    for each in done.failed:
        render.line(console, f"{each.name} cannot be restored: {each.message}", style="red")
        if each.hint and each.hint not in shown:
            render.line(console, f"hint: {each.hint}", indent=2)
            shown.add(each.hint)


def _to_fetch(plan: RestorePlan | SeveralPlan) -> str:
    if plan.bytes_to_fetch is None or plan.requests is None:
        return ""
    words = f"{size(plan.bytes_to_fetch)} by {counted(plan.requests, 'request')}"
    return words if plan.seconds is None else f"{words}, in about {duration(plan.seconds)}"


def draw_report(console: Console, report: RestoreReport) -> None:
    """What was written."""
    render.headline(console, f"restored {report.disk}, point {report.point}, to {_shown(report.output)}")
    lower = ", ".join(report.files[:-1])
    render.facts(
        console, [("written", size(report.bytes_written)), ("content", report.content_id), ("on top of", lower)]
    )
    if report.damaged:
        draw_damage(console, report)


def draw_damage(console: Console, report: RestoreReport) -> None:
    """The ranges that are lost."""
    total = size(sum(each.length for each in report.damaged))
    render.line(console, f"{total} of {report.disk}, point {report.point}, are lost, and are zeroes now:", style="red")
    render.table(
        console,
        ["offset>", "length>", "reason~"],
        [(str(each.offset), str(each.length), each.reason) for each in report.damaged],
    )


def draw_guest_plan(console: Console, plan: GuestRestorePlan) -> None:
    """What would be restored of a guest."""
    what = "" if plan.defines is None else f", and define {plan.defines}"
    time = moment(plan.time, zone=True)
    render.headline(
        console, f"would restore {plan.guest}, guest point {plan.guest_point} of {time}, to {plan.directory}{what}"
    )
    render.facts(console, [("to write", size(plan.bytes_to_write)), ("consistency", plan.consistency.value)])
    render.table(
        console,
        ["disk", "file", "virtual size>", "data>"],
        [(each.name, each.output, size(each.virtual_size), size(each.data_bytes)) for each in plan.disks],
    )
    render.facts(console, [("besides", ", ".join(plan.files))])
    _draw_lacking(console, plan.lacking)


def draw_guest_report(console: Console, report: GuestRestoreReport) -> None:
    """What was restored of a guest."""
    render.headline(console, f"restored {report.guest}, guest point {report.guest_point}, to {report.directory}")
    render.facts(
        console,
        [
            ("written", size(report.bytes_written)),
            ("consistency", report.consistency.value),
            ("disks", ", ".join(each.output for each in report.disks)),
            ("definition", report.definition or ""),
            ("defined", report.defined or ""),
        ],
    )
    _draw_lacking(console, report.lacking)


def _draw_lacking(console: Console, lacking: tuple[str, ...]) -> None:
    for sentence in lacking:
        render.line(console, f"note: {sentence}", style="yellow")
