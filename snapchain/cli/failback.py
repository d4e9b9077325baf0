"""`snapchain failback IMAGE DEST::DISK...`: move a guest that was taken over back to its old host."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from snapchain.cli import options, quantities, render
from snapchain.cli.app import verb
from snapchain.cli.options import DiskPairs, disk_pairs
from snapchain.cli.output import Output
from snapchain.cli.quantities import size
from snapchain.errors import InvalidInput

if TYPE_CHECKING:
    from rich.console import Console

    from snapchain.ops.failback import PrepareReport
    from snapchain.ops.migrate.request import MigratePlan, MigrateReport


@verb(
    examples="""
    snapchain failback --prepare /images/web1.qcow2 dir:/srv/back::web1/vda
    snapchain failback vda-epoch2.qcow2 ssh://root@kvm1/srv/back::web1/vda --dry-run
    snapchain failback vda-epoch2.qcow2 ssh://root@kvm1/srv/back::web1/vda --start-hook 'ssh kvm1 virsh start web1'
    """,
    when_interrupted="run it again to go on; `snapchain migrate --take-back` undoes a handover that was begun",
)
@options.takes_output(passphrase=True)
def failback(
    disks: DiskPairs,
    *,
    prepare: Annotated[
        bool,
        typer.Option(
            "--prepare", help="On the old host, first: make a replica there of the images that were taken over."
        ),
    ] = False,
    start_hook: Annotated[
        str | None,
        typer.Option("--start-hook", metavar="COMMAND", help="Start the guest there; as of `snapchain migrate`."),
    ] = None,
    image_format: options.Format = None,
    image_dir: options.ImageDir = None,
    limit_rate: options.LimitRate = None,
    at: options.OtherAt = None,
    without: options.Without = None,
    out: Output,
) -> None:
    """Move a guest that was taken over back to its old host: only what differs crosses the link.

    First, on the old host, --prepare copies its images into a replica of their own, within that host. `snapchain fence`
    must have found before that another host has taken the guest over. What they hold that no point has is overwritten
    in that copy, and stays in the images.

    Then shut the guest down where it runs, and name its images there and that replica: what differs is sent as one
    layer, and the disks are handed over as by `snapchain migrate --offline`, all or none.

    If it is interrupted, run the same command again: it continues.
    """
    from snapchain.destinations import replica_at
    from snapchain.ops import failback as ops
    from snapchain.ops.migrate.request import MigrateRequest, Move

    dest, pairs = disk_pairs(disks)
    endpoint = replica_at(dest)
    chosen, dirs = options.format_of(image_format), options.image_dirs(image_dir)
    if prepare:
        if start_hook is not None or limit_rate is not None:
            raise InvalidInput("--start-hook and --limit-rate are for the way back, not for --prepare")
        asked = ops.PrepareRequest(disks=pairs, format=chosen, image_dirs=dirs)
        if out.dry_run:
            out.plan(ops.plan_prepare(asked, endpoint, on_event=out.on_event), _draw_prepare_plan)
        else:
            out.report(ops.prepare(asked, endpoint, on_event=out.on_event), _draw_prepared)
        return
    request = MigrateRequest(
        moves=[Move(image, disk) for image, disk in pairs],
        start_hook=[] if start_hook is None else options.argv_of(start_hook, option="--start-hook"),
        format=chosen,
        image_dirs=dirs,
        limit_rate=None if limit_rate is None else quantities.parse_size(limit_rate),
        reach=options.reach(at, without, out),
    )
    if out.dry_run:
        out.plan(ops.plan(request, endpoint, on_event=out.on_event), _draw_plan)
    else:
        out.report(ops.run(request, endpoint, on_event=out.on_event), _draw_report)


def _draw_plan(console: Console, plan: MigratePlan) -> None:
    render.headline(console, f"would move back to {render.place(plan.destination)}, {size(plan.bytes_to_send)} to send")
    for disk in plan.disks:
        words = disk.in_use or ("given already" if disk.given else f"{size(disk.bytes_to_send)} differ")
        render.line(console, f"{disk.disk}: {render.place(disk.image)}: {words}", indent=2)


def _draw_report(console: Console, report: MigrateReport) -> None:
    render.headline(console, f"moved back to {render.place(report.destination)}, {size(report.bytes_sent)} on the wire")
    for disk in report.disks:
        render.line(console, f"{disk.disk}: the guest runs on {disk.overlay} there, in epoch {disk.epoch}", indent=2)
    if report.started is None:
        render.line(console, "no hook: start the guest there on the files above", indent=2)


def _draw_prepare_plan(console: Console, report: PrepareReport) -> None:
    render.headline(console, f"would copy {size(report.bytes_copied)} to {render.place(report.destination)}")


def _draw_prepared(console: Console, report: PrepareReport) -> None:
    render.headline(console, f"{render.place(report.destination)} is ready for the way back")
    for disk in report.disks:
        render.line(console, f"{disk.disk}: {size(disk.bytes_copied)} of {render.place(disk.image)}", indent=2)
