"""Two processes by whose end the kernel stops a third one: at a deadline, or when somebody kills one of them.

    each guard   a timer of the kernel ends it by SIGKILL at the deadline, even one that is stopped or hangs
                 |  its end closes the write ends of its pipes
                 v
    read ends    of the same pipes, in the other guard and in itself, with O_ASYNC: the kernel sends SIGSTOP to the
                 target (fcntl F_SETOWN, F_SETSIG)

So nothing that stops the target needs to be scheduled, needs memory, a disk, a monitor or a network.  No order disarms
a guard: it can only be told of a later deadline.  Each guard has one pipe to itself whose write end has the lower
descriptor, and one whose read end has it: in whichever order a dying process closes them, one write end goes while its
read end is still there.  So the end of each guard stops the target without any other process.  The other guard is for
one that is killed and does not end, such as in a system call that waits for a broken disk.

Only a guard lets the target continue.  Its own end stops the target again, and comes at the deadline at the latest: so
it cannot do that after the deadline, and not in vain when the other one ends at the same moment.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import select
import signal
import socket
import struct
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, ClassVar

from snapchain.errors import NotFound, SnapchainError, Unavailable, Unsupported
from snapchain.host.detached import start_module
from snapchain.host.priority import spare_from_memory_shortage
from snapchain.host.process_identity import Identity, identity
from snapchain.host.readable import is_readable

_MODULE = "snapchain.host.deadman"
_START_SECONDS = 30.0
"""What a busy machine may need to start two Pythons."""
_END_SECONDS = 10.0
_HINT = "run it as root, or as the user of the guest's QEMU"
_SECOND_LATER = 0.2
"""Seconds by which the second guard outlives the first, which lets the target continue: one is left to notice."""
_ORDER = struct.Struct("<d?")
_READY = struct.Struct("<qqqq")


def clock() -> float:
    """Seconds since the boot, those of a suspended host included. All deadlines are in it."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def may_stand_still() -> bool:
    """Whether the clock may: this host is a virtual machine, as far as its processors tell, which may be frozen."""
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    except OSError:
        return False
    return " hypervisor" in flags


def is_stopped(process: Identity) -> bool:
    """Whether a process is stopped by SIGSTOP; False for one that has ended."""
    try:
        text = Path(f"/proc/{process[0]}/stat").read_text(encoding="ascii", errors="replace")
    except OSError:
        return False
    state, *fields = text.rpartition(")")[2].split()
    return state == "T" and int(fields[18]) == process[1]


def let_continue(process: Identity) -> None:
    """Send SIGCONT, where no guard shall stop the process any more."""
    _send(process, signal.SIGCONT)


def stop(process: Identity) -> None:
    """Send SIGSTOP to a process that has no guards. Raises Unsupported where that is not allowed."""
    _send(process, signal.SIGSTOP)


def _send(process: Identity, number: signal.Signals) -> None:
    """To this very process, if it has not ended."""
    try:
        fd = os.pidfd_open(process[0])
    except ProcessLookupError:
        return
    try:
        if identity(process[0]) == process:
            signal.pidfd_send_signal(fd, number)
    except ProcessLookupError:
        return
    except PermissionError as error:
        raise Unsupported(
            f"{number.name} may not be sent to the process", subject=f"process {process[0]}", hint=_HINT
        ) from error
    finally:
        os.close(fd)


def end(guards: Sequence[Identity]) -> None:
    """Kill guards, of this process or of an earlier one, and wait for their end: then their target is stopped.

    Raises Unavailable for one that does not end.
    """
    with ExitStack() as stack:
        fds = []
        for guard in guards:
            with suppress(ProcessLookupError):
                fd = os.pidfd_open(guard[0])
                stack.callback(os.close, fd)
                if identity(guard[0]) == guard:
                    fds.append(fd)
        for fd in fds:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(fd, signal.SIGKILL)
        until = time.monotonic() + _END_SECONDS
        for fd in fds:
            if not is_readable(fd, max(0.0, until - time.monotonic())):
                raise Unavailable("a process that guards the guest does not end", hint="is the kernel in order?")
    for guard in guards:
        with suppress(ChildProcessError):
            os.waitpid(guard[0], os.WNOHANG)


