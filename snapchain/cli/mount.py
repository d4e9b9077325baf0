"""`snapchain mount DEST[::DISK] DIR`: show every point of a destination as a raw file, by FUSE."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from snapchain.cli import options, quantities, render
from snapchain.cli.app import verb
from snapchain.cli.output import Output
from snapchain.cli.quantities import duration, size
from snapchain.errors import PartialFailure
from snapchain.host.terminal import counted

if TYPE_CHECKING:
    from rich.console import Console

    from snapchain.ops.mount.run import MountPlan, MountReport


@verb(
    examples="""
    snapchain mount /backup /mnt/points
    snapchain mount s3://bucket/prefix::web1 /mnt/points --cache-size 1G
    cp --sparse=always /mnt/points/web1/vda/latest.raw web1.raw
    qemu-img compare -f raw /mnt/points/web1/vda/7.raw web1.raw
    mount -o loop,ro,noload /mnt/points/web1/vdb/7.raw /mnt/vdb
    fusermount3 -u /mnt/points
    """,
    when_interrupted="nothing is left: start it again",
)
@options.takes_output(passphrase=True)
def mount(
    source: Annotated[
        str, options.address(metavar="DEST[::DISK|GUEST]", help="A destination, or one disk or guest of it.")
    ],
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", readable=False, help="An empty directory, where the files appear.")
    ],
    *,
    allow_other: Annotated[
        bool,
        typer.Option(
            "--allow-other",
            help="Let all users of this host read the files. By default only the user who mounts them can, not even "
            "root. If that user is not root, /etc/fuse.conf must have the line user_allow_other.",
        ),
    ] = False,
    cache_size: Annotated[
        str,
        typer.Option("--cache-size", metavar="BYTES", help="Keep so many unpacked bytes in memory, for all files."),
    ] = "256M",
    patience: Annotated[
        str,
        typer.Option(
            "--patience",
            metavar="TIME",
            help="How long a read waits for a store that does not answer, before it fails with an I/O error.",
        ),
    ] = "2min",
    limit_rate: options.LimitRate = None,
    out: Output,
) -> None:
    """Show every point of a destination as a raw file in DIR, read-only, by FUSE.

    A point has its number: web1/vda/7.raw. latest.raw is a link to the newest point of a disk, and the folder by-time
    has a link for each time, in UTC: by-time/2026-11-30T01.00.00Z.raw. The time of a file is that of its point. Any
    program can read the files: cp, cmp, dd, qemu-img, losetup, several at once.

    The files are there until Ctrl-C, SIGTERM, or `fusermount3 -u DIR`, which end the command with exit code 0. A file
    is opened at the destination while a program has it open; as long, gc keeps what it needs. Points that are shipped
    meanwhile appear some seconds later.

    Each byte of a repository is proven before a program gets it. Bytes that are lost are an I/O error for that range,
    and a note here. While a store does not answer, reads wait for --patience.

    A replica must be on this host: dir:/path. Its bytes are those of its files, and are not proven.

    This needs libfuse, and the extra `mount` of the Python package.
    """
    from snapchain.destination.address import parse_destination
    from snapchain.ops.mount.run import Mounting, MountRequest

    address = parse_destination(source)
    request = MountRequest(
        directory=directory,
        disk=options.disk_of(address),
        cache=quantities.parse_size(cache_size),
        patience=options.seconds(patience, "--patience"),
        for_others=allow_other,
    )
    work = Mounting(options.destination(address.dest, out, limit_rate=limit_rate), request)
    if out.dry_run:
        out.plan(work.plan(), _draw_plan)
        return
    report = work.run(lambda plan: out.row(plan, _draw_ready), on_event=out.on_event)
    status = PartialFailure.exit_code if report.failed_reads else 0
    out.report(report, _draw_report, problems=_draw_problems, status=status)


def _draw_plan(console: Console, plan: MountPlan) -> None:
    render.headline(console, f"would show {_files(plan)}")
    for words in plan.left_out:
        render.line(console, words)


def _draw_ready(console: Console, plan: MountPlan) -> None:
    render.headline(console, f"mounted {_files(plan)}")


def _files(plan: MountPlan) -> str:
    return f"{counted(plan.points, 'point')} of {counted(plan.disks, 'disk')} in {plan.directory}"


def _draw_report(console: Console, report: MountReport) -> None:
    words = f"{counted(report.opened, 'file')} opened, {counted(report.reads, 'read')}, {size(report.bytes_read)} read"
    render.headline(console, f"unmounted after {duration(report.seconds)}: {words}")
    _draw_problems(console, report)


def _draw_problems(console: Console, report: MountReport) -> None:
    if report.failed_reads:
        render.line(console, f"{counted(report.failed_reads, 'read')} failed: the notes say why", style="red")
