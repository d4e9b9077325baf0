"""`snapchain ship IMAGE DEST::DISK`: send what a destination lacks, and publish a point."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from snapchain.cli import options, render
from snapchain.cli.app import verb
from snapchain.cli.output import Output
from snapchain.cli.quantities import size
from snapchain.errors import InvalidInput
from snapchain.host.terminal import numbered

if TYPE_CHECKING:
    from rich.console import Console

    from snapchain.destination.records import Traits
    from snapchain.ops.ship.request import ShipPlan, ShipReport


@verb(
    examples="""
    snapchain ship /images/web1.qcow2 /backup::web1/vda
    snapchain ship web1.qcow2 s3://bucket/prefix::web1/vda --label before-upgrade
    snapchain ship web1.qcow2 /backup::web1/vda --dry-run
    snapchain ship web1.qcow2 ssh://root@kvm2/srv/replica::web1/vda
    snapchain ship /dev/vg0/web1 /backup::web1/vda --format raw --limit-rate 50M
    """,
    when_interrupted="every earlier point is whole; run it again to finish: what was sent is not sent twice",
)
@options.takes_output(passphrase=True)
def ship(
    image: Annotated[
        Path, typer.Argument(readable=False, metavar="IMAGE", help="The top of a chain, or any single disk image.")
    ],
    target: Annotated[
        str, options.address(metavar="DEST::DISK", help="The destination, and the name of the disk there.")
    ],
    *,
    label: options.Labels = None,
    each_layer: Annotated[
        bool,
        typer.Option("--each-layer", help="Make every file of the chain a layer and a point of its own."),
    ] = False,
    cut_replica: options.CutReplica = False,
    connections: options.Connections = 1,
    epoch: options.Epoch = 1,
    image_format: options.Format = None,
    image_dir: options.ImageDir = None,
    limit_rate: options.LimitRate = None,
    pack_size: options.PackSize = None,
    out: Output,
) -> None:
    """Send what a destination lacks of an image, and publish a point of it.

    The point shows the image as it is now, sealed or not. A layer that the destination has already is recognised
    without reading its data. If the image was written to since the last shipment, it is compared with the content at
    the destination, and only the difference is sent. Overlays that are no points of their own are composed first:
    overwritten data is neither sent nor stored. An image without a chain, raw or qcow2, can be shipped too. `send` does
    the same for a replica, and can write the stream to standard output.
    """
    from snapchain.destination.address import parse_disk_address
    from snapchain.ops.ship.run import Divergence, Files, ShipRequest, plan, run

    address = parse_disk_address(target)
    place = options.destination(
        address.dest,
        out,
        writing=not out.dry_run,
        limit_rate=limit_rate,
        pack_size_text=pack_size,
        connections=connections,
    )
    _check_kind(place.traits, address.dest, cut_replica=cut_replica, connections=connections, epoch=epoch)
    request = ShipRequest(
        image=image,
        disk=address.disk,
        labels=label or (),
        files=Files.EACH if each_layer else Files.COMPOSED,
        each_point=each_layer,
        divergence=Divergence.CUT_REPLICA if cut_replica else Divergence.REFUSE,
        epoch=epoch,
        format=options.format_of(image_format),
        image_dirs=options.image_dirs(image_dir),
    )
    if out.dry_run:
        out.plan(plan(request, place, on_event=out.on_event), _draw_plan)
    else:
        out.report(run(request, place, on_event=out.on_event), _draw_report, problems=_draw_damaged)


def _check_kind(traits: Traits, dest: str, *, cut_replica: bool, connections: int, epoch: int) -> None:
    """Raises InvalidInput for options that a kind of destination has no use for."""
    if cut_replica and traits.branches:
        raise InvalidInput(
            f"a {traits.kind} keeps every chain of a disk, so there is nothing to cut off",
            subject=dest,
            hint="leave out --cut-replica",
        )
    for option, is_given in (("--connections", connections > 1), ("--epoch", epoch > 1)):
        if is_given and not traits.streams:
            raise InvalidInput(
                f"{option} is for replicas; a {traits.kind} has no use for it",
                subject=dest,
                hint=f"leave out {option}",
            )


def _draw_plan(console: Console, plan: ShipPlan) -> None:
    render.headline(console, f"would ship {render.place(plan.image)} to {render.place(plan.destination)}::{plan.disk}")
    render.facts(console, [("layers there", str(plan.layers_present)), ("to read", size(plan.bytes_to_read))])
    render.table(
        console,
        ["new layer of~", "read>", "virtual size>", "point"],
        [
            (
                " + ".join(map(render.place, layer.files)),
                size(layer.bytes_to_read),
                size(layer.virtual_size),
                _mark(layer.publishes),
            )
            for layer in plan.layers
        ],
    )


def _draw_report(console: Console, report: ShipReport) -> None:
    render.headline(console, f"shipped {report.disk} as point {report.point}")
    render.facts(
        console,
        [
            ("layers", f"{report.layers_sent} sent, {report.layers_present} there already"),
            ("read", size(report.bytes_read)),
            ("stored", size(report.bytes_stored)),
            ("content", report.content_id),
            ("still damaged points", numbered(report.damaged)),
        ],
    )


def _draw_damaged(console: Console, report: ShipReport) -> None:
    if report.damaged:
        render.line(console, f"{report.disk}: still damaged: points {numbered(report.damaged)}", style="red")


def _mark(publishes: bool) -> str:
    return "yes" if publishes else ""
