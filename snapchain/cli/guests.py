"""`snapchain guests [NAME]`: list the guests of this host, their disks, and what protects them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

import typer

from snapchain.cli import options, quantities, render
from snapchain.cli.app import verb
from snapchain.cli.output import Output
from snapchain.cli.quantities import moment
from snapchain.host.terminal import counted

if TYPE_CHECKING:
    from rich.console import Console

    from snapchain.destination.reading import ReadableDestination
    from snapchain.ops.guests import DiskRow, GuestRow, GuestsReport, Protection


@verb(
    examples="""
    snapchain guests
    snapchain guests web1
    snapchain guests --at /backup --at ssh://root@kvm2/srv/replica
    snapchain guests --json | jq -r '.guests[] | select(.in_the_way != []) | .name'
    """,
    when_interrupted="nothing was being changed",
)
@options.takes_output(passphrase=True, dry_run=False, progress=False)
def guests(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="Show this guest only.")] = None,
    *,
    at: Annotated[
        list[str] | None,
        typer.Option(
            "--at",
            metavar="DEST",
            autocompletion=options.complete_address,
            help="Show the newest point of each guest at this destination, and its age. May be repeated.",
        ),
    ] = None,
    out: Output,
) -> None:
    """List the guests of this host, their disks and chains, and what protects them.

    A guest is a domain of libvirt, running or not, or a QEMU process that no libvirt manages. libvirt's system daemon
    and this user's own are asked, or the one that LIBVIRT_DEFAULT_URI names. A QEMU without libvirt needs a QMP socket.

    A line `in the way` says why a live snapshot of all disks would fail, and what to do about it. A disk that is left
    out, such as a CD-ROM, is no part of a guest's points.

    A guest, a daemon or a destination that does not answer is a line of the list, and does not change the exit code. A
    monitor that another program is connected to is left alone.
    """
    from snapchain.destination.address import parse_destination
    from snapchain.ops.guests import guests as run

    def opened(url: str) -> Callable[[], ReadableDestination]:
        return lambda: options.destination(url, out)

    places = {each: opened(parse_destination(each).dest) for each in at or ()}
    out.show(run(name, at=places), _draw, problems=_draw_faults)


def _draw(console: Console, report: GuestsReport) -> None:
    if not report.guests:
        render.headline(console, "no guest is on this host")
    for guest in report.guests:
        _draw_guest(console, guest)


def _draw_guest(console: Console, guest: GuestRow) -> None:
    kind = {"libvirt": "libvirt", "qemu": "QEMU"}[guest.kind] + (f" (pid {guest.pid})" if guest.pid else "")
    render.headline(console, f"{guest.name}: {guest.state}, {kind}")
    if guest.disks:
        render.table(
            console,
            ["  disk", "layers>", "size>", "on disk>", "active layer"],
            [_disk_cells(disk) for disk in guest.disks],
        )
    rows = [("option", guest.option or "")]
    rows.append(("agent", {"answers": "answers", "silent": "does not answer"}.get(guest.agent, "")))
    rows += [(each.destination, _protection(each)) for each in guest.protected]
    rows += [("at work", each) for each in guest.activities]
    rows += [("in the way", each) for each in guest.in_the_way]
    rows += [("lease", guest.lease)] if guest.lease is not None else []
    rows += [("owed", f"{each}: `snapchain doctor` finishes it") for each in guest.owed]
    rows.append(("no answer", guest.fault or ""))
    render.facts(console, rows)


def _disk_cells(disk: DiskRow) -> tuple[str, ...]:
    where = f"left out: {disk.left_out}" if disk.left_out else disk.path or "no local file"
    if not disk.layers:
        return f"  {disk.name}", "", "", "", where
    sizes = quantities.size(disk.virtual_size), quantities.size(disk.file_bytes)
    return (f"  {disk.name}", str(disk.layers), *sizes, where)


def _protection(found: Protection) -> str:
    if found.fault is not None:
        return f"no answer: {found.fault}"
    if found.time is None or found.age_seconds is None:
        return f"no guest point, and points of {counted(len(found.disks), 'disk')}" if found.disks else "nothing"
    how = f", {found.consistency.value}" if found.consistency is not None else ""
    age = quantities.duration(found.age_seconds)
    return f"guest point {found.guest_point} of {moment(found.time)}, {age} old{how}"


def _draw_faults(console: Console, report: GuestsReport) -> None:
    for fault in report.faults:
        render.line(console, f"not all guests are shown: {fault}")
