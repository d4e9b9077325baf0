"""`snapchain sync IMAGE DEST::DISK`: make a replica ready for a live migration of the guest.

`snapchain sync --domain NAME DEST` does so for all disks of a guest.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypedDict

import typer

from snapchain.cli import guest_options, options, quantities, render
from snapchain.cli.app import verb
from snapchain.cli.options import DiskPairs, disk_pairs
from snapchain.cli.output import Output
from snapchain.cli.preconnect import endpoint_at
from snapchain.cli.quantities import size
from snapchain.errors import Conflict, InvalidInput
from snapchain.guest.address import GuestAddress
from snapchain.host.terminal import counted

if TYPE_CHECKING:
    from rich.console import Console

    from snapchain.ops.sync.run import (
        Destination,
        Divergence,
        Endpoint,
        Guest,
        Proof,
        SetDestination,
        SetReport,
        SyncReport,
        SyncRequest,
    )
    from snapchain.source.protocol import SetSealer

NOT_READY = Conflict.exit_code
_MIGRATE = "For the migration"


@verb(
    examples="""
    snapchain sync /images/web1.qcow2 ssh://root@kvm2/srv/replica::web1/vda
    snapchain sync /images/web1.qcow2 ssh://root@kvm2/srv/replica::web1/vda --check
    snapchain sync web1.qcow2 ssh://kvm2/srv/replica::web1/vda --target-downtime 2 --limit-rate 50M
    snapchain sync web1.qcow2 dir:/mnt/share/replica::web1/vda --rounds 3 --dest-uri qemu+ssh://kvm2/system
    snapchain sync --domain web1 ssh://root@kvm2/srv/replica --target-downtime 2
    snapchain sync a.qcow2 ssh://kvm2/srv/replica::web1/vda b.qcow2 ssh://kvm2/srv/replica::web1/vdb
    """,
    when_interrupted="what is durable at the replica stays, and what was sealed stays sealed; run it again to go on",
)
@options.takes_output()
@guest_options.takes_guest()
def sync(
    disks: DiskPairs,
    *,
    rounds: Annotated[
        int | None, typer.Option("--rounds", min=1, help="Seal the top and ship it, at most this many times.")
    ] = None,
    target_downtime: Annotated[
        float | None,
        typer.Option(
            "--target-downtime",
            metavar="SECONDS",
            help="Seal and ship until the rest takes at most SECONDS; stop when more rounds bring that no nearer.",
        ),
    ] = None,
    check: Annotated[
        bool,
        typer.Option(
            "--check",
            help="Only report whether the destination is ready (exit code 0), or what is missing (exit code 4).",
        ),
    ] = False,
    prove: Annotated[
        bool, typer.Option("--prove", help="Read every sealed layer again, on both sides, and compare content ids.")
    ] = False,
    label: options.Labels = None,
    cut_replica: options.CutReplica = False,
    connections: options.Connections = 1,
    guest: GuestAddress | None,
    disk: Annotated[
        list[str] | None,
        typer.Option("--disk", metavar="NAME", help="Only this disk of the guest, such as vda. May be repeated."),
    ] = None,
    guest_disk: Annotated[
        list[str] | None,
        typer.Option(
            "--guest-disk",
            metavar="TARGET",
            help="Target of the disk in the guest. By default vda for web1/vda. Give it once for each disk.",
            rich_help_panel=_MIGRATE,
        ),
    ] = None,
    dest_uri: Annotated[
        str | None,
        typer.Option(
            "--dest-uri",
            metavar="URI",
            help="URI of libvirt at the destination. By default qemu+ssh://\\[user@]host/system.",
            rich_help_panel=_MIGRATE,
        ),
    ] = None,
    image_format: options.Format = None,
    image_dir: options.ImageDir = None,
    limit_rate: options.LimitRate = None,
    out: Output,
) -> None:
    """Make a replica ready for a live migration, and predict the cutover.

    All files below the top are sent in order, each under its own name, as by `send`. Then an empty overlay of the same
    size is made on them there. The report prints the virsh command that migrates the guest (--copy-storage-inc, with
    the list of disks). The predicted cutover is the data left in the top, divided by the measured rate.

    More pairs of IMAGE DEST::DISK are other disks of the same guest. Each round seals all of them, and one command
    migrates them all.

    With a guest in place of the images, all its disks are sent to DEST as GUEST/DISK, or only those of --disk. Its name
    and its disks' names then stand in the command that migrates it. With pairs, --domain is its name in that command.

    The guest may run. With --rounds or --target-downtime the top is sealed too. The disks of a running guest are sealed
    through its monitor or libvirt; an image must not be open in any program. The rounds end when the target is met, or
    when the guest writes faster than the link carries.

    Ends with exit code 4 when the destination is not ready, or the target is not met. An overlay at the destination
    that was written to is never touched.
    """
    from snapchain.ops.sync.run import Divergence, Proof

    common = _Common(
        labels=label or (),
        divergence=Divergence.CUT_REPLICA if cut_replica else Divergence.REFUSE,
        image_dirs=options.image_dirs(image_dir),
        limit_rate=None if limit_rate is None else quantities.parse_size(limit_rate),
        rounds=rounds,
        target_downtime=target_downtime,
        proof=Proof.READ if prove else Proof.RECORDED,
    )
    if guest is not None and len(disks) == 1:
        if image_format is not None or guest_disk:
            raise InvalidInput("--format and --guest-disk are for images; the guest tells this of its disks")
        _sync_guest(guest, disks[0], disk or (), common, uri=dest_uri, connections=connections, check=check, out=out)
        return
    if guest is not None and guest.qmp is not None:
        guest_options.check_either(disks, guest)
    if disk:
        raise InvalidInput("--disk is for a guest; here images are named", hint="leave it out")
    _sync_images(
        disks,
        common,
        format=options.format_of(image_format),
        domain=None if guest is None else guest.domain,
        targets=guest_disk,
        uri=dest_uri,
        connections=connections,
        check=check,
        out=out,
    )


class _Common(TypedDict):
    """What is asked of every disk."""

    labels: Sequence[str]
    divergence: Divergence
    image_dirs: Sequence[Path]
    limit_rate: int | None
    rounds: int | None
    target_downtime: float | None
    proof: Proof


def _sync_images(
    words: list[str],
    common: _Common,
    *,
    format: str | None,
    domain: str | None,
    targets: list[str] | None,
    uri: str | None,
    connections: int,
    check: bool,
    out: Output,
) -> None:
    from snapchain.ops.sync.run import SyncRequest, sealed_request

    dest, pairs = disk_pairs(words)
    endpoint = endpoint_at(dest, connections=connections)
    requests = [
        SyncRequest(
            send=sealed_request(
                image,
                disk,
                labels=common["labels"],
                divergence=common["divergence"],
                format=format,
                image_dirs=common["image_dirs"],
                limit_rate=common["limit_rate"],
            ),
            rounds=common["rounds"],
            target_downtime=common["target_downtime"],
            proof=common["proof"],
            guest=_guest(dest, disk, domain=domain, target=target, uri=uri),
        )
        for (image, disk), target in zip(pairs, _targets(targets, len(pairs)), strict=True)
    ]
    _run(requests, endpoint, out, check=check)


def _sync_guest(
    address: GuestAddress,
    dest: str,
    names: Sequence[str],
    common: _Common,
    *,
    uri: str | None,
    connections: int,
    check: bool,
    out: Output,
) -> None:
    from snapchain.destination.address import PointAddress, parse_destination, parse_disk_address
    from snapchain.guest.address import open_guest
    from snapchain.ops.sync.guests import requests_of

    prefix = None
    named = parse_destination(dest)
    if isinstance(named, PointAddress):
        prefix = parse_disk_address(dest).disk
    endpoint = endpoint_at(named.dest, connections=connections)
    with open_guest(address, on_event=out.on_event) as guest:
        domain = guest.name if guest.kind == "libvirt" else None
        requests, sealer = requests_of(
            guest,
            prefix=prefix,
            disks=names,
            migrating=lambda target: (
                None if domain is None else _guest(named.dest, target, domain=domain, target=target, uri=uri)
            ),
            on_event=out.on_event,
            **common,
        )
        _run(requests, endpoint, out, check=check, sealer=sealer)


def _run(
    requests: list[SyncRequest], endpoint: Endpoint, out: Output, *, check: bool, sealer: SetSealer | None = None
) -> None:
    """Ends with NOT_READY where it is not as it was wanted."""
    from snapchain.ops.sync.run import check_set, sync_set

    alone = len(requests) == 1
    if check or out.dry_run:
        stands = check_set(requests, endpoint, on_event=out.on_event)
        if not check:
            out.plan(stands.disks[0], _draw_plan) if alone else out.plan(stands, _draw_set_plan)
            return
        status = 0 if stands.ready else NOT_READY
        if alone:
            out.show(stands.disks[0], _draw_check, problems=_draw_lacking, status=status)
        else:
            out.show(stands, _draw_set_check, problems=_draw_set_lacking, status=status)
        return
    report = sync_set(requests, endpoint, sealer=sealer, on_event=out.on_event)
    status = 0 if report.ready and report.on_target is not False else NOT_READY
    if alone:
        out.report(report.disks[0], _draw_report, problems=_draw_lacking, status=status)
    else:
        out.report(report, _draw_set_report, problems=_draw_set_lacking, status=status)


def _targets(given: list[str] | None, count: int) -> list[str | None]:
    """Of each disk in the guest."""
    if not given:
        return [None] * count
    if len(given) != count:
        times = counted(len(given), "time")
        raise InvalidInput(
            f"--guest-disk is given {times} for {counted(count, 'disk')}", hint="give it once for each disk"
        )
    return [*given]


def _guest(dest: str, disk: str, *, domain: str | None, target: str | None, uri: str | None) -> Guest | None:
    from snapchain.host.ssh import is_remote, parse_remote_address
    from snapchain.ops.sync.run import guest_of

    address = parse_remote_address(dest) if is_remote(dest) else None
    return guest_of(disk, address, domain=domain, target=target, uri=uri)


def _draw_set_plan(console: Console, stands: SetDestination) -> None:
    for disk in stands.disks:
        _draw_plan(console, disk)


def _draw_set_check(console: Console, stands: SetDestination) -> None:
    for disk in stands.disks:
        _draw_check(console, disk.model_copy(update={"commands": ()}), alone=False)
    _draw_commands(console, stands.commands, ready=stands.ready)


def _draw_set_report(console: Console, report: SetReport) -> None:
    for disk in report.disks:
        _draw_report(console, disk.model_copy(update={"commands": ()}), alone=False)
    predicted = report.predicted_cutover_seconds
    said = "are ready" if report.ready else "are not ready"
    render.headline(
        console, f"{counted(len(report.disks), 'disk')} {said}, {size(report.bytes_left)} left in their tops"
    )
    render.facts(
        console, [("predicted cutover", "not measured" if predicted is None else quantities.duration(predicted))]
    )
    _draw_commands(console, report.commands, ready=report.ready)


def _draw_plan(console: Console, stands: Destination) -> None:
    render.headline(console, f"would bring {render.place(stands.image)} to {stands.destination}::{stands.disk}")
    render.facts(console, [("to send", size(stands.bytes_to_send)), ("left in the top", size(stands.bytes_left))])
    _draw_missing(console, stands.missing)


def _draw_check(console: Console, stands: Destination, *, alone: bool = True) -> None:
    said = "is ready" if stands.ready else "is not ready"
    render.headline(console, f"{stands.destination}::{stands.disk} {said} for {render.place(stands.image)}")
    render.facts(
        console,
        [
            ("layers there", str(len(stands.layers))),
            ("left in the top", size(stands.bytes_left)),
            ("overlay", stands.overlay or ""),
        ],
    )
    _draw_missing(console, stands.missing)
    if alone:
        _draw_commands(console, stands.commands, ready=stands.ready)


def _draw_report(console: Console, report: SyncReport, *, alone: bool = True) -> None:
    said = "is ready" if report.ready else "is not ready"
    render.headline(console, f"{report.destination}::{report.disk} {said} for {render.place(report.image)}")
    predicted = report.predicted_cutover_seconds
    wire = "" if report.wire_bytes_left is None else f", about {size(report.wire_bytes_left)} on the wire"
    render.facts(
        console,
        [
            ("layers", f"{report.layers_sent} sent, {report.layers_present} there already"),
            ("on the wire", size(report.bytes_sent)),
            ("rate", "not measured" if report.rate is None else f"{size(int(report.rate))}/s"),
            ("left in the top", f"{size(report.bytes_left)}{wire}"),
            ("predicted cutover", "not measured" if predicted is None else quantities.duration(predicted)),
            ("rounds", "" if report.outcome is None else f"{len(report.rounds)}, ended by: {report.outcome.value}"),
            ("overlay", report.overlay or ""),
        ],
    )
    _draw_missing(console, report.missing)
    if alone:
        _draw_commands(console, report.commands, ready=report.ready)


def _draw_set_lacking(console: Console, stands: SetDestination | SetReport) -> None:
    for disk in stands.disks:
        _draw_lacking(console, disk)


def _draw_lacking(console: Console, disk: Destination | SyncReport) -> None:
    """What keeps it from being as it was wanted."""
    from snapchain.ops.sync.run import SyncReport

    if disk.missing:
        render.line(console, f"{disk.destination}::{disk.disk} is not ready")
        _draw_missing(console, disk.missing)
    if isinstance(disk, SyncReport) and disk.on_target is False:
        render.line(console, f"{disk.destination}::{disk.disk}: the target of {disk.target_downtime:g} s is not met")


def _draw_missing(console: Console, missing: tuple[str, ...]) -> None:
    for what in missing:
        render.line(console, f"missing: {what}", indent=2)


def _draw_commands(console: Console, commands: tuple[str, ...], *, ready: bool) -> None:
    if commands:
        render.headline(console, "to migrate the guest, on this host:")
    elif ready:
        render.line(console, "for the commands that migrate it, say --domain, --guest-disk and --dest-uri", indent=2)
    for command in commands:
        render.command(console, command, indent=2)
