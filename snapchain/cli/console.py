"""A rich console that escapes control characters in all text, so that no caller can forget it.

Only its own styles and cursor movements reach the terminal unchanged.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from snapchain.cli import streams
from snapchain.host.terminal import printable


class EscapingConsole(Console):
    """Writes to stdout or stderr, and bypasses the escaping of that stream."""

    def __init__(self, *, stderr: bool, **options: Any) -> None:
        stream = streams.unescaped(sys.stderr if stderr else sys.stdout)
        super().__init__(file=stream, highlight=False, markup=False, emoji=False, **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """The segments of text and of control codes; a text may hold the ends of its lines."""
        for segment in super().render(renderable, options):
            if segment.control or segment.text == "\n":
                yield segment
            else:
                text = "\n".join(map(printable, segment.text.split("\n")))
                yield Segment(text, segment.style)
