"""`snapchain serve DEST::DISK[@POINT]...`: serve points as read-only block devices, over NBD."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from snapchain.cli import options, quantities, render
from snapchain.cli.app import verb
from snapchain.cli.output import Output
from snapchain.cli.quantities import duration, moment, size
from snapchain.errors import PartialFailure
from snapchain.host.terminal import counted

if TYPE_CHECKING:
    from rich.console import Console

    from snapchain.destination.reading import ReadableDestination
    from snapchain.ops.serve import ServePlan, ServeReport

_PLACE = "Where"


@verb(
    examples="""
    snapchain serve /backup::web1/vda
    snapchain serve s3://bucket/prefix::web1/vda@7 --socket /run/web1.sock
    snapchain serve /backup::web1 --cache-size 1G
    snapchain serve /backup::web1/vda --all-points
    snapchain serve dir:/srv/replica::web1/vda --once --json
    snapchain serve /backup::web1/vda --listen 0.0.0.0:10809 --tls /etc/pki/qemu
    nbdinfo 'nbd+unix:///web1/vda?socket=/run/web1.sock'
    qemu-img convert -f raw -O qcow2 'nbd+unix:///web1/vda%407?socket=/run/web1.sock' web1.qcow2
    """,
    when_interrupted="nothing is left: start it again",
)
@options.takes_output(passphrase=True)
def serve(
    sources: Annotated[
        list[str],
        options.address(
            metavar="DEST::DISK|GUEST[@POINT]...",
            help="Disks, or guests with all their disks, and the point of each: latest (default), a number, a label, "
            "or a time.",
        ),
    ],
    *,
    all_points: Annotated[
        bool,
        typer.Option("--all-points", help="Also serve every point of the disks, as DISK@1, DISK@2 and so on."),
    ] = False,
    socket: Annotated[
        Path | None,
        typer.Option(
            "--socket",
            readable=False,
            metavar="PATH",
            help="Listen on this unix socket, made with mode 0600. Default: serve-PID.sock in /run/snapchain for root, "
            "in $XDG_RUNTIME_DIR/snapchain for others.",
            rich_help_panel=_PLACE,
        ),
    ] = None,
    listen: Annotated[
        str | None,
        typer.Option(
            "--listen",
            metavar="HOST[:PORT]",
            help="Listen on TCP instead. Port 10809 by default; 0 takes a free one. Without --tls only a loopback "
            "address is accepted, and every user of this host can read the points.",
            rich_help_panel=_PLACE,
        ),
    ] = None,
    tls: Annotated[
        Path | None,
        typer.Option(
            "--tls",
            readable=False,
            metavar="DIR",
            help="Serve over TLS only. DIR has ca-cert.pem, server-cert.pem and server-key.pem, as QEMU uses them, and "
            "perhaps ca-crl.pem. A client needs a certificate that the same authority has signed.",
            rich_help_panel=_PLACE,
        ),
    ] = None,
    cache_size: Annotated[
        str,
        typer.Option("--cache-size", metavar="BYTES", help="Keep so many unpacked bytes in memory, for all exports."),
    ] = "256M",
    patience: Annotated[
        str,
        typer.Option(
            "--patience",
            metavar="TIME",
            help="How long a read waits for a store that does not answer, before the client gets an I/O error.",
        ),
    ] = "2min",
    once: Annotated[
        bool, typer.Option("--once", help="End when the last client that has opened an export has disconnected.")
    ] = False,
    cache_dir: Annotated[
        Path | None,
        typer.Option(
            "--cache-dir",
            readable=False,
            metavar="DIR",
            help="Keep what was fetched in DIR/snapchain-blobs too, as it is stored, so encrypted. Servers on this "
            "host share it: each blob is fetched once, also by a later server.",
        ),
    ] = None,
    cache_dir_size: Annotated[
        str, typer.Option("--cache-dir-size", metavar="BYTES", help="Keep so many bytes in --cache-dir.")
    ] = "4G",
    no_prefetch: Annotated[
        bool,
        typer.Option(
            "--no-prefetch",
            help="Do not record what clients read first, and do not fetch ahead what was recorded before.",
        ),
    ] = False,
    limit_rate: options.LimitRate = None,
    out: Output,
) -> None:
    """Serve points as read-only block devices over NBD, until SIGTERM or Ctrl-C, which end it with exit code 0.

    An export has the name of its disk: web1/vda. If you name a point, the export has its number too: web1/vda@7. A
    guest is served as all disks of a guest point. The URI of each export is printed when clients can connect. With
    --json there are two lines: an object with the exports when they are ready, and one with the totals at the end. A
    server with one export serves it under the empty name, too.

    Any NBD client can read: QEMU, qemu-img, nbdcopy, nbd-client, several at once. Give qemu-img the format, -f raw: it
    would else guess it from bytes that the guest wrote. Zeroes are not sent: clients that ask learn which ranges hold
    data. Each byte of a repository is proven before it is sent. A range whose bytes are lost gives an I/O error there
    and a note here, and all other ranges can be read. Writes are refused.

    What clients read first, up to 256 MiB in 3 minutes, is recorded in the repository. When a point of the disk is
    served again, it is fetched in the same order before it is asked for, so a guest boots faster. Programs that ask for
    the map of a disk, as copies do, are not recorded.

    While a store does not answer, reads wait for --patience, then fail; later reads work again. As long as a point of
    a repository is served, gc keeps what it needs. A point that only --all-points lists is kept while a client has it
    open.

    A replica must be on this host: dir:/path. Its bytes are those of its files, and are not proven. While it is
    served, merges leave these files as they are.
    """
    from snapchain.destination.address import parse_point_address
    from snapchain.ops.serve import ServeRequest, Serving

    addresses = [parse_point_address(each) for each in sources]
    request = ServeRequest(
        addresses=addresses,
        socket=socket,
        listen=listen,
        tls=tls,
        all_points=all_points,
        cache=quantities.parse_size(cache_size),
        patience=options.seconds(patience, "--patience"),
        once=once,
        prefetch=not no_prefetch,
        cache_dir=cache_dir,
        shared_cache=quantities.parse_size(cache_dir_size),
    )
    places: dict[str, ReadableDestination] = {}
    for each in addresses:
        if each.dest not in places:
            places[each.dest] = options.destination(each.dest, out, limit_rate=limit_rate)
    work = Serving(request, places)
    if out.dry_run:
        out.plan(work.plan(), _draw_plan)
        return
    report = work.run(lambda plan: out.row(plan, _draw_ready), on_event=out.on_event)
    status = PartialFailure.exit_code if report.failed_reads else 0
    out.report(report, _draw_report, problems=_draw_problems, status=status)


def _draw_plan(console: Console, plan: ServePlan) -> None:
    render.headline(console, f"would serve {counted(len(plan.exports), 'export')} on {plan.socket or plan.listen}")
    _draw_exports(console, plan)


def _draw_ready(console: Console, plan: ServePlan) -> None:
    how = ", over TLS" if plan.tls else ""
    render.headline(console, f"serving {counted(len(plan.exports), 'export')} on {plan.socket or plan.listen}{how}")
    _draw_exports(console, plan)


def _draw_exports(console: Console, plan: ServePlan) -> None:
    render.table(
        console,
        ["disk", "point>", "time", "size>", "URI"],
        [
            (each.disk, str(each.point), moment(each.time, zone=True), size(each.virtual_size), each.uri)
            for each in plan.exports
        ],
    )


def _draw_report(console: Console, report: ServeReport) -> None:
    words = (
        f"{counted(report.clients, 'client')}, {counted(report.requests, 'request')}, {size(report.bytes_sent)} read"
    )
    render.headline(console, f"served for {duration(report.seconds)}: {words}")
    _draw_problems(console, report)


def _draw_problems(console: Console, report: ServeReport) -> None:
    if report.failed_reads:
        render.line(console, f"{counted(report.failed_reads, 'read')} failed: the notes say why", style="red")
