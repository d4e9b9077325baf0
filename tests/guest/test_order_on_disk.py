"""Snapshots and live merges after a power loss: files are flushed before QEMU is told what relies on them."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from snapchain.guest import journal
from tests.guest.fake_agent import FakeAgent
from tests.guest.live_chain import Chain
from tests.guest.machine import Machine
from tests.merge.test_live_crash import KINDS
from tests.ops.order_on_disk import TRACED, file_call


@pytest.fixture
def run_dir() -> Iterator[Path]:
    """For sockets: their paths must be short."""
    folder = Path(tempfile.mkdtemp())
    yield folder
    shutil.rmtree(folder)


def order(tmp_path: Path, machine: Machine, chain: Chain, *words: str | Path) -> list[str]:
    """Calls that change the chain's directory or the journal's, and commands to QEMU and the agent that do something.

    Of the journal's directory, the files are `thaw` and `snapshot`.
    """
    state = journal.directory()
    trace = tmp_path / "trace"
    argv: list[str | Path] = ["strace", "-f", "-y", "-s", "400", "-o", trace, "-e", f"{TRACED},sendto,sendmsg,write"]
    subprocess.run([*argv, sys.executable, "-m", "snapchain", *words, "--qmp", machine.qmp], check=True)
    found = []
    for line in trace.read_text().splitlines():
        call = line.partition(" ")[2]
        if command := re.search(r'\\"execute\\": ?\\"([a-z-]+)\\"', call):
            name = command[1]
            if flushed := re.search(r"qemu-io (\S+) [^f]*flush", call):
                name = f"flush {'active' if flushed[1] == 'vda-top' else 'sealed'}"
            if not re.match(r"query-|qmp_|qom-|guest-(sync|ping|info|fsfreeze-status)", name):
                found.append(name)
        elif (seen := file_call(call, state)) is not None:
            found.append(re.sub(r"-web1-[0-9a-f]+\.json|\.json", "", seen))
        elif not call.strip().startswith(("write", "send")) and (seen := file_call(call, chain.folder)) is not None:
            found.append(seen)
    return found


JOURNAL = ["fsync journal-tmp", "rename journal-tmp journal", "fsync ."]
NOTE = ["fsync note-tmp", "rename note-tmp note", "fsync ."]
RECORD = ["fsync tmp", "rename tmp snapshot", "fsync ."]


def test_a_snapshot(tmp_path: Path, run_dir: Path) -> None:
    chain = Chain(tmp_path / "images")
    with Machine(run_dir, disks={"vda": chain.active}) as machine:
        assert order(tmp_path, machine, chain, "snapshot", "--quiesce", "no", "--label", "x") == [
            "fsync tmp",
            *RECORD,
            "link tmp 4.1.qcow2",
            "unlink tmp",
            "fsync .",
            "blockdev-add",
            "transaction",
            *NOTE,
            "unlink snapshot",
        ]


def test_a_quiesced_snapshot(tmp_path: Path, run_dir: Path) -> None:
    """That a thaw is owed is on the disk before the freeze, and no call waits for a disk while the guest is frozen."""
    chain = Chain(tmp_path / "images")
    with FakeAgent(run_dir / "agent") as agent, Machine(run_dir, disks={"vda": chain.active}) as machine:
        found = order(tmp_path, machine, chain, "snapshot", "--quiesce", "require", "--agent", agent.path)
    assert found[found.index("blockdev-add") :] == [
        "blockdev-add",
        "fsync tmp",
        "rename tmp thaw",
        "fsync .",
        "guest-fsfreeze-freeze",
        "transaction",
        "guest-fsfreeze-thaw",
        "unlink thaw",
        "fsync .",
        *NOTE,
        "unlink snapshot",
    ]


UNTIL_THE_END: dict[str, list[str]] = {
    "commit": [
        "block-commit", "flush sealed", "flush active", "job-finalize", "flush sealed", "flush active", "job-dismiss",
        "fsync 1.qcow2", "fsync 4.qcow2", *NOTE,
        "unlink 3.qcow2", "unlink 2.qcow2",
    ],
    "stream": [
        "block-stream", "flush sealed", "job-finalize", "flush sealed", "job-dismiss",
        "fsync 3.qcow2", "fsync 4.qcow2", *NOTE,
        "unlink 2.qcow2", "unlink 1.qcow2",
    ],
    "active-stream": [
        "block-stream", "flush active", "job-finalize", "flush active", "job-dismiss",
        "fsync 4.qcow2", *NOTE,
        "unlink 3.qcow2", "unlink 2.qcow2", "unlink 1.qcow2",
    ],
    "active-commit": [
        # From the pivot on the guest may write to the lowest input: that is recorded before.
        "block-commit", *JOURNAL, "job-complete", "job-dismiss",
        "fsync 1.qcow2", *NOTE, *JOURNAL,
        *["blockdev-del"] * 6,
        "unlink 4.qcow2", "unlink 3.qcow2", "unlink 2.qcow2",
    ],
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_a_live_merge(tmp_path: Path, run_dir: Path, kind: str) -> None:
    """The journal comes before the job, and the result is on the disk, with its link, before an input goes."""
    chain = Chain(tmp_path / "images")
    with Machine(run_dir, disks={"vda": chain.active}) as machine:
        found = order(tmp_path, machine, chain, "merge", *KINDS[kind])
    assert found == [*JOURNAL, *UNTIL_THE_END[kind], "unlink journal", "fsync ."]


def test_qemu_has_flushed_the_result_before_a_pivot(tmp_path: Path, run_dir: Path) -> None:
    """So the guest need not wait for a flush of ours: `Job.flush` leaves an active commit out."""
    chain = Chain(tmp_path / "images")
    trace = tmp_path / "trace"
    with Machine(run_dir, disks={"vda": chain.active}) as machine:
        calls = "fdatasync,fsync,pwrite64,pwritev,sendmsg,sendto,write"
        argv = ["strace", "-f", "-y", "-s", "400", "-o", str(trace), "-e", calls, "-p", str(machine.process.pid)]
        with subprocess.Popen(argv, stderr=subprocess.PIPE, text=True) as tracer:
            assert tracer.stderr is not None
            assert "attached" in tracer.stderr.readline()
            argv = [sys.executable, "-m", "snapchain", "merge", *KINDS["active-commit"], "--qmp", str(machine.qmp)]
            subprocess.run(argv, check=True)
            tracer.terminate()
            tracer.stderr.read()
    lines = trace.read_text().splitlines()
    concluded = next(number for number, line in enumerate(lines) if '\\"concluded\\"' in line)
    before = [line for line in lines[:concluded] if re.search(r"/1\.qcow2>", line)]
    assert any("pwrite" in line for line in before)
    assert "fdatasync" in before[-1], "the last thing that is done to the result"
