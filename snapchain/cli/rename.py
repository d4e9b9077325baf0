"""`snapchain rename DEST::OLD DEST::NEW`: give a disk or a guest of a repository another name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from snapchain.cli import options, render
from snapchain.cli.app import verb
from snapchain.cli.output import Output
from snapchain.errors import InvalidInput
from snapchain.host.terminal import counted, shell_word

if TYPE_CHECKING:
    from rich.console import Console

    from snapchain.destination.records import RenamePlan, RenameReport


@verb(
    examples="""
    snapchain rename /backup::web1/vda /backup::www/vda
    snapchain rename /backup::web1 /backup::www
    snapchain rename s3://bucket/prefix::web1/vda s3://bucket/prefix::www/vda --dry-run
    """,
    when_interrupted="the points are there under the old name, the new one, or both; run it again to finish",
)
@options.takes_output(passphrase=True)
def rename(
    old: Annotated[str, options.address(metavar="DEST::OLD", help="A disk or a guest of a repository.")],
    new: Annotated[str, options.address(metavar="DEST::NEW", help="Its new name, at the same destination.")],
    *,
    out: Output,
) -> None:
    """Give a disk or a guest of a repository another name, with all its points, their numbers, labels and holds.

    No data is copied. From then on the old name is refused, with the new one in the message. So change it where the
    disk is shipped, such as in the configuration of nightly. The new name must not have been used before.

    Older versions of snapchain do not know renamed disks. They refuse the old name, and also to list or to collect the
    repository as a whole. Upgrade all hosts first.

    DEST::GUEST renames all disks of the guest. One disk alone cannot be renamed then, and neither can a guest of which
    the repository records who may run it, such as after a failover or with several destinations.

    Disks of replicas cannot be renamed: guests open their files by path.
    """
    from snapchain.destination.address import parse_disk_address

    source = parse_disk_address(old)
    try:
        target = parse_disk_address(new)
    except InvalidInput as error:
        if "::" not in new:
            error.hint = f"write the whole address: {shell_word(f'{source.dest}::{new}')}"
        raise
    if source.dest != target.dest:
        raise InvalidInput(
            "rename works inside one destination",
            subject=f"{source.dest}, {target.dest}",
            hint="copy brings a disk to another one: snapchain copy SRC DEST DISK",
        )
    place = options.destination(source.dest, out, writing=not out.dry_run)
    work = place.renaming(source.disk, target.disk)
    if out.dry_run:
        out.plan(work.plan(), _draw_plan)
        return
    out.report(work.run(on_event=out.on_event), _draw_report)


def _draw_plan(console: Console, plan: RenamePlan) -> None:
    words = "would finish renaming" if plan.finishes else "would rename"
    render.headline(console, f"{words} {plan.old} to {plan.new} at {render.place(plan.destination)}")
    render.facts(console, [("with", _with(plan)), ("copies", "no data")])


def _draw_report(console: Console, report: RenameReport) -> None:
    words = "finished renaming" if report.finishes else "renamed"
    render.headline(console, f"{words} {report.old} to {report.new} at {render.place(report.destination)}")
    render.facts(console, [("with", _with(report)), ("from now on", f"ship to {report.new}")])


def _with(plan: RenamePlan) -> str:
    if plan.disks == (plan.old,):
        return counted(plan.points, "point")
    return f"{counted(plan.points, 'guest point')}, disks: {', '.join(plan.disks)}"
