"""`snapchain log DEST[::DISK]`: which points there are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from snapchain.cli import options, quantities, render
from snapchain.cli.app import verb
from snapchain.cli.moments import heading, moment
from snapchain.cli.output import Output

if TYPE_CHECKING:
    from rich.console import Console

    from snapchain.ops.log import LogReport


@verb(
    examples="""
    snapchain log /backup
    snapchain log s3://bucket/prefix::web1/vda
    snapchain log ssh://root@kvm2/srv/replica
    snapchain log /backup --json | jq '.disks[].points[-1].time'
    """,
    when_interrupted="nothing was being changed",
)
def log(
    target: Annotated[str, typer.Argument(metavar="DEST[::DISK]", help="A destination, or one disk of it.")],
    *,
    password_file: options.PasswordFile = None,
    password_command: options.PasswordCommand = None,
    json: options.Json = False,
) -> None:
    """List the points of all disks of a destination, or of one: number, time, labels, size, layers.

    DEST is a repository, or a replica: ssh://[user@]host/path or dir:/path. Points of one content id have the same
    bytes.
    """
    from snapchain.ops.address import parse_destination

    address = parse_destination(target)
    with Output(as_json=json) as out:
        place = options.destination(address.dest, out, password_file=password_file, password_command=password_command)
        out.show(place.log(options.disk_of(address)), _draw)


def _draw(console: Console, report: LogReport) -> None:
    if not report.disks:
        render.headline(console, "no disk is here yet")
    for disk in report.disks:
        render.headline(console, disk.name)
        render.table(
            console,
            ["point>", heading("time"), "size>", "layers>", "content?", "labels", "held"],
            [
                (
                    str(point.point),
                    moment(point.time),
                    quantities.size(point.virtual_size),
                    str(point.layers),
                    point.content_id[:12],
                    ", ".join(point.labels),
                    ", ".join(hold.tag for hold in point.holds),
                )
                for point in disk.points
            ],
        )
        future = [str(point.point) for point in disk.points if point.of_the_future]
        render.points_of_the_future(console, disk.name, future)
