"""`snapchain migrate DEST`: move a guest to another host: while it runs, or its disks when it does not."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypedDict

import typer

from snapchain.cli import guest_options, options, quantities, render
from snapchain.cli.app import verb
from snapchain.cli.options import disk_pairs
from snapchain.cli.output import Output
from snapchain.cli.quantities import size
from snapchain.errors import InvalidInput
from snapchain.guest.address import GuestAddress
from snapchain.host.terminal import counted

if TYPE_CHECKING:
    from rich.console import Console

    from snapchain.guest.protocol import Guest
    from snapchain.ops.migrate.live_request import AbortReport, LivePlan, LiveReport
    from snapchain.ops.migrate.run import MigratePlan, MigrateReport, TakeBackPlan, TakeBackReport
    from snapchain.ops.other_destinations import Reach
    from snapchain.ops.ship.request import Divergence

_BACK = "To go back"
_LIVE = "For a running guest"
_WAY_BACK = "`snapchain failback --prepare` here makes a replica of these files, so that only what differs comes back"
MovedDisks = Annotated[
    list[str] | None,
    options.address(
        metavar="[IMAGE DEST::DISK]...",
        help="The top of a chain, and a disk at a replica: ssh://\\[user@]host/path or dir:/path. More pairs "
        "are other disks of the same guest, at the same replica. With --domain or --qmp: the replica only.",
    ),
]


@verb(
    examples="""
    snapchain migrate --domain web1 ssh://root@kvm2/srv/replica
    snapchain migrate --domain web1 --abort
    snapchain migrate --qmp /run/web1.qmp ssh://root@kvm2/srv/replica
    snapchain migrate --qmp /run/web1.qmp ssh://root@kvm2/srv/replica --max-downtime 0.5 --auto-converge
    snapchain migrate web1.qcow2 ssh://root@kvm2/srv/replica::web1/vda --offline
    snapchain migrate a.qcow2 ssh://kvm2/srv/replica::web1/vda b.qcow2 ssh://kvm2/srv/replica::web1/vdb --offline
    snapchain migrate web1.qcow2 ssh://kvm2/srv/replica::web1/vda --offline --start-hook 'ssh kvm2 virsh start web1'
    snapchain migrate web1.qcow2 ssh://kvm2/srv/replica::web1/vda --take-back
    """,
    when_interrupted="run it again to go on; `inspect` shows whether the disk was given away already, and --take-back "
    "undoes that as long as no guest has written there. A running guest goes on here, unless its move was done",
)
@options.takes_output(passphrase=True)
@guest_options.takes_guest()
def migrate(
    disks: MovedDisks = None,
    *,
    guest: GuestAddress | None,
    max_downtime: Annotated[
        float,
        typer.Option(
            "--max-downtime",
            metavar="SECONDS",
            help="How long the guest may be paused. Refused beforehand where that cannot be met.",
            rich_help_panel=_LIVE,
        ),
    ] = 1.0,
    bandwidth: Annotated[
        str | None,
        typer.Option(
            "--bandwidth",
            metavar="SIZE",
            help="Bytes a second for shipping, for the mirrors and for the memory, such as 100M.",
            rich_help_panel=_LIVE,
        ),
    ] = None,
    auto_converge: Annotated[
        bool,
        typer.Option(
            "--auto-converge",
            help="Slow the guest down where it dirties memory faster than the link carries.",
            rich_help_panel=_LIVE,
        ),
    ] = False,
    rounds: Annotated[
        int | None,
        typer.Option("--rounds", min=1, help="Seal and ship at most this many times before.", rich_help_panel=_LIVE),
    ] = None,
    dest_uri: Annotated[
        str | None,
        typer.Option(
            "--dest-uri",
            metavar="URI",
            help="URI of libvirt at the destination. By default its daemon is reached through ssh, as the replica is.",
            rich_help_panel=_LIVE,
        ),
    ] = None,
    start_command: Annotated[
        str | None,
        typer.Option(
            "--start-command",
            metavar="COMMAND",
            help="With --qmp: start QEMU at the destination by COMMAND (no shell), not by the guest's own command "
            "line. It must have -S, -incoming defer and a monitor at SNAPCHAIN_QMP. Its environment has "
            "SNAPCHAIN_OVERLAY_1, 2... of SNAPCHAIN_DISK_1, 2...",
            rich_help_panel=_LIVE,
        ),
    ] = None,
    before: Annotated[
        str | None,
        typer.Option(
            "--before", metavar="COMMAND", help="Run COMMAND here (no shell) before all else.", rich_help_panel=_LIVE
        ),
    ] = None,
    after: Annotated[
        str | None,
        typer.Option(
            "--after",
            metavar="COMMAND",
            help="Run COMMAND here (no shell) once the guest runs there.",
            rich_help_panel=_LIVE,
        ),
    ] = None,
    abort: Annotated[
        bool,
        typer.Option(
            "--abort",
            help="End a live migration that was interrupted: the guest goes on here, unless the destination has it.",
            rich_help_panel=_LIVE,
        ),
    ] = False,
    offline: Annotated[
        bool, typer.Option("--offline", help="The guest is shut down, or paused: see --paused.")
    ] = False,
    paused: Annotated[
        bool,
        typer.Option(
            "--paused",
            help="You have paused the guest (virsh suspend), and it still has the images open. Nothing is sealed. "
            "Never resume it here.",
        ),
    ] = False,
    start_hook: Annotated[
        str | None,
        typer.Option(
            "--start-hook",
            metavar="COMMAND",
            help="Run COMMAND here (no shell) to start the guest, once the destination "
            "has the disks. Its environment has "
            "SNAPCHAIN_DISK, _OVERLAY, _EPOCH, _IMAGE and _DESTINATION, with _1, _2... for several disks.",
        ),
    ] = None,
    prove: Annotated[
        bool,
        typer.Option("--prove", help="Read every layer at the destination again before the disks are handed over."),
    ] = False,
    take_back: Annotated[
        bool,
        typer.Option(
            "--take-back",
            help="Make the disks this host's again. Refused if a guest has written to them there.",
            rich_help_panel=_BACK,
        ),
    ] = False,
    destination_is_gone: Annotated[
        bool,
        typer.Option(
            "--destination-is-gone",
            help="With --take-back or --abort: do not contact the destination. You must make sure that "
            "no guest runs there, now or later.",
            rich_help_panel=_BACK,
        ),
    ] = False,
    label: options.Labels = None,
    cut_replica: options.CutReplica = False,
    connections: options.Connections = 1,
    image_format: options.Format = None,
    image_dir: options.ImageDir = None,
    limit_rate: options.LimitRate = None,
    at: options.OtherAt = None,
    without: options.Without = None,
    out: Output,
) -> None:
    """Move a guest to another host: while it runs, or its disks when it does not. All disks, or none.

    A running guest is named by --domain, or by --qmp where it has no libvirt. What is sealed is shipped in rounds, as
    by `sync`. Then the disks and the memory are copied while the guest runs. It is paused for the switch, and goes on
    there. Until the switch anything that fails, and Ctrl-C, lets it go on here as before. Through ssh no port needs to
    be opened.

    A domain is moved by libvirt. It is defined there, and here its definition is removed. For a QEMU without libvirt,
    snapchain starts the one at the destination with the command line from here.

    Of a guest that does not run, name the disks. First each top is sealed, the layers that the replica lacks are sent,
    and an empty overlay for the guest is made there. Until then, and whenever the destination refuses, the disks stay
    this host's.

    Then, with the images locked, they are marked as given away and made read-only here. The destination takes them over
    in a new epoch, and the start hook runs. From then on snapchain neither writes nor sends these images here, and the
    replica refuses whatever this host sends. The guest's other destinations hear of it before: one of them that has
    heard of a failover refuses the move, and one that does not answer stops it, unless you vouch for it.

    If it is interrupted, run the same command again: it continues.
    """
    if guest is not None:
        _check_live(offline=offline or paused or take_back, unasked=destination_is_gone, abort=abort)
        live = _Live(
            max_downtime=max_downtime,
            bandwidth=None if bandwidth is None else quantities.parse_size(bandwidth),
            auto_converge=auto_converge,
            rounds=rounds,
            dest_uri=dest_uri,
            command=_program(start_command, "--start-command"),
            before=_program(before, "--before"),
            after=_program(after, "--after"),
            labels=label or (),
            divergence=_divergence(cut=cut_replica),
            image_dirs=options.image_dirs(image_dir),
            reach=options.reach(at, without, out),
        )
        _migrate_guest(guest, disks or [], live, abort=abort, is_gone=destination_is_gone, out=out)
        return
    from snapchain.destinations import replica_at
    from snapchain.ops.migrate.request import MigrateRequest, Move
    from snapchain.ops.migrate.run import migrate as run, plan, plan_take_back, take_back as undo

    if abort:
        raise InvalidInput("--abort is for a running guest", hint="name it by --domain or --qmp; disks: --take-back")
    _check(offline=offline, paused=paused, take_back=take_back, unasked=destination_is_gone)
    if not disks:
        raise InvalidInput("nothing is named", hint="name pairs of IMAGE DEST::DISK, or a guest and DEST")
    dest, pairs = disk_pairs(disks)
    endpoint = replica_at(dest, connections=connections)
    request = MigrateRequest(
        moves=[Move(image, disk) for image, disk in pairs],
        paused=paused,
        prove=prove,
        start_hook=_program(start_hook, "--start-hook"),
        labels=label or (),
        divergence=_divergence(cut=cut_replica),
        format=options.format_of(image_format),
        image_dirs=options.image_dirs(image_dir),
        limit_rate=None if limit_rate is None else quantities.parse_size(limit_rate),
        reach=options.reach(at, without, out),
    )
    if take_back and out.dry_run:
        out.plan(plan_take_back(request, endpoint, unasked=destination_is_gone), _draw_take_back_plan)
    elif take_back:
        out.report(undo(request, endpoint, unasked=destination_is_gone, on_event=out.on_event), _draw_take_back)
    elif out.dry_run:
        out.plan(plan(request, endpoint, on_event=out.on_event), _draw_plan)
    else:
        out.report(run(request, endpoint, on_event=out.on_event), _draw_report)


def _check(*, offline: bool, paused: bool, take_back: bool, unasked: bool) -> None:
    if unasked and not take_back:
        raise InvalidInput("--destination-is-gone is for --take-back")
    if not offline and not paused and not take_back:
        raise InvalidInput(
            "only disks of a guest that does not run can be handed over",
            hint="shut it down and say --offline, or pause it and say --paused; one that runs is named by --domain or "
            "--qmp",
        )


def _check_live(*, offline: bool, unasked: bool, abort: bool) -> None:
    if offline:
        raise InvalidInput("--offline, --paused and --take-back are for disks", hint="name IMAGE DEST::DISK instead")
    if unasked and not abort:
        raise InvalidInput("--destination-is-gone is for --abort, and for --take-back of disks")


class _Live(TypedDict):
    """What is asked of the migration of a running guest."""

    max_downtime: float
    bandwidth: int | None
    auto_converge: bool
    rounds: int | None
    dest_uri: str | None
    command: Sequence[str]
    before: Sequence[str]
    after: Sequence[str]
    labels: Sequence[str]
    divergence: Divergence
    image_dirs: Sequence[Path]
    reach: Reach


def _divergence(*, cut: bool) -> Divergence:
    from snapchain.ops.ship.request import Divergence

    return Divergence.CUT_REPLICA if cut else Divergence.REFUSE


def _migrate_guest(
    address: GuestAddress, words: Sequence[str], asked: _Live, *, abort: bool, is_gone: bool, out: Output
) -> None:
    from snapchain.guest.address import open_guest
    from snapchain.ops.migrate.live import abort as end

    if abort:
        if words:
            raise InvalidInput("--abort needs no destination: it is recorded", subject=words[0])
        out.report(end(address, is_gone=is_gone, on_event=out.on_event), _draw_settled)
        return
    with open_guest(address, on_event=out.on_event) as guest:
        _move(guest, words, asked, out)


def _move(guest: Guest, words: Sequence[str], asked: _Live, out: Output) -> None:
    from snapchain.destination.address import PointAddress, parse_destination, parse_disk_address
    from snapchain.destinations import replica_at
    from snapchain.ops.migrate.live import migrate_live, plan_live
    from snapchain.ops.migrate.live_request import LiveRequest

    if len(words) != 1:
        raise InvalidInput("a guest goes to one destination", hint="name one DEST: ssh://host/path")
    named = parse_destination(words[0])
    prefix = parse_disk_address(words[0]).disk if isinstance(named, PointAddress) else None
    request = LiveRequest(prefix=prefix, **asked)
    endpoint = replica_at(named.dest)
    if out.dry_run:
        out.plan(plan_live(guest, request, endpoint, on_event=out.on_event), _draw_live_plan)
    else:
        out.report(migrate_live(guest, request, endpoint, on_event=out.on_event), _draw_live)


def _draw_plan(console: Console, plan: MigratePlan) -> None:
    render.headline(console, f"would hand over to {render.place(plan.destination)}, {size(plan.bytes_to_send)} to send")
    render.table(
        console,
        ["disk", "image", "to send>", "epoch>", "state~"],
        [
            (
                each.disk,
                render.place(each.image),
                size(each.bytes_to_send),
                str(each.epoch),
                each.in_use or ("given already" if each.given else "its top is sealed first" if each.seals else ""),
            )
            for each in plan.disks
        ],
    )


def _draw_report(console: Console, report: MigrateReport) -> None:
    said = {"new": "handed over", "resumed": "handed over, as begun earlier,", "done": "was handed over already"}
    render.headline(console, f"{said[report.course.value]} to {render.place(report.destination)}")
    render.table(
        console,
        ["disk", "epoch>", "for the guest there", "read-only here~"],
        [
            (each.disk, str(each.epoch), each.overlay, ", ".join(map(render.place, each.fenced)))
            for each in report.disks
        ],
    )
    started = {None: "no hook: start the guest there on the files above", True: "by the hook", False: "no"}
    render.facts(
        console,
        [
            ("on the wire", size(report.bytes_sent)),
            ("cutover", quantities.duration(report.cutover_seconds)),
            ("started", started[report.started]),
            ("way back", _WAY_BACK),
        ],
    )


def _draw_live_plan(console: Console, plan: LivePlan) -> None:
    to_send = sum(disk.bytes_to_send for disk in plan.disks)
    render.headline(
        console, f"would move {plan.guest} to {render.place(plan.destination)}, {size(to_send)} of layers to send first"
    )
    render.table(
        console,
        ["disk", "image", "to send>", "left in the top>"],
        [(each.disk, render.place(each.image), size(each.bytes_to_send), size(each.bytes_left)) for each in plan.disks],
    )
    dirty = plan.memory_dirty_rate
    render.facts(
        console,
        [
            ("memory dirtied", "not measured" if dirty is None else f"{size(int(dirty))}/s"),
            ("pause", f"at most {quantities.duration(plan.max_downtime)}"),
        ],
    )


def _draw_live(console: Console, report: LiveReport) -> None:
    render.headline(console, f"{report.guest} runs at {render.place(report.destination)}")
    render.table(
        console,
        ["disk", "epoch>", "its file there", "read-only here~"],
        [
            (each.disk, str(each.epoch), each.overlay, ", ".join(map(render.place, each.fenced)))
            for each in report.disks
        ],
    )
    pause = "not measured" if report.pause is None else f"{report.pause:.2f} s"
    bound = "" if report.pause_within is not False else f", more than {report.max_downtime:g} s"
    render.facts(
        console,
        [
            *([("its monitor there", report.qmp)] if report.qmp else []),
            ("layers on the wire", size(report.bytes_sent)),
            ("memory on the wire", f"{size(report.memory_bytes)} in {counted(report.memory_rounds, 'round')}"),
            ("pause", f"{pause}{bound}; predicted {report.predicted_pause:.2f} s"),
            ("took", quantities.duration(report.seconds)),
            ("way back", _WAY_BACK),
        ],
    )


def _draw_settled(console: Console, report: AbortReport) -> None:
    if not report.settled:
        render.headline(console, "no migration was left")
    for each in report.settled:
        render.headline(console, f"the migration of {each.guest} to {render.place(each.destination)} is ended")
        render.line(console, each.says, indent=2)


def _draw_take_back_plan(console: Console, plan: TakeBackPlan) -> None:
    word = "" if plan.asked else ", without asking that host"
    render.headline(console, f"would take back from {render.place(plan.destination)}{word}")
    for image, disk, epoch in zip(plan.images, plan.disks, plan.epochs, strict=True):
        render.line(console, f"{disk}: {render.place(image)} would be this host's again, in epoch {epoch}", indent=2)


def _draw_take_back(console: Console, report: TakeBackReport) -> None:
    render.headline(console, f"taken back from {render.place(report.destination)}")
    for image, disk, epoch in zip(report.images, report.disks, report.epochs, strict=True):
        render.line(console, f"{disk}: {render.place(image)} is this host's again, in epoch {epoch}", indent=2)


def _program(command: str | None, option: str) -> tuple[str, ...]:
    return () if command is None else options.argv_of(command, option=option)
