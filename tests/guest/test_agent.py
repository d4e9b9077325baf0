"""The wire of the guest agent: in step with it whatever it and its earlier clients do."""

from __future__ import annotations

import json
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from snapchain.errors import Busy, InvalidInput, Unavailable, Unsupported
from snapchain.guest.agent import NoReply, SocketAgent, open_agent
from snapchain.guest.libvirt_agent import LibvirtAgent
from tests.guest.fake_agent import FakeAgent
from tests.waiting import HANG, wait_until

SOON = 1.0
"""Seconds after which a call has failed that can get no reply."""


@pytest.fixture
def fake() -> Iterator[FakeAgent]:
    folder = Path(tempfile.mkdtemp())  # a socket's path must be short
    with FakeAgent(folder / "agent") as agent:
        yield agent
    shutil.rmtree(folder)


def test_freeze_and_thaw(fake: FakeAgent) -> None:
    agent = open_agent({"kind": "socket", "path": str(fake.path)})
    agent.ping(timeout=HANG)
    assert not agent.is_frozen(timeout=HANG)
    assert agent.freeze(timeout=HANG) == 2
    assert agent.is_frozen(timeout=HANG)
    with pytest.raises(Busy, match="frozen already, by another program"):
        agent.freeze(timeout=HANG)
    assert agent.thaw(timeout=HANG) == 2
    assert agent.thaw(timeout=HANG) == 0
    assert open_agent(agent.address()).address() == agent.address()


def test_one_connection_for_all_calls(fake: FakeAgent) -> None:
    agent = open_agent({"kind": "socket", "path": str(fake.path)})
    with agent.connected():
        for _ in range(3):
            agent.ping(timeout=HANG)
        client = fake._client
        agent.ping(timeout=HANG)
        assert fake._client is client
    wait_until(lambda: fake._client is None)


def test_late_replies_and_half_commands_of_others_are_dropped(fake: FakeAgent) -> None:
    """A client that went away has left a half-sent command, and a reply that is still to come."""
    fake.hold.add("guest-fsfreeze-status")
    with socket.socket(socket.AF_UNIX) as other:
        other.connect(str(fake.path))
        other.sendall(b'{"execute":"guest-fsfreeze-status"}\n{"execute":"guest-info","argu')
        wait_until(lambda: fake.waits)
    fake.before_sync = b'\xff{"return": 12345}\n{"return": "frozen"}\n'
    fake.release()
    assert not open_agent({"kind": "socket", "path": str(fake.path)}).is_frozen(timeout=HANG)


def test_the_reply_to_a_call_that_timed_out_is_not_taken_for_the_next(fake: FakeAgent) -> None:
    agent = SocketAgent(fake.path)
    with agent.connected():
        agent.ping(timeout=HANG)
        fake.hold.add("guest-fsfreeze-freeze")
        with pytest.raises(NoReply, match="did not answer in time") as failed:
            agent.freeze(timeout=SOON)
        assert failed.value.was_sent
        fake.release()
        assert agent.is_frozen(timeout=HANG)  # it happened later
        assert agent.thaw(timeout=HANG) == 2


def test_an_agent_that_hangs_is_told_from_a_freeze_that_was_sent(fake: FakeAgent) -> None:
    fake.hold.add("guest-sync-delimited")
    with pytest.raises(NoReply, match="did not answer in time") as failed:
        SocketAgent(fake.path).freeze(timeout=SOON)
    assert not failed.value.was_sent
    assert "qemu-guest-agent" in str(failed.value.hint)


def test_another_client_is_connected(fake: FakeAgent) -> None:
    with socket.socket(socket.AF_UNIX) as other, socket.socket(socket.AF_UNIX) as waiting:
        other.connect(str(fake.path))
        wait_until(lambda: fake._client is not None)
        waiting.connect(str(fake.path))
        with pytest.raises(NoReply, match=r"did not answer in time|another program") as failed:
            SocketAgent(fake.path).ping(timeout=SOON)
        assert not failed.value.was_sent


@pytest.mark.parametrize(
    ("reply", "error", "words"),
    [
        (b'{"error":{"class":"CommandDisabled","desc":"disabled for this instance"}}\n', Unsupported, "does not offer"),
        (b'{"error":{"class":"GenericError","desc":"hook\\u001b[1m failed"}}\n', Unavailable, "hook .1m failed"),
        (b"nonsense\n", NoReply, "is no reply"),
        (b"[1]\n", NoReply, "is no reply"),
        (b"x" * 100_000, NoReply, "without an end"),
        (b"", NoReply, "in time"),
    ],
)
def test_bad_replies(fake: FakeAgent, reply: bytes, error: type[Exception], words: str) -> None:
    fake.replies["guest-fsfreeze-freeze"] = reply
    with pytest.raises(error, match=words) as failed:
        SocketAgent(fake.path).freeze(timeout=HANG if len(reply) > 1000 else SOON)
    if isinstance(failed.value, NoReply):
        assert failed.value.was_sent
    assert "\x1b" not in str(failed.value)


def test_reading_is_bounded(fake: FakeAgent) -> None:
    fake.before_sync = b"y" * (8 << 20)
    with pytest.raises(NoReply, match="more than it was asked for"):
        SocketAgent(fake.path).ping(timeout=HANG)


def test_a_count_that_is_none_is_zero(fake: FakeAgent) -> None:
    fake.replies["guest-fsfreeze-freeze"] = json.dumps({"return": "many"}).encode() + b"\n"
    assert SocketAgent(fake.path).freeze(timeout=HANG) == 0


def test_a_socket_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(NoReply, match="No such file") as failed:
        SocketAgent(tmp_path / "none").freeze(timeout=HANG)
    assert not failed.value.was_sent
    with pytest.raises(NoReply, match="cannot be used") as failed:
        SocketAgent(tmp_path / ("x" * 200)).freeze(timeout=HANG)
    assert "107 bytes" in str(failed.value.hint)


def test_an_agent_that_goes_away(fake: FakeAgent) -> None:
    fake.hold.add("guest-fsfreeze-freeze")
    agent = SocketAgent(fake.path)
    with agent.connected():
        agent.ping(timeout=HANG)
        assert fake._client is not None
        fake._client.shutdown(socket.SHUT_RDWR)
        began = time.monotonic()
        with pytest.raises(NoReply, match="was lost"):
            agent.freeze(timeout=HANG)
        assert time.monotonic() - began < HANG
        fake.release()
        agent.ping(timeout=HANG)  # by a new connection


def test_addresses() -> None:
    assert isinstance(open_agent({"kind": "libvirt", "domain": "web1"}), LibvirtAgent)
    there = {"kind": "libvirt", "domain": "web1", "name": "web1", "connect": "qemu:///session"}
    assert open_agent(there).address() == there
    with pytest.raises(InvalidInput, match="not the address of a guest agent"):
        open_agent({"kind": "carrier pigeon"})
