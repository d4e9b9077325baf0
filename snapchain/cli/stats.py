"""`snapchain stats DEST[::DISK]`: show what a destination stores: by kind, by disk, and what each point added."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Annotated

from snapchain.cli import options, render
from snapchain.cli.app import verb
from snapchain.cli.output import Output
from snapchain.cli.quantities import heading, moment, size
from snapchain.errors import Corrupt
from snapchain.host.terminal import counted

if TYPE_CHECKING:
    from rich.console import Console

    from snapchain.destination.usage import DiskUsage, StoredUsage


@verb(
    examples="""
    snapchain stats /backup
    snapchain stats /backup::web1/vda
    snapchain stats ssh://root@kvm2/srv/replica
    snapchain stats /backup --json | jq '.disks | sort_by(-.own_bytes)[:10][] | {disk, own_bytes}'
    """,
    when_interrupted="nothing was being changed",
)
@options.takes_output(passphrase=True, dry_run=False)
def stats(
    target: Annotated[str, options.address(metavar="DEST[::DISK]", help="A destination, or one disk of it.")],
    *,
    out: Output,
) -> None:
    """Show what a destination stores: by kind, by disk, and for one disk what each point added.

    Of a disk: `stored` is all that its points need; `own` is the part that no other disk needs, which dropping the disk
    and a gc would free. `newest` is what the newest point added, and `30 days` all points of the last 30 days.

    With a table of prices (SNAPCHAIN_PRICES), what is stored at an S3 server has a price for a month.

    The records of all layers are read, as gc reads them, and no guest data. Of a replica the files are measured.

    Damaged records are left out of the counts, and named; then stats ends with exit code 5.
    """
    from snapchain.destination.address import parse_destination

    address = parse_destination(target)
    disk = options.disk_of(address)
    found = options.destination(address.dest, out).usage(disk, on_event=out.on_event)
    if out.prices is not None:
        cost = round(out.prices.month(found.stored_bytes), 6)
        found = found.model_copy(update={"month_cost": cost, "currency": out.prices.currency})
    status = Corrupt.exit_code if found.findings else 0
    out.show(found, partial(_draw, disk=disk), problems=_draw_problems, status=status)


def _draw(console: Console, found: StoredUsage, *, disk: str | None) -> None:
    if disk is None:
        _draw_all(console, found)
    else:
        _draw_disk(console, next(each for each in found.disks if each.disk == disk))
    _draw_problems(console, found)


def _draw_all(console: Console, found: StoredUsage) -> None:
    objects = sum(each.objects for each in found.kinds)
    render.headline(console, f"{size(found.stored_bytes)} in {counted(objects, 'object')}")
    render.table(
        console,
        ["kind", "objects>", "bytes>"],
        [(each.kind, str(each.objects), size(each.bytes)) for each in found.kinds],
    )
    render.facts(
        console,
        [
            ("guest data", size(found.data_bytes)),
            ("without repetitions", _with_ratio(found.unique_bytes, found.deduplication)),
            ("compressed", _with_ratio(found.blob_bytes, found.compression)),
            ("maps", size(found.map_bytes) if found.map_bytes else ""),
            ("unreferenced", size(found.unreferenced_bytes) if found.unreferenced_bytes else ""),
            ("a month", _month(found.month_cost, found.currency)),
        ],
    )
    if found.disks:
        render.table(
            console,
            ["disk", "points>", "guest data>?", "stored>", "own>", "shared>", "newest>", "30 days>"],
            [_row(each) for each in found.disks],
        )


def _month(cost: float | None, currency: str | None) -> str:
    if cost is None:
        return ""
    return f"under 0.01 {currency}" if 0 < cost < 0.01 else f"{cost:.2f} {currency}"


def _row(disk: DiskUsage) -> list[str]:
    if disk.trouble is not None:
        return [disk.disk, "", "", "unreadable", "", "", "", ""]
    return [
        disk.disk,
        str(disk.point_count),
        size(disk.data_bytes),
        size(disk.stored_bytes),
        size(disk.own_bytes),
        size(disk.shared_bytes),
        size(disk.added_bytes),
        size(disk.month_bytes),
    ]


def _draw_disk(console: Console, disk: DiskUsage) -> None:
    render.headline(console, f"{disk.disk}: {size(disk.stored_bytes)}")
    render.facts(
        console,
        [
            ("guest data", size(disk.data_bytes)),
            ("own", size(disk.own_bytes)),
            ("shared", size(disk.shared_bytes)),
            ("of no point", size(disk.other_bytes) if disk.other_bytes else ""),
        ],
    )
    render.table(
        console,
        ["point>", heading("time"), "added>"],
        [(str(each.point), moment(each.time), size(each.added_bytes)) for each in disk.points],
    )


def _draw_problems(console: Console, found: StoredUsage) -> None:
    render.findings(console, found.findings)


def _with_ratio(count: int, ratio: float | None) -> str:
    return "" if ratio is None else f"{size(count)} ({ratio:.2f} : 1)"
