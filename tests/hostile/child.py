"""One case in a process of its own, forked from an interpreter that has loaded everything: its limits, its end.

The child runs commands by `snapchain.cli.main`, as a user would, and notes what came of each in a file of lines, so
that also what a killed child did is known.
"""

from __future__ import annotations

import faulthandler
import gc
import io
import json
import os
import resource
import select
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from snapchain.cli import main

MiB = 1 << 20
LARGEST_RSS = 400 * MiB
CPU_SECONDS = 40
WALL_SECONDS = 120.0
"""Nothing here waits, so that only what hangs takes so long, however busy the machine."""
ADDRESS_SPACE = 6 << 30
LARGEST_FILE = 1 << 40
LONGEST_OUTPUT = 16 << 20
"""Bytes that are kept of what a command prints: 20,000 points as JSON take half of it."""


@dataclass(frozen=True)
class Step:
    """One command. code: None where it did not come to its end; out, err: what it printed"""

    words: tuple[str, ...]
    code: int | None
    out: str = ""
    err: str = ""

    def json(self) -> dict[str, object]:
        """What `--json` printed. Raises ValueError for anything but one object."""
        found = json.loads(self.out)
        if not isinstance(found, dict):
            raise ValueError("not an object")  # noqa: TRY004 -- of JSON, not of Python
        return found


@dataclass(frozen=True)
class Outcome:
    """How a child ended. signal: 0 for none; failure: a traceback of the case itself; rss: bytes, its children's too"""

    steps: tuple[Step, ...]
    hung: bool
    signal: int
    failure: str
    rss: int
    cpu_seconds: float
    stacks: str = ""
    found: tuple[str, ...] = field(default=())


class Shell:
    """Runs commands in the child, and notes what came of them."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._log = (directory / "steps").open("a")
        self.found: list[str] = []
        self._count = 0

    def run(self, *words: str | Path, stdin: Path | None = None) -> Step:
        argv = tuple(map(str, words))
        self._note({"begun": argv})
        self._count += 1
        out, err = (self._directory / f"{name}.{self._count}" for name in ("out", "err"))
        with _redirected(stdin, out, err):
            code = main(argv)
        done = Step(argv, code, _text(out), _text(err))
        self._note({"ended": [done.words, done.code, done.out, done.err]})
        return done

    def blame(self, words: str) -> None:
        """Note a fault that the case itself has seen."""
        self._note({"found": words})

    def _note(self, line: dict[str, object]) -> None:
        self._log.write(json.dumps(line) + "\n")
        self._log.flush()


def run(case: Callable[[Shell], None], directory: Path, *, wall: float = WALL_SECONDS, limited: bool = True) -> Outcome:
    """Run a case in a child and wait for its end. directory: for its notes; empty."""
    directory.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        _child(case, directory, wall, limited=limited)
    watched = os.pidfd_open(pid)
    try:
        poll = select.poll()
        poll.register(watched, select.POLLIN)
        hung = not poll.poll(wall * 1000)
        if hung:
            os.kill(pid, signal.SIGKILL)
        _, status, usage = os.wait4(pid, 0)
    finally:
        os.close(watched)
    steps, found = _steps(directory / "steps")
    return Outcome(
        steps=steps,
        hung=hung,
        signal=os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0,
        failure=_text(directory / "failure"),
        rss=usage.ru_maxrss * 1024,
        cpu_seconds=usage.ru_utime + usage.ru_stime,
        stacks=_text(directory / "stacks"),
        found=found,
    )


def _child(case: Callable[[Shell], None], directory: Path, wall: float, *, limited: bool) -> None:
    status = 1
    try:
        os.setsid()
        gc.freeze()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        if limited:
            resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS + 5))
            resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
            resource.setrlimit(resource.RLIMIT_FSIZE, (LARGEST_FILE, LARGEST_FILE))
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        stacks = (directory / "stacks").open("w")
        faulthandler.enable(stacks)
        faulthandler.dump_traceback_later(wall * 0.9, file=stacks)
        threading.excepthook = _thread_failed(directory)
        case(Shell(directory))
        status = 0
    except BaseException:  # noqa: BLE001 -- told to the parent
        (directory / "failure").write_text(traceback.format_exc())
    finally:
        os._exit(status)


def _thread_failed(directory: Path) -> Callable[[threading.ExceptHookArgs], None]:
    def failed(arguments: threading.ExceptHookArgs) -> None:
        words = "".join(traceback.format_exception(arguments.exc_type, arguments.exc_value, arguments.exc_traceback))
        (directory / "failure").write_text(f"in a thread: {words}")

    return failed


class _redirected:  # noqa: N801 -- used as a word of `with`
    """The standard streams go to files. Not by contextlib: the file descriptors too, since commands use those."""

    def __init__(self, stdin: Path | None, out: Path, err: Path) -> None:
        self._places = (stdin or Path(os.devnull), out, err)

    def __enter__(self) -> None:
        self._saved = [os.dup(number) for number in range(3)]
        self._streams = sys.stdin, sys.stdout, sys.stderr
        for number, place in enumerate(self._places):
            flags = os.O_RDONLY if number == 0 else os.O_RDWR | os.O_CREAT | os.O_APPEND
            fd = os.open(place, flags, 0o600)
            os.dup2(fd, number)
            os.close(fd)
        sys.stdin, sys.stdout, sys.stderr = (
            io.TextIOWrapper(io.FileIO(number, mode, closefd=False), write_through=number > 0)
            for number, mode in enumerate("rww")
        )

    def __exit__(self, *_: object) -> None:
        sys.stdin, sys.stdout, sys.stderr = self._streams
        for number, saved in enumerate(self._saved):
            os.dup2(saved, number)
            os.close(saved)


def _text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return file.read(LONGEST_OUTPUT).decode("utf-8", "replace")
    except FileNotFoundError:
        return ""


def _steps(path: Path) -> tuple[tuple[Step, ...], tuple[str, ...]]:
    steps: list[Step] = []
    found: list[str] = []
    begun: Sequence[str] | None = None
    for line in _lines(path):
        noted = json.loads(line)
        if "begun" in noted:
            begun = noted["begun"]
        elif "found" in noted:
            found.append(noted["found"])
        else:
            words, code, out, err = noted["ended"]
            steps.append(Step(tuple(words), code, out, err))
            begun = None
    if begun is not None:
        steps.append(Step(tuple(begun), None))
    return tuple(steps), tuple(found)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except FileNotFoundError:
        return []


def now() -> float:
    """Seconds of a clock that does not jump (clock.py)."""
    return time.perf_counter()
