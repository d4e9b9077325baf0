"""What survives a power loss is decided by the order of fsync, link, rename and unlink: read off the system calls."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.ops.order_on_disk import TRACED, file_call
from tests.ops.stacks import Layer, build

OPERATIONS = {
    "snapshot": "(sealing.plan, sealing.run)",
    "merge": "(lambda image, **more: step.plan_step(MergeRequest(image=image, **more)), run.run_step)",
}


def calls(work: Path, image: Path, operation: str, options: str = "") -> list[str]:
    """`fsync NAME`, `rename A B`, ... by our own process, in order; temporary names as `tmp`."""
    script = (
        "from pathlib import Path\n"
        "from snapchain.merge import MergeRequest, run, step\n"
        "from snapchain.model.merging import Strategy\n"
        "from snapchain.source import sealing\n"
        f"{operation} = {OPERATIONS[operation]}\n"
        f"{operation}[1]({operation}[0](Path({str(image)!r}){options}))\n"
    )
    trace = work / "trace"
    subprocess.run(["strace", "-f", "-y", "-o", trace, "-e", TRACED, sys.executable, "-c", script], check=True)
    lines = trace.read_text().splitlines()
    own = next(line for line in lines if "rename" in line).split()[0]
    found = []
    for line in lines:
        number, _, call = line.partition(" ")
        # (What a merge makes is flushed by another thread, while this one proves it.)
        if number != own and not call.strip().startswith("fsync"):
            continue
        if (seen := file_call(call, image.parent)) is not None:
            found.append(seen)
    return found


def test_snapshot(tmp_path: Path) -> None:
    image = build(tmp_path / "vm", [Layer(writes=["write -P 1 0 64k"])], names=["disk.qcow2"])[0]
    assert calls(tmp_path, image, "snapshot") == [
        "fsync tmp",
        "link disk.qcow2 disk.1.qcow2",
        "fsync .",
        "fsync note-tmp",
        "rename note-tmp note",
        "fsync .",
        "rename tmp disk.qcow2",
        "fsync .",
    ]


def test_merge(tmp_path: Path) -> None:
    image = build(tmp_path / "vm", [Layer(), *[Layer(writes=["write -P 1 0 64k"])] * 3])[-1]
    # The journal and the result get their names in one directory, in this order: one flush makes both last.
    assert calls(tmp_path, image, "merge", ", strategy=Strategy.NEW") == [
        "fsync tmp",
        "fsync journal-tmp",
        "rename journal-tmp journal",
        "rename tmp disk.qcow2",
        "fsync .",
        # What it was made of, while the journal brings back whoever is killed here.
        "fsync note-tmp",
        "rename note-tmp note",
        "fsync .",
        "unlink 2.qcow2",
        "unlink 1.qcow2",
        "unlink journal",
        "fsync .",
    ]


@pytest.mark.parametrize("strategy", ["ABSORB", "COMMIT"])
def test_merge_in_place(strategy: str, tmp_path: Path) -> None:
    target = {"ABSORB": "disk.qcow2", "COMMIT": "1.qcow2"}[strategy]
    layers = [Layer(), *[Layer(writes=[f"write -P 1 {n}M 64k"]) for n in range(3)]]
    image = build(tmp_path / "vm", layers)[-1]
    found = calls(tmp_path, image, "merge", f", strategy=Strategy.{strategy}")
    steps = found.count(f"fsync {target}")
    # Data with their counts; entries; the L1 table; link; counts made exact: none waits for the next.
    assert steps >= 4
    assert found == [
        "fsync journal-tmp",
        "rename journal-tmp journal",
        "fsync .",
        *[f"fsync {target}"] * steps,
        *(["rename 1.qcow2 disk.qcow2", "fsync ."] if strategy == "COMMIT" else []),
        "fsync note-tmp",
        "rename note-tmp note",
        "fsync .",
        "unlink 2.qcow2",
        *(["unlink 1.qcow2"] if strategy == "ABSORB" else []),
        "unlink journal",
        "fsync .",
    ]
