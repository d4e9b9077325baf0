"""Progress is for whoever looks: nothing for a log file, JSON lines on request."""

from __future__ import annotations

import io
import json
import sys

import pytest
from rich.console import Console

from snapchain.cli.progress import Mode, Reporter, amount
from snapchain.model.events import Notice, Progress, Unit


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


def test_progress_names_its_unit(capsys: pytest.CaptureFixture[str]) -> None:
    with Reporter(Mode.JSON, quiet=False) as reporter:
        reporter(Progress("gc vault", 3, 3, Unit.OBJECTS))
        reporter(Progress("ship", 3, 3))
    assert [json.loads(line)["unit"] for line in capsys.readouterr().err.splitlines()] == ["objects", "bytes"]


@pytest.mark.parametrize(
    ("event", "words"),
    [
        (Progress("gc", 3, 3, Unit.OBJECTS), "3 of 3 objects"),
        (Progress("gc", 3, None, Unit.OBJECTS), "3 objects"),
        (Progress("merge", 1, 2, Unit.LAYERS), "1 of 2 layers"),
        (Progress("ship", 1 << 20, 3 << 20), "1.0 MiB of 3.0 MiB, 2.0 KiB/s"),
        (Progress("verify", 1 << 20, None), "1.0 MiB, 2.0 KiB/s"),
    ],
)
def test_a_person_reads_the_amount_in_its_unit(event: Progress, words: str) -> None:
    assert amount(event, 2048.0) == words


NO_LOCKS = "this filesystem has no locks; make sure that no guest uses it"


def test_a_note_that_comes_again_is_said_once_and_counted(capsys: pytest.CaptureFixture[str]) -> None:
    with Reporter(Mode.AUTO, quiet=False) as reporter:
        for disk in ("web1", "web2"):
            for file in ("a.qcow2", "b.qcow2"):
                reporter(Notice(f"/x/{file}: {NO_LOCKS}", about=f"/x/{file}").within(disk))
        reporter(Notice("another one"))
        reporter(Notice("odd\n\x1b[2Jname: another"))
    first, other, odd, count = capsys.readouterr().err.splitlines()
    assert first == f"snapchain: note: web1: /x/a.qcow2: {NO_LOCKS}"
    assert other == "snapchain: note: another one"
    assert odd == r"snapchain: note: odd\n\x1b[2Jname: another"
    assert count == "snapchain: note: 4 times: this filesystem has no locks; make ..."


def test_a_program_gets_every_note(capsys: pytest.CaptureFixture[str]) -> None:
    with Reporter(Mode.JSON, quiet=False) as reporter:
        for file in ("a", "b"):
            reporter(Notice(f"{file}: {NO_LOCKS}", about=file))
    assert [json.loads(line)["message"] for line in capsys.readouterr().err.splitlines()] == [
        f"a: {NO_LOCKS}",
        f"b: {NO_LOCKS}",
    ]


def test_finished_phases_make_room_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """A night of many disks has as many phases: only those under way are shown, with whole names."""
    raw = io.StringIO()
    raw.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stderr", raw)
    with Reporter(Mode.AUTO, quiet=False) as reporter:
        for number in range(30):
            reporter(Progress(f"ship a-host/disk-{number}", 1, 1))
        reporter(Progress("gc vault", 1, 3, Unit.OBJECTS))
        reporter(Progress("verify " + "x" * 30, 1, 3))
        assert [task.description for task in reporter._bar.tasks if task.visible] == ["gc vault", "verify " + "x" * 30]
        Console(file=raw, width=80, color_system=None).print(reporter._bar.get_renderable())
    assert "1 of 3 objects" in raw.getvalue()
    assert "x" * 30 in raw.getvalue()
