"""A channel to the standard streams of a program that we start, such as ssh.

sh starts it with the ends of real pipes as its streams: no byte passes through sh or through a buffer of ours.  A
separate thread keeps the child: it starts it, collects the end of its stderr, terminates it on request, and reaps it.
The thread lives as long as the child, because the kernel's "die with your parent" refers to the thread that forked.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from snapchain.errors import SnapchainError, ToolFailed, Unavailable
from snapchain.host import process_limits
from snapchain.host.channel import PATIENCE, Bell, Channel
from snapchain.host.processes import STDERR_CAP, die_with_parent, find_program

PIPE_SIZE = 1 << 20
"""Bytes that the kernel holds in each direction: the most that an unprivileged process may ask for."""
GRACE = 2.0
"""Seconds for a child to exit after SIGTERM, and after it has closed its streams."""

Diagnose = Callable[[int, str], SnapchainError]
"""Makes an error of an exit status (negative: the signal) and the end of stderr."""


class ProcessChannel(Channel):
    """Full duplex with a child's stdin and stdout. The child dies with us; it has a terminal only with `terminal`."""

    def __init__(
        self,
        argv: Sequence[str],
        *,
        peer: str,
        diagnose: Diagnose,
        env: Mapping[str, str],
        patience: float = PATIENCE,
        terminal: bool = False,
    ) -> None:
        """Start it. Raises ToolFailed when the program is missing or cannot be started."""
        command = [find_program(argv[0], argv), *argv[1:]]
        if limit := process_limits.for_children():
            command = [find_program("prlimit", argv), *limit, "--", *command]
        its_in, writer = _pipe()
        reader, its_out = _pipe()
        try:
            self._child = _Child(command, its_in, its_out, dict(env), terminal=terminal)
        except BaseException:
            os.close(reader)
            os.close(writer)
            raise
        finally:
            os.close(its_in)
            os.close(its_out)
        self._diagnose = diagnose
        super().__init__(reader, writer, peer=peer, patience=patience)

    @property
    def pid(self) -> int:
        """The child's process id, for tests and messages."""
        return self._child.pid

    @property
    def status(self) -> int:
        """The exit code of a child that has ended; negative: the signal."""
        return self._child.status

    @property
    def stderr(self) -> str:
        """The last 64 KiB of the child's stderr so far."""
        return self._child.stderr()

    def has_ended(self, seconds: float) -> bool:
        """Whether the child has exited, waiting at most that long."""
        return self._child.wait(seconds)

    def end_error(self) -> Exception:
        """The error for a child that has exited too early."""
        return self._lost()

    def close(self, *, patience: float = 30.0) -> None:
        """End the stream, wait `patience` seconds for the child to exit, and raise an error for its exit status."""
        if self._reader < 0:
            return
        self.finish_writing()
        try:
            until = time.monotonic() + patience
            while self.read(1 << 16, patience=max(0.0, until - time.monotonic())):
                continue  # unread output would keep it from exiting
            if not self._child.wait(max(0.0, until - time.monotonic())):
                raise Unavailable(f"did not end within {patience:g} seconds", subject=self.peer)
            self._ended()
        finally:
            self.abort()
            self._close_descriptors()

    def abort(self) -> None:
        super().abort()
        self._child.end()

    def _lost(self) -> Exception:
        if self._child.wait(GRACE) and self._child.status != 0:
            return self._diagnose(self._child.status, self.stderr)
        return super()._lost()

    def _ended(self) -> None:
        if self._child.wait(GRACE) and self._child.status != 0:
            raise self._diagnose(self._child.status, self.stderr)


