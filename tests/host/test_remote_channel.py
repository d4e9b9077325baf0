"""Bytes both ways: whole, at once, bounded in time, ended from any thread."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from snapchain.errors import SnapchainError, ToolFailed, Unavailable
from snapchain.host.channel import Channel
from snapchain.host.process_channel import PIPE_SIZE, ProcessChannel
from tests.waiting import HANG, gone, wait_until

MiB = 1 << 20


class Ended(Exception):
    """What a test's program ended with."""


def ended(status: int, stderr: str) -> SnapchainError:
    return ToolFailed(f"{status}: {stderr}", argv=(), status=status, stderr=stderr)


def program(*argv: str, patience: float = HANG) -> ProcessChannel:
    return ProcessChannel(argv, peer="there", diagnose=ended, env=dict(os.environ), patience=patience)


def descriptors() -> set[Path]:
    return set(Path("/proc/self/fd").iterdir())


def everything(channel: Channel) -> bytes:
    return b"".join(iter(lambda: channel.read(1 << 16), b""))


@pytest.fixture
def pair() -> Iterator[tuple[Channel, socket.socket]]:
    """A channel and the other side of it."""
    ours, theirs = socket.socketpair()
    both = ours.detach()
    with theirs:
        channel = Channel(both, both, peer="there", patience=HANG)
        try:
            yield channel, theirs
        finally:
            channel.abort()
            channel.__exit__(Ended, None, None)


def test_bytes_go_both_ways_at_once() -> None:
    sent = os.urandom(20 * MiB)
    with program("cat") as channel, ThreadPoolExecutor(1) as writer:

        def write() -> None:
            channel.write(memoryview(sent))
            channel.finish_writing()

        written = writer.submit(write)
        assert everything(channel) == sent
        written.result()
        assert (channel.bytes_written, channel.bytes_read) == (len(sent), len(sent))


def test_a_read_gives_what_is_there(pair: tuple[Channel, socket.socket]) -> None:
    channel, other = pair
    other.sendall(b"abc")
    assert channel.read(2) == b"ab"
    assert channel.read(1000) == b"c"
    other.shutdown(socket.SHUT_WR)
    assert channel.read(1000) == b""


@pytest.mark.parametrize("data", [b"abcd", bytearray(b"abcd"), memoryview(b"abcd"), memoryview(b"abcd").cast("H")])
def test_any_buffer_is_written(pair: tuple[Channel, socket.socket], data: bytes) -> None:
    channel, other = pair
    channel.write(data)
    assert other.recv(10) == b"abcd"


def test_little_is_held_between_the_ends() -> None:
    channel = program("sleep", "1000", patience=0.3)
    with pytest.raises(Unavailable, match=r"nothing was taken by it for 0\.3 seconds"):
        channel.write(bytes(64 * MiB))
    assert channel.bytes_written <= PIPE_SIZE
    channel.abort()
    with pytest.raises(Unavailable, match="ended here"):
        channel.close()
    wait_until(lambda: gone(channel.pid))


def test_patience_ends_a_silent_read(pair: tuple[Channel, socket.socket]) -> None:
    channel, _ = pair
    start = time.monotonic()
    with pytest.raises(Unavailable, match=r"there: nothing came from it for 0\.2 seconds") as caught:
        channel.read(1, patience=0.2)
    assert time.monotonic() - start >= 0.2
    assert "run it again" in (caught.value.hint or "")


def test_patience_is_for_each_byte_and_not_for_all(pair: tuple[Channel, socket.socket]) -> None:
    channel, other = pair

    def trickle() -> None:
        for _ in range(5):
            time.sleep(0.5)
            other.sendall(b"x")

    with ThreadPoolExecutor(1) as writer:
        writer.submit(trickle)
        assert b"".join(channel.read(10, patience=2) for _ in range(5)) == b"xxxxx", "2.5 seconds, never 2 at once"


@pytest.mark.parametrize("doing", ["read", "write"])
def test_abort_from_another_thread_ends_a_wait(pair: tuple[Channel, socket.socket], doing: str) -> None:
    channel, _ = pair
    with ThreadPoolExecutor(1) as other:
        busy = other.submit(channel.read, 1) if doing == "read" else other.submit(channel.write, bytes(64 * MiB))
        time.sleep(0.1)  # so that it is most likely in the middle of its wait
        channel.abort()
        with pytest.raises(Unavailable, match="ended here"):
            busy.result(HANG)
    with pytest.raises(Unavailable, match="ended here"):
        channel.read(1)


def test_the_other_side_has_gone(pair: tuple[Channel, socket.socket]) -> None:
    channel, other = pair
    other.close()
    with pytest.raises(Unavailable, match="closed by the other side"):
        channel.write(bytes(MiB))


def test_descriptors_are_closed_and_left_as_they_were() -> None:
    before = descriptors()
    reader, writer = os.pipe()
    kept = os.dup(writer)
    with Channel(reader, writer, peer="there") as channel:
        channel.write(b"abc")
        assert not os.get_blocking(kept)
        assert channel.read(3) == b"abc"
    assert os.get_blocking(kept)
    os.close(kept)
    channel.abort()  # also afterwards, and for nothing
    channel.close()
    with program("cat") as other:
        other.write(b"x")
    other.close()
    wait_until(lambda: descriptors() == before)


def test_a_good_end() -> None:
    with program("sh", "-c", "cat >/dev/null; echo done") as channel:
        channel.write(b"x")
        channel.finish_writing()
        assert everything(channel) == b"done\n"


def test_close_waits_for_what_the_program_still_does(tmp_path: Path) -> None:
    script = f"cat >/dev/null; head -c 3000000 /dev/zero; sleep 0.3; echo x > {tmp_path}/done"
    with program("sh", "-c", script) as channel:
        channel.write(b"x")
    assert (tmp_path / "done").exists()


