"""`snapchain log DEST[::DISK|::GUEST]`: list the points of a destination."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from snapchain.cli import options, quantities, render
from snapchain.cli.app import verb
from snapchain.cli.output import Output
from snapchain.cli.quantities import heading, moment
from snapchain.host.terminal import counted, shell_word

if TYPE_CHECKING:
    from rich.console import Console

    from snapchain.destination.records import DiskRecord
    from snapchain.destination.summary import DiskSummary
    from snapchain.ops.log import GuestRow, LogReport

_MOST = 40
"""Points that are listed one by one, unless one disk or all points are asked for."""


@verb(
    examples="""
    snapchain log /backup
    snapchain log /backup --all
    snapchain log s3://bucket/prefix::web1/vda
    snapchain log /backup::web1
    snapchain log ssh://root@kvm2/srv/replica
    snapchain log /backup --accept-repository 5c1d3f0c7a2b4e6d8f9a0b1c2d3e4f50
    snapchain log /backup --json | jq '.disks[].points[-1].time'
    """,
    when_interrupted="nothing was being changed",
)
@options.takes_output(passphrase=True, dry_run=False, progress=False)
def log(
    target: Annotated[
        str, options.address(metavar="DEST[::DISK|::GUEST]", help="A destination, or one disk or guest of it.")
    ],
    *,
    all_points: Annotated[
        bool, typer.Option("--all", help="List all points of all disks, however many there are.")
    ] = False,
    accept_repository: Annotated[
        str | None,
        typer.Option(
            "--accept-repository",
            metavar="ID",
            help="Accept the repository with this id, although this machine knows "
            "another one, or a newer state, at DEST.",
        ),
    ] = None,
    out: Output,
) -> None:
    """List the points of a destination, or of one disk or guest: number, time, labels, size, layers.

    A guest point is a point of each disk of a guest, taken at one instant. Its consistency is what a restore must
    expect: offline, application, filesystem, or crash, as after a power cut.

    Where a whole destination has more than 40 points, each disk is one line with its newest point, unless you say
    --all. With --json all points are listed.

    DEST is a repository, or a replica: ssh://[user@]host/path or dir:/path. Points with the same content id have the
    same bytes.

    A machine remembers which repository it has used at an address, and how far each disk was. When another repository
    or an older state is there, every command stops with exit code 5. If you know why (the disk was replaced, a copy of
    the repository was put back), accept it once with --accept-repository and the id that the error shows. From then on
    this machine knows that state. Two repositories that are used in turn need an address each.
    """
    from snapchain.destination.address import parse_destination
    from snapchain.ops.log import log as run

    address = parse_destination(target)
    place = options.destination(
        address.dest,
        out,
        accept=accept_repository,
    )
    disk = options.disk_of(address)
    if disk is None and not all_points and not out.as_json:
        disks = place.summaries()
        if sum(each.points for each in disks) > _MOST and not any(each.trouble for each in disks):
            out.show(disks, partial(_draw_short, place=address.dest))
            return
    out.show(run(place, disk), _draw)


def _draw_short(console: Console, disks: Sequence[DiskSummary], *, place: str) -> None:
    from snapchain.destination.guest_record import guest_of
    from snapchain.model.freshness import newest_of

    now = datetime.now(UTC)
    rows = []
    future: list[tuple[str, list[int]]] = []
    for disk in disks:
        record_of = guest_of(disk.name)
        newest, later = newest_of(disk.newest, now)
        rows.append(
            [
                disk.name if record_of is None else f"{record_of} (guest points)",
                str(disk.points),
                "" if newest is None else str(newest.point),
                "" if newest is None else moment(newest.time),
                "" if newest is None or record_of is not None else quantities.size(newest.virtual_size),
            ]
        )
        future += [(disk.name, [each.point for each in later])] if later else []
    render.table(console, ["disk", "points>", "newest>", heading("time"), "size>?"], rows)
    for name, points in future:
        render.points_of_the_future(console, name, points)
    words = f"{counted(sum(each.points for each in disks), 'point')} of {counted(len(disks), 'disk')}"
    render.line(console, f"{words}. To list the points of one disk: snapchain log {shell_word(place)}::DISK")
    render.line(console, f"To list all of them: snapchain log {shell_word(place)} --all")


def _draw(console: Console, report: LogReport) -> None:
    if not report.disks:
        render.headline(console, "no disk is here yet")
    of_guests = {name for guest in report.guests for name in (*guest.disks, guest.record_disk)}
    for disk in report.disks:
        if disk.name not in of_guests:
            _draw_disk(console, disk)
    for guest in report.guests:
        _draw_guest(console, guest)
        if report.guest is None:
            for disk in report.disks:
                if disk.name in guest.disks:
                    _draw_disk(console, disk)


def _draw_disk(console: Console, disk: DiskRecord) -> None:
    with_consistency = any(point.consistency for point in disk.points)
    render.headline(console, disk.name)
    render.table(
        console,
        [
            "point>", heading("time"), "size>", "layers>", "content?", "labels", "held",
            *(["consistency?"] if with_consistency else []),
        ],
        [
            (
                str(point.point),
                moment(point.time),
                quantities.size(point.virtual_size),
                str(point.layers),
                point.content_id[:12],
                ", ".join(point.labels),
                ", ".join(hold.tag for hold in point.holds),
                *([point.consistency or ""] if with_consistency else []),
            )
            for point in disk.points
        ],
    )  # fmt: skip
    future = [point.point for point in disk.points if point.of_the_future]
    render.points_of_the_future(console, disk.name, future)


def _draw_guest(console: Console, guest: GuestRow) -> None:
    render.headline(console, f"guest {guest.name}")
    render.table(
        console,
        ["guest point>", heading("time"), "consistency", "disks>", "size>", "labels", "held"],
        [
            (
                str(point.point),
                moment(point.time),
                point.consistency or "",
                str(len(point.disks)),
                quantities.size(point.virtual_size),
                ", ".join(point.labels),
                ", ".join(hold.tag for hold in point.holds),
            )
            for point in guest.points
        ],
    )
    for torn in guest.leftovers:
        points = ", ".join(f"{name}@{number}" for name, number in torn.disks.items())
        render.line(console, f"no guest point was published for {points}: its run was interrupted")
    render.points_of_the_future(console, guest.name, [each.point for each in guest.points if each.of_the_future])
