"""One stream over several connections: the same bytes, as soon, and one end for all."""

from __future__ import annotations

import os
import random
import signal
import socket
import sys
import textwrap
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st

from snapchain.errors import Corrupt, InvalidInput, SnapchainError, ToolFailed, Unavailable
from snapchain.host import lanes
from snapchain.host.channel import Channel
from snapchain.host.lanes import MAGIC, STRIPE, Lanes, accept_lanes, join_lanes
from snapchain.host.process_channel import ProcessChannel
from snapchain.host.ssh import RemoteAddress, SshProgram, open_ssh_lanes
from tests.net.sshd import SshHost
from tests.waiting import HANG, gone, wait_until

SERVER = textwrap.dedent("""
    import os
    import time
    from types import SimpleNamespace
    from snapchain.host import lanes
    from snapchain.host.channel import stdio_channel
    came, coming, taken_over = 1, int(os.environ.get("COMING", "99")), lanes._taken_over
    def counted(*visitor):
        global came
        lane = taken_over(*visitor)
        came += lane is not None
        return lane
    def clock():  # time is up once all have come that do, and no sooner
        return time.monotonic() + (came >= coming) * lanes.JOIN_SECONDS
    lanes.JOIN_SECONDS = 120
    lanes._taken_over = counted
    lanes.time = SimpleNamespace(monotonic=clock, sleep=time.sleep)
    channel = lanes.accept_lanes(stdio_channel(patience=120))
    if channel is not None:
        with channel:
            while piece := channel.read(100_000):
                channel.write(piece.swapcase())
""")


def ended(status: int, stderr: str) -> SnapchainError:
    return ToolFailed(f"{status}: {stderr}", argv=(), status=status, stderr=stderr)


@pytest.fixture(autouse=True)
def _as_long_as_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """All connections come, however busy the machine is."""
    monkeypatch.setattr(lanes, "JOIN_SECONDS", HANG)


def server(*argv: str, coming: int = 99, patience: float = HANG) -> ProcessChannel:
    """coming: how many are waited for, where not all come"""
    argv = argv or (sys.executable, "-c", SERVER)
    env = {**os.environ, "COMING": str(coming)}
    return ProcessChannel(argv, peer="there", diagnose=ended, env=env, patience=patience)


def joined(count: int, *others: ProcessChannel) -> Channel:
    return join_lanes([*(server(coming=count) for _ in range(count)), *others], peer="there", patience=HANG)


def exchanged(channel: Channel, sent: bytes, sizes: Sequence[int] = (70_000,)) -> bytes:
    """What comes back while `sent` is written in pieces."""
    with ThreadPoolExecutor(1) as writer:

        def write() -> None:
            start = 0
            for n in range(len(sent)):
                channel.write(sent[start : start + sizes[n % len(sizes)]])
                start += sizes[n % len(sizes)]
                if start >= len(sent):
                    break
            channel.finish_writing()

        written = writer.submit(write)
        got = b"".join(iter(lambda: channel.read(150_000), b""))
        written.result()
        return got


@pytest.mark.parametrize("count", [1, 2, 5])
def test_a_stream_over_several_processes(count: int) -> None:
    sent = os.urandom(5_000_000)
    with joined(count) as channel:
        assert isinstance(channel, Lanes)
        assert len(channel.lanes) == count
        assert exchanged(channel, sent) == sent.swapcase()
        assert channel.bytes_read == channel.bytes_written == len(sent)


def pairs(count: int) -> tuple[Lanes, Lanes]:
    ends = [tuple(end.detach() for end in socket.socketpair()) for _ in range(count)]
    near = [Channel(here, here, peer="far", patience=HANG) for here, _ in ends]
    far = [Channel(there, there, peer="near", patience=HANG) for _, there in ends]
    return Lanes(near, peer="far", patience=HANG), Lanes(far, peer="near", patience=HANG)


@settings(max_examples=25)
@given(st.integers(1, 5), st.lists(st.integers(1, 3 * STRIPE), min_size=1, max_size=20), st.integers(0, 1 << 30))
def test_any_pieces_arrive_in_order(count: int, sizes: list[int], seed: int) -> None:
    sent = random.Random(seed).randbytes(sum(sizes))
    near, far = pairs(count)
    with near, far, ThreadPoolExecutor(1) as echo:

        def answer() -> None:
            while piece := far.read(50_000):
                far.write([piece[:7], piece[7:]])
            far.finish_writing()

        done = echo.submit(answer)
        assert exchanged(near, sent, sizes) == sent
        done.result()


def test_little_pieces_are_on_their_way_at_once() -> None:
    near, far = pairs(3)
    with near, far:
        for n in range(10):
            near.write(b"%d" % n)
            assert far.read(10) == b"%d" % n
        near.write(bytes(STRIPE))
        assert far.read_into(memoryview(bytearray(STRIPE))) == STRIPE


def test_a_lane_that_ends_early_is_no_end() -> None:
    near, far = pairs(2)
    near.lanes[1].write(b"x")
    near.lanes[0].finish_writing()
    with pytest.raises(Unavailable, match="a part of the connection was lost"):
        far.read(10)
    near.close()
    far.close()


def test_what_comes_with_the_answer_is_kept() -> None:
    here, there = (end.detach() for end in socket.socketpair())
    with Channel(there, there, peer="near", patience=HANG) as far:
        far.write(lanes._ANSWER.pack(MAGIC, 1) + b"and more")
        with join_lanes([Channel(here, here, peer="far", patience=HANG)], peer="far") as near:
            assert near.read(100) == b"and more"


