"""A recovery key survives paper and a tired typist; every other passphrase stays what it is."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, strategies as st

from snapchain.objects.memory import MemoryStore
from snapchain.repository.recovery_key import canonical, generate, mistyped_groups
from snapchain.repository.repository import Repository

ALPHABET = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"


def test_the_form() -> None:
    found = {generate() for _ in range(200)}
    assert len(found) == 200
    assert all(re.fullmatch(rf"[{ALPHABET}]{{5}}(-[{ALPHABET}]{{5}}){{6}}", each) for each in found)


def test_spellings_are_one_key() -> None:
    key = generate()
    for spelled in (
        key.lower(),
        key.replace("-", ""),
        key.replace("-", " "),
        f"  {key} ",
        key.replace("0", "O").replace("1", "l"),
        key.replace("0", "o").replace("1", "i").lower(),
    ):
        assert canonical(spelled) == key
        assert mistyped_groups(spelled) == []


def test_one_wrong_character_is_found_in_its_group() -> None:
    key = generate()
    for at, char in enumerate(key):
        for other in ALPHABET if char != "-" else "":
            if other != char:
                wrong = key[:at] + other + key[at + 1 :]
                assert mistyped_groups(wrong) == [at // 6 + 1]
                assert canonical(wrong) == wrong, "it is a passphrase like any other"


def test_groups_that_changed_places_are_found() -> None:
    for _ in range(50):
        groups = generate().split("-")
        if groups[2][:4] != groups[3][:4]:
            groups[2], groups[3] = groups[3], groups[2]
            assert mistyped_groups("-".join(groups)) == [3, 4]


@given(st.text(max_size=60))
def test_other_passphrases_stay_as_they_are(text: str) -> None:
    assert canonical(text) == text
    assert mistyped_groups(text) == []


def test_a_text_that_only_looks_like_one_gets_no_hint() -> None:
    assert mistyped_groups("THEQV1CKBR0WNF0XJVMPS0VERTHE1AZYD0G") == []
    assert mistyped_groups("x" * 35) == []
    assert mistyped_groups("too short") == []


@pytest.mark.parametrize("spell", [str, str.lower, lambda key: key.replace("-", "")])
def test_it_opens_a_repository_however_it_is_typed(spell: object) -> None:
    assert callable(spell)
    store, key = MemoryStore(), generate()
    Repository.create(store, passphrase=lambda: spell(key))
    for typed in (key, key.lower(), key.replace("-", " ")):
        assert Repository.open(store, passphrase=lambda typed=typed: typed).slot is not None  # type: ignore[misc]
