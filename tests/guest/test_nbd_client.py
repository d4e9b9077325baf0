"""The NBD client beside qemu-nbd and qemu-img, and against servers that lie."""

from __future__ import annotations

import json
import random
import socket
import struct
import subprocess
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from snapchain.errors import Corrupt, NotFound, SnapchainError, Unavailable, Unsupported
from snapchain.guest.nbd_client import ALLOCATION, DIRTY, ZERO, Connection, NbdExport
from tests.servers import DIE_WITH_PARENT, greets
from tests.waiting import wait_until

MiB = 1 << 20


@contextmanager
def served(image: Path, *options: str) -> Iterator[Path]:
    """qemu-nbd with the export `disk`."""
    path = image.with_suffix(".sock")
    words = ["qemu-nbd", "--read-only", "--persistent", "--shared=0", "-x", "disk", "-k", str(path), *options]
    process = subprocess.Popen([*DIE_WITH_PARENT, *words, str(image)])
    try:
        wait_until(lambda: greets(path), alive=lambda: process.poll() is None)
        yield path
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """Data, zeroes and holes, with an odd end, and a bitmap of what was written last."""
    path = tmp_path / "disk.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", path, str(9 * MiB + 512)], check=True)
    commands = ["write -P 1 0 3M", "write -z 1M 64k", "write -P 2 5M 1M", "write -P 3 9437184 512"]
    subprocess.run(["qemu-io", *(word for each in commands for word in ("-c", each)), path], check=True, stdout=-3)
    subprocess.run(["qemu-img", "bitmap", "--add", path, "since"], check=True)
    subprocess.run(["qemu-io", "-c", "write -P 4 2M 128k", "-c", "discard 5M 64k", path], check=True, stdout=-3)
    return path


def test_it_reads_what_qemu_img_reads(image: Path, tmp_path: Path) -> None:
    raw = tmp_path / "disk.raw"
    subprocess.run(["qemu-img", "convert", "-O", "raw", image, raw], check=True)
    wanted = raw.read_bytes()
    with served(image) as path:
        for unit in (32 * MiB, 65536, 4096):
            with NbdExport(path, "disk", unit=unit) as export, ThreadPoolExecutor(8) as pool:
                assert export.size == len(wanted)

                def read(span: tuple[int, int], export: NbdExport = export) -> bool:
                    buffer = bytearray(span[1] - span[0])
                    export.read_into(span[0], memoryview(buffer))
                    return bytes(buffer) == wanted[span[0] : span[1]]

                spans = [
                    (0, len(wanted)),
                    *((at, min(at + 300_000, len(wanted))) for at in range(0, len(wanted), 250_000)),
                ]
                assert all(pool.map(read, spans))


def test_its_maps_are_those_of_qemu_img(image: Path) -> None:
    with served(image, "-B", "since") as path:
        with NbdExport(path, "disk") as export:
            at, flags = export.runs(ALLOCATION)
            zero = {int(start): bool(flag & ZERO) for start, flag in zip(at, flags, strict=True)}
            at, flags = export.runs("qemu:dirty-bitmap:since")
            dirty = [int(start) for start, flag in zip(at, flags, strict=True) if flag & DIRTY]
            with pytest.raises(NotFound, match="it offers no map qemu:dirty-bitmap:other"):
                export.runs("qemu:dirty-bitmap:other")
        url = f"nbd+unix:///disk?socket={path}"
        shown = subprocess.run(["qemu-img", "map", "--output=json", "-f", "raw", url], check=True, capture_output=True)
        for each in json.loads(shown.stdout):
            start = max(at for at in zero if at <= each["start"])
            assert zero[start] == each["zero"], each
        assert dirty == [2 * MiB, 5 * MiB]
        with pytest.raises(NotFound, match="there is no such export"):
            NbdExport(path, "other")