def test_a_connection_that_does_not_come_is_done_without() -> None:
    sent = os.urandom(1_000_000)
    with joined(2, server("sleep", "1000"), server("false")) as channel:
        assert isinstance(channel, Lanes)
        assert len(channel.lanes) == 2
        assert exchanged(channel, sent) == sent.swapcase()


def test_the_first_must_come() -> None:
    with pytest.raises(ToolFailed, match="7: no way"):
        join_lanes([server("sh", "-c", "echo no way >&2; exit 7"), server()], peer="there")


@pytest.mark.parametrize("sent", [b"", b"snap", b"snapchain-stream and more", MAGIC[:-1] + b"x", os.urandom(100_000)])
def test_a_stream_without_lanes_is_as_it_is(sent: bytes) -> None:
    here, there = (end.detach() for end in socket.socketpair())
    with (
        Channel(here, here, peer="far", patience=HANG) as near,
        Channel(there, there, peer="near", patience=HANG) as far,
    ):
        near.write(sent)
        near.finish_writing()
        assert accept_lanes(far) is far
        assert b"".join(iter(lambda: far.read(9999), b"")) == sent


@pytest.mark.parametrize(
    "preface", [b"\0" * 16 + b"\x03\x02", b"\0" * 16 + b"\x00\xff", b"\0" * 16 + b"\x00\x00", b"\0"]
)
def test_a_wrong_beginning(preface: bytes) -> None:
    here, there = (end.detach() for end in socket.socketpair())
    with Channel(here, here, peer="far") as near, Channel(there, there, peer="near", patience=HANG) as far:
        near.write(MAGIC + preface)
        near.finish_writing()
        with pytest.raises((Corrupt, Unavailable), match=r"makes no sense|closed by the other side"):
            accept_lanes(far)


@pytest.mark.parametrize(
    "answer", ["printf 0123456789abcdefghij", "printf 'snapchain-lanes\\n\\002\\0\\0\\0'", "printf x"]
)
def test_a_wrong_answer(answer: str) -> None:
    with pytest.raises((Corrupt, Unavailable), match=r"does not answer as snapchain does|nothing came from it"):
        join_lanes([server("sh", "-c", f"{answer}; cat >/dev/null", patience=0.5)], peer="there")


def test_a_stranger_is_no_lane() -> None:
    """And keeps no place from the one that comes."""
    secret = b"s" * 16
    here, there = (end.detach() for end in socket.socketpair())
    own, handed_over = socket.socketpair()
    with (
        Channel(here, here, peer="far", patience=HANG) as near,
        Channel(there, there, peer="near", patience=HANG) as far,
        own,
    ):
        near.write(lanes._PREFACE.pack(MAGIC, secret, 0, 2))
        with ThreadPoolExecutor(1) as other, handed_over:
            accepted = other.submit(accept_lanes, far)
            for message, given in (
                (lanes._JOIN.pack(b"x" * 16, 1), here),
                (b"x", here),
                (lanes._JOIN.pack(secret, 9), here),
                (lanes._JOIN.pack(secret, 1), handed_over.fileno()),
            ):
                with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as visitor:
                    lanes._connect(visitor, lanes._name(secret), "")
                    socket.send_fds(visitor, [message], [given, given])
            joined_by = accepted.result(HANG)
        assert isinstance(joined_by, Lanes)
        _, lane = joined_by.lanes
        with lane:
            own.sendall(b"ours")
            assert lane.read(4) == b"ours"


@pytest.mark.parametrize("count", [0, 17])
def test_how_many(count: int) -> None:
    with pytest.raises(InvalidInput, match=f"1 to 16 connections, not {count}"):
        join_lanes([None] * count, peer="there")  # type: ignore[list-item]


def test_no_descriptor_is_left_open() -> None:
    before = set(Path("/proc/self/fd").iterdir())
    with joined(3, server("false")) as channel:
        channel.write(b"a")
        assert channel.read(1) == b"A"
    wait_until(lambda: set(Path("/proc/self/fd").iterdir()) == before)


def over_ssh(host: SshHost, count: int) -> Channel:
    script = host.folder / "lanes.py"
    script.write_text(SERVER)
    program = SshProgram(host.ssh, f"env PYTHONPATH={':'.join(filter(None, sys.path))} {sys.executable} {script}")
    return open_ssh_lanes(RemoteAddress(host.alias, "/srv"), count, program=program, patience=HANG)


def test_over_ssh(there: SshHost) -> None:
    sent = os.urandom(3_000_000)
    known = set(there.sessions())
    with over_ssh(there, 3) as channel:
        assert len(set(there.sessions()) - known) == 3
        assert exchanged(channel, sent) == sent.swapcase()
    wait_until(lambda: not set(there.sessions()) - known)


@pytest.mark.parametrize("lane", [0, 1])
def test_a_connection_that_is_lost_ends_all(there: SshHost, lane: int) -> None:
    known = set(there.sessions())
    channel = over_ssh(there, 2)
    assert isinstance(channel, Lanes)
    children = [child.pid for child in channel.lanes if isinstance(child, ProcessChannel)]
    os.kill(children[lane], signal.SIGKILL)
    with pytest.raises(Unavailable, match="ssh was ended by SIGKILL"):
        exchanged(channel, os.urandom(4 * STRIPE))
    channel.abort()
    wait_until(lambda: all(gone(pid) for pid in children))
    wait_until(lambda: not set(there.sessions()) - known)
