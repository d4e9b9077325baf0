"""Stops a process and its children before each system call that takes a path, by seccomp's user notification.

    child:   install the filter, hand its listener over, run `job`
    parent:  for each such call: resolve its paths, let `on_call` look or act, let the call continue

Threads and programs that the child starts are stopped as well. All other system calls run at full speed.
"""

from __future__ import annotations

import array
import ctypes
import fcntl
import os
import select
import signal
import socket
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tests.swaps.path_calls import AT_FDCWD, NEVER_FOLLOW, NO_FOLLOW, OPENS, TABLES

_SET_MODE_FILTER, _NEW_LISTENER, _WAIT_KILLABLE = 1, 8, 32
_RECEIVE, _SEND = 0xC0502100, 0xC0182101
_NOTICE = struct.Struct("=QIIiIQ6Q")
_ANSWER = struct.Struct("=QqiI")
_CONTINUE = 1
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_PATH_MAX = 4096
_PAGE = 4096
_LOOK_EVERY_MS = 200
_GIVE_UP_SECONDS = 120.0
"""Only a process that neither makes a call nor ends takes so long."""
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class LookedUp:
    """A path and the directory where its lookup starts: "/" or that of a descriptor."""

    start: str
    path: str

    def __str__(self) -> str:
        return f"{self.start.rstrip('/')}/{self.path.lstrip('/')}"


@dataclass(frozen=True, slots=True)
class Call:
    """One stopped call. thread: its id; name: of the system call; paths: as given, no link resolved.

    follows: whether a symbolic link at the end of a path is followed
    """

    thread: int
    name: str
    paths: tuple[LookedUp, ...]
    follows: bool


OnCall = Callable[[Call], int | None]


@dataclass(frozen=True, slots=True)
class Ended:
    """How the process ended. status: of exit, negative for a signal; stuck: the call in which it would wait forever."""

    status: int
    stuck: str | None


class _Filter(ctypes.Structure):
    _fields_ = (("code", ctypes.c_ushort), ("jt", ctypes.c_ubyte), ("jf", ctypes.c_ubyte), ("k", ctypes.c_uint))


class _Program(ctypes.Structure):
    _fields_ = (("len", ctypes.c_ushort), ("filter", ctypes.POINTER(_Filter)))


def _install() -> int:
    """Filter this process. The listener's descriptor."""
    architecture, seccomp, calls = TABLES[os.uname().machine]
    load, equal, give = 0x20, 0x15, 0x06
    allow, notify = 0x7FFF0000, 0x7FC00000
    lines = [(load, 0, 0, 4), (equal, 1, 0, architecture), (give, 0, 0, allow), (load, 0, 0, 0)]
    for number in sorted(calls):
        lines += [(equal, 0, 1, number), (give, 0, 0, notify)]
    lines.append((give, 0, 0, allow))
    program = _Program(len(lines), (_Filter * len(lines))(*(_Filter(*line) for line in lines)))
    listener = _libc.syscall(seccomp, _SET_MODE_FILTER, _NEW_LISTENER | _WAIT_KILLABLE, ctypes.byref(program))
    if listener < 0:
        raise OSError(ctypes.get_errno(), "seccomp: " + os.strerror(ctypes.get_errno()))
    return int(listener)


def supervise(job: Callable[[], int], on_call: OnCall) -> Ended:
    """Run `job` in a child; its value is the exit status.

    on_call: called while the child's thread stands still; a number that it returns is the error that the call gets
    """
    mine, theirs = socket.socketpair()
    pid = os.fork()
    if pid == 0:
        status = 125
        try:
            mine.close()
            os.setsid()
            _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            listener = _install()
            theirs.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [listener]))])
            os.close(listener)
            theirs.close()
            status = job()
        finally:
            os._exit(status)
    theirs.close()
    with mine:
        _, fds, _, _ = socket.recv_fds(mine, 1, 1)
    if not fds:
        os.waitpid(pid, 0)
        raise OSError("the kernel gives no listener for seccomp notifications")
    try:
        return _Supervisor(pid, fds[0], on_call).run()
    finally:
        os.close(fds[0])


