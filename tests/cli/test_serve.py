"""`snapchain serve` as a process of its own: ready when it says so, gone without a trace when it is told to."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import Run, spawned
from tests.nbd.serving import Client, ReadFailed

DISK = "repo::web1/vda"


@pytest.fixture
def shipped(run: Run, disk: Path) -> Path:
    assert run("init", "repo", "--no-encryption").status == 0
    assert run("ship", str(disk), DISK).status == 0
    return disk


@contextmanager
def serving(folder: Path, *words: str) -> Iterator[tuple[subprocess.Popen[str], Any]]:
    """The process, and its first line."""
    with spawned(["serve", *words, "--json"], folder) as child:
        assert child.stdout is not None
        yield child, json.loads(child.stdout.readline())


def leases(folder: Path) -> list[str]:
    """Those of readers that count: one that has ended may leave an empty file."""
    return [path.name for path in (folder / "repo" / "leases").glob("r-*") if path.stat().st_size]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_with_its_socket_and_its_lease(
    run: Run, shipped: Path, tmp_path: Path, number: signal.Signals
) -> None:
    _ = run
    with serving(tmp_path, DISK, "--socket", "s") as (child, ready):
        ((export, uri),) = [(each["export"], each["uri"]) for each in ready["exports"]]
        assert (export, ready["socket"]) == ("web1/vda", str(tmp_path / "s"))
        assert leases(tmp_path)
        subprocess.run(["qemu-img", "compare", "-q", "-f", "raw", "-F", "qcow2", uri, shipped], check=True)
        with Client(tmp_path / "s").go("web1/vda") as client:
            child.send_signal(number)
            assert client.is_hung_up()
            out, err = child.communicate()
    report = json.loads(out)
    assert (child.returncode, err) == (0, "")
    assert (report["clients"] >= 2, report["failed_reads"], report["bytes_sent"] > 0) == (True, 0, True)
    assert not (tmp_path / "s").exists()
    assert leases(tmp_path) == []


def test_once_ends_with_the_last_client(run: Run, shipped: Path, tmp_path: Path) -> None:
    _ = run, shipped
    with serving(tmp_path, DISK, "--once", "--listen", "localhost:0") as (child, ready):
        assert ready["listen"].startswith("localhost:")
        done = subprocess.run(["nbdinfo", "--size", ready["exports"][0]["uri"]], capture_output=True, check=True)
        assert done.stdout.strip() == b"16777216"
        child.communicate()
        assert child.returncode == 0


def test_a_failed_read_is_told_and_is_the_exit_code(run: Run, shipped: Path, tmp_path: Path) -> None:
    _ = run, shipped
    with serving(tmp_path, DISK, "--once", "--socket", "s", "--quiet") as (child, _ready):
        for pack in (tmp_path / "repo" / "packs").rglob("*"):
            if pack.is_file():
                pack.unlink()
        with Client(tmp_path / "s").go("web1/vda") as client, pytest.raises(ReadFailed, match="error 5"):
            client.read(0, 4096)
        out, err = child.communicate()
    assert (child.returncode, json.loads(out)["failed_reads"]) == (10, 1)
    assert "web1/vda: bytes 0 to 4096 could not be read" in json.loads(out)["notices"][0]
    assert err == ""


def test_a_dry_run_listens_nowhere(run: Run, shipped: Path, tmp_path: Path) -> None:
    _ = shipped
    plan = run("serve", DISK, "--all-points", "--socket", "s", "--dry-run", "--json").json["plan"]
    assert [each["export"] for each in plan["exports"]] == ["web1/vda", "web1/vda@1"]
    assert not (tmp_path / "s").exists()
    said = run("serve", DISK, "-n")
    assert "would serve 1 export on " in said.out
    assert "nbd+unix:///web1/vda?socket=" in said.out
    assert "serve-PID.sock" in said.out, "the server will be another process"


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (["repo::none"], 3, "none"),
        (["web1.qcow2"], 2, "this is an image"),
        ([DISK, "--cache-size", "1M"], 2, "at least 16 MiB"),
        ([DISK, "--patience", "soon"], 2, "--patience"),
        ([DISK, "--listen", "0.0.0.0"], 2, "without TLS"),
        ([DISK, "--socket", "repo/config"], 4, "no socket"),
        ([DISK, "--socket", "none/s"], 3, "no such directory"),
        ([DISK, "--listen", "127.0.0.1:0", "--tls", "."], 3, "--tls DIR has ca-cert.pem"),
    ],
)
def test_a_wrong_request_is_refused_before_it_serves(
    run: Run, shipped: Path, words: list[str], status: int, said: str
) -> None:
    _ = shipped
    ended = run("serve", *words)
    assert (ended.status, said in ended.err) == (status, True), ended.err


def test_a_port_that_is_taken_is_busy(run: Run, shipped: Path) -> None:
    _ = shipped
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        ended = run("serve", DISK, "--listen", f"127.0.0.1:{port}")
    assert (ended.status, "another program listens on this port" in ended.err) == (9, True), ended.err
