"""The picture of a merge, to the letter, 80 columns wide."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from snapchain.cli.stack_picture import Held, Row, draw

MiB = 1 << 20


def drawn(rows: list[Row], encoding: str, *, colour: bool = False, width: int = 80) -> str:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding=encoding)
    draw(Console(file=stream, width=width, force_terminal=colour, color_system="standard" if colour else None), rows)
    stream.flush()
    return raw.getvalue().decode(encoding)


STACK = [
    Row("base.qcow2", Held(812 * MiB, 100 * MiB), Held(812 * MiB, 100 * MiB)),
    Row("web1.1.qcow2", Held(64 * MiB, 64 * MiB), None, merge=0),
    Row("web1.2.qcow2", Held(130 * MiB, 40 * MiB), Held(150 * MiB, 10 * MiB), merge=0),
    Row("held.qcow2", Held(1, 0), Held(1, 0)),
    Row("web1.4.qcow2", Held(0, 0), None, merge=1),
    Row("web1.5.qcow2", Held(200 * MiB, 199 * MiB), None, merge=1),
    Row("a-name-that-is-far-too-long.qcow2", Held(120 * MiB, 0), Held(121 * MiB, 0), merge=1),
]

LINES = """\
                           now                          then
top   a-name-that-is-far-too-long.qcow2
                           ██             120.0 MiB ─┐  ██             121.0 MiB
      web1.5.qcow2         █░░            200.0 MiB ─┤
      web1.4.qcow2                              0 B ─┘
      held.qcow2           █                    1 B     █                    1 B
      web1.2.qcow2         █░             130.0 MiB ─┐  ██░            150.0 MiB
      web1.1.qcow2         ░               64.0 MiB ─┘
root  base.qcow2           ████████████░░ 812.0 MiB     ████████████░░ 812.0 MiB
      █ data seen   ░ data hidden by layers above
"""

ASCII = """\
                           now                          then
top   a-name-that-is-far-too-long.qcow2
                           ##             120.0 MiB -.  ##             121.0 MiB
      web1.5.qcow2         #++            200.0 MiB -|
      web1.4.qcow2                              0 B -'
      held.qcow2           #                    1 B     #                    1 B
      web1.2.qcow2         #+             130.0 MiB -.  ##+            150.0 MiB
      web1.1.qcow2         +               64.0 MiB -'
root  base.qcow2           ############++ 812.0 MiB     ############++ 812.0 MiB
      # data seen   + data hidden by layers above
"""


def test_in_lines() -> None:
    assert drawn(STACK, "utf-8") == LINES


def test_in_ascii() -> None:
    assert drawn(STACK, "ascii") == ASCII


def test_in_colour_the_text_is_the_same() -> None:
    assert re.sub(r"\x1b\[[0-9;]*m", "", drawn(STACK, "utf-8", colour=True)) == drawn(STACK, "utf-8")


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_no_line_is_wider_than_a_terminal(encoding: str) -> None:
    for width in (60, 80, 200):
        lines = drawn(STACK, encoding, width=width).splitlines()
        assert max(map(len, lines)) <= width
        assert all(row.name in "\n".join(lines) for row in STACK), "no name is cut"
