"""migrate to another host: the real command over a real ssh, and a host that dies while it takes the disks over."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from tests.exhaustive import EXHAUSTIVE
from tests.net.sshd import SshHost
from tests.net.test_replica_over_ssh import remote
from tests.ops.stacks import Layer, MiB, build, flat, same

VDA, VDB = "web1/vda", "web1/vdb"


class Moving:
    """Two disks here, and a replica over there in a directory that no shell would like."""

    def __init__(self, directory: Path, host: SshHost) -> None:
        self.directory, self.host = directory, host
        self.root = directory / "a replica's; $(place)"
        layers = [Layer(2 * MiB, ["write -P 1 0 1M"]), Layer(2 * MiB, ["write -P 2 512k 256k"])]
        self.images = [
            build(directory / "a", layers)[-1],
            build(directory / "b", [Layer(MiB, ["write -P 3 0 128k"])], names=["data.qcow2"])[-1],
        ]
        self.truth = [flat(image, image.with_name("truth")) for image in self.images]

    def run(self, *options: str, by: str | None = None) -> tuple[int, Any]:
        pairs = zip(self.images, (VDA, VDB), strict=True)
        words = [word for image, disk in pairs for word in (str(image), f"ssh://there{self.root}::{disk}")]
        environment = {
            **os.environ,
            "SNAPCHAIN_SSH": shlex.join(self.host.ssh),
            "SNAPCHAIN_REMOTE": remote() if by is None else by,
        }
        done = subprocess.run(
            [sys.executable, "-m", "snapchain", "migrate", *words, "--json", *options],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.stdout, done.stderr
        return done.returncode, json.loads(done.stdout)

    def masters(self) -> list[bool]:
        """Whether the catalogues over there say that they have the disks."""
        catalogues = [self.root / disk.replace("/", "%2F") / "catalogue.json" for disk in (VDA, VDB)]
        return [json.loads(each.read_text())["handover"] is not None for each in catalogues]

    def check(self, report: Any) -> None:
        assert self.masters() == [True, True]
        for disk, truth in zip(report["disks"], self.truth, strict=True):
            assert same(Path(disk["overlay"]), truth)


@pytest.fixture
def moving(tmp_path: Path, there: SshHost) -> Moving:
    return Moving(tmp_path, there)


def test_the_guest_is_started_over_there(moving: Moving, tmp_path: Path) -> None:
    """By a hook that goes there itself, as `ssh kvm2 virsh start` does."""
    proof = tmp_path / "started"
    hook = tmp_path / "hook"
    start = f'test -w "$1" && qemu-io -f qcow2 -c "write -P 9 0 64k" "$1" > {proof}'
    hook.write_text(
        f"#!/bin/sh\nexec {shlex.join(moving.host.ssh)} {moving.host.alias} "
        f'sh -c {shlex.quote(shlex.quote(start))} sh "\'""$(printf %s "$SNAPCHAIN_OVERLAY" '
        "| sed \"s/'/'\\\\\\\\''/g\")\"\"'\"\n"
    )
    hook.chmod(0o755)
    status, report = moving.run("--offline", "--start-hook", str(hook))
    assert status == 0, report
    assert report["started"] is True
    assert "wrote 65536" in proof.read_text()
    assert moving.masters() == [True, True]
    status, refused = moving.run("--take-back")
    assert (status, refused["error"]["kind"]) == (4, "conflict")
    assert "a guest has written" in refused["error"]["message"]


@pytest.mark.sampled
@pytest.mark.parametrize(("call", "each"), [("fsync", 5), ("renameat", 9)])
def test_the_other_host_dies_at_each_call_of_the_handover(moving: Moving, tmp_path: Path, call: str, each: int) -> None:
    """Its receiver is killed once, in the session that asks for the disks; the next question ends it."""
    flag, lived = tmp_path / "kill", tmp_path / "lived"
    wrapper = tmp_path / "remote"
    for nth in count(1, 1 if EXHAUSTIVE else each):
        # strace counts each kind of call, and each thread, by itself.
        wrapper.write_text(
            "#!/bin/bash\n"
            f"if grep -qs '\"confirmed\": false' {tmp_path}/b/.snapchain-layer-* && rm {flag} 2> /dev/null; then\n"
            f"  strace -f -qq -o /dev/null -e trace={call} -e inject={call}:signal=SIGKILL:when={nth} "
            f'{remote()} "$@" && touch {lived}\n'
            f'else\n  exec {remote()} "$@"\nfi\n'
        )
        wrapper.chmod(0o755)
        flag.touch()
        status, report = moving.run("--offline", by=str(wrapper))
        assert not flag.exists(), "the handover was never reached"
        assert status == 0, report
        moving.check(report)
        if lived.exists():
            break
        status, report = moving.run("--take-back")
        assert status == 0, report
        assert moving.masters() == [False, False]
    assert nth > 2
