"""`snapchain ship IMAGE DEST::DISK`: send what a destination lacks, and publish a point.

`snapchain ship --domain NAME DEST` does so for all disks of a guest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from snapchain.cli import guest_options, options, render, snapshot_options
from snapchain.cli.app import verb
from snapchain.cli.output import Output
from snapchain.cli.quantities import moment, size
from snapchain.errors import InvalidInput
from snapchain.host.terminal import named, numbered

if TYPE_CHECKING:
    from rich.console import Console

    from snapchain.destination.protocol import Destination
    from snapchain.destination.traits import Traits
    from snapchain.guest.address import GuestAddress
    from snapchain.guest.snapshot import LeftOut
    from snapchain.ops.ship.guest import GuestShipPlan, GuestShipReport, GuestShipRequest
    from snapchain.ops.ship.guest_bitmap import GuestCapturePlan
    from snapchain.ops.ship.request import ShipPlan, ShipReport


@verb(
    examples="""
    snapchain ship /images/web1.qcow2 /backup::web1/vda
    snapchain ship web1.qcow2 s3://bucket/prefix::web1/vda --label before-upgrade
    snapchain ship web1.qcow2 /backup::web1/vda --dry-run
    snapchain ship web1.qcow2 ssh://root@kvm2/srv/replica::web1/vda
    snapchain ship /dev/vg0/web1 /backup::web1/vda --format raw --limit-rate 50M
    snapchain ship --domain web1 /backup
    snapchain ship --domain web1 ssh://root@kvm2/srv/replica::prod/web1 --quiesce require
    snapchain ship --qmp /run/web1.qmp /backup::web1 --disk vda --json | jq '.guest_point, .consistency'
    """,
    when_interrupted="every earlier point is whole; run it again to finish: what was sent is not sent twice",
)
@options.takes_output(passphrase=True)
@guest_options.takes_guest()
@snapshot_options.takes_snapshot_options
def ship(
    image: Annotated[
        str | None,
        options.address(
            metavar="IMAGE",
            help="The top of a chain, or any single disk image. Left out with --domain or --qmp.",
        ),
    ] = None,
    target: Annotated[
        str | None,
        options.address(
            metavar="DEST::DISK",
            help="The destination, and the name of the disk there. Of a guest: DEST, or DEST::GUEST for another name.",
        ),
    ] = None,
    *,
    guest: Any,
    snapshot: Any,
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
    compression: options.CompressionMode = None,
    bitmap: Annotated[
        bool,
        typer.Option("--bitmap", help="Of a guest by --qmp: no overlays, but frozen views and dirty bitmaps."),
    ] = False,
    scratch: Annotated[
        Path | None,
        typer.Option(
            "--scratch", metavar="DIR", help="With --bitmap: where old data go that the guest overwrites meanwhile."
        ),
    ] = None,
    out: Output,
) -> None:
    """Send what a destination lacks of an image, and publish a point of it.

    The point shows the image as it is now, sealed or not. A layer that the destination has already is recognised
    without reading its data. If the image was written to since the last shipment, it is compared with the content at
    the destination, and only the difference is sent. Overlays that are no points of their own are composed first:
    overwritten data is neither sent nor stored. An image without a chain, raw or qcow2, can be shipped too. `send` does
    the same for a replica, and can write the stream to standard output.

    Of a guest, a snapshot of all disks is taken first, at one instant. The sealed layers are sent while the guest runs.
    At the end one guest point is published: a point of each disk, and a record with the definition of the guest. If one
    disk fails there is no guest point, and the next run continues. The guest writes to new files from then on.

    With --bitmap, the guest gets no new files. Its disks are read through frozen views, and dirty bitmaps in QEMU list
    what was written since the last point. A disk without a usable bitmap is read as a whole, and compared.
    """
    from snapchain.ops.ship.request import Divergence, Files, ShipRequest

    image, dest, name = _named(image, target, guest)

    def opened() -> Destination:
        place = options.destination(
            dest,
            out,
            writing=not out.dry_run,
            limit_rate=limit_rate,
            pack_size_text=pack_size,
            compression_text=compression,
            connections=connections,
        )
        _check_kind(place.traits, dest, cut_replica=cut_replica, connections=connections)
        return place

    divergence = Divergence.CUT_REPLICA if cut_replica else Divergence.REFUSE
    if guest is not None:
        for option, is_given in (("--each-layer", each_layer), ("--format", image_format is not None)):
            if is_given:
                raise InvalidInput(f"{option} is for an image, not for a guest", hint=f"leave out {option}")
        from dataclasses import replace

        from snapchain.guest.snapshot import SnapshotRequest
        from snapchain.ops.ship.guest import GuestShipRequest

        asked = GuestShipRequest(
            snapshot=replace(
                snapshot or SnapshotRequest(), labels=label or (), image_dirs=options.image_dirs(image_dir)
            ),
            name=name,
            labels=label or (),
            divergence=divergence,
            epoch=epoch,
        )
        if bitmap:
            _ship_captured(guest, asked, scratch, opened, out)
            return
        if scratch is not None:
            raise InvalidInput("--scratch belongs to --bitmap", hint="leave out --scratch")
        _ship_guest(guest, asked, opened, out)
        return
    if bitmap or scratch is not None:
        raise InvalidInput("--bitmap and --scratch are for a guest", hint="name one: --qmp SOCKET")
    snapshot_options.check_no_snapshot_options(snapshot)
    from snapchain.ops.ship.run import plan, run

    place = opened()
    assert image is not None
    assert name is not None
    request = ShipRequest(
        image=Path(image),
        disk=name,
        labels=label or (),
        files=Files.EACH if each_layer else Files.COMPOSED,
        each_point=each_layer,
        divergence=divergence,
        epoch=epoch,
        format=options.format_of(image_format),
        image_dirs=options.image_dirs(image_dir),
    )
    if out.dry_run:
        out.plan(plan(request, place, on_event=out.on_event), _draw_plan)
    else:
        out.report(run(request, place, names=place, on_event=out.on_event), _draw_report, problems=_draw_damaged)


def _named(image: str | None, target: str | None, guest: GuestAddress | None) -> tuple[str | None, str, str | None]:
    """(image, DEST, name of the disk or guest there) of the arguments: a guest has DEST alone. Raises InvalidInput."""
    from snapchain.destination.address import DestinationAddress, parse_destination, parse_disk_address

    if guest is None:
        if image is None:
            guest_options.check_either(None, None)
        if target is None:
            raise InvalidInput("no destination is named", hint="snapchain ship IMAGE DEST::DISK")
        disk = parse_disk_address(target)
        return image, disk.dest, disk.disk
    if target is not None:
        guest_options.check_either(image, guest)
    if image is None:
        raise InvalidInput("no destination is named", hint=f"snapchain ship {guest.option} DEST")
    address = parse_destination(image)
    if isinstance(address, DestinationAddress):
        return None, address.dest, None
    if address.point is not None:
        raise InvalidInput("a guest is wanted here, not a point of it", subject=image)
    return None, address.dest, address.disk


def _ship_guest(
    address: GuestAddress, request: GuestShipRequest, opened: Callable[[], Destination], out: Output
) -> None:
    from snapchain.guest.address import open_guest
    from snapchain.ops.ship.guest import plan, run

    with open_guest(address, on_event=out.on_event) as guest:
        request.check()
        request.name_of(guest)
        place = opened()
        if out.dry_run:
            out.plan(plan(guest, request, place, on_event=out.on_event), draw_guest_plan)
        else:
            report = run(guest, request, place, on_event=out.on_event)
            out.report(report, _draw_guest_report, problems=_draw_guest_damaged)


def _ship_captured(
    address: GuestAddress,
    request: GuestShipRequest,
    scratch: Path | None,
    opened: Callable[[], Destination],
    out: Output,
) -> None:
    from snapchain.guest.address import open_guest
    from snapchain.guest.capture import CaptureRequest
    from snapchain.ops.ship.guest_bitmap import plan, run

    capture = CaptureRequest(disks=request.snapshot.disks, scratch_dir=scratch)
    with open_guest(address, on_event=out.on_event) as guest:
        request.check()
        request.name_of(guest)
        place = opened()
        if out.dry_run:
            out.plan(plan(guest, request, capture, place, on_event=out.on_event), _draw_capture_plan)
        else:
            report = run(guest, request, capture, place, on_event=out.on_event)
            out.report(report, _draw_guest_report, problems=_draw_guest_damaged)


def _draw_capture_plan(console: Console, plan: GuestCapturePlan) -> None:
    place = f"{render.place(plan.destination)}::{plan.guest}"
    render.headline(console, f"would capture the disks of {plan.guest} and ship them to {place}")
    render.table(
        console,
        ["disk", "captured by", "virtual size>"],
        [(disk.disk, str(disk.captured_by), size(disk.virtual_size)) for disk in plan.disks],
    )


def _check_kind(traits: Traits, dest: str, *, cut_replica: bool, connections: int) -> None:
    """Raises InvalidInput for options that a kind of destination has no use for."""
    if cut_replica and traits.branches:
        raise InvalidInput(
            f"a {traits.kind} keeps every chain of a disk, so there is nothing to cut off",
            subject=dest,
            hint="leave out --cut-replica",
        )
    if connections > 1 and not traits.streams:
        raise InvalidInput(
            f"--connections is for replicas; a {traits.kind} has no use for it",
            subject=dest,
            hint="leave out --connections",
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
    render.unchanged(console, [report.disk] if report.unchanged else [])


def _draw_damaged(console: Console, report: ShipReport) -> None:
    if report.damaged:
        render.line(console, f"{report.disk}: still damaged: {named('point', report.damaged)}", style="red")


def draw_guest_plan(console: Console, plan: GuestShipPlan) -> None:
    """Show what a shipment of a guest would do."""
    place = f"{render.place(plan.destination)}::{plan.guest}"
    render.headline(console, f"would take a snapshot of {plan.snapshot.guest} and ship it to {place}")
    quiesce = "frozen, if the guest agent answers" if plan.snapshot.quiesces else "not frozen"
    if plan.snapshot.is_off:
        quiesce = "the guest is off"
    render.facts(console, [("filesystems", quiesce), ("to read so far", size(plan.bytes_to_read))])
    render.table(
        console,
        ["disk", "sealed~", "new overlay~", "layers there>", "to send>", "read>", "virtual size>"],
        [
            (
                shipped.disk,
                render.place(str(sealed.sealed)),
                render.place(str(sealed.overlay)),
                str(shipped.layers_present),
                str(len(shipped.layers)),
                size(shipped.bytes_to_read),
                size(sealed.virtual_size),
            )
            for shipped, sealed in zip(plan.disks, plan.snapshot.disks, strict=True)
        ],
    )
    _draw_left_out(console, plan.left_out)


def _draw_guest_report(console: Console, report: GuestShipReport) -> None:
    render.headline(console, f"shipped {report.guest} as guest point {report.guest_point}")
    frozen = None if report.frozen_seconds is None else f"{report.frozen_seconds:.2f} s"
    render.facts(
        console,
        [
            ("consistency", report.consistency.value),
            ("not filesystem-consistent", report.why_not or ""),
            ("frozen", frozen or ""),
            ("time", moment(report.time)),
            ("next start with", ", ".join(render.place(str(path)) for path in report.starts_with)),
            ("definition", "with secrets" if report.secrets else "without secrets: the destination is not encrypted"),
        ],
    )
    render.table(
        console,
        ["disk", "point>", "layers sent>", "there>", "read>", "stored>", "content?"],
        [
            (
                each.disk,
                str(each.point),
                str(each.layers_sent),
                str(each.layers_present),
                size(each.bytes_read),
                size(each.bytes_stored),
                each.content_id[:12],
            )
            for each in report.disks
        ],
    )
    render.unchanged(console, [each.disk for each in report.disks if each.unchanged])
    _draw_left_out(console, report.left_out)


def _draw_left_out(console: Console, left_out: Sequence[LeftOut]) -> None:
    for each in left_out:
        render.line(console, f"left out: {each.disk}: {each.reason}")


def _draw_guest_damaged(console: Console, report: GuestShipReport) -> None:
    for each in report.disks:
        _draw_damaged(console, each)


def _mark(publishes: bool) -> str:
    return "yes" if publishes else ""
