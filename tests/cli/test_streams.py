"""Standard output that is full, closed or read by nobody: every verb ends with a plain error, or quietly with 141."""

from __future__ import annotations

import errno
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import pytest

from snapchain.cli import exits, main
from snapchain.cli.streams import ReaderGone, Stderr, Stdout
from snapchain.cli.verbs import VERBS
from snapchain.errors import InvalidInput, OutputFailed
from snapchain.model.guest_state import Place
from snapchain.ops import guests
from snapchain.ops.guest_places import tell_others
from snapchain.replica.disk_writer import ReplicaWriting
from snapchain.replica.endpoint import DirectoryEndpoint
from tests.cli.conftest import MiB, Run, qemu_img, write
from tests.ops.taken_over import made_point, taken_over

READING = {
    "log": ["log", "repo"],
    "status": ["status", "repo"],
    "stats": ["stats", "repo"],
    "inspect": ["inspect", "web1.qcow2"],
    "diff": ["diff", "web1.qcow2", "other.qcow2"],
    "verify": ["verify", "repo"],
    "guests": ["guests", "--at", "repo"],
    "key list": ["key", "list", "keyed"],
    "watch": ["watch", "--qmp", "{here}/qmp", "repo", "--every", "1h", "--print-systemd"],
    "help": ["--help"],
    "version": ["--version"],
    "serve": ["serve", "repo::web1", "--dry-run"],
    "mount": ["mount", "repo", "mnt", "--dry-run"],
    "files": ["files", "volumes", "other.qcow2"],
    "a plan": ["ship", "web1.qcow2", "repo::new", "--dry-run"],
}
CHANGING = {
    "init": ["init", "fresh", "--no-encryption"],
    "snapshot": ["snapshot", "web1.qcow2"],
    "ship": ["ship", "web1.qcow2", "repo::new"],
    "send": ["send", "web1.qcow2", "dir:{here}/replica::new"],
    "sync": ["sync", "web1.qcow2", "dir:{here}/replica::new", "--rounds", "1"],
    "migrate": ["migrate", "other.qcow2", "dir:{here}/replica::other", "--offline"],
    "restore": ["restore", "repo::web1", "out.raw"],
    "merge": ["merge", "other.qcow2"],
    "hold": ["hold", "repo::web1@1", "--tag", "t"],
    "release": ["release", "repo::held@1", "--tag", "t"],
    "gc": ["gc", "repo"],
    "forget": ["forget", "repo::spare@1"],
    "rename": ["rename", "repo::web1", "repo::web9"],
    "copy": ["copy", "repo", "second"],
    "repair": ["repair", "repo"],
    "key": ["key", "change", "keyed", "--keep-passphrase"],
    "nightly": ["nightly", "nightly.toml"],
    "failover": ["failover", "dir:{here}/failover/points::web1", "--source-is-gone", "--yes"],
    "fence": ["fence", "fence/vda.qcow2", "dir:{here}/fence/points::web1/vda"],
    "failback": ["failback", "--prepare", "failback/vda.qcow2", "dir:{here}/back::web1/vda"],
    "retire": ["retire", "dir:{here}/retire/points::web1", "dir:{here}/gone", "--yes"],
    "doctor": ["doctor", "."],
}
ELSEWHERE = {"receive", "serve-replica"}
"""receive reads a pipe, and has a test of its own; serve-replica prints nothing."""


class Broken(io.TextIOBase):
    """A standard output that takes nothing; `number`: why not."""

    encoding = "utf-8"

    def __init__(self, number: int) -> None:
        self.number = number

    def write(self, _text: str) -> int:
        raise OSError(self.number, os.strerror(self.number))

    def isatty(self) -> bool:
        return False


