"""Sentences, facts, tables and the picture of a chain, for a terminal of any width.

● web1.qcow2        top    ............#####...........   12.0 MiB
│
● web1.0001.qcow2          .....###.+++...........0....   20.5 MiB  4.0 MiB hidden
│
◉ base.qcow2        root   ####++++####################  812.0 MiB  16.0 MiB hidden

Names, sizes and states are never cut, and never broken over two lines. Where a line is too narrow for a row, prose is
folded between words, then optional columns are left out, then the cells of a row are put below one another. All text
goes through `printable`: this module and stack_picture are the only ones that write to a console.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from snapchain.cli import quantities
from snapchain.host.terminal import named, printable

if TYPE_CHECKING:
    from rich.console import Console

    from snapchain.destination.records import Finding
    from snapchain.model.lease import Lease
    from snapchain.model.traffic import Bill

UNBOUNDED = 10_000
"""Columns of a file or a pipe, where lines have no end."""

# A cell of model.strip -> how it is drawn, in ASCII, and in which colour.
_CELLS = {
    "#": ("█", "#", "green"),
    "+": ("░", "+", "yellow"),
    "0": ("0", "0", "cyan"),
    ".": ("·", ".", "dim"),
}
_GUTTERS = (3, 2)
_PRINTED_AT_ONCE = 1000
"""Lines of a table: each call costs more than a line."""
_INDENT = 2
_LEAST_PROSE = 20
"""Columns: narrower prose is no reading."""
# A number and its unit are one word.
_BREAK = re.compile(r"(?<!\d) | (?!(?:B|[KMGT]iB|s|min|h)\b)")


@dataclass(frozen=True, slots=True)
class LayerRow:
    """What the picture shows of one layer. strip: see model.strip; sizes in bytes."""

    name: str
    strip: str
    data_bytes: int
    shadowed_bytes: int


def line(console: Console, text: str, *, style: str = "", indent: int = 0) -> None:
    """One sentence, folded between words; what belongs to it is indented."""
    from rich.text import Text

    for number, part in enumerate(folded(printable(text), console.width - indent, hanging=_INDENT)):
        pad = " " * (indent if number == 0 else indent + _INDENT)
        console.print(Text(pad + part, style), soft_wrap=True)


def command(console: Console, text: str, *, indent: int = 0) -> None:
    """Lines to be copied as they are, however long."""
    for row in text.split("\n"):
        console.print(" " * indent + printable(row), markup=False, soft_wrap=True)


def headline(console: Console, text: str) -> None:
    """One sentence that says what happened."""
    line(console, text, style="bold")


def facts(console: Console, rows: Iterable[tuple[str, str]]) -> None:
    """`name   value` lines, aligned; a value of '' is left out."""
    shown = [(name, printable(value)) for name, value in rows if value]
    width = max((len(name) for name, _ in shown), default=0)
    for name, value in shown:
        first, *rest = folded(value, console.width - width - 2 * _INDENT)
        console.print(f"{'':{_INDENT}}{name:<{width}}  {first}", markup=False, soft_wrap=True)
        for part in rest:
            console.print(f"{'':{width + 2 * _INDENT}}{part}", markup=False, soft_wrap=True)


def traffic(console: Console, bills: Iterable[Bill]) -> None:
    """What was asked of destinations, and what it costs."""
    shown = list(bills)
    facts(
        console,
        [("requests" if len(shown) == 1 else f"requests to {place(each.destination)}", asked(each)) for each in shown],
    )


def asked(bill: Bill) -> str:
    """'12 (3 PUT, 1 LIST, 8 GET), 2 repeated (1 after SlowDown), 16.0 MiB up, 1.2 KiB down, 0.0021 USD'"""
    kinds = {"PUT": bill.puts, "LIST": bill.lists, "GET": bill.gets, "HEAD": bill.heads, "DELETE": bill.deletes}
    words = [f"{bill.requests} ({', '.join(f'{count} {kind}' for kind, count in kinds.items() if count)})"]
    if bill.retries:
        words.append(f"{bill.retries} repeated" + (f" ({bill.refused} after SlowDown)" if bill.refused else ""))
    words += [f"{quantities.size(bill.bytes_up)} up", f"{quantities.size(bill.bytes_down)} down"]
    if bill.cost is not None:
        words.append(f"{bill.cost:.4f} {bill.currency}" if bill.cost >= 0.0001 else f"under 0.0001 {bill.currency}")
    return ", ".join(words)


def folded(text: str, width: int, *, hanging: int = 0) -> list[str]:
    """The text in lines of `width` columns, broken between words only; `hanging`: columns lost after the first."""
    from rich.cells import cell_len

    lines: list[str] = []
    for word in _BREAK.split(text):
        room = width - (hanging if len(lines) > 1 else 0)
        if lines and cell_len(lines[-1]) + 1 + cell_len(word) <= room:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines


def findings(console: Console, found: Iterable[Finding]) -> None:
    """What is damaged, a line each, with the points that it affects."""
    for finding in found:
        points = named("point", finding.points)
        of = f" (disk {finding.disk}, {points})" if finding.disk and points else ""
        line(console, f"{finding.kind}: {finding.subject}: {finding.message}{of}", style="red", indent=2)


def place(path: str | Path) -> str:
    """A path as short as it can be from here; others, and URLs, as they are."""
    try:
        return str(Path(path).relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def lease(held: Lease) -> str:
    """Such as `30 s, of kvm1, renewed 2026-11-30 04:10:12 (412 times)`."""
    renewed = "" if held.renewed is None else f", renewed {quantities.moment(held.renewed)} ({held.count} times)"
    witness = ", this is the witness" if held.is_witness else f", witness {held.witness}" if held.witness else ""
    return f"{held.seconds} s, of {held.host}{renewed}{witness}"


def table(console: Console, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """A table. The marks at the end of a column's title are not shown:

    >  numbers, set to the right
    ?  may be left out where there is no room
    ~  prose, folded between words: for the last column, and for the first where it stands on a line of its own
    """
    head, body = layout(columns, [list(row) for row in rows], console.width)
    for text in head:
        console.print(text, style="bold", markup=False, soft_wrap=True)
    for at in range(0, len(body), _PRINTED_AT_ONCE):
        console.print("\n".join(body[at : at + _PRINTED_AT_ONCE]), markup=False, soft_wrap=True)


@dataclass(frozen=True, slots=True)
class _Column:
    """One column. cells: of its title and of each row; width: of the widest."""

    title: str
    marks: str
    cells: tuple[str, ...]

    @property
    def width(self) -> int:
        return max(map(_width, (self.title, *self.cells)))


def layout(columns: Sequence[str], rows: Sequence[Sequence[str]], width: int) -> tuple[list[str], list[str]]:
    """The lines of a table's head and of its body, of `width` columns wherever no single cell is wider."""
    found = []
    for at, name in enumerate(columns):
        title = name.rstrip(">?~")
        cells = tuple(printable(row[at]) for row in rows)
        if any(cells):  # an empty column is left out
            found.append(_Column(title, name[len(title) :], cells))
    if not found:
        return [], []
    needed = [column for column in found if "?" not in column.marks]
    for chosen in (found, needed):
        for gutter in _GUTTERS:
            if (lines := _rows(chosen, width, gutter, fold=False)) is not None:
                return lines
        if (lines := _rows(chosen, width, _GUTTERS[-1], fold=True)) is not None:
            return lines
    return _two_lines(found, width) or _stacked(found, width)


