"""A server on a socket: clients that follow the protocol, clients that do not, and what is left of both."""

from __future__ import annotations

import gc
import os
import random
import socket
import stat
import struct
import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from snapchain.errors import Busy, Conflict, InvalidInput
from snapchain.guest.nbd_client import ALLOCATION, NbdExport
from snapchain.nbd.channel import PlainChannel
from snapchain.nbd.connection import Client as NbdClient, _Transmission
from snapchain.nbd.handshake import Handshake
from snapchain.nbd.listening import default_socket, parse_place, tcp_listener, tcp_uri, unix_listener, unix_uri
from snapchain.nbd.reading import FileReading
from tests.nbd.serving import Client, KiB, Loaders, MadeDisk, MiB, ReadFailed, Served, reading_of, served, threads
from tests.waiting import wait_until

NAME = "web1/vda"


@pytest.fixture
def disk() -> MadeDisk:
    return MadeDisk(40, bad={33})


@pytest.fixture
def server(disk: MadeDisk, loaders: Loaders, tmp_path: Path) -> Iterator[Served]:
    with served(tmp_path / "s", {NAME: reading_of(disk, loaders(disk))}) as found:
        yield found


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208


def test_a_read_is_answered_at_once_and_after_waiting(server: Served, disk: MadeDisk) -> None:
    with Client(server.path).go(NAME) as client:
        for _ in range(2):
            assert client.read(0, 200 * KiB) == disk.content[: 200 * KiB]
            assert client.read(5, 3) == b"\1\1\1"
        assert client.read(0, 33 * disk.unit) == disk.content[: 33 * disk.unit], "more than a portion"


def test_simple_replies_for_a_client_that_wants_them(server: Served, disk: MadeDisk) -> None:
    with Client(server.path).go(NAME, structured=False) as client:
        for _ in range(2):
            client.request(0, 1000, 70 * KiB, cookie=9)
            assert client.simple() == (0, 9)
            assert client.take(70 * KiB) == disk.content[1000 : 1000 + 70 * KiB]
        client.request(0, 0, 32 * disk.unit, cookie=10)
        assert client.simple() == (0, 10)
        assert client.take(32 * disk.unit) == disk.content[: 32 * disk.unit]
        client.request(0, 33 * disk.unit, 1, cookie=11)
        assert client.simple() == (5, 11)
        client.request(7, 0, 512, cookie=12)
        assert client.simple() == (22, 12)
        client.request(0, 0, disk.size, cookie=13)  # its error comes after a portion of it
        assert client.simple() == (0, 13)
        assert len(client.take(disk.size)) < disk.size, "better no end than a wrong one"


def test_data_in_one_chunk_on_request(server: Served, disk: MadeDisk) -> None:
    with Client(server.path).go(NAME) as client:
        for _ in range(2):
            client.request(0, 100, 300 * KiB, flags=4)
            ((kind, _, data),) = client.chunks()
            assert (kind, data[8:]) == (1, disk.content[100 : 100 + 300 * KiB])
        client.request(0, 0, 2 * MiB, flags=4)
        ((kind, _, data),) = client.chunks()
        assert (kind, data[:4]) == (0x8001, struct.pack(">I", 75)), "EOVERFLOW"
        with pytest.raises(ReadFailed, match="error 5") as failed:
            client.read(32 * disk.unit, 2 * disk.unit, flags=4)
        assert (failed.value.error, failed.value.before) == (5, b"")


def test_an_unreadable_range_is_an_error_and_no_zeroes(server: Served, disk: MadeDisk) -> None:
    bad = 33 * disk.unit
    with Client(server.path).go(NAME) as client:
        with pytest.raises(ReadFailed, match="error 5") as failed:
            client.read(bad - 10, 20)
        assert (failed.value.error, failed.value.before) == (5, disk.content[bad - 10 : bad])
        assert client.read(bad - 10, 10) == disk.content[bad - 10 : bad]
        assert client.read(bad + disk.unit, 10) == disk.content[bad + disk.unit :][:10]
    name, offset, length, error = server.faults[0]
    assert (name, offset, length) == (NAME, bad, 10)
    assert "blob 33: damaged" in str(error)


