"""`snapchain restore DEST::DISK[@POINT] OUT`: write a point to a new file or device, or as a whole chain.

`snapchain restore DEST::GUEST[@POINT] DIR`: all disks of a guest point, and a definition on them.
"""

from __future__ import annotations

from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from snapchain.cli import options, render
from snapchain.cli.app import verb
from snapchain.cli.output import Output
from snapchain.cli.quantities import moment, size
from snapchain.errors import InvalidInput, NotFound, SnapchainError

if TYPE_CHECKING:
    from rich.console import Console

    from snapchain.destination.protocol import Destination
    from snapchain.ops.guest_points import GuestView
    from snapchain.ops.restore.guest import GuestRestorePlan, GuestRestoreReport, GuestRestoreRequest
    from snapchain.ops.restore.run import Restoration
    from snapchain.ops.restore.target import RestorePlan, RestoreReport

_GUEST = "Guests"


@verb(
    examples="""
    snapchain restore /backup::web1/vda /images/web1.qcow2
    snapchain restore /backup::web1/vda@7 old.raw
    snapchain restore s3://bucket/prefix::web1/vda@before-upgrade web1.qcow2
    snapchain restore ssh://root@kvm2/srv/replica::web1/vda web1.qcow2
    snapchain restore /backup::web1/vda@2026-11-30 /dev/vg0/web1 --format raw
    snapchain restore /backup::web1/vda@latest /images/web1.qcow2 --chain
    snapchain restore /backup::web1 /images/web1
    snapchain restore /backup::web1@before-upgrade /images/web2 --define --new-name web2
    """,
    when_interrupted="OUT was not made (a block device holds a part of the point); run it again: what was written of a "
    "file, if it is much, is continued, and so are the disks of a guest",
)
@options.takes_output(passphrase=True)
def restore(
    source: Annotated[
        str,
        options.address(
            metavar="DEST::DISK|GUEST[@POINT]",
            help="The disk or the guest, and the point: latest (default), a number, a label, or a time. A time means "
            "the newest point not after it; a date such as 2026-11-30, or yesterday, means the end of that day here.",
        ),
    ],
    out_path: Annotated[
        Path,
        typer.Argument(readable=False, metavar="OUT", help="A new file, a block device, or a guest's directory."),
    ],
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
    defines: Annotated[
        bool,
        typer.Option(
            "--define",
            help="Define it in libvirt too. An existing domain is not replaced.",
            rich_help_panel=_GUEST,
        ),
    ] = False,
    connect: Annotated[
        str | None,
        typer.Option("--connect", metavar="URI", help="The libvirt to define it in.", rich_help_panel=_GUEST),
    ] = None,
    new_name: Annotated[
        str | None,
        typer.Option(
            "--new-name",
            metavar="NAME",
            help="Make a clone: with this name, a new UUID and new MAC addresses.",
            rich_help_panel=_GUEST,
        ),
    ] = None,
    new_identity: Annotated[
        bool,
        typer.Option("--new-identity", help="As --new-name, but keep the name.", rich_help_panel=_GUEST),
    ] = False,
    connections: options.Connections = 1,
    limit_rate: options.LimitRate = None,
    out: Output,
) -> None:
    """Write a point to a new file or a block device, or as a whole chain; or all disks of a guest.

    The output is read back, and must have the content id of the point. A file gets its name only when it is complete.

    --force replaces an existing file, but never one that a program has open or that another image depends on. The new
    file gets the owner, the mode, the ACL and the security label of the old one, and a symbolic link stays a link.
    --force is also needed for a block device that is not empty. The zeroes of the point are written to a device too.

    DEST is a repository, or a replica: ssh://[user@]host/path or dir:/path. Run an interrupted restore again: it
    continues with its partial output, which is read back like the rest.

    A guest: DIR gets the disks (vda.qcow2, ...), its firmware variables and TPM state, and a definition with the new
    paths: GUEST.xml for libvirt, else GUEST.sh with QEMU's command line. The definition is written when all disks are
    there. No file is replaced. Disks that were not recorded and devices of the old host are left out of the
    definition, and are listed. A hand-written command in a definition comes back as it was: read it before you run it.
    """
    from snapchain.destination.address import parse_point_address
    from snapchain.ops.guest_points import guest_named
    from snapchain.ops.restore.run import Restoration

    address = parse_point_address(source)
    place = options.destination(
        address.dest,
        out,
        limit_rate=limit_rate,
        connections=connections,
    )

    def as_guest(view: GuestView) -> None:
        from snapchain.ops.restore.guest import GuestRestoreRequest

        if force:
            raise InvalidInput("--force is for one disk: a restore of a guest replaces no file", subject=source)
        request = GuestRestoreRequest(
            directory=out_path,
            point=address.point,
            format=options.format_of(image_format),
            whole_chain=chain,
            defines=defines,
            connect=connect,
            new_name=new_name,
            new_identity=new_identity,
        )
        _restore_guest(place, view, request, out)

    view: GuestView | None = None
    for_guests = defines or connect is not None or new_name is not None or new_identity
    if for_guests or _is_directory(out_path):
        view = guest_named(place.disks(), address.disk)
        if view is not None:
            as_guest(view)
            return
        if for_guests:
            raise NotFound("there is no such guest, and --define and --new-name are for guests", subject=source)
    try:
        _restore_disk(
            Restoration(
                place,
                address.disk,
                out_path,
                point=address.point,
                format=options.format_of(image_format),
                whole_chain=chain,
                force=force,
            ),
            out,
        )
    except (NotFound, InvalidInput) as error:
        # Asked only now, so that a restore of a disk costs no request more. A directory's name has no suffix, for one.
        view, is_disk = None, True
        with suppress(SnapchainError):
            disks = place.disks()
            view, is_disk = guest_named(disks, address.disk), any(each.name == address.disk for each in disks)
        if view is not None:
            as_guest(view)
        elif is_disk:
            raise
        else:
            raise NotFound("there is no such disk or guest", subject=f"{place.url}::{address.disk}") from error


