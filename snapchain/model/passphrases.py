"""Which passphrases a guesser tries first.

A rule of thumb for a person at a terminal, not a measure of strength: it refuses what is short, common, repeated, a row
of keys, or a name that the store or the host shows.  What it lets through may still be weak.
"""

from __future__ import annotations

from collections.abc import Iterable

SHORTEST = 8
"""Characters (NIST SP 800-63B)."""
_LEAST_DIFFERENT = 5
_LEAST_BESIDE = 4
"""Characters that must stand beside a common word or a name."""
_LEAST_NAME = 3
_ROW = 5
"""Neighbouring keys or letters that count as one character."""

_ROWS = (
    "qwertyuiop",
    "qwertzuiop",
    "azertyuiop",
    "asdfghjkl",
    "zxcvbnm",
    "1234567890",
    "0123456789",
    "abcdefghijklmnopqrstuvwxyz",
    "1qaz2wsx3edc4rfv5tgb",
    "1q2w3e4r5t6y7u8i9o0p",
    "q1w2e3r4t5y6u7i8o9p0",
)
_COMMON = """
abc access account admin administrator alex amanda america andrea andrew angel anthony apple archive arsenal asdf
ashley austin autumn azerty baby babygirl backup backups bailey banana barcelona baseball basketball batman
beautiful bitcoin blink borg buster butterfly change changeit changeme charlie cheese chelsea chocolate chris
computer cookie correcthorse correcthorsebatterystaple daniel data database debian default demo diamond disk dragon
eagle eminem encryption enter family ferrari flower football forever freedom friends fuckyou gandalf george germany
ginger google guest hannah harley heaven hello hockey hunter iloveu iloveyou internet jasmine jennifer jessica jesus
jordan joshua justin key killer kvm letmein libvirt linux liverpool local login london love lovely loveme lovers
maggie manager marina marlboro martin master matrix matthew melissa merlin michael michelle monday monkey mustang
mypass mypassword myspace naruto newpass nicole nothing oracle orange pass passe passphrase passw passwd password
passwort peanut pepper phoenix pokemon princess private proxmox purple pw qemu qwer qwert qwerty qwertz rainbow
ranger repo repository restic restore robert root samantha samsung secret secure security server shadow silver
snapchain snapshot soccer spiderman spring star starwars storage storm summer sunday sunshine superman sysadmin
system taylor temp test tester testing thomas thunder tigger toor trustno ubuntu user vagrant vda virtual vm welcome
whatever william winter wizard zaq
"""
_WORDS = frozenset(_COMMON.split())
_AROUND = "0123456789!.-_?#*"
_DISGUISES = str.maketrans("@4301!5$7", "aaeoiisst")


def weakness(passphrase: str, names: Iterable[str] = ()) -> str | None:
    """Why a guesser would try this passphrase early, for people; None where no rule says so.

    names: of the host, the user, and the parts of the repository's address
    """
    text = passphrase.casefold()
    if len(text) < SHORTEST:
        return f"it has fewer than {SHORTEST} characters"
    if len(set(text)) < _LEAST_DIFFERENT:
        return f"it has fewer than {_LEAST_DIFFERENT} different characters"
    if len(_without_rows(text)) < _LEAST_DIFFERENT:
        return "it is a row of neighbouring keys, letters or digits"
    for words, reason in (
        (_WORDS, "it is made of common passwords"),
        (_known(names), "it is made of names that all see"),
    ):
        if any(_is_made_of(each, words) for each in (text, _unit(text), text.strip(_AROUND).translate(_DISGUISES))):
            return reason
    if len(_unit(text)) < SHORTEST:
        return "it repeats a few characters"
    return None


def _known(names: Iterable[str]) -> frozenset[str]:
    return frozenset(name.casefold() for name in names if len(name) >= _LEAST_NAME)


def _is_made_of(text: str, words: frozenset[str]) -> bool:
    """Whether too little is left of a text without these words, and without digits and marks around it."""
    plain = "".join(char for char in text if char.isalpha())
    if plain in words or _unit(plain) in words:
        return True
    left = text
    for word in sorted(words, key=len, reverse=True):
        if len(word) >= _LEAST_DIFFERENT:
            left = left.replace(word, "")
    return len(left.strip(_AROUND + " ")) < _LEAST_BESIDE or text.strip(_AROUND) in words


def _unit(text: str) -> str:
    """The shortest text of which `text` is a repetition."""
    return text[: (text + text).find(text, 1)] if text else text


def _without_rows(text: str) -> str:
    """The text with each row of neighbours, in either direction, as its first character."""
    left = ""
    at = 0
    while at < len(text):
        left += text[at]
        at += max(_run(text[at:]), 1)
    return left


def _run(text: str) -> int:
    """How many characters at the start are a row; 0 for fewer than _ROW."""
    longest = 0
    for row in (*_ROWS, *(row[::-1] for row in _ROWS)):
        length = 0
        while length < len(text) and text[: length + 1] in row:
            length += 1
        longest = max(longest, length)
    return longest if longest >= _ROW else 0
