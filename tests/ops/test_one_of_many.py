"""What is done with one disk or one guest costs the same requests whatever else a repository holds.

Counted, never timed: the calls of the store by operation and kind of object, beside few other disks and beside many.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import cast

import pytest

from snapchain.destination.guest_record import record_disk
from snapchain.destination.protocol import Destination
from snapchain.model.retention import Policy
from snapchain.objects.memory import MemoryStore
from snapchain.ops import forget as forgetting
from snapchain.ops.forget import ForgetRequest
from snapchain.ops.guest_points import find_guest
from snapchain.ops.log import log
from snapchain.ops.nightly import maintenance
from snapchain.repository.catalogue import Point
from snapchain.repository.destination import RepositoryDestination
from snapchain.repository.repository import Repository
from tests.ops.shipping import MiB, ship
from tests.ops.stacks import Layer, build
from tests.repository.counting import CountingStore
from tests.repository.synthetic import again, repository

NOW = datetime(2026, 11, 30, 2, tzinfo=UTC)
FEW, MANY = 2, 40
DISK, GUEST = "one", "guest"
Act = Callable[[Destination, Path], object]


def add(repo: Repository, disk: str, *, instant: str | None = None) -> None:
    """A disk of two points, whose layers do not exist."""
    layers = [repo.keys.disk_key(f"{disk} {number}") for number in (1, 2)]
    points = tuple(
        Point(
            point=number,
            time=NOW + timedelta(hours=number),
            layer=layer,
            size=MiB,
            content_id="c" * 64,
            instant=instant if number == 2 else None,
        )
        for number, layer in enumerate(layers, 1)
    )
    repo.disk(disk).advance(
        None, time=NOW, points=points, next_point=3, parents=dict(zip(layers, [None, layers[0]], strict=True))
    )


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return build(tmp_path_factory.mktemp("chain"), [Layer(MiB, [f"write -P {n} 0 128k"]) for n in (1, 2, 3)])


@pytest.fixture(scope="module")
def places(chain: list[Path]) -> dict[int, Repository]:
    """By the number of other disks: a repository with two points of the disk, and a guest of two disks."""
    found = {}
    for others in (FEW, MANY):
        repo = found[others] = repository(MemoryStore())
        for number in range(others):
            add(repo, f"other{number}")
        for name in (f"{GUEST}/vda", f"{GUEST}/vdb", record_disk(GUEST)):
            add(repo, name, instant="ab" * 16)
        for image in chain[:2]:
            ship(image, repo, disk=DISK)
        RepositoryDestination(again(repo)).summaries()  # this machine has looked at it once
    return found


def _ship(image: Path) -> Act:
    def act(place: Destination, _: Path) -> object:
        return ship(image, cast("RepositoryDestination", place).repository, disk=DISK).points

    return act


def _restored(place: Destination, folder: Path) -> object:
    from snapchain.ops.restore.run import Restoration

    return Restoration(place, DISK, folder / "out.qcow2").run()


def _forget_plan(place: Destination, _: Path) -> object:
    return forgetting.plan(place, ForgetRequest(targets=((DISK, None),), policy=Policy(last=1)), now=NOW)


def _forgotten(place: Destination, _: Path) -> object:
    return forgetting.run(place, ForgetRequest(targets=((DISK, "1"),)), now=NOW)


ACTS: dict[str, Act] = {
    "log": lambda place, _: log(place, DISK),
    "hold": lambda place, _: place.hold(DISK, "1", "audit"),
    "restore": _restored,
    "forget, planned": _forget_plan,
    "forget": _forgotten,
    "nightly looks which disks are there": lambda place, _: maintenance._disks_there(place, [DISK, "nobody"]),
    "log of a guest": lambda place, _: log(place, GUEST),
    "nightly looks for a guest": lambda place, _: maintenance._guests_there(place, [GUEST, "nobody"]),
    "a guest": lambda place, _: find_guest(place, GUEST),
}


def requests(act: Act, repo: Repository, folder: Path) -> tuple[Counter[str], object]:
    """How often the store was called, by operation and kind of object, and what came of it."""
    copy = MemoryStore()
    for info in repo.store.list(""):
        copy.put(info.name, repo.store.get(info.name))
    store = CountingStore(copy)
    RepositoryDestination(again(repo, copy)).summaries()
    folder.mkdir()
    result = act(cast("Destination", RepositoryDestination(again(repo, store))), folder)
    return Counter(f"{each.operation} {each.name.partition('/')[0]}" for each in store.asked), result


@pytest.mark.parametrize("name", ACTS)
def test_other_disks_cost_no_request(name: str, places: dict[int, Repository], tmp_path: Path) -> None:
    few, result = requests(ACTS[name], places[FEW], tmp_path / "few")
    many, same = requests(ACTS[name], places[MANY], tmp_path / "many")
    assert few == many
    assert few["get disks"] < FEW + 4, "of other disks no catalogue is read"
    if isinstance(result, list):
        assert result == same
        assert "nobody" not in result
        assert result


def test_a_small_shipment_costs_no_more(chain: list[Path], places: dict[int, Repository], tmp_path: Path) -> None:
    few, _ = requests(_ship(chain[2]), places[FEW], tmp_path / "few")
    many, _ = requests(_ship(chain[2]), places[MANY], tmp_path / "many")
    assert few == many
    assert few["list disks"] > 0, "its own generations"
