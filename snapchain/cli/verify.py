"""`snapchain verify DEST[::DISK]`: check the records of a destination, and a share of the data."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from snapchain.cli import options, quantities, render
from snapchain.cli.app import verb
from snapchain.cli.output import Output
from snapchain.errors import Corrupt, InvalidInput
from snapchain.host.terminal import counted

if TYPE_CHECKING:
    from rich.console import Console

    from snapchain.destination.records import VerifyReport


@verb(
    examples="""
    snapchain verify /backup
    snapchain verify /backup::web1/vda --read-data
    snapchain verify s3://bucket/prefix --sample 5%
    snapchain verify ssh://root@kvm2/srv/replica::web1/vda --read-data
    snapchain verify /backup::web1
    """,
    when_interrupted="nothing was being changed",
)
@options.takes_output(passphrase=True, dry_run=False)
def verify(
    target: Annotated[
        str,
        options.address(metavar="DEST[::DISK|GUEST]", help="A destination, a disk, or a guest."),
    ],
    *,
    read_data: Annotated[
        bool, typer.Option("--read-data", help="Read all data too, and compare the bytes with what was shipped.")
    ] = False,
    sample: Annotated[
        str | None, typer.Option(metavar="SHARE", help="Read this share of the data, chosen anew each time: 5%.")
    ] = None,
    limit_rate: options.LimitRate = None,
    out: Output,
) -> None:
    """Check every record of a destination, and that everything they name is there; on request also the data.

    A replica (ssh://[user@]host/path or dir:/path) is read on its own host. Its files must be the chains that its
    catalogues name. With --read-data their content is compared with what was proven when it arrived.

    Guest points are checked too: their records must be readable, and the points of all their disks must be there. Of a
    whole replica, without --read-data, the ten newest records of each guest are read.

    Ends with exit code 5 when anything is damaged or missing, and names the points that are affected.
    """
    from snapchain.destination.address import parse_destination
    from snapchain.destinations import traits_of
    from snapchain.ops import guest_verify as ops

    if read_data and sample is not None:
        raise InvalidInput("--read-data and --sample are both given", hint="--read-data reads everything")
    share = quantities.parse_share(sample) if sample is not None else float(read_data)
    address = parse_destination(target)
    if limit_rate is not None and traits_of(address.dest).streams:
        raise InvalidInput(
            "--limit-rate has no effect on this verification: a replica is read on its own host",
            subject=address.dest,
            hint="leave it out; --sample 5% reads less",
        )
    place = options.destination(address.dest, out, limit_rate=limit_rate)
    report = ops.verify(place, options.disk_of(address), share=share, on_event=out.on_event)
    out.show(report, _draw, problems=_draw_findings, status=0 if report.ok else Corrupt.exit_code)


def _draw(console: Console, report: VerifyReport) -> None:
    render.headline(console, "all is well" if report.ok else f"damaged: {counted(len(report.findings), 'finding')}")
    how = "records and data" if report.data_read else "records; --read-data reads the data too"
    parts = {"disk": report.disks, "point": report.points, "layer": report.layers}
    checked = ", ".join(counted(number, noun) for noun, number in parts.items())
    render.facts(console, [("checked", checked), ("read", f"{quantities.size(report.checked_bytes)} ({how})")])
    _draw_findings(console, report)


def _draw_findings(console: Console, report: VerifyReport) -> None:
    render.findings(console, report.findings)
