"""A network cable between two namespaces, with latency, loss, a rate, and scissors. Run as a program, as root.

    python link.py NAMESPACE ADDRESS NAMESPACE ADDRESS [--delay S] [--loss P] [--rate BYTES_PER_S] ...

It does what `tc netem` does (delay, loss, rate, limit), for kernels that lack it: packets come out of a TUN device
in one namespace, wait their time, and go into the one in the other.  Both directions are alike.  stdin takes lines
`NAME VALUE` that change a setting, among them `cut 1` and `cut 0`, and `cut 2`: only what comes from the second is
lost, so that questions arrive and their answers do not; each is answered by a line on stdout.  At its end,
however it comes, the kernel takes the devices away.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import fcntl
import os
import random
import select
import struct
import subprocess
import time
from dataclasses import dataclass, field

TUNSETIFF = 0x400454CA
IFF_TUN, IFF_NO_PI = 0x0001, 0x1000
TICK = 0.0005
"""Seconds: packets due within one tick leave together, which is what keeps up with 100 000 of them a second."""
BATCH = 64


@dataclass
class Settings:
    """delay: seconds one way; loss: part of packets; rate: bytes a second, 0 for no limit; limit: bytes of queue."""

    delay: float = 0.0
    loss: float = 0.0
    rate: float = 0.0
    limit: float = float(4 << 20)
    cut: float = 0.0


@dataclass
class Direction:
    """From one device to the other."""

    source: int
    sink: int
    settings: Settings
    chance: random.Random
    number: int
    free: float = 0.0
    """When the wire has sent all that was given to it."""
    on_the_way: collections.deque[tuple[float, bytes]] = field(default_factory=collections.deque)

    @property
    def is_cut(self) -> bool:
        return self.settings.cut in (1, self.number)

    def take(self) -> None:
        """What has come out of the source, a batch at most, is lost or goes on its way."""
        settings = self.settings
        for _ in range(BATCH):
            try:
                packet = os.read(self.source, 65536)
            except BlockingIOError:
                return
            now = time.monotonic()
            self.free = max(self.free, now)
            if self.is_cut or (settings.rate and (self.free - now) * settings.rate > settings.limit):
                continue
            if settings.rate:
                self.free += len(packet) / settings.rate
            if not settings.loss or self.chance.random() >= settings.loss:
                self.on_the_way.append((self.free + settings.delay, packet))

    def deliver(self, until: float) -> None:
        """What is due by then arrives, unless the cable was cut meanwhile."""
        while self.on_the_way and self.on_the_way[0][0] <= until:
            _, packet = self.on_the_way.popleft()
            if not self.is_cut:
                try:
                    os.write(self.sink, packet)
                except OSError:  # the device is down, or full: a lost packet
                    continue

    def next(self) -> float:
        return self.on_the_way[0][0] if self.on_the_way else float("inf")


def device(name: str, namespace: str, addresses: list[str], mtu: int) -> int:
    """A TUN device in a namespace, up, with addresses; its descriptor."""
    tun = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(tun, TUNSETIFF, struct.pack("16sH22x", name.encode(), IFF_TUN | IFF_NO_PI))
    there = ["ip", "-n", namespace]
    commands = [["ip", "link", "set", name, "netns", namespace]]
    commands += [[*there, "address", "add", a, "dev", name, *(["nodad"] if ":" in a else [])] for a in addresses]
    commands += [[*there, "link", "set", name, "mtu", str(mtu), "txqueuelen", "10000", "up"]]
    for command in commands:
        subprocess.run(command, check=True)
    return tun


def change(settings: Settings, line: str) -> None:
    name, value = line.split()
    if name not in Settings.__dataclass_fields__:
        raise SystemExit(f"no such setting: {name}")
    setattr(settings, name, float(value))


def carry(directions: list[Direction], settings: Settings) -> None:
    """Until stdin ends."""
    sources = [direction.source for direction in directions]
    print("ready", flush=True)
    while True:
        pause = min(direction.next() for direction in directions) - time.monotonic()
        timeout = None if pause == float("inf") else max(pause, TICK)
        ready, _, _ = select.select([0, *sources], [], [], timeout)
        if 0 in ready:
            line = os.read(0, 4096).decode()
            if not line:
                return
            for one in line.splitlines():
                change(settings, one)
                print("done", flush=True)
        for direction in directions:
            if direction.source in ready:
                direction.take()
            direction.deliver(time.monotonic() + TICK / 2)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("ends", nargs=4, metavar="NAMESPACE ADDRESSES")
    parser.add_argument("--name", required=True)
    parser.add_argument("--mtu", type=int, default=1500)
    parser.add_argument("--seed", type=int, default=1)
    for name in Settings.__dataclass_fields__:
        parser.add_argument(f"--{name}", type=float, default=getattr(Settings, name, 0.0))
    said = vars(parser.parse_args())
    settings = Settings(**{name: said[name] for name in Settings.__dataclass_fields__})
    one, its, other, others = said["ends"]
    a = device(f"{said['name']}a", one, its.split(","), said["mtu"])
    b = device(f"{said['name']}b", other, others.split(","), said["mtu"])
    with contextlib.suppress(PermissionError):
        os.nice(-15)  # a cable does not get slower when the machine is busy
    chance = random.Random(said["seed"])
    carry([Direction(a, b, settings, chance, 3), Direction(b, a, settings, chance, 2)], settings)


if __name__ == "__main__":
    main()
