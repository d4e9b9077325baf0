"""No verb prints what a terminal would obey, whoever chose it: names, labels, tools, peers, servers, configurations.

Each case runs a verb over something hostile, and looks at all that it printed, whether it worked or was refused.
"""

from __future__ import annotations

import http.server
import io
import json
import os
import re
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from snapchain.cli import exits, main, output, streams
from snapchain.cli.console import EscapingConsole
from snapchain.cli.progress import Mode, Reporter
from snapchain.cli.verbs import VERBS
from snapchain.errors import InvalidInput, ToolFailed
from snapchain.model.events import Notice, Progress
from snapchain.ops import guests
from tests.cli.conftest import MiB, Run, Said, made_disk, qemu_img
from tests.cli.test_streams import CHANGING, ELSEWHERE, READING, made_guest
from tests.host.test_terminal import is_harmless

EVIL = "\x1b]0;owned\x07\x1b[2J\x1b[1A\r\b\u202e\u2066\x9b31m\u2028\x7f\nsnapchain: error: all is lost"
"""A title, a cleared screen, a line above, a line of its own, and text that runs backwards."""
BYTES = os.fsdecode(b"\xff\xfe\x1b[2J")
_STYLES = re.compile(r"\x1b\[[0-9;]*m|\x1b\[\?25[lh]|\x1b\[\d*[AKG]|\r")
"""What rich itself prints on a terminal: colours, and the movements of a progress bar."""


def check(said: Said) -> None:
    for text in (said.out, said.err):
        assert is_harmless(text.replace("\n", "")), repr(text)
        assert not any(line.startswith("snapchain: error: all is lost") for line in text.splitlines()), repr(text)


class Terminal(io.StringIO):
    """A terminal: a program may draw in colours, and a progress bar."""

    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