@pytest.fixture
def ground(run: Run, disk: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An image, another one, a repository with points of two disks, and a configuration; no QEMU of another test."""
    monkeypatch.setattr(guests, "qemu_processes", list)
    qemu_img("create", "-q", "-f", "qcow2", "other.qcow2", "1M")
    run("init", "repo", "--no-encryption")
    run("init", "keyed")
    run("init", "second", "--no-encryption")
    run("ship", "other.qcow2", "repo::web1")
    run("ship", "other.qcow2", "repo::held")
    run("ship", "other.qcow2", "repo::spare")
    run("hold", "repo::held@1", "--tag", "t")
    here = Path.cwd()
    (here / "mnt").mkdir()
    (here / "nightly.toml").write_text(
        f'time_zone = "UTC"\nstate = "{here}/state"\n[[disks]]\npath = "{here}/other.qcow2"\n'
        f'[[destinations]]\nname = "vault"\nurl = "{here}/repo"\n'
    )
    return disk


def made_guest(words: Sequence[str], here: Path) -> None:
    """What a verb about guests that are taken over needs."""
    verb = words[0]
    if verb not in {"failover", "fence", "failback", "retire"}:
        return
    image = here / verb / "vda.qcow2"
    image.parent.mkdir()
    qemu_img("create", "-q", "-f", "qcow2", image, "1M")
    with suppress(InvalidInput):  # a directory whose name cannot be that of a backing file
        if verb in {"failover", "retire"}:
            made_point(image, image.parent / "points")
            place = ReplicaWriting(DirectoryEndpoint(image.parent / "points"))
            tell_others(place, "web1", [Place(url=f"dir:{here}/gone")], by="kvm1")
        else:
            taken_over(image, image.parent / "points", fenced=verb == "failback")


def said_to(number: int, words: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> int:
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", Broken(number))
        return main([word.replace("{here}", str(Path.cwd())) for word in words])


def test_every_verb_is_tried() -> None:
    assert {*READING, *CHANGING, *ELSEWHERE} >= set(VERBS)


@pytest.mark.parametrize("words", [*READING.values(), *CHANGING.values()], ids=[*READING, *CHANGING])
def test_a_full_disk_is_a_plain_error_of_its_own(
    words: list[str], ground: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made_guest(words, Path.cwd())
    capsys.readouterr()
    assert said_to(errno.ENOSPC, words, monkeypatch) == OutputFailed.exit_code
    told = capsys.readouterr().err
    assert "standard output: " in told
    assert "no space left on device" in told
    assert ("the work is done" in told) is (words in CHANGING.values())
    assert not any(word in told for word in ("bug", "Traceback"))


@pytest.mark.parametrize("words", [*READING.values(), CHANGING["sync"], CHANGING["nightly"], CHANGING["doctor"]])
def test_a_reader_that_has_gone_ends_it_quietly(
    words: list[str], ground: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert said_to(errno.EPIPE, words, monkeypatch) == exits.BROKEN_PIPE
    assert "error" not in capsys.readouterr().err


def test_the_work_is_done_although_its_report_is_lost(
    ground: Path, run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert said_to(errno.ENOSPC, ["ship", "web1.qcow2", "repo::new"], monkeypatch) == 11
    assert [disk["name"] for disk in run("log", "repo", "--json").json["disks"]] == ["held", "new", "spare", "web1"]


def test_a_failure_outweighs_that_its_report_is_lost(
    ground: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("other.qcow2").write_bytes(b"no image")
    assert said_to(errno.ENOSPC, ["nightly", "nightly.toml"], monkeypatch) == 10
    assert "not a qcow2 image" in capsys.readouterr().err


def test_an_error_finds_its_way_past_a_broken_stdout(
    ground: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    for number in (errno.ENOSPC, errno.EPIPE):
        assert said_to(number, ["log", "nowhere", "--json"], monkeypatch) == 3
        assert json.loads(capsys.readouterr().err)["error"]["kind"] == "not-found"
    assert said_to(errno.ENOSPC, ["log", "repo", "--json"], monkeypatch) == 11
    assert json.loads(capsys.readouterr().err)["error"]["kind"] == "output-failed"


def test_a_broken_stderr_stops_nothing(ground: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Broken(errno.EPIPE))
    assert main(["log", "repo"]) == 0
    assert main(["log", "nowhere"]) == 3
    assert main(["ship", "web1.qcow2", "repo::new", "--progress", "json"]) == 0


@pytest.mark.parametrize("number", [errno.EPIPE, errno.ENOSPC, errno.EBADF, errno.EIO])
def test_what_a_failed_write_means(number: int) -> None:
    wanted = ReaderGone if number == errno.EPIPE else OutputFailed
    words = "^$" if wanted is ReaderGone else "the output cannot be written"
    with pytest.raises(wanted, match=words):
        Stdout(Broken(number)).write("x")  # type: ignore[arg-type]
    assert Stderr(Broken(number)).write("x") == 1  # type: ignore[arg-type]


def test_a_stdout_that_was_never_there() -> None:
    with pytest.raises(OutputFailed, match="closed"):
        Stdout(None).write("x")
    Stdout(None).flush()
    assert not Stdout(None).isatty()


def _closed(descriptor: int) -> Callable[[], None]:
    return lambda: os.close(descriptor)


def alone(words: Sequence[str], **streams: object) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-m", "snapchain", *words], stderr=subprocess.PIPE, text=True, check=False, **streams
    )  # type: ignore[call-overload]
    return done.returncode, done.stderr


def test_a_process_ends_so_too_at_its_very_end(ground: Path) -> None:
    with Path("/dev/full").open("w") as full:
        status, err = alone(["log", "repo"], stdout=full)
    assert (status, "no space left" in err, "Traceback" in err) == (11, True, False)
    status, err = alone(["inspect", "web1.qcow2"], preexec_fn=_closed(1))
    assert (status, "it is closed" in err) == (11, True)
    assert alone(["inspect", "web1.qcow2"], stdout=subprocess.DEVNULL, preexec_fn=_closed(2)) == (0, "")


def test_a_closed_stdout_is_no_image(ground: Path) -> None:
    """The next file that is opened would be descriptor 1, and get what is printed."""
    before = ground.read_bytes()
    assert alone(["diff", "web1.qcow2", "other.qcow2"], preexec_fn=_closed(1))[0] == 11
    assert ground.read_bytes() == before


def test_a_stream_that_nobody_reads_to_its_end(ground: Path, tmp_path: Path) -> None:
    (tmp_path / "noise").write_bytes(os.urandom(4 * MiB))
    write(ground, f"write -s {tmp_path / 'noise'} 0 4M")
    reading, writing = os.pipe()
    os.close(reading)
    assert alone(["send", "web1.qcow2", "--disk", "x"], stdout=writing) == (141, "")
    os.close(writing)
    with Path("/dev/full").open("w") as full:
        status, err = alone(["send", "web1.qcow2", "--disk", "x"], stdout=full)
    assert (status, "no space left" in err, "run it again" in err) == (11, True, False)


def test_a_received_stream_is_there_although_its_report_is_lost(ground: Path, run: Run) -> None:
    with Path("stream").open("wb") as stream:
        assert alone(["send", "web1.qcow2", "--disk", "x", "-q"], stdout=stream)[0] == 0
    with Path("stream").open("rb") as stream, Path("/dev/full").open("w") as full:
        assert alone(["receive", "replica", "--dry-run"], stdin=stream, stdout=full)[0] == 11
    assert not Path("replica").exists()
    with Path("stream").open("rb") as stream, Path("/dev/full").open("w") as full:
        status, err = alone(["receive", "replica"], stdin=stream, stdout=full)
    assert (status, "the work is done" in err) == (11, True)
    assert run("log", f"dir:{Path.cwd()}/replica", "--json").json["disks"][0]["name"] == "x"


# --- findings are shown once


def seen(words: str) -> tuple[str, int]:
    """What a terminal shows of a shell's command line, and the exit code of snapchain."""
    line = words.replace("snapchain", f"{sys.executable} -m snapchain")
    master, slave = os.openpty()
    shell = subprocess.Popen(
        ["setsid", "--ctty", "bash", "-c", f"{line}; echo code ${{PIPESTATUS[0]}}"],
        stdin=slave,
        stdout=slave,
        stderr=slave,
        env={**os.environ, "TERM": "dumb"},
    )
    os.close(slave)
    shown = b""
    with suppress(OSError):  # EIO: no process has the terminal any more
        while piece := os.read(master, 4096):
            shown += piece
    os.close(master)
    shell.wait()
    text, _, code = shown.decode().replace("\r\n", "\n").rstrip().rpartition("code ")
    return text, int(code)


@pytest.fixture
def damaged(run: Run, disk: Path) -> str:
    """The name of the data pack of a repository at `repo`, from which all packs are gone."""
    write(disk, "write -P 5 0 64k")
    run("init", "repo", "--no-encryption")
    run("ship", str(disk), "repo::web1")
    for pack in [each for each in Path("repo/packs").rglob("*") if each.is_file()]:
        pack.unlink()
    (lost,) = run("repair", "repo", "--dry-run", "--json").json["plan"]["lost"]
    return str(lost["subject"]).rpartition("/")[2]


@pytest.mark.parametrize("verb", ["verify repo", "repair repo --dry-run"])
def test_findings_are_on_a_terminal_once(verb: str, damaged: str) -> None:
    text, code = seen(f"snapchain {verb} 2>/dev/tty")  # the terminal by another name
    assert (code, text.count(damaged)) == (5, 1), text


def test_findings_of_a_report_that_is_piped_are_pointed_at(damaged: str) -> None:
    text, code = seen("snapchain verify repo | tee log")
    assert (code, text.count("snapchain: exit code 5: the report says what is wrong")) == (5, 1)
    assert text.count(damaged) == 1
    assert damaged in seen("snapchain verify repo --quiet | cat")[0]
    assert damaged in seen("snapchain verify repo 2>&1 >/dev/null | cat")[0], "cron mails what is on stderr"
