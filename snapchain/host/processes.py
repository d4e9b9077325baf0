"""The one door to other programs.

An argument list goes in, never a shell string; exit status and bounded output come out.  The child gets no
terminal, a minimal environment, `LC_ALL=C`, no inherited descriptors, resource limits, and it dies with us:
on Ctrl-C and on a time-out it is killed and reaped, and the kernel kills it when we are killed.

    done = run(["qemu-img", "info", ...], limits=Limits(address_space=2 << 30))
    done.status, done.stdout, done.stderr

Only this package imports `sh`.  Limits are set by `prlimit` (util-linux) as the first program of the child:
set between fork and exec they would hold Python itself to them.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import threading
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from snapchain.errors import InvalidInput, ToolFailed
from snapchain.host import process_limits

MiB = 1 << 20
DEFAULT_OUTPUT_CAP = 64 * MiB
STDERR_CAP = 64 << 10

# Debian's and Ubuntu's package for each program that snapchain knows.
_PACKAGES = {
    "qemu-img": "qemu-utils",
    "qemu-io": "qemu-utils",
    "qemu-nbd": "qemu-utils",
    "qemu-storage-daemon": "qemu-system-common",
    "nbdkit": "nbdkit",
    "ssh": "openssh-client",
    "virsh": "libvirt-clients",
    "prlimit": "util-linux",
}

# Signals by which a limit ends a program, said in the limit's words.
_LIMIT_SIGNALS = {signal.SIGXCPU: "CPU time limit", signal.SIGXFSZ: "file size limit"}

_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class Limits:
    """What a child may use at most; None leaves a resource as it is.

    address_space: bytes of virtual memory (RLIMIT_AS); cpu_seconds: RLIMIT_CPU, SIGXCPU past it;
    open_files: RLIMIT_NOFILE; file_size: bytes of any file written (RLIMIT_FSIZE).
    No core file is ever written.
    """

    address_space: int | None = None
    cpu_seconds: int | None = None
    open_files: int | None = 256
    file_size: int | None = None

    def arguments(self) -> list[str]:
        """As options of prlimit(1)."""
        named = {
            "as": self.address_space,
            "cpu": self.cpu_seconds,
            "nofile": self.open_files,
            "fsize": self.file_size,
            "core": 0,
        }
        return [f"--{name}={value}" for name, value in named.items() if value is not None]


@dataclass(frozen=True, slots=True)
class Completed:
    """A program that ended with an allowed exit status. stdout: its bytes; stderr: its text, cut at 64 KiB."""

    argv: tuple[str, ...]
    status: int
    stdout: bytes
    stderr: str


def run(
    argv: Sequence[str],
    *,
    ok: Container[int] = (0,),
    stdin: bytes | None = None,
    timeout: float | None = None,
    limits: Limits | None = None,
    env: Mapping[str, str] | None = None,
    output_cap: int = DEFAULT_OUTPUT_CAP,
    on_stdout: Callable[[bytes], None] | None = None,
) -> Completed:
    """Run a program to its end.

    timeout: seconds, then SIGKILL; env: added to the minimal environment; output_cap: bytes of stdout kept, one
    more is a failure; on_stdout: gets each piece of stdout as it comes, from another thread, and nothing is kept.
    Raises ToolFailed for a missing program, an exit status outside `ok`, death by a signal, a time-out or too
    much output; InvalidInput for an argument that no program can be given.
    """
    import sh  # 60 ms, which most commands can do without

    command = _commandline(argv, limits)
    out = _Sink(output_cap, on_stdout)
    err = _Sink(None, None)
    streams: dict[str, Any] = {"_in": stdin or b"", "_out": out, "_err": err}
    child: Any = None
    deadline: _Deadline | None = None
    try:
        with held_back():
            child = sh.Command(command[0])(
                *command[1:],
                **streams,
                _out_bufsize=64 << 10,
                _err_bufsize=64 << 10,
                _tty_in=False,
                _tty_out=False,
                _encoding="utf-8",
                _env=minimal_environment(env),
                _ok_code=tuple(range(-128, 256)),
                _new_session=True,  # a Ctrl-C at the terminal reaches us alone: we end the child in good order
                _preexec_fn=die_with_parent,
                _bg=True,
                _bg_exc=False,
                _return_cmd=True,
            )
        out.kill = child.process.kill
        deadline = _Deadline(child.process, timeout)
        status = child.wait().exit_code
    except BaseException as error:
        if child is not None:
            _end(child.process)
        elif isinstance(error, (sh.ForkException, OSError)):
            raise _failure("could not be started", argv, 126, str(error)) from error
        raise
    finally:
        if deadline is not None:
            deadline.cancel()
    stderr = bytes(err.data).decode("utf-8", "replace")
    if out.error is not None:
        raise out.error
    if out.full:
        raise _failure(f"wrote more than {output_cap} bytes", argv, status, stderr)
    if deadline.passed:
        raise _failure(f"did not end within {timeout:g} seconds", argv, status, stderr)
    if status not in ok:
        raise _failure(_how_it_ended(status, stderr), argv, status, stderr)
    return Completed(tuple(argv), status, bytes(out.data), stderr)


class _Deadline:
    """Kills a child, and what it has started, after so many seconds; None: never.

    sh has an option for it, but looks 10 times a second whether the child has ended: with it no program, virsh for
    one, takes less than 100 ms.
    """

    def __init__(self, process: Any, seconds: float | None) -> None:
        self.passed = False
        self._process = process
        self._timer = None if seconds is None else threading.Timer(seconds, self._kill)
        if self._timer is not None:
            self._timer.daemon = True
            self._timer.start()

    def cancel(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _kill(self) -> None:
        if self._process.exit_code is None:  # else it has ended, and what it left behind may go on
            self.passed = True
            _end_group(self._process)


class _Sink:
    """Takes a stream's pieces: keeps them up to a cap, or hands them on. Past the cap the child is killed."""

    def __init__(self, cap: int | None, hand_on: Callable[[bytes], None] | None) -> None:
        self.data = bytearray()
        self.full = False
        self.error: BaseException | None = None
        self.kill: Callable[[], None] | None = None
        self._cap = cap
        self._hand_on = hand_on

    def write(self, piece: bytes) -> None:
        if self._hand_on is not None:
            self._pass_on(piece)
            return
        room = (STDERR_CAP if self._cap is None else self._cap) - len(self.data)
        self.data += piece[: max(room, 0)]
        if self._cap is not None and len(piece) > room:
            self.full = True
            self._stop()

    def _pass_on(self, piece: bytes) -> None:
        if self.error is None and self._hand_on is not None:
            try:
                self._hand_on(piece)
            except BaseException as error:  # noqa: BLE001 - raised again by run(), in the caller's thread
                self.error = error
        if self.error is not None:
            self._stop()

    def _stop(self) -> None:
        if self.kill is not None:
            with suppress(ProcessLookupError):
                self.kill()


