"""Live merges that die: snapchain or QEMU killed at each command, and what the next run makes of it."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Collection
from pathlib import Path

import pytest
from _pytest.mark.structures import ParameterSet

from snapchain.cli import main
from snapchain.errors import NotFound, Unavailable
from snapchain.guest.address import GuestAddress
from snapchain.guest.qmp import Monitor
from snapchain.guest.qmp_guest import QmpGuest
from snapchain.merge import live, live_run
from snapchain.merge.request import MergeRequest
from snapchain.model.merging import Strategy
from tests.exhaustive import some
from tests.guest.live_chain import MIB, Chain, K, names, patterns_hold, sound
from tests.guest.machine import Machine
from tests.guest.spy import DROP, KILL, LOSE, Act, Fault, Place, Spy, call, changing
from tests.ops.killing import killed_after

KINDS = {
    "commit": ("--from", "1.qcow2", "--to", "3.qcow2", "--strategy", "commit"),
    "stream": ("--from", "1.qcow2", "--to", "3.qcow2", "--strategy", "absorb"),
    "active-stream": ("--from", "1.qcow2", "--strategy", "absorb"),
    "active-commit": ("--from", "1.qcow2", "--strategy", "commit"),
}
COMMANDS = {"commit": 18, "stream": 16, "active-stream": 15, "active-commit": 19}
"""Of a run of each kind, as counted; the whole run asserts it."""
BEGINS = 5
"""Nothing has begun before that; the job is number 7."""

Cases = Collection[tuple[str, int, Place]]
SNAPCHAIN: Cases = {
    ("commit", 10, Place.SENT),  # finalized
    ("commit", 7, Place.SENT),  # begun
    ("stream", 11, Place.BEFORE),  # concluded
    ("active-commit", 8, Place.SENT),  # pivoted
}
QEMU: Cases = {("commit", 10, Place.SENT), ("stream", 9, Place.SENT)}
BOTH: Cases = {("commit", 8, Place.BEFORE), ("active-commit", 8, Place.SENT)}
LINK: Cases = {("commit", 7, Place.SENT), ("stream", 7, Place.SENT), ("active-commit", 8, Place.SENT)}
LOST: Cases = {("commit", 10, Place.SENT), ("active-commit", 8, Place.BEFORE)}


def cases(sampled: Cases) -> list[ParameterSet]:
    """Each command of each kind, before QEMU has it and after it is done; all but the sampled ones for `make soak`."""
    return [
        pytest.param(*case, marks=() if case in sampled else pytest.mark.soak)
        for kind, count in COMMANDS.items()
        for case in itertools.product([kind], range(BEGINS, count), (Place.BEFORE, Place.SENT))
    ]


def counts(name: str) -> bool:
    """What changes something, and each look at the graph: what is done in between is killed there, too."""
    return changing(name) or name == "query-block"


def snapchain(*words: object) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, so that it can be killed."""
    argv = [sys.executable, "-m", "snapchain", *map(str, words)]
    return subprocess.run(argv, capture_output=True, text=True, check=False, timeout=120, env=dict(os.environ))


def again(*words: object) -> int:
    """A command in this process, which takes a tenth of the time; its exit code."""
    return main([*map(str, words), "--json"])


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    """Copied for each case."""
    return Chain(tmp_path_factory.mktemp("template") / "images")


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
            assert len([each for each in spy.commands if each.number is not None]) == COMMANDS[kind]
        check_clean(chain, kind, machine)


@pytest.mark.parametrize(("kind", "number", "place"), cases(SNAPCHAIN))
def test_snapchain_is_killed(tmp_path: Path, template: Chain, kind: str, number: int, place: Place) -> None:
    """The guest goes on, and the next run ends clean."""
    snapchain_fails(tmp_path, template, kind, Fault(number, place, KILL))


@pytest.mark.parametrize(("kind", "number", "place"), cases(LINK))
def test_the_link_is_cut(tmp_path: Path, template: Chain, kind: str, number: int, place: Place) -> None:
    """At each command: it may end well or not, and the next run ends clean."""
    snapchain_fails(tmp_path, template, kind, Fault(number, place, DROP))


@pytest.mark.parametrize(("kind", "number", "place"), cases(LOST))
def test_a_message_is_lost(tmp_path: Path, template: Chain, kind: str, number: int, place: Place) -> None:
    """The command, or its answer, and the connection stays: it may end well or not, and the next run ends clean."""
    snapchain_fails(tmp_path, template, kind, Fault(number, place, LOSE))


