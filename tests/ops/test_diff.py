"""diff: the ranges are those leaves that differ byte by byte, whatever the sides are made of."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import pytest

from snapchain.destination.reading import PointLeaves
from snapchain.errors import Conflict, NotFound
from snapchain.objects.memory import MemoryStore
from snapchain.ops.diff import DiffReport, diff, image_side
from snapchain.repository.destination import RepositoryDestination
from snapchain.repository.repository import Repository
from tests.ops.shipping import DISK, MiB, random_stack, ship
from tests.ops.stacks import Layer, build, flat
from tests.repository.counting import CountingStore
from tests.repository.synthetic import LEAF, again, repository


def differing(old: bytes, new: bytes) -> list[tuple[int, int]]:
    """(offset, length) of neighbouring leaves that differ, cut at the shorter end; what only one has differs.

    The leaf in which the shorter one ends counts as filled up with zeroes.
    """
    common = min(len(old), len(new))
    marked = [
        (at, min(at + LEAF, common))
        for at in range(0, common, LEAF)
        if old[at : at + LEAF].ljust(LEAF, b"\0") != new[at : at + LEAF].ljust(LEAF, b"\0")
    ]
    if len(old) != len(new):
        marked.append((common, max(len(old), len(new))))
    joined: list[tuple[int, int]] = []
    for first, stop in marked:
        if joined and joined[-1][1] == first:
            joined[-1] = joined[-1][0], stop
        else:
            joined.append((first, stop))
    return [(first, stop - first) for first, stop in joined]


def point_leaves(repo: Repository, point: str | None) -> PointLeaves:
    with RepositoryDestination(repo).leaves(DISK, point) as found:
        return found  # it answers from records, and nobody collects here


def ranges(report: DiffReport) -> list[tuple[int, int]]:
    return [(each.offset, each.length) for each in report.ranges]


@pytest.mark.parametrize("seed", range(70, 76))
def test_points_and_images_of_random_stacks(tmp_path: Path, seed: int) -> None:
    """Every pair of layers, each as a point and as an image, both ways."""
    repo = repository(MemoryStore(), block_size=256 * 1024)
    stack = random_stack(tmp_path / "s", seed, layers=3, grown=lambda path: _ship(repo, path))
    shown = [path.read_bytes() for path in stack.shown]
    with ExitStack() as open_:
        images = [
            open_.enter_context(image_side(path, format="raw" if path.suffix == ".raw" else None))
            for path in stack.files
        ]
        for one in range(3):
            for other in range(3):
                sides: list[tuple[PointLeaves, PointLeaves]] = [
                    (point_leaves(repo, str(one + 1)), point_leaves(repo, str(other + 1))),
                    (images[one], images[other]),
                    (images[one], point_leaves(repo, str(other + 1))),
                    (point_leaves(repo, str(one + 1)), images[other]),
                ]
                want = differing(shown[one], shown[other])
                for old, new in sides:
                    report = diff(old, new)
                    assert ranges(report) == want, (one, other, old.name, new.name)
                    assert report.identical == (shown[one] == shown[other])
                    assert (report.old_size, report.new_size) == (len(shown[one]), len(shown[other]))
                    assert report.changed_bytes == sum(length for _, length in ranges(report))


def _ship(repo: Repository, path: Path) -> None:
    ship(path, repo)


def test_two_points_cost_what_changed_between_them(tmp_path: Path) -> None:
    repo = repository(MemoryStore(), block_size=256 * 1024)
    files = build(tmp_path / "c", [Layer(64 * MiB, ["write -P 1 0 48M"]), Layer(64 * MiB, ["write -P 2 1M 64k"])])
    for path in files:
        ship(path, repo)
    store = CountingStore(repo.store)
    fresh = again(repo, store)
    report = diff(point_leaves(fresh, "1"), point_leaves(fresh, "2"))
    assert ranges(report) == [(MiB, LEAF)]
    assert store.of("list", "packs/") == store.of("list", "index/") == []
    assert store.bytes_of("get", "packs/") < 100_000, "pages, no data"


def test_an_image_and_the_point_it_was_shipped_as_are_identical(tmp_path: Path) -> None:
    repo = repository(MemoryStore())
    files = build(tmp_path / "c", [Layer(4 * MiB, ["write -P 1 0 1M"]), Layer(4 * MiB, ["write -z 0 64k"])])
    ship(files[-1], repo)
    with image_side(files[-1]) as side:
        report = diff(side, point_leaves(repo, None))
    assert report.identical
    assert report.ranges == ()
    assert report.granularity == LEAF


def test_an_image_that_changes_meanwhile_is_a_conflict(tmp_path: Path) -> None:
    files = build(tmp_path / "c", [Layer(4 * MiB, ["write -P 1 0 1M"])])
    other = flat(files[0], tmp_path / "flat.raw")

    def compare() -> None:
        with image_side(files[0]) as old, image_side(other) as new:
            with other.open("r+b") as file:
                file.write(b"changed")
            diff(old, new)

    with pytest.raises(Conflict, match="written to while it was being read"):
        compare()


def test_sides_that_are_not_there(tmp_path: Path) -> None:
    repo = repository(MemoryStore())
    (image,) = build(tmp_path / "c", [Layer(MiB, ["write -P 1 0 64k"])])
    ship(image, repo)
    for disk, point in (("none", None), (DISK, "9"), (DISK, "label")):
        with pytest.raises(NotFound, match=r"has no point 9|is no label of this disk|there is no disk"):
            RepositoryDestination(repo).leaves(disk, point).__enter__()
    with pytest.raises(NotFound, match=r"none.qcow2: no such file"), image_side(tmp_path / "none.qcow2"):
        pass
