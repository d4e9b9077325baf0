"""`snapchain migrate IMAGE DEST::DISK`: hand the disks of a guest over to another host."""

from __future__ import annotations

import shlex
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

    from snapchain.ops.migrate.run import MigratePlan, MigrateReport, TakeBackPlan, TakeBackReport

_BACK = "To go back"


@verb(
    examples="""
    snapchain migrate web1.qcow2 ssh://root@kvm2/srv/replica::web1/vda --offline
    snapchain migrate a.qcow2 ssh://kvm2/srv/replica::web1/vda b.qcow2 ssh://kvm2/srv/replica::web1/vdb --offline
    snapchain migrate web1.qcow2 ssh://kvm2/srv/replica::web1/vda --offline --start-hook 'ssh kvm2 virsh start web1'
    snapchain migrate web1.qcow2 ssh://kvm2/srv/replica::web1/vda --take-back
    """,
    when_interrupted="run it again to go on; `inspect` shows whether the disk was given away already, and --take-back "
    "undoes that as long as no guest has written there",
)
@options.takes_output()
def migrate(
    disks: DiskPairs,
    *,
    offline: Annotated[
        bool, typer.Option("--offline", help="The guest is shut down, or paused: see --paused.")
    ] = False,
    paused: Annotated[
        bool,
        typer.Option(
            "--paused",
            help="You have paused the guest (virsh suspend), and it still has the images open. Nothing is sealed. "
            "Never resume it here.",
        ),
    ] = False,
    start_hook: Annotated[
        str | None,
        typer.Option(
            "--start-hook",
            metavar="COMMAND",
            help="Run COMMAND here (no shell) to start the guest, once the destination "
            "has the disks. Its environment has "
            "SNAPCHAIN_DISK, _OVERLAY, _EPOCH, _IMAGE and _DESTINATION, with _1, _2... for several disks.",
        ),
    ] = None,
    prove: Annotated[
        bool,
        typer.Option("--prove", help="Read every layer at the destination again before the disks are handed over."),
    ] = False,
    take_back: Annotated[
        bool,
        typer.Option(
            "--take-back",
            help="Make the disks this host's again. Refused if a guest has written to them there.",
            rich_help_panel=_BACK,
        ),
    ] = False,
    destination_is_gone: Annotated[
        bool,
        typer.Option(
            "--destination-is-gone",
            help="Take back without contacting the destination. You must make sure that "
            "no guest runs there, now or later.",
            rich_help_panel=_BACK,
        ),
    ] = False,
    label: options.Labels = None,
    cut_replica: options.CutReplica = False,
    connections: options.Connections = 1,
    image_format: options.Format = None,
    image_dir: options.ImageDir = None,
    limit_rate: options.LimitRate = None,
    out: Output,
) -> None:
    """Hand the disks of a guest that does not run over to another host: all of them, or none.

    First each top is sealed, the layers that the replica lacks are sent, and an empty overlay for the guest is made
    there. Until then, and whenever the destination refuses, the disks stay this host's.

    Then, with the images locked, they are marked as given away and made read-only here. The destination takes them over
    in a new epoch, and the start hook runs. From then on snapchain neither writes nor sends these images here, and the
    replica refuses whatever this host sends.

    If it is interrupted, run the same command again: it continues.
    """
    from snapchain.destinations import replica_at
    from snapchain.ops.migrate.request import MigrateRequest, Move
    from snapchain.ops.migrate.run import migrate as run, plan, plan_take_back, take_back as undo
    from snapchain.ops.ship.run import Divergence

    _check(offline=offline, paused=paused, take_back=take_back, unasked=destination_is_gone)
    dest, pairs = disk_pairs(disks)
    endpoint = replica_at(dest, connections=connections)
    request = MigrateRequest(
        moves=[Move(image, disk) for image, disk in pairs],
        paused=paused,
        prove=prove,
        start_hook=_words(start_hook),
        labels=label or (),
        divergence=Divergence.CUT_REPLICA if cut_replica else Divergence.REFUSE,
        format=options.format_of(image_format),
        image_dirs=options.image_dirs(image_dir),
        limit_rate=None if limit_rate is None else quantities.parse_size(limit_rate),
    )
    if take_back and out.dry_run:
        out.plan(plan_take_back(request, endpoint, unasked=destination_is_gone), _draw_take_back_plan)
    elif take_back:
        out.report(undo(request, endpoint, unasked=destination_is_gone), _draw_take_back)
    elif out.dry_run:
        out.plan(plan(request, endpoint, on_event=out.on_event), _draw_plan)
    else:
        out.report(run(request, endpoint, on_event=out.on_event), _draw_report)


def _check(*, offline: bool, paused: bool, take_back: bool, unasked: bool) -> None:
    if unasked and not take_back:
        raise InvalidInput("--destination-is-gone is for --take-back")
    if not offline and not paused and not take_back:
        raise InvalidInput(
            "only disks of a guest that does not run can be handed over",
            hint="shut it down and say --offline, or pause it and say --paused; for one that runs, `snapchain sync` "
            "prints the virsh command",
        )


def _words(command: str | None) -> list[str]:
    if command is None:
        return []
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise InvalidInput(f"the start hook: {error}", subject=command) from error
    if not words:
        raise InvalidInput("the start hook is empty")
    return words


def _draw_plan(console: Console, plan: MigratePlan) -> None:
    render.headline(console, f"would hand over to {render.place(plan.destination)}, {size(plan.bytes_to_send)} to send")
    render.table(
        console,
        ["disk", "image", "to send>", "epoch>", "state~"],
        [
            (
                each.disk,
                render.place(each.image),
                size(each.bytes_to_send),
                str(each.epoch),
                each.in_use or ("given already" if each.given else "its top is sealed first" if each.seals else ""),
            )
            for each in plan.disks
        ],
    )


def _draw_report(console: Console, report: MigrateReport) -> None:
    said = {"new": "handed over", "resumed": "handed over, as begun earlier,", "done": "was handed over already"}
    render.headline(console, f"{said[report.course.value]} to {render.place(report.destination)}")
    render.table(
        console,
        ["disk", "epoch>", "for the guest there", "read-only here~"],
        [
            (each.disk, str(each.epoch), each.overlay, ", ".join(map(render.place, each.fenced)))
            for each in report.disks
        ],
    )
    started = {None: "no hook: start the guest there on the files above", True: "by the hook", False: "no"}
    render.facts(
        console,
        [
            ("on the wire", size(report.bytes_sent)),
            ("cutover", quantities.duration(report.cutover_seconds)),
            ("started", started[report.started]),
        ],
    )


def _draw_take_back_plan(console: Console, plan: TakeBackPlan) -> None:
    word = "" if plan.asked else ", without asking that host"
    render.headline(console, f"would take back from {render.place(plan.destination)}{word}")
    for image, disk, epoch in zip(plan.images, plan.disks, plan.epochs, strict=True):
        render.line(console, f"{disk}: {render.place(image)} would be this host's again, in epoch {epoch}", indent=2)


def _draw_take_back(console: Console, report: TakeBackReport) -> None:
    render.headline(console, f"taken back from {render.place(report.destination)}")
    for image, disk, epoch in zip(report.images, report.disks, report.epochs, strict=True):
        render.line(console, f"{disk}: {render.place(image)} is this host's again, in epoch {epoch}", indent=2)