class Deadman:
    """The two guards of a process, for the process that knows the deadline. until: by `clock`

    guards: both, for `end`, also by a later process
    """

    def __init__(self, target: Identity, until: float) -> None:
        """Start them; they count when this returns. Raises NotFound without the target, Unavailable, Unsupported."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            try:
                first = start_module(_MODULE, _argument(target, until), fd=theirs.fileno())
            except BaseException:
                ours.close()
                raise
        self._control = ours
        try:
            ours.settimeout(_START_SECONDS)
            a, b, c, d = _ready(ours.recv(4096), target)
        except BaseException as error:
            ours.close()
            with suppress(ProcessLookupError, ChildProcessError):  # the second one ends when it notices
                os.kill(first, signal.SIGKILL)
                os.waitpid(first, 0)
            if isinstance(error, OSError):
                raise Unavailable("the processes that guard the guest do not start") from error
            raise
        self.guards: tuple[Identity, Identity] = ((a, b), (c, d))

    @property
    def works(self) -> bool:
        """Whether both run, as far as is known."""
        return all(identity(guard[0]) == guard for guard in self.guards)

    def extend(self, until: float, *, resumes: bool = False, timeout: float = 5.0) -> bool:
        """Tell both of a deadline. resumes: let the target continue then. Returns whether both have answered."""
        with suppress(OSError):
            self._control.settimeout(timeout)
            self._control.send(_ORDER.pack(until, resumes))
            while answer := self._control.recv(_ORDER.size):
                if answer == _ORDER.pack(until, resumes):  # not one to an order that was given up
                    return True
        return False

    def close(self) -> None:
        """Leave them alone: they stop the target at their deadline."""
        self._control.close()

    def end(self) -> None:
        """Kill both, which stops the target. Raises Unavailable."""
        self._control.close()
        end(self.guards)


def _argument(target: Identity, until: float, *, is_second: bool = False) -> str:
    return json.dumps({"target": target, "until": until, "is_second": is_second})


def _ready(data: bytes, target: Identity) -> tuple[int, int, int, int]:
    """What the first guard answers when both are. Raises as `Deadman`."""
    if len(data) != _READY.size:
        raise _start_failed(data, target)
    a, b, c, d = _READY.unpack(data)
    return a, b, c, d


def _start_failed(data: bytes, target: Identity) -> SnapchainError:
    words = data.decode(errors="replace")
    if words == "gone":
        return NotFound("the process that was to be guarded has ended", subject=f"process {target[0]}")
    return Unsupported(
        f"the processes that guard the guest could not be set up: {words or 'they ended'}",
        subject=f"process {target[0]}",
        hint=_HINT,
    )


# --- Their side.


def main(fd: int, argument: str) -> None:
    """A guard. The first one starts the second."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGPIPE):
        signal.signal(number, signal.SIG_IGN)
    os.chdir("/")
    os.closerange(fd + 1, min(_MOST_FDS, os.sysconf("SC_OPEN_MAX")))
    spare_from_memory_shortage()
    values = json.loads(argument)
    target = (values["target"][0], values["target"][1])
    control = socket.socket(fileno=fd)
    try:
        guard = _Second(target, values["until"], control) if values["is_second"] else _First(target, values["until"])
        control.send(guard.ready())
    except (OSError, SnapchainError) as error:
        with suppress(OSError):
            control.send(b"gone" if isinstance(error, ProcessLookupError) else str(error).encode()[:1000])
        return
    guard.work(control)


_MOST_FDS = 65536
_PLACES = (100, 101, 102, 103)
"""Descriptors of a guard that it shares with the other one: write, read, read, write end, each of another pipe."""
_OWN_PLACES = ((104, 105), (107, 106))
"""Write end and read end of its two pipes to itself."""


class _Guard:
    """What both have in common."""

    def __init__(self, target: Identity, until: float) -> None:
        self.timer = _KillTimer()
        self.timer.set(until)
        self.target = target
        self.pidfd = os.pidfd_open(target[0])
        if identity(target[0]) != target:
            raise ProcessLookupError

    def take(self, ends: Sequence[int]) -> None:
        """Put the pipes in their places, and let the kernel watch their read ends. Raises OSError.

        ends: as `_PLACES`; the guard owns them from now on
        """
        self.reads = (_PLACES[1], _PLACES[2])
        pairs = list(zip(ends, _PLACES, strict=True))
        for write_place, read_place in _OWN_PLACES:
            read, write = os.pipe()
            pairs += [(write, write_place), (read, read_place)]
        for end_, place in pairs:
            os.dup2(end_, place, inheritable=False)
            os.close(end_)
        for read in (*self.reads, *(read for _, read in _OWN_PLACES)):
            fcntl.fcntl(read, fcntl.F_SETOWN, self.target[0])
            fcntl.fcntl(read, fcntl.F_SETSIG, signal.SIGSTOP)
            fcntl.fcntl(read, fcntl.F_SETFL, fcntl.fcntl(read, fcntl.F_GETFL) | os.O_ASYNC)
        if identity(self.target[0]) != self.target:  # so its number was its own until now
            raise ProcessLookupError

    def is_alone(self) -> bool:
        """Whether the other guard has ended."""
        poll = select.poll()
        for read in self.reads:
            poll.register(read, select.POLLIN)
        return bool(poll.poll(0))

    def carry_out(self, until: float, *, resumes: bool) -> bool:
        """An order. Whether it was carried out."""
        _ = resumes
        self.timer.set(until)
        return True

    def work(self, control: socket.socket) -> None:
        """Until the other guard or the target ends. Without the one who orders, only the timer is left."""
        poll = select.poll()
        for fd in (control.fileno(), self.pidfd, *self.reads):
            poll.register(fd, select.POLLIN)
        while True:
            ready = {fd for fd, _ in poll.poll()}
            if ready & {self.pidfd, *self.reads}:
                return
            try:
                order = control.recv(_ORDER.size)
            except OSError:
                order = b""
            if len(order) != _ORDER.size:
                poll.unregister(control.fileno())
                continue
            until, resumes = _ORDER.unpack(order)
            if not self.carry_out(until, resumes=resumes):
                return
            with suppress(OSError):
                control.send(order)


