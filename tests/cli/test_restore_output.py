"""`restore ... -`: stdout has the disk and nothing else, and the exit code tells whether it is the point; --owner."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import Run, qemu_img, write

NOBODY = 65534
BLOB = 200
"""A byte in the first blob of a pack."""


@pytest.fixture
def repo(run: Run, disk: Path) -> Path:
    Path("noise").write_bytes(random.Random(7).randbytes(256 << 10))
    write(disk, "write -s noise 4M 256k")
    assert run("init", "repo", "--no-encryption").status == 0
    assert run("ship", "web1.qcow2", "repo::web1").status == 0
    return Path("repo")


def piped(*words: str, out: Any = subprocess.PIPE) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "snapchain", "restore", *words]
    return subprocess.run(command, stdout=out, stderr=subprocess.PIPE, check=False, stdin=subprocess.DEVNULL)


def damage(repo: Path, kind: str = "data") -> None:
    """Change a byte of the pack with guest data, or of that with the map."""
    packs = sorted(repo.glob("packs/*/*"), key=lambda path: path.stat().st_size)
    assert len(packs) == 2
    pack = packs[kind == "data"]
    body = bytearray(pack.read_bytes())
    body[BLOB] ^= 1
    pack.chmod(0o600)
    pack.write_bytes(body)


def test_stdout_has_the_disk_alone_and_stderr_the_report(repo: Path) -> None:
    with Path("out.raw").open("wb") as file:
        done = piped("repo::web1", "-", "--format", "raw", "--json", out=file)
    assert done.returncode == 0, done.stderr
    qemu_img("compare", "-f", "qcow2", "-F", "raw", "web1.qcow2", "out.raw")
    assert json.loads(done.stderr)["output"] == "-"
    assert not Path("-").exists()


def test_damage_ends_the_stream_with_an_error(repo: Path) -> None:
    damage(repo)
    done = piped("repo::web1", "-", "--json")
    assert done.returncode == 5
    error = json.loads(done.stderr)["error"]
    assert error["kind"] == "corrupt"
    assert "guest bytes" in error["message"]
    assert len(done.stdout) < 16 << 20


@pytest.mark.parametrize("kind", ["data", "map"])
def test_damage_that_is_allowed_has_an_exit_code_of_its_own(repo: Path, kind: str) -> None:
    damage(repo, kind)
    done = piped("repo::web1", "-", "--allow-damaged", "--quiet")
    assert done.returncode == 10
    assert len(done.stdout) == 16 << 20
    assert b"are lost, and are zeroes now" in done.stderr


def test_a_file_with_allowed_damage_is_there_and_its_ranges_are_listed(repo: Path, run: Run) -> None:
    damage(repo)
    told = run("restore", "repo::web1", "out.raw", "--allow-damaged", "--json")
    assert told.status == 10
    assert told.json["damaged"][0]["length"] > 0
    assert Path("out.raw").exists()
    told = run("restore", "repo::web1", "other.raw")
    assert told.status == 5
    assert "--allow-damaged" in told.err
    assert not Path("other.raw").exists()


def test_a_reader_that_goes_is_no_error(repo: Path) -> None:
    command = [sys.executable, "-m", "snapchain", "restore", "repo::web1", "-"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stderr is not None
        child.stdout.close()
        said = child.stderr.read()
        assert child.wait() == 141
    assert said == b""


def test_a_full_disk_is_an_error(repo: Path) -> None:
    with Path("/dev/full").open("wb") as full:
        done = piped("repo::web1", "-", out=full)
    assert done.returncode == 11
    assert b"the output cannot be written: no space left on device" in done.stderr


def test_a_terminal_is_refused(repo: Path) -> None:
    ours, theirs = os.openpty()
    try:
        done = piped("repo::web1", "-", out=theirs)
    finally:
        os.close(theirs)
        os.close(ours)
    assert done.returncode == 2
    assert b"a disk does not go to a terminal" in done.stderr


@pytest.mark.parametrize(
    ("words", "fact"),
    [
        (["--format", "qcow2"], "a stream takes a flat raw disk"),
        (["--chain"], "--chain, --force, --owner and --mode are for files"),
        (["--force"], "--chain, --force, --owner and --mode are for files"),
        (["--mode", "0640"], "--chain, --force, --owner and --mode are for files"),
    ],
)
def test_options_that_a_stream_cannot_follow(repo: Path, run: Run, words: list[str], fact: str) -> None:
    told = run("restore", "repo::web1", "-", *words)
    assert told.status == 2
    assert fact in told.err


def test_a_plan_of_a_stream_reads_no_data(repo: Path, run: Run) -> None:
    told = run("restore", "repo::web1", "-", "--dry-run", "--json")
    assert told.status == 0
    assert (told.json["plan"]["output"], told.json["plan"]["bytes_to_write"]) == ("-", (3 << 20) + (256 << 10))


# ---- owner and mode


def test_a_mode_is_that_of_the_new_file_whatever_the_umask(repo: Path, run: Run) -> None:
    assert run("restore", "repo::web1", "out.raw", "--mode", "0664").status == 0
    assert Path("out.raw").stat().st_mode & 0o7777 == 0o664


@pytest.mark.root
def test_an_owner_is_that_of_each_new_file(repo: Path, run: Run) -> None:
    Path("d").mkdir()
    assert run("ship", "web1.qcow2", "repo::web1").status == 0
    told = run("restore", "repo::web1", "d/out.qcow2", "--chain", "--owner", f"nobody:{NOBODY}", "--mode", "640")
    assert told.status == 0, told.err
    for path in Path("d").glob("*.qcow2"):
        assert (path.stat().st_uid, path.stat().st_gid, path.stat().st_mode & 0o7777) == (NOBODY, NOBODY, 0o640)


@pytest.mark.root
def test_an_owner_goes_before_that_of_the_file_that_is_replaced(repo: Path, run: Run) -> None:
    old = Path("out.raw")
    old.write_bytes(b"old")
    os.chown(old, 4321, 4322)
    old.chmod(0o644)
    assert run("restore", "repo::web1", "out.raw", "--force", "--owner", "nobody").status == 0
    assert (old.stat().st_uid, old.stat().st_gid, old.stat().st_mode & 0o7777) == (NOBODY, 4322, 0o644)


@pytest.mark.parametrize(
    ("words", "fact"),
    [
        (["--owner", "no-such-user"], "there is no user 'no-such-user'"),
        (["--owner", "0:no-such-group"], "there is no group 'no-such-group'"),
        (["--owner", "4294967295"], "there is no user '4294967295'"),
        (["--mode", "0755"], "is no mode of an image"),
        (["--mode", "4600"], "is no mode of an image"),
        (["--mode", "u=rw"], "is no mode of an image"),
    ],
)
def test_owners_and_modes_that_are_none(repo: Path, run: Run, words: list[str], fact: str) -> None:
    told = run("restore", "repo::web1", "out.raw", *words)
    assert told.status == 2
    assert fact in told.err
    assert not Path("out.raw").exists()
