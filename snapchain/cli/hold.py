"""`snapchain hold ADDRESS --tag TAG`: keep a layer's file, or a point, until it is released."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from snapchain.cli import options, render
from snapchain.cli.app import verb
from snapchain.cli.output import Output
from snapchain.cli.progress import Mode
from snapchain.cli.quantities import heading, moment

if TYPE_CHECKING:
    from rich.console import Console

    from snapchain.ops.hold import HoldReport


@verb(
    examples="""
    snapchain hold /images/web1.2.qcow2 --tag audit --reason "until the auditors are done"
    snapchain hold /backup::web1/vda@7 --tag legal
    snapchain hold s3://bucket/prefix::web1/vda@before-upgrade --tag upgrade
    snapchain hold ssh://root@kvm2/srv/replica::web1/vda@7 --tag legal
    """,
    when_interrupted="it is held or it is not; run it again to be sure",
)
def hold(
    target: Annotated[
        str, options.address(metavar="ADDRESS", help="The file of a layer, or DEST::DISK@POINT at a destination.")
    ],
    *,
    tag: Annotated[str, typer.Option("--tag", "-t", metavar="TAG", help="Names the hold, to be released by.")],
    reason: Annotated[str, typer.Option("--reason", metavar="TEXT", help="Why, for who finds it later.")] = "",
    password_file: options.PasswordFile = None,
    password_command: options.PasswordCommand = None,
    dry_run: options.DryRun = False,
    json: options.Json = False,
    progress: options.Progress = Mode.AUTO,
    quiet: options.Quiet = False,
) -> None:
    """Keep a layer of an image, or a point of a disk, until it is released under the same tag.

    A held file stays byte for byte as it is: a merge by rules goes round it, and a merge that names it is refused.
    A held point is kept by every merge of its disk, and counts for the rules like any other. The holds
    of a point are part of the destination; the hold of a file is noted in a small hidden file beside it, and follows a
    rename.

    Several holds, each under its own tag, may be on one file or point: it is free when the last is released.
    `snapchain inspect` shows those of an image's layers, `snapchain log` those of points.
    """
    from snapchain.destination.address import ImageAddress, parse_address
    from snapchain.ops import hold as ops

    address = parse_address(target)
    with Output(as_json=json, dry_run=dry_run, progress=progress, quiet=quiet) as out:
        if isinstance(address, ImageAddress):
            report = ops.hold_image(address.path, tag, reason=reason, dry_run=dry_run)
        else:
            place = options.destination(
                address.dest,
                out,
                password_file=password_file,
                password_command=password_command,
                writing=not dry_run,
            )
            report = ops.hold_point(
                place,
                address.disk,
                tag,
                point=address.point,
                reason=reason,
                dry_run=dry_run,
                on_event=out.on_event,
            )
        if not out.plan(report, draw_plan):
            out.report(report, draw)


def draw_plan(console: Console, report: HoldReport) -> None:
    """What would be held, for both verbs."""
    _draw(console, report, "would be held" if report.holds else "would not be held any more")


def draw(console: Console, report: HoldReport) -> None:
    """What is held now, for both verbs."""
    _draw(console, report, "is held" if report.holds else "is not held any more")


def _draw(console: Console, report: HoldReport, words: str) -> None:
    render.headline(console, f"{render.place(report.address)} {words}")
    render.table(
        console,
        ["tag", heading("since"), "reason~"],
        [(each.tag, moment(each.since), each.reason) for each in report.holds],
    )
