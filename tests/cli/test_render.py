"""Tables and pictures at any width: names, sizes and states are whole, and nothing moves the cursor."""

from __future__ import annotations

import io

import pytest
from hypothesis import given, strategies as st
from rich.cells import cell_len
from rich.console import Console

from snapchain.cli import render
from snapchain.cli.render import LayerRow, folded, layout
from snapchain.host.terminal import printable

NAMES = st.text(st.characters(categories=["L", "N"], include_characters="-_./%"), min_size=1, max_size=120)
SIZES = st.sampled_from(["0 B", "1023.9 MiB", "64.0 KiB", "12.5 TiB", ""])
STATES = st.sampled_from(["ok", "failed", "busy", "made", ""])
PROSE = st.lists(st.text("abcdefg", min_size=1, max_size=12), max_size=12).map(" ".join)
COLUMNS = ["disk", "state", "size>", "files>?", "labels", "because~"]
ROWS = st.lists(st.tuples(NAMES, STATES, SIZES, st.sampled_from(["7", "123456"]), NAMES | st.just(""), PROSE))


def drawn(width: int, what: str, *arguments: object) -> list[str]:
    raw = io.StringIO()
    console = Console(file=raw, width=width, highlight=False, markup=False, emoji=False)
    getattr(render, what)(console, *arguments)
    return raw.getvalue().splitlines()


@given(ROWS, st.sampled_from([40, 60, 80, 200, render.UNBOUNDED]))
def test_no_cell_is_cut_or_broken(rows: list[tuple[str, ...]], width: int) -> None:
    head, body = layout(COLUMNS, rows, width)
    text = "\n".join(body)
    for row in rows:
        for title, cell in zip(COLUMNS, row, strict=True):
            if "~" in title:
                assert all(word in text for word in cell.split())
            elif "?" not in title:
                assert cell in text
    widest = max((cell_len(cell) for row in rows for cell in row[:5]), default=0)
    for line in (*head, *body):
        assert cell_len(line) <= max(width, widest + 12), "only a single cell may be wider than the terminal"
        assert line == line.rstrip()


@given(ROWS)
def test_where_there_is_room_a_row_is_a_line_and_its_columns_stand_below_one_another(
    rows: list[tuple[str, ...]],
) -> None:
    head, body = layout(COLUMNS, rows, render.UNBOUNDED)
    assert (len(head), len(body)) == ((1, len(rows)) if rows else (0, 0))
    if rows:
        assert layout(COLUMNS, rows, max(map(cell_len, (*head, *body)))) == (head, body), "it fits where it just fits"


def test_an_optional_column_goes_before_rows_are_stacked() -> None:
    rows = [("web1/vda", "ok", "1.0 GiB", "7", "", "")]
    whole = layout(["disk", "state", "size>", "files>?"], [row[:4] for row in rows], 80)
    narrow = layout(["disk", "state", "size>", "files>?"], [row[:4] for row in rows], 25)
    assert whole == (["disk       state      size   files"], ["web1/vda   ok      1.0 GiB       7"])
    assert narrow == (["disk      state     size"], ["web1/vda  ok     1.0 GiB"])


def test_a_long_name_stands_on_a_line_of_its_own() -> None:
    head, body = layout(["disk", "state", "size>"], [("x" * 100, "failed", "12.0 MiB")], 80)
    assert head == ["disk", "  state       size"]
    assert body == ["x" * 100, "  failed  12.0 MiB"]


def test_a_row_that_fits_no_line_is_stacked() -> None:
    head, body = layout(["point>", "labels", "held"], [("7", "a" * 50, "b" * 50)], 60)
    assert (head, body) == ([], ["point 7", f"  labels  {'a' * 50}", f"  held    {'b' * 50}"])


def test_wide_characters_take_two_columns() -> None:
    _, body = layout(["disk", "size>"], [("磁盘", "1 B"), ("disk", "2 B")], 80)
    assert body == ["磁盘    1 B", "disk    2 B"]


@given(PROSE, st.integers(10, 80))
def test_prose_is_folded_between_words(text: str, width: int) -> None:
    lines = folded(text, width)
    assert " ".join(lines) == text
    assert all(len(line) <= max(width, 12) for line in lines)


def test_a_number_stays_with_its_unit() -> None:
    assert folded("freed 12.5 MiB in 4 min 3 s", 14) == ["freed 12.5 MiB", "in 4 min 3 s"]
    assert "12.5 MiB" in folded("xxxxxx 12.5 MiB", 10)


LAYERS = [LayerRow("base.qcow2", "#" * 48, 1 << 40, 0), LayerRow("n" * 40, "." * 48, 0, 1 << 30)]


@pytest.mark.parametrize("width", [60, 80, 200])
def test_the_picture_of_a_chain_fits(width: int) -> None:
    lines = drawn(width, "picture", LAYERS)
    assert max(map(cell_len, lines)) <= width
    for whole in ("base.qcow2", "n" * 40, "1.0 TiB", "1.0 GiB hidden", "█" * 48, "·" * 48):
        assert any(whole in line for line in lines)


@pytest.mark.parametrize("width", [60, 80, 200, render.UNBOUNDED])
def test_sentences_and_facts_keep_their_words(width: int) -> None:
    name = "/images/" + "x" * 120
    for lines in (
        drawn(width, "headline", f"sealed {name}: the chain has 12 layers now"),
        drawn(width, "facts", [("sealed", f"{name} (as it was)"), ("nothing", "")]),
        drawn(width, "line", f"left: {name}"),
    ):
        assert any(name in line for line in lines)
        assert not any("nothing" in line for line in lines)


CONTROL = "a\nb\x1b[31m\r\tc\x7f\u202e\u2028\x9b"


def test_control_characters_are_escaped() -> None:
    shown = printable(CONTROL)
    assert shown == r"a\nb\x1b[31m\r\tc\x7f\u202e\u2028\x9b"
    assert printable("Übung 磁盘 a::b 👩‍💻") == "Übung 磁盘 a::b 👩‍💻"


@pytest.mark.parametrize("width", [60, render.UNBOUNDED])
def test_no_name_moves_the_cursor(width: int) -> None:
    for what, arguments in {
        "headline": (CONTROL,),
        "line": (CONTROL,),
        "facts": ([("name", CONTROL)],),
        "table": (["disk", "size>"], [(CONTROL, "1 B")]),
        "picture": ([LayerRow(CONTROL, "##", 1, 0)],),
        "command": (CONTROL.replace("\n", ""),),
    }.items():
        text = "\n".join(drawn(width, what, *arguments))
        assert r"\x1b[31m" in text
        assert not set(text) & set(CONTROL) - set("ab[31mc\n"), what


def test_a_name_is_no_markup() -> None:
    assert drawn(80, "headline", "[red]x[/red] :bug:") == ["[red]x[/red] :bug:"]
    assert drawn(80, "table", ["disk"], [("[red]x :bug:",)])[1:] == ["[red]x :bug:"]


def test_only_the_renderer_prints() -> None:
    from pathlib import Path

    folder = Path(render.__file__).parent
    others = [path for path in folder.glob("*.py") if path.stem not in {"render", "stack_picture", "progress"}]
    assert not [path.name for path in others if "console.print" in path.read_text()]