def on_a_terminal(words: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> str:
    with monkeypatch.context() as patch:
        screen = Terminal()
        patch.setenv("TERM", "xterm-256color")
        patch.setattr(sys, "stdout", screen)
        patch.setattr(sys, "stderr", screen)
        main(words)
    text = _STYLES.sub("", screen.getvalue())
    assert is_harmless(text.replace("\n", "")), repr(text)
    return text


@pytest.fixture
def ground(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """As that of test_streams, in a directory with a hostile name, beside files with such names."""
    monkeypatch.setattr(guests, "qemu_processes", list)
    here = tmp_path / f"d{EVIL.replace('/', '')}"
    here.mkdir()
    monkeypatch.chdir(here)
    made_disk(here)
    qemu_img("create", "-q", "-f", "qcow2", "other.qcow2", "1M")
    run("init", "repo", "--no-encryption")
    run("init", "second", "--no-encryption")
    run("ship", "other.qcow2", "repo::web1")
    run("ship", "other.qcow2", "repo::held")
    run("ship", "other.qcow2", "repo::spare")
    run("hold", "repo::held@1", "--tag", "t", "--reason", EVIL)
    (here / f"n{BYTES}.qcow2").symlink_to("other.qcow2")
    qemu_img("create", "-q", "-f", "qcow2", "-b", "other.qcow2", "-F", "qcow2", "plain.qcow2")
    (here / "plain.qcow2").rename(here / f"b{EVIL}{BYTES}.qcow2")
    (here / f".snapchain-layer-{EVIL}-1.json").write_text("{}")
    (here / f".snapchain-merge-{EVIL}.json").write_text("{}")
    (here / "nightly.toml").write_text(
        f'time_zone = "UTC"\nstate = {json.dumps(str(here / "state"))}\nmetrics = {json.dumps(str(here / "m.prom"))}\n'
        f"[[disks]]\nglob = {json.dumps(str(here / '*.qcow2'))}\n"
        f"[[destinations]]\nname = {json.dumps(EVIL)}\nurl = {json.dumps(str(here / 'repo'))}\n"
    )
    return here


def words_of(template: Sequence[str]) -> list[str]:
    return [word.replace("{here}", str(Path.cwd())) for word in template]


def test_every_verb_is_tried() -> None:
    assert {*READING, *CHANGING, *ELSEWHERE} >= set(VERBS)


def shows_no_escape(words: list[str], run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    on_a_terminal(words, monkeypatch)
    check(run(*words))
    check(run(*words, "--json"))


def test_names_of_files_and_directories(ground: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for template in READING.values():
        shows_no_escape(words_of(template), run, monkeypatch)


@pytest.mark.parametrize("name", CHANGING)
def test_names_of_what_is_changed(name: str, ground: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    words = words_of(CHANGING[name])
    made_guest(words, ground)
    check(run(*words, "--dry-run"))
    shows_no_escape(words, run, monkeypatch)


@pytest.mark.parametrize("verb", VERBS)
def test_words_of_the_command_line(verb: str, run: Run) -> None:
    for words in (
        [EVIL],
        [f"--{EVIL}"],
        [f"/{EVIL}::a@{EVIL}", f"dir:/{EVIL}::{EVIL}"],
        ["a", "b::c", "--label", EVIL],
    ):
        check(run(verb, *words))
    check(run(verb, f"a{BYTES}"))
    check(run(EVIL, verb))


@pytest.mark.parametrize("option", ["--password-file", "--password-command", "--limit-rate", "--image-dir", "--format"])
def test_values_of_options(option: str, run: Run) -> None:
    check(run("ship", "a", "b::c", option, EVIL))


@pytest.mark.parametrize("verb", VERBS)
def test_help(verb: str, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SNAPCHAIN_PACK_SIZE", EVIL)
    check(run(verb, "--help"))


@pytest.mark.parametrize("disk", ["d", f"d{EVIL}"], ids=["label", "disk"])
def test_labels_and_disks_of_a_plain_store(ground: Path, run: Run, monkeypatch: pytest.MonkeyPatch, disk: str) -> None:
    """Whoever can write to a store that is not encrypted writes what they like."""
    from snapchain.ops.ship import request as ship
    from snapchain.repository import catalogue, repository

    with monkeypatch.context() as patch:
        patch.setattr(ship, "check_label", lambda label: label)
        patch.setattr(ship, "check_disk_name", lambda name: name)
        patch.setattr(repository, "check_disk_name", lambda name: name)
        patch.setattr(catalogue, "is_disk_name", lambda _name: True)
        assert run("ship", "other.qcow2", f"repo::{disk}", "--label", EVIL).status == 0
    for words in (
        ["log", "repo"],
        ["log", "repo", "--all"],
        ["status", "repo"],
        ["status", "repo", "--nagios"],
        ["status", "repo", "--metrics", "-"],
        ["stats", "repo"],
        ["verify", "repo"],
        ["gc", "repo", "--dry-run"],
        ["log", f"repo::{disk}"],
        ["stats", f"repo::{disk}"],
        ["inspect", f"repo::{disk}@1"],
        ["restore", f"repo::{disk}", "out.raw"],
    ):
        check(run(*words))
        on_a_terminal(words, monkeypatch)
    said = run("log", "repo", "--json").json
    if disk == "d":
        (found,) = [shown for shown in said["disks"] if shown["name"] == disk]
        assert found["points"][0]["labels"] == [EVIL]
    else:
        assert (said["error"]["kind"], "cannot name a disk" in said["error"]["message"]) == ("corrupt", True)


def test_what_lies_where_a_repository_should(run: Run, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / f"a{EVIL}{BYTES}").touch()
    for words in (["init", "full"], ["log", "full"], ["verify", "full"], ["ship", "a.qcow2", "full::x"]):
        check(run(*words))


@pytest.mark.parametrize("program", ["qemu-img", "virsh"])
def test_words_of_a_program(program: str, ground: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = ground / "bin"
    folder.mkdir()
    (folder / "said").write_text(f"{EVIL}\n{EVIL}\n")
    (folder / program).write_text('#!/bin/sh\ncat "${0%/*}/said"; cat "${0%/*}/said" >&2; exit 1\n')
    (folder / program).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    for name in ("snapshot", "merge", "sync", "migrate", "nightly", "doctor", "restore"):
        check(run(*words_of(CHANGING[name])))


@pytest.mark.parametrize("status", [1, 127, 255])
def test_words_of_a_peer(status: int, ground: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    script = ground.parent / "ssh"
    (ground.parent / "said").write_text(f"{EVIL}\nPermission denied {EVIL}")
    script.write_text(f'#!/bin/sh\ncat "${{0%/*}}/said" >&2; exit {status}\n')
    script.chmod(0o755)
    monkeypatch.setenv("SNAPCHAIN_SSH", str(script))
    for words in (["send", "web1.qcow2", "ssh://h/r::d"], ["log", "ssh://h/r"], ["sync", "web1.qcow2", "ssh://h/r::d"]):
        check(run(*words))
        check(run(*words, "--json"))


class _Server(http.server.BaseHTTPRequestHandler):
    """Answers everything with a hostile text, in the form of an error of S3 or of a proxy."""

    def answer(self) -> None:
        kind = "text/html" if "proxy" in self.path else "application/xml"
        shown = EVIL.replace("\x1b", "&#155;").replace("\x07", "").replace("\b", "").replace("\r", "")
        body = f"<Error><Code>Access{shown}</Code><Message>{shown}</Message></Error>" if "xml" in kind else EVIL
        data = body.encode("utf-8", "replace")
        self.send_response(403, "No")
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(b"" if self.command == "HEAD" else data)

    do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = answer  # noqa: N815

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def server() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Server) as found:
        threading.Thread(target=found.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{found.server_port}"
        found.shutdown()


@pytest.mark.parametrize("bucket", ["bucket", "proxy"])
def test_words_of_a_server(bucket: str, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
    with server() as address:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", address)
        for words in (["log", f"s3://{bucket}/x"], ["init", f"s3://{bucket}/x", "--no-encryption"]):
            check(run(*words))


def test_a_configuration_and_its_metrics(ground: Path, run: Run) -> None:
    check(run("nightly", "nightly.toml", "--print-systemd"))
    check(run("nightly", "nightly.toml"))
    if (ground / "m.prom").exists():
        assert is_harmless((ground / "m.prom").read_text().replace("\n", ""))
    (ground / f"{EVIL}.toml").write_text(f"a = {json.dumps(EVIL)}\n[[{json.dumps(EVIL)}]]\nb = 1\n[[disks]]\nx=1\n")
    check(run("nightly", f"{EVIL}.toml"))
    (ground / "c.toml").write_text(f"[ {EVIL}")
    check(run("nightly", "c.toml"))


def test_a_unit_file_gets_no_line_from_a_path(ground: Path, run: Run) -> None:
    refused = run("nightly", "nightly.toml", "--print-systemd")
    assert (refused.status, refused.out) == (6, "")
    assert "cannot stand in a unit file" in refused.err


# -- each way out, by itself: what a verb may hand over one day --------------------------------------------------------

ERRORS = [
    InvalidInput(EVIL, subject=EVIL, hint=EVIL),
    ToolFailed(EVIL, argv=[EVIL], status=1, stderr=EVIL, subject=EVIL, hint=EVIL),
    ValueError(EVIL),
    UnicodeDecodeError("utf-8", b"\xff", 0, 1, EVIL),
]


@pytest.mark.parametrize("debug", ["", "1"])
@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_errors(
    error: Exception, debug: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SNAPCHAIN_DEBUG", debug)
    with streams.checked():
        exits.report(error, as_json=False)
    said = capsys.readouterr()
    assert is_harmless(said.err.replace("\n", ""))
    if not debug:
        assert [line[:9] for line in said.err.splitlines() if not line.startswith("    ")].count("snapchain") <= 2


def test_notices_and_phases(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for terminal in (False, True):
        screen = Terminal()
        with monkeypatch.context() as patch:
            patch.setenv("TERM", "xterm-256color")
            if terminal:
                patch.setattr(sys, "stderr", screen)
            with streams.checked(), Reporter(Mode.AUTO, quiet=False) as report:
                for _ in range(2):
                    report(Notice(EVIL, EVIL))
                    report(Progress(EVIL, 1, 2))
                sys.stderr.write(EVIL)  # while the bar is shown
        text = _STYLES.sub("", screen.getvalue()) if terminal else capsys.readouterr().err
        assert "owned" in text
        assert is_harmless(text.replace("\n", "")), repr(text)


def test_the_streams_and_the_console_themselves(capsys: pytest.CaptureFixture[str]) -> None:
    from rich.table import Table
    from rich.text import Text

    with streams.checked():
        sys.stdout.write(EVIL)
        sys.stdout.writelines([EVIL])
        print(EVIL, file=sys.stderr)
        for console in (output.console(), output.console(stderr=True)):
            assert isinstance(console, EscapingConsole)
            table = Table(EVIL)
            table.add_row(Text(EVIL))
            console.print(EVIL, Text(EVIL), table)
    said = capsys.readouterr()
    assert is_harmless((said.out + said.err).replace("\n", "")), repr(said)


def test_json_is_exact(run: Run, tmp_path: Path) -> None:
    name = f"i{EVIL}.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "plain.qcow2", str(MiB))
    Path("plain.qcow2").rename(name)
    said = run("inspect", name, "--json")
    assert said.out.isascii()
    assert said.json["layers"][0]["path"].endswith(name)
    assert run("inspect", f"gone{name}", "--json").json["error"]["subject"].endswith(name)
