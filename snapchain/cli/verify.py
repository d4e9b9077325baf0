"""`snapchain verify DEST[::DISK]`: check the records of a destination, and a share of the data."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from snapchain.cli import options, quantities, render
from snapchain.cli.app import verb
from snapchain.cli.output import Output
from snapchain.cli.trial_tables import draw_trial
from snapchain.errors import Corrupt, InvalidInput
from snapchain.host.terminal import counted, shell_word

_BOOT = "Boot test"
_NOT_YET = "not all of it was read yet, or not all of it is good"

if TYPE_CHECKING:
    from rich.console import Console

    from snapchain.destination.records import VerifyReport


@verb(
    examples="""
    snapchain verify /backup
    snapchain verify /backup::web1/vda --read-data
    snapchain verify s3://bucket/prefix --sample 5%
    snapchain verify s3://bucket/prefix --max-age 30d
    snapchain verify ssh://root@kvm2/srv/replica::web1/vda --read-data
    snapchain verify /backup::web1
    snapchain verify /backup::web1 --boot
    snapchain verify s3://bucket/prefix::web1@7 --boot --console-says "login:" --timeout 10min
    """,
    when_interrupted="what was read and found good is kept: run it again, and it goes on from there",
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
        str | None,
        typer.Option(metavar="SHARE", help="Read this share of the data: 5%. Each run takes the next share."),
    ] = None,
    max_age: Annotated[
        str | None,
        typer.Option(metavar="SPAN", help="Read all data that was not read and found good within this time: 30d."),
    ] = None,
    boot: Annotated[
        bool,
        typer.Option(
            "--boot",
            help="Boot a throw-away clone of a guest without a network, and do nothing else. Its disks stay at the "
            "destination: only what it writes takes space here.",
            rich_help_panel=_BOOT,
        ),
    ] = False,
    console_says: Annotated[
        str | None,
        typer.Option(
            "--console-says",
            metavar="TEXT",
            help="The clone has booted when it writes TEXT to its first serial port. By default when its guest agent "
            "answers, or, where it has none, when it runs.",
            rich_help_panel=_BOOT,
        ),
    ] = None,
    check: Annotated[
        str | None,
        typer.Option(
            "--check",
            metavar="PROGRAM",
            help="The clone has booted when PROGRAM (no shell) exits with 0. Its environment has SNAPCHAIN_DOMAIN or "
            "SNAPCHAIN_QMP, and SNAPCHAIN_CONSOLE, the file with its console.",
            rich_help_panel=_BOOT,
        ),
    ] = None,
    timeout: Annotated[
        str, typer.Option("--timeout", metavar="TIME", help="How long the boot may take.", rich_help_panel=_BOOT)
    ] = "5min",
    into: Annotated[
        Path,
        typer.Option(
            "--into",
            readable=False,
            metavar="DIR",
            help="Where the clone gets a directory, which is removed at the end.",
            rich_help_panel=_BOOT,
        ),
    ] = Path("/var/tmp"),  # noqa: S108 - a directory of its own in it, that no other user can make
    connect: Annotated[
        str | None,
        typer.Option(
            "--connect",
            metavar="URI",
            help="The libvirt that starts the clone of a domain.",
            rich_help_panel=_BOOT,
        ),
    ] = None,
    limit_rate: options.LimitRate = None,
    out: Output,
) -> None:
    """Check a destination in three depths: its records, that what they name is there, and on request the data.

    1. Records: catalogues, layers and indexes must be sound, and agree with the recorded content ids.

    2. Existence: every pack that they name must be there, and long enough.

    3. Data, with --read-data, --sample or --max-age: every pack is read whole, each of its blobs is decrypted and
    compared with its id, and each layer with the hashes that were recorded when it was shipped.

    A repository keeps what was read and found good, and when. So 20 runs with --sample 5% read everything, --max-age
    leaves out what was read lately, and an interrupted --read-data is continued by the next one within 7 days.

    A replica (ssh://[user@]host/path or dir:/path) is read on its own host, and --sample draws anew each time. Its
    files must be the chains that its catalogues name. With --read-data their content is compared with what was proven
    when it arrived.

    Guest points are checked too: their records must be readable, and the points of all their disks must be there. Of a
    whole replica, without --read-data, the ten newest records of each guest are read.

    With --boot, a clone of the newest whole guest point, or of the one that you name, boots with a new name and UUID,
    and is removed again. When it does not boot, the last lines on its console are shown.

    Ends with exit code 5 when anything is damaged or missing, and names the points that are affected, or when a clone
    does not boot.
    """
    from datetime import UTC, datetime

    from snapchain.destination.address import parse_destination
    from snapchain.destinations import traits_of
    from snapchain.model.retention.duration import parse_duration
    from snapchain.ops import guest_verify as ops

    if read_data and sample is not None:
        raise InvalidInput("--read-data and --sample are both given", hint="--read-data reads everything")
    if read_data and max_age is not None:
        raise InvalidInput("--read-data and --max-age are both given", hint="--max-age leaves out what was read lately")
    share = quantities.parse_share(sample) if sample is not None else float(read_data or max_age is not None)
    since = None if max_age is None else parse_duration(max_age).before(datetime.now(UTC), quantities.zone_of(None))
    if boot:
        if read_data or sample is not None or max_age is not None:
            raise InvalidInput("--boot checks no records", hint="run `snapchain verify` again without --boot")
        words = [] if check is None else options.argv_of(check, option="--check")
        seconds = options.seconds(timeout, "--timeout")
        _boot(target, out, into, words, console_says, seconds, connect, limit_rate)
        return
    if check is not None or console_says is not None or connect is not None:
        raise InvalidInput("--check, --console-says and --connect are for --boot")
    address = parse_destination(target)
    if limit_rate is not None and traits_of(address.dest).streams:
        raise InvalidInput(
            "--limit-rate has no effect on this verification: a replica is read on its own host",
            subject=address.dest,
            hint="leave it out; --sample 5% reads less",
        )
    place = options.destination(address.dest, out, limit_rate=limit_rate)
    report = ops.verify(place, options.disk_of(address), share=share, since=since, on_event=out.on_event)
    status = 0 if report.ok else Corrupt.exit_code
    out.show(report, _draw, problems=_draw_findings, status=status, draws_traffic=True)


def _boot(
    target: str,
    out: Output,
    into: Path,
    check: Sequence[str],
    console_says: str | None,
    seconds: float,
    connect: str | None,
    limit_rate: str | None,
) -> None:
    from snapchain.destination.address import parse_point_address
    from snapchain.ops.failover.trial import TrialRequest, trial
    from snapchain.ops.guest_points_merge import guest_at

    address = parse_point_address(target)
    request = TrialRequest(
        directory=into,
        point=address.point,
        check=check,
        console_says=console_says,
        seconds=seconds,
        connect=connect,
    )
    place = options.destination(address.dest, out, limit_rate=limit_rate)
    report = trial(place, guest_at(place, address.disk), request, on_event=out.on_event)
    out.report(report, draw_trial, problems=draw_trial, status=0 if report.ok else Corrupt.exit_code)


def _draw(console: Console, report: VerifyReport) -> None:
    from snapchain.destinations import traits_of

    render.headline(console, "all is well" if report.ok else f"damaged: {counted(len(report.findings), 'finding')}")
    how = "records and data" if report.data_read else "records; --read-data reads the data too"
    parts = {"disk": report.disks, "point": report.points, "layer": report.layers}
    checked = ", ".join(counted(number, noun) for noun, number in parts.items())
    facts = [("checked", checked), ("read", f"{quantities.size(report.checked_bytes)} ({how})")]
    if report.stored_bytes:
        left = f", {quantities.size(report.fresh_bytes)} were read before" if report.fresh_bytes else ""
        of = f"{quantities.size(report.read_bytes)} of {quantities.size(report.stored_bytes)}"
        facts.append(("stored", f"{of} read{left}"))
        since = report.verified_since
        facts.append(
            ("data", f"all of it was read and found good after {quantities.moment(since)}" if since else _NOT_YET)
        )
    render.facts(console, facts)
    _draw_findings(console, report)
    if report.findings and traits_of(report.destination).deduplicates:
        words = "`ship` of the image stores lost data again, and so does `snapchain repair"
        render.line(console, f"{words} {shell_word(report.destination)} --from ADDRESS`")


def _draw_findings(console: Console, report: VerifyReport) -> None:
    render.findings(console, report.findings)
