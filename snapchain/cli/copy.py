"""`snapchain copy SRC DEST [DISK...]`: copy the points that another repository lacks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from snapchain.cli import options, render, sources
from snapchain.cli.app import verb
from snapchain.cli.output import Output
from snapchain.cli.quantities import heading, moment, size
from snapchain.errors import InvalidInput, PartialFailure
from snapchain.host.terminal import counted, numbered

if TYPE_CHECKING:
    from rich.console import Console

    from snapchain.ops.copy.request import CopyPlan, CopyReport, DiskPlan, DiskReport


@verb(
    examples="""
    snapchain copy /backup s3://offsite/web
    snapchain copy /backup s3://offsite/web web1 'db*' --newest
    snapchain copy s3://old/prefix s3://new/prefix --source-profile old --dry-run
    snapchain copy ssh://root@kvm2/srv/replica /backup --since 2026-11-01
    SNAPCHAIN_SOURCE_PASSWORD=... snapchain copy /backup /mnt/second --limit-rate 20M
    """,
    when_interrupted="the points that were published stay; run it again to copy the others",
)
@options.takes_output(passphrase=True)
def copy(
    source: Annotated[str, options.address(metavar="SRC", help="A repository or replica to read.")],
    dest: Annotated[str, options.address(metavar="DEST", help="A repository, made by `snapchain init`.")],
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="DISK|GUEST", help="Names and patterns, such as 'web*'. By default all disks."),
    ] = None,
    *,
    newest: Annotated[
        bool, typer.Option("--newest", help="Copy the newest point of each disk, and the newest guest points.")
    ] = False,
    since: Annotated[
        str | None,
        typer.Option("--since", metavar="POINT", help="Copy this point of each disk and those after it."),
    ] = None,
    newer: Annotated[
        bool, typer.Option("--newer", help="Copy only points after the newest one that DEST has of the disk.")
    ] = False,
    source_password_file: sources.PasswordFile = None,
    source_password_command: sources.PasswordCommand = None,
    source_endpoint: Annotated[
        str | None,
        typer.Option("--source-endpoint", metavar="URL", help="The S3 server of SRC.", rich_help_panel=sources.PANEL),
    ] = None,
    source_profile: Annotated[
        str | None,
        typer.Option(
            "--source-profile",
            metavar="NAME",
            help="The profile in ~/.aws with the credentials of SRC.",
            rich_help_panel=sources.PANEL,
        ),
    ] = None,
    limit_rate: options.LimitRate = None,
    pack_size: options.PackSize = None,
    out: Output,
) -> None:
    """Copy the points that DEST lacks: to a second site, or to another bucket.

    Points keep their number, time, labels and holds. DEST may have another passphrase, cipher and block size. Data that
    DEST has already is not stored again. A point is published when its content id, computed from what was written,
    equals that of SRC. No point of SRC is changed.

    Guest points are copied whole: the points of all disks, then the record with the definition. A copy is no other
    destination of the guest: a failover at SRC does not ask DEST. A failover at DEST asks SRC first.

    A point that is damaged in SRC is left out and named, and the others are copied. Then the exit code is 10.

    A point that was dropped at DEST is copied again as long as SRC has it. --newer leaves it out: use that where DEST
    keeps fewer points than SRC.

    The passphrase of SRC is that of DEST, unless an option or SNAPCHAIN_SOURCE_PASSWORD gives another one. An empty
    SNAPCHAIN_SOURCE_PASSWORD is for a source without encryption.
    """
    from snapchain.destinations import traits_of
    from snapchain.ops.copy.plan import plan
    from snapchain.ops.copy.request import CopyRequest
    from snapchain.ops.copy.run import run

    request = CopyRequest(names=tuple(names or ()), newest=newest, since=since, newer=newer)
    request.check()
    for address in (source, dest):
        _check_destination(address)
    traits = traits_of(source)
    if not traits.encrypts and (source_password_file is not None or source_password_command is not None):
        raise InvalidInput(f"a {traits.kind} is not encrypted, and has no passphrase", subject=source)
    opened = sources.opened(
        source,
        out,
        passphrase=sources.passphrase(source_password_file, source_password_command, out, source),
        endpoint=source_endpoint,
        profile=source_profile,
        limit_rate=limit_rate,
    )
    to = options.destination(dest, out, writing=not out.dry_run, limit_rate=limit_rate, pack_size_text=pack_size)
    if out.dry_run:
        planned = plan(request, opened, to)
        out.plan(planned, _draw_plan, problems=_draw_problems, status=_status(planned))
        return
    report = run(request, opened, to, on_event=out.on_event)
    out.report(report, _draw_report, problems=_draw_problems, status=_status(report))


def _check_destination(text: str) -> None:
    from snapchain.destination.address import PointAddress, parse_destination

    address = parse_destination(text)
    if isinstance(address, PointAddress):
        raise InvalidInput(
            "a whole destination is wanted here",
            subject=text,
            hint=f"name the disk at the end: snapchain copy SRC DEST {address.disk}",
        )


def _status(done: CopyPlan | CopyReport) -> int:
    return 0 if done.ok else PartialFailure.exit_code


def _draw_plan(console: Console, plan: CopyPlan) -> None:
    words = f"would copy {counted(plan.points, 'point')} to {render.place(plan.destination)}"
    render.headline(console, f"{words}, at most {size(plan.data_bytes)} to read")
    render.table(
        console,
        ["disk", "point>", heading("time"), "read>", "labels"],
        [
            (disk.disk, str(point.point), moment(point.time), size(point.data_bytes), ", ".join(point.labels))
            for disk in plan.disks
            for point in disk.points
        ],
    )
    _draw_problems(console, plan)


def _draw_report(console: Console, report: CopyReport) -> None:
    render.headline(console, f"copied {counted(report.points, 'point')} to {render.place(report.destination)}")
    present = sum(each.present for each in report.disks)
    facts = [("read", size(report.bytes_read)), ("stored", size(report.bytes_stored))]
    render.facts(console, [*facts, ("there already", counted(present, "point") if present else "")])
    render.table(
        console,
        ["disk", "points", "read>", "stored>"],
        [
            (each.disk, _numbers(each), size(each.bytes_read), size(each.bytes_stored))
            for each in report.disks
            if each.points
        ],
    )
    _draw_problems(console, report)


def _numbers(disk: DiskReport) -> str:
    """The numbers in the source, and those at the destination where they are others."""
    if all(each.point == each.point_there for each in disk.points):
        return numbered([each.point for each in disk.points])
    return ", ".join(f"{each.point} as {each.point_there}" for each in disk.points)


def _draw_problems(console: Console, done: CopyPlan | CopyReport) -> None:
    disks: tuple[DiskPlan, ...] | tuple[DiskReport, ...] = done.disks
    for disk in disks:
        if disk.failed is not None:
            render.line(console, f"{disk.disk}: not copied: {disk.failed}", style="red")
        for point in disk.refused:
            render.line(console, f"{disk.disk}@{point.point}: not copied: {point.message}", style="red")
