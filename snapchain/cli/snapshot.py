"""`snapchain snapshot IMAGE`: seal the top of a chain, and put a fresh overlay under the same path."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from snapchain.cli import options, render
from snapchain.cli.app import verb
from snapchain.cli.output import Output
from snapchain.host.terminal import counted

if TYPE_CHECKING:
    from rich.console import Console

    from snapchain.ops.snapshot import SnapshotPlan, SnapshotReport


@verb(
    examples="""
    snapchain snapshot /images/web1.qcow2
    snapchain snapshot /images/web1.qcow2 --label before-upgrade
    snapchain snapshot /images/web1.qcow2 --sealed-name web1.monday.qcow2
    snapchain snapshot /images/disk.raw --format raw --overlay disk.qcow2
    """,
    when_interrupted="the image is as it was, or the snapshot is made; snapchain inspect IMAGE shows which",
)
@options.takes_output()
def snapshot(
    image: Annotated[
        Path, typer.Argument(readable=False, metavar="IMAGE", help="The top of a chain, which no program has open.")
    ],
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
    out: Output,
) -> None:
    """Seal the top of a disk's chain, and put a fresh overlay under the same path.

    The sealed file gets a new name beside it, so the definition of the virtual machine stays as it is. The switch is
    one rename: the path names a complete image at every moment. An image that a program has open is refused.

    A small hidden file beside the sealed one records the time and the labels. `merge IMAGE --keep-...` uses them.
    """
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
