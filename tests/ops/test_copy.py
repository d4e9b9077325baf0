"""Points go from one destination to another: exact bytes, the same content ids and numbers, whatever happens meanwhile."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st

from snapchain.destination.protocol import Destination
from snapchain.errors import Corrupt, SnapchainError, Unavailable
from snapchain.model.retention import DropPoints
from snapchain.objects.memory import MemoryStore
from snapchain.objects.store import ObjectStore
from snapchain.ops.copy import CopyReport, CopyRequest, plan, run
from snapchain.repository import collecting, packs
from snapchain.repository.catalogue import Hold, Point
from snapchain.repository.destination import RepositoryDestination
from snapchain.repository.points_merge import RepositoryMerge
from snapchain.repository.repository import Repository
from snapchain.repository.verification import verify
from snapchain.testing.faults import Fault, FaultStore, On, crash_points
from tests.repository.synthetic import LEAF, Drawn, again, repository, ship, stacks

DISK = "web1/vda"
BEGIN = datetime(2026, 11, 1, 22, tzinfo=UTC)


@dataclass
class Source:
    """A repository with points of synthetic layers. shown: by disk and number, what each point must show."""

    repository: Repository = field(default_factory=repository)
    shown: dict[tuple[str, int], bytes] = field(default_factory=dict)

    def publish(self, stack: Sequence[Drawn], *, disk: str = DISK, of: Collection[int] | None = None) -> None:
        """A point of each layer of a new chain, or of the layers of these places."""
        layers = ship(stack, self.repository).layers
        catalogues = again(self.repository).disk(disk)
        current = catalogues.read()
        points, parents = (current[0].points, dict(current[0].parents)) if current else ((), {})
        number = current[0].next_point if current else 1
        for place, layer in enumerate(layers):
            parents[layer.id] = layers[place - 1].id if place else None
            if of is not None and place not in of:
                continue
            point = Point(
                point=number,
                time=BEGIN + timedelta(hours=number),
                labels=(f"p{number}",),
                layer=layer.id,
                size=layer.size,
                content_id=layer.header.content_id,
                holds=(Hold(tag="legal", since=BEGIN, reason="a lawsuit"),) if number % 3 == 0 else (),
            )
            points = (*points, point)
            self.shown[disk, number] = stack[place].shown
            number += 1
        catalogues.advance(current, time=BEGIN, points=points, parents=parents, next_point=number)

    def drop(self, *numbers: int, disk: str = DISK) -> None:
        RepositoryMerge(again(self.repository), disk, DropPoints(frozenset(numbers))).run()
        for number in numbers:
            del self.shown[disk, number]

    def opened(self, store: ObjectStore | None = None) -> RepositoryDestination:
        return RepositoryDestination(again(self.repository, store))


def copy(source: Source, to: Repository, *names: str, **asked: object) -> CopyReport:
    return run(CopyRequest(names=names, **asked), source.opened(), RepositoryDestination(again(to)))  # type: ignore[arg-type]


def content(repo: Repository, disk: str, number: int) -> bytes:
    """What a point shows, by a repository opened afresh; its content id is that of the record."""
    with RepositoryDestination(again(repo)).reader(disk, str(number), clusters=False) as reader:
        shown = bytearray(reader.point.virtual_size)

        class Into:
            @staticmethod
            def write(pieces: Sequence[tuple[int, memoryview]]) -> None:
                for offset, data in pieces:
                    shown[offset : offset + len(data)] = data

        from snapchain.destination.reading import Sink

        for layer in reader.layers():
            assert layer.copy(Sink(Into.write), on_copied=lambda *_: None) == reader.point.content_id
    return bytes(shown)


def check_same(source: Source, to: Repository, disk: str = DISK) -> None:
    """Each point of the source is there: the same number, bytes, content id, time, labels and holds."""
    ours = RepositoryDestination(again(source.repository)).disks(disk)[0].points
    theirs = {point.point: point for point in RepositoryDestination(again(to)).disks(disk)[0].points}
    for point in ours:
        copied = theirs[point.point]
        assert copied.model_copy(update={"layers": point.layers}) == point
        assert content(to, disk, point.point) == source.shown[disk, point.point]
    assert verify(again(to), share=1.0).ok


def noise(size: int, seed: int) -> Drawn:
    from tests.repository.synthetic import Run, drawn

    return drawn(size, [Run(0, size, 1000 + seed)], b"")


def grown(count: int, *, leaves: int = 4) -> list[Drawn]:
    """A stack in which each layer overwrites one leaf and a few bytes of another."""
    from tests.repository.synthetic import Run, drawn

    stack = [drawn(leaves * LEAF, [Run(0, leaves * LEAF, 2000)], b"")]
    for number in range(1, count):
        runs = [Run(number % leaves * LEAF, LEAF, 3000 + number), Run((number + 1) % leaves * LEAF + 512, 4096, number)]
        stack.append(drawn(leaves * LEAF, runs, stack[-1].shown))
    return stack


def test_all_points_are_copied_with_their_numbers() -> None:
    source, to = Source(), repository()
    source.publish(grown(5))
    source.drop(2)
    report = copy(source, to)
    assert report.is_whole and report.points == 4
    assert [(point.point, point.point_there) for point in report.disks[0].points] == [(n, n) for n in (1, 3, 4, 5)]
    check_same(source, to)
    again_report = copy(source, to)
    assert (again_report.points, again_report.bytes_read, again_report.bytes_stored) == (0, 0, 0)
    assert again_report.disks[0].present == 4


@settings(max_examples=40)
@given(
    st.lists(stacks(max_layers=4), min_size=1, max_size=3),
    st.data(),
)
def test_chains_copied_in_instalments(chains: list[list[Drawn]], data: st.DataObject) -> None:
    source, to = Source(), repository(block_size=2 * LEAF)
    for stack in chains:
        source.publish(stack, of=data.draw(st.sets(st.integers(0, len(stack) - 1), min_size=1)))
        numbers = [number for _, number in source.shown]
        for _ in range(data.draw(st.integers(0, 2))):
            step = data.draw(st.sampled_from(["copy", "newest", "since", "drop", "gc", "drop there"]))
            if step == "copy":
                assert copy(source, to).is_whole
            elif step == "newest":
                assert copy(source, to, newest=True).is_whole
            elif step == "since":
                assert copy(source, to, since=str(data.draw(st.sampled_from(numbers)))).is_whole
            elif step == "drop" and len(numbers) > 1:
                source.drop(data.draw(st.sampled_from(numbers)))
                numbers = [number for _, number in source.shown]
            elif step == "gc":
                collecting.run(again(source.repository))
            elif step == "drop there" and to.disk(DISK).read():
                there = again(to).catalogue(DISK).points
                if len(there) > 1:
                    chosen = data.draw(st.sampled_from([point.point for point in there]))
                    RepositoryMerge(again(to), DISK, DropPoints(frozenset([chosen]))).run()
    assert copy(source, to).is_whole
    check_same(source, to)
    assert copy(source, to).points == 0
