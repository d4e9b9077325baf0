"""The man pages are those of the command line, clean for groff, and part of the wheel."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from docs.man.__main__ import FOLDER, pages
from tests.pages import ROOT

SECTIONS = ["NAME", "SYNOPSIS", "DESCRIPTION", "OPTIONS", "EXIT STATUS", "EXAMPLES", "ENVIRONMENT", "FILES", "SEE ALSO"]


def test_the_pages_are_current() -> None:
    there = {path.name: path.read_text() for path in FOLDER.glob("*.1")}
    made = pages()
    assert there.keys() == made.keys(), "run `make man`"
    assert [name for name in made if there[name] != made[name]] == [], "run `make man`"


@pytest.mark.parametrize("page", sorted(FOLDER.glob("*.1")), ids=lambda page: page.stem)
def test_a_page_has_all_sections_and_no_warnings(page: Path) -> None:
    told = re.findall(r"^\.SH (.*)$", page.read_text(), re.MULTILINE)
    if page.name in {"snapchain.1", "snapchain-nightly.1"}:
        told = [each for each in told if each not in {"VERBS", "ADDRESSES", "CONFIGURATION"}]
    without = {"FILES"} if page.name in {"snapchain-serve-replica.1", "snapchain-receive.1"} else set()
    assert set(SECTIONS) - set(told) <= without
    assert told == [each for each in SECTIONS if each in told]
    judged = subprocess.run(
        ["groff", "-man", "-ww", "-Tutf8", "-Z", "-K", "utf-8", page], capture_output=True, check=True
    )
    assert judged.stderr.decode() == ""
    shown = subprocess.run(
        ["groff", "-man", "-Tascii", "-P-cbou", "-K", "utf-8", page], capture_output=True, check=True
    )
    assert b"[bold]" not in shown.stdout
    assert b"\\" not in re.sub(rb" \\$", b"", shown.stdout)


def test_pages_name_pages() -> None:
    there = {path.stem for path in FOLDER.glob("*.1")}
    for page in FOLDER.glob("*.1"):
        named = re.findall(r"^\\fB(snapchain[a-z\\-]*)\\fR\(1\)", page.read_text(), re.MULTILINE)
        assert {name.replace("\\-", "-") for name in named} <= there, page


def test_the_wheel_installs_them(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    told = {name.rpartition("/")[2] for name in zipfile.ZipFile(wheel).namelist() if "/data/share/man/man1/" in name}
    assert told == {path.name for path in FOLDER.glob("*.1")}
