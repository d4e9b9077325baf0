"""A replica on another host: real ssh, the real command over there, links as they are."""

from __future__ import annotations

import json
import os
import random
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from snapchain.errors import Corrupt, SnapchainError, ToolFailed, Unavailable
from snapchain.host.retry import RetryPolicy
from snapchain.host.ssh import RemoteAddress, SshProgram
from snapchain.ops import receive as serve_replica
from snapchain.ops.ship.run import ShipReport, ShipRequest
from snapchain.replica.endpoint import SshEndpoint
from tests.net.namespaces import Cable
from tests.net.sshd import SshHost
from tests.ops.stacks import Layer, build, flat, write
from tests.replica.conftest import DISK, Place, send
from tests.replica.sending import send_persistently
from tests.replica.test_resume import arrived
from tests.waiting import HANG, gone, kill_process, taken, wait_until

MiB = 1 << 20
SIZE = 64 * MiB


def remote() -> str:
    """snapchain as the shell over there runs it: this tree's."""
    path = ":".join(filter(None, sys.path))
    return f"env PYTHONPATH={shlex.quote(path)} {shlex.quote(sys.executable)} -m snapchain"


def endpoint(host: SshHost, place: Place, *, connections: int = 1) -> SshEndpoint:
    address = RemoteAddress(host.alias, str(place.root))
    return SshEndpoint(address, connections=connections, program=SshProgram(host.ssh, remote()))


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path / "a replica's; $(place)")


@pytest.fixture(scope="module")
def noisy(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Path], list[Path]]:
    """A root of 24 MiB that do not compress, an overlay of 4, and what each shows."""
    directory = tmp_path_factory.mktemp("noisy")
    paths = build(directory / "c", [Layer(SIZE), Layer(SIZE)])
    draw = random.Random(11)
    for path, size in zip(paths, (24, 4), strict=True):
        noise = directory / "noise"
        noise.write_bytes(draw.randbytes(size * MiB))
        write(path, f"write -s {noise} 1M {size}M")
    return paths, [flat(path, path.with_suffix(".flat")) for path in paths]


@pytest.mark.parametrize("connections", [1, 3])
def test_a_chain_arrives(there: SshHost, place: Place, noisy: tuple[list[Path], list[Path]], connections: int) -> None:
    paths, shown = noisy
    to = endpoint(there, place, connections=connections)
    first = send(paths[0], to, DISK)
    place.check(shown[0])
    second = send(paths[1], to, DISK)
    place.check(shown[1])
    assert (first.layers_sent, second.layers_sent) == (1, 1)
    assert first.bytes_sent > 24 * MiB
    assert 4 * MiB < second.bytes_sent < 4.1 * MiB
    assert first.destination == f"ssh://there{place.root}"


