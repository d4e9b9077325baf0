"""`snapchain diff ADDRESS ADDRESS`: list the bytes that differ between two points or images."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Annotated

from snapchain.cli import options, render
from snapchain.cli.app import verb
from snapchain.cli.output import Output
from snapchain.cli.quantities import size
from snapchain.errors import InvalidInput, NotFound
from snapchain.host.terminal import counted

if TYPE_CHECKING:
    from rich.console import Console

    from snapchain.destination.protocol import Destination
    from snapchain.destination.reading import PointLeaves
    from snapchain.ops.diff import DiffReport
    from snapchain.ops.guest_diff import DiskDiff, GuestDiffReport
    from snapchain.ops.guest_points import GuestView

_SHOWN = 20


@verb(
    examples="""
    snapchain diff /backup::web1/vda@6 /backup::web1/vda@7
    snapchain diff /backup::web1/vda /images/web1.qcow2
    snapchain diff ssh://root@kvm2/srv/replica::web1/vda /backup::web1/vda
    snapchain diff /backup::web1/vda@before-upgrade /backup::web1/vda --json
    snapchain diff /backup::web1@6 /backup::web1@7
    """,
    when_interrupted="nothing was being changed",
)
@options.takes_output(passphrase=True, dry_run=False, progress=False)
def diff(
    old: Annotated[
        str,
        options.address(metavar="ADDRESS", help="The one side: an image, or a point of a disk or guest."),
    ],
    new: Annotated[str, options.address(metavar="ADDRESS", help="The other side.")],
    *,
    image_format: options.Format = None,
    image_dir: options.ImageDir = None,
    out: Output,
) -> None:
    """List the ranges of guest bytes that differ between two points, two images, or a point and an image.

    Points of a repository answer from their records, without reading data; images and points of replicas are read
    where they may differ.

    Two guest points: their disks are compared one by one, and those that only one of them has are listed.
    """
    from snapchain.destination.address import ImageAddress, parse_address
    from snapchain.ops import diff as ops
    from snapchain.ops.guest_diff import diff_guests
    from snapchain.ops.guest_points import find_guest

    with ExitStack() as stack:
        sides: list[PointLeaves] = []
        guests: list[tuple[Destination, GuestView, str | None]] = []
        opened: dict[str, Destination] = {}
        for address in (parse_address(old), parse_address(new)):
            if isinstance(address, ImageAddress):
                image = ops.image_side(
                    address.path,
                    format=options.format_of(image_format),
                    image_dirs=options.image_dirs(image_dir),
                    on_event=out.on_event,
                )
                sides.append(stack.enter_context(image))
                continue
            if address.dest not in opened:
                opened[address.dest] = options.destination(address.dest, out)
            place = opened[address.dest]
            try:
                side = place.leaves(address.disk, address.point, on_event=out.on_event)
                sides.append(stack.enter_context(side))
            except NotFound:
                view = find_guest(place, address.disk)
                if view is None:
                    raise
                guests.append((place, view, address.point))
        if not guests:
            out.show(ops.diff(*sides), _draw)
        elif sides:
            raise InvalidInput("a guest is compared with a guest", hint="name one disk of it: DEST::GUEST/vda")
        else:
            out.show(diff_guests(*guests, on_event=out.on_event), _draw_guests)


def _draw(console: Console, report: DiffReport) -> None:
    if report.identical:
        render.headline(console, "no difference")
        return
    render.headline(console, f"{size(report.changed_bytes)} differ in {counted(len(report.ranges), 'range')}")
    if report.old_size != report.new_size:
        render.facts(console, [("size", f"{size(report.old_size)} before, {size(report.new_size)} after")])
    render.table(
        console,
        ["offset>", "length>", ""],
        [(str(each.offset), str(each.length), size(each.length)) for each in report.ranges[:_SHOWN]],
    )
    if len(report.ranges) > _SHOWN:
        render.line(console, f"and {len(report.ranges) - _SHOWN} more: --json lists them all", style="dim", indent=2)


def _draw_guests(console: Console, report: GuestDiffReport) -> None:
    words = "no difference" if report.identical else f"{size(report.changed_bytes)} differ"
    render.headline(console, f"{report.old} and {report.new}: {words}")
    render.table(
        console,
        ["disk", "differs>", "ranges>", "size before>", "size after>", ""],
        [_disk_row(each) for each in report.disks],
    )


def _disk_row(each: DiskDiff) -> tuple[str, ...]:
    found = each.difference
    if found is None:
        return each.disk, "", "", "", "", f"only in {'the first' if each.only_in == 'old' else 'the second'}"
    changed = "" if found.identical else size(found.changed_bytes)
    ranges = "" if found.identical else str(len(found.ranges))
    return each.disk, changed, ranges, size(found.old_size), size(found.new_size), ""
