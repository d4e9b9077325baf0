"""A process that ends a live migration whose snapchain was killed, so that the guest stays paused on no side.

It is started before anything is done to the guest, lives in a session of its own, and sleeps until our end of the
socket is closed.  Told before that all is done, it just ends; else it does at once what the next run, or `doctor`,
would do: `live_settle.settle`, again and again until the record is gone.
"""

from __future__ import annotations

import os
import signal
import socket
import time
from contextlib import suppress
from pathlib import Path

from snapchain.errors import SnapchainError
from snapchain.guest import journal
from snapchain.host.detached import start_module

_DONE = b"done"
_FIRST_PAUSE, _LONGEST_PAUSE = 0.2, 30.0
_MOST_FDS = 65536


class MoveWatchdog:
    """The process, from our side. record: path of the journal's record."""

    def __init__(self, record: Path) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with theirs:
            try:
                self.pid = start_module(__name__, str(record), fd=theirs.fileno())
            except BaseException:
                ours.close()
                raise
        self._socket, self._record = ours, record

    def release(self) -> None:
        """Let it go: where the record is still there, it ends the move, as if we were gone."""
        if self._record.exists():
            self._socket.close()
            return
        with suppress(OSError):
            self._socket.sendall(_DONE)
        self._socket.close()
        with suppress(ChildProcessError):
            os.waitpid(self.pid, 0)


def main(fd: int, argument: str) -> None:
    """The process."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGPIPE):
        signal.signal(number, signal.SIG_IGN)
    os.chdir("/")
    os.closerange(fd + 1, min(_MOST_FDS, os.sysconf("SC_OPEN_MAX")))
    with socket.socket(fileno=fd) as ours, suppress(OSError):
        if ours.recv(16) == _DONE:
            return
    _end(Path(argument))


def _end(record: Path) -> None:
    from snapchain.ops.migrate.live_settle import settle  # inside: mostly there is nothing to do

    pause = _FIRST_PAUSE
    time.sleep(pause)  # who only could not end it has not quite let go of the guest
    while (found := next((each for each in journal.find()[0] if each.path == record), None)) is not None:
        with suppress(SnapchainError):  # whoever looks into the journal finds it
            settle(found)
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE)
