"""`snapchain nightly CONFIG`: snapshot, ship, merge, collect and verify all that a configuration names."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from snapchain.cli import exits, options, render
from snapchain.cli.app import verb
from snapchain.cli.output import Output
from snapchain.cli.quantities import duration, heading, moment, size
from snapchain.errors import PartialFailure
from snapchain.host.terminal import counted, numbered

if TYPE_CHECKING:
    from rich.console import Console

    from snapchain.ops.nightly.preview import DiskPreview, GuestPreview, NightlyPlan
    from snapchain.ops.nightly.report import (
        DestinationReport,
        DiskReport,
        Fault,
        GuestReport,
        NightlyReport,
        TurnReport,
    )
    from snapchain.ops.nightly.systemd import Units

_NAMES = 4
"""Disks that are named one by one when they share a fault."""
_DROPS = 10
"""Disks of which dropped points are listed, unless all are asked for."""


@verb(
    examples="""
    snapchain nightly /etc/snapchain/nightly.toml
    snapchain nightly nightly.toml --dry-run
    snapchain nightly nightly.toml --dry-run --points
    snapchain nightly nightly.toml --any-time --wait 1h
    snapchain nightly nightly.toml --print-systemd
    """,
    when_interrupted="every point that was reported is whole; the next run begins with what was not reached",
)
@options.takes_output()
def nightly(
    config: Annotated[
        Path,
        typer.Argument(readable=False, metavar="CONFIG", help="A TOML file. `man snapchain-nightly` lists its fields."),
    ],
    *,
    any_time: Annotated[bool, typer.Option("--any-time", help="Ignore the window.")] = False,
    wait: Annotated[
        str, typer.Option("--wait", metavar="TIME", help="Wait at most TIME for another run to end: 90s, 10min, 2h.")
    ] = "0s",
    points: Annotated[
        bool,
        typer.Option("--points", help="Say of each disk which points are dropped, and which rules keep the others."),
    ] = False,
    print_systemd: Annotated[
        bool,
        typer.Option(
            "--print-systemd", help="Print a systemd service and its timer for this configuration, and do nothing else."
        ),
    ] = False,
    out: Output,
) -> None:
    """Run the work of a night: snapshot, ship and merge each disk and guest; then collect and verify destinations.

    With [test] in the configuration, clones of some guests boot last of all, by turns.

    A destination is a repository or a replica. A failure of one disk or destination stops no other. Nothing new begins
    after the window has closed; the next run begins with the disks that are left. Ends with exit code 10 when something
    failed or was left.
    """
    from snapchain.ops.nightly import run as ops
    from snapchain.ops.nightly.document import load

    loaded = load(config)
    if print_systemd:
        from snapchain.ops.nightly.systemd import units

        out.show(units(loaded, config, program=options.program()), _draw_units)
        return
    if out.dry_run:
        from snapchain.ops.nightly.preview import preview

        plan = preview(loaded, config, any_time=any_time, on_event=out.on_event)
        status = 0 if plan.sound else PartialFailure.exit_code
        out.plan(plan, partial(_draw_plan, points=points), problems=_draw_plan_problems, status=status)
        return
    report = ops.run(
        loaded, config, wait_seconds=options.seconds(wait, "--wait"), any_time=any_time, on_event=out.on_event
    )
    status = 0 if report.complete else PartialFailure.exit_code
    if report.interrupted:
        status = exits.interrupted_code()
    out.report(report, partial(_draw_report, points=points), problems=_draw_problems, status=status)


def _draw_units(console: Console, units: Units) -> None:
    for path, text in ((units.service_path, units.service), (units.timer_path, units.timer)):
        render.command(console, f"# {path}\n{text}")


def _draw_plan(console: Console, plan: NightlyPlan, *, points: bool) -> None:
    closes = f", until {moment(plan.closes, zone=True)}" if plan.closes else ""
    render.headline(console, f"would run {plan.name}{closes}")
    for reason in plan.left:
        render.line(console, f"nothing would start now: {reason}", style="yellow", indent=2)
    if plan.disks:
        render.table(
            console,
            ["disk", "seals", "files>", "ships", "merges", "drops"],
            [_plan_row(disk) for disk in plan.disks],
        )
    if plan.guests:
        render.table(
            console,
            ["guest", "state", "disks>", "files>", "quiesce", "drops"],
            [_guest_plan_row(guest) for guest in plan.guests],
        )
    for each in plan.destinations:
        verify = f"verify {', '.join(each.verify)}" if each.verify else ""
        copies = ""
        if each.copy_of is not None:
            copies = f"copy of {each.copy_of}: lacks {counted(each.would_copy, 'point')}, {size(each.bytes_to_copy)}"
        words = ", ".join(filter(None, [copies, "gc" if each.gc else "", verify]))
        render.line(console, f"{each.destination}: {words or 'nothing more'}", indent=2)
    for test in plan.tests:
        render.line(console, f"boot test: {test.guest} from {test.destination}", indent=2)
    _draw_decisions(console, plan, points=points)
    _draw_moved(console, plan.disks)
    _draw_left_out(console, plan.layers_left_out, plan.leftovers)
    _draw_plan_problems(console, plan)


def _draw_plan_problems(console: Console, plan: NightlyPlan) -> None:
    rows = [("", plan.faults, ()), *((disk.disk, disk.faults, ()) for disk in plan.disks)]
    rows += [(each.destination, each.faults, ()) for each in plan.destinations]
    _draw_faults(console, [*rows, *((guest.guest, guest.faults, ()) for guest in plan.guests)])


def _draw_decisions(console: Console, plan: NightlyPlan, *, points: bool) -> None:
    """What the rules will drop, and what keeps the rest: a line for each disk, with `points` each point."""
    from snapchain.model.retention import kept_by_rule

    turns = [(disk.disk, disk.destinations) for disk in plan.disks]
    turns += [(guest.guest, guest.destinations) for guest in plan.guests]
    found = [(name, each) for name, places in turns for each in places if each.points_dropped]
    for name, each in found if points else found[:_DROPS]:
        rules = ", ".join(
            f"{rule} ({count})" for rule, count in kept_by_rule(row.reasons for row in each.points if row.kept).items()
        )
        kept = len(each.points) - len(each.points_dropped)
        words = f"{name} at {each.destination}: would drop {_points(each.points_dropped)} and keep {kept}"
        render.line(console, f"{words}: {rules}" if kept else words, indent=2)
        if points:
            render.table(
                console,
                ["point>", heading("time"), "decision", "labels", "why~"],
                [
                    (str(row.point), moment(row.time), "keep" if row.kept else "drop", ", ".join(row.labels), why)
                    for row in each.points
                    for why in ["; ".join(row.reasons)]
                ],
            )
    _draw_further(console, len(found), points=points)


def _copied(place: DestinationReport) -> str:
    points, read = sum(len(each.points) for each in place.copied), sum(each.bytes_read for each in place.copied)
    return f"copied {counted(points, 'point')} of {place.copy_of}, {size(read)}"


def _draw_dropped(console: Console, report: NightlyReport, *, points: bool) -> None:
    """What the rules have dropped: a line for each disk."""
    turns: list[tuple[str, TurnReport]] = [(disk.disk, disk) for disk in report.disks]
    turns += [(guest.guest, guest) for guest in report.guests]
    found = [
        (name, each.destination, each.retention)
        for name, turn in turns
        for each in turn.destinations
        if each.retention is not None and each.retention.points_dropped
    ]
    found += [
        (each.name, place.destination, each.retention)
        for place in report.destinations
        for each in place.copied
        if each.retention is not None and each.retention.points_dropped
    ]
    for name, place, done in found if points else found[:_DROPS]:
        words = f"{name} at {place}: dropped {_points(done.points_dropped)}"
        render.line(console, f"{words}; kept are {len(done.points_kept)}", indent=2)
    _draw_further(console, len(found), points=points)
    if found:
        render.line(console, "--dry-run shows what the next run drops, and which rules keep the others", indent=2)


def _draw_further(console: Console, count: int, *, points: bool) -> None:
    if count > _DROPS and not points:
        render.line(console, f"and points of {count - _DROPS} more: --points lists them", indent=2)


def _points(numbers: Sequence[int]) -> str:
    """'point 3', 'points 3, 5-7'"""
    return f"{'point' if len(numbers) == 1 else 'points'} {numbered(numbers)}"


def _plan_row(disk: DiskPreview) -> list[str]:
    ships = [f"{each.destination} {size(each.bytes_to_read)}" for each in disk.destinations]
    drops = [f"{each.destination} {len(each.points_dropped)}" for each in disk.destinations if each.points_dropped]
    files = str(disk.chain_length or "")
    merges = counted(len(disk.merge), "file") if disk.merge else ""
    return [disk.disk, disk.sealed.name if disk.sealed else "", files, ", ".join(ships), merges, ", ".join(drops)]


def _guest_plan_row(guest: GuestPreview) -> list[str]:
    files = ", ".join(str(each.chain_length or "") for each in guest.disks)
    drops = [f"{each.destination} {len(each.points_dropped)}" for each in guest.destinations if each.points_dropped]
    state = "" if guest.state is None else guest.state.value
    return [guest.guest, state, str(len(guest.disks)), files, "yes" if guest.quiesces else "no", ", ".join(drops)]


def _draw_report(console: Console, report: NightlyReport, *, points: bool) -> None:
    counts = ", ".join(f"{count} {outcome.value}" for outcome, count in report.counts.items() if count) or "no disks"
    render.headline(console, f"{report.name}: {report.outcome.value} ({counts}) in {duration(report.seconds)}")
    if report.disks:
        render.table(
            console,
            ["disk", "outcome", "snapshot", "files>", "hidden>", "shipped", "merged", "time>"],
            [_report_row(disk) for disk in report.disks],
        )
    if report.guests:
        render.table(
            console,
            ["guest", "outcome", "consistency", "frozen>", "files>", "shipped", "merged", "time>"],
            [_guest_row(guest) for guest in report.guests],
        )
    for each in report.destinations:
        facts = [_copied(each)] if each.copy_of is not None else []
        facts += [f"gc freed {size(each.gc.bytes_freed)}"] if each.gc else []
        facts += [f"verified {size(result.checked_bytes)} of {result.disk}" for result in each.verified]
        words = ", ".join(facts)
        render.line(console, f"{each.destination}: {each.outcome.value}{f', {words}' if words else ''}", indent=2)
        if each.traffic is not None:
            render.line(console, f"requests: {render.asked(each.traffic)}", indent=4)
    for test in report.tests:
        if test.booted:
            took = duration(test.boot_seconds or 0.0)
            words = f"guest point {test.guest_point} booted in {took}"
        else:
            words = "did not boot" if test.booted is False else "not tested"
        render.line(console, f"boot test of {test.guest} from {test.destination}: {words}", indent=2)
    _draw_dropped(console, report, points=points)
    _draw_left_out(console, report.layers_left_out, report.leftovers)
    _draw_problems(console, report)
    longer: dict[str, list[str]] = {}
    turns: list[tuple[str, TurnReport]] = [(disk.disk, disk) for disk in report.disks]
    turns += [(guest.guest, guest) for guest in report.guests]
    for name, turn in turns:
        if turn.why_not_merged:
            longer.setdefault(turn.why_not_merged, []).append(name)
    for words, names in longer.items():
        render.line(console, f"{_whose(names)}not merged further: {words}", indent=2)
    _draw_moved(console, report.disks)
    for guest in report.guests:
        _draw_guest(console, guest)
    for name, turn in turns:
        future = {
            point for each in turn.destinations if each.retention for point in each.retention.points_of_the_future
        }
        render.points_of_the_future(console, name, future)


def _draw_problems(console: Console, report: NightlyReport) -> None:
    parts = [("", report.faults, report.left)]
    parts += [(each.disk, each.faults, each.left) for each in report.disks]
    parts += [(each.guest, each.faults, each.left) for each in report.guests]
    parts += [(each.destination, each.faults, each.left) for each in report.destinations]
    parts += [(each.guest, each.faults, each.left) for each in report.tests]
    _draw_faults(console, parts)


def _draw_guest(console: Console, guest: GuestReport) -> None:
    """What the table has no room for."""
    if guest.is_new:
        render.line(console, f"{guest.guest}: new: no earlier run has known it", indent=2)
    if guest.moved_to is not None:
        render.line(console, f"{guest.guest}: left, moved: it runs on {guest.moved_to}", indent=2)
    if guest.why_not is not None:
        render.line(console, f"{guest.guest}: not quiesced: {guest.why_not}", style="yellow", indent=2)


def _guest_row(guest: GuestReport) -> list[str]:
    level = "" if guest.consistency is None else guest.consistency.value
    frozen = "" if guest.frozen_seconds is None else f"{guest.frozen_seconds * 1000:.0f} ms"
    files = ", ".join(str(each.chain_length or "") for each in guest.disks)
    merged = ", ".join(
        f"{each.merge.layers_before} to {each.merge.layers_after}" for each in guest.disks if each.merge is not None
    )
    shipped = _shipped_to(guest)
    return [guest.guest, guest.outcome.value, level, frozen, files, shipped, merged, duration(guest.seconds)]


def _shipped_to(turn: TurnReport) -> str:
    return ", ".join(
        f"{each.destination} {size(each.bytes_read) if each.point is not None else each.outcome.value}"
        for each in turn.destinations
    )


def _report_row(disk: DiskReport) -> list[str]:
    merged = f"{disk.merge.layers_before} to {disk.merge.layers_after}" if disk.merge else ""
    files = str(disk.chain_length or "")
    hidden = "" if disk.shadowed_bytes is None else size(disk.shadowed_bytes)
    made = "" if disk.snapshot == "none" else disk.snapshot
    return [disk.disk, disk.outcome.value, made, files, hidden, _shipped_to(disk), merged, duration(disk.seconds)]


def _draw_moved(console: Console, disks: Sequence[DiskReport] | Sequence[DiskPreview]) -> None:
    for disk in disks:
        if disk.moved_to is not None:
            render.line(console, f"{disk.disk}: moved: it is now {disk.moved_to}", indent=2)
            render.line(console, f"hint: leave {disk.image} out by `exclude`, and name the disk in `retired`", indent=6)


def _draw_left_out(console: Console, layers: Sequence[Path], leftovers: Sequence[Path]) -> None:
    if used := len(layers) - len(leftovers):
        files = "1 matched file is a backing file" if used == 1 else f"{used} matched files are backing files"
        render.line(console, f"{files} of others: layers, not disks", indent=2)
    for path in leftovers:
        render.line(console, f"left out: {path}: a sealed layer that no image uses", style="yellow", indent=2)
    if leftovers:
        render.line(console, "hint: remove it, or name it by `path` if it is a disk", indent=6)


def _draw_faults(console: Console, parts: Iterable[tuple[str, Sequence[Fault], Sequence[str]]]) -> None:
    """Faults and unfinished work, each once, with the disks and destinations concerned."""
    faults: dict[tuple[str, str | None], list[str]] = {}
    left: dict[str, list[str]] = {}
    for name, mine, not_done in parts:
        for fault in mine:
            faults.setdefault((str(fault), fault.hint), []).append(name)
        for words in not_done:
            left.setdefault(words, []).append(name)
    for (message, hint), names in faults.items():
        render.line(console, f"{_whose(names)}{message}", style="red", indent=2)
        if hint:
            render.line(console, f"hint: {hint}", indent=6)
    for words, names in left.items():
        render.line(console, f"{_whose(names)}left: {words}", style="yellow", indent=2)


def _whose(names: Sequence[str]) -> str:
    """`web1, web2 and 18 more: `"""
    known = [name for name in names if name]
    shown = ", ".join(known[:_NAMES])
    more = f" and {len(known) - _NAMES} more" if len(known) > _NAMES else ""
    return f"{shown}{more}: " if known else ""
