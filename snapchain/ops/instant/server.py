"""The process that serves the points of instant restores, after the command that started it has ended.

    our side     `ensure`: starts it unless it serves; `end`: ends it
    its side     `main`: reads the records of the images, serves their points, ends when no image depends on it

The passphrase goes to it through a socket, and is stored nowhere. What could not be read is in its log, beside its
socket. It ends by itself when its images are finished or removed.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Self

from snapchain.errors import Conflict, NotFound, SnapchainError, Unavailable
from snapchain.host.detached import start_module
from snapchain.host.directory import Directory
from snapchain.host.files import open_or_make
from snapchain.host.os_errors import os_errors
from snapchain.host.private import PrivateDirectory
from snapchain.host.readable import is_readable
from snapchain.host.run_directory import base
from snapchain.model.events import Event, Notice
from snapchain.ops.instant.overlay import depends_on
from snapchain.ops.instant.record import InstantRecord, check_point, record_of, served_with

PATIENCE = 600.0
"""Seconds for which a read waits for a store that does not answer. A guest that gets an error would stop, or worse."""
_START_SECONDS = 600.0
_END_SECONDS = 30.0
_LOOK_SECONDS = 2.0
_FIRST_SECONDS = 120.0
"""The command makes the image when the server answers."""
_MOST_SAID = 64 << 10
_MOST_FDS = 65536
_UCRED = struct.Struct("3i")
_LOG = ".log"


# --- Our side.


def new_socket(token: str) -> Path:
    """The socket of a new instant restore: short, since the kernel takes 107 bytes, and the same for all its runs."""
    return base() / f"instant-{token}.sock"


def ensure(image: Path, passphrase: Callable[[], str | None]) -> bool:
    """Serve the images that are served together with this one; whether a server had to be started.

    passphrase: asked where a server is started
    Raises Unavailable with the words of a server that could not be started, Conflict where the record is gone.
    """
    record = record_of(image)
    if record is None:
        raise Conflict(
            "its record is gone: another run has finished it, or somebody has removed it",
            subject=image,
            hint="`qemu-img info` shows whether the image still has a backing file",
        )
    if serves(record):
        return False
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with ours:
        with theirs:
            pid = start_module(__name__, str(image), fd=theirs.fileno())
        try:
            ours.sendall(json.dumps({"passphrase": passphrase()}).encode() + b"\n")
            said = _line(ours)
        except OSError:
            said = None
    if said == {"ready": "yes"}:
        return True
    with suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)
    if serves(record):  # that of another run was faster
        return False
    words = said or {"message": "it has ended, or did not answer", "hint": f"see {log_of(record)}"}
    raise Unavailable(
        f"the point cannot be served: {words.get('message')}",
        subject=f"{record.destination}::{record.disk}@{record.point}",
        hint=words.get("hint") or "run the command again: it continues",
    )


def serves(record: InstantRecord) -> bool:
    """Whether the server of a record runs, and answers."""
    return process_of(record) is not None


def process_of(record: InstantRecord) -> int | None:
    """The pid of the server; None where none runs."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as visitor:
        visitor.settimeout(_END_SECONDS)
        try:
            visitor.connect(record.socket)
            pid, uid, _ = _UCRED.unpack(visitor.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
        except OSError:
            return None
    return pid if uid == os.geteuid() else None


def end(record: InstantRecord) -> None:
    """End the server of a record, and wait until it has ended. Clients are disconnected. Idempotent."""
    pid = process_of(record)
    if pid is None:
        return
    with suppress(ProcessLookupError):
        fd = os.pidfd_open(pid)
        try:
            signal.pidfd_send_signal(fd, signal.SIGTERM)
            is_readable(fd, _END_SECONDS)
        finally:
            os.close(fd)
    with suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)


def clear(record: InstantRecord) -> None:
    """Remove what a server that has ended, or was killed, has left. Idempotent."""
    path = Path(record.socket)
    with suppress(NotFound), os_errors(path), Directory.open(path.parent) as directory:
        directory.remove(path.name)
        directory.remove(log_of(record).name)


