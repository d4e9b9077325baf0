"""A virsh that is connected already, for what must not wait for the start of a program: a guest is frozen meanwhile.

virsh reads commands from its standard input, line by line.  A mark before and after a command tells what it printed:

    -> echo 'a1''b2'; domstate web1       the line is echoed as it was typed, so the mark is not found in it
    -> echo 'c3''d4'
    <- a1b2running / virsh # c3d4       with --quiet no line ends behind a mark

Its readline takes only printable ASCII as it is (a tab would complete a name), so other words go to a virsh of their
own.  It is killed and never left: leaving, it would write our commands into the user's history.
"""

from __future__ import annotations

import secrets
import shlex
import time
from contextlib import suppress
from types import TracebackType
from typing import Self

from snapchain.errors import SnapchainError, ToolFailed, Unavailable
from snapchain.host.process_channel import GRACE, ProcessChannel
from snapchain.host.processes import minimal_environment
from snapchain.host.virsh import Virsh, environment, explained, named_domain

_SHELL = 'exec "$0" "$@" 2>&1'
"""Errors and output in one pipe: at the second mark all of both are there."""
_ERROR = "error: "
_PIECE = 64 << 10


class VirshSession:
    """A context manager. Each call that finds no connection starts a virsh, also after a failure."""

    def __init__(self, virsh: Virsh) -> None:
        self._virsh = virsh
        self._channel: ProcessChannel | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def ready(self) -> None:
        """Wait for the connection, so that the next command need not. Raises as `Virsh.text`."""
        self.text("uri")

    def text(self, *words: str, timeout: float | None = None, subject: str | None = None) -> str:
        """As `Virsh.text`. After Unavailable the command may have been carried out, or be under way."""
        if not all(word.isascii() and word.isprintable() for word in words):
            return self._virsh.text(*words, timeout=timeout, subject=subject)
        begin, end = (secrets.token_hex(8) for _ in range(2))
        line = f"echo {_halved(begin)}; {shlex.join(words)}\necho {_halved(end)}\n"
        said, end_of_it = self._exchange(line, end.encode(), self._virsh.seconds if timeout is None else timeout)
        before, _, output = said.decode("utf-8", "surrogateescape").partition(end)[0].partition(begin)
        errors = "\n".join(row for row in f"{before}\n{output}".splitlines() if row.startswith(_ERROR))
        if not errors and end_of_it is None:
            return output.rpartition("virsh > " if self._virsh.read_only else "virsh # ")[0]
        status, message = end_of_it or (1, "failed")
        failed = ToolFailed(message, argv=["virsh", *words], status=status, stderr=errors, subject="virsh")
        error = explained(failed, words, uri=self._virsh.uri, name=subject or named_domain(words))
        if end_of_it is not None and not isinstance(error, Unavailable):
            error = Unavailable(f"virsh {message} before it answered `{words[0]}`", subject=error.subject)
        if isinstance(error, Unavailable):
            self.close()
        raise error

    def _exchange(self, line: str, end: bytes, seconds: float) -> tuple[bytes, tuple[int, str] | None]:
        """What virsh printed, with the second mark; or (exit status, how it ended) beside what it printed before."""
        deadline = time.monotonic() + seconds
        said = bytearray()
        try:
            if self._channel is None:
                self._channel = self._started()
            with suppress(_EndedError):  # what it said before it ended is there to be read
                self._channel.write(line.encode())
            while end not in said:
                piece = self._channel.read(_PIECE, patience=max(deadline - time.monotonic(), 0.0))
                if not piece:
                    return bytes(said), (0, "ended")
                said += piece
        except _EndedError as error:
            return bytes(said), (error.status, error.message)
        except Unavailable:
            return bytes(said), (-9, f"did not end within {seconds:g} seconds")
        return bytes(said), None

    def _started(self) -> ProcessChannel:
        return ProcessChannel(
            ["sh", "-c", _SHELL, *self._virsh.argv()],
            peer=self._virsh.uri,
            diagnose=lambda status, _: _EndedError(status),
            env={**minimal_environment(environment()), "INPUTRC": "/dev/null"},
        )

    def close(self) -> None:
        """Idempotent."""
        channel, self._channel = self._channel, None
        if channel is not None:
            channel.abort()
            channel.has_ended(GRACE)  # before its input ends: then it would write its history
            channel.abandon()


class _EndedError(SnapchainError):
    """virsh ended."""

    def __init__(self, status: int) -> None:
        super().__init__(f"ended with exit status {status}")
        self.status = status


def _halved(mark: str) -> str:
    """As a word of a virsh line that does not contain the mark itself."""
    middle = len(mark) // 2
    return f"'{mark[:middle]}''{mark[middle:]}'"
