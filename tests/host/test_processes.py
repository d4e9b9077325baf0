"""The one door to other programs: what goes in, what comes out, and how a child ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from snapchain.errors import InvalidInput, ToolFailed
from snapchain.host.processes import Limits, _Deadline, run
from tests.waiting import HANG, gone, started_with, wait_until


def test_output_and_status_come_back_apart() -> None:
    done = run(["sh", "-c", "printf out; printf err >&2; exit 3"], ok=(3,))
    assert (done.status, done.stdout, done.stderr) == (3, b"out", "err")


def test_arguments_reach_the_program_as_they_are() -> None:
    odd = ["a b", "*", "$HOME", "--x=\n", "é", "'\"", "", "-"]
    assert run(["printf", "%s\\0", *odd]).stdout.decode().split("\0")[:-1] == odd


@pytest.mark.parametrize("argument", ["a\0b", "\udcff.qcow2"])
def test_arguments_that_cannot_be_given_are_refused(argument: str) -> None:
    with pytest.raises(InvalidInput, match="a program cannot be given this name"):
        run(["printf", argument])


def test_the_child_sees_no_terminal_and_a_bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SNAPCHAIN_PASSWORD", "secret")
    monkeypatch.setenv("LC_ALL", "de_DE.UTF-8")
    names = dict(line.split("=", 1) for line in run(["env"], env={"EXTRA": "1"}).stdout.decode().splitlines())
    assert "SNAPCHAIN_PASSWORD" not in names
    assert names["LC_ALL"] == "C"
    assert names["EXTRA"] == "1"
    assert run(["sh", "-c", "test -t 0 || test -t 1 || test -t 2"], ok=(1,)).status == 1


def test_no_descriptor_leaks_into_the_child(tmp_path: Path) -> None:
    with (tmp_path / "open").open("w") as file:
        os.set_inheritable(file.fileno(), True)
        listed = run(["ls", "-l", "/proc/self/fd"]).stdout.decode()
    assert str(tmp_path / "open") not in listed


def test_stdin_is_given_or_empty() -> None:
    big = os.urandom(300_000)
    assert run(["cat"], stdin=big).stdout == big
    assert run(["cat"]).stdout == b""


def test_a_status_that_is_not_allowed_is_a_failure_with_the_facts() -> None:
    with pytest.raises(ToolFailed, match="exit status 7: it broke") as caught:
        run(["sh", "-c", "echo first >&2; echo it broke >&2; exit 7"])
    assert caught.value.status == 7
    assert caught.value.stderr == "first\nit broke\n"
    assert "it broke" in str(caught.value)
    assert "exit status 7" in str(caught.value)


def test_a_missing_program_names_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(ToolFailed, match="qemu-img: not installed") as caught:
        run(["qemu-img", "info"])
    assert caught.value.status == 127
    assert "qemu-utils" in (caught.value.hint or "")


def test_death_by_signal_is_named() -> None:
    with pytest.raises(ToolFailed, match="SIGSEGV") as caught:
        run(["sh", "-c", "kill -SEGV $$"], ok=range(256))
    assert caught.value.status == -signal.SIGSEGV


def test_a_timeout_kills(tmp_path: Path) -> None:
    with pytest.raises(ToolFailed, match=r"0\.3 seconds"):
        run(["sleep", "1000"], timeout=0.3, env={"MARK": str(tmp_path)})
    assert started_with(tmp_path) == []


def test_a_timeout_kills_what_the_program_has_started(tmp_path: Path) -> None:
    with pytest.raises(ToolFailed, match=r"0\.3 seconds"):
        run(["sh", "-c", "sleep 1000 & sleep 1000 & wait; true"], timeout=0.3, env={"MARK": str(tmp_path)})
    wait_until(lambda: started_with(tmp_path) == [])


@pytest.mark.parametrize("ended", [True, False])
def test_what_a_program_leaves_running_is_not_killed_at_its_deadline(*, ended: bool) -> None:
    """It may be a daemon, and sh waits two seconds for its end of the pipe."""
    with subprocess.Popen(["sleep", "1000"], start_new_session=True) as left:
        deadline = _Deadline(SimpleNamespace(pid=left.pid, exit_code=0 if ended else None), 0)
        assert deadline._timer is not None
        deadline._timer.join()
        assert deadline.passed is not ended
        left.terminate()
    assert left.returncode == (-signal.SIGTERM if ended else -signal.SIGKILL)


def test_a_deadline_makes_no_program_slower() -> None:
    """sh's own looks every 100 ms: no call would take less. The first of these that takes less shows it."""

    def seconds() -> float:
        began = time.monotonic()
        run(["true"], timeout=HANG)
        return time.monotonic() - began

    assert any(seconds() < 0.09 for _ in range(100))


