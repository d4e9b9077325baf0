"""`snapchain snapshot IMAGE`: seal the top of a chain, or all disks of a guest, and put fresh overlays on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from snapchain.cli import guest_options, options, render, snapshot_options
from snapchain.cli.app import verb
from snapchain.cli.output import Output
from snapchain.errors import InvalidInput
from snapchain.guest.address import GuestAddress
from snapchain.host.terminal import counted

if TYPE_CHECKING:
    from rich.console import Console

    from snapchain.guest.snapshot import GuestSnapshot, GuestSnapshotPlan, SnapshotRequest
    from snapchain.ops.snapshot import SnapshotPlan, SnapshotReport


@verb(
    examples="""
    snapchain snapshot /images/web1.qcow2
    snapchain snapshot /images/web1.qcow2 --label before-upgrade
    snapchain snapshot /images/web1.qcow2 --sealed-name web1.monday.qcow2
    snapchain snapshot /images/disk.raw --format raw --overlay disk.qcow2
    snapchain snapshot --domain web1 --quiesce require
    snapchain snapshot --qmp /run/web1.qmp --disk vda --disk vdb
    """,
    when_interrupted="the disks are as they were, or the snapshot is made; snapchain inspect IMAGE shows which",
)
@options.takes_output()
@guest_options.takes_guest(instead_of="image")
@snapshot_options.takes_snapshot_options
def snapshot(
    image: Annotated[
        Path | None,
        typer.Argument(readable=False, metavar="IMAGE", help="The top of a chain, which no program has open."),
    ] = None,
    *,
    sealed_name: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Name of the sealed file, beside IMAGE. By default IMAGE with a number before the suffix.",
        ),
    ] = None,
    overlay: Annotated[
        Path | None,
        typer.Option(
            readable=False,
            metavar="FILE",
            help="Seal IMAGE under its own name, and make the overlay FILE. A raw image needs this.",
        ),
    ] = None,
    label: Annotated[
        list[str] | None,
        typer.Option("--label", "-l", help="A label of the sealed file. May be repeated."),
    ] = None,
    image_format: options.Format = None,
    image_dir: options.ImageDir = None,
    guest: GuestAddress | None = None,
    snapshot: Any,
    out: Output,
) -> None:
    """Seal the active layers of disks, and put fresh overlays on them.

    Of an image at rest, the sealed file gets a new name beside it, so the definition of the virtual machine stays as it
    is. The switch is one rename: the path names a complete image at every moment. An image that a program has open is
    refused.

    Of a guest, all disks are sealed at one instant, while it runs. Each sealed file keeps its path, and the guest
    writes to a new file NAME.N.qcow2 beside it. Whatever happens to this command, the guest is frozen for 30 seconds
    at most.

    A small hidden file beside a sealed one records the time and the labels. `merge IMAGE --keep-...` uses them.
    """
    if guest is not None:
        given = {"--sealed-name": sealed_name, "--overlay": overlay, "--format": image_format}
        for option in (name for name, value in given.items() if value is not None):
            raise InvalidInput(f"{option} is for an image, not for a guest", hint=f"leave out {option}")
        _snapshot_guest(guest, snapshot, label or [], image_dir, out)
        return
    snapshot_options.check_no_snapshot_options(snapshot)
    assert image is not None  # takes_guest has seen to it
    from snapchain.ops import snapshot as ops

    plan = ops.plan(
        image,
        sealed_name=sealed_name,
        overlay=overlay,
        labels=label or (),
        image_format=options.format_of(image_format),
        image_dirs=options.image_dirs(image_dir),
    )
    if not out.plan(plan, _draw_plan):
        out.report(ops.run(plan, on_event=out.on_event), _draw_report)


def _snapshot_guest(
    address: GuestAddress, asked: SnapshotRequest | None, labels: list[str], image_dir: list[Path] | None, out: Output
) -> None:
    from snapchain.guest import snapshot as of_guest
    from snapchain.guest.address import open_guest

    request = replace(
        asked or of_guest.SnapshotRequest(), labels=tuple(labels), image_dirs=tuple(options.image_dirs(image_dir))
    )
    with open_guest(address, on_event=out.on_event) as guest:
        plan = of_guest.plan(guest, request)
        if not out.plan(plan, _draw_guest_plan):
            out.report(of_guest.run(guest, plan, request, on_event=out.on_event), _draw_guest)


def _draw_plan(console: Console, plan: SnapshotPlan) -> None:
    render.headline(console, f"would seal {plan.image}")
    _draw_files(console, plan)


def _draw_report(console: Console, report: SnapshotReport) -> None:
    render.headline(console, f"sealed {report.image}: the chain has {counted(report.layers, 'layer')} now")
    _draw_files(console, report)


def _draw_files(console: Console, which: SnapshotPlan | SnapshotReport) -> None:
    render.facts(
        console,
        [
            ("sealed", f"{render.place(which.sealed)} (as it was)"),
            ("top", f"{render.place(which.overlay)} (fresh; what the guest opens)"),
        ],
    )


def _draw_guest_plan(console: Console, plan: GuestSnapshotPlan) -> None:
    how = "at rest" if plan.is_off else "after a freeze, if its agent answers" if plan.quiesces else "without a freeze"
    render.headline(console, f"would seal {counted(len(plan.disks), 'disk')} of {plan.guest}, {how}")
    _draw_disks(console, plan)


def _draw_guest(console: Console, report: GuestSnapshot) -> None:
    disks = counted(len(report.disks), "disk")
    render.headline(console, f"sealed {disks} of {report.guest}: {report.consistency.value}-consistent")
    facts = []
    if report.why_not is not None:
        facts.append(("not filesystem-consistent", report.why_not))
    if report.frozen_seconds is not None:
        facts.append(("frozen", f"{report.frozen_seconds:.2f} s"))
    render.facts(console, facts)
    _draw_disks(console, report)
    if report.starts_with:
        paths = ", ".join(render.place(path) for path in report.starts_with)
        render.facts(console, [("next start", f"change the guest's command line; it must open {paths}")])


def _draw_disks(console: Console, which: GuestSnapshotPlan | GuestSnapshot) -> None:
    for disk in which.disks:
        render.facts(
            console,
            [
                (disk.disk, f"{counted(disk.layers, 'layer')}"),
                ("sealed", f"{render.place(disk.sealed)}"),
                ("active", f"{render.place(disk.overlay)}"),
            ],
        )
    render.facts(console, [(each.disk, f"left out: {each.reason}") for each in which.left_out])
