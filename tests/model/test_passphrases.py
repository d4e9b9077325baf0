"""What a guesser tries first is found; what people are told to choose is let through."""

from __future__ import annotations

import secrets

import pytest

from snapchain.model.passphrases import weakness

NAMES = ["kvm1", "kvm1.example.org", "vault-eu", "alice", "web1"]


@pytest.mark.parametrize(
    ("passphrase", "reason"),
    [
        ("secret", "fewer than 8"),
        ("1234567", "fewer than 8"),
        ("aaaaaaaaaaaa", "different characters"),
        ("abababababab", "different characters"),
        ("123456789", "row"),
        ("9876543210", "row"),
        ("abcdefghijkl", "row"),
        ("qwertyuiop", "row"),
        ("qwertz12345", "row"),
        ("1qaz2wsx3edc", "row"),
        ("password", "common"),
        ("Password1!", "common"),
        ("P@ssw0rd2026", "common"),
        ("passwordpassword", "common"),
        ("letmein-2026", "common"),
        ("changeme123", "common"),
        ("backup2026!", "common"),
        ("correct horse battery staple", "common"),
        ("Snapchain1", "common"),
        ("vault-eu-1", "name"),
        ("kvm1.example.org", "name"),
        ("alice2026", "name"),
        ("alice@kvm1.example.org", "name"),
        ("monkey dragon banana", "common"),
        ("ALICEalice", "different|name"),
        ("xk9zxk9zxk9z", "different|repeats"),
        ("xk9zqxk9zq", "repeats"),
    ],
)
def test_what_is_refused(passphrase: str, reason: str) -> None:
    found = weakness(passphrase, NAMES)
    assert found is not None
    assert any(word in found for word in reason.split("|")), found


@pytest.mark.parametrize(
    "passphrase",
    [
        "tuba glacier ninety Ottoman",
        "xJ3!vq9Zp#",
        "die Wolken ziehen nach Osten",
        "пароль от сервера копий",
        "nightshift rota lives in the drawer",
        "7QK4C-M2ZR9-0HVTA-XJ8P3-D5W6N-1BYGE-K4S2F",
    ],
)
def test_what_is_let_through(passphrase: str) -> None:
    assert weakness(passphrase, NAMES) is None


def test_random_passphrases_are_let_through() -> None:
    assert not [text for _ in range(300) if weakness(text := secrets.token_urlsafe(12), NAMES)]
