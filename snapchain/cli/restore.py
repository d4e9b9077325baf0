"""`snapchain restore DEST::DISK[@POINT] OUT`: write a point to a new file or device, or as a whole chain."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from snapchain.cli import options, render
from snapchain.cli.app import verb
from snapchain.cli.output import Output
from snapchain.cli.quantities import moment, size

if TYPE_CHECKING:
    from rich.console import Console

    from snapchain.ops.restore.target import RestorePlan, RestoreReport


@verb(
    examples="""
    snapchain restore /backup::web1/vda /images/web1.qcow2
    snapchain restore /backup::web1/vda@7 old.raw
    snapchain restore s3://bucket/prefix::web1/vda@before-upgrade web1.qcow2
    snapchain restore ssh://root@kvm2/srv/replica::web1/vda web1.qcow2
    snapchain restore /backup::web1/vda@2026-11-30 /dev/vg0/web1 --format raw
    snapchain restore /backup::web1/vda@latest /images/web1.qcow2 --chain
    """,
    when_interrupted="OUT was not made (a block device holds a part of the point); run it again: what was written of a "
    "file, if it is much, is continued",
)
@options.takes_output(passphrase=True)
def restore(
    source: Annotated[
        str,
        options.address(
            metavar="DEST::DISK[@POINT]",
            help="The disk and the point: latest (default), a number, a label, or a time. A time means the newest "
            "point not after it; a date such as 2026-11-30, or yesterday, means the end of that day here.",
        ),
    ],
    out_path: Annotated[Path, typer.Argument(readable=False, metavar="OUT", help="A new file, or a block device.")],
    *,
    chain: Annotated[
        bool,
        typer.Option(
            "--chain", help="Restore every layer as a file of its own: OUT is the top, the others lie beside it."
        ),
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Replace OUT if it exists, or overwrite a device that is not empty.")
    ] = False,
    image_format: Annotated[
        str | None,
        typer.Option(
            "--format",
            "-f",
            metavar="qcow2|raw",
            autocompletion=options.of("qcow2", "raw"),
            help="Format of OUT. By default by its suffix.",
        ),
    ] = None,
    connections: options.Connections = 1,
    limit_rate: options.LimitRate = None,
    out: Output,
) -> None:
    """Write a point to a new file or a block device, or as a whole chain.

    The output is read back, and must have the content id of the point. A file gets its name only when it is complete.

    --force replaces an existing file, but never one that a program has open or that another image depends on. The new
    file gets the owner, the mode, the ACL and the security label of the old one, and a symbolic link stays a link.
    --force is also needed for a block device that is not empty. The zeroes of the point are written to a device too.

    DEST is a repository, or a replica: ssh://[user@]host/path or dir:/path. Run an interrupted restore again: it
    continues with its partial output, which is read back like the rest.
    """
    from snapchain.destination.address import parse_point_address
    from snapchain.ops.restore.run import Restoration

    address = parse_point_address(source)
    place = options.destination(
        address.dest,
        out,
        limit_rate=limit_rate,
        connections=connections,
    )
    work = Restoration(
        place,
        address.disk,
        out_path,
        point=address.point,
        format=options.format_of(image_format),
        whole_chain=chain,
        force=force,
    )
    if out.dry_run:
        out.plan(work.plan(), _draw_plan)
    else:
        out.report(work.run(on_event=out.on_event), _draw_report)


def _draw_plan(console: Console, plan: RestorePlan) -> None:
    what = "replace" if plan.replaces else "make"
    time = moment(datetime.fromisoformat(plan.time), zone=True)
    render.headline(console, f"would restore {plan.disk}, point {plan.point} of {time}, and {what} {plan.output}")
    render.facts(console, [("to write", size(plan.bytes_to_write)), ("content", plan.content_id)])
    render.table(
        console,
        ["file", "format", "virtual size>", "data>", "on"],
        [
            (file.path, file.format, size(file.virtual_size), size(file.data_bytes), file.backing or "")
            for file in plan.files
        ],
    )


def _draw_report(console: Console, report: RestoreReport) -> None:
    render.headline(console, f"restored {report.disk}, point {report.point}, to {report.output}")
    lower = ", ".join(report.files[:-1])
    render.facts(
        console, [("written", size(report.bytes_written)), ("content", report.content_id), ("on top of", lower)]
    )
