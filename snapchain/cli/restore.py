"""`snapchain restore DEST::DISK[@POINT] OUT`: write a point to a new file, a device or stdout, or as a whole chain.

`snapchain restore DEST::GUEST[@POINT] DIR`: all disks of a guest point, and a definition on them.
`snapchain restore DEST DIR --match PATTERN`: all disks and guests that match.
"""

from __future__ import annotations

import sys
from contextlib import redirect_stdout, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from snapchain.cli import options, quantities, restore_tables as tables, streams
from snapchain.cli.app import verb
from snapchain.cli.output import Output
from snapchain.errors import InvalidInput, NotFound, PartialFailure, SnapchainError

if TYPE_CHECKING:
    from collections.abc import Callable

    from snapchain.destination.address import PointAddress
    from snapchain.destination.protocol import Destination
    from snapchain.ops.guest_points import GuestView
    from snapchain.ops.instant.guest_images import GuestInstantRequest
    from snapchain.ops.instant.run import CopiedImage, InstantRequest
    from snapchain.ops.instant.under_guest import UnderQemu
    from snapchain.ops.restore.guest import GuestRestoreRequest
    from snapchain.ops.restore.run import Restoration
    from snapchain.ops.restore.several import SeveralRequest
    from snapchain.ops.restore.target import RestoreReport

_GUEST = "Guests"
_SEVERAL = "Several disks and guests"
_INSTANT = "Instant restore"


