"""`snapchain gc DEST`: delete data that no point needs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from snapchain.cli import options, quantities, render
from snapchain.cli.app import verb
from snapchain.cli.output import Output
from snapchain.cli.quantities import moment, size
from snapchain.errors import Corrupt
from snapchain.host.terminal import counted

if TYPE_CHECKING:
    from rich.console import Console

    from snapchain.destination.records import GcPlan, GcReport


@verb(
    examples="""
    snapchain gc /backup
    snapchain gc /backup --dry-run
    snapchain gc /backup --budget-bytes 10G
    snapchain gc s3://bucket/prefix --json | jq .bytes_freed
    """,
    when_interrupted="nothing that a point needs was touched; run it again to finish",
)
@options.takes_output(passphrase=True)
def gc(
    target: Annotated[str, options.address(metavar="DEST", help="A repository.")],
    *,
    max_waste: Annotated[
        str | None,
        typer.Option(
            metavar="SHARE", help="Move data out of packs of which more than this is unreferenced. By default 25%."
        ),
    ] = None,
    budget_bytes: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Move at most so much, out of the most wasteful packs first: 10G. Damaged packs do not count.",
        ),
    ] = None,
    limit_rate: options.LimitRate = None,
    pack_size: options.PackSize = None,
    out: Output,
) -> None:
    """Delete data that no point of any disk needs, such as the data of dropped points and of interrupted runs.

    A pack is rewritten when more than a quarter of it is unreferenced. gc works beside ship, merge and restore. What is
    unreferenced is condemned first: from then on no new shipment relies on it. It is deleted once all shipments have
    ended that began before. gc waits a minute for that. What is left then goes with a later gc, and the report says for
    whom it waits.

    gc works around missing or damaged packs and layers. Records are changed to use other copies of their data, if there
    are any. Data that a damaged point may still need is kept. While data is lost, gc ends with exit code 5.
    """
    from snapchain.destination.records import GcLimits

    limits = GcLimits(
        waste=None if max_waste is None else quantities.parse_share(max_waste),
        most_moved=None if budget_bytes is None else quantities.parse_size(budget_bytes),
    )
    work = options.destination(
        target,
        out,
        writing=not out.dry_run,
        limit_rate=limit_rate,
        pack_size_text=pack_size,
    ).collecting(limits)
    if out.dry_run:
        plan = work.plan()
        out.plan(plan, _draw_plan, problems=_draw_problems, status=_status(plan))
        return
    report = work.run(on_event=out.on_event)
    out.report(report, _draw_report, problems=_draw_problems, status=_status(report))


def _status(done: GcPlan | GcReport) -> int:
    return Corrupt.exit_code if done.findings else 0


def _draw_problems(console: Console, done: GcPlan | GcReport) -> None:
    render.findings(console, done.findings)


def _draw_plan(console: Console, plan: GcPlan) -> None:
    render.headline(console, f"would free about {size(plan.bytes_freed)} of {render.place(plan.destination)}")
    render.facts(
        console,
        [
            ("delete", _deleted(plan)),
            ("move", _moved(plan)),
            ("locked", _locked(plan)),
            ("in use", size(plan.bytes_in_use)),
        ],
    )
    render.findings(console, plan.findings)


def _deleted(done: GcPlan | GcReport) -> str:
    packs = "1 of them a pack" if done.packs_deleted == 1 else f"{done.packs_deleted} of them packs"
    return f"{counted(done.objects_deleted, 'object')}, {packs}"


def _moved(done: GcPlan | GcReport) -> str:
    if done.bytes_moved and not done.packs_moved:
        return f"{size(done.bytes_moved)} out of damaged packs"
    return f"{size(done.bytes_moved)} out of {counted(done.packs_moved, 'pack')}, mostly waste"


def _locked(done: GcPlan | GcReport) -> str:
    if not done.objects_locked:
        return ""
    until = "someone releases them" if done.locked_until is None else moment(done.locked_until, zone=True)
    return f"{size(done.bytes_locked)} in {counted(done.objects_locked, 'object')}, until {until}"


def _left(report: GcReport) -> str:
    if not report.bytes_left:
        return ""
    who = "; ".join(report.waits_for) or "a writer"
    return f"{size(report.bytes_left)} unreferenced so far, for a gc after the end of {who}"


def _draw_report(console: Console, report: GcReport) -> None:
    render.headline(console, f"freed {size(report.bytes_freed)} of {render.place(report.destination)}")
    render.facts(
        console,
        [
            ("deleted", _deleted(report)),
            ("moved", _moved(report)),
            ("added", f"{size(report.bytes_added)} of new records" if report.bytes_added else ""),
            ("left", _left(report)),
            ("locked", _locked(report)),
        ],
    )
    render.findings(console, report.findings)
