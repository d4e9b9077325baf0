"""`snapchain retire DEST::GUEST GONE`: say that a destination of a guest never comes back."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from snapchain.cli import options, render
from snapchain.cli.app import verb
from snapchain.cli.output import Output
from snapchain.errors import InvalidInput

if TYPE_CHECKING:
    from rich.console import Console

    from snapchain.ops.retire import RetireReport


@verb(
    examples="""
    snapchain retire dir:/srv/replica::web1 s3://bucket/old-backup
    snapchain retire dir:/srv/replica::web1 ssh://root@kvm3/srv/replica --yes
    snapchain retire dir:/srv/replica::web1 s3://bucket/old-backup --undo
    """,
    when_interrupted="run it again: what was recorded stays",
)
@options.takes_output(passphrase=True)
def retire(
    guest: Annotated[str, options.address(metavar="DEST::GUEST", help="The guest, at a destination that is there.")],
    gone: Annotated[
        str,
        typer.Argument(
            metavar="GONE", help="Its other destination that never comes back: the address that `status` shows."
        ),
    ],
    *,
    undo: Annotated[bool, typer.Option("--undo", help="It has come back.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    at: options.OtherAt = None,
    out: Output,
) -> None:
    """Say that a destination of a guest never comes back, so that no move and no failover waits for its answer.

    A guest knows all destinations to which it was ever shipped. One that does not answer may be the one at which the
    guest was taken over, so `failover` and `migrate` stop, and ask for --without. This says it once: you vouch that no
    host took the guest over there. Your name is recorded at all other destinations.

    Should it come back, nothing can be taken over there: its hosts ask the others first, and these refuse. What is
    made anew at the same address is another destination. One that answers cannot be retired.
    """
    from snapchain.destination.address import parse_disk_address
    from snapchain.ops.retire import RetireRequest, retire as run

    address = parse_disk_address(guest)
    place = options.destination(address.dest, out, writing=True)
    request = RetireRequest(destination=gone, undo=undo, reach=options.reach(at, None, out))
    if out.dry_run or not yes:
        report = run(place, address.disk, request, dry_run=True, on_event=out.on_event)
        if out.plan(report, lambda console, plan: _draw(console, plan, would=True)):
            return
        _ask(report)
    out.report(run(place, address.disk, request, on_event=out.on_event), _draw)


def _ask(plan: RetireReport) -> None:
    """Raises InvalidInput where nobody can be asked, or the answer is no."""
    if plan.undo:
        return
    if not sys.stdin.isatty():
        raise InvalidInput(
            f"nobody can be asked whether the guest {plan.guest} was taken over there",
            subject=plan.destination,
            hint="say --yes if it was not, and never can be",
        )
    question = f"Do you vouch that {plan.guest} was not taken over at {plan.destination}, and never will be?"
    if not typer.confirm(question, err=True):
        raise InvalidInput("nothing was done", subject=plan.destination)


def _draw(console: Console, report: RetireReport, *, would: bool = False) -> None:
    how = "would be" if would else "is"
    state = "no longer gone" if report.undo else "gone for good"
    render.headline(console, f"{report.guest}: {report.destination} {how} {state}, as {report.who} says")
    render.facts(
        console,
        [
            ("told", ", ".join(report.told)),
            *(("not told", f"{each}: it does not answer, and waits for it as before") for each in report.silent),
        ],
    )