def command(host: SshHost, image: Path, place: Place, *options: str) -> subprocess.Popen[str]:
    argv = [sys.executable, "-m", "snapchain", "send", str(image), f"ssh://there{place.root}::{DISK}", *options]
    environment = {**os.environ, "SNAPCHAIN_SSH": shlex.join(host.ssh), "SNAPCHAIN_REMOTE": remote()}
    return subprocess.Popen(argv, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_on_the_command_line(there: SshHost, place: Place, noisy: tuple[list[Path], list[Path]]) -> None:
    with command(there, noisy[0][1], place, "--json") as sender:
        out, err = sender.communicate()
    assert sender.returncode == 0, err
    assert json.loads(out)["point"] == 1
    place.check(noisy[1][1])


def test_after_a_lost_connection_it_goes_on_by_itself(
    there: SshHost, place: Place, noisy: tuple[list[Path], list[Path]]
) -> None:
    known = set(there.sessions())
    with command(there, noisy[0][1], place, "--limit-rate", "5M", "--json") as sender:
        wait_until(lambda: arrived(place) > 8 * MiB)
        for session in set(there.sessions()) - known:
            kill_process(session)
        out, err = sender.communicate()
    assert sender.returncode == 0, err
    assert "the connection was lost: Connection to 127.0.0.1 closed by remote host; trying again in" in err
    assert json.loads(out)["point"] == 1
    place.check(noisy[1][1])


def test_nothing_to_send(there: SshHost, place: Place, noisy: tuple[list[Path], list[Path]]) -> None:
    send(noisy[0][1], endpoint(there, place), DISK)
    again = send(noisy[0][1], endpoint(there, place), DISK)
    assert again.layers_sent == 0
    assert again.bytes_sent < 10_000


def test_a_host_without_snapchain(there: SshHost, place: Place, noisy: tuple[list[Path], list[Path]]) -> None:
    program = SshProgram(there.ssh, "no-such-snapchain")
    to = SshEndpoint(RemoteAddress("there", str(place.root)), program=program)
    with pytest.raises(ToolFailed, match="not installed there"):
        send(noisy[0][0], to, DISK)


def test_an_error_over_there_is_the_error_here(
    there: SshHost, place: Place, noisy: tuple[list[Path], list[Path]]
) -> None:
    place.root.write_text("a file")
    with pytest.raises(Corrupt, match=r"there.*: not a directory") as caught:
        send(noisy[0][0], endpoint(there, place), DISK)
    assert "there" in str(caught.value)
    assert not isinstance(caught.value, ToolFailed), "it came by ssh's exit status, and not by the stream"


def cut_off(host: SshHost, begin: Callable[[], ShipReport], place: Place, cut: Callable[[list[int]], None]) -> None:
    """Begin a transfer, cut it when some of it is there, and see it fail."""
    known = set(host.sessions())
    failed: list[BaseException] = []

    def run() -> None:
        try:
            begin()
        except BaseException as error:  # noqa: BLE001 - looked at below
            failed.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    wait_until(lambda: max(taken(place.root), default=0) > 8 * MiB)
    cut(sorted(set(host.sessions()) - known))
    thread.join(HANG)
    assert not thread.is_alive()
    assert failed
    assert isinstance(failed[0], Unavailable), failed


def test_a_connection_that_breaks_goes_on(
    there: SshHost, place: Place, noisy: tuple[list[Path], list[Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    from snapchain.replica import sender

    monkeypatch.setattr(sender, "MARK_BYTES", 2 * MiB)
    paths, shown = noisy
    to = endpoint(there, place)

    def kill(sessions: list[int]) -> None:
        for session in sessions:
            kill_process(session)

    cut_off(there, lambda: send(paths[1], to, DISK, limit_rate=8 * MiB), place, kill)
    again = retried(lambda: send(paths[1], to, DISK))
    assert again.resumed
    assert again.bytes_sent < 26 * MiB
    place.check(shown[1])


def retried(again: Callable[[], ShipReport]) -> ShipReport:
    """The process over there may hold the disk a moment longer than its session lives."""
    until = time.monotonic() + HANG
    while True:
        try:
            return again()
        except SnapchainError as error:
            if error.kind != "busy" or time.monotonic() > until:
                raise
            time.sleep(0.1)


def test_a_killed_sender_leaves_no_process_there(
    there: SshHost, place: Place, noisy: tuple[list[Path], list[Path]]
) -> None:
    script = f"""
from pathlib import Path
from snapchain.host.ssh import RemoteAddress
from snapchain.host.retry import RetryPolicy
from snapchain.host.ssh import SshProgram
from snapchain.ops.ship.run import ShipRequest
from tests.replica.sending import send_to_replica
from snapchain.replica.endpoint import SshEndpoint
to = SshEndpoint(RemoteAddress("there", {str(place.root)!r}), program=SshProgram({there.ssh!r}, {remote()!r}))
send_to_replica(ShipRequest(image=Path({str(noisy[0][1])!r}), disk="web1/vda", limit_rate=4 << 20), to)
"""
    known = set(there.sessions())
    with subprocess.Popen([sys.executable, "-c", script]) as sender:
        wait_until(lambda: max(taken(place.root), default=0) > MiB)
        sessions = set(there.sessions()) - known
        sender.send_signal(signal.SIGKILL)
    assert sessions
    wait_until(lambda: all(gone(pid) for pid in sessions))
    retried(lambda: send(noisy[0][1], endpoint(there, place), DISK))
    place.check(noisy[1][1])


def test_over_there_it_gives_up_before_the_sender_comes_again() -> None:
    from snapchain.host.ssh import ALIVE_COUNT, ALIVE_INTERVAL
    from snapchain.replica.stream.session import BEAT_SECONDS

    assert 3 * BEAT_SECONDS < serve_replica.PATIENCE < ALIVE_COUNT * ALIVE_INTERVAL + ALIVE_INTERVAL


@pytest.mark.root
def test_from_host_to_host_over_80_ms(
    far: tuple[SshHost, Cable], place: Place, noisy: tuple[list[Path], list[Path]]
) -> None:
    host, cable = far
    cable.set(delay=0.04, rate=100e6 / 8)
    send(noisy[0][1], endpoint(host, place), DISK)
    place.check(noisy[1][1])


@pytest.mark.root
@pytest.mark.soak
def test_a_link_that_is_cut_for_30_s(
    far: tuple[SshHost, Cable], place: Place, noisy: tuple[list[Path], list[Path]]
) -> None:
    """As the command sends: where TCP's next try is lost, too, the far side gives up, and a new connection goes on."""
    host, cable = far
    cable.set(delay=0.04, loss=0.01, rate=100e6 / 8)

    def scissors() -> None:
        time.sleep(4)
        with cable.cut():
            time.sleep(30)

    thread = threading.Thread(target=scissors)
    thread.start()
    request = ShipRequest(image=noisy[0][1], disk=DISK)
    send_persistently(request, endpoint(host, place), policy=RetryPolicy())
    thread.join()
    place.check(noisy[1][1])
