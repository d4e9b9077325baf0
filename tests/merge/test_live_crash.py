"""Live merges that die: snapchain or QEMU killed at each command, and what the next run makes of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.exhaustive import chosen
from tests.guest.live_chain import MIB, Chain, K, names, patterns_hold, sound
from tests.guest.machine import Machine
from tests.guest.spy import DROP, KILL, Act, Fault, Place, Spy, call, changing

KINDS = {
    "commit": ("--from", "1.qcow2", "--to", "3.qcow2", "--strategy", "commit"),
    "stream": ("--from", "1.qcow2", "--to", "3.qcow2", "--strategy", "absorb"),
    "active-stream": ("--from", "1.qcow2", "--strategy", "absorb"),
    "active-commit": ("--from", "1.qcow2", "--strategy", "commit"),
}
MOST_COMMANDS = 40


def counts(name: str) -> bool:
    """What changes something, and each look at the graph: what is done in between is killed there, too."""
    return changing(name) or name == "query-block"


def snapchain(*words: object) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, so that it can be killed."""
    argv = [sys.executable, "-m", "snapchain", *map(str, words)]
    return subprocess.run(argv, capture_output=True, text=True, check=False, timeout=120, env=dict(os.environ))


def merge(spy: Spy, kind: str) -> subprocess.CompletedProcess[str]:
    return snapchain("merge", "--qmp", spy.path, *KINDS[kind], "--json")


def journals(chain: Chain) -> list[str]:
    return [path.name for path in chain.folder.iterdir() if path.name.startswith(".snapchain")]


def check_clean(chain: Chain, kind: str, machine: Machine) -> None:
    """After the last run: one file less for each that was merged, no job, no journal, and the bytes are right."""
    assert machine.ask("query-jobs") == []
    merges = [each for each in journals(chain) if "merge" in each]
    assert not merges
    assert patterns_hold(machine, chain)
    assert machine.status() == "running"
    machine.write("vda", 3 * MIB, 64 * K, 90)
    assert machine.reads("vda", 3 * MIB, 64 * K, 90)
    left = sorted(path.name for path in chain.folder.glob("*.qcow2"))
    expected = {
        "commit": ["0.qcow2", "1.qcow2", "4.qcow2"],
        "stream": ["0.qcow2", "3.qcow2", "4.qcow2"],
        "active-stream": ["0.qcow2", "4.qcow2"],
        "active-commit": ["0.qcow2", "1.qcow2"],
    }[kind]
    assert left == expected
    top = chain.folder / expected[-1]
    assert names(top) == expected
    if kind in {"commit", "stream"}:
        chain.check_view(chain.folder / expected[1], "3.qcow2")
    machine.quit()
    sound(top)


@pytest.mark.parametrize("kind", KINDS)
def test_a_whole_run_never_lists_nodes_beside_a_concluded_stream(tmp_path: Path, kind: str) -> None:
    chain = Chain(tmp_path / "images")
    with Machine(tmp_path / "m", disks={"vda": chain.active}) as machine:
        with Spy(tmp_path / "spy", machine.qmp, counts=counts) as spy:
            done = merge(spy, kind)
            assert done.returncode == 0, done.stderr + done.stdout
            report = json.loads(done.stdout)["disks"][0]
            assert report["layers_before"] == 5
            assert report["layers_after"] == (3 if kind in {"commit", "stream"} else 2)
            assert report["bytes_freed"] > 0
            spy.check()
            assert len([each for each in spy.commands if each.number is not None]) < MOST_COMMANDS
        check_clean(chain, kind, machine)


def one_run(tmp_path: Path, kind: str, fault: Fault) -> bool:
    """Whether the run got as far as the fault."""
    chain = Chain(tmp_path / "images")
    with Machine(tmp_path / "m", disks={"vda": chain.active}) as machine:
        with Spy(tmp_path / "spy", machine.qmp, fault, counts=counts) as spy:
            first = merge(spy, kind)
            if not spy.happened:
                assert first.returncode == 0, first.stderr + first.stdout
                return False
            assert patterns_hold(machine, chain), "the guest goes on"
            assert machine.status() == "running"
            machine.write("vda", 3 * MIB + 512 * K, 64 * K, 91)
            again = merge(spy, kind)
            if again.returncode == 3:  # the layers are merged already: nothing of that name is there
                again = snapchain("merge", "--qmp", spy.path, "--max-layers", 5, "--json")
            assert again.returncode == 0, again.stderr + again.stdout
            assert machine.reads("vda", 3 * MIB + 512 * K, 64 * K, 91)
            spy.check()
        check_clean(chain, kind, machine)
    return True


