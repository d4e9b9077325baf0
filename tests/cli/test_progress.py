"""Progress is for whoever looks: nothing for a log file, JSON lines on request."""

from __future__ import annotations

import json

import pytest

from snapchain.cli.progress import Mode, Reporter
from snapchain.ops.events import Notice, Progress


def test_a_log_file_gets_notices_only(capsys: pytest.CaptureFixture[str]) -> None:
    with Reporter(Mode.AUTO, quiet=False) as reporter:
        reporter(Progress("read", 1, 2))
        reporter(Notice("the store ignores conditions"))
    assert capsys.readouterr().err == "snapchain: note: the store ignores conditions\n"


@pytest.mark.parametrize(("mode", "quiet"), [(Mode.NONE, False), (Mode.AUTO, True)])
def test_quiet_is_quiet(mode: Mode, quiet: bool, capsys: pytest.CaptureFixture[str]) -> None:
    with Reporter(mode, quiet=quiet) as reporter:
        reporter(Progress("read", 1, 2))
        reporter(Notice("hear"))
    assert capsys.readouterr() == ("", "")


def test_json_lines_have_bytes_rate_and_eta(capsys: pytest.CaptureFixture[str]) -> None:
    with Reporter(Mode.JSON, quiet=False) as reporter:
        reporter(Progress("read", 0, 100))
        reporter(Progress("read", 50, 100))  # too soon after the first to be told
        reporter(Progress("read", 100, 100))
        reporter(Notice("done"))
    said = capsys.readouterr()
    first, last, notice = (json.loads(line) for line in said.err.splitlines())
    assert (first["phase"], first["done"], first["total"], first["eta"]) == ("read", 0, 100, None)
    assert (last["done"], last["eta"]) == (100, 0.0)
    assert last["rate"] > 0
    assert notice == {"event": "notice", "message": "done"}
    assert said.out == ""
