"""Facts, tables and the picture of a chain, for a terminal.

● web1.qcow2        top    ............#####...........   12.0 MiB
│
● web1.0001.qcow2          .....###.+++...........0....   20.5 MiB   4.0 MiB hidden
│
◉ base.qcow2        root   ####++++####################  812.0 MiB  16.0 MiB hidden
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from snapchain.cli import quantities

if TYPE_CHECKING:
    from rich.console import Console

    from snapchain.ops.verify import Finding

# A cell of model.strip -> how it is drawn, and in which colour.
_CELLS = {
    "#": ("█", "green"),
    "+": ("░", "yellow"),
    "0": ("0", "cyan"),
    ".": ("·", "dim"),
}


@dataclass(frozen=True, slots=True)
class LayerRow:
    """What the picture shows of one layer. strip: see model.strip; sizes in bytes."""

    name: str
    strip: str
    data_bytes: int
    shadowed_bytes: int


def headline(console: Console, text: str) -> None:
    """One sentence that says what happened."""
    console.print(text, style="bold", markup=False)


def facts(console: Console, rows: Iterable[tuple[str, str]]) -> None:
    """`name   value` lines, aligned; a value of '' is left out."""
    shown = [(name, value) for name, value in rows if value]
    width = max((len(name) for name, _ in shown), default=0)
    for name, value in shown:
        console.print(f"  {name:<{width}}  {value}", markup=False)


def findings(console: Console, found: Iterable[Finding]) -> None:
    """What is damaged, a line each, with the points that it affects."""
    for finding in found:
        points = ", ".join(map(str, finding.points))
        of = f" (disk {finding.disk}, points {points})" if finding.disk and points else ""
        console.print(f"  {finding.kind}: {finding.subject}: {finding.message}{of}", style="red", markup=False)


def place(path: str | Path) -> str:
    """A path as short as it can be from here; others, and URLs, as they are."""
    try:
        return str(Path(path).relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def table(console: Console, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """A table; a column whose name ends in '>' is set to the right."""
    from rich.table import Table

    drawn = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 3, 0, 0))
    for column in columns:
        right = column.endswith(">")
        drawn.add_column(column.removesuffix(">"), justify="right" if right else "left", no_wrap=True)
    for row in rows:
        drawn.add_row(*(cell.replace("[", r"\[") for cell in row))
    console.print(drawn)


def points_of_the_future(console: Console, disk: str, points: Iterable[str]) -> None:
    """A note where points are dated later than the clock."""
    named = list(points)
    if not named:
        return
    which = f"point {named[0]} is" if len(named) == 1 else f"points {', '.join(named)} are"
    console.print(
        f"note: {disk}: {which} dated in the future: a clock was wrong. No rule counts or drops what is so dated",
        style="yellow",
        markup=False,
    )


def picture(console: Console, layers: Sequence[LayerRow]) -> None:
    """The chain, top first, each layer's strip drawn to the scale of the disk. layers: root first."""
    from rich.text import Text

    width = max((len(layer.name) for layer in layers), default=0)
    for place, layer in reversed(list(enumerate(layers))):
        line = Text()
        line.append("◉ " if place == 0 else "● ", "bold")
        line.append(f"{layer.name:<{width}}  ")
        line.append(f"{_rank(place, len(layers)):<4}  ", "dim")
        for cell, run in groupby(layer.strip):
            glyph, style = _CELLS[cell]
            line.append(glyph * len(list(run)), style)
        line.append(f"  {quantities.size(layer.data_bytes):>10}")
        if layer.shadowed_bytes:
            line.append(f"  {quantities.size(layer.shadowed_bytes)} hidden", "yellow")
        console.print(line, no_wrap=True, crop=False, overflow="ignore")
        if place:
            console.print("│")
    legend = Text("  ").append("█", "green").append(" data seen   ").append("░", "yellow").append(" data hidden   ")
    console.print(legend.append("0", "cyan").append(" zero   ").append("·", "dim").append(" nothing: asks below"))


def _rank(place: int, count: int) -> str:
    if place == 0:
        return "root"
    return "top" if place == count - 1 else ""
