"""Which processes are connected to a unix socket: the kernel's socket diagnosis, then /proc.

A server that serves one client at a time, as QEMU's monitor does, leaves the second one waiting; this says for whom.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from snapchain.host.terminal import printable

_NETLINK_SOCK_DIAG = 4
_SOCK_DIAG_BY_FAMILY = 20
_REQUEST_DUMP = 0x301
_DONE, _ERROR = 3, 2
_ESTABLISHED = 1 << 1
_SHOW_NAME, _SHOW_PEER = 1, 4
_NAME, _PEER = 0, 2
_HEADER = struct.Struct("=IHHII")
_REQUEST = struct.Struct("=BBHIII8s")
_MESSAGE = struct.Struct("=BBBBI8s")
_ATTRIBUTE = struct.Struct("=HH")
_SECONDS = 2


def clients_of(path: Path) -> list[str]:
    """The processes that are connected to the socket at a path, this one left out: `libvirtd (pid 812)`.

    Empty where the kernel or the rights of this process do not tell.
    """
    with suppress(OSError, struct.error, ValueError):
        name = os.fsencode(path.absolute())
        connected = list(_connected())
        inodes = {peer for _, bound, peer in connected if bound == name and peer}
        return [_named(pid) for pid in sorted(_holders(inodes)) if pid != os.getpid()]
    return []


def _connected() -> Iterator[tuple[int, bytes | None, int | None]]:
    """(inode, name that it is bound to, inode of the other end) of each connected unix socket."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_SOCK_DIAG) as netlink:
        netlink.settimeout(_SECONDS)
        body = _REQUEST.pack(socket.AF_UNIX, 0, 0, _ESTABLISHED, 0, _SHOW_NAME | _SHOW_PEER, b"\xff" * 8)
        netlink.send(_HEADER.pack(_HEADER.size + len(body), _SOCK_DIAG_BY_FAMILY, _REQUEST_DUMP, 1, 0) + body)
        while True:
            data = memoryview(netlink.recv(1 << 16))
            while len(data) >= _HEADER.size:
                length, kind, *_ = _HEADER.unpack_from(data)
                if kind in (_DONE, _ERROR) or length < _HEADER.size:
                    return
                yield _socket(data[_HEADER.size : length])
                data = data[_padded(length) :]


def _socket(body: memoryview) -> tuple[int, bytes | None, int | None]:
    *_, inode, _cookie = _MESSAGE.unpack_from(body)
    name, peer, rest = None, None, body[_MESSAGE.size :]
    while len(rest) >= _ATTRIBUTE.size:
        length, kind = _ATTRIBUTE.unpack_from(rest)
        value = bytes(rest[_ATTRIBUTE.size : length])
        if kind == _NAME:
            name = value.rstrip(b"\0")
        elif kind == _PEER:
            (peer,) = struct.unpack("=I", value)
        if length < _ATTRIBUTE.size:
            break
        rest = rest[_padded(length) :]
    return inode, name, peer


def _padded(length: int) -> int:
    return (length + 3) & ~3


def _holders(inodes: set[int]) -> set[int]:
    """The processes that have one of these sockets open."""
    wanted = {f"socket:[{inode}]" for inode in inodes}
    found = set()
    for process in Path("/proc").glob("[0-9]*") if wanted else ():
        with suppress(OSError):
            for fd in (process / "fd").iterdir():
                with suppress(OSError):
                    if str(fd.readlink()) in wanted:
                        found.add(int(process.name))
    return found


def _named(pid: int) -> str:
    with suppress(OSError):
        name = Path(f"/proc/{pid}/comm").read_text(errors="replace").strip()
        return f"{printable(name)} (pid {pid})"
    return f"process {pid}"
