"""`snapchain forget ADDRESS...`: drop points by number, label or time, by rules, or whole disks and guests."""

from __future__ import annotations

from datetime import tzinfo
from typing import TYPE_CHECKING, Annotated

import typer

from snapchain.cli import merge_tables, options, policy_options, render
from snapchain.cli.app import verb
from snapchain.cli.output import Output
from snapchain.cli.quantities import size
from snapchain.errors import Conflict, Corrupt, InvalidInput, PartialFailure
from snapchain.host.terminal import counted, numbered, shell_word
from snapchain.model.retention import Policy

if TYPE_CHECKING:
    from rich.console import Console

    from snapchain.destination.records import PointDecision
    from snapchain.ops.forget import ForgetPlan, ForgetReport

_WHICH = "Which points go"
_STAY = "Which points stay"


@verb(
    examples="""
    snapchain forget /backup::web1/vda@3 --dry-run
    snapchain forget /backup::web1/vda@3 /backup::web1/vda@before-upgrade
    snapchain forget /backup::web1@2
    snapchain forget /backup::old/vda --all-points
    snapchain forget /backup --keep-daily 7 --keep-weekly 4
    snapchain forget /backup --disks 'web*' --keep-last 3 --dry-run
    snapchain forget ssh://root@kvm2/srv/replica::web1/vda@latest
    """,
    when_interrupted="no other point was touched; `snapchain log` shows which are left; run it again for these",
)
@options.takes_output(passphrase=True)
@policy_options.takes_policy(panel=_STAY)
@policy_options.takes_zone(panel=_STAY)
def forget(
    targets: Annotated[
        list[str],
        options.address(
            metavar="DEST[::DISK[@POINT]]...",
            help="Points, disks or guests of one destination; a destination alone means all its disks.",
        ),
    ],
    *,
    all_points: Annotated[
        bool,
        typer.Option(
            "--all-points", help="All points of the named disks and guests, the newest too.", rich_help_panel=_WHICH
        ),
    ] = False,
    patterns: Annotated[
        list[str] | None,
        typer.Option(
            "--disks",
            metavar="PATTERN",
            help="Of a whole destination, only disks and guests that match: 'web*'. May be repeated.",
            rich_help_panel=_WHICH,
        ),
    ] = None,
    policy: Policy,
    zone: tzinfo,
    out: Output,
) -> None:
    """Drop points of disks and guests at a destination. Data that other points need stays.

    DEST::DISK@POINT drops that point. A time means the newest point not after it.

    With rules, the points that a rule names stay, as do held points and the newest one. Without a disk, the rules
    apply to each disk and each guest of the destination.

    --all-points drops whole disks and guests. The disk keeps its epoch and the number of its next point: no number is
    given twice, and a host that was replaced by another one stays refused.

    The points of a guest are kept or dropped as a whole: DEST::GUEST@POINT drops a point of each of its disks.

    The newest point goes only by its number, its label, as @latest, or with --all-points. A held point never goes: to
    name one is refused before anything is changed. Release it first.

    At a replica files that no point needs are removed at once; the newest point stays while a guest or another image
    uses its layers. In a repository `snapchain gc` frees the space.
    """
    from snapchain.ops import forget as ops

    dest, named = _one_destination(targets)
    request = ops.ForgetRequest(
        targets=named, patterns=tuple(patterns or ()), policy=policy, all_points=all_points, zone=zone
    )
    place = options.destination(dest, out, writing=not out.dry_run)
    if out.dry_run:
        out.plan(ops.plan(place, request), _draw_plan)
        return
    report = ops.run(place, request, on_event=out.on_event)
    out.report(report, _draw_report, problems=_draw_problems, status=_status(report))


def _one_destination(targets: list[str]) -> tuple[str, tuple[tuple[str, str | None], ...]]:
    """The destination, and the disks and guests that are named, each with its point. Raises InvalidInput."""
    from snapchain.destination.address import PointAddress, parse_destination

    found = [parse_destination(each) for each in targets]
    others = [each for each in found if each.dest != found[0].dest]
    if others:
        raise InvalidInput(
            "these are two destinations", subject=f"{found[0].dest}, {others[0].dest}", hint="name one in each command"
        )
    named = tuple((each.disk, each.point) for each in found if isinstance(each, PointAddress))
    if named and len(named) < len(found):
        raise InvalidInput("the whole destination is named, and disks of it", subject=found[0].dest, hint="name either")
    return found[0].dest, named