def test_nothing_can_be_written(server: Served, disk: MadeDisk) -> None:
    with Client(server.path).go(NAME) as client:
        for command, data in ((1, 300 * KiB), (4, 0), (6, 0), (8, 0)):
            client.request(command, 0, data or 512, cookie=command, flags=1)
            client.send(bytes(data))
            ((kind, cookie, body),) = client.chunks()
            assert (kind, cookie, body[:4]) == (0x8001, command, struct.pack(">I", 1))
        assert client.read(0, 512) == disk.content[:512]
        client.request(1, 0, 1000)  # the data in the same call as what follows
        client.send(bytes(1000) + struct.pack(">IHHQQI", 0x25609513, 0, 0, 2, 0, 4))
        assert client.chunks()[0][1] == 1
        assert client.chunks()[0][2][8:] == disk.content[:4]


def test_flush_and_cache_are_answered_and_bad_requests_too(server: Served, disk: MadeDisk) -> None:
    with Client(server.path).go(NAME, contexts=False) as client:
        for command, offset, length, flags in ((3, 0, 0, 0), (3, 0, 0, 1), (5, 0, disk.size, 0)):
            client.request(command, offset, length, flags=flags)
            assert client.chunks() == [(0, 1, b"")]
        for command, offset, length, flags in (
            (0, disk.size, 1, 0), (0, disk.size - 1, 2, 0), (0, 2**64 - 1, 2, 0), (0, 0, 0, 0), (0, 0, 33 * MiB, 0),
            (0, 0, 1, 64), (7, 0, 512, 0), (99, 0, 512, 0), (5, 0, disk.size + 1, 0),
        ):  # fmt: skip
            client.request(command, offset, length, flags=flags)
            ((kind, _, data),) = client.chunks()
            assert (kind, data[:4]) == (0x8001, struct.pack(">I", 22))


def test_many_requests_at_once_are_all_answered(server: Served, disk: MadeDisk) -> None:
    """Those that wait and those that do not, as fast as the client can ask."""
    chosen = random.Random(7)
    wanted = {cookie: chosen.randrange(0, 33 * disk.unit - 4096) for cookie in range(500)}

    def ask() -> None:
        for cookie, offset in wanted.items():
            client.request(0, offset, 4096, cookie=cookie)

    with Client(server.path).go(NAME) as client, ThreadPoolExecutor(1) as pool:
        client.read(0, 64 * KiB)
        pool.submit(ask)
        found: dict[int, bytes] = {}
        while len(found) < len(wanted):
            parts = client.chunks()
            found[parts[0][1]] = b"".join(data[8:] for _, _, data in parts)
    assert found == {cookie: disk.content[offset : offset + 4096] for cookie, offset in wanted.items()}
    wait_until(lambda: server.server.tally.requests == 501)


def test_our_own_client_reads_it_with_its_map(server: Served, disk: MadeDisk) -> None:
    with NbdExport(server.path, NAME) as export:
        starts, flags = export.runs(ALLOCATION)
        assert (starts.tolist(), flags.tolist(), export.size) == ([0], [0], disk.size)
        buffer = bytearray(33 * disk.unit)
        export.read_into(0, memoryview(buffer))
        assert buffer == disk.content[: len(buffer)]


def test_the_only_export_has_the_empty_name_too(server: Served) -> None:
    with Client(server.path).go("") as client:
        assert client.read(0, 1) == b"\1"


@pytest.mark.parametrize(
    "data",
    [
        b"\0\0\0\4",  # flags that nobody offered
        b"\0\0\0\3" + b"IHAVEOPX" + bytes(8),
        b"\0\0\0\3" + b"IHAVEOPT" + struct.pack(">II", 7, 1 << 31),
        b"\0\0\0\3" + b"IHAVEOPT" + struct.pack(">II", 7, (64 << 10) + 1),
        b"\0\0\0\3" + b"IHAVEOPT" + struct.pack(">II", 1, 4) + b"none",
        b"\0\0\0\3" + b"IHAVEOPT" + struct.pack(">II", 2, 0),
        b"\0\0\0\0" + b"IHAVEOPT" + struct.pack(">II", 3, 0),
        b"\0\0\0\3" + (b"IHAVEOPT" + struct.pack(">II", 99, 0)) * 1001,
        b"GET / HTTP/1.0\r\n\r\n",
    ],
)
def test_who_does_not_negotiate_is_disconnected(server: Served, data: bytes) -> None:
    with Client(server.path) as client:
        client.take(18)
        with suppress(BrokenPipeError, ConnectionResetError):
            client.send(data)
            while client.socket.recv(1 << 16):
                pass
    with Client(server.path).go(NAME) as other:
        assert other.read(0, 1) == b"\1"


