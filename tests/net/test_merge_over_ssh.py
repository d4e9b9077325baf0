"""Merging at a replica on another host, by a command over there: also when that is killed, or knows nothing of it."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.net.sshd import SshHost
from tests.net.test_replica_asked_over_ssh import snapchain
from tests.net.test_replica_over_ssh import remote
from tests.ops.stacks import Layer, build, flat, same
from tests.replica.conftest import DISK, Place
from tests.waiting import wait_until

MiB = 1 << 20


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path / "a replica's; $(place)")


@pytest.fixture
def chain(tmp_path: Path) -> list[Path]:
    return build(tmp_path / "c", [Layer(8 * MiB, [f"write -P {n} {n * 64}k 1M"]) for n in range(1, 5)])


@pytest.fixture
def url(place: Place, chain: list[Path]) -> str:
    for path in chain:
        place.send(path)
    return f"ssh://there{place.root}::{DISK}"


def test_plan_merge_and_send(there: SshHost, url: str, place: Place, chain: list[Path], tmp_path: Path) -> None:
    shown = [flat(path, tmp_path / f"{path.name}.raw") for path in chain]
    status, said = snapchain(there, "merge", url, "--keep-last", "2", "--dry-run")
    assert (status, said["plan"]["layers_after"], len(place.files())) == (0, 2, 4)
    status, said = snapchain(there, "merge", url, "--keep-last", "2")
    assert (status, said["layers_before"], said["layers_after"], said["points_kept"]) == (0, 4, 2, [3, 4])
    assert {"bytes_moved", "bytes_freed", "strategy"} <= said.keys()
    assert [same(*both) for both in zip(place.files(), shown[2:], strict=True)] == [True, True]
    status, said = snapchain(there, "send", str(chain[-1]), url)
    assert (status, said["layers_sent"], said["layers_present"]) == (0, 0, 4)
    assert snapchain(there, "verify", url, "--read-data")[1]["ok"]


def test_an_older_far_side(there: SshHost, url: str, tmp_path: Path) -> None:
    """One that does not name the feature."""
    old = tmp_path / "old.py"
    old.write_text(
        "from snapchain.replica.stream import session as opening\n"
        "opening.FEATURES = tuple(name for name in opening.FEATURES if name != 'merge')\n"
        "import sys\nfrom snapchain.cli import main\nsys.exit(main(sys.argv[1:]))\n"
    )
    path = ":".join(filter(None, sys.path))
    words = f"env PYTHONPATH={shlex.quote(path)} {shlex.quote(sys.executable)} {shlex.quote(str(old))}"
    status, said = snapchain(there, "merge", url, "--keep-last", "2", remotely=words)
    assert (status, said["error"]["kind"]) == (6, "unsupported")
    assert said["error"]["hint"] == "upgrade it there"


@pytest.mark.parametrize("moment", ["connected", "begun"])
def test_interrupted_here(there: SshHost, url: str, place: Place, chain: list[Path], moment: str) -> None:
    """Ctrl-C, at some moment: the command says what is left, and the next one finds all in order."""
    environment = {**os.environ, "SNAPCHAIN_SSH": shlex.join(there.ssh), "SNAPCHAIN_REMOTE": remote()}
    argv = [sys.executable, "-m", "snapchain", "merge", url, "--keep-last", "1"]
    known, before = set(there.sessions()), set(place.directory.iterdir())

    def came() -> bool:
        return set(there.sessions()) != known if moment == "connected" else set(place.directory.iterdir()) != before

    with subprocess.Popen(argv, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as work:
        wait_until(lambda: work.poll() is not None or came())
        work.send_signal(signal.SIGINT)
        said = work.communicate()[1]
    assert work.returncode in {0, 130}, said
    assert "Traceback" not in said
    status, said = snapchain(there, "send", str(chain[-1]), url)
    assert (status, said["layers_sent"]) == (0, 0)
    assert snapchain(there, "verify", url, "--read-data")[1]["ok"]
    assert snapchain(there, "merge", url, "--keep-last", "1")[1]["layers_after"] == 1
    left = {entry.name for entry in place.directory.iterdir()}
    assert left == {"catalogue.json", ".lock", "disk.qcow2"}
