"""Whatever is done to one disk, nothing of anybody else is changed: random forests through every command that writes.

COMMANDS holds them all. A command gets a forest, the name of a disk in it, and `data`; it may refuse, but not by an
error that is not of snapchain.
"""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st

from snapchain.destination.protocol import Destination
from snapchain.destinations import open_destination
from snapchain.errors import SnapchainError
from snapchain.merge import plan as planning, run as merge_run
from snapchain.merge.request import MergeRequest
from snapchain.model.merging import Strategy
from snapchain.objects.memory import MemoryStore
from snapchain.ops import doctor
from snapchain.ops.nightly import local_chain
from snapchain.ops.nightly.config import Disks
from snapchain.ops.restore.run import Restoration
from snapchain.ops.restore.target import Format
from snapchain.repository.destination import RepositoryDestination
from snapchain.source import sealing as snapshot
from tests.ops.forest import DIRECTORIES, SHM, ZERO, Forest, State, forests, read, write_image
from tests.ops.killing import killed_after
from tests.ops.shipping import delivery
from tests.repository.synthetic import repository

EXAMPLES = settings().max_examples if settings().max_examples > 100 else 60
Command = Callable[[Forest, Path, st.DataObject], None]
STRATEGIES = (None, None, Strategy.NEW, Strategy.ABSORB, Strategy.COMMIT)
done: Counter[str] = Counter()
"""What was really done, so that a law that holds because all was refused is noticed."""


def merge_request(forest: Forest, target: Path, data: st.DataObject) -> MergeRequest:
    """Any range, strategy and option."""
    chain = forest.chain(target)
    named = data.draw(st.booleans())
    lowest = data.draw(st.integers(0, len(chain) - 1)) if named else 0
    highest = data.draw(st.integers(0, lowest)) if named else 0
    remove = [path for path in chain if data.draw(st.integers(0, 5)) == 0]
    keep_inputs = not remove and data.draw(st.integers(0, 5)) == 0
    forest.may_go |= set(remove)
    return MergeRequest(
        image=target,
        flatten=not named and data.draw(st.booleans()),
        from_layer=str(chain[lowest]) if named else None,
        to_layer=str(chain[highest]) if named else None,
        strategy=data.draw(st.sampled_from(STRATEGIES)),
        keep_inputs=keep_inputs,
        image_format="qcow2",
        image_dirs=tuple(forest.image_dirs),
        remove=tuple(remove),
    )


def merge(forest: Forest, target: Path, data: st.DataObject) -> None:
    report = merge_run.run(planning.plan(merge_request(forest, target, data)))
    done["merged"] += bool(report.merges)
    done["removed"] += len(report.removed)
    done["kept"] += len(report.kept)


def merge_by_rules(forest: Forest, target: Path, data: st.DataObject) -> None:
    request = MergeRequest(
        image=target,
        flatten=data.draw(st.booleans()),
        max_layers=data.draw(st.integers(1, 2)),
        strategy=data.draw(st.sampled_from(STRATEGIES)),
        image_format="qcow2",
        image_dirs=tuple(forest.image_dirs),
    )
    report = merge_run.run(planning.plan(request))
    done["merged by rules"] += bool(report.merges)


def merge_at_night(forest: Forest, target: Path, data: st.DataObject) -> None:
    disks = Disks(path=target, format="qcow2", merge_above=4, image_dirs=tuple(forest.image_dirs))
    disks = disks.model_copy(update={"merge_above": data.draw(st.integers(1, 2))})
    report = merge_run.run(local_chain.plan(target, disks, at=[], budget=None))
    done["merged at night"] += bool(report.merges)


def seal(forest: Forest, target: Path, data: st.DataObject) -> None:
    overlay = data.draw(st.sampled_from([None, None, Path("new.qcow2")]))
    planned = snapshot.plan(target, overlay=overlay, image_format="qcow2", image_dirs=forest.image_dirs)
    snapshot.run(planned)
    done["sealed"] += 1


