"""`snapchain hold ADDRESS --tag TAG`: keep a layer's file, or a point, until it is released.

`snapchain release ADDRESS --tag TAG`: remove a hold.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from snapchain.cli import options, render
from snapchain.cli.app import verb
from snapchain.cli.output import Output
from snapchain.cli.quantities import heading, moment

if TYPE_CHECKING:
    from rich.console import Console

    from snapchain.ops.hold import HoldReport, HoldsReport


@verb(
    examples="""
    snapchain hold /images/web1.2.qcow2 --tag audit --reason "until the auditors are done"
    snapchain hold /backup::web1/vda@7 --tag legal
    snapchain hold s3://bucket/prefix::web1/vda@before-upgrade --tag upgrade
    snapchain hold ssh://root@kvm2/srv/replica::web1/vda@7 --tag legal
    snapchain hold /backup::web1@7 --tag legal
    snapchain hold /backup --list
    """,
    when_interrupted="it is held or it is not; run it again to be sure",
)
@options.takes_output(passphrase=True)
def hold(
    target: Annotated[
        str,
        options.address(
            metavar="ADDRESS",
            help="The file of a layer, or DEST::DISK@POINT, or DEST::GUEST@POINT. With --list: DEST[::DISK|GUEST].",
        ),
    ],
    *,
    tag: Annotated[
        str | None, typer.Option("--tag", "-t", metavar="TAG", help="Name of the hold. `release` needs it.")
    ] = None,
    reason: Annotated[str, typer.Option("--reason", metavar="TEXT", help="Why it is held, for people.")] = "",
    listed: Annotated[
        bool, typer.Option("--list", help="List the holds of points at a destination; with --tag, those of one tag.")
    ] = False,
    out: Output,
) -> None:
    """Keep a layer of an image, or a point of a disk, until it is released under the same tag.

    A held file stays as it is, byte for byte: merges by rules leave it out, and a merge that names it is refused. A
    held point is kept by every merge of its disk, and counts for the rules like any other point. Holds of a point are
    stored at the destination. Holds of a file are recorded in a small hidden file beside it, which is found after a
    rename too.

    A guest point is held with the points of all its disks, and released with them.

    A file or point may have several holds, each with its own tag. It is free when the last one is released. `snapchain
    inspect` shows the holds of layers, `snapchain hold --list` those of points.
    """
    from snapchain.destination.address import ImageAddress, parse_address
    from snapchain.errors import InvalidInput, NotFound
    from snapchain.ops import hold as ops
    from snapchain.ops.guest_points import find_guest

    if listed:
        _list(target, tag, reason, out)
        return
    if tag is None:
        raise InvalidInput("a hold needs a name", subject=target, hint="name it: --tag TAG; or list holds: --list")
    address = parse_address(target)
    if isinstance(address, ImageAddress):
        report = ops.hold_image(address.path, tag, reason=reason, dry_run=out.dry_run)
    else:
        place = options.destination(
            address.dest,
            out,
            writing=not out.dry_run,
        )
        try:
            report = ops.hold_point(
                place,
                address.disk,
                tag,
                point=address.point,
                reason=reason,
                dry_run=out.dry_run,
                on_event=out.on_event,
            )
        except NotFound:
            if find_guest(place, address.disk) is None:
                raise
            report = ops.hold_guest(
                place,
                address.disk,
                tag,
                point=address.point,
                reason=reason,
                dry_run=out.dry_run,
                on_event=out.on_event,
            )
    _show(out, report)


def _list(target: str, tag: str | None, reason: str, out: Output) -> None:
    from snapchain.destination.address import parse_destination
    from snapchain.errors import InvalidInput
    from snapchain.ops import hold as ops

    if reason:
        raise InvalidInput("--reason is for a new hold, and --list makes none", hint="leave one of them out")
    address = parse_destination(target)
    place = options.destination(address.dest, out)
    out.show(ops.list_holds(place, options.disk_of(address), tag=tag), _draw_list)


def _draw_list(console: Console, report: HoldsReport) -> None:
    if not report.holds:
        render.headline(console, f"no point of {render.place(report.destination)} is held")
        return
    render.table(
        console,
        ["point", "taken", "labels", "tag", heading("since"), "reason~"],
        [
            (
                f"{'guest ' * each.guest}{each.name}@{each.point}",
                moment(each.time),
                ", ".join(each.labels),
                each.tag,
                moment(each.since),
                each.reason,
            )
            for each in report.holds
        ],
    )


@verb(
    examples="""
    snapchain release /images/web1.2.qcow2 --tag audit
    snapchain release /backup::web1/vda@7 --tag legal
    """,
    when_interrupted="it is released or it is not; run it again to be sure",
)
@options.takes_output(passphrase=True)
def release(
    target: Annotated[
        str,
        options.address(metavar="ADDRESS", help="The file of a layer, or DEST::DISK@POINT, or DEST::GUEST@POINT."),
    ],
    *,
    tag: Annotated[str, typer.Option("--tag", "-t", metavar="TAG", help="Tag of the hold.")],
    out: Output,
) -> None:
    """Remove a hold from a layer of an image, or from a point of a disk.

    Nothing is dropped now. Without other holds, the next merge may drop it. If the file is gone, name its old path.
    """
    from snapchain.destination.address import ImageAddress, parse_address
    from snapchain.errors import NotFound
    from snapchain.ops import hold as ops
    from snapchain.ops.guest_points import find_guest

    address = parse_address(target)
    if isinstance(address, ImageAddress):
        report = ops.release_image(address.path, tag, dry_run=out.dry_run)
    else:
        place = options.destination(
            address.dest,
            out,
            writing=not out.dry_run,
        )
        try:
            report = ops.release_point(
                place, address.disk, tag, point=address.point, dry_run=out.dry_run, on_event=out.on_event
            )
        except NotFound:
            if find_guest(place, address.disk) is None:
                raise
            report = ops.release_guest(
                place, address.disk, tag, point=address.point, dry_run=out.dry_run, on_event=out.on_event
            )
    _show(out, report)


def _show(out: Output, report: HoldReport) -> None:
    """What is held now, or would be."""
    now, then = ("is held", "would be held") if report.holds else ("is not held any more", "would not be held any more")
    if not out.plan(report, lambda console, found: _draw(console, found, then)):
        out.report(report, lambda console, found: _draw(console, found, now))


def _draw(console: Console, report: HoldReport, words: str) -> None:
    render.headline(console, f"{render.place(report.address)} {words}")
    render.table(
        console,
        ["tag", heading("since"), "reason~"],
        [(each.tag, moment(each.since), each.reason) for each in report.holds],
    )
    disks = [f"{each.disk}@{each.point}" for each in getattr(report, "disks", ())]
    render.facts(console, [("of its disks", ", ".join(disks))])