@verb(
    examples="""
    snapchain restore /backup::web1/vda /images/web1.qcow2
    snapchain restore /backup::web1/vda@7 old.raw
    snapchain restore s3://bucket/prefix::web1/vda@before-upgrade web1.qcow2
    snapchain restore ssh://root@kvm2/srv/replica::web1/vda web1.qcow2
    snapchain restore /backup::web1/vda@2026-11-30 /dev/vg0/web1 --format raw
    snapchain restore /backup::web1/vda@latest /images/web1.qcow2 --chain
    snapchain restore /backup::web1/vda - --format raw | ssh kvm2 dd of=/dev/vg0/web1 bs=1M
    snapchain restore /backup::web1 /images/web1
    snapchain restore /backup::web1@before-upgrade /images/web2 --define --new-name web2
    snapchain restore --instant /backup::web1/vda /images/web1.qcow2
    snapchain restore --instant --later /backup::web1 /images/web1
    snapchain restore /backup /images --match '*' --dry-run
    snapchain restore s3://bucket/prefix /images --match 'web*' --match 'db*' --point yesterday
    """,
    when_interrupted="OUT was not made (a device or a stream has a part of the point); run it again: what was written "
    "of a file, if it is much, is continued, and so are the disks of a guest. With --instant OUT stays usable, and the "
    "next run copies the rest",
)
@options.takes_output(passphrase=True)
def restore(
    source: Annotated[
        str,
        options.address(
            metavar="DEST::DISK|GUEST[@POINT]",
            help="The disk or the guest, and the point: latest (default), a number, a label, or a time. A time means "
            "the newest point not after it; a date such as 2026-11-30, or yesterday, means the end of that day here. "
            "With --match a destination.",
        ),
    ],
    out_path: Annotated[
        Path,
        typer.Argument(
            readable=False,
            metavar="OUT",
            help="A new file, a block device, the directory of a guest or of --match, or - for standard output.",
        ),
    ],
    *,
    match: Annotated[
        list[str] | None,
        typer.Option(
            "--match",
            metavar="PATTERN",
            help="All disks and guests of DEST whose name fits: 'web*', or '*' for all. May be repeated.",
            rich_help_panel=_SEVERAL,
        ),
    ] = None,
    point: Annotated[
        str | None,
        typer.Option(
            "--point",
            metavar="POINT",
            help="Of each of them this point, such as yesterday. By default the newest.",
            rich_help_panel=_SEVERAL,
        ),
    ] = None,
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
            help="Format of OUT. By default by its suffix; of a device and of standard output it is raw.",
        ),
    ] = None,
    allow_damaged: Annotated[
        bool,
        typer.Option(
            "--allow-damaged",
            help="Write zeroes for ranges whose bytes are lost in the repository, list them, and exit with 10.",
        ),
    ] = False,
    owner: Annotated[
        str | None,
        typer.Option("--owner", metavar="USER[:GROUP]", help="Owner of each new file, by name or number."),
    ] = None,
    mode: Annotated[
        str | None,
        typer.Option("--mode", metavar="MODE", help="Mode of each new file, such as 0640. Default: 0600."),
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
    instant: Annotated[
        bool,
        typer.Option(
            "--instant",
            help="Make OUT.qcow2 usable at once, and copy the point into it afterwards.",
            rich_help_panel=_INSTANT,
        ),
    ] = False,
    later: Annotated[
        bool,
        typer.Option(
            "--later",
            help="With --instant: do not copy yet. OUT depends on the destination until you run the command again.",
            rich_help_panel=_INSTANT,
        ),
    ] = False,
    start: Annotated[
        bool,
        typer.Option(
            "--start",
            help="With --instant: start the guest, and copy while it runs. Only a guest that QEMU ran without libvirt.",
            rich_help_panel=_INSTANT,
        ),
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

    - as OUT writes the raw disk to standard output in order, zeroes included. The report goes to standard error. The
    exit code is 0 only if all that was written is proven to be the point: discard the stream otherwise.

    DEST is a repository, or a replica: ssh://[user@]host/path or dir:/path. Run an interrupted restore again: it
    continues with its partial output, which is read back like the rest.

    A guest: DIR gets the disks (vda.qcow2, ...), its firmware variables and TPM state, and a definition with the new
    paths: GUEST.xml for libvirt, else GUEST.sh with QEMU's command line. The definition is written when all disks are
    there. No file is replaced. Disks that were not recorded and devices of the old host are left out of the
    definition, and are listed. A hand-written command in a definition comes back as it was: read it before you run it.

    With --match, DIR gets a directory for each guest that matches, and a file for each disk that is of no guest:
    DIR/web1/vda.qcow2. One that cannot be restored is reported, the others are restored, and the exit code is 10. No
    file is replaced. Run it again to continue: it takes the points that the first run has chosen, and leaves what is
    restored already. --dry-run shows the sizes, and about how long it takes.

    With --instant, OUT.qcow2 can be used when the command says so, within seconds. It is an overlay on the point, which
    a process in the background serves as `snapchain serve` does. The point is then copied into OUT, and compared with
    it; at the end OUT is a plain qcow2 file, and the process is gone. While the copying runs, no guest can open OUT. To
    start a guest at once, say --later: the guest reads from the destination what OUT lacks. Run the command again
    to copy. With --start a guest that QEMU ran without libvirt is started, and its disks are copied while it runs.

    Ctrl-C ends the copying. OUT stays usable, and the process goes on. After Ctrl-C, an error, or a restart of the
    host, run the same command again: it starts the process, and continues with the same point. Without the process OUT
    cannot be opened, and never reads as zeroes. Until OUT is finished its point is on hold at the destination.
    `snapchain status OUT.qcow2` shows how far it is. To give it up, delete OUT and release the hold.
    """
    from snapchain.host.files import UNCHANGED, standing_of
    from snapchain.ops.guest_points import find_guest, guest_named, records_of
    from snapchain.ops.restore.run import Restoration

    standing = standing_of(owner, mode)
    if later and not instant:
        raise InvalidInput("--later goes with --instant", subject=source)
    if start and not instant:
        raise InvalidInput("--start goes with --instant", subject=source, hint="say --instant --start")
    is_stream = str(out_path) == tables.STREAM
    for_guests = start or defines or connect is not None or new_name is not None or new_identity
    if match:
        if is_stream:
            raise InvalidInput("standard output takes one disk, and --match chooses several", hint="name a directory")
        others = {
            "--chain": chain,
            "--force": force,
            "--allow-damaged": allow_damaged,
            "--define": defines,
            "--connect": connect is not None,
            "--new-name": new_name is not None,
            "--new-identity": new_identity,
            "--instant": instant,
        }
        if any(others.values()):
            raise InvalidInput(
                f"--match does not work together with {', '.join(name for name, given in others.items() if given)}",
                hint="restore such a disk or guest by its name: DEST::DISK",
            )
        dest = _destination_alone(source)
        from snapchain.ops.restore.several import SeveralRequest

        several = SeveralRequest(
            directory=out_path,
            patterns=tuple(match),
            point=point,
            format=options.format_of(image_format),
            standing=standing,
        )
        _restore_several(options.destination(dest, out, limit_rate=limit_rate, connections=connections), several, out)
        return
    if point is not None:
        raise InvalidInput("--point goes with --match", subject=source, hint=f"write DEST::DISK@{point}")
    if is_stream:
        _check_stream(source, image_format, is_new_file=chain or force or standing != UNCHANGED, dry_run=out.dry_run)
    address = _point_address(source)
    if instant:
        _check_instant(
            source,
            is_stream=is_stream,
            chain=chain,
            force=force,
            damaged=allow_damaged,
            image_format=image_format,
        )
    place = options.destination(
        address.dest,
        out,
        writing=instant and not out.dry_run,
        limit_rate=limit_rate,
        connections=connections,
    )

    def as_guest(view: GuestView) -> None:
        from snapchain.ops.restore.guest import GuestRestoreRequest

        if force:
            raise InvalidInput("--force is for one disk: a restore of a guest replaces no file", subject=source)
        if allow_damaged:
            raise InvalidInput("--allow-damaged is for one disk", subject=source, hint="restore its disks one by one")
        if is_stream:
            raise InvalidInput(
                "standard output takes one disk, and this is a guest", subject=source, hint="name a disk"
            )
        request = GuestRestoreRequest(
            directory=out_path,
            point=address.point,
            format=options.format_of(image_format),
            whole_chain=chain,
            defines=defines,
            connect=connect,
            new_name=new_name,
            new_identity=new_identity,
            standing=standing,
        )
        if start and (defines or connect is not None):
            raise InvalidInput(
                "--start is for a guest that QEMU runs without libvirt, and --define is for libvirt", subject=source
            )
        if instant:
            _restore_instant_guest(place, view, as_instant(request), out)
            return
        _restore_guest(place, view, request, out)

    def as_instant(request: GuestRestoreRequest) -> GuestInstantRequest:
        from snapchain.destination.address import located
        from snapchain.ops.instant.guest_images import GuestInstantRequest

        return GuestInstantRequest(
            restore=request,
            located=located(address.dest),
            passphrase=options.passphrase_source(out, address.dest),
            later=later,
            speed=0 if limit_rate is None else quantities.parse_size(limit_rate),
            starts=start,
        )

    def as_disk() -> InstantRequest:
        from snapchain.destination.address import located
        from snapchain.ops.instant.run import InstantRequest

        return InstantRequest(
            located=located(address.dest),
            disk=address.disk,
            point=address.point,
            output=out_path,
            passphrase=options.passphrase_source(out, address.dest),
            standing=standing,
            later=later,
            speed=0 if limit_rate is None else quantities.parse_size(limit_rate),
        )

    view: GuestView | None = None
    if for_guests or _is_directory(out_path):
        view = find_guest(place, address.disk)
        if view is not None:
            as_guest(view)
            return
        if for_guests:
            raise NotFound(
                "there is no such guest, and --define, --new-name and --start are for guests", subject=source
            )
    try:
        if instant:
            _restore_instant(place, as_disk(), out)
            return
        if is_stream:
            _restore_stream(place, address.disk, address.point, allow_damaged=allow_damaged, out=out)
            return
        _restore_disk(
            Restoration(
                place,
                address.disk,
                out_path,
                point=address.point,
                format=options.format_of(image_format),
                whole_chain=chain,
                force=force,
                allow_damaged=allow_damaged,
                standing=standing,
            ),
            out,
        )
    except (NotFound, InvalidInput) as error:
        # Asked only now, so that a restore of a disk costs no request more. A directory's name has no suffix, for one.
        view, is_disk = None, True
        with suppress(SnapchainError):
            disks = records_of(place, [address.disk])
            view, is_disk = guest_named(disks, address.disk), any(each.name == address.disk for each in disks)
        if view is not None:
            as_guest(view)
        elif is_disk:
            raise
        else:
            # The hint of a disk that was renamed has its new name.
            subject = f"{place.url}::{address.disk}"
            raise NotFound("there is no such disk or guest", subject=subject, hint=error.hint) from error


def _point_address(text: str) -> PointAddress:
    from snapchain.destination.address import parse_point_address

    try:
        return parse_point_address(text)
    except InvalidInput as error:
        if error.message == "no disk is named":
            error.hint = f"{error.hint}; or choose several: --match 'web*', and --match '*' for all"
        raise


def _destination_alone(text: str) -> str:
    from snapchain.destination.address import PointAddress, parse_destination

    address = parse_destination(text)
    if isinstance(address, PointAddress):
        raise InvalidInput(
            "--match chooses among all disks, and one is named", subject=text, hint="name DEST alone, or leave it out"
        )
    return address.dest


def _restore_several(place: Destination, request: SeveralRequest, out: Output) -> None:
    from snapchain.ops.restore.several import SeveralRestoration

    work = SeveralRestoration(place, request, on_event=out.on_event)
    if out.dry_run:
        plan = work.plan()
        status = 0 if plan.ok else PartialFailure.exit_code
        out.plan(plan, tables.draw_several_plan, problems=tables.draw_failed, status=status)
        return
    report = work.run()
    status = 0 if report.ok else PartialFailure.exit_code
    out.report(report, tables.draw_several, problems=tables.draw_failed, status=status)


def _is_directory(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:  # the restore of a disk says what is wrong with it
        return False


def _check_instant(
    source: str, *, is_stream: bool, chain: bool, force: bool, damaged: bool, image_format: str | None
) -> None:
    """Raises InvalidInput for options that an instant restore cannot follow."""
    others = {
        "standard output": is_stream,
        "--chain": chain,
        "--force": force,
        "--allow-damaged": damaged,
        "--format raw": options.format_of(image_format) == "raw",
    }
    if any(others.values()):
        raise InvalidInput(
            f"--instant makes a new qcow2 file, and does not work together with "
            f"{', '.join(name for name, given in others.items() if given)}",
            subject=source,
        )


def _under_guest(passphrase: Callable[[], str | None], speed: int, out: Output) -> UnderQemu:
    from snapchain.ops.instant.under_guest import UnderQemu

    return UnderQemu(passphrase, speed, out.on_event)


def _restore_instant_guest(place: Destination, view: GuestView, request: GuestInstantRequest, out: Output) -> None:
    from snapchain.ops.instant.guest_images import GuestInstantRestoration

    work = GuestInstantRestoration(place, view, request, on_event=out.on_event)
    if out.dry_run:
        out.plan(work.plan(), tables.draw_guest_plan)
        return
    report = work.run(under_guest=_under_guest(request.passphrase, request.speed, out))
    status = PartialFailure.exit_code if any(each.unproven_bytes for each in report.disks) else 0
    out.report(report, tables.draw_instant_guest, problems=tables.draw_unproven_disks, status=status)


def _restore_instant(place: Destination, request: InstantRequest, out: Output) -> None:
    from snapchain.ops.instant.run import InstantRestoration

    work = InstantRestoration(place, request)
    if out.dry_run:
        out.plan(work.plan(), tables.draw_instant_plan)
        return
    report = work.run(under_guest=_under_guest(request.passphrase, request.speed, out), on_event=out.on_event)
    out.report(report, tables.draw_instant, problems=tables.draw_unproven, status=_status_of(report))


def _status_of(report: CopiedImage) -> int:
    return PartialFailure.exit_code if report.unproven_bytes else 0


def _restore_disk(work: Restoration, out: Output) -> None:
    if out.dry_run:
        out.plan(work.plan(), tables.draw_plan)
    else:
        _report(work.run(on_event=out.on_event), out)


def _report(report: RestoreReport, out: Output) -> None:
    if report.damaged:
        out.report(report, tables.draw_report, problems=tables.draw_damage, status=PartialFailure.exit_code)
    else:
        out.report(report, tables.draw_report)


def _check_stream(source: str, image_format: str | None, *, is_new_file: bool, dry_run: bool) -> None:
    """Raises InvalidInput for options that a stream cannot follow, and for a terminal."""
    if options.format_of(image_format) == "qcow2":
        raise InvalidInput("a stream takes a flat raw disk", subject=source, hint="say --format raw, or name a file")
    if is_new_file:
        raise InvalidInput("--chain, --force, --owner and --mode are for files", subject=source, hint="name a file")
    if not dry_run and sys.stdout.isatty():
        raise InvalidInput("a disk does not go to a terminal", subject=source, hint="pipe it, or redirect it")


def _restore_stream(place: Destination, disk: str, point: str | None, *, allow_damaged: bool, out: Output) -> None:
    """The disk gets stdout for itself; what else is said there goes to stderr."""
    from snapchain.ops.restore.stream import StreamedRestoration

    work = StreamedRestoration(place, disk, point=point, allow_damaged=allow_damaged)
    if out.dry_run:
        out.plan(work.plan(), tables.draw_plan)
        return
    descriptor = streams.claim_stdout()
    report = work.run(partial(streams.write_all, descriptor), on_event=out.on_event)
    with redirect_stdout(sys.stderr):
        _report(report, out)


def _restore_guest(place: Destination, view: GuestView, request: GuestRestoreRequest, out: Output) -> None:
    from snapchain.ops.restore.guest import GuestRestoration

    work = GuestRestoration(place, view, request, on_event=out.on_event)
    if out.dry_run:
        out.plan(work.plan(), tables.draw_guest_plan)
    else:
        out.report(work.run(), tables.draw_guest_report)
