"""The page of --help, the table of verbs behind it, and the words that people come with."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import snapchain.cli
from snapchain.cli.verbs import ALIASES, GROUPS, VERBS, help_page
from tests.cli.conftest import Run

CLI = Path(snapchain.cli.__file__).parent


@pytest.mark.parametrize("name", VERBS)
def test_the_table_says_what_the_modules_say(name: str) -> None:
    verb = VERBS[name]
    text = ast.get_docstring(ast.parse((CLI / f"{verb.module}.py").read_text())) or ""
    said = re.search(rf"^`snapchain {name}\b[^`]*`: (.*)$", text, re.MULTILINE)
    assert said is not None, text
    assert said[1][0].upper() + said[1][1:] == verb.summary


def test_every_module_with_a_verb_is_in_the_table() -> None:
    made = {path.stem for path in CLI.glob("*.py") if re.search(r"^@verb\(", path.read_text(), re.MULTILINE)}
    assert made == {verb.module for verb in VERBS.values()}


def test_help_lists_each_verb_under_its_group_in_eighty_columns() -> None:
    page = help_page(width=80, bold=False)
    assert max(map(len, page.splitlines())) <= 80
    for group, verbs in GROUPS.items():
        for verb in verbs:
            assert (re.search(rf"^{group}\n(  .*\n)*  {verb} ", page, re.MULTILINE) is not None) is bool(group)


def test_both_ways_to_the_page_print_it(run: Run) -> None:
    alone = run("--help")
    assert alone.status == 0
    assert run("--version", "--help").out.strip() == alone.out.strip()
    assert run().err.strip() == alone.out.strip()


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        ("backup", "ship"),
        ("list", "log"),
        ("snapshots", "log"),
        ("prune", "forget"),
        ("seal", "snapshot"),
        ("convert", "restore"),
        ("BACKUP", "ship"),
        ("shp", "ship"),
        ("snapshto", "snapshot"),
        ("backp", "ship"),
    ],
)
def test_a_word_from_elsewhere_is_answered_with_the_verb(run: Run, word: str, meant: str) -> None:
    said = run(word, "web1.qcow2")
    assert (said.status, said.out) == (2, "")
    assert said.err.startswith(f"snapchain: error: {word}: did you mean `snapchain {meant}`? ")
    error = run(word, "--json").json["error"]
    assert (error["kind"], error["subject"], error["exit_code"]) == ("invalid-input", word, 2)


def test_a_word_that_resembles_nothing_leads_to_the_list(run: Run) -> None:
    said = run("xyzzy")
    assert said.status == 2
    assert "xyzzy: there is no such verb" in said.err
    assert "serve-replica" not in run("serve-replic").err, "it is not for people"


def test_every_word_from_elsewhere_means_a_verb() -> None:
    assert not ALIASES.keys() & VERBS.keys()
    assert {meant for meant in ALIASES.values() if not VERBS[meant].group} == set()
