"""Two hosts on one machine: network namespaces with addresses of their own and a cable of ours between them.

    with two_hosts(folder, delay=0.04, rate=100e6 / 8) as (near, far, cable):
        subprocess.run([*far.inside, "some-server"])        # over there
        with cable.cut(): ...

Names carry the process id, so that what a killed test run has left behind is swept away by the next one.
"""

from __future__ import annotations

import ctypes
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from socket import AF_INET, AddressFamily, SocketKind, socket

import pytest

from tests.servers import DIE_WITH_PARENT
from tests.waiting import HANG

NAME = re.compile(r"sctest([0-9]+)(near|far)")
NEAR, FAR = "198.18.0.1", "198.18.0.2"  # RFC 2544: for measurements between hosts, routed nowhere
NEAR6, FAR6 = "fd5c:7e57::1", "fd5c:7e57::2"
_CLONE_NEWNET = 0x40000000


@dataclass(frozen=True)
class Host:
    """A namespace. inside: what goes before an argument list to run it there."""

    namespace: str
    address: str
    address6: str

    @property
    def inside(self) -> tuple[str, ...]:
        return ("nsenter", f"--net=/run/netns/{self.namespace}", "--")

    def open_socket(self, kind: SocketKind, family: AddressFamily = AF_INET) -> socket:
        """A socket of this process that lives on that host."""
        with ThreadPoolExecutor(1) as visitor:  # a thread moves alone, and what it has opened stays where it was opened
            return visitor.submit(self._opened_there, kind, family).result()

    def _opened_there(self, kind: SocketKind, family: AddressFamily) -> socket:
        with Path(f"/run/netns/{self.namespace}").open("rb") as place:
            if ctypes.CDLL(None, use_errno=True).setns(place.fileno(), _CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), "setns")
        return socket(family, kind)


class Cable:
    """The way between them, and its settings. seconds, part of packets lost, bytes a second."""

    def __init__(self, child: subprocess.Popen[str]) -> None:
        self._child = child
        self._answer("ready")

    def set(self, **settings: float) -> None:
        """delay, loss, rate, limit, cut: from now on."""
        assert self._child.stdin is not None
        for name, value in settings.items():
            self._child.stdin.write(f"{name} {value}\n")
            self._child.stdin.flush()
            self._answer("done")

    @contextmanager
    def cut(self) -> Iterator[None]:
        """Nothing goes through in either direction, and neither end is told."""
        self.set(cut=1)
        try:
            yield
        finally:
            self.set(cut=0)

    def _answer(self, word: str) -> None:
        assert self._child.stdout is not None
        said = self._child.stdout.readline()
        assert said == f"{word}\n", f"the cable said {said!r} and not {word!r}"


@contextmanager
def two_hosts(*, mtu: int = 1500, **settings: float) -> Iterator[tuple[Host, Host, Cable]]:
    """Needs root. settings: as of Cable.set; all zero at first, which is a perfect cable. Skips in a mere container."""
    if not os.access("/dev/net/tun", os.W_OK):
        pytest.skip("no network namespaces: no /dev/net/tun")
    sweep()
    near = Host(f"sctest{os.getpid()}near", NEAR, NEAR6)
    far = Host(f"sctest{os.getpid()}far", FAR, FAR6)
    try:
        for host in (near, far):
            _add(host.namespace)
            _ip("-n", host.namespace, "link", "set", "lo", "up")
        with _plugged(near, far, mtu, settings) as cable:
            yield near, far, cable
    finally:
        for host in (near, far):
            _remove(host.namespace)


def _add(namespace: str) -> None:
    try:
        _ip("netns", "add", namespace)
    except subprocess.CalledProcessError as error:
        if "not permitted" not in error.stderr:
            raise
        pytest.skip(f"no network namespaces: {error.stderr.strip()}")


def sweep() -> None:
    """Remove what test runs that are no more have left."""
    for namespace in namespaces():
        found = NAME.fullmatch(namespace)
        if found and not Path(f"/proc/{found[1]}").exists():
            _remove(namespace)


def namespaces() -> list[str]:
    return [line.split()[0] for line in _ip("netns", "list").splitlines() if line.strip()]


def _remove(namespace: str) -> None:
    """With all that still runs in it."""
    try:
        for _ in range(50):
            pids = [int(pid) for pid in _ip("netns", "pids", namespace).split()]
            if not pids:
                break
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)
        _ip("netns", "delete", namespace)
    except subprocess.CalledProcessError:
        if namespace in namespaces():  # else another test run was faster
            raise


@contextmanager
def _plugged(near: Host, far: Host, mtu: int, settings: dict[str, float]) -> Iterator[Cable]:
    argv = [
        *DIE_WITH_PARENT, sys.executable, str(Path(__file__).with_name("link.py")),
        near.namespace, f"{NEAR}/30,{NEAR6}/64", far.namespace, f"{FAR}/30,{FAR6}/64",
        "--name", f"sc{os.getpid()}", "--mtu", str(mtu),
        *(f"--{name}={value}" for name, value in settings.items()),
    ]  # fmt: skip
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        try:
            yield Cable(child)
        finally:
            child.kill()


def _ip(*words: str) -> str:
    done = subprocess.run(["ip", *words], check=True, capture_output=True, text=True, timeout=HANG)
    return done.stdout
