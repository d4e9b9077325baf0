r"""Text from outside, for a terminal and for a shell: names and messages may hold anything.

A newline, an escape sequence or a change of the writing direction in the name of a file would fake lines of a report,
or worse. People see it escaped (`a\nb`); JSON has the exact text. Messages carry names as they are (`encodable`): what
leaves for a terminal is escaped where it leaves (cli/render.py, exits.py, progress.py), and once more by the streams
themselves (cli/streams.py, console.py), so that nothing can be forgotten. Only the words of another host are
escaped where they come in.

A command that a message tells to type names files by `shell_word`, so that pasting it does what it says.
"""

from __future__ import annotations

import re
import shlex
import unicodedata
from collections.abc import Iterable

_MOST_PARTS = 12
"""Of a list of numbers: a year of daily points, each third of which is kept, would fill a screen."""

# Control characters; invisible ones that change what stands around them; lone halves of a pair; line separators.
_UNPRINTABLE = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
_JOINERS = frozenset("\u200c\u200d")  # they belong to words of some languages, and to emoji
_COLOUR_OR_LAYOUT = re.compile("(\x1b\\[[0-9;]*m|[\n\t])")


def printable(text: str) -> str:
    """The text on one line, with characters that a terminal would not show as Python's escapes."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(map(_shown, text))


def printable_lines(text: str) -> str:
    """The same for text that was made here: line feeds, tabs and colours stay."""
    if text.isascii() and text.replace("\n", "").isprintable():
        return text
    parts = _COLOUR_OR_LAYOUT.split(text)
    return "".join(part if at % 2 else printable(part) for at, part in enumerate(parts))


def encodable(name: str) -> str:
    """The name of a file as text that JSON and a protocol can hold: bytes that are no UTF-8 are escaped."""
    return name.encode("utf-8", "backslashreplace").decode()


def _shown(char: str) -> str:
    return char if _is_shown(char) else char.encode("unicode_escape").decode("ascii")


def _is_shown(char: str) -> bool:
    return unicodedata.category(char) not in _UNPRINTABLE or char in _JOINERS


def shell_word(word: object) -> str:
    """A word for a command line to paste: quoted where needed, by bash's `$'...'` where no terminal shows it all."""
    text = str(word)
    if all(map(_is_shown, text)):
        return shlex.quote(text)
    return f"$'{''.join(map(_in_dollar_quotes, text))}'"


def shell_line(words: Iterable[object]) -> str:
    """A command line to paste."""
    return " ".join(map(shell_word, words))


def _in_dollar_quotes(char: str) -> str:
    if char in "\\'":
        return f"\\{char}"
    if _is_shown(char):
        return char
    errors = "surrogateescape" if "\udc80" <= char <= "\udcff" else "surrogatepass"  # a byte of a name, or half a pair
    return "".join(f"\\x{byte:02x}" for byte in char.encode("utf-8", errors))


def counted(number: int, noun: str) -> str:
    """'1 disk', '2 disks'. noun: in the singular, one that takes an s."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def named(noun: str, numbers: Iterable[int]) -> str:
    """'point 3', 'points 1-5'; '' for no number. noun: in the singular, one that takes an s."""
    found = set(numbers)
    return f"{noun}{'' if len(found) == 1 else 's'} {numbered(found)}" if found else ""


def numbered(numbers: Iterable[int]) -> str:
    """'1, 2, 5-365': numbers for people. Three or more in a row become a range; what does not fit is only counted."""
    left = sorted(set(numbers))
    parts: list[str] = []
    while left:
        if len(parts) == _MOST_PARTS:
            return f"{', '.join(parts)} and {len(left)} more"
        row = next((at for at, number in enumerate(left) if number != left[0] + at), len(left))
        row = row if row > 2 else 1
        parts.append(str(left[0]) if row == 1 else f"{left[0]}-{left[row - 1]}")
        left = left[row:]
    return ", ".join(parts)
