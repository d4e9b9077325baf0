"""What is stored, by disk: held against gc's own count, and against what is left when a disk goes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from snapchain.destination.usage import StoredUsage
from snapchain.errors import NotFound
from snapchain.objects.memory import MemoryStore
from snapchain.repository import usage as usages
from snapchain.repository.catalogue import Catalogue, generation_names
from snapchain.repository.format import layer_name
from snapchain.repository.mark import mark
from snapchain.repository.repository import Repository
from snapchain.repository.usage import first_points, usage
from tests.ops.shipping import MiB, ship
from tests.ops.stacks import Layer, build
from tests.repository.synthetic import again, repository

NOISE = 2 * MiB


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Sequence[Path]:
    place = tmp_path_factory.mktemp("usage")
    first = build(place / "a", [Layer(NOISE, ["write -P 1 0 192k"]), Layer(NOISE, ["write -P 2 256k 64k"])])
    second = build(place / "b", [Layer(NOISE, ["write -P 1 0 192k", "write -P 3 1M 320k"])])
    return [*first, *second]


@pytest.fixture
def repo(images: Sequence[Path]) -> Repository:
    repo = repository(MemoryStore())
    ship(images[0], repo, disk="one")
    ship(images[1], repo, disk="one")
    ship(images[1], repo, disk="one")
    ship(images[2], repo, disk="two")
    ship(images[0], repo, disk="clone")
    return again(repo)


def by_disk(found: StoredUsage) -> dict[str, tuple[int, int]]:
    return {each.disk: (each.stored_bytes, each.own_bytes) for each in found.disks}


def test_it_counts_what_gc_counts(repo: Repository) -> None:
    found = usage(repo)
    used = sum(each.used_bytes for each in mark(again(repo)).usage)
    assert found.blob_bytes + found.map_bytes == used > 0
    packs = sum(info.size for info in repo.store.list("packs/"))
    assert found.unreferenced_bytes == packs - used
    assert found.stored_bytes == sum(info.size for info in repo.store.list(""))
    assert {each.kind: each.objects for each in found.kinds}["layers"] == 4
    data = sum(repo.layer(layer).header.data_bytes for each in repo.catalogues() for layer in each.parents)
    assert found.data_bytes == data
    assert found.deduplication == data / found.unique_bytes > 1


@pytest.mark.parametrize("disk", ["one", "two", "clone"])
def test_own_bytes_are_what_goes_with_the_disk(repo: Repository, disk: str) -> None:
    before = usage(repo)
    for name in list(generation_names(repo.store, repo.keys.disk_key(disk))):
        repo.store.delete(name)
    after = usage(again(repo))
    own = by_disk(before)[disk][1]
    assert (before.blob_bytes + before.map_bytes) - (after.blob_bytes + after.map_bytes) == own
    assert (own > 0) is (disk != "clone"), "a clone needs nothing of its own"


def test_what_each_point_added(repo: Repository) -> None:
    (one,) = (each for each in usage(repo, "one").disks if each.disk == "one")
    added = [each.added_bytes for each in one.points]
    assert sum(added) == one.stored_bytes
    assert added[0] > added[1] > added[2] == 0
    assert (one.added_bytes, one.month_bytes, one.other_bytes, one.point_count) == (0, one.stored_bytes, 0, 3)
    assert all(each.points == () for each in usage(repo).disks)
    with pytest.raises(NotFound, match="no disk 'gone'"):
        usage(repo, "gone")


def test_rows_that_do_not_fit_into_memory(repo: Repository, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = usage(repo, "one")
    monkeypatch.setattr(usages, "_IN_MEMORY", 0)
    monkeypatch.setattr(usages, "_SHARES", 3)
    assert usage(again(repo), "one") == whole


def test_a_damaged_layer_is_a_finding_and_no_obstacle(repo: Repository) -> None:
    whole = by_disk(usage(repo))
    lost = repo.catalogue("two").points[0].layer
    repo.store.put(layer_name(lost), b"?")
    found = usage(again(repo))
    (finding,) = found.findings
    assert (finding.kind, finding.disk, finding.points, finding.subject) == ("corrupt", "two", (1,), layer_name(lost))
    assert by_disk(found)["one"][0] == whole["one"][0]
    assert by_disk(found)["two"] == (0, 0)


def test_a_damaged_catalogue_is_a_row(repo: Repository) -> None:
    key = repo.keys.disk_key("two")
    *_, name = generation_names(repo.store, key)
    repo.store.put(name, b"?")
    found = usage(again(repo))
    assert [each.disk for each in found.disks if each.trouble] == [f"unknown disk {key}"]
    assert len(found.findings) == 1


def test_a_layer_that_was_merged_away_meanwhile_is_no_damage(repo: Repository, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Repository.catalogue_of

    def stale(self: Repository, key: str) -> Catalogue | None:
        found = real(self, key)
        assert found is not None
        return found.model_copy(update={"parents": {**found.parents, "f" * 32: None}})

    monkeypatch.setattr(Repository, "catalogue_of", stale)
    assert usage(repo).findings == ()


def test_the_first_point_of_each_layer() -> None:
    layers = {"a": None, "b": "a", "c": "b", "x": "a", "y": "x"}
    tops = ["b", "b", "x", "c"]
    points = tuple(
        {"point": at, "time": "2026-11-30T02:00:00Z", "layer": layer, "size": 0, "content_id": "0" * 64}
        for at, layer in enumerate(tops, 1)
    )
    fields = {
        "disk": "d",
        "generation": 1,
        "previous": "",
        "nonce": "",
        "time": "2026-11-30T02:00:00Z",
        "next_point": 9,
    }
    catalogue = Catalogue.model_validate({**fields, "points": points, "parents": layers})
    assert first_points(catalogue) == {"a": 0, "b": 0, "x": 2, "c": 3, "y": 4}