def log_of(record: InstantRecord) -> Path:
    """Where the server writes what could not be read."""
    return Path(record.socket).with_suffix(_LOG)


def _line(link: socket.socket) -> Mapping[str, str | None] | None:
    data = b""
    while b"\n" not in data and len(data) < _MOST_SAID:
        if not is_readable(link.fileno(), _START_SECONDS):
            return None
        piece = link.recv(_MOST_SAID)
        if not piece:
            return None
        data += piece
    found = json.loads(data)
    return found if isinstance(found, dict) else None


# --- Its side.


def main(fd: int, argument: str) -> None:
    """The process. argument: path of an image"""
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGPIPE):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _interrupted)
    os.chdir("/")
    os.closerange(fd + 1, min(_MOST_FDS, os.sysconf("SC_OPEN_MAX")))
    with socket.socket(fileno=fd) as link, suppress(KeyboardInterrupt):
        try:
            said = _line(link) or {}
            _serve(Path(argument), said.get("passphrase"), lambda: _answer(link, {"ready": "yes"}))
        except SnapchainError as error:
            with suppress(OSError):
                _answer(link, {"message": str(error), "hint": error.hint})


def _interrupted(_number: int, _frame: object) -> None:
    raise KeyboardInterrupt


def _answer(link: socket.socket, words: Mapping[str, str | None]) -> None:
    with suppress(OSError):
        link.sendall(json.dumps(words).encode() + b"\n")
        link.shutdown(socket.SHUT_RDWR)


def _serve(image: Path, passphrase: object, on_ready: Callable[[], None]) -> None:
    from snapchain.destinations import open_destination
    from snapchain.ops.serve import ServeRequest, Serving

    record = record_of(image)
    if record is None:
        raise Unavailable("its record is gone", subject=image)
    path = Path(record.socket)
    with PrivateDirectory(path.parent, make=True):
        pass
    served = served_with(image, record)
    word = passphrase if isinstance(passphrase, str) else None
    destination = open_destination(record.destination, passphrase=lambda: word)
    for each_image, each in served.items():
        check_point(destination, each_image, each)
    addresses = list(dict.fromkeys(each.address for each in served.values()))
    # A guest's QEMU takes a failed block status for the end of the point, and reads zeroes (decision 0163).
    # What QEMU copies it reads by the same connection as its guest: that is no record of what a boot reads first.
    request = ServeRequest(addresses=addresses, socket=path, patience=PATIENCE, block_status=False, records=False)
    with _Log(log_of(record)) as log:
        serving = Serving(request, {record.destination: destination})
        watch = threading.Thread(target=_watch, args=(served,), name="instant watch", daemon=True)

        def ready(_plan: object) -> None:
            watch.start()
            on_ready()

        serving.run(ready, on_event=log.write)


def _watch(served: Mapping[Path, InstantRecord]) -> None:
    """End this process when no image depends on it any more. An image that was not made yet is waited for."""
    began = time.monotonic()
    while any(
        _depends(image, record, is_early=time.monotonic() - began < _FIRST_SECONDS) for image, record in served.items()
    ):
        time.sleep(_LOOK_SECONDS)
    main = threading.main_thread().ident
    assert main is not None
    signal.pthread_kill(main, signal.SIGTERM)  # another thread that gets it would not wake that one


def _depends(image: Path, record: InstantRecord, *, is_early: bool) -> bool:
    found = record_of(image)
    if found is None or found.token != record.token:
        # Removed, altered, or not readable for a moment: a guest may run on the image all the same.
        return depends_on(image, record)
    return os.path.lexists(image) or (is_early and not found.made)


class _Log:
    """What a person may want to read later. A context manager."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> Self:
        self._fd = open_or_make(self._path)
        os.lseek(self._fd, 0, os.SEEK_END)
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)

    def write(self, event: Event) -> None:
        """A note as a line."""
        if isinstance(event, Notice):
            with suppress(OSError):
                os.write(self._fd, f"{event.message}\n".encode(errors="replace"))