def merge_impatiently(spy: Spy, kind: str) -> subprocess.CompletedProcess[str]:
    """In this process, with a short deadline for answers."""
    words = dict(zip(KINDS[kind][::2], KINDS[kind][1::2], strict=True))
    monitor = Monitor(spy.path, command_seconds=2)
    guest = QmpGuest(GuestAddress(qmp=spy.path), monitor=monitor)
    try:
        active = guest.disks()[0].active.path
        assert active is not None
        request = MergeRequest(
            image=active,
            from_layer=words["--from"],
            to_layer=words.get("--to"),
            strategy=Strategy(words["--strategy"]),
        )
        live_run.run(guest, live.plan(guest, "vda", request))
    except Unavailable as error:
        return subprocess.CompletedProcess([], error.exit_code, "", str(error))
    finally:
        guest.close()
    return subprocess.CompletedProcess([], 0)


def snapchain_fails(tmp_path: Path, template: Chain, kind: str, fault: Fault) -> None:
    chain = template.copy(tmp_path / "images")
    with Machine(tmp_path / "m", disks={"vda": chain.active}) as machine:
        with Spy(tmp_path / "spy", machine.qmp, fault, counts=counts) as spy:
            first = merge_impatiently(spy, kind) if fault.act is LOSE else merge(spy, kind)
            assert spy.happened
            assert first.returncode in ({-signal.SIGKILL} if fault.act is KILL else {0, Unavailable.exit_code}), first
            assert patterns_hold(machine, chain), "the guest goes on"
            assert machine.status() == "running"
            machine.write("vda", 3 * MIB + 512 * K, 64 * K, 91)
            next_run(spy.path, kind)
            assert machine.reads("vda", 3 * MIB + 512 * K, 64 * K, 91)
            spy.check()
        check_clean(chain, kind, machine)


def next_run(socket: Path, kind: str) -> None:
    """The same merge again, or what is to be finished of it."""
    status = again("merge", "--qmp", socket, *KINDS[kind])
    if status == NotFound.exit_code:  # they are merged already: no layer has that name
        status = again("merge", "--qmp", socket, "--max-layers", 5)
    assert status == 0


@pytest.mark.sampled
@pytest.mark.parametrize("kind", KINDS)
def test_snapchain_is_killed_at_each_change_of_a_file(tmp_path: Path, kind: str) -> None:
    """Journal, note, and the removal of the inputs, which QEMU does not see."""
    for steps in some(range(1, 100), each=6):
        chain = Chain(tmp_path / f"images{steps}")
        with Machine(tmp_path / "m", disks={"vda": chain.active}) as machine:
            killed = killed_after(lambda machine=machine: again("merge", "--qmp", machine.qmp, *KINDS[kind]), steps)  # type: ignore[misc]
            assert patterns_hold(machine, chain), "the guest goes on"
            machine.write("vda", 3 * MIB + 512 * K, 64 * K, 91)
            next_run(machine.qmp, kind)
            assert machine.reads("vda", 3 * MIB + 512 * K, 64 * K, 91)
            check_clean(chain, kind, machine)
        if not killed:
            assert steps > 10
            return
    raise AssertionError("too many steps")


@pytest.mark.parametrize(("kind", "number", "place"), cases(QEMU))
def test_qemu_is_killed(tmp_path: Path, template: Chain, kind: str, number: int, place: Place) -> None:
    """snapchain tells it; the images are right, and `doctor`, then a merge at rest, end clean."""
    qemu_dies(tmp_path, template, kind, number, place, also=None)


@pytest.mark.parametrize(("kind", "number", "place"), cases(BOTH))
def test_both_are_killed(tmp_path: Path, template: Chain, kind: str, number: int, place: Place) -> None:
    qemu_dies(tmp_path, template, kind, number, place, also=KILL)


def qemu_dies(tmp_path: Path, template: Chain, kind: str, number: int, place: Place, *, also: Act | None) -> None:
    chain = template.copy(tmp_path / "images")
    with Machine(tmp_path / "m", disks={"vda": chain.active}) as machine:

        def kill() -> None:
            machine.process.kill()
            machine.process.wait()

        act = call(kill)
        if also is not None:
            both, act = act, lambda link: bool(both(link)) and also(link)
        with Spy(tmp_path / "spy", machine.qmp, Fault(number, place, act), counts=counts) as spy:
            merge(spy, kind)
            assert spy.happened
    active = chain.active if chain.active.exists() else chain.files[1]
    chain.check_view(active, "4.qcow2")
    assert again("doctor", chain.folder) == 0
    assert not [each for each in journals(chain) if "merge" in each]
    active = chain.active if chain.active.exists() else chain.files[1]
    chain.check_view(active, "4.qcow2")
    assert again("merge", active) == 0
    chain.check_view(active, "4.qcow2")
    sound(active)
    assert len(names(active)) == 2


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
