"""A process gives up its rights: afterwards it can compute, and use the files and sockets that it has open.

all               no new privileges; dies with its parent; limits: memory, processor time, no files, no processes
root              becomes an unprivileged user, in a network namespace of its own
any other user    a user and a network namespace of its own, where the kernel allows that
x86-64, ARM64     a system call filter: only calls on what is open already, on memory, time and signals.
                  open, socket, exec, kill and all others fail
"""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import signal
import struct

NOBODY = 65534
MEMORY = 1 << 30
"""Bytes of address space."""
PROCESSOR = 12 * 3600
"""Seconds: a backstop. The parent's patience ends what hangs long before."""

_PR_SET_PDEATHSIG, _PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _FILTER = 1, 38, 22, 2
_NEW_USER, _NEW_NETWORK, _NEW_IPC = 0x10000000, 0x40000000, 0x08000000
_ALLOW, _EPERM, _KILL = 0x7FFF0000, 0x00050001, 0x80000000

# read write close fstat lseek mmap mprotect munmap brk rt_sigaction rt_sigprocmask rt_sigreturn readv writev
# sched_yield mremap madvise getpid exit gettid futex clock_gettime clock_nanosleep exit_group getrandom
# restart_syscall sigaltstack gettimeofday; poll or ppoll
_CALLS = {
    "x86_64": (
        0xC000003E,
        (0, 1, 3, 5, 7, 8, 9, 10, 11, 12, 13, 14, 15, 19, 20, 24, 25, 28, 39, 60, 96, 131, 186, 202, 219, 228, 230,
         231, 271, 318, 334),
    ),
    "aarch64": (
        0xC00000B7,
        (57, 62, 63, 64, 65, 66, 73, 80, 93, 94, 98, 113, 115, 124, 128, 132, 134, 135, 139, 169, 172, 178, 214,
         215, 216, 222, 226, 233, 278, 293),
    ),
}  # fmt: skip


class NotConfined(Exception):
    """A right could not be given up."""


def confine(parent: int) -> None:
    """Give up the rights of this process, for good. parent: its process id. Raises NotConfined."""
    libc = ctypes.CDLL(None, use_errno=True)

    def call(name: str, *arguments: int) -> None:
        if getattr(libc, name)(*map(ctypes.c_ulong, arguments)) != 0:
            raise NotConfined(f"{name}: {os.strerror(ctypes.get_errno())}")

    call("prctl", _PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it has ended before the line above
        raise NotConfined("the parent has ended")
    call("prctl", _PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    has_namespace = True
    try:
        call("unshare", (0 if os.geteuid() == 0 else _NEW_USER) | _NEW_NETWORK | _NEW_IPC)
    except NotConfined:  # containers, and systems that allow users no namespaces
        has_namespace = False
    if os.geteuid() == 0:
        try:
            os.setgroups([])
            os.setresgid(NOBODY, NOBODY, NOBODY)
            os.setresuid(NOBODY, NOBODY, NOBODY)
        except OSError as error:
            raise NotConfined(f"root cannot become another user: {error.strerror}") from error
        call("prctl", _PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)  # a change of user has undone it
    for limit, value in (
        (resource.RLIMIT_AS, MEMORY),
        (resource.RLIMIT_CPU, PROCESSOR),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NPROC, 0),
        (resource.RLIMIT_NOFILE, 16),
    ):
        hard = resource.getrlimit(limit)[1]
        least = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(limit, (least, least))
    machine = platform.machine()
    if machine in _CALLS:
        _filter(libc, *_CALLS[machine])
    elif not has_namespace:
        raise NotConfined(f"no network namespace, and no system call filter for {machine}")


def _filter(libc: ctypes.CDLL, architecture: int, allowed: tuple[int, ...]) -> None:
    """Install the system call filter: a program of BPF over struct seccomp_data."""

    def line(code: int, value: int, yes: int = 0, no: int = 0) -> bytes:
        return struct.pack("=HBBI", code, yes, no, value)

    load, equal, above, answer = 0x20, 0x15, 0x35, 0x06
    program = [
        line(load, 4),
        line(equal, architecture, 1, 0),
        line(answer, _KILL),
        line(load, 0),
        line(above, 0x40000000, len(allowed), 0),  # calls of x32
        *(line(equal, number, len(allowed) - at, 0) for at, number in enumerate(allowed)),
        line(answer, _EPERM),
        line(answer, _ALLOW),
    ]
    code = ctypes.create_string_buffer(b"".join(program))
    described = ctypes.create_string_buffer(struct.pack("@HP", len(program), ctypes.addressof(code)))
    if libc.prctl(_PR_SET_SECCOMP, ctypes.c_ulong(_FILTER), ctypes.c_ulong(ctypes.addressof(described)), 0, 0) != 0:
        raise NotConfined(f"seccomp: {os.strerror(ctypes.get_errno())}")
