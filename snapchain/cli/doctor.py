"""`snapchain doctor [PATH...]`: finish or undo what interrupted commands left, and thaw guests."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from snapchain.cli import guest_options, options, render
from snapchain.cli.app import verb
from snapchain.cli.output import Output
from snapchain.errors import PartialFailure
from snapchain.guest.address import GuestAddress

if TYPE_CHECKING:
    from collections.abc import Iterable

    from rich.console import Console

    from snapchain.ops.doctor import DoctorPlan, DoctorReport, Treated


@verb(
    examples="""
    snapchain doctor /images
    snapchain doctor /images/web1.qcow2 --dry-run
    snapchain doctor --domain web1
    snapchain doctor --accept /images/.snapchain-merge-web1.qcow2.json
    """,
    when_interrupted="the images read as before; run it again",
)
@options.takes_output()
@guest_options.takes_guest()
def doctor(
    paths: Annotated[
        list[Path] | None,
        typer.Argument(
            readable=False, metavar="PATH", help="Images, or directories of images; this directory by default."
        ),
    ] = None,
    *,
    accept: Annotated[
        list[Path] | None,
        typer.Option(
            "--accept",
            metavar="FILE",
            help="Accept FILE, a journal or note that another user or host wrote. Read it first. May be repeated.",
        ),
    ] = None,
    image_dir: options.ImageDir = None,
    guest: GuestAddress | None = None,
    out: Output,
) -> None:
    """Find interrupted merges, snapshots and restores, describe each, and finish or undo it.

    Guests come first: one that an interrupted command left frozen is thawed. All guests are looked at, whatever PATH
    is, or with --domain or --qmp only that guest, with the interrupted merges of its disks.

    Work of running programs is left alone. Ends with exit code 10 when something could not be finished or undone.
    """
    from snapchain.ops import doctor as ops

    places = paths or ([] if accept or guest is not None else [Path()])
    plan = ops.plan(places, image_dirs=options.image_dirs(image_dir), accept=accept or [], guest=guest)
    if out.plan(plan, _draw_plan):
        return
    report = ops.run(plan, on_event=out.on_event)
    status = 0 if report.well else PartialFailure.exit_code
    out.report(report, _draw_report, problems=_draw_problems, status=status)


def _draw_plan(console: Console, plan: DoctorPlan) -> None:
    count = len(plan.findings)
    render.headline(console, f"{count} to treat" if count else "nothing was left behind")
    for finding in plan.findings:
        render.facts(
            console,
            [
                (finding.kind.value, finding.guest or render.place(finding.path)),
                ("is", finding.says),
                ("the doctor", finding.remedy),
            ],
        )
    if plan.unseen is not None:
        render.line(console, plan.unseen)


def _draw_report(console: Console, report: DoctorReport) -> None:
    done = sum(each.done for each in report.treated)
    if not report.treated:
        render.headline(console, "nothing was left behind")
        return
    render.headline(console, f"treated {done} of {len(report.treated)}")
    _draw_treated(console, report.treated)


def _draw_problems(console: Console, report: DoctorReport) -> None:
    _draw_treated(console, [each for each in report.treated if each.error is not None])


def _draw_treated(console: Console, treated: Iterable[Treated]) -> None:
    for each in treated:
        about = each.finding.guest or render.place(each.finding.path)
        rows = [(each.finding.kind.value, about), ("was", each.finding.says)]
        if each.error is not None:
            rows.append(("left, since", each.error))
        rows += [("hint", each.hint)] if each.hint else []
        rows += [("removed", ", ".join(map(render.place, each.removed)))] if each.removed else []
        rows += [("kept", f"{render.place(kept.path)}: {kept.reason}") for kept in each.kept]
        render.facts(console, rows)
