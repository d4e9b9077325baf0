"""Where tests make their files: a run takes nothing from another one, and leaves what its failed tests have made."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests import memory


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the first process of a run, in which nothing is locked."""
    for name in ("PYTEST_XDIST_WORKER", memory.RUN):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(memory, "_held", [])


def begun(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TMPDIR", str(place))  # told
    memory.begin_run(SimpleNamespace(basetemp="told"), place)
    found = memory.scratch()
    assert found is not None
    return Path(found)


def released() -> None:
    """As the kernel does for a process that has ended."""
    while memory._held:
        os.close(memory._held.pop())


def made(path: Path, size: int = 0) -> Path:
    path.mkdir(parents=True)
    (path / "image").write_bytes(bytes(size))
    return path


def test_the_end_leaves_what_failed_tests_have_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "KEPT_BYTES", 100_000)
    run = begun(tmp_path, monkeypatch)
    first, large, last = (made(run / "t" / name, size) for name, size in (("a", 5000), ("b", 200_000), ("c", 5000)))
    made(run / "t" / "passed")
    for path in (first, large, last, tmp_path):
        memory.note_failure(path)
    memory.end_run()
    assert {path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file()} == {
        "failed",
        "t/a/image",
        "t/c/image",
    }


def test_without_failures_nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made(begun(tmp_path, monkeypatch) / "t")
    memory.end_run()
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_run_left_goes_and_a_living_one_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = (
        "import pathlib, sys, types; from tests import memory;"
        "memory.begin_run(types.SimpleNamespace(basetemp='told'), pathlib.Path(sys.argv[1]));"
        "print(memory.scratch(), flush=True); sys.stdin.read()"
    )
    argv = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        theirs = Path(other.stdout.readline().strip())
        made(theirs / "t")
        memory.remove_dead_runs(tmp_path)
        assert (theirs / "t" / "image").exists()
        other.send_signal(signal.SIGKILL)
    memory.remove_dead_runs(tmp_path)
    assert not theirs.exists()


def test_what_is_no_directory_of_this_user_is_left_alone(tmp_path: Path) -> None:
    elsewhere = made(tmp_path / "elsewhere")
    place = made(tmp_path / "place")
    (place / f"{memory.PREFIX}link").symlink_to(elsewhere)
    (place / f"{memory.PREFIX}file").touch()
    other = made(place / "other")
    memory.remove_dead_runs(place)
    assert (elsewhere / "image").exists()
    assert (place / f"{memory.PREFIX}link").is_symlink()
    assert (place / f"{memory.PREFIX}file").exists()
    assert other.exists()


@pytest.mark.root
def test_another_users_stays(tmp_path: Path) -> None:
    theirs = made(tmp_path / f"{memory.PREFIX}theirs")
    os.chown(theirs, 65534, 65534)
    memory.remove_dead_runs(tmp_path)
    assert (theirs / "image").exists()


def test_so_many_failed_runs_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = []
    for number in range(memory.KEPT_RUNS + 2):
        runs.append(begun(tmp_path, monkeypatch))
        memory.note_failure(made(runs[-1] / "t" / "a"))
        memory.end_run()
        os.utime(runs[-1], (number, number))
        released()
    memory.remove_dead_runs(tmp_path)
    assert [run.exists() for run in runs] == [False] * 2 + [True] * memory.KEPT_RUNS
