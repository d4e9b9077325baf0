"""The connection of virsh that goes through us: all calls but the one that is never made."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from snapchain.host.libvirt_rpc import CONFIRM, without_confirm

PROGRAM, PERFORM, CALL, REPLY = 0x20008086, 305, 0, 1


def message(procedure: int, *, kind: int = CALL, program: int = PROGRAM, body: bytes = b"") -> bytes:
    return struct.pack(">7I", 28 + len(body), program, 1, procedure, kind, 1, 0) + body


@contextmanager
def carried(folder: Path) -> Iterator[tuple[socket.socket, socket.socket]]:
    """virsh's end, and the daemon's."""
    with socket.socket(socket.AF_UNIX) as listening, socket.socket(socket.AF_UNIX) as virsh:
        listening.bind(str(folder / "daemon"))
        listening.listen()
        with without_confirm(folder / "ours", folder / "daemon"):
            virsh.connect(str(folder / "ours"))
            daemon, _ = listening.accept()
            with daemon:
                yield virsh, daemon


def received(end: socket.socket, length: int) -> bytes:
    return end.recv(length, socket.MSG_WAITALL)


def test_other_calls_and_all_answers_go_through(tmp_path: Path) -> None:
    with carried(tmp_path) as (virsh, daemon):
        calls = message(PERFORM, body=bytes(1 << 20)) + message(min(CONFIRM), program=1)
        answer = message(min(CONFIRM), kind=REPLY, body=b"x")
        for at in range(0, len(calls), 300_000):
            virsh.sendall(calls[at : at + 300_000])
        assert received(daemon, len(calls)) == calls
        daemon.sendall(answer)
        assert received(virsh, len(answer)) == answer


@pytest.mark.parametrize("procedure", sorted(CONFIRM))
def test_the_connection_ends_before_confirm(tmp_path: Path, procedure: int) -> None:
    with carried(tmp_path) as (virsh, daemon):
        first = message(PERFORM)
        virsh.sendall(first + message(procedure, body=b"the guest goes on here"))
        assert received(daemon, 1000) == first
        assert daemon.recv(1) == b""
        assert virsh.recv(1) == b""


def test_what_is_no_message_ends_it(tmp_path: Path) -> None:
    with carried(tmp_path) as (virsh, daemon):
        virsh.sendall(b"GET / HTTP/1.1\r\nHost: libvirt\r\n\r\n")
        assert daemon.recv(1) == b""


def test_it_ends_with_the_block(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as late:
        with carried(tmp_path) as (virsh, _):
            pass
        with pytest.raises(OSError, match="Bad file descriptor"):
            virsh.recv(1)
        with pytest.raises(ConnectionRefusedError):
            late.connect(str(tmp_path / "ours"))
