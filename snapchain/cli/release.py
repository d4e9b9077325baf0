"""`snapchain release ADDRESS --tag TAG`: remove a hold."""

from __future__ import annotations

from typing import Annotated

import typer

from snapchain.cli import options
from snapchain.cli.app import verb
from snapchain.cli.hold import draw, draw_plan
from snapchain.cli.output import Output
from snapchain.cli.progress import Mode


@verb(
    examples="""
    snapchain release /images/web1.2.qcow2 --tag audit
    snapchain release /backup::web1/vda@7 --tag legal
    """,
    when_interrupted="it is released or it is not; run it again to be sure",
)
def release(
    target: Annotated[
        str, options.address(metavar="ADDRESS", help="The file of a layer, or DEST::DISK@POINT at a destination.")
    ],
    *,
    tag: Annotated[str, typer.Option("--tag", "-t", metavar="TAG", help="The hold to take off.")],
    password_file: options.PasswordFile = None,
    password_command: options.PasswordCommand = None,
    dry_run: options.DryRun = False,
    json: options.Json = False,
    progress: options.Progress = Mode.AUTO,
    quiet: options.Quiet = False,
) -> None:
    """Take a hold off a layer of an image, or off a point of a disk; it stays while it has others.

    Nothing is dropped now: the next merge may take it. The holds of a file that is gone are released by its old path.
    """
    from snapchain.destination.address import ImageAddress, parse_address
    from snapchain.ops import hold as ops

    address = parse_address(target)
    with Output(as_json=json, dry_run=dry_run, progress=progress, quiet=quiet) as out:
        if isinstance(address, ImageAddress):
            report = ops.release_image(address.path, tag, dry_run=dry_run)
        else:
            place = options.destination(
                address.dest,
                out,
                password_file=password_file,
                password_command=password_command,
                writing=not dry_run,
            )
            report = ops.release_point(
                place, address.disk, tag, point=address.point, dry_run=dry_run, on_event=out.on_event
            )
        if not out.plan(report, draw_plan):
            out.report(report, draw)
