"""Whatever the umask: nothing that a verb makes may be written by others, and its state is read by its owner alone."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.conftest import Run
from tests.cli.test_streams import CHANGING, READING, ground, made_guest

__all__ = ["ground"]

_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


@pytest.fixture(params=[0o000, 0o077], ids="{:03o}".format)
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def entries(directory: Path) -> Iterator[Path]:
    yield from (path for path in directory.rglob("*") if not path.is_symlink())


def test_nothing_that_a_verb_makes_is_writable_for_others(
    ground: Path, umask: int, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = set(entries(tmp_path))
    for variable, place in (("XDG_STATE_HOME", "home/.local/state"), ("XDG_CACHE_HOME", "home/.cache")):
        monkeypatch.setenv(variable, str(tmp_path / place))
    (tmp_path / "nightly.toml").write_text(
        (tmp_path / "nightly.toml").read_text().replace("[[disks]]", f'metrics = "{tmp_path}/m/n/x.prom"\n[[disks]]', 1)
    )
    assert run("init", "locked").status == 0
    monkeypatch.delenv("SNAPCHAIN_PASSWORD")
    last = CHANGING["migrate"]  # the image is another host's after it
    for words in [*READING.values(), *(each for each in CHANGING.values() if each != last), last]:
        known = set(entries(tmp_path))
        made_guest(words, tmp_path)
        before |= set(entries(tmp_path)) - known
        with monkeypatch.context() as patch:
            if "keyed" in words:
                patch.setenv("SNAPCHAIN_PASSWORD", "secret")
            ended = run(*(word.replace("{here}", str(tmp_path)) for word in words))
        assert ended.status == 0, (words, ended.err)
    made = set(entries(tmp_path)) - before
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in made}
    assert {path.name: oct(mode) for path, mode in modes.items() if mode & _OTHERS_WRITE} == {}
    private = [path for path in made if path.is_relative_to(tmp_path / "home") or "state" in path.parts]
    assert {path.name: oct(modes[path]) for path in private if modes[path] & 0o077} == {}
    kinds = {path.parent.name for path in private}
    assert {"snapchain", "repositories"} <= kinds, "the state was looked at"