class _First(_Guard):
    def __init__(self, target: Identity, until: float) -> None:
        super().__init__(target, until)
        pipes = [os.pipe() for _ in range(4)]
        (r1, w1), (r2, w2), (r3, w3), (r4, w4) = pipes
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            argument = _argument(target, until + _SECOND_LATER, is_second=True)
            self._second = start_module(_MODULE, argument, fd=theirs.fileno())
        self._other = ours
        ends = [w2, r1, r3, w4]
        socket.send_fds(ours, [b"\0"], ends)
        for fd in ends:
            os.close(fd)
        self.take([w1, r2, r4, w3])
        ours.settimeout(_START_SECONDS)
        data = ours.recv(4096)
        if len(data) != _READY.size:
            raise Unavailable(data.decode(errors="replace"))

    def ready(self) -> bytes:
        """Who both are."""
        first, second = identity(os.getpid()), identity(self._second)
        if first is None or second is None:
            raise Unavailable("one of them ended")
        return _READY.pack(*first, *second)

    def carry_out(self, until: float, *, resumes: bool) -> bool:
        self.timer.set(until)
        order = _ORDER.pack(until + _SECOND_LATER, False)
        try:
            self._other.settimeout(None)
            self._other.send(order)
            if self._other.recv(_ORDER.size) != order:
                return False
        except OSError:
            return False
        if resumes and not self.is_alone():
            signal.pidfd_send_signal(self.pidfd, signal.SIGCONT)
        return not self.is_alone()  # else it ended meanwhile, and this one ends too, which stops the target again


class _Second(_Guard):
    def __init__(self, target: Identity, until: float, control: socket.socket) -> None:
        super().__init__(target, until)
        _, ends, _, _ = socket.recv_fds(control, 1, len(_PLACES))
        self.take(ends)

    def ready(self) -> bytes:
        """That it is."""
        return _READY.pack(0, 0, 0, 0)


class _KillTimer:
    """A timer of the kernel that kills this process, stopped or not. Raises OSError."""

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._id = ctypes.c_void_p()
        event = _Event(None, signal.SIGKILL, _SIGEV_SIGNAL)
        self._check(self._libc.timer_create(time.CLOCK_BOOTTIME, ctypes.byref(event), ctypes.byref(self._id)))

    def set(self, at: float) -> None:
        """at: by `clock`; a time that has passed kills it at once."""
        nanoseconds = max(1, int(at * 1e9))
        value = _Interval(_Time(0, 0), _Time(*divmod(nanoseconds, 10**9)))
        self._check(self._libc.timer_settime(self._id, _TIMER_ABSTIME, ctypes.byref(value), None))

    @staticmethod
    def _check(status: int) -> None:
        if status:
            raise OSError(ctypes.get_errno(), f"timer: {os.strerror(ctypes.get_errno())}")


_SIGEV_SIGNAL, _TIMER_ABSTIME = 0, 1


class _Event(ctypes.Structure):
    """struct sigevent; see sigevent(7)."""

    _fields_: ClassVar[Any] = [
        ("value", ctypes.c_void_p),
        ("signo", ctypes.c_int),
        ("notify", ctypes.c_int),
        ("rest", ctypes.c_char * 48),
    ]


class _Time(ctypes.Structure):
    """struct timespec."""

    _fields_: ClassVar[Any] = [("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long)]


class _Interval(ctypes.Structure):
    """struct itimerspec."""

    _fields_: ClassVar[Any] = [("interval", _Time), ("value", _Time)]
