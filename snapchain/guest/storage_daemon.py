"""A qemu-storage-daemon of ours: QEMU's block layer with a monitor, and no guest. It dies with us.

It opens images as a guest would, with its locks, so that no guest can start on one meanwhile.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from threading import Thread
from types import TracebackType
from typing import Self

from snapchain.errors import Busy, SnapchainError, ToolFailed, Unavailable
from snapchain.guest.qmp import Monitor
from snapchain.host import run_directory
from snapchain.host.processes import Completed, run

PROGRAM = "qemu-storage-daemon"
_START_SECONDS = 60.0
_END_SECONDS = 60.0
_POLL_SECONDS = 0.02


class StorageDaemon:
    """A context manager; at its end the daemon writes what it holds back, and closes its images.

    name, token: of its directory, which is the same in each run: a run that was killed leaves one, not many
    nodes: arguments of `blockdev-add`, in this order
    """

    def __init__(self, name: str, token: str, nodes: Sequence[Mapping[str, object]]) -> None:
        self._directory = run_directory.make(name, token)
        socket = self._directory / "qmp.sock"
        argv = [PROGRAM, *(word for each in nodes for word in ("--blockdev", json.dumps(each)))]
        doubled = str(socket).replace(",", ",,")
        argv += ["--chardev", f"socket,id=monitor,path={doubled},server=on,wait=off", "--monitor", "chardev=monitor"]
        self._argv = argv
        self._ended: Future[Completed] = Future()
        self._thread = Thread(target=self._run, name=PROGRAM, daemon=True)
        self._thread.start()
        try:
            self.monitor = self._connected(socket)
        except BaseException:
            run_directory.remove(self._directory)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Raises ToolFailed where the daemon did not end well, and nothing else went wrong."""
        try:
            with suppress(SnapchainError):
                self.monitor.execute("quit", seconds=_END_SECONDS)
            self._thread.join(_END_SECONDS)
            if self._thread.is_alive() and self.monitor.peer is not None:
                with suppress(ProcessLookupError):
                    os.kill(self.monitor.peer, signal.SIGKILL)
                self._thread.join()
        finally:
            self.monitor.close()
            run_directory.remove(self._directory)
        if kind is None:
            self._ended.result()

    def _run(self) -> None:
        # The kernel ends it with the thread that started it, and the thread waits for it.
        try:
            self._ended.set_result(run(self._argv))
        except BaseException as error:  # noqa: BLE001 -- raised where the result is asked for
            self._ended.set_exception(error)

    def _connected(self, socket: Path) -> Monitor:
        until = time.monotonic() + _START_SECONDS
        while not self._ended.done():
            if socket.exists():
                with suppress(SnapchainError):
                    return Monitor(socket)
            if time.monotonic() > until:
                raise Unavailable(f"{PROGRAM} did not start within {_START_SECONDS:.0f} seconds", subject=socket)
            time.sleep(_POLL_SECONDS)
        try:
            self._ended.result()
        except ToolFailed as error:
            if '" lock' in error.stderr:  # Failed to get "write" lock
                raise Busy(
                    "another program has the image open", subject=self._argv[0], hint="run the command again later"
                ) from error
            raise
        raise Unavailable(f"{PROGRAM} has ended", subject=socket)
