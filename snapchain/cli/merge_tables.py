"""What a merge of files would do and what it did, for a terminal: the stack, its layers, the merges, the room."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from snapchain.cli import render, stack_picture
from snapchain.cli.moments import heading, moment
from snapchain.cli.quantities import duration, size

if TYPE_CHECKING:
    from rich.console import Console

    from snapchain.destination.records import PointsMergePlan, PointsMergeReport, StayingLayer
    from snapchain.merge.selection import LayerUse, MergeSetPlan, PlannedMerge
    from snapchain.merge.sequence import MergeSetReport


def draw_plan(console: Console, plan: MergeSetPlan) -> None:
    """What would be done."""
    if plan.merges:
        times = "" if len(plan.merges) == 1 else f" in {len(plan.merges)} merges"
        render.headline(
            console, f"would make {plan.layers_after} layers of {plan.layers_before} of {plan.image}{times}"
        )
    else:
        render.headline(console, f"{plan.image}: there is nothing to merge")
    stack_picture.draw(console, _rows(plan))
    _draw_layers(console, plan.layers)
    if plan.merges:
        _draw_merges(console, plan.merges)
        render.facts(
            console,
            [
                ("room", f"needs {size(plan.needs_bytes)} meanwhile, {size(plan.free_bytes)} free"),
                ("time", f"about {duration(plan.seconds)}"),
                ("removes", ", ".join(render.place(path) for each in plan.merges[::-1] for path in each.remove)),
                *(
                    (("keeps", f"{render.place(kept.path)}: {kept.reason}"))
                    for each in plan.merges
                    for kept in each.keep
                ),
            ],
        )
    for notice in plan.notices:
        render.line(console, f"note: {notice}", style="yellow")


def _rows(plan: MergeSetPlan) -> list[stack_picture.Row]:
    rows = []
    for place, layer in enumerate(plan.layers):
        now = stack_picture.Held(layer.data_bytes, layer.shadowed_bytes)
        then: stack_picture.Held | None = now
        if layer.merge is not None:
            made = plan.merges[layer.merge]
            then = stack_picture.Held(made.held_bytes, made.shadowed_bytes) if place == made.last else None
        rows.append(stack_picture.Row(layer.path.name, now, then, layer.merge))
    return rows


def _draw_layers(console: Console, layers: Sequence[LayerUse]) -> None:
    columns = {
        "layer": [layer.path.name for layer in layers],
        "held>": [size(layer.data_bytes) for layer in layers],
        "hidden>": [size(layer.shadowed_bytes) for layer in layers],
        heading("sealed"): [moment(layer.sealed) if layer.sealed else "" for layer in layers],
        "labels": [", ".join(layer.labels) for layer in layers],
        "is at": [", ".join(layer.at) for layer in layers],
        "stays because~": ["; ".join(layer.stays or [f"held: {hold.tag}" for hold in layer.holds]) for layer in layers],
    }
    render.table(console, list(columns), reversed(list(zip(*columns.values(), strict=True))))


def _draw_merges(console: Console, merges: Sequence[PlannedMerge]) -> None:
    render.table(
        console,
        ["merge into", "layers>", "by", "moves>", "drops>", "room>", "time>"],
        [
            (
                each.result.name,
                str(len(each.layers)),
                each.strategy,
                f"{size(each.bytes_to_move)}{' shared' if each.shares_extents else ''}",
                size(each.bytes_to_free),
                size(each.needs_bytes),
                duration(each.seconds),
            )
            for each in reversed(merges)
        ],
    )


def draw_report(console: Console, report: MergeSetReport) -> None:
    """What was done."""
    layers = f"{report.layers_before} layers became {report.layers_after}"
    if report.result is not None:
        render.headline(console, f"merged into {render.place(report.result)}: {layers}, and it reads as before")
    elif report.merges:
        render.headline(console, f"merged {report.image}: {layers}, and it reads as before")
    else:
        render.headline(console, f"{report.image}: there was nothing to merge")
    render.facts(
        console,
        [
            ("moved", f"{size(report.bytes_moved)} by {report.strategy}" if report.merges else ""),
            _freed("freed", report.bytes_freed) if report.merges else ("", ""),
            ("removed", ", ".join(map(render.place, report.removed))),
            *((("kept", f"{render.place(kept.path)}: {kept.reason}")) for kept in report.kept),
        ],
    )
    draw_failed(console, report)


def _freed(name: str, count: int) -> tuple[str, str]:
    """Bytes that are free now; where inputs stay, the bytes that the result takes besides."""
    return (name, size(count)) if count >= 0 else ("added", size(-count))


def draw_failed(console: Console, report: MergeSetReport) -> None:
    """What could not be merged."""
    for fault in report.failed:
        names = ", ".join(path.name for path in fault.layers)
        render.line(console, f"not merged: {names}: {fault.message}", style="red")


def draw_points_plan(console: Console, plan: PointsMergePlan) -> None:
    """What would be done to a disk at a destination."""
    render.headline(console, f"would merge {plan.disk}: {plan.layers_before} layers now, {plan.layers_after} then")
    render.table(
        console,
        ["point>", "", "labels", "because~"],
        [
            (str(each.point), "keep" if each.kept else "drop", ", ".join(each.labels), "; ".join(each.reasons))
            for each in plan.points
        ],
    )
    render.points_of_the_future(console, plan.disk, [str(each.point) for each in plan.points if each.of_the_future])
    if plan.free_bytes is None:
        render.facts(console, [("writes", f"about {plan.requests} objects, records only: no data is moved")])
    elif plan.merges:
        render.table(console, ["merge into", "from~"], [(each[-1], ", ".join(each[:-1])) for each in plan.merges[::-1]])
        needs = f"needs {size(plan.needs_bytes)} meanwhile, {size(plan.free_bytes)} free"
        moves = f"{size(plan.bytes_to_move)} by {plan.strategy}"
        render.facts(console, [("moves", moves), ("drops", size(plan.shadowed_bytes)), ("room there", needs)])
    _draw_staying(console, plan.staying)


def draw_points_report(console: Console, report: PointsMergeReport) -> None:
    """What was done to a disk at a destination."""
    headline = f"merged {report.disk}: {report.layers_before} layers became {report.layers_after}"
    has_merged = bool(report.merges) or report.strategy == "records"
    render.headline(console, headline if has_merged else f"{report.disk}: no layers to merge")
    render.facts(
        console,
        [
            ("points kept", ", ".join(map(str, report.points_kept))),
            ("dropped", ", ".join(map(str, report.points_dropped))),
            ("moved", f"{size(report.bytes_moved)} by {report.strategy}" if report.merges else ""),
            _freed("freed there", report.bytes_freed) if report.bytes_freed else ("", ""),
            ("unreferenced", size(report.bytes_dropped) if report.bytes_dropped else ""),
        ],
    )
    draw_points_findings(console, report)
    render.points_of_the_future(console, report.disk, map(str, report.points_of_the_future))
    _draw_staying(console, report.staying)


def draw_points_findings(console: Console, report: PointsMergeReport) -> None:
    """Damage because of which layers were not merged."""
    render.findings(console, report.findings)


def _draw_staying(console: Console, staying: Sequence[StayingLayer]) -> None:
    for each in staying:
        render.line(console, f"stays: {each.file}: {each.reason}", style="yellow")
