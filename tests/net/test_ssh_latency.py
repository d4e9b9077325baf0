"""What latency costs a channel over ssh: nothing, as long as ssh's own window of 2 MiB covers what is on the way.

Measured with OpenSSH 9.2, MB/s that one channel carries to a host: 100 Mbit/s: 11.2 at 0.4 and at 80 ms.
1 Gbit/s: 123 at 0.4 ms, 24.5 at 80 ms, which is the window; four channels at once: 92, six: 113, also over one master.
"""

from __future__ import annotations

import os
import threading
import time

import pytest

from snapchain.host.remote_address import RemoteAddress
from snapchain.host.ssh import SshProgram, open_ssh
from tests.net.namespaces import Cable
from tests.net.sshd import SshHost

MiB = 1 << 20
SINK = "sh -c 'printf g; dd of=/dev/null bs=256k status=none; printf d'"
PIECE = memoryview(os.urandom(MiB))


def rate(host: SshHost, pieces: int) -> float:
    """Bytes a second of so many MiB, without their first third, which fills buffers and finds the link's rate."""
    with open_ssh(RemoteAddress(host.alias, "/srv"), program=SshProgram(host.ssh, SINK)) as channel:
        assert channel.read(1) == b"g"
        start = 0.0
        for n in range(pieces):
            channel.write(PIECE)
            if n == pieces // 3:
                start = time.monotonic()
        channel.finish_writing()
        assert channel.read(1) == b"d"
        return (pieces - 1 - pieces // 3) * MiB / (time.monotonic() - start)


@pytest.mark.root
def test_80_ms_cost_less_than_a_tenth_at_100_mbit(far: tuple[SshHost, Cable]) -> None:
    host, cable = far
    cable.set(rate=100e6 / 8)
    near_by = rate(host, 36)
    cable.set(delay=0.04)
    far_off = rate(host, 36)
    assert near_by > 0.8 * 12.5e6
    assert far_off > 0.9 * near_by


@pytest.mark.root
@pytest.mark.bench
@pytest.mark.parametrize("delay", [0.0002, 0.04])
@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize("hosts", [9000], indirect=True)  # or the cable, which is Python, would be what is measured
def test_channels_at_1_gbit(delay: float, channels: int, far: tuple[SshHost, Cable]) -> None:
    host, cable = far
    cable.set(rate=1e9 / 8, delay=delay, limit=32 << 20)
    rates: list[float] = []
    threads = [threading.Thread(target=lambda: rates.append(rate(host, 100))) for _ in range(channels)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print(f"{channels} channels, {delay * 2000:.1f} ms: {sum(rates) / 1e6:.1f} MB/s")
    assert len(rates) == channels
    assert sum(rates) > 0.7 * min(1e9 / 8, channels * 2 * MiB / (2 * delay))
