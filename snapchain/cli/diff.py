"""`snapchain diff ADDRESS ADDRESS`: list the bytes that differ between two points or images."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Annotated

from snapchain.cli import options, render
from snapchain.cli.app import verb
from snapchain.cli.output import Output
from snapchain.cli.quantities import size
from snapchain.host.terminal import counted

if TYPE_CHECKING:
    from rich.console import Console

    from snapchain.destination.protocol import Destination
    from snapchain.destination.reading import PointLeaves
    from snapchain.ops.diff import DiffReport

_SHOWN = 20


@verb(
    examples="""
    snapchain diff /backup::web1/vda@6 /backup::web1/vda@7
    snapchain diff /backup::web1/vda /images/web1.qcow2
    snapchain diff ssh://root@kvm2/srv/replica::web1/vda /backup::web1/vda
    snapchain diff /backup::web1/vda@before-upgrade /backup::web1/vda --json
    """,
    when_interrupted="nothing was being changed",
)
@options.takes_output(passphrase=True, dry_run=False, progress=False)
def diff(
    old: Annotated[str, options.address(metavar="ADDRESS", help="The one side: DEST::DISK[@POINT], or an image.")],
    new: Annotated[str, options.address(metavar="ADDRESS", help="The other side.")],
    *,
    image_format: options.Format = None,
    image_dir: options.ImageDir = None,
    out: Output,
) -> None:
    """List the ranges of guest bytes that differ between two points, two images, or a point and an image.

    Points of a repository answer from their records, without reading data; images and points of replicas are read
    where they may differ.
    """
    from snapchain.destination.address import ImageAddress, parse_address
    from snapchain.ops import diff as ops

    with ExitStack() as stack:
        sides: list[PointLeaves] = []
        opened: dict[str, Destination] = {}
        for address in (parse_address(old), parse_address(new)):
            if isinstance(address, ImageAddress):
                side = ops.image_side(
                    address.path,
                    format=options.format_of(image_format),
                    image_dirs=options.image_dirs(image_dir),
                    on_event=out.on_event,
                )
                sides.append(stack.enter_context(side))
                continue
            if address.dest not in opened:
                opened[address.dest] = options.destination(address.dest, out)
            point = opened[address.dest].leaves(address.disk, address.point, on_event=out.on_event)
            sides.append(stack.enter_context(point))
        out.show(ops.diff(*sides), _draw)


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