def _commandline(argv: Sequence[str], limits: Limits | None) -> list[str]:
    for argument in argv:
        if "\0" in argument or _unencodable(argument):
            raise InvalidInput("a program cannot be given this name", subject=repr(argument))
    program = find_program(argv[0], argv)
    limits = limits or Limits(open_files=None)
    bounds = limits.arguments() + (process_limits.for_children() if limits.open_files is None else [])
    return [find_program("prlimit", argv), *bounds, "--", program, *argv[1:]]


def _unencodable(argument: str) -> bool:
    try:
        argument.encode("utf-8")
    except UnicodeEncodeError:
        return True
    return False


def find_program(program: str, argv: Sequence[str]) -> str:
    """The path of a program on PATH. Raises ToolFailed, which names its package."""
    found = shutil.which(program)
    if found is None:
        package = _PACKAGES.get(program)
        hint = f"apt-get install {package}" if package else None
        raise ToolFailed("not installed", argv=argv, status=127, stderr="", subject=program, hint=hint)
    return found


def minimal_environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """What a child gets of our environment, in the C locale, with `extra`."""
    inherited = {name: os.environ[name] for name in ("PATH", "HOME", "TMPDIR", "USER") if name in os.environ}
    return {**inherited, "LC_ALL": "C", **(extra or {})}


def die_with_parent() -> None:
    """In the child, before exec: a killed snapchain must not leave a writer behind that holds locks."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def _end(process: Any) -> None:
    """Kill and reap the child of an interrupted run()."""
    with suppress(ProcessLookupError):
        process.kill()
    _end_group(process)
    process.wait()


def _end_group(process: Any) -> None:
    """What the child itself has started: it leads a session of its own, so its group holds nobody else."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


def _how_it_ended(status: int, stderr: str) -> str:
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    said = f": {lines[-1]}" if lines else ""
    if status < 0:
        name = signal.Signals(-status).name if -status in set(signal.Signals) else f"signal {-status}"
        reason = _LIMIT_SIGNALS.get(signal.Signals(-status)) if -status in set(signal.Signals) else None
        return f"was ended by {name}" + (f" ({reason})" if reason else "") + said
    return f"ended with exit status {status}{said}"


def _failure(what: str, argv: Sequence[str], status: int, stderr: str) -> ToolFailed:
    return ToolFailed(what, argv=argv, status=status, stderr=stderr, subject=Path(argv[0]).name)


# --- Ctrl-C, SIGTERM and SIGHUP are deferred while a program starts, until the code that ends it knows the process.
#
# KeyboardInterrupt can be raised anywhere, also halfway through starting a program: then no code could end it.
# Raised in a fork callback (logging has one), it is printed and lost, so that Ctrl-C has no effect.

_NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextmanager
def held_back() -> Iterator[None]:
    """A signal that comes during the block takes effect at its end. Outside of the main thread none ever does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    # What was installed by other means than Python's cannot be put back.
    before = {number: handler for number in _NUMBERS if (handler := signal.getsignal(number)) is not None}
    came: list[int] = []
    try:
        for number in before:
            signal.signal(number, lambda number, _frame: came.append(number))
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if came:
            signal.raise_signal(came[0])