def kill_and_settle(forest: Forest, target: Path, data: st.DataObject) -> None:
    """A merge is killed, somebody else makes an overlay on one of its inputs, and then the doctor comes."""
    request = merge_request(forest, target, data)
    planned = planning.plan(request)
    if not killed_after(lambda: merge_run.run(planned), data.draw(st.integers(1, 20))):
        return
    forest.check(target)
    done["killed"] += 1
    inputs = [path for path in forest.chain(target) if path.exists() and path not in forest.half_done()]
    if data.draw(st.integers(0, 3)):
        below = data.draw(st.sampled_from(inputs[1:] or inputs))
        clone = forest.root / "b" / "since.qcow2"
        forest.add(clone, {0: 7}, below, str(below))
        forest.before[clone] = State.of(clone)
    report = doctor.run(doctor.plan([target.parent, *{path.parent for path in inputs}], image_dirs=forest.image_dirs))
    done["removed by the doctor"] += sum(len(each.removed) for each in report.treated)
    done["kept by the doctor"] += sum(len(each.kept) for each in report.treated)


@cache
def stored(kind: str) -> tuple[Destination, dict[int, bytes]]:
    """A destination with two points of a disk, each on a layer of its own, and what they show."""
    directory = Path(tempfile.mkdtemp(dir=SHM))
    atexit.register(shutil.rmtree, directory)
    where: Destination = (
        RepositoryDestination(repository(MemoryStore(), block_size=64 * 1024))
        if kind == "repository"
        else open_destination(f"dir:{directory}/replica")
    )
    write_image(directory / "0.qcow2", {0: 201, 1: 202}, None)
    write_image(directory / "1.qcow2", {1: ZERO, 2: 203}, "0.qcow2")
    shown = {}
    for number, name in enumerate(("0.qcow2", "1.qcow2"), 1):
        with delivery(where, directory / name, "d") as work:
            work.run()
        found = read(directory / name, [])
        assert found is not None
        shown[number] = found
    return where, shown


def restore(forest: Forest, target: Path, data: st.DataObject) -> None:
    """A point over any name: what is behind it is replaced, or nothing is changed at all."""
    where, shown = stored(data.draw(st.sampled_from(["repository", "repository", "replica"])))
    point, whole_chain = data.draw(st.sampled_from([1, 2])), data.draw(st.booleans())
    if data.draw(st.integers(0, 3)) == 0:
        target = target.with_name("another.qcow2")  # nobody's yet
    if data.draw(st.integers(0, 3)) == 0:
        alias = forest.root / data.draw(st.sampled_from(DIRECTORIES)) / "alias.qcow2"
        alias.symlink_to(target)
        target = alias
        forest.remember()
    real = Path(os.path.realpath(target))
    forest.chains[real] = [real]  # of the chain that it had nothing else may change
    before = {path: State.of(path) for path in forest.names()}
    kind: Format | None = None if whole_chain else "qcow2"
    force = data.draw(st.integers(0, 5)) > 0
    try:
        Restoration(where, "d", target, point=str(point), format=kind, whole_chain=whole_chain, force=force).run()
    except SnapchainError:
        assert {path: State.of(path) for path in forest.names()} == before, "a refusal changes nothing"
        raise
    done["restored"] += 1
    done["restored over a file"] += real in before
    done["restored through a link"] += target != real
    for path in (*forest.shown, target):
        if Path(os.path.realpath(path)) == real:
            forest.shown[path] = shown[point]
    forest.shown.setdefault(real, shown[point])


COMMANDS: dict[str, Command] = {
    "merge": merge,
    "merge by rules": merge_by_rules,
    "merge at night": merge_at_night,
    "snapshot": seal,
    "doctor after a kill": kill_and_settle,
    "restore": restore,
}


ENOUGH = {
    "merge": ("merged", "removed", "kept", "refused"),
    "merge by rules": ("merged by rules",),
    "merge at night": ("merged at night",),
    "snapshot": ("sealed", "refused"),
    "doctor after a kill": ("killed",),
    "restore": ("restored", "restored over a file", "restored through a link", "refused"),
}
"""What each must have done at least once, so that a law that holds since all was refused is noticed."""


@pytest.mark.parametrize("name", COMMANDS)
def test_nothing_of_anybody_else_is_changed(name: str) -> None:
    done.clear()

    @settings(max_examples=EXAMPLES)
    @given(st.data())
    def law(data: st.DataObject) -> None:
        with forests(data) as forest:
            target = data.draw(st.sampled_from([*forest.disks()[:1] * 4, *forest.disks()]))
            try:
                COMMANDS[name](forest, target, data)
            except SnapchainError:
                done["refused"] += 1
            forest.check(target)

    law()
    print(name, done)
    assert not [what for what in ENOUGH.get(name, ()) if not done[what]]
