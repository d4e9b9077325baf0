"""Held points stay: whatever the rules say, and whoever changes the disk at the same time."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from snapchain.errors import Conflict, InvalidInput, NotFound
from snapchain.model.holds import hold_reasons
from snapchain.model.retention import Policy, decide
from snapchain.objects.memory import MemoryStore
from snapchain.objects.store import Data, StoreWrapper
from snapchain.repository.catalogue import Catalogue, Point
from snapchain.repository.points_merge import RepositoryMerge
from snapchain.repository.repository import Repository
from tests.repository.synthetic import LEAF, Run, again, drawn, ship

NOW = datetime(2026, 1, 31, 22, tzinfo=UTC)
DISK = "web1/vda"


@pytest.fixture
def repo() -> Repository:
    """Four days, a layer each."""
    stack = [drawn(LEAF, [Run(0, 512, 7)], b"")]
    for day in range(1, 4):
        stack.append(drawn(LEAF, [Run(512 * day, 512, day)], stack[-1].shown))
    shipped = ship(stack)
    ids = [layer.id for layer in shipped.layers]
    points = tuple(
        Point(
            point=number,
            time=NOW + timedelta(days=number),
            layer=layer.id,
            size=layer.size,
            content_id=layer.header.content_id,
        )
        for number, layer in enumerate(shipped.layers, 1)
    )
    shipped.repository.disk(DISK).advance(
        None, time=NOW, points=points, next_point=5, parents=dict(zip(ids, [None, *ids], strict=False))
    )
    return shipped.repository


def tags(catalogue: Catalogue, point: int) -> list[str]:
    return [hold.tag for each in catalogue.points if each.point == point for hold in each.holds]


def test_hold_and_release(repo: Repository) -> None:
    before = repo.catalogue(DISK)
    held = repo.hold(DISK, 2, "audit", reason="case 7")
    assert [(hold.tag, hold.reason) for hold in held.holds] == [("audit", "case 7")]
    assert held.holds[0].since.utcoffset() == timedelta()
    repo.hold(DISK, 2, "lab")
    now = again(repo).catalogue(DISK)
    assert tags(now, 2) == ["audit", "lab"]
    assert now.generation == before.generation + 2
    assert repo.release(DISK, 2, "audit").holds[0].tag == "lab"
    assert repo.release(DISK, 2, "lab").holds == ()
    assert again(repo).catalogue(DISK).points == before.points
    assert list(repo.store.list("leases/")) == []


def test_a_hold_that_is_there_already_changes_nothing_or_its_reason(repo: Repository) -> None:
    first = repo.hold(DISK, 2, "audit", reason="a")
    generation = repo.catalogue(DISK).generation
    assert repo.hold(DISK, 2, "audit", reason="a") == first
    assert repo.catalogue(DISK).generation == generation
    second = repo.hold(DISK, 2, "audit", reason="b")
    assert (second.holds[0].since, second.holds[0].reason) == (first.holds[0].since, "b")


def test_what_is_not_there(repo: Repository) -> None:
    repo.hold(DISK, 2, "audit")
    with pytest.raises(NotFound, match="has no point 9"):
        repo.hold(DISK, 9, "audit")
    with pytest.raises(NotFound, match="there is no disk 'other'"):
        repo.hold("other", 1, "audit")
    for point, tag in [(1, "audit"), (2, "other"), (9, "audit")]:
        with pytest.raises(NotFound, match=r"is not held under|has no point 9"):
            repo.release(DISK, point, tag)
    for tag in ("", " a", "a\n", "x" * 101):
        with pytest.raises(InvalidInput, match="cannot name a hold"):
            repo.hold(DISK, 1, tag)
    assert list(repo.store.list("leases/")) == []


def test_a_merge_keeps_what_is_held(repo: Repository) -> None:
    repo.hold(DISK, 2, "audit", reason="case 7")
    before = {point.point: point.content_id for point in repo.catalogue(DISK).points}
    report = RepositoryMerge(again(repo), DISK, Policy(last=1)).run()
    assert report.points_kept == (2, 4)
    left = again(repo).catalogue(DISK)
    assert {point.point: point.content_id for point in left.points} == {2: before[2], 4: before[4]}
    assert tags(left, 2) == ["audit"]
    repo.release(DISK, 2, "audit")
    assert RepositoryMerge(again(repo), DISK, Policy(last=1)).run().points_kept == (4,)


def test_the_reason_is_told_and_a_held_point_counts_as_any_other(repo: Repository) -> None:
    repo.hold(DISK, 1, "audit", reason="case 7")
    decisions = decide(repo.catalogue(DISK).points, Policy(last=2), zone=UTC, holds=hold_reasons)
    assert [each.kept for each in decisions] == [True, False, True, True]
    assert decisions[0].reasons == ("held: audit (case 7)",)


class Overtaken(StoreWrapper):
    """Somebody else publishes right before each of the first `times` creates."""

    def __init__(self, repo: Repository, times: int) -> None:
        super().__init__(repo.store)
        self._other = again(repo)
        self.left = times

    def create(self, name: str, data: Data) -> bool:
        if name.startswith("disks/") and self.left:
            self.left -= 1
            disk = self._other.disk(DISK)
            disk.advance(disk.existing(), time=NOW, owner=f"somebody {self.left}")
        return super().create(name, data)


def test_who_is_overtaken_tries_again(repo: Repository) -> None:
    store = Overtaken(repo, 3)
    again(repo, store).hold(DISK, 2, "audit")
    found = repo.catalogue(DISK)
    assert (tags(found, 2), found.owner) == (["audit"], "somebody 0")


def test_who_is_overtaken_for_ever_says_so(repo: Repository) -> None:
    with pytest.raises(Conflict, match="changed this disk at the same time"):
        again(repo, Overtaken(repo, 1000)).hold(DISK, 2, "audit")


def test_a_merge_that_was_planned_before_somebody_held_a_point_does_not_drop_it(repo: Repository) -> None:
    assert isinstance(repo.store, MemoryStore)
    planned = RepositoryMerge(again(repo), DISK, Policy(last=1))
    repo.hold(DISK, 2, "audit")
    assert planned.run().points_kept == (2, 4)
    assert tags(repo.catalogue(DISK), 2) == ["audit"]
