"""A passphrase for paper: 140 random bits as seven groups of five letters and digits.

    7QK4C-M2ZR9-0HVTA-XJ8P3-D5W6N-1BYGE-K4S2F

The fifth of each group is a check, so a mistake in typing is found in its group.  Crockford's alphabet has no I, L, O
and U: they are read as 1, 1 and 0, and U is no letter of it.  A key is typed with or without dashes, blanks and capital
letters; what is stored and derived from is the form above (docs/format.md, section 4).
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence

_ALPHABET = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
_GROUPS = 7
_RANDOM = 4
"""Random characters of a group, five bits each."""
_GROUP = _RANDOM + 1
_READ_AS = str.maketrans("OIL", "011", "- \t")


def generate() -> str:
    """A new recovery key."""
    groups = [[secrets.randbelow(len(_ALPHABET)) for _ in range(_RANDOM)] for _ in range(_GROUPS)]
    return "-".join(
        "".join(_ALPHABET[digit] for digit in (*group, _check(place, group))) for place, group in enumerate(groups)
    )


def canonical(passphrase: str) -> str:
    """A recovery key in the one form that counts; any other passphrase as it is."""
    groups = _groups(passphrase)
    return "-".join(groups) if groups and not _mistyped(groups) else passphrase


def mistyped_groups(passphrase: str) -> list[int]:
    """The numbers, from 1, of the groups with a mistake, where a text looks like a recovery key; else none.

    A text with a mistake in most of its groups is no recovery key.
    """
    wrong = _mistyped(_groups(passphrase))
    return wrong if len(wrong) <= _GROUPS // 2 else []


def _groups(passphrase: str) -> list[str]:
    """The groups of a text that may be a recovery key; else none."""
    text = passphrase.upper().translate(_READ_AS)
    if len(text) != _GROUPS * _GROUP or not set(text) <= set(_ALPHABET):
        return []
    return [text[at : at + _GROUP] for at in range(0, len(text), _GROUP)]


def _mistyped(groups: Sequence[str]) -> list[int]:
    wrong = []
    for place, group in enumerate(groups):
        *digits, check = map(_ALPHABET.index, group)
        if check != _check(place, digits):
            wrong.append(place + 1)
    return wrong


def _check(place: int, digits: Sequence[int]) -> int:
    """Odd weights: one wrong character is always found. The place: so are two groups that changed places."""
    weighted = sum((2 * at + 1) * digit for at, digit in enumerate(digits))
    return (place + 1 + weighted) % len(_ALPHABET)
