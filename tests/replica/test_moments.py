"""Points of a guest point at a replica: the catalogue, the wire, and programs that know neither."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from snapchain.destination.writing import Moment, Opening
from snapchain.errors import Unsupported
from snapchain.model.consistency import Consistency
from snapchain.model.retention import DropPoints
from snapchain.replica import client
from snapchain.replica.catalogue import Catalogue
from snapchain.replica.disk_writer import ReplicaWriting
from snapchain.replica.fetch_client import fetch
from snapchain.replica.points_merge import ReplicaMerge
from snapchain.replica.stream import session
from tests.ops.stacks import Layer, build
from tests.replica.conftest import DISK, Place
from tests.replica.merging import Pointed, endpoint

MiB = 1 << 20
MOMENT = Moment("ab" * 16, Consistency.FILESYSTEM)
TIME = datetime(2026, 11, 30, 1, tzinfo=UTC)


@pytest.fixture
def pointed(tmp_path: Path, place: Place) -> Pointed:
    found = Pointed(place, tmp_path / "shots")
    bottom, middle, top = build(tmp_path / "c", [Layer(MiB, [f"write -P {n} {n * 64}k 64k"]) for n in range(1, 4)])
    found.send(bottom)
    found.send(middle, moment=MOMENT, time=TIME)
    found.send(top)
    return found


def told(points: Any) -> list[tuple[str | None, Consistency | None]]:
    return [(point.instant, point.consistency) for point in points]


def merge(pointed: Pointed, *numbers: int) -> None:
    """Let go of these points, unless they are held."""
    ReplicaMerge(endpoint(pointed.place.root), DISK, DropPoints(frozenset(numbers)), zone="UTC").run()


SHOWN = [(None, None), (MOMENT.instant, Consistency.FILESYSTEM), (None, None)]


def test_a_point_says_to_which_guest_point_it_belongs(pointed: Pointed) -> None:
    there = endpoint(pointed.place.root)
    assert told(client.points_at(there, DISK)[0].points) == SHOWN
    with fetch(there, DISK, "2") as found:
        assert told([found.point]) == SHOWN[1:2]
    client.hold_at(there, DISK, "2", "audit")
    merge(pointed, 1, 2)
    assert told(client.points_at(there, DISK)[0].points) == SHOWN[1:]


def test_a_program_that_knows_no_guest_points_cannot_read_the_catalogue(pointed: Pointed, tmp_path: Path) -> None:
    """It would tear a guest point. Without one, the file is as such programs know it."""
    with_one = pointed.place.catalogue()
    assert (with_one["format"], with_one["points"][1]["instant"]) == (3, MOMENT.instant)
    merge(pointed, 1, 2)
    without = pointed.place.catalogue()
    assert without["format"] == 1
    assert set(without["points"][0]) == {"point", "time", "labels", "layer", "size", "content_id"}
    for wrong in ({**with_one, "format": 2}, {**without, "format": 3}):
        with pytest.raises(ValueError, match="its format is not the one of what it holds"):
            Catalogue.model_validate_json(json.dumps(wrong))


def test_a_side_that_is_older(pointed: Pointed, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It gets ordinary points as ever, and hears nothing that it does not know."""
    there = endpoint(pointed.place.root)
    (image,) = build(tmp_path / "d", [Layer(MiB, ["write -P 9 0 64k"])])
    before = pointed.place.files()
    monkeypatch.setattr(session, "FEATURES", tuple(each for each in session.FEATURES if each != "guest-point"))
    assert told(client.points_at(there, DISK)[0].points) == [(None, None)] * 3
    with fetch(there, DISK, "2") as found:
        assert told([found.point]) == [(None, None)]
    other = Pointed(pointed.place, tmp_path / "other")
    with pytest.raises(Unsupported, match="does not support 'guest-point'") as refused:
        other.send(image, moment=MOMENT)
    assert refused.value.hint == "upgrade it there"
    with (
        pytest.raises(Unsupported, match="guest-point"),
        ReplicaWriting(there).look(Opening(disk=DISK, of_guest=True), on_event=lambda _event: None),
    ):
        pass
    assert pointed.place.files() == before, "it is refused before anything is sent"


def test_one_point_an_instant(pointed: Pointed, tmp_path: Path) -> None:
    """The same image at the same time is published once more under another instant, and not under the same one."""
    top = Path(tmp_path / "c").glob("*")
    image = max(top)
    for moment in (MOMENT, MOMENT, Moment("cd" * 16, Consistency.CRASH)):
        pointed.send(image, moment=moment, time=TIME)
    assert told(client.points_at(endpoint(pointed.place.root), DISK)[0].points)[3:] == [
        (MOMENT.instant, Consistency.FILESYSTEM),
        ("cd" * 16, Consistency.CRASH),
    ]
