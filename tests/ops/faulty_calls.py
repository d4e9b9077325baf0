"""Faults at every system call that changes something: a forked child dies, or is told of an error, at its n-th one.

Every such call of snapchain goes through a function of `os` or `fcntl`, which the child counts; that none goes by
another way is held against strace in test_merge_crash.py.
"""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import traceback
from collections.abc import Callable, Iterator
from enum import Enum
from pathlib import Path
from typing import Any

from snapchain.errors import SnapchainError
from snapchain.host.records import made_key
from snapchain.image import threads
from tests.exhaustive import EXHAUSTIVE

CALLS = (
    "open", "write", "pwrite", "pwritev", "writev", "ftruncate", "truncate", "posix_fallocate", "copy_file_range",
    "fsync", "fdatasync", "link", "symlink", "rename", "replace", "unlink", "remove", "rmdir", "mkdir", "chmod",
    "fchmod", "chown", "fchown", "utime", "setxattr",
)  # fmt: skip
FICLONERANGE = 0x4020940D
_FINISHED, _REFUSED, _FAULTED, _WRONG = 0, 1, 3, 4


class Fault(Enum):
    """What happens at the n-th call."""

    KILL = "killed before it"
    TORN = "killed in the middle of it"
    ENOSPC = errno.ENOSPC
    EIO = errno.EIO


class End(Enum):
    """How the child ended that met the fault."""

    KILLED = "killed"
    REFUSED = "refused"
    FINISHED = "finished all the same"


def met(function: Callable[[], object], fault: Fault, *, each: int = 1, limit: int = 400) -> Iterator[tuple[str, End]]:
    """Yields after each fault, with where it was; ends with the first child that met none, so did everything.

    The caller puts everything back before it goes on.  A child that fails but by an error of snapchain fails the test.
    each: of a test marked `sampled`: without EXHAUSTIVE only one in so many calls meets its fault, each kind of fault
    beginning at another call
    """
    made_key()  # the faults are for what every run does
    step = 1 if EXHAUSTIVE else each
    first = 1 + list(Fault).index(fault) % step
    for at in range(first, limit, step):
        place, end = _met_at(function, fault, at)
        if end is None:
            assert at > 10, "hardly anything was ever called"
            return
        yield place, end
    raise AssertionError("too many calls")


def killed_before(function: Callable[[], object], directory: Path, name: str, nth: int = 1) -> None:
    """The function dies before its n-th call of this name. directory: all that it changes, plain files."""
    before = {path: path.read_bytes() for path in directory.iterdir()}
    calls = counted(function)
    for path in directory.iterdir():
        path.unlink()
    for path, data in before.items():
        path.write_bytes(data)
    at = [number for number, each in enumerate(calls, 1) if each == name][nth - 1]
    assert _met_at(function, Fault.KILL, at) == (f"KILL at call {at}: {name}", End.KILLED)


def _met_at(function: Callable[[], object], fault: Fault, at: int) -> tuple[str, End | None]:
    """Where the fault was and how the child ended; None for one that made fewer calls, so did everything."""
    where, back = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(where)
        os._exit(_child(function, fault, at, back))
    os.close(back)
    with os.fdopen(where, "rb") as said:
        name = said.read().decode()
    _, status = os.waitpid(pid, 0)
    place = f"{fault.name} at call {at}: {name}"
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL, place
        return place, End.KILLED
    if os.WEXITSTATUS(status) == _REFUSED:
        return place, End.REFUSED
    if os.WEXITSTATUS(status) == _FAULTED:
        return place, End.FINISHED
    assert os.WEXITSTATUS(status) == _FINISHED, f"failed otherwise: {place}"
    return place, None


def counted(function: Callable[[], object]) -> list[str]:
    """The names of the calls that it makes, in order."""
    made_key()
    seen: list[str] = []
    where, back = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(where)
        threads.AT_MOST = 1

        def note(name: str) -> bool:
            seen.append(name)
            return False

        _install(note, lambda *_: None)
        try:
            function()
            os.write(back, "\n".join(seen).encode())
        except BaseException:  # noqa: BLE001 - the child must not run pytest's own clean-up
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    os.close(back)
    with os.fdopen(where, "rb") as said:
        names = said.read().decode().split()
    assert os.waitpid(pid, 0)[1] == 0
    return names


def _child(function: Callable[[], object], fault: Fault, at: int, back: int) -> int:
    threads.AT_MOST = 1
    done = 0
    real_write = os.write

    def due(name: str) -> bool:
        nonlocal done
        done += 1
        if done == at:
            real_write(back, name.encode())
            os.close(back)
        return done == at

    def strike(real: Callable[..., Any], name: str, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        if fault is Fault.TORN:
            _half(real, name, arguments, named)
        if fault in {Fault.KILL, Fault.TORN}:
            os.kill(os.getpid(), signal.SIGKILL)
        raise OSError(fault.value, os.strerror(fault.value))

    _install(due, strike)
    try:
        function()
    except SnapchainError:
        return _REFUSED if done >= at else _WRONG
    except BaseException:  # noqa: BLE001 - the child must not run pytest's own clean-up
        traceback.print_exc()
        return _WRONG
    return _FAULTED if done >= at else _FINISHED


def _half(real: Callable[..., Any], name: str, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
    """As much as a kernel may have done of a call when the power goes."""
    if name in {"write", "pwrite"}:
        data = memoryview(arguments[1]).cast("B")
        real(arguments[0], data[: len(data) // 2], *arguments[2:], **named)
    elif name == "copy_file_range":
        real(arguments[0], arguments[1], max(arguments[2] // 2, 1), *arguments[3:], **named)
    elif name not in {"pwritev", "writev"}:
        real(*arguments, **named)


Strike = Callable[[Callable[..., Any], str, tuple[Any, ...], dict[str, Any]], None]


def _install(due: Callable[[str], bool], strike: Strike) -> None:
    def wrapped(real: Callable[..., Any], name: str) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            if _changes(name, arguments) and due(name):
                strike(real, name, arguments, named)
            return real(*arguments, **named)

        return call

    for name in CALLS:
        setattr(os, name, wrapped(getattr(os, name), name))
    vars(fcntl)["ioctl"] = wrapped(fcntl.ioctl, "ioctl")


def _changes(name: str, arguments: tuple[Any, ...]) -> bool:
    if name == "open":
        # A file without a name (O_TMPFILE, of which O_DIRECTORY is a part) changes nothing that anybody sees.
        flags = arguments[1]
        return bool(flags & os.O_CREAT) and not flags & os.O_DIRECTORY
    if isinstance(arguments[0], int) and str(Path(f"/proc/self/fd/{arguments[0]}").readlink()).startswith("/memfd:"):
        return False
    return name != "ioctl" or arguments[1] == FICLONERANGE
