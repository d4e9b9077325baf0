"""Every way to end a command: words on stderr or one JSON object, and the exit code of the table."""

from __future__ import annotations

import errno
import json
import os

import pytest
import typer

from snapchain.cli import exits
from snapchain.errors import Busy, Corrupt, Interrupted, InvalidInput, SnapchainError, ToolFailed, Unavailable
from tests.cli.conftest import Run


@pytest.mark.parametrize("error", [InvalidInput("a"), Corrupt("b"), Unavailable("c"), Busy("d"), SnapchainError("e")])
def test_an_error_of_the_tree_ends_with_its_code(error: SnapchainError, capsys: pytest.CaptureFixture[str]) -> None:
    assert exits.report(error, as_json=False) == error.exit_code
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err == f"snapchain: error: {error.message}\n"


def test_subject_and_hint_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    exits.report(Corrupt("no magic", subject="/a.qcow2", hint="restore it"), as_json=False)
    assert capsys.readouterr().err == "snapchain: error: /a.qcow2: no magic\nsnapchain: hint: restore it\n"


def test_json_holds_the_same_facts_on_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    assert exits.report(Corrupt("no magic", subject="/a.qcow2", hint="restore it"), as_json=True) == 5
    said = capsys.readouterr()
    assert said.err == ""
    assert json.loads(said.out) == {
        "error": {
            "kind": "corrupt",
            "message": "no magic",
            "subject": "/a.qcow2",
            "hint": "restore it",
            "exit_code": 5,
        }
    }


def test_a_tool_that_failed_is_quoted_whole(capsys: pytest.CaptureFixture[str]) -> None:
    error = ToolFailed("qemu-img exited 1", argv=["qemu-img", "check"], status=1, stderr="one\ntwo\n")
    assert exits.report(error, as_json=False) == 8
    assert "    one\n    two\n" in capsys.readouterr().err
    exits.report(error, as_json=True)
    facts = json.loads(capsys.readouterr().out)["error"]
    assert (facts["argv"], facts["status"], facts["stderr"]) == (["qemu-img", "check"], 1, "one\ntwo\n")


def test_what_a_tool_said_last_is_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    said = "qemu-img: it is broken"
    error = ToolFailed(f"ended with exit status 1: {said}", argv=["qemu-img"], status=1, stderr=f"first\n{said}\n")
    exits.report(error, as_json=False)
    shown = capsys.readouterr().err
    assert shown.count(said) == 1
    assert "    first\n" in shown


@pytest.mark.parametrize("error", [KeyboardInterrupt(), Interrupted("SIGTERM")])
def test_an_interrupt_says_what_it_leaves(error: BaseException, capsys: pytest.CaptureFixture[str]) -> None:
    assert exits.report(error, as_json=False, left_behind="run it again") == 130
    assert capsys.readouterr().err == "snapchain: interrupted\nsnapchain: hint: run it again\n"


def test_a_bug_says_so_without_a_traceback(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert exits.report(KeyError("oops"), as_json=False) == 1
    said = capsys.readouterr().err
    assert "this is a bug in snapchain: KeyError: 'oops'" in said
    assert "Traceback" not in said
    monkeypatch.setenv("SNAPCHAIN_DEBUG", "1")
    exits.report(KeyError("oops"), as_json=False)
    assert "KeyError" in capsys.readouterr().err


@pytest.mark.parametrize(("number", "status"), [(errno.ENOENT, 3), (errno.ENOTDIR, 2), (errno.EACCES, 2)])
def test_what_the_kernel_says_of_a_file_is_no_bug(number: int, status: int, capsys: pytest.CaptureFixture[str]) -> None:
    """Somebody has swapped it since it was looked at."""
    assert exits.report(OSError(number, os.strerror(number), "/images/disk"), as_json=False) == status
    said = capsys.readouterr().err
    assert said.startswith("snapchain: error: /images/disk: ")
    assert "bug" not in said
    assert exits.report(OSError(number, os.strerror(number)), as_json=False) == 1, "of no file: nobody could act on it"


def test_a_usage_error_is_an_invalid_input(capsys: pytest.CaptureFixture[str]) -> None:
    assert exits.report(typer.BadParameter("what?"), as_json=True) == 2
    assert json.loads(capsys.readouterr().out)["error"]["kind"] == "invalid-input"


def test_a_usage_error_points_to_the_help_of_its_verb(run: Run) -> None:
    """click knows no context where an option lacks its argument."""
    ended = run("serve", "--socket")
    assert (ended.status, "snapchain serve --help" in ended.err) == (2, True), ended.err
