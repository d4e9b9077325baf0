"""The project's documents as tests read them: sections, console blocks, the commands in them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
GUIDE = ROOT / "docs" / "guide"
PAGES = [ROOT / "README.md", *sorted(GUIDE.glob("*.md"))]


def section(text: str, title: str) -> str:
    """The text under a heading, up to the next one of any level."""
    return re.split(r"^#+ ", text.split(f"# {title}\n", 1)[1], maxsplit=1, flags=re.MULTILINE)[0]


def anchors(text: str) -> set[str]:
    """What `#...` of a link may name: the headings, as GitHub spells them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@dataclass(frozen=True)
class Command:
    """A line of a console block.

    line: without the prompt; words: of `snapchain` alone, without its name and without pipes, redirections, variables
    plain: nothing but `snapchain` and its words, so that a test may run it
    """

    page: str
    line: str
    words: tuple[str, ...]
    plain: bool


def commands(page: Path) -> Iterator[Command]:
    """Every command of `snapchain` in the console blocks of a page, in order; both ends of a pipe."""
    for block in re.findall(r"^```console\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL):
        for line in re.findall(r"^[$#] (.*)$", block, re.MULTILINE):
            lexer = shlex.shlex(line, posix=True, punctuation_chars="|<>;")
            lexer.whitespace_split = True
            words = list(lexer)
            for at, word in enumerate(words):
                if word == "snapchain":
                    end = next((n for n, each in enumerate(words) if n > at and set(each) <= set("|<>;")), len(words))
                    yield Command(page.name, line, tuple(words[at + 1 : end]), plain=at == 0 and end == len(words))
