"""`snapchain merge ADDRESS`: make one layer of several, in a chain of files or at a destination."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import tzinfo
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from snapchain.cli import guest_options, merge_tables, options, policy_options, quantities
from snapchain.cli.app import verb
from snapchain.cli.output import Output
from snapchain.errors import Corrupt, InvalidInput, NotFound, PartialFailure
from snapchain.guest.address import GuestAddress
from snapchain.model.merging import Strategy
from snapchain.model.retention import Policy

if TYPE_CHECKING:
    from snapchain.destination.protocol import Destination
    from snapchain.ops.merge import At, MergeRequest

_RANGE = "Which layers of an image"
_KEEP = "Which points of a disk, or sealed layers of an image, to keep"
_LIMIT = "How much to merge of an image"
_HOW = "How to merge an image"
_GUEST = "A running guest"

_STRATEGIES = [each.value for each in Strategy if each is not Strategy.NOTHING]


@verb(
    examples="""
    snapchain merge /images/web1.qcow2
    snapchain merge /images/web1.qcow2 --flatten --dry-run
    snapchain merge /images/web1.qcow2 --from web1.2.qcow2 --to web1.5.qcow2
    snapchain merge /images/web1.qcow2 --keep-daily 7 --keep-label golden --at /backup::web1/vda
    snapchain merge /images/web1.qcow2 --max-layers 8 --budget-bytes 20G --budget-seconds 600
    snapchain merge --domain web1 --keep-daily 7 --max-layers 8 --idle
    snapchain merge --qmp /run/web1.qmp --disk vda --dry-run
    snapchain merge /backup::web1/vda --keep-last 7 --keep-weekly 4 --keep-label release
    snapchain merge ssh://root@kvm2/srv/replica::web1/vda --keep-last 7 --dry-run
    snapchain merge /backup::web1 --keep-daily 7 --keep-monthly 12
    """,
    when_interrupted="the chain is as it was, or merged, and reads the same either way; run it again to finish",
)
@options.takes_output(passphrase=True)
@policy_options.takes_policy(panel=_KEEP)
@policy_options.takes_zone(panel=_KEEP)
@guest_options.takes_guest(instead_of="target", metavar="ADDRESS")
def merge(
    target: Annotated[
        str | None,
        options.address(metavar="ADDRESS", help="An image, or DEST::DISK or DEST::GUEST at a destination."),
    ] = None,
    *,
    guest: GuestAddress | None,
    disks: Annotated[
        list[str] | None,
        typer.Option(
            "--disk",
            metavar="NAME",
            help="A disk of the guest, by default all. May be repeated.",
            rich_help_panel=_GUEST,
        ),
    ] = None,
    idle: Annotated[
        bool,
        typer.Option(
            "--idle", help="Slow down while the guest's own I/O takes longer than before.", rich_help_panel=_GUEST
        ),
    ] = False,
    limit_rate: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE", help="Move at most SIZE a second while the guest runs: 100M.", rich_help_panel=_GUEST
        ),
    ] = None,
    flatten: Annotated[
        bool,
        typer.Option("--flatten", help="Merge the root too. Without rules one file is left.", rich_help_panel=_RANGE),
    ] = False,
    first: Annotated[
        str | None, typer.Option("--from", metavar="LAYER", help="The lowest layer.", rich_help_panel=_RANGE)
    ] = None,
    last: Annotated[
        str | None, typer.Option("--to", metavar="LAYER", help="The highest layer.", rich_help_panel=_RANGE)
    ] = None,
    at: Annotated[
        list[str] | None,
        typer.Option(
            "--at",
            metavar="DEST::DISK",
            autocompletion=options.complete_address,
            help="A destination to which the image is shipped. Rules merge no layer that is missing there, and not the "
            "layer on which the next shipment builds. May be repeated.",
            rich_help_panel=_RANGE,
        ),
    ] = None,
    policy: Policy,
    zone: tzinfo,
    max_layers: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="Merge only until the chain has N files. Layers that a rule or a hold keeps stay even then.",
            rich_help_panel=_LIMIT,
        ),
    ] = None,
    budget_bytes: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Move at most SIZE, where that frees most: 20G. Shared blocks do not count.",
            rich_help_panel=_LIMIT,
        ),
    ] = None,
    budget_seconds: Annotated[
        float | None,
        typer.Option(
            metavar="N",
            min=0,
            help="Take at most N seconds, estimated by the rate of earlier merges on this filesystem.",
            rich_help_panel=_LIMIT,
        ),
    ] = None,
    strategy: Annotated[
        str | None,
        typer.Option(
            metavar="|".join(_STRATEGIES),
            autocompletion=options.of(*_STRATEGIES),
            help="Write a new file, or merge into the uppermost or the lowest file. By default whichever moves least.",
            rich_help_panel=_HOW,
        ),
    ] = None,
    cluster_size: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Cluster size of a new file: 512 to 2M. By default that of the layer with most of the data.",
            rich_help_panel=_HOW,
        ),
    ] = None,
    keep_inputs: Annotated[
        bool, typer.Option("--keep-inputs", help="Remove no file that was merged.", rich_help_panel=_HOW)
    ] = False,
    remove: Annotated[
        list[Path] | None,
        typer.Option(
            "--remove",
            readable=False,
            metavar="FILE",
            help="Allow FILE to be removed or replaced although it lies in another directory than the image, or an "
            "unreadable image may depend on it. A file that another image uses stays. May be repeated.",
            rich_help_panel=_HOW,
        ),
    ] = None,
    drop_bitmaps: Annotated[
        bool,
        typer.Option(
            "--drop-bitmaps", help="Merge layers with persistent bitmaps, and drop the bitmaps.", rich_help_panel=_HOW
        ),
    ] = False,
    image_format: options.Format = None,
    image_dir: options.ImageDir = None,
    out: Output,
) -> None:
    """Make one layer of several neighbours, and drop data that was overwritten.

    An IMAGE, without rules: everything above the root, or the layers from --from to --to, become one overlay under the
    same path. The bytes that a guest reads are compared before the switch. Until then the inputs are valid.

    An IMAGE, with rules: each sealed layer is a point, with the time and the labels that `snapchain snapshot` recorded.
    The points that a rule names stay. The other layers are merged into the next one that stays. --max-layers merges
    only as many as needed, the cheapest first. A budget merges those that free most within it. Rules never touch the
    root (without --flatten), held layers (`snapchain hold`), layers that other images depend on, and layers that --at
    protects. --dry-run shows the decision for each layer.

    DEST::DISK: the points that the rules name, held points and the newest point stay. Layers that none of them needs
    are merged into the next one that stays. In a repository only records change, and no data is moved. At a replica
    (ssh://..., dir:...) files are merged on its own host; the files of points that stay keep their names. A file that a
    guest or another image uses stays. Transfers to that disk wait until the merge ends.

    DEST::GUEST: the rules choose guest points. A guest point stays with the points of all its disks, or goes with them.
    So rules are refused for one disk of a guest. What an interrupted shipment left goes too.

    --domain, --qmp: the disks of a guest, with the same rules. While it runs, its QEMU moves the data: into the lowest
    layer (commit) or into the uppermost (absorb), whichever moves less. No file that it has open is renamed, and
    the guest goes on writing. The result is compared with the layers before these are removed. Here --at takes
    DEST or DEST::GUEST.

    A count of -1 means all.
    """
    from snapchain.destination.address import ImageAddress, parse_address, parse_disk_address
    from snapchain.ops import merge as ops

    if guest is None and (disks or idle or limit_rate is not None):
        raise InvalidInput("--disk, --idle and --limit-rate are for guests", hint="name one: --domain or --qmp")
    address = None if target is None else parse_address(target)
    if address is None or isinstance(address, ImageAddress):
        request = ops.MergeRequest(
            image=Path() if address is None else address.path,
            flatten=flatten,
            from_layer=first,
            to_layer=last,
            strategy=_strategy(strategy),
            cluster_size=None if cluster_size is None else quantities.parse_size(cluster_size),
            keep_inputs=keep_inputs,
            drop_bitmaps=drop_bitmaps,
            remove=tuple(remove or ()),
            image_format=options.format_of(image_format),
            image_dirs=tuple(options.image_dirs(image_dir)),
            policy=policy,
            zone=zone,
            max_layers=max_layers,
            budget_bytes=None if budget_bytes is None else quantities.parse_size(budget_bytes),
            budget_seconds=budget_seconds,
            at=() if address is None else _at(at or (), out),
        )
        if guest is not None:
            rate = 0 if limit_rate is None else quantities.parse_size(limit_rate)
            _merge_guest(guest, request, out, disks=disks or (), at=at or (), limit_rate=rate, idle=idle)
            return
        from snapchain.model.events import Notice

        plan = ops.plan(request)
        if out.plan(plan, merge_tables.draw_plan):
            return
        for notice in plan.notices:
            out.on_event(Notice(notice))
        report = ops.run(plan, on_event=out.on_event)
        status = PartialFailure.exit_code if report.failed else 0
        out.report(report, merge_tables.draw_report, problems=merge_tables.draw_failed, status=status)
        return
    assert target is not None
    _refuse_no_rule(
        policy,
        target,
        files_only=flatten
        or keep_inputs
        or drop_bitmaps
        or any(
            given is not None
            for given in (first, last, at, remove, max_layers, budget_bytes, budget_seconds, strategy, cluster_size)
        ),
    )
    from snapchain.ops.guest_points import find_guest

    disk = parse_disk_address(target).disk
    place = options.destination(address.dest, out, writing=not out.dry_run)
    try:
        work = place.merging(disk, policy, zone=zone)
        if out.dry_run:
            out.plan(work.plan(), merge_tables.draw_points_plan)
            return
        done = work.run(on_event=out.on_event)
    except NotFound:
        if find_guest(place, disk) is None:
            raise
        _merge_guest_points(place, disk, policy, zone, out)
        return
    status = Corrupt.exit_code if done.findings else 0
    problems = merge_tables.draw_points_findings
    out.report(done, merge_tables.draw_points_report, problems=problems, status=status)


def _merge_guest_points(place: Destination, guest: str, policy: Policy, zone: tzinfo, out: Output) -> None:
    from snapchain.ops import guest_points_merge as ops

    if out.dry_run:
        out.plan(ops.plan(place, guest, policy, zone=zone), merge_tables.draw_guest_points_plan)
        return
    done = ops.run(place, guest, policy, zone=zone, on_event=out.on_event)
    status = Corrupt.exit_code if done.findings else PartialFailure.exit_code if done.failed else 0
    out.report(
        done, merge_tables.draw_guest_points_report, problems=merge_tables.draw_guest_points_problems, status=status
    )


def _merge_guest(
    address: GuestAddress,
    request: MergeRequest,
    out: Output,
    *,
    disks: Sequence[str],
    at: Sequence[str],
    limit_rate: int,
    idle: bool,
) -> None:
    from snapchain.guest.address import open_guest
    from snapchain.model.events import Notice
    from snapchain.ops import guest_chain_merge as ops

    with open_guest(address, on_event=out.on_event) as guest:
        names = [disk.name for disk in guest.disks()] if at else []
        there = [_guest_at(each, guest.name) for each in at]
        wanted = ops.GuestMergeRequest(
            request=request,
            disks=tuple(disks),
            at={name: _at([f"{each}/{name}" for each in there], out) for name in names},
            limit_rate=limit_rate,
            idle=idle,
        )
        plan = ops.plan(guest, wanted)
        if out.plan(plan, merge_tables.draw_guest_plan):
            return
        for each in plan.disks:
            for notice in each.notices:
                out.on_event(Notice.of(f"{plan.guest}/{each.disk}", notice))
        report = ops.run(guest, plan, on_event=out.on_event)
    status = PartialFailure.exit_code if report.has_failed else 0
    out.report(report, merge_tables.draw_guest_report, problems=merge_tables.draw_guest_failed, status=status)


def _guest_at(address: str, guest: str) -> str:
    """DEST::GUEST; of a destination alone the guest by its own name, as `ship` calls it."""
    from snapchain.destination.address import DestinationAddress, parse_destination

    return f"{address}::{guest}" if isinstance(parse_destination(address), DestinationAddress) else address


def _strategy(text: str | None) -> Strategy | None:
    if text is not None and text not in _STRATEGIES:
        raise InvalidInput(f"unknown strategy {text!r}", hint=", ".join(_STRATEGIES))
    return None if text is None else Strategy(text)


def _at(names: Sequence[str], out: Output) -> tuple[At, ...]:
    from snapchain.destination.address import parse_disk_address
    from snapchain.ops.merge import held_at

    found = []
    for name in names:
        address = parse_disk_address(name)
        opened = options.destination(address.dest, out)
        if not opened.traits.branches:
            raise InvalidInput(
                f"--at takes a disk of a repository, and that is a {opened.traits.kind}",
                subject=name,
                hint="leave it out: `snapchain send` recognises at a replica what a merge has made of its layers",
            )
        found.append(held_at(name, opened, address.disk))
    return tuple(found)


def _refuse_no_rule(policy: Policy, target: str, *, files_only: bool) -> None:
    if files_only:
        raise InvalidInput(
            "only --keep-..., --time-zone and the passphrase are for disks at destinations; the others are for images",
            subject=target,
            hint="say which points to keep: --keep-last 7",
        )
    if policy.is_empty:
        raise InvalidInput("no rule says which points to keep", subject=target, hint="such as --keep-last 7")
