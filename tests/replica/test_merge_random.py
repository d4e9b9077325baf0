"""Whatever a chain is and whatever is merged on either side: all points that are kept read as before."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st

from snapchain.merge import run as merge_run, step as merge_plan
from snapchain.merge.request import MergeRequest
from snapchain.model.merging import Strategy
from snapchain.model.retention import Policy
from snapchain.ops.ship.run import Files
from snapchain.replica.endpoint import DirectoryEndpoint
from snapchain.replica.points_merge import ReplicaMerge
from tests.ops.shipping import random_stack
from tests.replica.conftest import DISK, Place
from tests.replica.merging import Pointed, merged_by

WAYS = [None, None, Strategy.NEW, Strategy.ABSORB, Strategy.COMMIT]


def histories(examples: int, layers: int, directory: Callable[[], Path]) -> Counter[str]:
    """Lives that many histories; how many merges there were of what kind."""
    done: Counter[str] = Counter()

    @settings(max_examples=examples, deadline=None)
    @given(seed=st.integers(0, 1 << 32))
    def one(seed: int) -> None:
        live(directory(), seed, done, layers=layers)

    one()
    return done


@pytest.mark.timeout(300)
def test_random_histories(tmp_path_factory: pytest.TempPathFactory) -> None:
    done = histories(8, 5, lambda: tmp_path_factory.mktemp("history"))
    assert done["there"] >= 3
    assert done["here"] >= 1


@pytest.mark.soak
@pytest.mark.timeout(3000)
def test_many_random_histories(tmp_path_factory: pytest.TempPathFactory) -> None:
    done = histories(150, 9, lambda: tmp_path_factory.mktemp("history"))
    assert done["there"] >= 150
    assert done["here"] >= 100


def live(directory: Path, seed: int, done: Counter[str], *, layers: int) -> None:
    """A chain grows; it is sent, and merged here and there, at random; in the end all that is there is right."""
    draw = random.Random(seed)
    pointed = Pointed(Place(directory / "replica"), directory / "shots")

    def grown(image: Path) -> None:
        if draw.random() < 0.2:
            return
        pointed.send(
            image, files=draw.choice(list(Files)), labels=[draw.choice("ab"), "c"] if draw.random() < 0.5 else []
        )
        if draw.random() < 0.4:
            done[merge_here(image, draw)] += 1
            if draw.random() < 0.5:
                resend(pointed, image)
        if draw.random() < 0.8:
            done["there"] += merge_there(pointed, draw)
            pointed.check()
            if draw.random() < 0.5:
                resend(pointed, image)

    random_stack(directory / "source", seed, layers=layers, grown=grown)
    if pointed.shown:
        done["there"] += merge_there(pointed, draw)
        pointed.check()


def resend(pointed: Pointed, image: Path) -> None:
    """Nothing is new: a layer is sent at most where the newest file said nothing, was not sent, and was merged."""
    assert pointed.send(image).layers_sent <= 1
    assert pointed.send(image).layers_sent == 0


def merge_there(pointed: Pointed, draw: random.Random) -> bool:
    """Whether there was anything to merge."""
    policy = Policy(last=draw.randrange(1, 4), labels=frozenset(draw.sample("ab", draw.randrange(3))))
    to = DirectoryEndpoint(pointed.place.root)
    work = ReplicaMerge(to, DISK, policy, zone="UTC")
    with merged_by(draw.choice(WAYS)):
        plan = work.plan()
        report = work.run()
    assert report.layers_after == plan.layers_after
    assert pointed.points() == [point.point for point in plan.points if point.kept]
    return report.layers_after < report.layers_before


def merge_here(image: Path, draw: random.Random) -> str:
    """What came of it: `here`, or that there was nothing to merge."""
    chain = merge_plan.plan_step(MergeRequest(image=image, image_format=image.suffix[1:])).chain
    if len(chain) < 2:
        return "nothing"
    first = draw.randrange(len(chain) - 1)
    report = merge_run.run_step(merge_plan.plan_step(MergeRequest(image=image, from_layer=str(chain[first]))))
    assert report.layers_after < report.layers_before
    return "here"
