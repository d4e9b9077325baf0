"""The standard streams as a channel: nothing but the channel's bytes gets into it."""

from __future__ import annotations

import subprocess
import sys
import textwrap

from snapchain.host.channel import caller
from snapchain.host.ssh import RemoteAddress, SshProgram, open_ssh
from tests.net.sshd import SshHost

SERVER = textwrap.dedent("""
    import os, sys
    from snapchain.host.channel import stdio_channel
    with stdio_channel() as channel:
        print("a stray print", flush=True)
        os.system("echo a stray program")
        assert sys.stdin.read() == ""
        while piece := channel.read(1000):
            channel.write(piece.upper())
""")


def test_stray_output_does_not_reach_the_stream() -> None:
    done = subprocess.run([sys.executable, "-c", SERVER], input=b"abc" * 50_000, capture_output=True, check=True)
    assert done.stdout == b"ABC" * 50_000
    assert done.stderr.splitlines() == [b"a stray print", b"a stray program"]


def test_over_ssh(there: SshHost) -> None:
    script = there.folder / "server.py"
    script.write_text(SERVER)
    program = SshProgram(there.ssh, f"env PYTHONPATH={':'.join(filter(None, sys.path))} {sys.executable} {script}")
    with open_ssh(RemoteAddress("there", "/srv"), program=program) as channel:
        channel.write(b"abc")
        assert channel.read(100) == b"ABC"


def test_the_caller_is_named() -> None:
    assert caller({"SSH_CONNECTION": "198.18.0.1 40000 198.18.0.2 22"}) == "198.18.0.1"
    assert caller({}) == caller({"SSH_CONNECTION": ""}) == "the other side"
