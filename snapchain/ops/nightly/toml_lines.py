"""On which line of a TOML document each value stands: what tomllib knows while it reads, and does not tell.

Reads only documents that tomllib has accepted, so it looks for ends and judges nothing.

    {("disks",): 3, ("disks", 0): 3, ("disks", 0, "glob"): 4, ("disks", 0, "keep", "last"): 7, ...}
"""

from __future__ import annotations

import re
import tomllib

OpenDestination = tuple[str | int, ...]

_BARE = re.compile(r"[A-Za-z0-9_-]+")
_SCALAR = re.compile(r"[^,\]}\n#]*")
_BLANK = re.compile(r"[ \t]*")
_SPACE = re.compile(r"(?:[ \t\r\n]|#[^\n]*)*")
_STRINGS = (
    re.compile(r'"""(?:[^\\]|\\.)*?"{3,5}', re.DOTALL),
    re.compile(r"'''.*?'{3,5}", re.DOTALL),
    re.compile(r'"(?:[^"\\\n]|\\.)*"'),
    re.compile(r"'[^'\n]*'"),
)


def lines_of(text: str) -> dict[OpenDestination, int]:
    """Lines count from 1. text: a valid TOML document."""
    return _Reader(text).read()


class _Reader:
    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0
        self._found: dict[OpenDestination, int] = {}
        self._lengths: dict[OpenDestination, int] = {}

    def read(self) -> dict[OpenDestination, int]:
        table: OpenDestination = ()
        while True:
            self._skip(_SPACE)
            if self._at >= len(self._text):
                return self._found
            if self._text.startswith("[[", self._at):
                table = self._header(brackets=2)
            elif self._text.startswith("[", self._at):
                table = self._header(brackets=1)
            else:
                self._pair(table)

    def _header(self, *, brackets: int) -> OpenDestination:
        line = self._line()
        self._at += brackets
        names = self._key()
        self._at += brackets
        table: OpenDestination = ()
        for name in names[:-1]:
            table = self._inside((*table, name), line)
        table = (*table, names[-1])
        if brackets == 2:
            self._found.setdefault(table, line)
            self._lengths[table] = self._lengths.get(table, 0) + 1
            table = (*table, self._lengths[table] - 1)
        self._found[table] = line
        return table

    def _inside(self, place: OpenDestination, line: int) -> OpenDestination:
        """The table at `place`, or the last one of an array of tables."""
        self._found.setdefault(place, line)
        return (*place, self._lengths[place] - 1) if place in self._lengths else place

    def _pair(self, table: OpenDestination) -> None:
        line = self._line()
        place = table
        for name in self._key():
            place = (*place, name)
            self._found.setdefault(place, line)
        self._at += 1  # the equals sign
        self._skip(_BLANK)
        self._value(place)

    def _key(self) -> list[str]:
        names = []
        while True:
            self._skip(_BLANK)
            quoted = self._string()
            if quoted is None:
                names.append(self._skip(_BARE))
            else:
                names.append(str(tomllib.loads(f"x = {quoted}")["x"]))
            self._skip(_BLANK)
            if not self._text.startswith(".", self._at):
                return names
            self._at += 1

    def _value(self, place: OpenDestination) -> None:
        self._found.setdefault(place, self._line())
        if self._string() is not None:
            return
        opening = self._text[self._at]
        if opening == "[":
            self._at += 1
            number = 0
            while not self._closed("]"):
                self._value((*place, number))
                number += 1
        elif opening == "{":
            self._at += 1
            while not self._closed("}"):
                self._pair(place)
        else:
            self._skip(_SCALAR)

    def _closed(self, bracket: str) -> bool:
        """Past commas and blanks, and past the bracket when it comes next."""
        self._skip(_SPACE)
        if self._text.startswith(",", self._at):
            self._at += 1
            self._skip(_SPACE)
        closed = self._text.startswith(bracket, self._at)
        self._at += closed
        return closed

    def _string(self) -> str | None:
        for kind in _STRINGS:
            match = kind.match(self._text, self._at)
            if match:
                self._at = match.end()
                return match[0]
        return None

    def _skip(self, what: re.Pattern[str]) -> str:
        match = what.match(self._text, self._at)
        if match is None:
            return ""
        self._at = match.end()
        return match[0]

    def _line(self) -> int:
        return self._text.count("\n", 0, self._at) + 1
