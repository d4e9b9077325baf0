"""The passphrase is in no argument, in no environment of a program, in no file and in nothing that is printed."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from snapchain.host import processes
from tests.cli.conftest import Run
from tests.cli.test_streams import CHANGING, READING, ground

__all__ = ["ground"]

SECRET = "correct-horse-battery-staple"
SOURCES = ["environment", "file", "program"]


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every argument, and every variable, of every program that is started."""
    found: list[str] = []
    commandline, environment = processes._commandline, processes.minimal_environment

    def arguments(argv: Sequence[str], limits: Any) -> list[str]:
        found.extend(commandline(argv, limits))
        return commandline(argv, limits)

    def variables(extra: Mapping[str, str] | None) -> dict[str, str]:
        if extra is None or "SNAPCHAIN_ASKED" not in extra:  # a password program has all of the environment
            found.extend(environment(extra).values())
        return environment(extra)

    monkeypatch.setattr(processes, "_commandline", arguments)
    monkeypatch.setattr(processes, "minimal_environment", variables)
    return found


@pytest.mark.parametrize("source", SOURCES)
def test_a_passphrase_goes_nowhere(
    source: str, ground: Path, run: Run, started: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SNAPCHAIN_ASKED", "")
    monkeypatch.setenv("SNAPCHAIN_DEBUG", "1")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    outside = tmp_path.parent / f"{tmp_path.name}.secret"
    outside.touch(mode=0o600)
    outside.write_text(SECRET)
    monkeypatch.delenv("SNAPCHAIN_PASSWORD")
    options = {
        "environment": [],
        "file": ["--password-file", str(outside)],
        "program": ["--password-command", f"cat {outside}"],
    }
    if source == "environment":
        monkeypatch.setenv("SNAPCHAIN_PASSWORD", SECRET)
    more = options[source]
    printed = ""
    commands = [
        ["init", "locked"], ["ship", "web1.qcow2", "locked::a"], ["ship", "web1.qcow2", "locked::a", "--json"],
        ["ship", "web1.qcow2", "locked::b", "--dry-run"], ["log", "locked"], ["verify", "locked"], ["gc", "locked"],
        ["restore", "locked::a", "out.qcow2"], ["hold", "locked::a@1", "--tag", "t"], ["log", "nowhere"],
        ["merge", "locked::a", "--keep-last", "1"],
    ]  # fmt: skip
    for words in commands:
        said = run(*words, *more)
        assert said.status == (3 if "nowhere" in words else 0), said.err
        printed += said.out + said.err
    (tmp_path / "locked" / "config").write_bytes(b"damaged")
    said = run("log", "locked", *more)
    assert said.status == 5
    printed += said.out + said.err
    assert SECRET not in printed
    assert started if source == "program" else True
    assert not any(SECRET in text for text in started)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 20
    assert not [path for path in files if SECRET.encode() in path.read_bytes()]


def test_other_verbs_hand_it_to_nobody(
    ground: Path, run: Run, started: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run("log", "repo")
    with Path("nightly.toml").open("a") as file:
        file.write('[hooks]\nbefore = ["/bin/true"]\n')
    monkeypatch.setenv("SNAPCHAIN_PASSWORD", SECRET)
    last = CHANGING["migrate"]
    for words in [*READING.values(), *(each for each in CHANGING.values() if each != last), last]:
        said = run(*(word.replace("{here}", os.getcwd()) for word in words))  # noqa: PTH109
        assert SECRET not in said.out + said.err
    assert started
    assert not any(SECRET in text for text in started)