@pytest.mark.parametrize("data", [bytes(28), struct.pack(">IHHQQI", 0x25609513, 0, 1, 1, 0, (32 << 20) + 1)])
def test_who_breaks_the_requests_is_disconnected_with_a_note(server: Served, data: bytes) -> None:
    with Client(server.path).go(NAME) as client:
        client.send(data)
        assert client.is_hung_up()
    wait_until(lambda: server.notes)
    assert "a client was disconnected" in server.notes[0]


def _conversation() -> bytes:
    """All that a client says that negotiates, reads, asks for the map, tries to write, and leaves."""
    name = NAME.encode()
    named = struct.pack(">I", len(name)) + name
    query = struct.pack(">II", 1, 15) + b"base:allocation"

    def option(number: int, data: bytes = b"") -> bytes:
        return b"IHAVEOPT" + struct.pack(">II", number, len(data)) + data

    def request(command: int, length: int) -> bytes:
        return struct.pack(">IHHQQI", 0x25609513, 0, command, 1, 0, length)

    talk = option(8) + option(3) + option(10, named + query) + option(7, named + b"\0\1\0\3")
    return b"\0\0\0\3" + talk + request(0, 4096) + request(7, 65536) + request(1, 5) + b"write" + request(2, 0)


def test_a_client_may_hang_up_after_each_byte(server: Served) -> None:
    talk = _conversation()
    before = descriptors()
    for stop in range(len(talk) + 1):
        with Client(server.path) as client:
            client.send(talk[:stop])
            if stop % 3 == 0:  # with bytes that nobody takes
                client.socket.shutdown(socket.SHUT_WR)
    wait_until(lambda: not server.server.connected)
    wait_until(lambda: descriptors() <= before)
    with Client(server.path) as client:
        client.send(talk)
        client.socket.shutdown(socket.SHUT_WR)
        said = b""
        while more := client.socket.recv(1 << 16):
            said += more
    assert b"\1" * 4096 in said, "the whole talk is one that works"


def test_mutated_clients_harm_nobody(server: Served, disk: MadeDisk) -> None:
    """Bytes that are changed, left out and repeated; another client reads on all the while."""
    talk, chosen = _conversation(), random.Random(15)
    stop = threading.Event()

    def read_on() -> int:
        count = 0
        with Client(server.path).go(NAME) as client:
            while not stop.is_set() or not count:
                offset = count * 4096 % (33 * disk.unit)
                assert client.read(offset, 4096) == disk.content[offset : offset + 4096]
                count += 1
        return count

    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(read_on)
        for _ in range(300):
            data = bytearray(talk)
            for _ in range(chosen.randrange(1, 5)):
                place = chosen.randrange(len(data))
                match chosen.randrange(3):
                    case 0:
                        data[place] ^= 1 << chosen.randrange(8)
                    case 1:
                        del data[place : place + chosen.randrange(1, 9)]
                    case _:
                        data[place:place] = chosen.randbytes(chosen.randrange(1, 9))
            with Client(server.path) as client, suppress(BrokenPipeError, ConnectionResetError):
                client.send(bytes(data))
                client.socket.shutdown(socket.SHUT_WR)
                while client.socket.recv(1 << 16):
                    pass
        stop.set()
        assert other.result()
    wait_until(lambda: not server.server.connected)
    assert all(name == "nbd accept" or name.startswith("nbd fetch") for name in threads())
    server.faults.clear()  # the errors hold on to the frames that they came through
    wait_until(lambda: not _left_of_clients())


def _left_of_clients() -> list[object]:
    gc.collect()
    return [each for each in gc.get_objects() if isinstance(each, (_Transmission, Handshake, PlainChannel, NbdClient))]


_EDGES = (0, 1, 511, 4096, 33 * 64 * KiB - 1, 40 * 64 * KiB, 32 * MiB, 32 * MiB + 1, (1 << 32) - 1)


