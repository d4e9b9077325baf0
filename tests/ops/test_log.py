"""log: all disks and points, from the newest catalogues alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from snapchain.errors import Corrupt, NotFound
from snapchain.objects.memory import MemoryStore
from snapchain.ops.log import log
from snapchain.repository.destination import RepositoryDestination
from tests.ops.shipping import DISK, MiB, ship
from tests.ops.stacks import Layer, build
from tests.repository.counting import CountingStore
from tests.repository.synthetic import again, content_id_of, repository


def test_disks_by_name_and_points_by_age(tmp_path: Path) -> None:
    repo = repository(MemoryStore())
    assert log(RepositoryDestination(repo)).disks == ()
    files = build(tmp_path / "c", [Layer(MiB, ["write -P 1 0 64k"]), Layer(2 * MiB, ["write -P 2 64k 64k"])])
    ship(files[0], repo, labels=["first"])
    ship(files[1], repo)
    ship(files[1], repo)
    ship(files[0], repo, disk="a/b")
    report = log(RepositoryDestination(again(repo)))
    assert [disk.name for disk in report.disks] == ["a/b", DISK]
    points = report.disks[1].points
    assert [(point.point, point.labels, point.virtual_size, point.layers) for point in points] == [
        (1, ("first",), MiB, 1),
        (2, (), 2 * MiB, 2),
        (3, (), 2 * MiB, 2),
    ]
    assert points[0].content_id == content_id_of((b"\1" * 65536).ljust(MiB, b"\0"))
    assert points[1].content_id == points[2].content_id != points[0].content_id
    assert [point.time for point in points] == sorted(point.time for point in points)
    assert all(point.time.utcoffset() is not None for point in points)
    assert log(RepositoryDestination(repo), "a/b").disks == report.disks[:1]
    with pytest.raises(NotFound, match="no disk 'none'"):
        log(RepositoryDestination(repo), "none")


def test_only_catalogues_are_read(tmp_path: Path) -> None:
    repo = repository(MemoryStore())
    (image,) = build(tmp_path / "c", [Layer(MiB, ["write -P 1 0 64k"])])
    for _ in range(3):
        ship(image, repo)
    store = CountingStore(repo.store)
    log(RepositoryDestination(again(repo, store)))
    assert [each.name.split("/")[0] for each in store.of("get")] == ["disks"]
    assert {each.name.split("/")[0] for each in store.asked} == {"disks"}


def test_a_damaged_catalogue_is_named(tmp_path: Path) -> None:
    repo = repository(MemoryStore())
    (image,) = build(tmp_path / "c", [Layer(MiB, ["write -P 1 0 64k"])])
    ship(image, repo)
    (name,) = (info.name for info in repo.store.list("disks/"))
    repo.store.put(name, repo.store.get(name)[:-1])
    with pytest.raises(Corrupt, match=name):
        log(RepositoryDestination(again(repo)))
