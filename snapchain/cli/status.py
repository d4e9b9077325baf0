"""`snapchain status DEST[::NAME]...`: show how disks and guests stand: newest points, their age, what is wrong."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from snapchain.cli import options, quantities, render
from snapchain.cli.app import verb
from snapchain.cli.output import Output
from snapchain.cli.quantities import heading, moment, size
from snapchain.errors import InvalidInput, PartialFailure, SnapchainError
from snapchain.host.terminal import counted, numbered, printable_lines

if TYPE_CHECKING:
    from rich.console import Console

    from snapchain.model.guest_checks import GuestCheck
    from snapchain.ops.guest_status import GuestStatus
    from snapchain.ops.instant.status import InstantStatusReport
    from snapchain.ops.status import DiskStatus, StatusReport, Wanted


@verb(
    examples="""
    snapchain status /backup
    snapchain status /backup s3://bucket/prefix --max-age 26h
    snapchain status /backup --match 'web*' --json | jq -r '.disks[] | select(.late) | .disk'
    snapchain status ssh://root@kvm2/srv/replica::web1 /backup::web1
    snapchain status /backup --max-age 26h --nagios
    snapchain status /backup --metrics /var/lib/node_exporter/backup.prom
    snapchain status /images/web1.qcow2
    snapchain status /backup --json | jq -r '.guests[] | select(.owed != []) | .guest'
    """,
    when_interrupted="nothing was being changed",
)
@options.takes_output(passphrase=True, dry_run=False, progress=False)
def status(
    places: Annotated[
        list[str],
        options.address(
            metavar="DEST[::DISK|::GUEST]|IMAGE...",
            help="Destinations, or single disks and guests of them; or images of instant restores, or their directory.",
        ),
    ],
    *,
    match: Annotated[
        list[str] | None,
        typer.Option(
            "--match", metavar="PATTERN", help="Only disks and guests whose name fits, such as 'web*'. May be repeated."
        ),
    ] = None,
    max_age: Annotated[
        str | None,
        typer.Option(
            "--max-age", metavar="TIME", help="Mark disks whose newest point is older than TIME, such as 26h or 2d."
        ),
    ] = None,
    disks_only: Annotated[bool, typer.Option("--disks-only", help="Leave out how guests stand.")] = False,
    nagios: Annotated[
        bool, typer.Option("--nagios", help="Print one line, with the exit code of a Nagios plugin.")
    ] = False,
    metrics: Annotated[
        str | None,
        typer.Option(
            "--metrics", metavar="FILE", help="Write metrics for Prometheus to FILE, or to stdout for a single '-'."
        ),
    ] = None,
    out: Output,
) -> None:
    """Show how the disks and guests of destinations stand.

    For each disk: its newest point and how old that is, the number of points, the virtual size, when all its data was
    last read and found good, and what is wrong. A point of the future is reported, and never counts as the newest. A
    disk that cannot be read is a line with the reason.

    For each guest: its state, the host that may run it, and the epoch; the lease that it runs under; its newest guest
    point, how old that is, and about how much the guest wrote since; when it was last verified, and when a clone of it
    last booted. A line `owed` says what is left to be done, such as after a failover.

    The guest's other destinations are asked, too, but not for --nagios and --metrics: one of them may have a newer
    master. How guests stand does not change the exit code.

    An image that `restore --instant` made: how much of its point it has, how long the rest takes, the point that it
    depends on, and whether it can be used now.

    Ends with exit code 10 when a disk is older than --max-age or cannot be read, or one of several destinations cannot
    be asked. With --nagios the exit codes are 0 OK, 1 WARNING (points of the future, or a guest of which something is
    owed), 2 CRITICAL (a disk is late or cannot be read) and 3 UNKNOWN (a destination cannot be asked).
    """
    if (images := _images(places)) is not None:
        if nagios or metrics is not None or match or max_age is not None:
            raise InvalidInput("--nagios, --metrics, --match and --max-age are for destinations", subject=places[0])
        from snapchain.ops.instant.status import instant_status

        out.show(instant_status(images), _draw_instant)
        return
    from snapchain.ops import monitoring

    try:
        if nagios and (out.as_json or metrics is not None):
            raise InvalidInput("--nagios goes with neither --json nor --metrics")
        if metrics == "-" and out.as_json:
            raise InvalidInput("--metrics - and --json would both write to stdout")
        monitored = nagios or metrics is not None
        report = _asked(
            places, out, match=match or (), max_age=max_age, with_guests=not disks_only, monitored=monitored
        )
    except SnapchainError as error:
        if not nagios:
            raise
        level, line = monitoring.nagios_failure(error)
        _print(line)
        raise typer.Exit(level) from error
    if nagios:
        level, line = monitoring.nagios(report)
        _print(line)
        raise typer.Exit(level)
    code = 0 if report.is_sound else PartialFailure.exit_code
    if metrics is not None and (text := monitoring.write_metrics(metrics, report)) is not None:
        _print(text.decode().rstrip("\n"))
        raise typer.Exit(code)
    several = len({each.destination for each in report.destinations}) > 1
    out.show(report, partial(_draw, several=several), problems=_draw_problems, status=code)


def _images(places: Sequence[str]) -> tuple[Path, ...] | None:
    """The images that are named; None where destinations are. Raises InvalidInput for both."""
    paths = [Path(each) for each in places]
    if not any(each.exists() for each in paths):  # nor is anything loaded that asks further
        return None
    from snapchain.ops.instant.status import instant_images

    found = [instant_images(each) for each in paths]
    if not any(found):
        return None
    if not all(found):
        raise InvalidInput("images and destinations are both named", subject=", ".join(places), hint="ask for one kind")
    return tuple(image for each in found for image in each)


def _draw_instant(console: Console, report: InstantStatusReport) -> None:
    for each in report.instant:
        percent = "" if each.percent is None else f", {each.percent:g} % copied"
        render.headline(console, f"{render.place(each.image)}: {each.state}{percent}")
        copied = "" if each.copied_bytes is None else f"{size(each.copied_bytes)} of {size(each.virtual_size)}"
        render.facts(
            console,
            [
                ("depends on", each.depends_on),
                ("hold", each.hold or "none: let no merge or gc run there"),
                ("copied", copied),
                ("time left", "" if each.seconds_left is None else quantities.duration(each.seconds_left)),
            ],
        )
        if each.state in ("not served", "missing"):
            render.line(console, "run the same `snapchain restore --instant` again: it continues", style="yellow")


def _asked(
    places: Sequence[str],
    out: Output,
    *,
    match: Sequence[str],
    max_age: str | None,
    with_guests: bool,
    monitored: bool,
) -> StatusReport:
    from snapchain.ops.status import status as run

    wanted = [_wanted(text, out) for text in places]
    return run(
        wanted,
        match=match,
        max_age=None if max_age is None else options.seconds(max_age, "--max-age"),
        with_guests=with_guests,
        reach=None if monitored else options.reach(None, None, out),
        shows_troubles=monitored or len({each.dest for each in wanted}) > 1,
    )


def _wanted(text: str, out: Output) -> Wanted:
    from snapchain.destination.address import PointAddress, parse_destination
    from snapchain.ops.status import Wanted

    address = parse_destination(text)
    name = None
    if isinstance(address, PointAddress):
        if address.point is not None:
            raise InvalidInput("a disk or a guest is wanted here, not a point of it", subject=text)
        name = address.disk
    return Wanted(address.dest, name, partial(options.destination, address.dest, out))


def _print(text: str) -> None:
    sys.stdout.write(f"{printable_lines(text)}\n")
    sys.stdout.flush()


def _draw(console: Console, report: StatusReport, *, several: bool) -> None:
    for place in report.destinations:
        rows = [disk for disk in report.disks if disk.destination == place.destination]
        if several:
            render.headline(console, render.place(place.destination))
        if place.trouble is None and not rows:
            render.line(console, "no disk is here yet")
        render.table(
            console,
            ["disk", "point>", heading("newest"), "age>", "points>", "size>?", "verified?", "trouble~"],
            [_row(disk) for disk in rows],
        )
    for guest in report.guests:
        _draw_guest(console, guest)
    _draw_problems(console, report)


def _row(disk: DiskStatus) -> list[str]:
    name = disk.disk if disk.record_of is None else f"{disk.record_of} (guest points)"
    if disk.trouble is not None:
        return [name, "", "", "", "", "", "", disk.trouble.message]
    future = disk.points_of_the_future
    words = ["late"] if disk.late else []
    words += [f"{counted(len(future), 'point')} of the future: {numbered(future)}"] if future else []
    return [
        name,
        "none" if disk.point is None else str(disk.point),
        "" if disk.time is None else moment(disk.time),
        "" if disk.age_seconds is None else quantities.age(disk.age_seconds),
        str(disk.points),
        "" if disk.virtual_size is None or disk.record_of is not None else size(disk.virtual_size),
        "" if disk.verified is None else moment(disk.verified),
        ", ".join(words),
    ]


def _draw_problems(console: Console, report: StatusReport) -> None:
    """What changes the exit code: the destinations that cannot be asked, one by one, and the disks, counted."""
    for place in report.destinations:
        if place.trouble is not None:
            render.line(console, f"{render.place(place.destination)}: {place.trouble.message}", style="red")
    if unread := sum(each.trouble is not None for each in report.disks):
        words = "cannot be read: `snapchain log DEST::DISK` says what to do"
        render.line(console, f"{counted(unread, 'disk')} {words}", style="red")
    if report.late:
        assert report.max_age_seconds is not None
        limit = quantities.age(report.max_age_seconds)
        render.line(console, f"{counted(len(report.late), 'disk')} older than {limit}", style="red")


def _draw_guest(console: Console, guest: GuestStatus) -> None:
    on = "" if guest.master is None else f" on {guest.master}"
    state = "unknown" if guest.state is None else f"{guest.state.value}{on}, epoch {guest.epoch}"
    render.headline(console, f"{guest.guest}: {state}")
    render.facts(
        console,
        [
            ("at", render.place(guest.destination)),
            ("since", "" if guest.since is None else moment(guest.since)),
            ("from", guest.former or ""),
            ("lease", "" if guest.lease is None else render.lease(guest.lease)),
            ("guest point", _point(guest)),
            ("behind", _lag(guest)),
            ("others", ", ".join(guest.others)),
            *(("no answer", each) for each in guest.silent),
            *(("gone", each) for each in guest.gone),
            ("verified", _checked(guest.verified, with_share=True)),
            ("boot tested", _checked(guest.booted)),
            *(("owed", each) for each in guest.owed),
            ("no answer", guest.fault or ""),
        ],
    )


def _point(guest: GuestStatus) -> str:
    if guest.guest_point is None or guest.time is None:
        return "" if guest.fault else "none"
    how = "" if guest.consistency is None else f", {guest.consistency.value}"
    torn = f"; {guest.torn} newer moments are incomplete" if guest.torn else ""
    return f"{guest.guest_point} of {moment(guest.time)}{how}{torn}"


def _checked(check: GuestCheck | None, *, with_share: bool = False) -> str:
    if check is None:
        return "never"
    share = f", {check.share:.0%} of the data" if with_share and check.share else ", records" if with_share else ""
    verdict = "" if check.ok else f"; FAILED: {check.words}"
    return f"{moment(check.time)} by {check.by}: guest point {check.point}{share}{verdict}"


def _lag(guest: GuestStatus) -> str:
    if guest.lag_seconds is None:
        return ""
    words = quantities.duration(guest.lag_seconds)
    if guest.lag_bytes is not None:
        words += f", about {size(guest.lag_bytes)}"
    return words
