"""A process that gave up its rights cannot open, connect, start or signal anything, nor take more memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.waiting import HANG

PROGRAM = """
import ctypes, json, os, resource, signal, socket, sys
reader, writer = os.pipe()
before = os.open("/etc/hostname", os.O_RDONLY)
parent = os.getppid()
def tried(work):
    try:
        work()
    except OSError as error:
        return error.errno
    except MemoryError:
        return "memory"
    return "done"
libc = ctypes.CDLL(None, use_errno=True)
def traced():
    if libc.ptrace(16, parent, 0, 0):
        raise OSError(ctypes.get_errno(), "ptrace")
work = {
    "open": lambda: os.open("/etc/passwd", os.O_RDONLY),
    "stat": lambda: os.stat("/etc/passwd"),
    "create": lambda: os.open("/tmp/evil", os.O_WRONLY | os.O_CREAT),
    "unlink": lambda: os.unlink("/etc/hostname"),
    "socket": lambda: socket.socket(socket.AF_INET, socket.SOCK_STREAM),
    "unix": lambda: socket.socket(socket.AF_UNIX, socket.SOCK_STREAM),
    "fork": os.fork,
    "exec": lambda: os.execv("/bin/true", ["true"]),
    "kill": lambda: os.kill(parent, 0),
    "ptrace": traced,
    "mount": lambda: os.chroot("/"),
    "memory": lambda: bytearray(2 << 30),
}
allowed = {"write": lambda: os.write(writer, b"x"), "read": lambda: os.read(before, 4), "memory": lambda: bytearray(99)}
from snapchain.files.confinement import confine
confine(parent)
found = {name: tried(each) for name, each in work.items()}
fine = {name: tried(each) for name, each in allowed.items()}
print(json.dumps([found, fine]))
"""


@pytest.fixture(scope="module")
def after() -> Any:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=HANG, check=True)
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    "what", ["open", "stat", "create", "unlink", "socket", "unix", "fork", "exec", "kill", "ptrace", "mount", "memory"]
)
def test_what_it_cannot_do(after: Any, what: str) -> None:
    assert after[0][what] == ("memory" if what == "memory" else 1)  # EPERM


def test_what_it_can_do(after: Any) -> None:
    assert after[1] == {"write": "done", "read": "done", "memory": "done"}


WAITING = """
import os, sys
from snapchain.files.confinement import confine
confine(os.getppid())
os.write(1, b"x")
os.read(0, 1)
"""


@pytest.mark.root
def test_root_becomes_nobody_without_capabilities() -> None:
    with subprocess.Popen([sys.executable, "-c", WAITING], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stdout.read(1) == b"x"
        lines = Path(f"/proc/{child.pid}/status").read_text().splitlines()
        status = {name: value.split() for name, _, value in (line.partition(":") for line in lines)}
        networks = {str(Path(f"/proc/{each}/ns/net").readlink()) for each in (child.pid, "self")}
        child.kill()
    assert (status["Uid"], status["Gid"], status["Groups"]) == (["65534"] * 4, ["65534"] * 4, [])
    assert {int(status[name][0], 16) for name in ("CapInh", "CapPrm", "CapEff", "CapAmb")} == {0}
    assert (status["NoNewPrivs"], status["Seccomp"]) == (["1"], ["2"])
    assert len(networks) == 2


def test_it_does_not_outlive_a_parent_that_has_gone() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "from snapchain.files.confinement import confine\nconfine(1 << 22)"],
        capture_output=True,
        text=True,
        timeout=HANG,
        check=False,
    )
    assert "the parent has ended" in done.stderr
