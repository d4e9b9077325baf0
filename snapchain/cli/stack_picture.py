"""A chain before and after a merge, side by side, to the scale of what its layers hold.

                      now                       then
top   web1.qcow2      ████░░          12.0 MiB      ████░░          12.0 MiB
      web1.3.qcow2    ██████░         20.5 MiB ─┐   ████████        24.0 MiB
      web1.2.qcow2    ██░░            10.5 MiB ─┤
      web1.1.qcow2    █░               4.5 MiB ─┘
root  base.qcow2      ██████████████ 812.0 MiB      ██████████████ 812.0 MiB
      █ data seen   ░ data hidden by layers above

A merged layer stands where its uppermost file was, whose name it takes. A name that is too long for the
line is printed on a line of its own, above.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from snapchain.cli import quantities
from snapchain.cli.render import is_unicode
from snapchain.host.terminal import printable

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

_BAR = 14
_RANK = 6
_HALF = _BAR + 10
_BESIDE = _RANK + 2 + _HALF + 5 + _HALF
"""Columns of a line beside the name."""
_LEAST_NAME = 8
"""Columns; with fewer for a name, all names stand above."""


@dataclass(frozen=True, slots=True)
class Held:
    """What one layer holds, in bytes; hidden: by layers above, a part of it."""

    data: int
    hidden: int


@dataclass(frozen=True, slots=True)
class Row:
    """One file of the chain. then: what stands in its place afterwards, None where nothing does.

    merge: number of the merge that takes the file, if one does
    """

    name: str
    now: Held
    then: Held | None
    merge: int | None = None


@dataclass(frozen=True, slots=True)
class _Glyphs:
    seen: str
    hidden: str
    first: str
    inner: str
    last: str


_LINES = _Glyphs("█", "░", "─┐", "─┤", "─┘")
_ASCII = _Glyphs("#", "+", "-.", "-|", "-'")


def draw(console: Console, rows: Sequence[Row]) -> None:
    """rows: root first."""
    from rich.cells import cell_len
    from rich.text import Text

    glyphs = _LINES if is_unicode(console) else _ASCII
    scale = max((held.data for row in rows for held in (row.now, row.then) if held), default=0)
    names = [printable(row.name) for row in rows]
    room = console.width - _BESIDE
    width = min(room, max(map(cell_len, names), default=0)) if room >= _LEAST_NAME else 0
    gap = 2 if width else 0
    console.print(Text(f"{'':{_RANK + width + gap}}{'now':<{_HALF + 5}}then", "dim"), soft_wrap=True)
    for place, row in reversed(list(enumerate(rows))):
        name = names[place]
        line = Text()
        line.append(f"{_rank(place, len(rows)):<{_RANK}}", "dim")
        if cell_len(name) > width:
            console.print(line.append(name), soft_wrap=True)
            line, name = Text(" " * _RANK), ""
        line.append(name + " " * (width - cell_len(name) + gap))
        _bar(line, row.now, scale, glyphs)
        line.append(f" {_tie(rows, place, glyphs):<3} ", "bold")
        if row.then is not None:
            _bar(line, row.then, scale, glyphs)
        line.rstrip()
        console.print(line, soft_wrap=True)
    legend = Text("      ").append(glyphs.seen, "green").append(" data seen   ")
    console.print(legend.append(glyphs.hidden, "yellow").append(" data hidden by layers above"), soft_wrap=True)


def _bar(line: Text, held: Held, scale: int, glyphs: _Glyphs) -> None:
    whole, hidden = _cells(held.data, scale), _cells(held.hidden, scale)
    if held.data > held.hidden and whole == hidden:
        # A layer of which something is seen never looks as if it were hidden whole.
        whole, hidden = (whole, hidden - 1) if whole > 1 else (2, 1)
    line.append(glyphs.seen * (whole - hidden), "green")
    line.append(glyphs.hidden * hidden, "yellow")
    line.append(f"{'':{_BAR - whole}} {quantities.size(held.data):>9}")


def _cells(count: int, scale: int) -> int:
    """Anything beats nothing: a layer of one cluster is seen beside one of a terabyte."""
    return min(_BAR, max(1, round(_BAR * count / scale))) if count else 0


def _tie(rows: Sequence[Row], place: int, glyphs: _Glyphs) -> str:
    merge = rows[place].merge
    if merge is None:
        return ""
    above = place + 1 < len(rows) and rows[place + 1].merge == merge
    below = place > 0 and rows[place - 1].merge == merge
    if above and below:
        return glyphs.inner
    return glyphs.last if above else glyphs.first


def _rank(place: int, count: int) -> str:
    if place == 0:
        return "root"
    return "top" if place == count - 1 else ""
