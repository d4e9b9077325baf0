"""Looking at a replica on another host, and a key over there that can do nothing but speak with one."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.net.sshd import SshHost, sshd
from tests.net.test_replica_over_ssh import remote
from tests.ops.stacks import Layer, build
from tests.replica.conftest import DISK, Place

MiB = 1 << 20


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path / "a replica's; $(place)")


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return build(tmp_path / "c", [Layer(MiB, ["write -P 1 0 128k"]), Layer(MiB, ["write -P 2 64k 64k"])])[-1]


def snapchain(host: SshHost, *words: str, remotely: str | None = None) -> tuple[int, Any]:
    environment = {**os.environ, "SNAPCHAIN_SSH": shlex.join(host.ssh), "SNAPCHAIN_REMOTE": remotely or remote()}
    argv = [sys.executable, "-m", "snapchain", *words, "--json"]
    said = subprocess.run(argv, env=environment, capture_output=True, text=True, check=False)
    return said.returncode, json.loads(said.stdout)


def test_log_and_verify(there: SshHost, place: Place, image: Path) -> None:
    url = f"ssh://there{place.root}"
    assert snapchain(there, "send", str(image), f"{url}::{DISK}", "--label", "first")[0] == 0
    status, said = snapchain(there, "log", url)
    assert (status, said["destination"], said["disks"][0]["name"]) == (0, url, DISK)
    assert said["disks"][0]["points"][0]["labels"] == ["first"]
    assert said["disks"][0]["points"][0]["content_id"] == place.catalogue()["points"][0]["content_id"]
    status, said = snapchain(there, "verify", f"{url}::{DISK}", "--read-data")
    assert (status, said["ok"], said["disks"], said["layers"]) == (0, True, 1, 2)
    assert said["checked_bytes"] >= 192 * 1024
    victim = place.files()[0]
    victim.chmod(0o644)
    raw = bytearray(victim.read_bytes())
    raw[-1] ^= 1
    victim.write_bytes(raw)
    status, said = snapchain(there, "verify", url, "--read-data")
    assert (status, said["ok"], said["findings"][0]["subject"], said["findings"][0]["points"]) == (
        5,
        False,
        str(victim),
        [1],
    )
    status, said = snapchain(there, "log", f"{url}::gone")
    assert (status, said["error"]["kind"]) == (3, "not-found")
    status, said = snapchain(there, "verify", f"{url}/nowhere")
    assert (status, said["error"]["kind"]) == (3, "not-found")


def test_a_key_that_is_confined(tmp_path: Path, image: Path) -> None:
    """`command=` with --root: whatever the other side runs and names, it reaches the replicas in that root alone."""
    root = tmp_path / "root"
    root.mkdir()
    (root / "out").symlink_to(tmp_path)
    with sshd(tmp_path / "sshd") as host:
        keys = host.folder / "authorized_keys"
        forced = f"{remote()} serve-replica --stdio --root {shlex.quote(str(root))}".replace('"', '\\"')
        keys.write_text(f'restrict,command="{forced}" {keys.read_text()}')
        inside = f"ssh://there{root}/kvm1"
        assert snapchain(host, "send", str(image), f"{inside}::{DISK}")[0] == 0
        assert snapchain(host, "send", str(image), f"{inside}::{DISK}", remotely=f"touch {tmp_path}/owned; x")[0] == 0
        assert not (tmp_path / "owned").exists()
        assert len(snapchain(host, "log", inside)[1]["disks"][0]["points"]) == 2
        assert snapchain(host, "verify", inside, "--read-data")[1]["ok"] is True
        for number, outside in enumerate((tmp_path / "other", root / ".." / "other", root / "out" / "x", f"{root}2")):
            send, log = ["send", str(image), f"ssh://there{outside}::{DISK}"], ["log", f"ssh://there{outside}"]
            status, said = snapchain(host, *(log if number % 2 else send))
            assert (status, said["error"]["kind"]) == (2, "invalid-input")
            assert "only replicas in the directory" in said["error"]["message"]
        assert not (tmp_path / "other").exists()
        assert not Path(f"{root}2").exists()
