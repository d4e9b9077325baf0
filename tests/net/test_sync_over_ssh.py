"""sync to another host: the real command over a real ssh."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.net.sshd import SshHost
from tests.net.test_replica_over_ssh import SIZE, MiB, remote
from tests.ops.stacks import Layer, build, clean, flat, same, write
from tests.replica.conftest import DISK, Place
from tests.replica.test_resume import arrived
from tests.waiting import kill_process, wait_until


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path / "a replica's; $(place)")


@pytest.fixture
def chain(tmp_path: Path) -> list[Path]:
    """16 MiB that do not compress, 4 that do, and a top that a guest has written to."""
    paths = build(tmp_path / "images", [Layer(SIZE), Layer(SIZE, ["write -P 3 20M 4M"]), Layer(SIZE)])
    noise = tmp_path / "noise"
    noise.write_bytes(os.urandom(16 * MiB))
    write(paths[0], f"write -s {noise} 1M 16M")
    write(paths[2], "write -P 9 2M 1M")
    return paths


def command(host: SshHost, image: Path, place: Place, *options: str) -> subprocess.Popen[str]:
    argv = [sys.executable, "-m", "snapchain", "sync", str(image), f"ssh://there{place.root}::{DISK}", "--json"]
    environment = {**os.environ, "SNAPCHAIN_SSH": shlex.join(host.ssh), "SNAPCHAIN_REMOTE": remote()}
    return subprocess.Popen(
        [*argv, *options], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def said(host: SshHost, image: Path, place: Place, *options: str) -> tuple[int, Any]:
    with command(host, image, place, *options) as process:
        out, err = process.communicate()
    assert out, err
    return process.returncode, json.loads(out)


def test_it_becomes_ready_and_says_so(there: SshHost, place: Place, chain: list[Path], tmp_path: Path) -> None:
    status, before = said(there, chain[-1], place, "--check")
    assert (status, before["ready"]) == (4, False)
    assert not place.root.exists()
    status, report = said(there, chain[-1], place)
    assert status == 0
    assert report["ready"]
    assert (report["layers_sent"], report["bytes_left"]) == (2, MiB)
    assert 0 < report["wire_bytes_left"] < report["bytes_left"], "the link compresses"
    assert report["predicted_cutover_seconds"] == pytest.approx(MiB / report["rate"])
    overlay = Path(report["overlay"])
    assert same(overlay, flat(chain[1], tmp_path / "shown"))
    assert clean(overlay)
    for file, there_too in zip(chain, place.files(), strict=False):
        assert clean(there_too)
        assert same(there_too, flat(file, tmp_path / "shown"))
    words = shlex.split(report["virsh_command"])
    assert words[words.index("--migrate-disks") + 1] == "vda"
    assert words[-2:] == ["web1", "qemu+ssh://there/system"]
    status, ready = said(there, chain[-1], place, "--check", "--prove")
    assert (status, ready["ready"], ready["missing"]) == (0, True, [])


def test_rounds(there: SshHost, place: Place, chain: list[Path], tmp_path: Path) -> None:
    status, report = said(there, chain[-1], place, "--target-downtime", "0.000001")
    assert status == 0
    assert (report["outcome"], report["on_target"], report["bytes_left"]) == ("enough", True, 0)
    assert [each["data_bytes"] for each in report["rounds"]] == [20 * MiB, MiB]
    assert same(Path(report["overlay"]), flat(chain[-1], tmp_path / "shown"))


def test_after_a_lost_connection_it_goes_on_by_itself(
    there: SshHost, place: Place, chain: list[Path], tmp_path: Path
) -> None:
    known = set(there.sessions())
    with command(there, chain[-1], place, "--limit-rate", "5M") as process:
        wait_until(lambda: arrived(place) > 6 * MiB)
        for session in set(there.sessions()) - known:
            kill_process(session)
        out, err = process.communicate()
    assert process.returncode == 0, err
    assert "trying again" in err
    assert json.loads(out)["ready"]
    assert same(Path(json.loads(out)["overlay"]), flat(chain[1], tmp_path / "shown"))


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_interrupted_it_is_not_ready_and_the_next_run_makes_it_so(
    there: SshHost, place: Place, chain: list[Path], tmp_path: Path, how: signal.Signals
) -> None:
    with command(there, chain[-1], place, "--limit-rate", "5M") as process:
        wait_until(lambda: arrived(place) > 6 * MiB)
        process.send_signal(how)
        out, _ = process.communicate()
    if how is signal.SIGINT:
        assert process.returncode == 130
        assert "run it again" in json.loads(out)["error"]["hint"]
    status, stands = said(there, chain[-1], place, "--check")
    assert (status, stands["ready"]) == (4, False)
    assert not list(place.root.rglob("active"))

    def ready() -> bool:  # the process over there may hold the disk a moment longer than we live
        status, report = said(there, chain[-1], place)
        return status == 0 and report["ready"]

    wait_until(ready)
    overlay = place.directory / "active" / "disk.qcow2"
    assert same(overlay, flat(chain[1], tmp_path / "shown"))