def test_an_error_names_the_range_and_the_next_read_has_a_new_connection(tmp_path: Path) -> None:
    image = tmp_path / "disk.raw"
    image.write_bytes(bytes([7]) * 4 * MiB)
    options = {
        "driver": "raw",
        "file": {
            "driver": "blkdebug",
            "image": {"driver": "file", "filename": str(image)},
            "inject-error": [{"event": "none", "iotype": "read", "errno": 5, "sector": 4096}],
        },
    }
    path = tmp_path / "s"
    words = [
        "qemu-nbd",
        "--read-only",
        "--persistent",
        "--shared=0",
        "-x",
        "disk",
        "-k",
        str(path),
        f"json:{json.dumps(options)}",
    ]
    process = subprocess.Popen([*DIE_WITH_PARENT, *words])
    try:
        wait_until(lambda: greets(path), alive=lambda: process.poll() is None)
        with NbdExport(path, "disk", unit=65536, connections=1) as export:
            with pytest.raises(Unavailable, match=r"bytes \d+ to 3145728 cannot be read: "):
                export.read_into(MiB, memoryview(bytearray(2 * MiB)))
            buffer = bytearray(MiB)
            export.read_into(0, memoryview(buffer))
            assert buffer == bytes([7]) * MiB
    finally:
        process.kill()
        process.wait()


# --- servers that lie


GREETING = struct.pack(">QQH", 0x4E42444D41474943, 0x49484156454F5054, 3)


def option(number: int, kind: int, data: bytes = b"") -> bytes:
    return struct.pack(">QIII", 0x3E889045565A9, number, kind, len(data)) + data


def chunk(kind: int, body: bytes, *, handle: int = 1, done: bool = True) -> bytes:
    return struct.pack(">IHHQI", 0x668E33EF, int(done), kind, handle, len(body)) + body


READY = GREETING + option(8, 1) + option(7, 3, struct.pack(">HQH", 0, MiB, 1)) + option(7, 1)
MAPPING = (
    GREETING
    + option(8, 1)
    + option(10, 4, struct.pack(">I", 9) + ALLOCATION.encode())
    + option(10, 1)
    + option(7, 3, struct.pack(">HQH", 0, MiB, 1))
    + option(7, 1)
)


