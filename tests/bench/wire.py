"""Two hosts with a wire of 1 Gbit/s between them that costs next to no processor, and what went over it.

A veth pair between two network namespaces, with `tc tbf` at both ends: the kernel holds packets back to the rate, and
takes 64 KiB at a time, as a network card does.  `tests/net/link.py` can delay, lose and cut, but passes each packet
through a program, which at this rate takes a processor for itself.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.net.namespaces import FAR, FAR6, NEAR, NEAR6, Host, _add, _ip, _remove, sweep

GBIT = 10**9


class Wire:
    """The way between them, seen from the near end."""

    def __init__(self, near: Host, device: str) -> None:
        self._near, self._device = near, device

    def carried(self) -> tuple[int, int]:
        """Bytes in (to the far host, from it) so far, with the headers of TCP, IP and Ethernet."""
        shown = [*self._near.inside, "cat", "/proc/net/dev"]
        lines = subprocess.run(shown, check=True, capture_output=True, text=True).stdout.splitlines()
        words = next(line.split(":", 1)[1].split() for line in lines if line.strip().startswith(f"{self._device}:"))
        return int(words[8]), int(words[0])


@contextmanager
def wired_hosts(*, bits: int | None = GBIT) -> Iterator[tuple[Host, Host, Wire]]:
    """Needs root. bits: a second, None for as many as the machine can. Skips where there are no namespaces."""
    sweep()
    near = Host(f"sctest{os.getpid()}near", NEAR, NEAR6)
    far = Host(f"sctest{os.getpid()}far", FAR, FAR6)
    devices = f"sw{os.getpid()}a", f"sw{os.getpid()}b"
    try:
        for host in (near, far):
            _add(host.namespace)
            _ip("-n", host.namespace, "link", "set", "lo", "up")
        _ip("link", "add", devices[0], "type", "veth", "peer", "name", devices[1])
        for host, device in zip((near, far), devices, strict=True):
            there = ("-n", host.namespace)
            _ip("link", "set", device, "netns", host.namespace)
            _ip(*there, "address", "add", f"{host.address}/30", "dev", device)
            _ip(*there, "link", "set", device, "up")
            if bits is not None:
                _shape(host, device, bits)
        yield near, far, Wire(near, devices[0])
    finally:
        for host in (near, far):
            _remove(host.namespace)


def _shape(host: Host, device: str, bits: int) -> None:
    # The bucket holds 2 ms; the queue 20 ms, more than what 2 TCP windows on a short way fill.
    words = ["rate", f"{bits}bit", "burst", str(max(128 << 10, bits // 8 // 500)), "limit", str(bits // 8 // 50)]
    argv = ["tc", "-n", host.namespace, "qdisc", "add", "dev", device, "root", "tbf", *words]
    done = subprocess.run(argv, check=False, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no link of a known rate: {done.stderr.strip()}")


def seconds_of_children(pid: int) -> float:
    """Processor seconds of the children, and theirs, that a process has waited for."""
    words = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(words[13]) + int(words[14])) / os.sysconf("SC_CLK_TCK")