class _Supervisor:
    def __init__(self, pid: int, listener: int, on_call: OnCall) -> None:
        self._pid = pid
        self._listener = listener
        self._on_call = on_call
        self._calls = TABLES[os.uname().machine][2]
        self._threads: dict[int, str] = {}
        self._waiting: set[tuple[int, str]] = set()

    def run(self) -> Ended:
        pidfd = os.pidfd_open(self._pid)
        poll = select.poll()
        poll.register(self._listener, select.POLLIN)
        poll.register(pidfd, select.POLLIN)
        quiet_since = time.monotonic()
        stuck = None
        try:
            while True:
                events = dict(poll.poll(_LOOK_EVERY_MS))
                if events.get(self._listener, 0) & select.POLLIN:
                    self._serve()
                    quiet_since = time.monotonic()
                elif pidfd in events:
                    break
                elif not events:
                    stuck = self._stuck_call()
                    if stuck is None and time.monotonic() - quiet_since > _GIVE_UP_SECONDS:
                        stuck = "no call for minutes"
                    if stuck is not None:
                        os.killpg(self._pid, signal.SIGKILL)
                        break
        finally:
            os.close(pidfd)
        status = os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])
        return Ended(status, stuck)

    def _serve(self) -> None:
        notice = bytearray(_NOTICE.size)
        try:
            fcntl.ioctl(self._listener, _RECEIVE, notice)
        except FileNotFoundError:  # killed meanwhile
            return
        identity, thread, _, call_number, _, _, *arguments = _NOTICE.unpack(notice)
        known = self._calls[call_number]
        number = None
        try:
            paths = tuple(
                path
                for directory, argument in known.paths
                if (path := _path(thread, None if directory is None else arguments[directory], arguments[argument]))
            )
        except (FileNotFoundError, ProcessLookupError):
            paths = ()
        if paths:
            call = Call(thread, known.name, paths, _follows(known.name, arguments))
            self._threads[thread] = f"{known.name} {paths[0]}"
            number = self._on_call(call)
        answer = (0, _CONTINUE) if number is None else (-number, 0)
        with suppress(FileNotFoundError):
            fcntl.ioctl(self._listener, _SEND, _ANSWER.pack(identity, 0, *answer))

    def _stuck_call(self) -> str | None:
        """A thread that waits in the same open, or the same read of a pipe with a name, as when we looked last."""
        numbers = {number for number, call in self._calls.items() if call.name in OPENS}
        reads = {0, 17, 19, 295} if os.uname().machine == "x86_64" else {63, 67, 65, 69}
        waiting = set()
        for thread, what in self._threads.items():
            try:
                words = Path(f"/proc/{thread}/syscall").read_text().split()
            except (FileNotFoundError, ProcessLookupError):
                continue
            if not words[0].isdigit():
                continue
            if int(words[0]) in numbers:
                waiting.add((thread, what))
            elif int(words[0]) in reads:
                with suppress(OSError):
                    target = _link(f"/proc/{thread}/fd/{int(words[1], 16)}")
                    if target.startswith("/") and not target.startswith("/dev/"):
                        waiting.add((thread, f"read {target}"))
        found = waiting & self._waiting
        self._waiting = waiting
        return next((what for _, what in sorted(found)), None)


def _follows(name: str, arguments: list[int]) -> bool:
    at = NO_FOLLOW.get(name)
    if at is None:
        return name not in NEVER_FOLLOW
    return not arguments[at[0]] & at[1]


def _path(thread: int, directory: int | None, address: int) -> LookedUp | None:
    """None for the empty path, which means the descriptor itself, and for none."""
    if address == 0:
        return None
    given = _string(thread, address)
    if not given:
        return None
    if given.startswith("/proc/self/"):
        given = f"/proc/{thread}/{given[len('/proc/self/') :]}"
    if given.startswith("/proc/"):
        return _through_proc(given)
    if given.startswith("/"):
        return LookedUp("/", given)
    number = AT_FDCWD if directory is None else ctypes.c_int(directory & 0xFFFFFFFF).value
    link = f"/proc/{thread}/cwd" if number == AT_FDCWD else f"/proc/{thread}/fd/{number}"
    return LookedUp(_link(link), given)


def _through_proc(given: str) -> LookedUp | None:
    """A name below /proc/N/fd/M; what ends there has no name that could be swapped."""
    parts = given.split("/", 5)
    if len(parts) < 6 or parts[3] not in ("fd", "cwd", "root"):
        return None
    try:
        return LookedUp(_link("/".join(parts[:5])), parts[5])
    except OSError:
        return None


def _link(path: str) -> str:
    return os.readlink(path)  # noqa: PTH115 - text, thousands of times


def _string(thread: int, address: int) -> str:
    memory = os.open(f"/proc/{thread}/mem", os.O_RDONLY)
    try:
        found = b""
        while len(found) < _PATH_MAX:
            # To the end of the page: the next one need not be mapped.
            piece = os.pread(memory, _PAGE - (address + len(found)) % _PAGE, address + len(found))
            end = piece.find(b"\0")
            if end >= 0:
                return os.fsdecode(found + piece[:end])
            found += piece
        return os.fsdecode(found)
    finally:
        os.close(memory)


def destination(looked_up: LookedUp, *, follow: bool) -> str:
    """Where a path leads. follow: also a symbolic link at its end."""
    whole = str(looked_up)
    if follow:
        return os.path.realpath(whole)
    return f"{os.path.realpath(os.path.dirname(whole))}/{os.path.basename(whole)}"  # noqa: PTH119, PTH120


def names_on_the_way(looked_up: LookedUp, *, below: str) -> Iterator[tuple[str, str, bool]]:
    """Each (directory, name, is_last) that the kernel looks up in directories below `below`, links followed.

    Directories are given without links. A name that does not exist ends it.
    """
    here = looked_up.start
    rest = [part for part in looked_up.path.split("/") if part not in ("", ".")]
    followed = 0
    while rest:
        name = rest.pop(0)
        if name == "..":
            here = os.path.dirname(here)  # noqa: PTH120
            continue
        full = f"{here.rstrip('/')}/{name}"
        if here == below or here.startswith(below + "/"):
            yield here, name, not rest
        elif not f"{below}/".startswith(full + "/") and ".." not in rest:
            return  # it leads away
        try:
            target = _link(full)
        except OSError:
            here = full
            continue
        followed += 1
        if followed > 40:
            return
        rest = [part for part in target.split("/") if part not in ("", ".")] + rest
        if target.startswith("/"):
            here = "/"
