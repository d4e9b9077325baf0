"""A link that is cut for half a minute in mid-transfer: the connection outlives it, and the transfer ends by itself."""

from __future__ import annotations

import os
import threading
import time

import pytest

from snapchain.host.ssh import RemoteAddress, SshProgram, open_ssh
from tests.net.namespaces import Cable
from tests.net.sshd import SshHost

MiB = 1 << 20
COUNT = "sh -c 'printf g; wc -c'"


@pytest.mark.root
@pytest.mark.soak
def test_a_link_that_is_cut_for_30_s(far: tuple[SshHost, Cable]) -> None:
    host, cable = far
    cable.set(rate=100e6 / 8, delay=0.04, loss=0.01)
    pieces = 40
    piece = os.urandom(MiB)
    with open_ssh(RemoteAddress(host.alias, "/srv"), program=SshProgram(host.ssh, COUNT)) as channel:
        assert channel.read(1) == b"g"

        def write() -> None:
            for _ in range(pieces):
                channel.write(piece)
            channel.finish_writing()

        start = time.monotonic()
        writer = threading.Thread(target=write)
        writer.start()
        time.sleep(2)
        with cable.cut():
            time.sleep(30)
        assert writer.is_alive(), "it was done before the cut had any effect"
        assert int(channel.read(100)) == pieces * MiB
        writer.join()
    print(f"{time.monotonic() - start:.1f} s")