def test_output_is_bounded() -> None:
    with pytest.raises(ToolFailed, match="more than 100000 bytes"):
        run(["yes"], output_cap=100_000)
    assert len(run(["sh", "-c", "yes | head -c 300000 >&2"]).stderr) == 64 << 10


def test_pieces_of_output_are_handed_on_and_not_kept() -> None:
    pieces: list[bytes] = []
    done = run(["head", "-c", "200000", "/dev/zero"], output_cap=10, on_stdout=pieces.append)
    assert sum(map(len, pieces)) == 200_000
    assert done.stdout == b""


def test_an_error_of_the_listener_ends_the_child_and_comes_back() -> None:
    def refuse(_piece: bytes) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run(["yes"], on_stdout=refuse)


@pytest.mark.parametrize(
    ("limits", "script", "words"),
    [
        (Limits(address_space=200 << 20), "x = bytearray(1 << 30)", "MemoryError"),
        (Limits(cpu_seconds=1), "while True: pass", "SIGKILL|SIGXCPU"),
        (Limits(open_files=20), "x = [open('/dev/null') for _ in range(40)]", "Too many open files"),
        (Limits(file_size=1000), "from pathlib import Path; Path('big').write_bytes(bytes(2000))", "File too large"),
    ],
    ids=["memory", "cpu", "files", "file size"],
)
def test_limits_hold_in_the_child(
    limits: Limits, script: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ToolFailed, match=words):
        run([sys.executable, "-c", script], limits=limits, timeout=HANG)


def test_limits_do_not_bind_a_big_parent() -> None:
    ballast = bytearray(700 << 20)
    assert run(["echo", "fine"], limits=Limits(address_space=256 << 20)).stdout == b"fine\n"
    del ballast


def test_no_core_file() -> None:
    assert run(["sh", "-c", "ulimit -c"]).stdout == b"0\n"


def test_it_works_from_many_threads() -> None:
    outputs: list[bytes] = []
    threads = [threading.Thread(target=lambda n=n: outputs.append(run(["echo", str(n)]).stdout)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outputs) == [b"%d\n" % n for n in range(8)]


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGKILL], ids=["ctrl-c", "kill -9"])
def test_the_child_dies_with_us(sent: signal.Signals, tmp_path: Path) -> None:
    script = textwrap.dedent(f"""
        from snapchain.host.processes import run
        run(["sh", "-c", "echo $$ > {tmp_path}/pid.tmp; mv {tmp_path}/pid.tmp {tmp_path}/pid; exec sleep 1000"])
    """)
    parent = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE)
    wait_until((tmp_path / "pid").exists)
    parent.send_signal(sent)
    _, stderr = parent.communicate(timeout=HANG)
    child = int((tmp_path / "pid").read_text())
    wait_until(lambda: gone(child))
    assert parent.returncode == -sent, stderr.decode()


_interrupt_at_fork = False


def _interrupting() -> None:
    global _interrupt_at_fork  # noqa: PLW0603 - such callbacks cannot be taken back
    if _interrupt_at_fork:
        _interrupt_at_fork = False
        os.kill(os.getpid(), signal.SIGINT)


os.register_at_fork(after_in_parent=_interrupting)


def test_an_interrupt_while_a_program_is_being_started_is_neither_lost_nor_leaves_it_behind(tmp_path: Path) -> None:
    """Raised in a callback of fork, it would be printed and forgotten."""
    global _interrupt_at_fork  # noqa: PLW0603
    _interrupt_at_fork = True
    with pytest.raises(KeyboardInterrupt):
        run(["sleep", "1000"], env={"MARK": str(tmp_path)})
    wait_until(lambda: started_with(tmp_path) == [])
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
