"""`snapchain merge ADDRESS`: make one layer of several, in a chain of files or in a repository."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated

import typer

from snapchain.cli import options, render
from snapchain.cli.app import verb
from snapchain.cli.output import Output
from snapchain.cli.progress import Mode
from snapchain.cli.quantities import size
from snapchain.errors import InvalidInput

if TYPE_CHECKING:
    from rich.console import Console

    from snapchain.model.retention import Policy
    from snapchain.ops.merge_image import MergePlan, MergeReport
    from snapchain.ops.merge_repository import RepositoryMergePlan, RepositoryMergeReport

_RANGE = "Which layers of an image"
_KEEP = "Which points of a disk to keep"

_Count = Annotated[int, typer.Option(min=-1, metavar="N", rich_help_panel=_KEEP)]


@verb(
    examples="""
    snapchain merge /images/web1.qcow2
    snapchain merge /images/web1.qcow2 --flatten --dry-run
    snapchain merge /images/web1.qcow2 --from web1.2.qcow2 --to web1.5.qcow2
    snapchain merge /backup::web1/vda --keep-last 7 --keep-weekly 4 --keep-label release
    """,
    when_interrupted="the chain is as it was, or merged, and reads the same either way; run it again to finish",
)
def merge(
    target: Annotated[str, typer.Argument(metavar="ADDRESS", help="An image, or DEST::DISK in a repository.")],
    *,
    flatten: Annotated[
        bool, typer.Option("--flatten", help="Merge the root too: one file is left.", rich_help_panel=_RANGE)
    ] = False,
    first: Annotated[
        str | None, typer.Option("--from", metavar="LAYER", help="The lowest layer.", rich_help_panel=_RANGE)
    ] = None,
    last: Annotated[
        str | None, typer.Option("--to", metavar="LAYER", help="The highest layer.", rich_help_panel=_RANGE)
    ] = None,
    keep_inputs: Annotated[
        bool, typer.Option("--keep-inputs", help="Remove no file that was merged.", rich_help_panel=_RANGE)
    ] = False,
    drop_bitmaps: Annotated[
        bool,
        typer.Option("--drop-bitmaps", help="Merge layers with persistent bitmaps; these go.", rich_help_panel=_RANGE),
    ] = False,
    image_format: options.Format = None,
    image_dir: options.ImageDir = None,
    keep_last: _Count = 0,
    keep_hourly: _Count = 0,
    keep_daily: _Count = 0,
    keep_weekly: _Count = 0,
    keep_monthly: _Count = 0,
    keep_yearly: _Count = 0,
    keep_within: Annotated[
        str | None,
        typer.Option(metavar="DURATION", help="All points of the last 1y5m7d2h.", rich_help_panel=_KEEP),
    ] = None,
    keep_label: Annotated[
        list[str] | None,
        typer.Option(metavar="LABEL", help="All points with this label. May be repeated.", rich_help_panel=_KEEP),
    ] = None,
    password_file: options.PasswordFile = None,
    password_command: options.PasswordCommand = None,
    dry_run: options.DryRun = False,
    json: options.Json = False,
    progress: options.Progress = Mode.AUTO,
    quiet: options.Quiet = False,
) -> None:
    """Make one layer of several neighbours; what was overwritten is dropped.

    An IMAGE: everything above the root becomes one overlay, under the same path. What the merge must not change,
    the bytes that a guest reads, is compared before the switch; until then the inputs are valid.

    DEST::DISK: keeps the points that the rules name, and always the newest one; layers that no kept point needs are
    merged into the next one that stays. Only records change: no data is moved. -1 means all.
    """
    from snapchain.model.retention import Policy, parse_duration
    from snapchain.ops.address import ImageAddress, parse_address, parse_disk_address

    policy = Policy(
        last=keep_last,
        hourly=keep_hourly,
        daily=keep_daily,
        weekly=keep_weekly,
        monthly=keep_monthly,
        yearly=keep_yearly,
        within=None if keep_within is None else parse_duration(keep_within),
        labels=frozenset(keep_label or ()),
    )
    files_only = flatten or first is not None or last is not None or keep_inputs or drop_bitmaps
    with Output(as_json=json, dry_run=dry_run, progress=progress, quiet=quiet) as out:
        address = parse_address(target)
        if isinstance(address, ImageAddress):
            _refuse_rules(policy, target)
            from snapchain.ops import merge_image

            plan = merge_image.plan(
                address.path,
                flatten=flatten,
                from_layer=first,
                to_layer=last,
                keep_inputs=keep_inputs,
                drop_bitmaps=drop_bitmaps,
                image_format=options.format_of(image_format),
                image_dirs=options.image_dirs(image_dir),
            )
            if not out.plan(plan, _draw_plan):
                out.report(merge_image.run(plan, on_event=out.on_event), _draw_report)
            return
        _refuse_no_rule(policy, target, files_only=files_only)
        from snapchain.ops.merge_repository import RepositoryMerge

        disk = parse_disk_address(target).disk
        repository = options.repository(
            address.dest, out, password_file=password_file, password_command=password_command, writing=not dry_run
        )
        work = RepositoryMerge(repository, disk, policy, zone=datetime.now().astimezone().tzinfo or UTC)
        if not out.plan(work.plan(), _draw_repository_plan):
            out.report(work.run(on_event=out.on_event), _draw_repository_report)


def _refuse_rules(policy: Policy, target: str) -> None:
    if not policy.is_empty:
        raise InvalidInput(
            "files of an image have no points to keep",
            subject=target,
            hint="name the layers with --from and --to, or merge DEST::DISK",
        )


def _refuse_no_rule(policy: Policy, target: str, *, files_only: bool) -> None:
    if files_only:
        raise InvalidInput(
            "--flatten, --from, --to, --keep-inputs and --drop-bitmaps are for images",
            subject=target,
            hint="say which points to keep: --keep-last 7",
        )
    if policy.is_empty:
        raise InvalidInput("no rule says which points to keep", subject=target, hint="such as --keep-last 7")


def _draw_plan(console: Console, plan: MergePlan) -> None:
    if plan.strategy.value == "nothing":
        render.headline(console, f"{plan.image}: there is nothing to merge")
        return
    render.headline(console, f"would merge {plan.last - plan.first + 1} layers into {render.place(plan.result)}")
    render.facts(
        console,
        [
            ("layers", f"{plan.layers_before} now, {plan.layers_after} then"),
            ("to move", f"{size(plan.bytes_to_move)} by qemu-img {plan.strategy.value}"),
            ("drops", f"{size(plan.shadowed_bytes)} that layers above hide"),
            ("room", f"needs {size(plan.needs_bytes)} meanwhile, {size(plan.free_bytes)} free"),
            ("removes", ", ".join(map(render.place, plan.remove))),
            *((("keeps", f"{render.place(kept.path)}: {kept.reason}")) for kept in plan.keep),
        ],
    )


def _draw_report(console: Console, report: MergeReport) -> None:
    if report.strategy.value == "nothing":
        render.headline(console, f"{report.image}: there was nothing to merge")
    else:
        layers = f"{report.layers_before} layers became {report.layers_after}"
        render.headline(console, f"merged into {render.place(report.result)}: {layers}, and it reads as before")
    render.facts(
        console,
        [
            ("moved", size(report.bytes_moved)),
            ("freed", size(report.bytes_freed)),
            ("removed", ", ".join(map(render.place, report.removed))),
            *((("kept", f"{render.place(kept.path)}: {kept.reason}")) for kept in report.kept),
        ],
    )


def _draw_repository_plan(console: Console, plan: RepositoryMergePlan) -> None:
    render.headline(console, f"would merge {plan.disk}: {plan.layers_before} layers now, {plan.layers_after} then")
    render.table(
        console,
        ["point>", "", "because", "labels"],
        [
            (str(each.point), "keep" if each.kept else "drop", "; ".join(each.reasons), ", ".join(each.labels))
            for each in plan.points
        ],
    )


def _draw_repository_report(console: Console, report: RepositoryMergeReport) -> None:
    headline = f"merged {report.disk}: {report.layers_before} layers became {report.layers_after}"
    render.headline(console, headline if report.strategy != "none" else f"{report.disk}: nothing to merge")
    render.facts(
        console,
        [
            ("points kept", ", ".join(map(str, report.points_kept))),
            ("dropped", ", ".join(map(str, report.points_dropped))),
            ("moved", size(report.bytes_moved)),
            ("named no more", size(report.bytes_dropped)),
        ],
    )