def test_a_bad_end_is_told_to_whoever_reads_writes_or_closes() -> None:
    def fail() -> ProcessChannel:
        return program("sh", "-c", "echo it broke >&2; exit 3")

    with pytest.raises(ToolFailed, match="3: it broke"):
        fail().read(1)
    with pytest.raises(ToolFailed, match="3: it broke"):
        fail().write(bytes(8 * MiB))
    with pytest.raises(ToolFailed, match="3: it broke"):
        fail().close()


def test_what_was_said_before_a_bad_end_can_be_read() -> None:
    channel = program("sh", "-c", "echo last words; exit 3")
    assert channel.read(100) == b"last words\n"
    with pytest.raises(ToolFailed, match=r"^3: "):
        channel.read(100)
    channel.abort()


def test_death_by_signal() -> None:
    with pytest.raises(ToolFailed, match="-9: "):
        program("sh", "-c", "kill -KILL $$").read(1)


def test_a_program_that_does_not_end_is_ended() -> None:
    channel = program("sh", "-c", "trap '' TERM; exec >&-; sleep 1000 & wait; wait")
    with pytest.raises(Unavailable, match=r"did not end within 0\.3 seconds"):
        channel.close(patience=0.3)
    wait_until(lambda: gone(channel.pid))


def test_stderr_is_bounded_and_its_end_is_kept() -> None:
    with pytest.raises(ToolFailed, match=r"^1: y") as caught:
        program("sh", "-c", "yes | head -c 300000 >&2; echo the end >&2; exit 1").read(1)
    assert len(caught.value.stderr) == 64 << 10
    assert caught.value.stderr.endswith("the end\n")


def test_a_stderr_that_somebody_else_keeps_open_holds_up_nothing() -> None:
    with program("sh", "-c", "sleep 1000 >/dev/null </dev/null & echo $!") as channel:
        sleeper = int(everything(channel))
    os.kill(sleeper, signal.SIGKILL)


def test_a_missing_program() -> None:
    with pytest.raises(ToolFailed, match="not installed"):
        program("no-such-program")


def test_no_descriptor_leaks_into_the_child(tmp_path: Path) -> None:
    with (tmp_path / "open").open("w") as file:
        os.set_inheritable(file.fileno(), True)
        listed = everything(program("ls", "-l", "/proc/self/fd")).decode()
    assert str(tmp_path / "open") not in listed
    assert listed.count("pipe:") == 3


def test_the_thread_that_opened_it_may_end() -> None:
    """The kernel kills a child when the thread that forked it ends, so that must not be just any thread."""
    with ThreadPoolExecutor(1) as opener:
        channel = opener.submit(program, "cat").result()
    with channel:
        channel.write(b"abc")
        assert channel.read(3) == b"abc"


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGKILL])
def test_the_child_dies_with_us(sent: signal.Signals) -> None:
    script = textwrap.dedent("""
        import os, time
        from snapchain.host.process_channel import ProcessChannel
        channel = ProcessChannel(["sleep", "1000"], peer="", diagnose=None, env=dict(os.environ))
        print(channel.pid, flush=True)
        time.sleep(1000)
    """)
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        assert not gone(child)
        parent.send_signal(sent)
    wait_until(lambda: gone(child))


def test_a_program_that_is_left_open_does_not_keep_python_from_ending() -> None:
    script = textwrap.dedent("""
        import os
        from snapchain.host.process_channel import ProcessChannel
        channel = ProcessChannel(["sleep", "1000"], peer="", diagnose=None, env=dict(os.environ))
    """)
    subprocess.run([sys.executable, "-c", script], check=True, timeout=HANG)


def test_many_at_once() -> None:
    sent = os.urandom(MiB)

    def through_cat(_: int) -> bool:
        with program("cat") as channel:

            def write() -> None:
                channel.write(sent)
                channel.finish_writing()

            threading.Thread(target=write).start()
            return everything(channel) == sent

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(through_cat, range(24)))


def test_a_buffer_is_filled_from_many_small_writes(pair: tuple[Channel, socket.socket]) -> None:
    channel, other = pair
    sent = os.urandom(300_000)

    def trickle() -> None:
        for start in range(0, len(sent), 7000):
            other.sendall(sent[start : start + 7000])
        other.shutdown(socket.SHUT_WR)

    with ThreadPoolExecutor(1) as writer:
        writer.submit(trickle)
        got = bytearray()
        for size in (1, 24, 100_000, 3, 199_900, 1000):
            buffer = memoryview(bytearray(size))
            count = channel.read_into(buffer)
            got += buffer[:count]
            assert count == size or len(got) == len(sent)
    assert got == sent
    assert channel.read_into(memoryview(bytearray(1))) == 0


def test_buffers_go_one_behind_the_other(pair: tuple[Channel, socket.socket]) -> None:
    channel, other = pair
    channel.write([b"ab", b"", bytearray(b"c"), memoryview(b"de").cast("H")])
    assert other.recv(10) == b"abcde"
    channel.finish_writing()
    assert other.recv(10) == b""
    other.sendall(b"x")
    assert channel.read(1) == b"x"
    with pytest.raises(Unavailable, match="closed for writing"):
        channel.write(b"x")


def test_files_will_do(tmp_path: Path) -> None:
    path = tmp_path / "saved"
    with Channel(-1, os.open(path, os.O_WRONLY | os.O_CREAT), peer="a file") as channel:
        channel.write([bytes(MiB), b"end"])
        with pytest.raises(Unavailable, match="closed for reading"):
            channel.read(1)
    with Channel(os.open(path, os.O_RDONLY), -1, peer="a file") as channel:
        assert everything(channel) == bytes(MiB) + b"end"
