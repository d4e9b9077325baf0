"""The test hosts themselves: what rests on them proves nothing unless they are what they say."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from tests.net.namespaces import FAR6, NEAR6, Cable, Host, namespaces, sweep, two_hosts
from tests.net.sshd import SshHost, sshd
from tests.waiting import HANG, gone, wait_until

Hosts = tuple[Host, Host, Cable]
KiB, MiB = 1 << 10, 1 << 20


def test_a_command_runs_over_ssh(there: SshHost) -> None:
    assert there.run("echo", "$SSH_CONNECTION").stdout.split()[2:] == ["127.0.0.1", str(there.port)]


def test_bytes_go_both_ways_unchanged(there: SshHost) -> None:
    sent = os.urandom(3 * MiB)
    done = subprocess.run([*there.ssh, "there", "cat"], input=sent, capture_output=True, check=True)
    assert done.stdout == sent


def test_an_sshd_leaves_nothing_behind(tmp_path: Path) -> None:
    with sshd(tmp_path) as host:
        client = subprocess.Popen([*host.ssh, "there", "sleep 1000"], stdin=subprocess.DEVNULL)
        wait_until(lambda: "Starting session" in host.log)
        served = [host.server, *host.sessions()]
        assert len(served) == 2
    wait_until(lambda: all(gone(pid) for pid in served))
    assert client.wait(HANG) != 0


def test_an_sshd_dies_with_a_killed_test_run(tmp_path: Path) -> None:
    script = textwrap.dedent(f"""
        import time
        from pathlib import Path
        from tests.net.sshd import sshd
        with sshd(Path({str(tmp_path)!r})) as host:
            print(host.server, flush=True)
            time.sleep(1000)
    """)
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        server = int(run.stdout.readline())
        assert not gone(server)
        run.send_signal(signal.SIGKILL)
    wait_until(lambda: gone(server))


def echo_times(hosts: Hosts, count: int, *, wait: float = 20) -> list[float]:
    """Seconds that each of so many datagrams took there and back; those that took longer than `wait` are not in it."""
    near, far, _ = hosts
    with far.open_socket(socket.SOCK_DGRAM) as server, near.open_socket(socket.SOCK_DGRAM) as client:
        server.bind((far.address, 7))
        client.settimeout(wait)

        def echo() -> None:
            while True:
                word, sender = server.recvfrom(2048)
                if not word:
                    return
                server.sendto(word, sender)

        thread = threading.Thread(target=echo, daemon=True)
        thread.start()
        times = []
        for n in range(count):
            start = time.monotonic()
            client.sendto(b"%d" % n, (far.address, 7))
            try:
                client.recv(2048)
            except TimeoutError:
                continue
            times.append(time.monotonic() - start)
        with far.open_socket(socket.SOCK_DGRAM) as last:
            last.sendto(b"", (far.address, 7))
        thread.join(HANG)
    return times


def tcp_rate(hosts: Hosts, seconds: float) -> float:
    """Bytes a second that arrive over one TCP connection, from its first byte on."""
    near, far, _ = hosts
    got: list[float] = []
    with far.open_socket(socket.SOCK_STREAM) as server, near.open_socket(socket.SOCK_STREAM) as client:
        server.bind((far.address, 5001))
        server.listen()

        def drain() -> None:
            connection, _ = server.accept()
            with connection:
                start, total = 0.0, 0
                while piece := connection.recv(256 * KiB):
                    start = start or time.monotonic()
                    total += len(piece)
                got.append(total / (time.monotonic() - start))

        thread = threading.Thread(target=drain)
        thread.start()
        client.connect((far.address, 5001))
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            client.sendall(bytes(64 * KiB))
        client.close()
        thread.join(HANG)
    return got[0]


@pytest.mark.root
def test_hosts_have_addresses_of_their_own(hosts: Hosts) -> None:
    near, far, _ = hosts
    for host, own, other in ((near, NEAR6, far), (far, FAR6, near)):
        listed = subprocess.run([*host.inside, "ip", "-br", "address"], check=True, capture_output=True, text=True)
        assert host.address in listed.stdout
        assert own in listed.stdout
        assert f"{other.address}/" not in listed.stdout
    assert len(echo_times(hosts, 20)) == 20


@pytest.mark.root
def test_latency_is_what_was_asked_for(hosts: Hosts) -> None:
    hosts[2].set(delay=0.04)
    fastest = min(echo_times(hosts, 12))
    assert fastest > 0.079, "never earlier, and on a busy machine later"


@pytest.mark.root
def test_packets_are_lost_at_the_rate_asked_for(hosts: Hosts) -> None:
    near, far, cable = hosts
    cable.set(loss=0.01)
    count = 20_000
    with far.open_socket(socket.SOCK_DGRAM) as server, near.open_socket(socket.SOCK_DGRAM) as client:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 * MiB)
        server.bind((far.address, 9))
        server.setblocking(False)
        arrived = 0
        for sent in range(count + 100):  # the last ones only give those before them time
            if sent < count:
                client.sendto(b"x", (far.address, 9))
            if sent % 50 == 49:
                cable.set(loss=0.01)  # answered between packets: no queue gets so long that it drops any itself
                try:
                    while server.recv(16):
                        arrived += 1
                except BlockingIOError:
                    continue
    assert 0.005 < 1 - arrived / count < 0.02


@pytest.mark.root
def test_the_rate_is_what_was_asked_for(hosts: Hosts) -> None:
    """Never more; on a busy machine less."""
    hosts[2].set(rate=100e6 / 8, delay=0.002)
    assert 2e6 < tcp_rate(hosts, 2.0) < 12.6e6


@pytest.mark.root
def test_a_cut_cable_carries_nothing_and_heals(hosts: Hosts) -> None:
    with hosts[2].cut():
        assert echo_times(hosts, 2, wait=0.5) == []
    assert len(echo_times(hosts, 5)) == 5


@pytest.mark.root
def test_ssh_from_host_to_host(far: tuple[SshHost, Cable]) -> None:
    host, cable = far
    cable.set(delay=0.01)
    assert host.run("echo", "$SSH_CONNECTION").stdout.split()[0::2] == ["198.18.0.1", "198.18.0.2"]


@pytest.mark.root
def test_hosts_are_gone_afterwards() -> None:
    with two_hosts() as (near, far, _):
        sleeper = subprocess.Popen([*far.inside, "sleep", "1000"])
        assert {near.namespace, far.namespace} <= set(namespaces())
    assert not {near.namespace, far.namespace} & set(namespaces())
    assert sleeper.wait(HANG) == -signal.SIGKILL


@pytest.mark.root
def test_what_a_killed_test_run_left_is_swept_away(hosts: Hosts) -> None:
    script = textwrap.dedent("""
        import subprocess, time
        from tests.net.namespaces import two_hosts
        with two_hosts() as (near, far, _):
            sleeper = subprocess.Popen([*far.inside, "sleep", "1000"])
            print(near.namespace, far.namespace, sleeper.pid, flush=True)
            time.sleep(1000)
    """)
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        *left, sleeper = run.stdout.readline().split()
        sweep()
        assert set(left) <= set(namespaces()), "a living run's hosts were swept away"
        run.send_signal(signal.SIGKILL)
    assert set(left) <= set(namespaces())
    sweep()
    assert not set(left) & set(namespaces())
    wait_until(lambda: gone(int(sleeper)))
