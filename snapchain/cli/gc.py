"""`snapchain gc DEST`: delete data that no point needs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from snapchain.cli import options, render
from snapchain.cli.app import verb
from snapchain.cli.output import Output
from snapchain.cli.quantities import size
from snapchain.errors import Corrupt
from snapchain.host.terminal import counted

if TYPE_CHECKING:
    from rich.console import Console

    from snapchain.destination.records import GcPlan, GcReport


@verb(
    examples="""
    snapchain gc /backup
    snapchain gc /backup --dry-run
    snapchain gc s3://bucket/prefix --json | jq .bytes_freed
    """,
    when_interrupted="nothing that a point needs was touched; run it again to finish",
)
@options.takes_output(passphrase=True)
def gc(
    target: Annotated[str, options.address(metavar="DEST", help="A repository.")],
    *,
    limit_rate: options.LimitRate = None,
    pack_size: options.PackSize = None,
    out: Output,
) -> None:
    """Delete data that no point of any disk needs, such as the data of dropped points and of interrupted runs.

    A pack is rewritten when more than a quarter of it is unreferenced. gc is exclusive: it waits up to ten minutes for
    ship and merge to end, and blocks them while it runs.

    gc works around missing or damaged packs and layers. Records are changed to use other copies of their data, if there
    are any. Data that a damaged point may still need is kept. While data is lost, gc ends with exit code 5.
    """
    work = options.destination(
        target,
        out,
        writing=not out.dry_run,
        limit_rate=limit_rate,
        pack_size_text=pack_size,
    ).collecting()
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
            ("move", f"{size(plan.bytes_moved)} out of {counted(plan.packs_moved, 'pack')}, mostly waste"),
            ("in use", size(plan.bytes_in_use)),
        ],
    )
    render.findings(console, plan.findings)


def _deleted(done: GcPlan | GcReport) -> str:
    packs = "1 of them a pack" if done.packs_deleted == 1 else f"{done.packs_deleted} of them packs"
    return f"{counted(done.objects_deleted, 'object')}, {packs}"


def _draw_report(console: Console, report: GcReport) -> None:
    render.headline(console, f"freed {size(report.bytes_freed)} of {render.place(report.destination)}")
    render.facts(
        console,
        [
            ("deleted", _deleted(report)),
            ("moved", f"{size(report.bytes_moved)} out of {counted(report.packs_moved, 'pack')}"),
            ("added", f"{size(report.bytes_added)} of new records" if report.bytes_added else ""),
        ],
    )
    render.findings(console, report.findings)
