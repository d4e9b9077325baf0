"""Text from outside: what a terminal would obey is escaped, and a command to paste says what it does."""

from __future__ import annotations

import subprocess
import unicodedata
from collections.abc import Iterable

import pytest
from hypothesis import given, settings, strategies as st

from snapchain.host.terminal import counted, encodable, numbered, printable, printable_lines, shell_line

ANY = st.text(st.characters(), max_size=40) | st.binary(max_size=40).map(
    lambda raw: raw.decode("utf-8", "surrogateescape")
)
WORDS = st.lists(ANY.map(lambda text: encodable(text.replace("\0", ""))), min_size=1, max_size=20)


def is_harmless(text: str) -> bool:
    """Nothing in it that a terminal would obey, or that no encoding has."""
    hidden = {"Cc", "Cf", "Cs", "Zl", "Zp"}
    return all(unicodedata.category(char) not in hidden or char in "\u200c\u200d" for char in text)


@given(ANY)
def test_what_a_terminal_obeys_is_escaped(text: str) -> None:
    shown = printable(text)
    assert is_harmless(shown)
    assert printable(shown) == shown
    assert is_harmless(text) == (shown == text)


def test_each_character_that_a_terminal_obeys() -> None:
    for number in (*range(0x20), *range(0x7F, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A), 0xDCFF, 0xFEFF):
        assert printable(chr(number)).startswith("\\"), hex(number)


@given(ANY)
def test_lines_keep_their_ends_and_colours_alone(text: str) -> None:
    shown = printable_lines(f"\x1b[1;31m{text}\x1b[0m\n")
    assert shown.startswith("\x1b[1;31m")
    assert shown.endswith("\x1b[0m\n")
    inner = shown.removeprefix("\x1b[1;31m").removesuffix("\x1b[0m\n")
    assert is_harmless(inner.replace("\n", "").replace("\t", ""))


@pytest.mark.parametrize("sequence", ["\x1b[2J", "\x1b]0;t\x07", "\x1b[1A", "\x1bc", "\x9b31m", "\r", "\x1b[31", "\b"])
def test_no_other_sequence_passes(sequence: str) -> None:
    assert is_harmless(printable_lines(sequence))


@given(ANY)
def test_a_name_becomes_text_that_can_be_encoded(text: str) -> None:
    assert encodable(text).encode().decode() == encodable(text)


@settings(max_examples=20)
@given(WORDS)
def test_a_shell_reads_what_was_meant(words: list[str]) -> None:
    line = shell_line(words)
    assert is_harmless(line)
    done = subprocess.run(["bash", "-c", f"printf '%s\\0' {line}"], capture_output=True, check=True)
    assert done.stdout.decode().split("\0")[:-1] == words


def test_a_shell_reads_bytes_that_are_no_text() -> None:
    done = subprocess.run(["bash", "-c", shell_line(["printf", "%s", "a\udcffb"])], capture_output=True, check=True)
    assert done.stdout == b"a\xffb"


def test_numbers_agree_with_their_nouns() -> None:
    assert [counted(number, "disk") for number in (0, 1, 2)] == ["0 disks", "1 disk", "2 disks"]


@pytest.mark.parametrize(
    ("numbers", "words"),
    [
        ([], ""),
        ([7], "7"),
        ([2, 1], "1, 2"),
        ([1, 2, 3, 5], "1-3, 5"),
        (range(1, 366), "1-365"),
        (range(1, 25, 2), "1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23"),
        (range(1, 366, 2), "1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23 and 171 more"),
    ],
)
def test_a_list_of_numbers_fits_on_a_line(numbers: Iterable[int], words: str) -> None:
    assert numbered(numbers) == words
