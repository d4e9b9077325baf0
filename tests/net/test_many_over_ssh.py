"""Many at once to one host, and hosts that are set up oddly: the real command over a real ssh."""

from __future__ import annotations

import json
import os
import random
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.net.commands import started
from tests.net.sshd import SshHost, sshd
from tests.net.test_replica_over_ssh import remote
from tests.ops.stacks import Layer, build, clean, flat, same, write
from tests.replica.conftest import Place
from tests.waiting import wait_until

MiB = 1 << 20


def start(host: SshHost, verb: str, image: Path, to: str, *options: str, there: str = "") -> subprocess.Popen[str]:
    environment = {**os.environ, "SNAPCHAIN_SSH": shlex.join(host.ssh), "SNAPCHAIN_REMOTE": there or remote()}
    return started([verb, image, to, "--json", *options], environment=environment)


def ended(process: subprocess.Popen[str]) -> tuple[int, dict[str, Any], str]:
    out, err = process.communicate()
    assert out, err
    return process.returncode, json.loads(out), err


def chain(directory: Path, seed: int) -> list[Path]:
    paths = build(directory, [Layer(16 * MiB), Layer(16 * MiB), Layer(16 * MiB)])
    draw = random.Random(seed)
    for path in paths:
        noise = directory / "noise"
        noise.write_bytes(draw.randbytes(4 * MiB))
        write(path, f"write -s {noise} {draw.randrange(12)}M 4M")
    return paths


def holds(directory: Path, files: list[Path], scratch: Path) -> None:
    """The replica's layers show what the first files of the chain do."""
    catalogue = json.loads((directory / "catalogue.json").read_text())
    there = [directory / layer["file"] for layer in catalogue["layers"]]
    assert len(there) == len(files)
    for file, held in zip(files, there, strict=True):
        assert same(held, flat(file, scratch / "shown"))
        assert clean(held)


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.soak)])
def test_syncs_of_many_disks_at_once(tmp_path: Path, count: int) -> None:
    """An sshd with few places for logins drops some of them: they come again, and all end well."""
    chains = [chain(tmp_path / f"{number}", number) for number in range(count)]
    with sshd(tmp_path / "sshd", settings=[f"MaxStartups {count - 1}:40:20"]) as host:
        to = [f"ssh://there{tmp_path}/replica::vm{number}/vda" for number in range(count)]
        running = [
            start(host, "sync", files[-1], place, "--connections", "2") for files, place in zip(chains, to, strict=True)
        ]
        for process in running:
            status, report, err = ended(process)
            assert (status, report.get("ready")) == (0, True), err
    for number, files in enumerate(chains):
        holds(tmp_path / "replica" / f"vm{number}%2Fvda", files[:-1], tmp_path)


def test_two_of_one_disk_at_once(there: SshHost, tmp_path: Path) -> None:
    files = chain(tmp_path / "c", 1)
    to = f"ssh://there{tmp_path}/replica::d"
    with start(there, "send", files[-1], to, "--limit-rate", "2M") as first:
        arriving = tmp_path / "replica" / "d" / ".incoming.qcow2"
        wait_until(arriving.exists)
        os.kill(first.pid, signal.SIGSTOP)  # it holds the disk for as long as we like
        status, said, _ = ended(start(there, "send", files[-1], to))
        os.kill(first.pid, signal.SIGCONT)
        assert (status, said["error"]["kind"]) == (9, "busy")
        assert ended(first)[0] == 0
    holds(tmp_path / "replica" / "d", files, tmp_path)


@pytest.mark.parametrize("connections", ["1", "3"])
def test_a_shell_that_greets(there: SshHost, tmp_path: Path, connections: str) -> None:
    image = chain(tmp_path / "c", 1)[0]
    to = f"ssh://there{tmp_path}/replica::d"
    greeting = f"echo Welcome to this host; {remote()}"
    status, said, _ = ended(start(there, "send", image, to, "--connections", connections, there=greeting))
    assert (status, said["error"]["kind"]) == (5, "corrupt")
    assert "greeting" in said["error"]["hint"]


@pytest.mark.parametrize("how", ["password", "keyboard-interactive"])
def test_nobody_is_there_to_type_a_password(tmp_path: Path, how: str) -> None:
    image = chain(tmp_path / "c", 1)[0]
    settings = [f"AuthenticationMethods {how}", "PasswordAuthentication yes", "KbdInteractiveAuthentication yes"]
    with sshd(tmp_path / "sshd", settings=settings) as host:
        status, said, _ = ended(start(host, "send", image, f"ssh://there{tmp_path}/replica::d"))
    assert (status, said["error"]["kind"]) == (8, "tool-failed")
    assert "the login was refused" in said["error"]["message"]


def test_an_ipv6_address(tmp_path: Path) -> None:
    files = chain(tmp_path / "c", 1)
    with sshd(tmp_path / "sshd", alias="::1", address="::1") as host:
        to = f"ssh://[::1]:{host.port}{tmp_path}/replica"
        assert ended(start(host, "send", files[-1], f"{to}::d"))[0] == 0
        log = subprocess.run(
            [sys.executable, "-m", "snapchain", "log", to, "--json"],
            env={**os.environ, "SNAPCHAIN_SSH": shlex.join(host.ssh), "SNAPCHAIN_REMOTE": remote()},
            capture_output=True,
            check=True,
        )
    assert [disk["name"] for disk in json.loads(log.stdout)["disks"]] == ["d"]
    holds(Place(tmp_path / "replica").root / "d", files, tmp_path)


@pytest.mark.root
def test_no_room_over_there_is_told_at_once(there: SshHost, tmp_path: Path) -> None:
    files = chain(tmp_path / "c", 1)
    share = tmp_path / "share"
    share.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "none", share], check=True)
    try:
        to = f"ssh://there{share}/replica::d"
        status, said, err = ended(start(there, "send", files[-1], to))
        assert (status, said["error"]["kind"]) == (7, "unavailable")
        assert "no space left" in said["error"]["message"]
        assert "trying again" not in err
        subprocess.run(["mount", "-o", "remount,size=64m", share], check=True)
        status, said, _ = ended(start(there, "send", files[-1], to))
        assert (status, said["layers_present"]) == (0, 1)
        holds(share / "replica" / "d", files, tmp_path)
    finally:
        subprocess.run(["umount", share], check=True)
