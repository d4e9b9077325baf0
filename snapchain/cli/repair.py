"""`snapchain repair DEST`: store again what a repository has lost, from where it still is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from snapchain.cli import options, quantities, render, sources
from snapchain.cli.app import verb
from snapchain.cli.output import Output
from snapchain.errors import Corrupt
from snapchain.host.terminal import counted, named

if TYPE_CHECKING:
    from rich.console import Console

    from snapchain.destination.reading import ReadableDestination
    from snapchain.destination.records import LostRange, RepairPlan, RepairReport

_SHOWN = 20


@verb(
    examples="""
    snapchain repair /backup --dry-run
    snapchain repair /backup --from /images/web1.qcow2
    snapchain repair /backup --from /second::web1/vda --from /images/web2.qcow2
    snapchain repair s3://bucket/prefix --read-data --from ssh://root@kvm2/srv/replica::web1/vda
    """,
    when_interrupted="every point is as good as before; run it again to finish",
)
@options.takes_output(passphrase=True)
def repair(
    target: Annotated[str, options.address(metavar="DEST", help="A repository.")],
    *,
    places: Annotated[
        list[str] | None,
        typer.Option(
            "--from",
            metavar="ADDRESS",
            help="Take lost data from this image, or from this disk of another repository or replica; repeatable.",
        ),
    ] = None,
    read_data: Annotated[
        bool, typer.Option("--read-data", help="Read all data first, to find damage that nobody has met yet.")
    ] = False,
    source_password_file: sources.PasswordFile = None,
    source_password_command: sources.PasswordCommand = None,
    image_format: options.Format = None,
    image_dir: options.ImageDir = None,
    limit_rate: options.LimitRate = None,
    out: Output,
) -> None:
    """Find what a repository has lost, store again what the sources still have, and report what stays lost.

    Looked at are all records, whether every pack is there, and the damage that verify, restore and ship have recorded.
    The report names the points and guest ranges that are damaged.

    Content decides, not names: a source is looked through for the hashes of the lost data. An image is looked through
    with all files below it; DEST::DISK means all points of the disk, DEST::DISK@POINT one of them. The repositories
    that are named by --from are opened with the passphrase of DEST, unless an option or SNAPCHAIN_SOURCE_PASSWORD gives
    another one for all of them. When the record or the map of a layer is lost, an image or a point of another
    repository can replace it that shows the same content.

    Repaired ranges are read again as a proof. No point is ever dropped. While data is lost, repair ends with exit
    code 5.
    """
    from snapchain.ops import repair as ops

    opened: dict[str, ReadableDestination] = {}

    def open_destination(dest: str) -> ReadableDestination:
        if dest not in opened:
            secret = sources.passphrase(source_password_file, source_password_command, out, dest)
            opened[dest] = sources.opened(dest, out, passphrase=secret)
        return opened[dest]

    place = options.destination(target, out, writing=not out.dry_run, limit_rate=limit_rate)
    with ops.opened_sources(
        places or (),
        open_destination,
        format=options.format_of(image_format),
        image_dirs=options.image_dirs(image_dir),
        on_event=out.on_event,
    ) as found:
        work = place.repairing(found, read_data=read_data)
        if out.dry_run:
            plan = work.plan()
            status = Corrupt.exit_code if plan.lost or plan.findings else 0
            out.plan(plan, _draw_plan, problems=_draw_problems, status=status)
            return
        report = work.run(on_event=out.on_event)
    out.report(report, _draw_report, problems=_draw_problems, status=0 if report.ok else Corrupt.exit_code)


def _draw_problems(console: Console, done: RepairPlan | RepairReport) -> None:
    _draw_ranges(console, "lost", done.lost)
    if done.lost:
        words = "more images, repositories and replicas may have it: name them by --from. `forget` drops such points"
        render.line(console, words, indent=2)
    render.findings(console, done.findings)


def _draw_plan(console: Console, plan: RepairPlan) -> None:
    if not plan.damaged:
        render.headline(console, "nothing is lost, as far as is known")
    else:
        render.headline(console, f"would repair {render.place(plan.destination)}")
    render.facts(console, _facts(plan))
    _draw_ranges(console, "damaged", tuple(each for each in plan.damaged if each not in plan.lost))
    _draw_problems(console, plan)


def _draw_report(console: Console, report: RepairReport) -> None:
    if not report.damaged:
        render.headline(console, "nothing is lost, as far as is known")
    else:
        render.headline(
            console, f"{'repaired' if report.ok else 'data stays lost in'} {render.place(report.destination)}"
        )
    stored = f"{quantities.size(report.bytes_stored)} in {counted(report.blobs_stored, 'blob')}"
    changed = counted(report.layers_replaced, "layer") if report.layers_replaced else ""
    render.facts(console, [*_facts(report), ("stored", stored if report.blobs_stored else ""), ("replaced", changed)])
    _draw_problems(console, report)


def _facts(done: RepairPlan | RepairReport) -> list[tuple[str, str]]:
    return [("damaged", _summary(done.damaged)), ("lost", _summary(done.lost) if done.damaged else "")]


def _summary(ranges: tuple[LostRange, ...]) -> str:
    if not ranges:
        return "nothing"
    points = len({(each.disk, point) for each in ranges for point in each.points})
    disks = len({each.disk for each in ranges})
    return f"{counted(len(ranges), 'range')} of {counted(points, 'point')} of {counted(disks, 'disk')}"


def _draw_ranges(console: Console, word: str, ranges: tuple[LostRange, ...]) -> None:
    for each in ranges[:_SHOWN]:
        points = named("point", each.points)
        where = f"guest bytes {each.offset} to {each.offset + each.length}"
        render.line(console, f"{word}: {each.disk}, {points}: {where}: {each.subject}", indent=2)
    if len(ranges) > _SHOWN:
        render.line(console, f"{len(ranges) - _SHOWN} more ranges; --json lists all", indent=2)
