"""`snapchain receive DIR`: receive a stream from stdin into a replica."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from snapchain.cli import options, render
from snapchain.cli.app import verb
from snapchain.cli.output import Output
from snapchain.cli.progress import Mode
from snapchain.cli.quantities import size
from snapchain.errors import InvalidInput
from snapchain.host.terminal import counted, numbered

if TYPE_CHECKING:
    from rich.console import Console

    from snapchain.ops.receive import ReceivePlan, ReceiveReport


@verb(
    examples="""
    snapchain send web1.qcow2 --disk web1/vda | ssh kvm2 snapchain receive /srv/replica
    snapchain receive /srv/replica < web1.stream
    """,
    when_interrupted="what is durable stays; receive the same stream again to go on from there",
)
def receive(
    directory: Annotated[
        Path,
        typer.Argument(
            readable=False, metavar="DIR", help="The directory of the replica. It is made if it does not exist."
        ),
    ],
    *,
    dry_run: options.DryRun = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Receive a stream of `snapchain send` from stdin, directly or from a saved file.

    Every frame is checked as it arrives. Every layer is read back and proven before it becomes part of the chain.
    Layers that are there already are skipped, so a stream may be received again. --dry-run reads only the beginning of
    the stream, and prints the name of the disk and what DIR has of it.
    """
    from snapchain.host.channel import Channel
    from snapchain.ops.receive import plan_receive, receive_stream

    with Output(json=json, dry_run=dry_run, progress=Mode.NONE, quiet=quiet) as out:
        if sys.stdin.isatty():
            raise InvalidInput("a stream does not come from a terminal", hint="pipe it, or redirect a saved one")
        with Channel(os.dup(0), -1, peer="stdin") as channel:
            if dry_run:
                out.plan(plan_receive(channel, directory), _draw_plan)
                return
            report = receive_stream(channel, directory)
        out.report(report, _draw_report)


def _draw_plan(console: Console, plan: ReceivePlan) -> None:
    render.headline(console, f"would receive {plan.disk} into {render.place(plan.destination)}")
    newest = f", newest point {plan.last_point}" if plan.last_point else ""
    render.facts(console, [("there", f"{counted(plan.layers_present, 'layer')}{newest}")])


def _draw_report(console: Console, report: ReceiveReport) -> None:
    render.headline(console, f"received {report.disk} into {render.place(report.destination)}")
    render.facts(
        console,
        [
            ("layers", f"{len(report.layers)} new, {report.layers_present} there already"),
            ("points", numbered(report.points) or "none new"),
            ("read", size(report.bytes_received)),
        ],
    )
