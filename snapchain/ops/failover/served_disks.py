"""The disks of a throw-away clone: overlays on points that this process serves, for the length of a block."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Self

from snapchain.destination.reading import ReadableDestination
from snapchain.host.files import UNCHANGED
from snapchain.host.run_directory import LONGEST_SOCKET, base, give_socket
from snapchain.model.events import OnEvent
from snapchain.nbd.exports import Exports
from snapchain.nbd.listening import unix_listener, unix_uri
from snapchain.nbd.server import Server
from snapchain.ops.instant.overlay import new_overlay
from snapchain.ops.readings import CACHE_BYTES, PATIENCE, PointReadings, ReadLog
from snapchain.ops.restore.guest import PlacedDisk

_NAME = "disks.sock"
_SUFFIX_BYTES = len(".new")
_QEMU_DIRECTORY = Path("/var/lib/libvirt/qemu")
"""Of the user as whom libvirt runs QEMU."""


def socket_of(directory: Path) -> Path:
    """Where the disks of the clone in a directory are served: there, or, where its path is too long, in /run."""
    path = directory / _NAME
    is_short = len(os.fsencode(path)) + _SUFFIX_BYTES <= LONGEST_SOCKET
    return path if is_short else base() / f"boot-{directory.name[-8:]}.sock"


class ServedDisks:
    """Serves points behind a socket, and makes overlays on them. A context manager: its end disconnects the clone.

    for_libvirt: the user as whom libvirt runs QEMU may connect; on_event: called from any thread
    """

    def __init__(self, destination: ReadableDestination, socket: Path, *, for_libvirt: bool, on_event: OnEvent) -> None:
        self.failed_reads = 0
        self._destination, self._socket, self._for_libvirt, self._on_event = destination, socket, for_libvirt, on_event
        self._log = ReadLog(on_event)
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def make(self, disks: Sequence[PlacedDisk]) -> None:
        """Serve the points, and make an empty overlay on each. Raises as opening a point, and as writing a file."""
        with ExitStack() as stack:
            readings = stack.enter_context(
                PointReadings(cache=CACHE_BYTES, patience=PATIENCE, prefetch=True, on_event=self._on_event)
            )
            exports = stack.enter_context(
                Exports(
                    [
                        readings.export(each.path.name, self._destination, each.recorded.disk, each.point)
                        for each in disks
                    ]
                )
            )
            listening = stack.enter_context(unix_listener(self._socket))
            if self._for_libvirt and _QEMU_DIRECTORY.is_dir():
                give_socket(self._socket, _QEMU_DIRECTORY.stat().st_uid)
            stack.enter_context(Server(exports, [listening], on_fault=self._failed, on_note=self._log.note))
            for each in disks:
                uri = unix_uri(self._socket, each.path.name)
                new_overlay(each.path, each.point.virtual_size, uri, bitmap=None, standing=UNCHANGED)
            self._stack = stack.pop_all()

    def _failed(self, name: str, offset: int, length: int, error: Exception) -> None:
        self.failed_reads += 1
        self._log.fault(name, offset, length, error)
