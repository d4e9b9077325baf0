"""The connection of virsh that goes through us: all calls but the one that is never made."""

from __future__ import annotations

import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from snapchain.errors import Conflict
from snapchain.host.libvirt_rpc import CONFIRM, PERFORM, Carried, without_confirm

PROGRAM, PREPARE, CALL, REPLY = 0x20008086, 303, 0, 1


def message(procedure: int, *, kind: int = CALL, program: int = PROGRAM, body: bytes = b"") -> bytes:
    return struct.pack(">7I", 28 + len(body), program, 1, procedure, kind, 1, 0) + body


def fine() -> None:
    """Nothing stands in the way of Perform."""


@contextmanager
def carried(folder: Path, check: Callable[[], None] = fine) -> Iterator[tuple[socket.socket, socket.socket, Carried]]:
    """virsh's end, the daemon's, and what is between them."""
    with socket.socket(socket.AF_UNIX) as listening, socket.socket(socket.AF_UNIX) as virsh:
        listening.bind(str(folder / "daemon"))
        listening.listen()
        with without_confirm(folder / "ours", folder / "daemon", check) as between:
            virsh.connect(str(folder / "ours"))
            daemon, _ = listening.accept()
            with daemon:
                yield virsh, daemon, between


def received(end: socket.socket, length: int) -> bytes:
    return end.recv(length, socket.MSG_WAITALL)


def test_other_calls_and_all_answers_go_through(tmp_path: Path) -> None:
    with carried(tmp_path) as (virsh, daemon, _):
        calls = message(PREPARE, body=bytes(1 << 20)) + message(min(CONFIRM), program=1)
        answer = message(min(CONFIRM), kind=REPLY, body=b"x")
        for at in range(0, len(calls), 300_000):
            virsh.sendall(calls[at : at + 300_000])
        assert received(daemon, len(calls)) == calls
        daemon.sendall(answer)
        assert received(virsh, len(answer)) == answer


@pytest.mark.parametrize("procedure", sorted(CONFIRM))
def test_the_connection_ends_before_confirm(tmp_path: Path, procedure: int) -> None:
    with carried(tmp_path) as (virsh, daemon, _):
        first = message(PREPARE)
        virsh.sendall(first + message(procedure, body=b"the guest goes on here"))
        assert received(daemon, 1000) == first
        assert daemon.recv(1) == b""
        assert virsh.recv(1) == b""


@pytest.mark.parametrize("procedure", sorted(PERFORM))
def test_perform_waits_for_the_last_check(tmp_path: Path, procedure: int) -> None:
    seen: list[bytes] = []

    def check() -> None:
        seen.append(b"checked")
        if len(seen) > 1:
            raise Conflict("a snapshot was taken", subject="web1")

    with carried(tmp_path, check) as (virsh, daemon, between):
        call = message(procedure)
        virsh.sendall(call)
        assert received(daemon, len(call)) == call
        virsh.sendall(call)
        assert daemon.recv(1) == b""
        assert isinstance(between.fault, Conflict)
        assert len(seen) == 2


def test_what_is_no_message_ends_it(tmp_path: Path) -> None:
    with carried(tmp_path) as (virsh, daemon, _):
        virsh.sendall(b"GET / HTTP/1.1\r\nHost: libvirt\r\n\r\n")
        assert daemon.recv(1) == b""


def test_it_ends_with_the_block(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as late:
        with carried(tmp_path) as (virsh, _, _):
            pass
        with pytest.raises(OSError, match="Bad file descriptor"):
            virsh.recv(1)
        with pytest.raises(ConnectionRefusedError, match="refused"):
            late.connect(str(tmp_path / "ours"))
