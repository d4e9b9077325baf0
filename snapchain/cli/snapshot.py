"""`snapchain snapshot IMAGE`: seal the top of a chain, or all disks of a guest, and put fresh overlays on."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from snapchain.cli import options, render
from snapchain.cli.app import verb
from snapchain.cli.output import Output
from snapchain.errors import InvalidInput
from snapchain.guest.address import GuestAddress
from snapchain.host.terminal import counted

if TYPE_CHECKING:
    from rich.console import Console

    from snapchain.guest.snapshot import GuestSnapshot, GuestSnapshotPlan, SnapshotRequest
    from snapchain.ops.snapshot import SnapshotPlan, SnapshotReport

_OF_GUEST = "Of a running guest"
_QUIESCE = ("auto", "require", "no")


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
@options.takes_guest(instead_of="image")
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
    disk: Annotated[
        list[str] | None,
        typer.Option(
            "--disk",
            metavar="NAME",
            help="Snapshot only this disk, such as vda. May be repeated. Default: all disks.",
            rich_help_panel=_OF_GUEST,
        ),
    ] = None,
    quiesce: Annotated[
        str | None,
        typer.Option(
            "--quiesce",
            metavar="|".join(_QUIESCE),
            autocompletion=options.of(*_QUIESCE),
            help="Freeze the filesystems by the guest agent: if it answers (auto, the default), or fail without it.",
            rich_help_panel=_OF_GUEST,
        ),
    ] = None,
    freeze_timeout: Annotated[
        float | None,
        typer.Option(
            "--freeze-timeout",
            metavar="SECONDS",
            help="Longest time for the agent to freeze the filesystems. Default: 10.",
            rich_help_panel=_OF_GUEST,
        ),
    ] = None,
    pre_freeze: Annotated[
        str | None,
        typer.Option(
            "--pre-freeze",
            metavar="COMMAND",
            help="Run this program (no shell) on this host before the freeze. If it fails, no snapshot is made.",
            rich_help_panel=_OF_GUEST,
        ),
    ] = None,
    post_thaw: Annotated[
        str | None,
        typer.Option(
            "--post-thaw",
            metavar="COMMAND",
            help="Run this program after the thaw, whether the snapshot was made or not.",
            rich_help_panel=_OF_GUEST,
        ),
    ] = None,
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
    of_guest = {
        "--disk": disk,
        "--quiesce": quiesce,
        "--freeze-timeout": freeze_timeout,
        "--pre-freeze": pre_freeze,
        "--post-thaw": post_thaw,
    }
    if guest is not None:
        _refuse({"--sealed-name": sealed_name, "--overlay": overlay, "--format": image_format}, "an IMAGE")
        _snapshot_guest(guest, _request(disk, quiesce, freeze_timeout, pre_freeze, post_thaw, label, image_dir), out)
        return
    _refuse(of_guest, "a guest")
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


def _refuse(given: Mapping[str, object], what: str) -> None:
    for option, value in given.items():
        if value is not None and value != []:
            raise InvalidInput(f"{option} belongs to a snapshot of {what}")


def _request(
    disk: list[str] | None,
    quiesce: str | None,
    freeze_timeout: float | None,
    pre_freeze: str | None,
    post_thaw: str | None,
    label: list[str] | None,
    image_dir: list[Path] | None,
) -> SnapshotRequest:
    from snapchain.guest.snapshot import Quiesce, SnapshotRequest

    if quiesce is not None and quiesce not in _QUIESCE:
        raise InvalidInput(f"unknown value {quiesce!r} of --quiesce", hint=f"one of {', '.join(_QUIESCE)}")
    standard = SnapshotRequest()
    return SnapshotRequest(
        disks=tuple(disk or ()),
        quiesce=Quiesce(quiesce) if quiesce else standard.quiesce,
        labels=tuple(label or ()),
        freeze_seconds=standard.freeze_seconds if freeze_timeout is None else freeze_timeout,
        pre_freeze=_argv("--pre-freeze", pre_freeze),
        post_thaw=_argv("--post-thaw", post_thaw),
        image_dirs=tuple(options.image_dirs(image_dir)),
    )


def _argv(option: str, command: str | None) -> tuple[str, ...]:
    if command is None:
        return ()
    try:
        argv = tuple(shlex.split(command))
    except ValueError as error:
        raise InvalidInput(f"{option} is not a command: {error}", subject=command) from error
    if not argv:
        raise InvalidInput(f"{option} is empty")
    return argv


def _snapshot_guest(address: GuestAddress, request: SnapshotRequest, out: Output) -> None:
    from snapchain.guest import snapshot as of_guest
    from snapchain.guest.address import open_guest

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