def _status(report: ForgetReport) -> int:
    if report.findings:
        return Corrupt.exit_code
    return PartialFailure.exit_code if report.failed else Conflict.exit_code if report.staying else 0


def _draw_plan(console: Console, plan: ForgetPlan) -> None:
    count = counted(plan.points_dropped, "point")
    render.headline(console, f"would forget {count} of {render.place(plan.destination)}")
    rows = [(each.disk, each.points) for each in plan.disks]
    rows += [(f"guest {each.guest}", each.points) for each in plan.guests]
    _draw_points(console, rows)
    for guest in plan.guests:
        if guest.leftovers:
            render.facts(console, [("interrupted", f"{counted(guest.leftovers, 'guest point')} without a record")])
    parts = [*plan.disks, *(disk for guest in plan.guests for disk in guest.disks)]
    render.table(
        console,
        ["disk", "points dropped", "layers>", "then>", "data dropped>"],
        [
            (
                each.disk,
                numbered([point.point for point in each.points if not point.kept]),
                str(each.layers_before),
                str(each.layers_after),
                size(each.bytes_dropped + each.shadowed_bytes),
            )
            for each in parts
            if each.layers_after < each.layers_before or not all(point.kept for point in each.points)
        ],
    )
    for each in parts:
        for layer in each.staying:
            render.line(console, f"stays: {layer.file}: {layer.reason}", style="yellow")
    if plan.points_dropped:
        render.line(console, "data dropped: of whole layers; the data of a layer that is merged into another stays")


def _draw_points(console: Console, rows: list[tuple[str, tuple[PointDecision, ...]]]) -> None:
    """What stays and what goes, point by point, where anything goes."""
    render.table(
        console,
        ["of", "point>", "", "labels", "because~"],
        [
            (
                name,
                str(point.point),
                "keep" if point.kept else "drop",
                ", ".join(point.labels),
                "; ".join(point.reasons),
            )
            for name, points in rows
            if not all(point.kept for point in points)
            for point in points
        ],
    )
    kept = [name for name, points in rows if all(point.kept for point in points)]
    render.facts(console, [("nothing goes", ", ".join(kept))])
    for name, points in rows:
        render.points_of_the_future(console, name, [point.point for point in points if point.of_the_future])


def _draw_report(console: Console, report: ForgetReport) -> None:
    count = counted(report.points_dropped, "point")
    render.headline(console, f"forgot {count} of {render.place(report.destination)}")
    rows = [(each.disk, each) for each in report.disks] + [(f"guest {each.guest}", each) for each in report.guests]
    render.table(
        console,
        ["of", "dropped", "kept", "layers>", "then>"],
        [
            (
                name,
                numbered(each.points_dropped),
                numbered(each.points_kept),
                str(each.layers_before),
                str(each.layers_after),
            )
            for name, each in rows
            if each.points_dropped or each.layers_after < each.layers_before
        ],
    )
    render.facts(
        console,
        [
            ("freed there", size(report.bytes_freed) if report.bytes_freed > 0 else ""),
            ("unreferenced", size(report.bytes_dropped) if report.bytes_dropped else ""),
        ],
    )
    _draw_problems(console, report)
    for name, each in rows:
        render.points_of_the_future(console, name, each.points_of_the_future)
    for each in report.disks:
        merge_tables.draw_staying(console, each.staying)
    if report.needs_collecting and report.points_dropped:
        render.line(console, f"`snapchain gc {shell_word(report.destination)}` frees what no other point needs")


def _draw_problems(console: Console, report: ForgetReport) -> None:
    """What stays although it was named, damage because of which layers were not merged, and failures."""
    for point in report.staying:
        render.line(console, f"{point.name}@{point.point} stays: it was held meanwhile", style="yellow")
    render.findings(console, report.findings)
    for fault in report.failed:
        render.line(console, f"not forgotten: {fault.message}", style="red")
