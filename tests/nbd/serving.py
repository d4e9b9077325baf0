"""Disks of made blobs, disks of a repository, servers of both, and clients that say each byte themselves."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Self

from snapchain.destination.reading import Part, StoredBlob
from snapchain.errors import Corrupt, SnapchainError
from snapchain.model.extents import DATA, Extents
from snapchain.nbd.cache import BlockCache, Loader
from snapchain.nbd.exports import Export, Exports
from snapchain.nbd.listening import unix_listener
from snapchain.nbd.reading import BLOCK, BlobReading, Reading
from snapchain.nbd.server import Server
from tests.waiting import HANG

KiB, MiB = 1 << 10, 1 << 20


@dataclass
class MadeDisk:
    """Blob n is `unit` bytes of n + 1.

    bad: blobs that are damaged; gate: called before each is loaded; loads: which were asked for together
    """

    count: int
    unit: int = 64 * KiB
    bad: set[int] = field(default_factory=set)
    gate: Callable[[], object] = lambda: None
    loads: list[list[int]] = field(default_factory=list)

    @property
    def size(self) -> int:
        return self.count * self.unit

    @property
    def extents(self) -> Extents:
        return Extents.from_starts(self.size, [0], [DATA])

    @cached_property
    def content(self) -> bytes:
        return b"".join(bytes([number + 1]) * self.unit for number in range(self.count))

    def blob(self, number: int) -> StoredBlob:
        return StoredBlob(number.to_bytes(4, "big"), self.unit, ("made", number * self.unit, self.unit, number))

    def read_into(self, offset: int, buffer: memoryview, /) -> None:
        buffer[:] = self.content[offset : offset + len(buffer)]

    def parts(self, start: int, stop: int, /) -> Sequence[Part]:
        found = []
        while start < stop:
            number, skip = divmod(start, self.unit)
            end = min(stop, start - skip + self.unit)
            found.append(Part(start, end, self.blob(number), skip))
            start = end
        return found

    def load(self, blobs: Sequence[StoredBlob], /) -> Iterator[tuple[StoredBlob, bytes]]:
        self.loads.append([each.where[3] for each in blobs])
        for each in blobs:
            self.gate()
            if each.where[3] in self.bad:
                raise Corrupt("damaged", subject=f"blob {each.where[3]}")
            yield each, bytes([each.where[3] + 1]) * self.unit


class Loaders:
    """Ends the threads of loaders that a test makes."""

    def __init__(self) -> None:
        self.made: list[Loader] = []

    def __call__(self, disk: MadeDisk, *, limit: int = 64 * MiB, workers: int = 2) -> Loader:
        self.made.append(Loader(BlockCache(limit), disk.load, workers=workers))
        return self.made[-1]


def shown(reading: Reading, offset: int, length: int) -> bytes:
    """What a range reads as, by the way of requests that wait. Raises what keeps it from being read."""
    out, at = bytearray(), offset
    for pieces in reading.wait(offset, length):
        for start, some, data in pieces:
            assert start == at
            assert data is None or len(data) == some
            out += bytes(some) if data is None else data
            at += some
    return bytes(out)


@dataclass
class Served:
    """A server, and what it said."""

    server: Server
    path: Path
    faults: list[tuple[str, int, int, Exception]]
    notes: list[str]


@contextmanager
def served(path: Path, readings: dict[str, Reading], *, most_clients: int = 100) -> Iterator[Served]:
    """A server with these exports on a unix socket."""
    faults: list[tuple[str, int, int, Exception]] = []
    notes: list[str] = []

    def export(name: str, reading: Reading) -> Export:
        return Export(name, reading.size, "made", lambda: nullcontext(reading))

    with (
        Exports([export(*each) for each in readings.items()]) as exports,
        unix_listener(path) as listening,
        Server(
            exports,
            [listening],
            on_fault=lambda *fault: faults.append(fault),
            on_note=notes.append,
            most_clients=most_clients,
        ) as server,
    ):
        yield Served(server, path, faults, notes)


def reading_of(disk: MadeDisk, loader: Loader, *, patience: float = 0) -> BlobReading:
    return BlobReading(disk, disk, loader, patience=patience)


class Client:
    """Says what the test says. A context manager."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.connect(str(path))
        self.socket.settimeout(HANG)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def take(self, count: int) -> bytes:
        """Exactly so many bytes; fewer where the server hangs up."""
        data = b""
        while len(data) < count and (more := self.socket.recv(count - len(data))):
            data += more
        return data

    def is_hung_up(self) -> bool:
        """Whether the server says nothing more, and hangs up."""
        try:
            return self.socket.recv(1) == b""
        except ConnectionResetError:
            return True

    def option(self, number: int, data: bytes = b"") -> list[tuple[int, bytes]]:
        """(type, data) of the replies, up to the last."""
        self.send(b"IHAVEOPT" + struct.pack(">II", number, len(data)) + data)
        found = []
        while True:
            _, _, kind, length = struct.unpack(">QIII", self.take(20))
            found.append((kind, self.take(length)))
            if kind == 1 or kind >> 31:
                return found

    def go(self, name: str, *, structured: bool = True, contexts: bool = True) -> Client:
        """Negotiate."""
        text = name.encode()
        assert self.take(18) == b"NBDMAGICIHAVEOPT\0\3"
        self.send(struct.pack(">I", 3))
        if structured:
            self.option(8)
        if structured and contexts:
            query = b"base:allocation"
            self.option(10, struct.pack(">I", len(text)) + text + struct.pack(">II", 1, len(query)) + query)
        assert self.option(7, struct.pack(">I", len(text)) + text + b"\0\0")[-1][0] == 1
        return self

    def request(self, command: int, offset: int = 0, length: int = 0, *, cookie: int = 1, flags: int = 0) -> None:
        self.send(struct.pack(">IHHQQI", 0x25609513, flags, command, cookie, offset, length))

    def simple(self) -> tuple[int, int]:
        """(error, cookie)"""
        magic, error, cookie = struct.unpack(">IIQ", self.take(16))
        assert magic == 0x67446698
        return error, cookie

    def chunks(self) -> list[tuple[int, int, bytes]]:
        """(type, cookie, data) up to the end of a reply."""
        found = []
        while True:
            magic, flags, kind, cookie, length = struct.unpack(">IHHQI", self.take(20))
            assert magic == 0x668E33EF
            found.append((kind, cookie, self.take(length)))
            if flags & 1:
                return found

    def read(self, offset: int, length: int, **more: int) -> bytes:
        """By structured replies. Raises ReadFailed."""
        self.request(0, offset, length, **more)
        out, at = b"", offset
        for kind, _, data in self.chunks():
            if kind & 0x8000:
                raise ReadFailed(struct.unpack_from(">I", data)[0], out)
            if kind == 0:
                continue
            start = struct.unpack_from(">Q", data)[0]
            assert start == at
            body = data[8:] if kind == 1 else bytes(struct.unpack_from(">I", data, 8)[0])
            out += body
            at += len(body)
        return out


class ReadFailed(SnapchainError):
    """error: the number; before: the bytes that came before it"""

    def __init__(self, error: int, before: bytes) -> None:
        super().__init__(f"error {error}")
        self.error, self.before = error, before


def threads() -> list[str]:
    """Those of servers, by name."""
    return sorted(each.name for each in threading.enumerate() if each.name.startswith("nbd"))


__all__ = ["BLOCK", "Client", "Loaders", "MadeDisk", "ReadFailed", "Served", "reading_of", "served", "shown", "threads"]
