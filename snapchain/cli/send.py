"""`snapchain send IMAGE [DEST::DISK]`: send a chain to a replica, or as a stream to stdout."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from snapchain.cli import options, quantities, render, streams
from snapchain.cli.app import verb
from snapchain.cli.output import Output
from snapchain.cli.preconnect import endpoint_at
from snapchain.cli.quantities import size
from snapchain.errors import InvalidInput

if TYPE_CHECKING:
    from rich.console import Console

    from snapchain.ops.ship.request import ShipPlan, ShipReport, ShipRequest


@verb(
    examples="""
    snapchain send /images/web1.qcow2 ssh://root@kvm2/srv/replica::web1/vda
    snapchain send web1.qcow2 dir:/mnt/share/replica::web1/vda --label before-upgrade
    snapchain send web1.qcow2 ssh://kvm2/srv/replica::web1/vda --limit-rate 50M --dry-run
    snapchain send web1.qcow2 --disk web1/vda | ssh kvm2 snapchain receive /srv/replica
    """,
    when_interrupted="what is durable at the replica stays; run it again to go on from there",
)
@options.takes_output()
def send(
    image: Annotated[
        Path, typer.Argument(readable=False, metavar="IMAGE", help="The top of a chain, or any single disk image.")
    ],
    target: Annotated[
        str | None, options.address(metavar="[DEST::DISK]", help="A replica. Without it the stream goes to stdout.")
    ] = None,
    *,
    disk: Annotated[str | None, typer.Option("--disk", help="Name of the disk in a stream to stdout.")] = None,
    label: options.Labels = None,
    each_layer: Annotated[
        bool, typer.Option("--each-layer", help="Make every file of the chain a layer of its own, under its own name.")
    ] = False,
    sealed: Annotated[
        bool, typer.Option("--sealed", help="Leave out the top, which a guest will continue to write.")
    ] = False,
    cut_replica: options.CutReplica = False,
    connections: options.Connections = 1,
    epoch: options.Epoch = 1,
    image_format: options.Format = None,
    image_dir: options.ImageDir = None,
    limit_rate: options.LimitRate = None,
    out: Output,
) -> None:
    """Send what a replica lacks of an image, and publish a point of it; or write a stream to standard output.

    DEST is ssh://[user@]host/path, where snapchain must be installed too, or dir:/path. A replica keeps qcow2 files
    that are ready to run, in one chain a disk. If it has layers that the image never had, nothing is sent, and the
    error lists what each side has. A lost ssh connection is opened again. An interrupted transfer continues at the last
    durable byte.
    """
    from snapchain.ops.ship.run import Divergence, Files, Scope, ShipRequest, plan, run

    dest, name = _named(target, disk, dry_run=out.dry_run)
    request = ShipRequest(
        image=image,
        disk=name,
        labels=label or (),
        files=Files.EACH if each_layer else Files.COMPOSED,
        scope=Scope.SEALED if sealed else Scope.ALL,
        epoch=epoch,
        divergence=Divergence.CUT_REPLICA if cut_replica else Divergence.REFUSE,
        format=options.format_of(image_format),
        image_dirs=options.image_dirs(image_dir),
        limit_rate=None if limit_rate is None else quantities.parse_size(limit_rate),
    )
    if dest is None:
        _to_stdout(request, out)
        return
    from snapchain.destinations import destination_at

    replica = destination_at(endpoint_at(dest, connections=connections))
    if out.dry_run:
        out.plan(plan(request, replica, on_event=out.on_event), _draw_plan)
    else:
        out.report(run(request, replica, on_event=out.on_event), _draw_report)


def _named(target: str | None, disk: str | None, *, dry_run: bool) -> tuple[str | None, str]:
    """The replica, None for stdout, and the disk."""
    from snapchain.destination.address import parse_disk_address

    if target is not None:
        if disk is not None:
            raise InvalidInput("the disk is named twice", subject=target, hint="leave out --disk")
        address = parse_disk_address(target)
        return address.dest, address.disk
    if disk is None:
        raise InvalidInput("no disk is named", hint="name a replica, DEST::DISK, or say --disk for a stream to stdout")
    if dry_run:
        raise InvalidInput("--dry-run needs a replica to look at", hint="name it: DEST::DISK")
    if sys.stdout.isatty():
        raise InvalidInput("a stream does not go to a terminal", hint="pipe it, redirect it, or name a replica")
    return None, disk


def _to_stdout(request: ShipRequest, out: Output) -> None:
    """The stream gets stdout for itself; what else is said there goes to stderr."""
    from snapchain.host.channel import Channel
    from snapchain.ops.ship.run import send_blindly

    class Stdout(Channel):
        """The stream on stdout, whose errors are those of printed text: quiet for a closed pipe, else a plain error."""

        def _lost(self) -> Exception:
            error = sys.exc_info()[1]
            return streams.failure(error if isinstance(error, OSError) else None)

    writer = streams.claim_stdout()
    report = send_blindly(request, Stdout(-1, writer, peer="stdout"), on_event=out.on_event)
    with redirect_stdout(sys.stderr):
        out.report(report, _draw_report)


def _draw_plan(console: Console, plan: ShipPlan) -> None:
    render.headline(console, f"would send {render.place(plan.image)} to {render.place(plan.destination)}::{plan.disk}")
    render.facts(console, [("layers there", str(plan.layers_present)), ("data", size(plan.data_bytes))])
    render.table(
        console,
        ["new layer of~", "data>", "virtual size>"],
        [
            (" + ".join(map(render.place, layer.files)), size(layer.data_bytes), size(layer.virtual_size))
            for layer in plan.layers
        ],
    )


def _draw_report(console: Console, report: ShipReport) -> None:
    point = "" if report.point is None else f" as point {report.point}"
    render.headline(console, f"sent {report.disk} to {render.place(report.destination)}{point}")
    render.facts(
        console,
        [
            ("layers", f"{report.layers_sent} sent, {report.layers_present} there already"),
            ("data", f"{size(report.data_bytes)}, {size(report.carried_bytes)} of it new to the replica"),
            ("on the wire", size(report.bytes_sent)),
            ("content", report.content_id),
        ],
    )
    render.unchanged(console, [report.disk] if report.unchanged else [])
