"""`snapchain watch --domain NAME --every 5min DEST...`: keep destinations close behind a running guest."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from snapchain.cli import guest_options, options, policy_options, render, snapshot_options
from snapchain.cli.app import verb
from snapchain.cli.output import Output
from snapchain.cli.quantities import duration, moment, parse_size, size
from snapchain.errors import InvalidInput

if TYPE_CHECKING:
    from rich.console import Console

    from snapchain.destination.protocol import Destination
    from snapchain.ops.watch.lease_places import LeaseRequest
    from snapchain.ops.watch.run import RoundReport, WatchReport
    from snapchain.ops.watch.start import WatchPlan
    from snapchain.ops.watch.systemd import Unit

_LEASE = "A lease, for automatic failover"
_SHORTEST = 10.0
"""Seconds between two snapshots, at least."""


@verb(
    examples="""
    snapchain watch --domain web1 --every 5min /backup
    snapchain watch --domain web1 --every 1min ssh://root@kvm2/srv/replica s3://bucket/prefix --space-limit 50G
    snapchain watch --qmp /run/web1.qmp --every 15min /backup --merge-above 6 --metrics /var/lib/node/web1.prom
    snapchain watch --domain web1 --every 5min /backup --keep-within 2d --keep-daily 30
    snapchain watch --domain web1 --every 5min ssh://root@kvm2/srv/replica s3://bucket/prefix \
        --lease 30s --witness s3://bucket/prefix
    snapchain watch --domain web1 --every 5min /backup --print-systemd
    """,
    when_interrupted="every guest point that was reported is whole; start it again to go on",
)
@options.takes_output(passphrase=True)
@policy_options.takes_policy(panel="Points to keep at the destinations")
@guest_options.takes_guest()
@snapshot_options.takes_snapshot_options
def watch(
    dests: Annotated[
        list[str],
        options.address(metavar="DEST[::GUEST]...", help="Destinations, each with the guest's name there."),
    ],
    *,
    guest: Any,
    every: Annotated[
        str, typer.Option("--every", metavar="TIME", help="Take a snapshot and ship it every TIME: 90s, 5min, 1h.")
    ],
    snapshot: Any,
    label: options.Labels = None,
    merge_above: Annotated[
        int,
        typer.Option(
            "--merge-above", min=4, max=150, metavar="N", help="Merge layers of local chains of more than N files."
        ),
    ] = 8,
    full_speed: Annotated[
        bool, typer.Option("--full-speed", help="Merge as fast as possible, even if the guest feels it.")
    ] = False,
    space_limit: Annotated[
        str | None,
        typer.Option(
            "--space-limit",
            metavar="BYTES",
            help="Take no further snapshot while sealed layers of so many bytes wait for a destination: 50G.",
        ),
    ] = None,
    metrics: Annotated[
        Path | None,
        typer.Option(
            "--metrics",
            metavar="FILE",
            help="Write the lag to FILE after each round, for Prometheus' textfile collector.",
        ),
    ] = None,
    lease: Annotated[
        str | None,
        typer.Option(
            "--lease",
            metavar="TIME",
            help="The guest runs only as long as this watch can renew a lease of TIME at the first DEST or the "
            "witness: 30s, 2min. Else the guest is stopped. Read the page on failover first.",
            rich_help_panel=_LEASE,
        ),
    ] = None,
    witness: Annotated[
        str | None,
        typer.Option(
            "--witness",
            autocompletion=options.complete_address,
            metavar="DEST",
            help="With --lease: another destination that has points of the guest, and where it is renewed too.",
            rich_help_panel=_LEASE,
        ),
    ] = None,
    limit_rate: options.LimitRate = None,
    image_dir: options.ImageDir = None,
    print_systemd: Annotated[
        bool, typer.Option("--print-systemd", help="Print a systemd service for this command, and do nothing else.")
    ] = False,
    policy: Any,
    out: Output,
) -> None:
    """Keep destinations close behind a guest: every TIME take a snapshot and ship it, until the command is stopped.

    Each round publishes one guest point at each destination, as `ship` does. Merges under the running guest keep local
    chains short. After each round the --keep-* rules are applied to the guest points of each destination.

    While a destination does not answer, it is tried again with growing pauses, and sealed layers collect here. When
    they reach --space-limit, those that no destination has are merged, and then no further snapshot is taken until they
    are shipped. If another destination answers, the first one is left behind instead: it then needs a shipment that
    reads the disks whole.

    With --lease the host of the guest fences itself, so that `failover --lease` elsewhere needs no fence program. Two
    guard processes stop the guest's QEMU by SIGSTOP when the lease was not renewed in time, or when one of them is
    killed. The guest continues when a renewal succeeds again, and stays stopped once another host has taken it over.
    To end the watch ends the lease.

    Prints a line for each round; with --json an object a line, with the lag of each destination in seconds and bytes.
    SIGTERM and Ctrl-C end it with exit code 0. Started again, it continues. --dry-run shows the first round.
    """
    from snapchain.ops.watch.rounds import Rules

    if guest is None:
        raise InvalidInput("no guest is named", hint="--domain NAME or --qmp SOCKET")
    if witness is not None and lease is None:
        raise InvalidInput("--witness belongs to --lease")
    seconds = _seconds(every)
    rules = Rules(
        every=seconds, merge_above=merge_above, space_limit=None if space_limit is None else parse_size(space_limit)
    )
    name, opens = _destinations(dests, out, limit_rate=limit_rate)
    if print_systemd:
        from snapchain.ops.watch.systemd import unit

        words = [word for word in sys.argv[1:] if word not in {"--print-systemd", "--dry-run"}]
        out.show(unit(guest, words, program=options.program(), metrics=metrics, dests=list(opens)), _draw_unit)
        return
    from dataclasses import replace

    from snapchain.guest.snapshot import SnapshotRequest
    from snapchain.ops.watch.guest_work import WatchRequest
    from snapchain.ops.watch.start import plan, start

    request = WatchRequest(
        guest=guest,
        name=name,
        snapshot=replace(snapshot or SnapshotRequest(), labels=label or (), image_dirs=options.image_dirs(image_dir)),
        policy=policy,
        idle=not full_speed,
    )

    if out.dry_run:
        out.plan(plan(request, opens, rules, on_event=out.on_event), _draw_plan)
        return

    def tell(report: RoundReport) -> None:
        if report.is_news:
            out.row(report, _draw_round)

    held = None if lease is None else _lease(lease, witness, next(iter(opens)), out)
    done = start(request, opens, rules, lease=held, metrics=metrics, on_round=tell, on_event=out.on_event)
    out.row(done, _draw_end)


def _seconds(text: str) -> float:
    from snapchain.ops.nightly.values import to_seconds

    try:
        seconds = to_seconds(text)
    except ValueError as error:
        raise InvalidInput(str(error), subject="--every") from error
    assert isinstance(seconds, float)
    if seconds < _SHORTEST:
        raise InvalidInput(f"the shortest interval is {_SHORTEST:g} seconds", subject="--every")
    return seconds


def _lease(text: str, witness: str | None, first: str, out: Output) -> LeaseRequest:
    """The lease at the first destination, and at the witness."""
    from snapchain.destination.address import parse_destination
    from snapchain.model.lease import LONGEST, SHORTEST
    from snapchain.ops.nightly.values import to_seconds
    from snapchain.ops.watch.lease_places import LeasePlace, LeaseRequest

    try:
        seconds = to_seconds(text)
    except ValueError as error:
        raise InvalidInput(str(error), subject="--lease") from error
    if not isinstance(seconds, float) or not seconds.is_integer() or not SHORTEST <= seconds <= LONGEST:
        raise InvalidInput(f"a lease has whole seconds, from {SHORTEST} to {LONGEST}", subject="--lease")

    def place(dest: str) -> LeasePlace:
        return LeasePlace(dest, partial(options.destination, dest, out, writing=True))

    other = None if witness is None else parse_destination(witness).dest
    if other == first:
        raise InvalidInput("the witness is the first destination itself", subject=witness, hint="name another one")
    return LeaseRequest(seconds=int(seconds), destination=place(first), witness=None if other is None else place(other))


def _destinations(
    dests: list[str], out: Output, *, limit_rate: str | None
) -> tuple[str | None, dict[str, Callable[[], Destination]]]:
    """The guest's name there, None for its own, and how each destination is opened."""
    from snapchain.destination.address import PointAddress, parse_destination, parse_disk_address
    from snapchain.destinations import traits_of

    names: set[str | None] = set()
    opens: dict[str, Callable[[], Destination]] = {}
    for text in dests:
        address = parse_destination(text)
        names.add(parse_disk_address(text).disk if isinstance(address, PointAddress) else None)
        if address.dest in opens:
            raise InvalidInput("the destination is named twice", subject=address.dest)
        traits_of(address.dest)
        opens[address.dest] = partial(
            options.destination, address.dest, out, writing=not out.dry_run, limit_rate=limit_rate
        )
    if len(names) > 1:
        raise InvalidInput(
            "the guest has one name at all destinations", hint="write ::GUEST after each DEST, or nowhere"
        )
    return names.pop(), opens


