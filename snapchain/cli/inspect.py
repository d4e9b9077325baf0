"""`snapchain inspect ADDRESS`: show what each layer of a chain holds, drawn to scale."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from snapchain.cli import options, render
from snapchain.cli.app import verb
from snapchain.cli.output import Output
from snapchain.cli.quantities import size
from snapchain.host.terminal import counted

if TYPE_CHECKING:
    from rich.console import Console

    from snapchain.ops.inspect import InspectReport


@verb(
    examples="""
    snapchain inspect /images/web1.qcow2
    snapchain inspect /backup::web1/vda@7
    snapchain inspect web1.qcow2 --json | jq '.layers[] | {path, shadowed_bytes}'
    """,
    when_interrupted="nothing was being changed",
)
@options.takes_output(passphrase=True, dry_run=False, progress=False)
def inspect(
    target: Annotated[str, options.address(metavar="ADDRESS", help="An image, or DEST::DISK[@POINT].")],
    *,
    image_format: options.Format = None,
    image_dir: options.ImageDir = None,
    out: Output,
) -> None:
    """Show a chain: what each layer holds, and how much of that is hidden by layers above.

    Hidden data is what a merge frees. Reads headers and tables only, never data.
    """
    from snapchain.destination.address import ImageAddress, parse_address
    from snapchain.ops import inspect as ops

    address = parse_address(target)
    if isinstance(address, ImageAddress):
        report = ops.inspect_image(
            address.path,
            format=options.format_of(image_format),
            image_dirs=options.image_dirs(image_dir),
            on_event=out.on_event,
        )
    else:
        place = options.destination(address.dest, out)
        report = ops.inspect_point(place, address.disk, point=address.point)
    out.show(report, _draw)


def _draw(console: Console, report: InspectReport) -> None:
    layers = counted(len(report.layers), "layer")
    render.headline(console, f"{report.address}: {size(report.virtual_size)} in {layers}")
    render.picture(
        console,
        [
            render.LayerRow(layer.path.rpartition("/")[2], layer.strip, layer.data_bytes, layer.shadowed_bytes)
            for layer in report.layers
        ],
    )
    for layer in report.layers:
        for hold in layer.holds:
            why = f": {hold.reason}" if hold.reason else ""
            render.line(console, f"{layer.path.rpartition('/')[2]} is held under {hold.tag}{why}", style="cyan")
    for finding in report.findings:
        render.line(console, f"note: {finding}", style="yellow")