def _is_directory(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:  # the restore of a disk says what is wrong with it
        return False


def _restore_disk(work: Restoration, out: Output) -> None:
    if out.dry_run:
        out.plan(work.plan(), _draw_plan)
    else:
        out.report(work.run(on_event=out.on_event), _draw_report)


def _restore_guest(place: Destination, view: GuestView, request: GuestRestoreRequest, out: Output) -> None:
    from snapchain.ops.restore.guest import GuestRestoration

    work = GuestRestoration(place, view, request, on_event=out.on_event)
    if out.dry_run:
        out.plan(work.plan(), _draw_guest_plan)
    else:
        out.report(work.run(), _draw_guest_report)


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


def _draw_guest_plan(console: Console, plan: GuestRestorePlan) -> None:
    what = "" if plan.defines is None else f", and define {plan.defines}"
    time = moment(plan.time, zone=True)
    render.headline(
        console, f"would restore {plan.guest}, guest point {plan.guest_point} of {time}, to {plan.directory}{what}"
    )
    render.facts(console, [("to write", size(plan.bytes_to_write)), ("consistency", plan.consistency.value)])
    render.table(
        console,
        ["disk", "file", "virtual size>", "data>"],
        [(each.name, each.output, size(each.virtual_size), size(each.data_bytes)) for each in plan.disks],
    )
    render.facts(console, [("besides", ", ".join(plan.files))])
    _draw_lacking(console, plan.lacking)


def _draw_guest_report(console: Console, report: GuestRestoreReport) -> None:
    render.headline(console, f"restored {report.guest}, guest point {report.guest_point}, to {report.directory}")
    render.facts(
        console,
        [
            ("written", size(report.bytes_written)),
            ("consistency", report.consistency.value),
            ("disks", ", ".join(each.output for each in report.disks)),
            ("definition", report.definition or ""),
            ("defined", report.defined or ""),
        ],
    )
    _draw_lacking(console, report.lacking)


def _draw_lacking(console: Console, lacking: tuple[str, ...]) -> None:
    for sentence in lacking:
        render.line(console, f"note: {sentence}", style="yellow")
