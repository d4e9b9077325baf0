"""A replica behind a real sshd keeps the contract of destinations: restore, too, is the same there as here."""

from __future__ import annotations

import itertools
import json
import os
import random
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from snapchain.host.ssh import RemoteAddress, SshProgram
from snapchain.ops.restore.output import parts_of
from snapchain.replica.endpoint import SshEndpoint
from snapchain.testing.destination_contract import DestinationContract, Site
from tests.net.sshd import SshHost
from tests.net.test_replica_over_ssh import remote
from tests.net.warm import warm
from tests.ops.stacks import Layer, build, flat, names, same
from tests.ops.test_destinations import FILES, ReplicaSite
from tests.replica.conftest import Place
from tests.waiting import kill_process, wait_until

MiB = 1 << 20


class TestReplicaOverSsh(DestinationContract):
    @pytest.fixture(scope="class")
    @classmethod
    def sites(cls, there: SshHost, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[], Site]]:
        folder = tmp_path_factory.mktemp("a replica's; $(place)")
        # One connection for all: what is tried here is what goes over it.
        control = ("-o", "ControlMaster=auto", "-o", f"ControlPath={there.folder}/master", "-o", "ControlPersist=yes")
        roots = (folder / f"{number}" for number in itertools.count())
        with warm(there.folder) as remotely:
            program = SshProgram((*there.ssh, *control), remotely)

            def made() -> Site:
                root = next(roots)
                endpoint = SshEndpoint(RemoteAddress(there.alias, str(root)), program=program)
                return ReplicaSite(root, endpoint, replace(FILES, damages=1, every=4, any_offset=False))

            yield made
        subprocess.run([*there.ssh, *control, "-O", "exit", there.alias], capture_output=True, check=False)


@pytest.fixture
def place(there: SshHost, tmp_path: Path) -> Place:
    """With a disk of 24 MiB of noise."""
    noise = tmp_path / "noise"
    noise.write_bytes(random.Random(2).randbytes(24 * MiB))
    image = build(tmp_path / "c", [Layer(32 * MiB, [f"write -s {noise} 4M 24M"])])[0]
    place = Place(tmp_path / "replica")
    place.send(image)
    return place


def command(there: SshHost, place: Place, out: Path, *options: str) -> subprocess.Popen[str]:
    argv = [sys.executable, "-m", "snapchain", "restore", f"ssh://there{place.root}::web1/vda", str(out), *options]
    environment = {**os.environ, "SNAPCHAIN_SSH": shlex.join(there.ssh), "SNAPCHAIN_REMOTE": remote()}
    return subprocess.Popen(argv, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_on_the_command_line_and_after_a_kill(there: SshHost, place: Place, tmp_path: Path) -> None:
    """kill -9 of this side, of the other side, and then a run that ends."""
    out = tmp_path / "out" / "a.qcow2"
    out.parent.mkdir()

    def has_begun() -> bool:
        return any(part.stat().st_blocks * 512 > 4 * MiB for part in parts_of(out))

    for victim in ("there", "here"):
        known = set(there.sessions())
        with command(there, place, out, "--limit-rate", "4M", "--json") as restore:
            wait_until(has_begun)
            if victim == "here":
                restore.kill()
            else:
                for session in set(there.sessions()) - known:
                    kill_process(session)
            said, _ = restore.communicate()
        assert not out.exists()
        if victim == "there":
            error = json.loads(said)["error"]
            assert (restore.returncode, error["kind"]) == (7, "unavailable")
            assert "goes on" not in (error["hint"] or "")
            assert names(out.parent) == []
    with command(there, place, out, "--json", "--progress", "json", "--connections", "3") as restore:
        said, progress = restore.communicate()
    assert restore.returncode == 0, progress
    report = json.loads(said)
    assert (report["point"], report["bytes_written"], report["output"]) == (1, 24 * MiB, str(out))
    last = json.loads(progress.splitlines()[-1])
    assert (last["event"], last["done"], last["total"]) == ("progress", 24 * MiB, 24 * MiB)
    assert names(out.parent) == ["a.qcow2"]
    assert same(out, flat(place.files()[0], tmp_path / "flat"))
