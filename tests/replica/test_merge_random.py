"""Whatever a chain is and whatever is merged on either side: all points that are kept read as before."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from snapchain.errors import Unsupported
from snapchain.model.retention import Policy
from snapchain.ops import merge_image
from snapchain.ops.merge.strategy import Strategy
from snapchain.ops.merge_replica import ReplicaMerge
from snapchain.ops.replica_engine import ReplicaEngine
from snapchain.ops.send import Files
from snapchain.replica.endpoint import DirectoryEndpoint
from tests.ops.shipping import random_stack
from tests.replica.conftest import DISK, Place
from tests.replica.merging import Pointed

WAYS = [None, None, Strategy.NEW, Strategy.ABSORB, Strategy.COMMIT]


def histories(examples: int) -> Callable[[Callable[..., None]], Callable[..., None]]:
    def wrapped(function: Callable[..., None]) -> Callable[..., None]:
        bounded = settings(
            max_examples=examples, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
        )
        return bounded(given(seed=st.integers(0, 1 << 32))(function))

    return wrapped


@pytest.mark.timeout(300)
@histories(8)
def test_random_histories(tmp_path_factory: pytest.TempPathFactory, seed: int) -> None:
    live(tmp_path_factory.mktemp("history"), seed, layers=5)


@pytest.mark.soak
@pytest.mark.timeout(3000)
@histories(150)
def test_many_random_histories(tmp_path_factory: pytest.TempPathFactory, seed: int) -> None:
    live(tmp_path_factory.mktemp("history"), seed, layers=9)


def live(directory: Path, seed: int, *, layers: int) -> None:
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
            merge_here(image, draw)
            if draw.random() < 0.5:
                resend(pointed, image)
        if draw.random() < 0.8:
            merge_there(pointed, draw)
            pointed.check()
            if draw.random() < 0.5:
                resend(pointed, image)

    random_stack(directory / "source", seed, layers=layers, grown=grown)
    if pointed.shown:
        merge_there(pointed, draw)
        pointed.check()


def resend(pointed: Pointed, image: Path) -> None:
    """Nothing is new: a layer is sent at most where the newest file said nothing, was not sent, and was merged."""
    assert pointed.send(image).layers_sent <= 1
    assert pointed.send(image).layers_sent == 0


def merge_there(pointed: Pointed, draw: random.Random) -> None:
    policy = Policy(last=draw.randrange(1, 4), labels=frozenset(draw.sample("ab", draw.randrange(3))))
    to = DirectoryEndpoint(pointed.place.root, engine=ReplicaEngine(draw.choice(WAYS)))
    work = ReplicaMerge(to, DISK, policy, zone="UTC")
    plan = work.plan()
    report = work.run()
    assert report.layers_after == plan.layers_after
    assert pointed.points() == [point.point for point in plan.points if point.kept]


def merge_here(image: Path, draw: random.Random) -> None:
    chain = merge_image.plan(image, image_format=image.suffix[1:]).chain
    if len(chain) < 2:
        return
    first = draw.randrange(len(chain) - 1)
    with suppress(Unsupported):  # a raw root, say, in which nothing may be merged
        merge_image.run(merge_image.plan(image, from_layer=str(chain[first])))