@pytest.mark.sampled
@pytest.mark.parametrize("kind", KINDS)
def test_snapchain_killed_at_any_command(tmp_path: Path, kind: str) -> None:
    reached = 0
    for number in range(MOST_COMMANDS):
        for place in (Place.BEFORE, Place.SENT):
            case = number * 2 + (place is Place.SENT)
            if not chosen(case + len(kind), each=11):
                continue
            if not one_run(tmp_path / f"{number}-{place.name}", kind, Fault(number, place, KILL)):
                assert reached
                return
            reached += 1


@pytest.mark.sampled
@pytest.mark.parametrize("kind", KINDS)
def test_qemu_killed_at_any_command(tmp_path: Path, kind: str) -> None:
    """snapchain tells it; the images are right, and `doctor`, then a merge at rest, end clean."""
    for number in range(MOST_COMMANDS):
        for place in (Place.BEFORE, Place.SENT):
            case = number * 2 + (place is Place.SENT)
            if not chosen(case + len(kind), each=13):
                continue
            if not qemu_dies(tmp_path / f"{number}-{place.name}", kind, number, place, also=None):
                return


@pytest.mark.sampled
@pytest.mark.parametrize("kind", KINDS)
def test_both_killed_at_any_command(tmp_path: Path, kind: str) -> None:
    for number in range(MOST_COMMANDS):
        case = number + len(kind)
        if not chosen(case, each=9):
            continue
        if not qemu_dies(tmp_path / str(number), kind, number, Place.SENT, also=KILL):
            return


def qemu_dies(tmp_path: Path, kind: str, number: int, place: Place, *, also: Act | None) -> bool:
    chain = Chain(tmp_path / "images")
    with Machine(tmp_path / "m", disks={"vda": chain.active}) as machine:

        def kill() -> None:
            machine.process.kill()
            machine.process.wait()

        act = call(kill)
        if also is not None:
            both, act = act, lambda link: bool(both(link)) and also(link)
        with Spy(tmp_path / "spy", machine.qmp, Fault(number, place, act), counts=counts) as spy:
            first = merge(spy, kind)
            if not spy.happened:
                assert first.returncode == 0, first.stderr + first.stdout
                return False
    active = chain.active if chain.active.exists() else chain.files[1]
    chain.check_view(active, "4.qcow2")
    healed = snapchain("doctor", chain.folder, "--json")
    assert healed.returncode == 0, healed.stdout + healed.stderr
    assert not [each for each in journals(chain) if "merge" in each]
    active = chain.active if chain.active.exists() else chain.files[1]
    chain.check_view(active, "4.qcow2")
    again = snapchain("merge", active, "--json")
    assert again.returncode == 0, again.stderr + again.stdout
    chain.check_view(active, "4.qcow2")
    sound(active)
    assert len(names(active)) == 2
    return True


@pytest.mark.parametrize("kind", ["commit", "stream"])
def test_a_lost_answer_to_the_start(tmp_path: Path, kind: str) -> None:
    """QEMU has begun the job, and nobody was told: it is found by its id."""
    chain = Chain(tmp_path / "images")
    started = {"commit": "block-commit", "stream": "block-stream"}[kind]
    with Machine(tmp_path / "m", disks={"vda": chain.active}) as machine:
        only: Callable[[str], bool] = lambda name: name == started  # noqa: E731
        with Spy(tmp_path / "spy", machine.qmp, Fault(0, Place.SENT, DROP), counts=only) as spy:
            done = merge(spy, kind)
            assert spy.happened
            assert done.returncode == 0, done.stderr + done.stdout
        check_clean(chain, kind, machine)