@given(
    st.lists(
        st.tuples(
            st.sampled_from([0, 2, 3, 4, 5, 6, 7, 8, 9, 0xFFFF]),
            st.sampled_from([0, 1, 2, 4, 8, 12, 16, 0x8000, 0xFFFF]),
            st.one_of(st.sampled_from([*_EDGES, 1 << 63, (1 << 64) - 1]), st.integers(0, 41 * 64 * KiB)),
            st.one_of(st.sampled_from(_EDGES), st.integers(0, 100 * KiB)),
        ),
        max_size=12,
    ),
    st.booleans(),
    st.booleans(),
)
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_any_requests_are_answered_with_what_the_disk_has(
    server: Served, disk: MadeDisk, requests: list[tuple[int, int, int, int]], structured: bool, contexts: bool
) -> None:
    """Each has one reply with its cookie; what was read is what the disk has, whatever was asked beside it."""
    disk.bad.clear()
    left: dict[int, tuple[int, int, int]] = {}
    with Client(server.path).go(NAME, structured=structured, contexts=contexts) as client:
        for cookie, (command, flags, offset, length) in enumerate(requests):
            client.request(command, offset, length, cookie=cookie, flags=flags)
            if command == 2:
                break
            left[cookie] = (command, offset, length)
        if 2 not in {command for command, *_ in requests}:
            client.request(2)
        while left:
            if structured:
                chunks = client.chunks()
                assert len({cookie for _, cookie, _ in chunks}) == 1
                command, offset, length = left.pop(chunks[0][1])
                if command != 0 or any(kind & 0x8000 for kind, *_ in chunks):
                    continue
                body = b"".join(data[8:] for kind, _, data in chunks if kind == 1)
            else:
                error, cookie = client.simple()
                command, offset, length = left.pop(cookie)
                if command != 0 or error:
                    continue
                body = client.take(length)
            assert body == disk.content[offset : offset + length]
        assert client.is_hung_up()
    assert not server.notes


def _has_refused(server: Served, count: int) -> bool:
    return server.server.refused == count


def test_a_thousand_clients_come_and_go(disk: MadeDisk, loaders: Loaders, tmp_path: Path) -> None:
    """More than are let in: those that are, are served on, and when they have gone others are."""
    before = descriptors()
    with served(tmp_path / "s", {NAME: reading_of(disk, loaders(disk))}, most_clients=50) as server:
        with Client(server.path).go(NAME) as served_on:
            crowd = []
            for turn in range(1, 11):
                for _ in range(100):
                    client = socket.socket(socket.AF_UNIX)
                    client.connect(str(server.path))
                    crowd.append(client)
                assert served_on.read(0, 4096) == disk.content[:4096]
                wait_until(partial(_has_refused, server, 51 * turn))
                assert server.server.connected == 50
                for client in crowd:
                    client.close()
                crowd.clear()
                wait_until(lambda: server.server.connected == 1)
        wait_until(lambda: not server.server.connected)
        with Client(server.path).go(NAME) as late:
            assert late.read(0, 1) == b"\1"
    wait_until(lambda: descriptors() <= before + 1)  # the directory of the process itself


def test_a_client_that_takes_nothing_stops_only_itself(server: Served, disk: MadeDisk) -> None:
    with Client(server.path).go(NAME) as lazy, Client(server.path).go(NAME) as other:
        for cookie in range(60):
            lazy.request(0, 0, 2 * MiB, cookie=cookie)
        for _ in range(3):
            assert other.read(0, 2 * MiB) == disk.content[: 2 * MiB]


def test_an_end_disconnects_all_and_leaves_nothing(disk: MadeDisk, loaders: Loaders, tmp_path: Path) -> None:
    path = tmp_path / "s"
    loader = loaders(disk)
    with served(path, {NAME: reading_of(disk, loader)}) as server:
        clients = [Client(path).go(NAME), Client(path)]
        clients[0].request(0, 0, 2 * MiB)  # and takes nothing
        clients[1].take(18)
        wait_until(lambda: server.server.connected == 2)
    assert not path.exists()
    for client in clients:
        with client, suppress(ConnectionResetError):
            while client.socket.recv(1 << 20):
                pass
    wait_until(lambda: not threads())


