"""Every broken or hostile image through the command line: its exit code, its words, and nothing else touched.

All commands run under one strace, so what each of them opened is known and not guessed.  `make test` takes one fixture
in five of each kind, as tests/image/test_fixtures.py scans them all; `make soak` takes all.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import defaultdict
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest

from fixtures.build import FIXTURES
from fixtures.fixture import Fixture, Stage
from fixtures.hostile import SECRET
from tests.exhaustive import some

ROOT = Path(__file__).resolve().parents[2]
# What is asked of them below stands first, so that it is always among those that are run.
NAMED = ("v3", "compressed-garbage", "backing-outside-up")


def kind(fixture: Fixture) -> tuple[int, bool]:
    return fixture.expect.exit_code, fixture.expect.stage is Stage.READ


def _of_each_kind() -> list[Fixture]:
    named = [fixture for fixture in FIXTURES if fixture.name in NAMED]
    others = sorted((fixture for fixture in FIXTURES if fixture.name not in NAMED), key=kind)
    return [*named, *(one for _, group in groupby(others, kind) for one in some(group, each=5))]


CHOSEN = _of_each_kind()
BAD = [fixture for fixture in CHOSEN if fixture.expect.exit_code]
ODD = [fixture for fixture in CHOSEN if not fixture.expect.exit_code]
pytestmark = pytest.mark.sampled

MAX_CPU_SECONDS = 10
MAX_BYTES = 200 << 20

# What any Python program opens, and what any process may ask of the kernel.
SYSTEM = tuple(
    str(Path(path).resolve())
    for path in (sys.prefix, sys.base_prefix, ROOT / "snapchain", ROOT / ".venv", "/usr", "/lib", "/lib64")
)
HARMLESS = re.compile(
    r"^(/dev/(null|urandom)|/proc/(self|\d+)(/.*)?|/sys/.*|/etc/(ld\.so\.\w+|localtime|os-release|mime\.types|terminfo.*)|"
    r"pipe:\[\d+\]|.*/\.hypothesis.*)$"
)
OPENED = re.compile(r"open(?:at)?\((.*?)\)\s*= \d+<(.*)>$")


MADE = re.compile(r"(?:clone3?|v?fork)\(.*= (\d+)(?:<.*>)?$")


@dataclass(frozen=True)
class Seen:
    """One command: what it said, what it opened (not merely walked through), whom it called."""

    result: dict[str, Any]
    opened: frozenset[str]
    connected: tuple[str, ...]


@dataclass(frozen=True)
class Runs:
    directory: Path
    repository: Path
    seen: dict[tuple[str, str], Seen]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    directory = tmp_path_factory.mktemp("fixtures")
    work = tmp_path_factory.mktemp("work")
    repository = work / "repository"
    commands: dict[tuple[str, str], list[str]] = {
        ("", "init"): ["init", str(repository), "--no-encryption"],
    }
    for fixture in CHOSEN:
        path = str(fixture.make(directory))
        said = ["--format", fixture.image_format] if fixture.image_format else []
        commands[fixture.name, "inspect"] = ["inspect", path, *said]
        if fixture in BAD:
            commands[fixture.name, "ship"] = ["ship", path, f"{repository}::{fixture.name}", *said]
    # One that may open the secret, to see that an opening outside is seen.
    trusting = ["inspect", str(directory / "backing-outside-up" / "disk.qcow2"), "--image-dir", str(directory)]
    commands["backing-outside-up", "trusting"] = trusting
    (work / "commands").write_text(json.dumps(list(commands.values())))
    trace = [
        "strace",
        "-f",
        "-y",
        "-qq",
        "-e",
        "trace=openat,open,openat2,connect,clone,clone3,fork,vfork",
        "-o",
        str(work / "trace"),
    ]
    driver = [sys.executable, str(ROOT / "tests/cli/run_many.py"), str(work / "commands"), str(work / "results")]
    environment = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": str(ROOT),
        "HOME": str(work),
        "XDG_STATE_HOME": str(work / "state"),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    subprocess.run([*trace, *driver], check=True, env=environment, cwd=work)
    opened, connected = _calls(work / "trace")
    seen = {
        key: Seen(result, frozenset(opened[result["pid"]]), tuple(connected[result["pid"]]))
        for key, result in zip(commands, json.loads((work / "results").read_text()), strict=True)
    }
    return Runs(directory, repository, seen)


def _calls(trace: Path) -> tuple[dict[int, set[str]], dict[int, list[str]]]:
    """What each command opened and whom it called, its threads and children included."""
    command: dict[int, int] = {}
    begun: dict[int, str] = {}
    opened: dict[int, set[str]] = defaultdict(set)
    connected: dict[int, list[str]] = defaultdict(list)
    driver = 0
    for line in trace.read_text(errors="replace").splitlines():
        number, _, call = line.partition(" ")
        thread, call = int(number), call.strip()
        driver = driver or thread
        if call.endswith("<unfinished ...>"):
            begun[thread] = call.removesuffix("<unfinished ...>")
            continue
        if call.startswith("<..."):
            call = begun.pop(thread, "") + call.partition("resumed>")[2]
        if made := MADE.match(call):
            child = int(made[1])
            command[child] = child if thread == driver else command.get(thread, thread)
        elif call.startswith("connect("):
            connected[command.get(thread, thread)].append(call)
        elif (found := OPENED.search(call)) and "O_PATH" not in found[1] and "O_DIRECTORY" not in found[1]:
            opened[command.get(thread, thread)].add(found[2])
    return opened, connected


def _strangers(seen: Seen, *mine: Path) -> list[str]:
    """What was opened and is neither ours nor the system's."""
    allowed = (*SYSTEM, "/proc/sys/kernel/random/boot_id", *(str(path) for path in mine))
    return sorted(
        path
        for path in seen.opened
        if not HARMLESS.match(path) and not any(path == root or path.startswith(f"{root}/") for root in allowed)
    )


