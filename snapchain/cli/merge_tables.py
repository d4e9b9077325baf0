"""What a merge of files would do and what it did, for a terminal: the stack, its layers, the merges, the room."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from snapchain.cli import render, stack_picture
from snapchain.cli.quantities import duration, heading, moment, size
from snapchain.host.terminal import counted, numbered

if TYPE_CHECKING:
    from rich.console import Console

    from snapchain.destination.records import PointsMergePlan, PointsMergeReport, StayingLayer
    from snapchain.merge.plan import LayerUse, MergePlan
    from snapchain.merge.run import MergeReport
    from snapchain.model.merging import MergeRow
    from snapchain.ops.guest_chain_merge import GuestMergePlan, GuestMergeReport
    from snapchain.ops.guest_points_merge import GuestPointsMergePlan, GuestPointsMergeReport


def draw_plan(console: Console, plan: MergePlan) -> None:
    """What would be done to a chain of files."""
    _draw_headline(console, str(plan.image), plan.layers_before, plan.layers_after, plan.rows)
    stack_picture.draw(console, _rows(plan))
    _draw_layers(console, plan.layers)
    _draw_merges(console, plan.rows)
    if plan.merges:
        removed = (path for each in reversed(plan.merges) for path in each.remove)
        kept = (kept for each in plan.merges for kept in each.keep)
        render.facts(
            console,
            [
                ("room", _room(plan.needs_bytes, plan.free_bytes)),
                ("time", f"about {duration(plan.seconds)}"),
                ("removes", ", ".join(map(render.place, removed))),
                *(("keeps", f"{render.place(each.path)}: {each.reason}") for each in kept),
            ],
        )
    for notice in plan.notices:
        render.line(console, f"note: {notice}", style="yellow")


def draw_points_plan(console: Console, plan: PointsMergePlan) -> None:
    """What would be done to a disk at a destination."""
    changes = plan.layers_after < plan.layers_before
    _draw_headline(console, plan.disk, plan.layers_before, plan.layers_after, plan.rows, changes=changes)
    render.table(
        console,
        ["point>", "", "labels", "because~"],
        [
            (str(each.point), "keep" if each.kept else "drop", ", ".join(each.labels), "; ".join(each.reasons))
            for each in plan.points
        ],
    )
    render.points_of_the_future(console, plan.disk, [each.point for each in plan.points if each.of_the_future])
    _draw_merges(console, plan.rows, names=True)
    if plan.free_bytes is None:
        render.facts(console, [("writes", f"about {counted(plan.requests, 'object')}, records only: no data is moved")])
    elif plan.merges:
        moves = f"{size(plan.bytes_to_move)} by {plan.strategy}"
        room = _room(plan.needs_bytes, plan.free_bytes)
        render.facts(console, [("moves", moves), ("drops", size(plan.shadowed_bytes)), ("room there", room)])
    draw_staying(console, plan.staying)


def _draw_headline(
    console: Console, subject: str, before: int, after: int, rows: Sequence[MergeRow], *, changes: bool = False
) -> None:
    if not rows and not changes:
        render.headline(console, f"{subject}: there is nothing to merge")
        return
    times = "" if len(rows) < 2 else f" in {len(rows)} merges"
    render.headline(console, f"would make {counted(after, 'layer')} of {before} of {subject}{times}")


def _room(needs: int, free: int) -> str:
    return f"needs {size(needs)} meanwhile, {size(free)} free"


def _rows(plan: MergePlan) -> list[stack_picture.Row]:
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
        "data>": [size(layer.data_bytes) for layer in layers],
        "hidden>": [size(layer.shadowed_bytes) for layer in layers],
        heading("sealed"): [moment(layer.sealed) if layer.sealed else "" for layer in layers],
        "labels": [", ".join(layer.labels) for layer in layers],
        "is at": [", ".join(layer.at) for layer in layers],
        "stays because~": ["; ".join(layer.stays or [f"held: {hold.tag}" for hold in layer.holds]) for layer in layers],
    }
    render.table(console, list(columns), reversed(list(zip(*columns.values(), strict=True))))


def _draw_merges(console: Console, rows: Sequence[MergeRow], *, names: bool = False) -> None:
    """The merges of any plan, uppermost first. names: of the layers, too; columns that hold nothing are left out."""
    columns: dict[str, list[str]] = {
        "merge into": [each.layers[-1] for each in rows],
        "layers>": [str(len(each.layers)) for each in rows],
        "by": [each.method for each in rows],
        "moves>": [_known(each.bytes_to_move, " shared" if each.shares_extents else "") for each in rows],
        "drops>": [_known(each.bytes_to_free) for each in rows],
        "room>": [_known(each.needs_bytes) for each in rows],
        "time>": ["" if each.seconds is None else duration(each.seconds) for each in rows],
        "from~": [", ".join(each.layers[:-1]) if names else "" for each in rows],
    }
    if rows:
        render.table(console, list(columns), reversed(list(zip(*columns.values(), strict=True))))


def _known(count: int | None, more: str = "") -> str:
    return "" if count is None else f"{size(count)}{more}"


def draw_report(console: Console, report: MergeReport) -> None:
    """What was done."""
    layers = f"{counted(report.layers_before, 'layer')} became {report.layers_after}"
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


def draw_failed(console: Console, report: MergeReport) -> None:
    """What could not be merged."""
    for fault in report.failed:
        names = ", ".join(path.name for path in fault.layers)
        render.line(console, f"not merged: {names}: {fault.message}", style="red")


def draw_points_report(console: Console, report: PointsMergeReport) -> None:
    """What was done to a disk at a destination."""
    headline = f"merged {report.disk}: {counted(report.layers_before, 'layer')} became {report.layers_after}"
    has_merged = bool(report.merges) or report.strategy == "records"
    render.headline(console, headline if has_merged else f"{report.disk}: no layers to merge")
    render.facts(
        console,
        [
            ("points kept", numbered(report.points_kept)),
            ("dropped", numbered(report.points_dropped)),
            ("moved", f"{size(report.bytes_moved)} by {report.strategy}" if report.merges else ""),
            _freed("freed there", report.bytes_freed) if report.bytes_freed else ("", ""),
            ("unreferenced", size(report.bytes_dropped) if report.bytes_dropped else ""),
        ],
    )
    draw_points_findings(console, report)
    render.points_of_the_future(console, report.disk, report.points_of_the_future)
    draw_staying(console, report.staying)


def draw_guest_points_plan(console: Console, plan: GuestPointsMergePlan) -> None:
    """What would be done to the disks of a guest at a destination."""
    dropped = sum(not each.kept for each in plan.points)
    words = f"would drop {counted(dropped, 'guest point')} of {plan.guest}" if dropped else f"{plan.guest}: none goes"
    render.headline(console, words)
    render.table(
        console,
        ["guest point>", "", "labels", "because~"],
        [
            (str(each.point), "keep" if each.kept else "drop", ", ".join(each.labels), "; ".join(each.reasons))
            for each in plan.points
        ],
    )
    if plan.leftovers:
        render.facts(console, [("interrupted", f"{counted(plan.leftovers, 'guest point')} without a record")])
    render.points_of_the_future(console, plan.guest, [each.point for each in plan.points if each.of_the_future])
    render.table(
        console,
        ["disk", "points dropped", "layers>", "then>"],
        [
            (
                each.disk,
                numbered([point.point for point in each.points if not point.kept]),
                str(each.layers_before),
                str(each.layers_after),
            )
            for each in plan.disks
        ],
    )
    for disk in plan.disks:
        draw_staying(console, disk.staying)


def draw_guest_points_report(console: Console, report: GuestPointsMergeReport) -> None:
    """What was done to the disks of a guest at a destination."""
    layers = f"{counted(report.layers_before, 'layer')} became {report.layers_after}"
    render.headline(console, f"merged {report.guest}: {layers} in {counted(len(report.disks), 'disk')}")
    render.facts(
        console,
        [
            ("guest points kept", numbered(report.points_kept)),
            ("dropped", numbered(report.points_dropped)),
            ("interrupted", f"{report.leftovers} dropped" if report.leftovers else ""),
            ("moved", f"{size(report.bytes_moved)} by {report.strategy}" if report.bytes_moved else ""),
            _freed("freed there", report.bytes_freed) if report.bytes_freed else ("", ""),
            ("unreferenced", size(report.bytes_dropped) if report.bytes_dropped else ""),
        ],
    )
    draw_guest_points_problems(console, report)
    render.points_of_the_future(console, report.guest, report.points_of_the_future)
    for disk in report.disks:
        draw_staying(console, disk.staying)


def draw_guest_points_problems(console: Console, report: GuestPointsMergeReport) -> None:
    """Damage because of which layers were not merged, and disks that the next run finishes."""
    render.findings(console, report.findings)
    for each in report.failed:
        render.line(console, f"not merged: {each.message}", style="red")


def draw_points_findings(console: Console, report: PointsMergeReport) -> None:
    """Damage because of which layers were not merged."""
    render.findings(console, report.findings)


def draw_staying(console: Console, staying: Sequence[StayingLayer]) -> None:
    """Layers that no kept point needs, and that stay."""
    for each in staying:
        render.line(console, f"stays: {each.file}: {each.reason}", style="yellow")


def draw_guest_plan(console: Console, plan: GuestMergePlan) -> None:
    """What would be done to the disks of a guest."""
    for each in plan.disks:
        render.headline(console, f"{plan.guest}/{each.disk}")
        draw_plan(console, each)
    _draw_left_out(console, plan)


def draw_guest_report(console: Console, report: GuestMergeReport) -> None:
    """What was done to the disks of a guest."""
    for each in report.disks:
        render.headline(console, f"{report.guest}/{each.disk}")
        draw_report(console, each)
    _draw_left_out(console, report)
    for fault in report.failed:
        render.line(console, f"not merged: {report.guest}/{fault.disk}: {fault.message}", style="red")


def draw_guest_failed(console: Console, report: GuestMergeReport) -> None:
    """What could not be merged of a guest."""
    for each in report.disks:
        draw_failed(console, each)
    for fault in report.failed:
        render.line(console, f"not merged: {report.guest}/{fault.disk}: {fault.message}", style="red")


def _draw_left_out(console: Console, shown: GuestMergePlan | GuestMergeReport) -> None:
    for each in shown.left_out:
        render.line(console, f"left out: {shown.guest}/{each.disk}: {each.reason}", style="yellow")