class _Child:
    """A running program and the thread that keeps it."""

    def __init__(self, argv: list[str], stdin: int, stdout: int, env: dict[str, str], *, terminal: bool) -> None:
        self.pid = 0
        self.status = 0
        self._said = bytearray()
        self._failure: BaseException | None = None
        self._started = threading.Event()
        self._ended = threading.Event()
        self._stop = Bell()
        start = partial(_start, argv, stdin, stdout, env=env, terminal=terminal)
        threading.Thread(target=self._keep, args=(start,), name=f"keeper of {argv[0]}", daemon=True).start()
        try:
            self._started.wait()
        except BaseException:
            self.end()
            raise
        if self._failure is not None:
            raise self._failure

    def wait(self, seconds: float) -> bool:
        """Wait at most that many seconds; whether it has exited."""
        return self._ended.wait(seconds)

    def end(self) -> None:
        """Terminate it: SIGTERM, then SIGKILL for it and its descendants when it does not exit."""
        self._stop.ring()

    def stderr(self) -> str:
        return bytes(self._said).decode("utf-8", "replace")

    # ---- the keeper's thread

    def _keep(self, start: Callable[[int], Any]) -> None:
        errors, its_errors = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(errors, False)
        try:
            command = start(its_errors)
            self.pid = command.process.pid
        except BaseException as error:  # noqa: BLE001 - raised again in the thread that waits for the child
            self._failure = error
            return
        finally:
            os.close(its_errors)
            self._started.set()
            if self._failure is not None:
                self._over(errors)
        try:
            self._collect(command.process, errors)
            self.status = command.wait().exit_code
            self._take(errors)
        finally:
            self._over(errors)

    def _over(self, errors: int) -> None:
        self._ended.set()
        self._stop.close()
        os.close(errors)

    def _collect(self, process: Any, errors: int) -> None:
        """Read stderr until the child exits; a ControlMaster that it left behind may hold stderr open for hours."""
        try:
            ended = os.pidfd_open(process.pid)
        except ProcessLookupError:  # ended and reaped
            return
        try:
            poll = select.poll()
            poll.register(errors, select.POLLIN)
            poll.register(self._stop, select.POLLIN)
            stop = self._stop.fileno()
            poll.register(ended, select.POLLIN)
            kill_at: float | None = None
            while process.is_alive()[0]:
                pause = None if kill_at is None else max(0.0, kill_at - time.monotonic()) * 1000
                ready = {fd for fd, _ in poll.poll(pause)}
                if ended in ready:
                    return
                if errors in ready and not self._take(errors):
                    poll.unregister(errors)
                if stop in ready:
                    poll.unregister(stop)
                    kill_at = time.monotonic() + GRACE
                    _signal(process, signal.SIGTERM)
                elif kill_at is not None and time.monotonic() >= kill_at:
                    _signal(process, signal.SIGKILL)
                    kill_at = None
        finally:
            os.close(ended)

    def _take(self, errors: int) -> bool:
        """Read what stderr has now; False at its end."""
        try:
            while piece := os.read(errors, 1 << 16):
                self._said += piece
                del self._said[:-STDERR_CAP]
        except BlockingIOError:
            return True
        return False


def _start(argv: list[str], stdin: int, stdout: int, stderr: int, *, env: dict[str, str], terminal: bool) -> Any:
    import sh  # takes 60 ms, and most commands do not need it

    streams: dict[str, Any] = {"_in": stdin, "_out": stdout, "_err": stderr}
    try:
        return sh.Command(argv[0])(
            *argv[1:],
            **streams,
            _tty_in=False,
            _tty_out=False,
            _encoding="utf-8",
            _env=env,
            _ok_code=tuple(range(-128, 256)),
            # With a terminal it must stay in our session, to ask there; then a Ctrl-C meant for us reaches it too.
            _new_session=not terminal,
            _new_group=False,
            _preexec_fn=_prepare_for_a_terminal if terminal else _prepare,
            _bg=True,
            _bg_exc=False,
            _return_cmd=True,
        )
    except (sh.ForkException, OSError) as error:
        raise ToolFailed("could not be started", argv=argv, status=126, stderr=str(error), subject=argv[0]) from error


def _prepare() -> None:
    """In the child, before exec. sh ignores SIGHUP, which ssh needs to end a ProxyCommand."""
    die_with_parent()
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def _prepare_for_a_terminal() -> None:
    """As _prepare, and ignore SIGINT: the parent ends the child in good order. While ssh asks, it handles SIGINT."""
    _prepare()
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _signal(process: Any, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        if process.pgid == process.pid:  # it leads its own session, so its group holds only its descendants
            os.killpg(process.pid, number)
        else:
            os.kill(process.pid, number)


def _pipe() -> tuple[int, int]:
    """Reading and writing end, as large as the kernel allows."""
    reader, writer = os.pipe2(os.O_CLOEXEC)
    with contextlib.suppress(OSError):  # /proc/sys/fs/pipe-user-pages-soft is used up: 64 KiB are enough
        fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, PIPE_SIZE)
    return reader, writer
