"""Merging at a replica: every kept point reads as before, its sender goes on as before, and little is moved."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.ops.shipping import MiB
from tests.ops.stacks import Layer, build, write
from tests.replica.conftest import Place
from tests.replica.merging import Pointed


@pytest.fixture
def chain(tmp_path: Path) -> list[Path]:
    return build(tmp_path / "c", [Layer(4 * MiB, [f"write -P {n} {n * 64}k 512k"]) for n in range(1, 7)])


@pytest.fixture
def pointed(place: Place, tmp_path: Path) -> Pointed:
    return Pointed(place, tmp_path / "shots")


@pytest.fixture
def sent(pointed: Pointed, chain: list[Path]) -> Pointed:
    for path in chain:
        pointed.send(path, labels=[f"at-{path.stem}"])
    return pointed


def test_kept_points_read_as_before(sent: Pointed) -> None:
    report = sent.merge(last=2, labels=frozenset(["at-1"]))
    assert (report.points_kept, report.points_dropped) == ((2, 5, 6), (1, 3, 4))
    assert (report.layers_before, report.layers_after) == (6, 3)
    assert report.merges == (("0.qcow2", "1.qcow2"), ("2.qcow2", "3.qcow2", "4.qcow2"))
    sent.check(kept=[2, 5, 6])
    assert [file.name for file in sent.place.files()] == ["1.qcow2", "4.qcow2", "disk.qcow2"]