@contextmanager
def lying(path: Path, *answers: bytes) -> Iterator[Path]:
    """A server that sends fixed bytes to each client, whatever it is asked."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(path))
    listener.listen()

    def serve() -> None:
        for answer in answers:
            with suppress(OSError):
                client, _ = listener.accept()
                with client:
                    client.sendall(answer)
                    client.shutdown(socket.SHUT_WR)
                    while client.recv(65536):
                        pass

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield path
    finally:
        with suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)
        thread.join()
        listener.close()


def read(connection: Connection) -> None:
    connection.read_into(0, memoryview(bytearray(65536)))


def data(offset: int, length: int) -> bytes:
    return struct.pack(">Q", offset) + bytes(length)


@pytest.mark.parametrize(
    ("answer", "ask", "error", "words"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n", read, Corrupt, "no NBD server"),
        (GREETING[:16] + b"\0\0", read, Unsupported, "fixed newstyle"),
        (GREETING + option(8, (1 << 31) + 1), read, Unsupported, "refuses STRUCTURED_REPLY"),
        (GREETING + option(8, 1) + option(7, (1 << 31) + 6), read, NotFound, "no such export"),
        (GREETING + option(8, 1) + option(7, 3, bytes(12)) * 100, read, Corrupt, "too many replies"),
        (GREETING + struct.pack(">QIII", 0x3E889045565A9, 8, 1, 1 << 31), read, Corrupt, "malformed reply"),
        (READY + chunk(1, data(0, 65536), handle=7), read, Corrupt, "no request"),
        (READY + chunk(1, data(0, 65535)), read, Corrupt, "exactly once"),
        (READY + chunk(1, data(0, 65537)), read, Corrupt, "outside"),
        (READY + chunk(1, data(4096, 65536)), read, Corrupt, "outside"),
        (READY + chunk(1, data(0, 512), done=False) + chunk(1, data(0, 65536)), read, Corrupt, "exactly once"),
        (READY + chunk(2, struct.pack(">QI", 0, 1 << 31)), read, Corrupt, "outside"),
        (READY + chunk(1, data(0, 1), done=False) * 300, read, Corrupt, "outside"),
        (READY + struct.pack(">IHHQI", 0x668E33EF, 1, 1, 1, 1 << 31), read, Corrupt, "too long"),
        (READY + struct.pack(">IIQ", 0x67446698, 0, 1), read, Corrupt, "simple reply"),
        (READY + struct.pack(">IIQ", 0x67446698, 5, 1), read, Unavailable, "refuses a request: I/O error"),
        (READY + chunk(32769, struct.pack(">IH", 5, 4) + b"disk"), read, Unavailable, r"I/O error \(disk\)"),
        (READY + chunk(32769, struct.pack(">IH", 5, 400) + b"disk"), read, Corrupt, "malformed error"),
        (READY + chunk(1, data(0, 100))[:-1], read, Unavailable, "closed the connection"),
        (READY, read, Unavailable, "closed the connection"),
        (MAPPING + chunk(5, struct.pack(">III", 9, 0, 1)), Connection.runs, Corrupt, "does not fit"),
        (MAPPING + chunk(5, struct.pack(">III", 8, MiB, 1)), Connection.runs, Corrupt, "not asked for"),
        (MAPPING + chunk(5, struct.pack(">IIIII", 9, MiB, 1, MiB, 1)), Connection.runs, Corrupt, "does not fit"),
        (MAPPING + chunk(5, bytes(11)), Connection.runs, Corrupt, "in answer to a question for a map"),
        (MAPPING + chunk(0, b""), Connection.runs, Corrupt, "no map"),
    ],
)  # fmt: skip
def test_a_lie_is_an_error(
    tmp_path: Path, answer: bytes, ask: Callable[[Connection], object], error: type[SnapchainError], words: str
) -> None:
    def use(path: Path) -> None:
        with Connection(path, "disk", context=ALLOCATION if ask is Connection.runs else None) as connection:
            ask(connection)

    with lying(tmp_path / "s", answer) as path, pytest.raises(error, match=words):
        use(path)


def test_whatever_a_server_sends_ends_in_an_error_of_ours(tmp_path: Path) -> None:
    """Good answers with some bytes changed, cut off or repeated, from a seed."""
    dice = random.Random(12)
    good = [
        READY + chunk(1, data(0, 32768), done=False) + chunk(2, struct.pack(">QI", 32768, 32768)),
        MAPPING + chunk(5, struct.pack(">I", 9) + struct.pack(">IIII", 65536, 3, MiB - 65536, 0)),
    ]
    cases = []
    for _ in range(600):
        answer = bytearray(dice.choice(good))
        for _ in range(dice.randrange(4)):
            at = dice.randrange(len(answer))
            answer[at] = dice.choice([0, 1, 127, 128, 255, dice.randrange(256)])
        if dice.random() < 0.2:
            del answer[dice.randrange(len(answer)) :]
        cases.append(bytes(answer))
    ended = {"fine": 0, "error": 0}
    with lying(tmp_path / "s", *cases) as path:
        for case in cases:
            context = ALLOCATION if len(case) < 2000 else None
            try:
                with Connection(path, "disk", context=context, seconds=20) as connection:
                    if context is None:
                        read(connection)
                    else:
                        connection.runs()
            except SnapchainError:
                ended["error"] += 1
            else:
                ended["fine"] += 1
    assert ended["error"] > 100
    assert ended["fine"] > 50


def test_bytes_that_trickle_do_not_move_the_deadline(tmp_path: Path) -> None:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(tmp_path / "s"))
    listener.listen()
    stop = threading.Event()

    def serve() -> None:
        client, _ = listener.accept()
        with client, suppress(OSError):
            for byte in GREETING * 1000:
                client.sendall(bytes([byte]))
                if stop.wait(0.05):
                    return

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        with pytest.raises(Unavailable, match=r"did not answer within 0\.3 s"):
            Connection(tmp_path / "s", "disk", seconds=0.3)
    finally:
        stop.set()
        thread.join()
        listener.close()


def test_nobody_listens(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="nobody answers"):
        NbdExport(tmp_path / "s", "disk")