def test_a_fault_of_the_program_ends_one_client(server: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """And is no error reply that hides it, nor the end of the others."""
    noted: list[object] = []
    monkeypatch.setattr(threading, "excepthook", noted.append)

    def broken(*_: object, **__: object) -> bytes:
        raise ZeroDivisionError

    monkeypatch.setattr("snapchain.nbd.connection.status_chunk", broken)
    with Client(server.path).go(NAME) as client:
        client.request(7, 0, 512)
        assert client.is_hung_up()
    wait_until(lambda: noted)
    with Client(server.path).go(NAME) as client:
        assert client.read(0, 1) == b"\1"


# --- Where it listens


def test_the_socket_is_for_this_user_alone_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        with unix_listener(tmp_path / "s"):
            status = (tmp_path / "s").stat()
    finally:
        os.umask(before)
    assert stat.S_ISSOCK(status.st_mode)
    assert stat.S_IMODE(status.st_mode) == 0o600
    assert list(tmp_path.iterdir()) == []


def test_a_socket_in_use_is_kept_and_a_stale_one_replaced(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with unix_listener(path):
        with pytest.raises(Busy, match="another server"), unix_listener(path):
            pass
        path.rename(tmp_path / "t")
    with unix_listener(path):
        pass
    stale = socket.socket(socket.AF_UNIX)
    stale.bind(str(path))
    stale.close()
    with unix_listener(path):
        pass
    path.write_text("a file")
    with pytest.raises(Conflict, match="no socket"), unix_listener(path):
        pass
    with pytest.raises(InvalidInput, match="at most"), unix_listener(tmp_path / ("a" * 100)):
        pass


def test_a_socket_that_was_replaced_is_not_removed(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with unix_listener(path):
        path.unlink()
        path.write_text("of somebody else")
    assert path.read_text() == "of somebody else"


def test_the_default_path_is_private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    path = default_socket()
    assert path == tmp_path / "snapchain" / f"serve-{os.getpid()}.sock"
    with unix_listener(path):
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("127.0.0.1", ("127.0.0.1", 10809)),
        ("localhost:0", ("localhost", 0)),
        ("[::1]:10810", ("::1", 10810)),
        ("[::1]", ("::1", 10809)),
        ("::1", ("::1", 10809)),
    ],
)
def test_an_address_to_listen_on(text: str, place: tuple[str, int]) -> None:
    assert parse_place(text) == place


@pytest.mark.parametrize("text", ["", ":10809", "host:x", "host:99999", "[::1]x", "[::1", "host:-1", "host:1.5"])
def test_no_address_to_listen_on(text: str) -> None:
    with pytest.raises(InvalidInput, match="not an address"):
        parse_place(text)


def test_without_tls_only_this_host_is_served() -> None:
    for host in ("0.0.0.0", "::"):
        with pytest.raises(InvalidInput, match="without TLS"), tcp_listener(host, 0, has_tls=False):
            pass
    with tcp_listener("127.0.0.1", 0, has_tls=False) as listening:
        port = listening.getsockname()[1]
        with (
            pytest.raises(Busy, match=f"127.0.0.1:{port}: another program listens"),
            tcp_listener("127.0.0.1", port, has_tls=False),
        ):
            pass


def test_uris_are_those_of_qemu_and_libnbd() -> None:
    assert unix_uri(Path("/run/a b.sock"), "web1/vda@7") == "nbd+unix:///web1/vda%407?socket=/run/a%20b.sock"
    assert tcp_uri("::1", 10809, "a", tls=False) == "nbd://[::1]/a"
    assert tcp_uri("host", 99, "a", tls=True) == "nbds://host:99/a"


def test_a_uri_reaches_its_export(disk: MadeDisk, tmp_path: Path) -> None:
    """By libnbd and by QEMU, with a name that has to be quoted."""
    disk.bad.clear()
    content = tmp_path / "content"
    content.write_bytes(disk.content)
    name = "web1/v d@7?x#ä"
    with served(tmp_path / "s o", {name: FileReading(disk), "other": FileReading(MadeDisk(1))}):
        uri = unix_uri(tmp_path / "s o", name)
        subprocess.run(["nbdcopy", uri, tmp_path / "copy"], check=True)
        assert (tmp_path / "copy").read_bytes() == disk.content
        subprocess.run(["qemu-img", "compare", "-q", "-f", "raw", "-F", "raw", uri, content], check=True)