def _draw_plan(console: Console, plan: WatchPlan) -> None:
    from snapchain.cli.ship import draw_guest_plan

    for shipment in plan.shipments:
        draw_guest_plan(console, shipment)
    render.line(console, f"and so every {duration(plan.every)}, with merges and rules, until it is stopped")


def _draw_round(console: Console, report: RoundReport) -> None:
    """One line, and a line for each thing that is not as it should be."""
    parts = []
    if report.snapshot is not None:
        level = "" if report.consistency is None else f" ({report.consistency.value})"
        parts.append(f"snapshot{level}")
    if report.merged:
        parts.append(f"merged {report.merged} away")
    for each in report.destinations:
        lag = "nothing there yet" if each.lag_seconds is None else f"{duration(each.lag_seconds)} behind"
        shipped = "" if each.shipped is None else f" point {each.shipped.guest_point}, {size(each.shipped.bytes_read)},"
        parts.append(f"{each.destination}:{shipped} {lag}")
    render.line(console, f"{moment(report.time)} {report.guest}: {'; '.join(parts)}")
    for each in report.destinations:
        if each.error is not None:
            render.line(
                console,
                f"{each.destination}: {each.error}; next attempt in {duration(each.retry_seconds or 0)}",
                style="yellow",
                indent=2,
            )
        if each.left_behind:
            render.line(
                console, f"{each.destination}: left behind: it will read the disks whole", style="yellow", indent=2
            )
    if report.held_back is not None:
        render.line(console, f"no snapshot: {report.held_back}", style="red", indent=2)
    if report.lease is not None:
        words = {
            "none": "there is none yet",
            "paused": "not renewed: the guest is stopped",
            "taken": "another host has it",
        }
        if report.lease.state in words:
            render.line(console, f"lease: {words[report.lease.state]}", style="red", indent=2)
        for fault in report.lease.faults:
            render.line(console, f"lease: {fault}", style="yellow", indent=2)
    for fault in report.faults:
        render.line(console, fault, style="red", indent=2)


def _draw_end(console: Console, report: WatchReport) -> None:
    counts = f"{report.rounds} rounds, {report.snapshots} snapshots, {report.points} guest points"
    render.headline(console, f"{report.guest}: ended after {counts}")


def _draw_unit(console: Console, unit: Unit) -> None:
    render.command(console, f"# {unit.path}\n{unit.text}")
