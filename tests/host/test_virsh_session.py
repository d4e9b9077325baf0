"""A virsh that is kept connected: what it answers, and how it fails. The daemon is libvirt's test driver."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from snapchain.errors import NotFound, ToolFailed, Unavailable
from snapchain.host import virsh_session
from snapchain.host.process_channel import ProcessChannel
from snapchain.host.virsh import Virsh
from snapchain.host.virsh_session import VirshSession
from tests.waiting import HANG, gone, wait_until

TEST = "test:///default"


@pytest.fixture
def session() -> Iterator[VirshSession]:
    with VirshSession(Virsh(TEST, seconds=HANG)) as found:
        yield found


def pid_of(session: VirshSession) -> int:
    assert session._channel is not None
    return session._channel.pid


@pytest.mark.parametrize("read_only", [False, True])
def test_it_answers_as_a_virsh_of_its_own(read_only: bool) -> None:
    virsh = Virsh(TEST, read_only=read_only)
    with VirshSession(virsh) as session:
        for words in (["uri"], ["dumpxml", "--domain", "test"], ["list", "--all"], ["domblklist", "--domain", "test"]):
            assert session.text(*words).strip() == virsh.text(*words).strip()


def test_it_fails_as_a_virsh_of_its_own_and_goes_on(session: VirshSession) -> None:
    session.ready()
    pid = pid_of(session)
    for name in ("none", "it's", "a; echo b", 'say "x"', "back\\slash", "$HOME"):
        with pytest.raises(NotFound, match="no such domain") as caught:
            session.text("domstate", "--domain", name)
        assert caught.value.subject == name
    with pytest.raises(ToolFailed, match="libvirt refused `qemu-agent-command`: this function is not supported"):
        session.text("qemu-agent-command", "--domain", "test", "--cmd", '{"execute":"guest-ping"}')
    assert session.text("domstate", "--domain", "test").strip() == "running"
    assert pid_of(session) == pid


def test_words_that_its_line_editor_would_change_go_another_way(session: VirshSession) -> None:
    for name in ("tab\there", "Prüfung", "two\nlines", "\x1b[A"):
        with pytest.raises(NotFound, match="no such domain"):
            session.text("domstate", "--domain", name)
        assert session._channel is None


def test_after_its_death_there_is_another_one(session: VirshSession) -> None:
    session.ready()
    pid = pid_of(session)
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(Unavailable, match="virsh ended with exit status -9 before it answered `domstate`"):
        session.text("domstate", "--domain", "test")
    assert session.text("domstate", "--domain", "test").strip() == "running"
    assert pid_of(session) != pid


def test_one_that_hangs_is_ended(session: VirshSession) -> None:
    session.ready()
    pid = pid_of(session)
    os.kill(pid, signal.SIGSTOP)
    with pytest.raises(Unavailable, match="did not answer `domstate` in time"):
        session.text("domstate", "--domain", "test", timeout=0.1)
    wait_until(lambda: gone(pid))
    assert session.text("domstate", "--domain", "test").strip() == "running"


@pytest.mark.parametrize("first", ["the question", "the end"])
def test_a_daemon_that_is_not_there(first: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = ProcessChannel.write

    def late(channel: ProcessChannel, line: bytes) -> None:
        assert first == "the question" or channel.has_ended(HANG)
        write(channel, line)

    monkeypatch.setattr(ProcessChannel, "write", late)
    with (
        VirshSession(Virsh(f"qemu+unix:///system?socket={tmp_path}/none")) as session,
        pytest.raises(Unavailable, match="libvirt is not reachable: failed to connect"),
    ):
        session.ready()


def test_it_leaves_no_process_and_no_history(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with VirshSession(Virsh(TEST)) as session:
        session.ready()
        pid = pid_of(session)
    wait_until(lambda: gone(pid))
    assert list(tmp_path.iterdir()) == []


def test_a_mark_is_not_in_the_line_that_asks_for_it() -> None:
    assert virsh_session._halved("abcd") == "'ab''cd'"
