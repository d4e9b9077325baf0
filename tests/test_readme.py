"""What the README says is so, and it stays short."""

from __future__ import annotations

import re

from tests.pages import ROOT, section

README = (ROOT / "README.md").read_text()


def test_it_stays_short() -> None:
    assert len(README.splitlines()) <= 150


def test_every_make_target_named_is_there() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {"demo", "test", "check", "bench", "man", "help"} <= targets
    pages = [README, (ROOT / "CONTRIBUTING.md").read_text()]
    assert {name for page in pages for name in re.findall(r"(?:`|^ +)make ([a-z]+)", page, re.MULTILINE)} <= targets


def test_ci_runs_nothing_that_the_readme_does_not_name() -> None:
    lines = (ROOT / ".ci" / "run").read_text().splitlines()
    assert [line for line in lines if "make" in line] == ["make check </dev/null", "exec make test </dev/null"]
    assert "make check" in section(README, "Try it")
    assert "make test" in section(README, "Try it")
