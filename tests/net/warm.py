"""snapchain as a host over there runs it, imported once: a server that forks for each command that ssh brings.

    with warm(folder) as command:
        SshProgram(host.ssh, command)

Most of a short session is the start of Python. That snapchain starts over there, too, other tests show: by `remote()`.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SERVE = "--serve"


@contextmanager
def warm(folder: Path) -> Iterator[str]:
    """The command of a shell over there that is `snapchain`, as SNAPCHAIN_REMOTE takes it."""
    import shlex
    import subprocess

    from tests.servers import DIE_WITH_PARENT

    path = folder / "warm"
    argv = [*DIE_WITH_PARENT, sys.executable, __file__, SERVE, str(path)]
    environment = {**os.environ, "PYTHONPATH": ":".join(filter(None, sys.path)), "OPENBLAS_NUM_THREADS": "1"}
    with subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, env=environment) as server:
        try:
            assert server.stdout is not None
            assert server.stdout.readline() == b"ready\n"
            yield shlex.join([sys.executable, "-I", "-S", __file__, str(path)])
        finally:
            server.kill()


def ask(path: str, words: list[str]) -> int:
    """Let the server run a command on our descriptors, and wait for its exit code."""
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(path)
        request = json.dumps([words, dict(os.environ), str(Path.cwd())]).encode() + b"\n"
        socket.send_fds(server, [request[:1]], [0, 1, 2])
        server.sendall(request[1:])
        nothing = os.open(os.devnull, os.O_RDWR)
        for fd in (0, 1, 2):  # the peer must see when the command closes its own
            os.dup2(nothing, fd)
        return int(server.recv(16) or b"99")


def serve(path: str) -> None:
    """Answer until we are killed. Prints a line when it can be asked."""
    import importlib
    import pkgutil

    import snapchain

    for package in ("cli", "merge", "ops.receive", "replica"):
        module = importlib.import_module(f"snapchain.{package}")
        for found in pkgutil.iter_modules(getattr(module, "__path__", ()), f"{module.__name__}."):
            importlib.import_module(found.name)
    assert snapchain.__file__ is not None
    with socket.socket(socket.AF_UNIX) as here:
        here.bind(path)
        here.listen()
        print("ready", flush=True)
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # whoever has answered is nobody's zombie
        while True:
            client, _ = here.accept()
            if os.fork() == 0:
                here.close()
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                _answer(client)
            client.close()


def _answer(client: socket.socket) -> None:
    request, fds, _, _ = socket.recv_fds(client, 1, 3)
    while not request.endswith(b"\n"):
        request += client.recv(1 << 16)
    pid = os.fork()
    if pid == 0:
        client.close()
        words, environment, folder = json.loads(request)
        for number, fd in enumerate(fds):
            os.dup2(fd, number)
            os.close(fd)
        os.setsid()
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(environment)
        sys.argv[1:] = words
        from snapchain.cli import program

        program()
    for fd in (0, 1, 2, *fds):
        os.close(fd)
    _, status = os.waitpid(pid, 0)
    client.sendall(b"%d" % (os.waitstatus_to_exitcode(status) & 0xFF))
    os._exit(0)


if __name__ == "__main__":
    if sys.argv[1] == SERVE:
        serve(sys.argv[2])
    sys.exit(ask(sys.argv[1], sys.argv[2:]))
