r"""Text from outside for a terminal: names and messages may hold anything, and must not move its cursor.

A newline, an escape sequence or a change of the writing direction in the name of a file would fake lines of a report,
or worse. People see it escaped (`a\nb`); JSON has the exact text.
"""

from __future__ import annotations

import unicodedata

# Control characters; invisible ones that change what stands around them; lone halves of a pair; line separators.
_UNPRINTABLE = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
_JOINERS = frozenset("\u200c\u200d")  # they belong to words of some languages, and to emoji


def printable(text: str) -> str:
    """The text on one line, with characters that a terminal would not show as Python's escapes."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(map(_shown, text))


def _shown(char: str) -> str:
    if unicodedata.category(char) not in _UNPRINTABLE or char in _JOINERS:
        return char
    return char.encode("unicode_escape").decode("ascii")