def _rows(columns: Sequence[_Column], width: int, gutter: int, *, fold: bool) -> tuple[list[str], list[str]] | None:
    """One row below the other; None where they do not fit."""
    widths = [column.width for column in columns]
    if fold and "~" in columns[-1].marks:
        room = width - sum(widths[:-1]) - gutter * (len(widths) - 1)
        words = [_width(word) for cell in columns[-1].cells for word in _BREAK.split(cell)]
        if room >= max(_LEAST_PROSE, _width(columns[-1].title), *words):
            widths[-1] = min(widths[-1], room)
    if sum(widths) + gutter * (len(widths) - 1) > width:
        return None

    def drawn(cells: Sequence[str]) -> list[str]:
        last = folded(cells[-1], widths[-1])
        lines = []
        for number, part in enumerate(last):
            row = [*(cells[:-1] if number == 0 else [""] * (len(cells) - 1)), part]
            padded = [_pad(cell, wide, column) for cell, wide, column in zip(row, widths, columns, strict=True)]
            lines.append((" " * gutter).join(padded).rstrip())
        return lines

    body = [drawn(cells) for cells in zip(*(column.cells for column in columns), strict=True)]
    return drawn([column.title for column in columns]), [text for lines in body for text in lines]


def _two_lines(columns: Sequence[_Column], width: int) -> tuple[list[str], list[str]] | None:
    """The first cell on a line of its own, the others below it; None where they do not fit."""
    below = _rows(columns[1:], width - _INDENT, _GUTTERS[-1], fold=False) if len(columns) > 1 else None
    if below is None:
        return None
    head, body = below
    lines = []
    for key, rest in zip(columns[0].cells, body, strict=True):
        first, *more = folded(key, width, hanging=2 * _INDENT) if "~" in columns[0].marks else [key]
        lines += [first, *(f"{'':{2 * _INDENT}}{part}" for part in more), f"{'':{_INDENT}}{rest}".rstrip()]
    return [columns[0].title, *(" " * _INDENT + text for text in head)], lines