def _check_bounds(seen: Seen) -> None:
    assert seen.result["cpu_seconds"] < MAX_CPU_SECONDS
    assert seen.result["peak_bytes"] < MAX_BYTES
    assert "Traceback" not in seen.result["stderr"]
    assert seen.connected == ()


def test_the_trace_tells_the_truth(runs: Runs) -> None:
    seen = runs.seen["v3", "inspect"]
    assert str(runs.directory / "v3" / "disk.qcow2") in seen.opened
    assert seen.result["exit_code"] == 0
    assert runs.seen["", "init"].result["exit_code"] == 0
    assert _strangers(seen) == [str(runs.directory / "v3" / "disk.qcow2")]
    trusting = runs.seen["backing-outside-up", "trusting"]
    assert trusting.result["exit_code"] == 0
    assert _strangers(trusting, runs.directory / "backing-outside-up") == [str(runs.directory / SECRET)]
    # Ships from threads; what they open counts for the command.
    shipping = runs.seen["compressed-garbage", "ship"]
    assert str(runs.directory / "compressed-garbage" / "disk.qcow2") in shipping.opened
    assert any(path.startswith(str(runs.repository)) for path in shipping.opened)


@pytest.mark.parametrize("verb", ["inspect", "ship"])
@pytest.mark.parametrize("fixture", BAD, ids=lambda fixture: fixture.name)
def test_bad_images(fixture: Fixture, verb: str, runs: Runs) -> None:
    seen = runs.seen[fixture.name, verb]
    _check_bounds(seen)
    assert _strangers(seen, runs.directory / fixture.name, runs.repository, runs.repository.with_name("state")) == []
    stderr = seen.result["stderr"]
    if fixture.expect.stage is Stage.READ and verb == "inspect":
        assert seen.result["exit_code"] == 0, stderr
        return
    assert seen.result["exit_code"] == fixture.expect.exit_code, stderr
    assert re.search(fixture.expect.word, stderr, re.IGNORECASE), stderr
    assert fixture.name in stderr, "the message names no file"
    assert not seen.result["stdout"]


@pytest.mark.parametrize("fixture", ODD, ids=lambda fixture: fixture.name)
def test_legal_images_are_inspected(fixture: Fixture, runs: Runs) -> None:
    seen = runs.seen[fixture.name, "inspect"]
    _check_bounds(seen)
    assert seen.result["exit_code"] == 0, seen.result["stderr"]
    assert _strangers(seen, runs.directory / fixture.name) == []


def test_nothing_of_a_bad_image_was_published(runs: Runs) -> None:
    argv = [sys.executable, "-m", "snapchain", "log", str(runs.repository), "--json"]
    done = subprocess.run(argv, check=True, capture_output=True, cwd=ROOT)
    assert [disk["name"] for disk in json.loads(done.stdout)["disks"] if disk["points"]] == []
