"""What latency costs a channel over ssh: nothing, as long as ssh's own window of 2 MiB covers what is on the way.

Beyond that it takes several connections; docs/decisions/0020-ssh-lanes.md has the figures that this gave.
"""

from __future__ import annotations

import os
import sys
import textwrap
import time

import pytest

from snapchain.host.channel import Channel
from snapchain.host.ssh import RemoteAddress, SshProgram, open_ssh, open_ssh_lanes
from tests.net.namespaces import Cable
from tests.net.sshd import SshHost

MiB = 1 << 20
SINK = "sh -c 'printf g; dd of=/dev/null bs=256k status=none; printf d'"
ACCEPTING_SINK = textwrap.dedent("""
    from snapchain.host.lanes import accept_lanes
    from snapchain.host.channel import stdio_channel
    channel = accept_lanes(stdio_channel())
    if channel is not None:
        with channel:
            channel.write(b"g")
            buffer = memoryview(bytearray(1 << 20))
            while channel.read_into(buffer):
                pass
            channel.write(b"d")
""")
PIECE = memoryview(os.urandom(MiB))


def rate(channel: Channel, pieces: int) -> float:
    """Bytes a second of so many MiB, without their first third, which fills buffers and finds the link's rate."""
    assert channel.read(1) == b"g"
    start = 0.0
    for n in range(pieces):
        channel.write(PIECE)
        if n == pieces // 3:
            start = time.monotonic()
    channel.finish_writing()
    assert channel.read(1) == b"d"
    return (pieces - 1 - pieces // 3) * MiB / (time.monotonic() - start)


def plain_rate(host: SshHost) -> float:
    with open_ssh(RemoteAddress(host.alias, "/srv"), program=SshProgram(host.ssh, SINK)) as channel:
        return rate(channel, 36)


@pytest.mark.root
@pytest.mark.bench
def test_80_ms_cost_less_than_a_tenth_at_100_mbit(far: tuple[SshHost, Cable]) -> None:
    host, cable = far
    tried = []
    for _ in range(3):  # a machine that is busy with other things makes either slower
        cable.set(rate=100e6 / 8, delay=0.0)
        near_by = plain_rate(host)
        cable.set(delay=0.04)
        far_off = plain_rate(host)
        if near_by > 0.8 * 12.5e6 and far_off > 0.9 * near_by:
            return
        tried.append((near_by, far_off))
    raise AssertionError(f"bytes a second near by and far off: {tried}")


@pytest.mark.root
@pytest.mark.bench
@pytest.mark.parametrize("delay", [0.0002, 0.04])
@pytest.mark.parametrize("lanes", [1, 4, 8])
@pytest.mark.parametrize("hosts", [9000], indirect=True)  # or the cable, which is Python, would be what is measured
def test_lanes_at_1_gbit(delay: float, lanes: int, far: tuple[SshHost, Cable]) -> None:
    host, cable = far
    cable.set(rate=1e9 / 8, delay=delay, limit=32 << 20)
    script = host.folder / "sink.py"
    script.write_text(ACCEPTING_SINK)
    program = SshProgram(host.ssh, f"env PYTHONPATH={':'.join(filter(None, sys.path))} {sys.executable} {script}")
    with open_ssh_lanes(RemoteAddress(host.alias, "/srv"), lanes, program=program) as channel:
        measured = rate(channel, 400 if delay < 0.01 else 100 * lanes)
    print(f"{lanes} lanes, {delay * 2000:.1f} ms: {measured / 1e6:.1f} MB/s")
    assert measured > 0.7 * min(1e9 / 8, lanes * 2 * MiB / (2 * delay))