def _stacked(columns: Sequence[_Column], width: int) -> tuple[list[str], list[str]]:
    """Each row as `title key`, with facts below it."""
    names = max(_width(column.title) for column in columns)
    lines = []
    for key, *cells in zip(*(column.cells for column in columns), strict=True):
        lines.append(f"{columns[0].title} {key}")
        for column, cell in zip(columns[1:], cells, strict=True):
            if not cell:
                continue
            room = width - names - 2 * _INDENT
            for number, part in enumerate(folded(cell, room) if "~" in column.marks else [cell]):
                title = column.title if number == 0 else ""
                lines.append(f"{'':{_INDENT}}{title:<{names}}{'':{_INDENT}}{part}")
    return [], lines


def _pad(cell: str, wide: int, column: _Column) -> str:
    gap = " " * (wide - _width(cell))
    return gap + cell if ">" in column.marks else cell + gap


def _width(text: str) -> int:
    """Columns of a terminal: a Chinese character takes two, a combining accent none."""
    from rich.cells import cell_len

    return cell_len(text)


def is_unicode(console: Console) -> bool:
    """Whether lines and blocks can be drawn."""
    return "utf" in (console.encoding or "").lower()


def points_of_the_future(console: Console, disk: str, points: Iterable[int]) -> None:
    """A note where points are dated later than the clock."""
    numbers = list(points)
    if not numbers:
        return
    which = f"{named('point', numbers)} {'is' if len(numbers) == 1 else 'are'}"
    words = f"note: {disk}: {which} dated in the future: a clock was wrong. No rule counts or drops such points"
    line(console, words, style="yellow")


def unchanged(console: Console, disks: Sequence[str]) -> None:
    """A note about disks whose new point shows what the one before it shows."""
    if disks:
        words = "nothing has changed since the point before, and the new one shows the same"
        line(console, f"note: {', '.join(disks)}: {words}", style="yellow")


def picture(console: Console, layers: Sequence[LayerRow]) -> None:
    """The chain, top first, each layer's strip drawn to the scale of the disk. layers: root first."""
    from rich.text import Text

    glyph = 0 if is_unicode(console) else 1
    root, other, link = ("◉ ", "● ", "│ ") if glyph == 0 else ("@ ", "* ", "| ")
    names = [printable(layer.name) for layer in layers]
    width = max(map(_width, names), default=0)
    shown = [quantities.size(layer.data_bytes) for layer in layers]
    hidden = [f"{quantities.size(layer.shadowed_bytes)} hidden" if layer.shadowed_bytes else "" for layer in layers]
    cells = max((len(layer.strip) for layer in layers), default=0)
    sizes = max((len(size) for size in shown), default=0)
    whole = 2 + width + 2 + 4 + 2 + cells + 2 + max(10, sizes) + 2 + max(map(len, hidden), default=0)
    stacked = whole > console.width
    for at, layer in reversed(list(enumerate(layers))):
        strip = Text()
        for cell, run in groupby(layer.strip):
            strip.append(_CELLS[cell][glyph] * len(list(run)), _CELLS[cell][2])
        row = Text(root if at == 0 else other, "bold")
        row.append(names[at] + " " * (0 if stacked else width - _width(names[at])), "not bold").append("  ")
        rank = _rank(at, len(layers))
        size = Text(shown[at] if stacked else f"{shown[at]:>10}")
        size.append(f"  {hidden[at]}" if hidden[at] else "", "yellow")
        below = link if at else "  "
        if not stacked:
            row.append(f"{rank:<4}  ", "not bold dim").append_text(strip).append("  ").append_text(size)
            console.print(row, soft_wrap=True)
        else:
            row.append(f"{rank}  " if rank else "", "not bold dim")
            if row.cell_len + size.cell_len <= console.width:
                row.append_text(size)
                size = Text()
            row.rstrip()
            for part in (row, Text(below).append_text(strip), *([Text(below).append_text(size)] if size else [])):
                console.print(part, soft_wrap=True)
        if at:
            console.print(link.strip())
    legend = Text()
    for cell, words in (("#", "data seen"), ("+", "data hidden"), ("0", "zero"), (".", "nothing: asks below")):
        entry = Text("   " if legend else "  ").append(_CELLS[cell][glyph], _CELLS[cell][2]).append(f" {words}")
        if legend and legend.cell_len + entry.cell_len > console.width:
            console.print(legend, soft_wrap=True)
            legend, entry = Text(), entry[1:]
        legend.append_text(entry)
    console.print(legend, soft_wrap=True)


def _rank(at: int, count: int) -> str:
    if at == 0:
        return "root"
    return "top" if at == count - 1 else ""
