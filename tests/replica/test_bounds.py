"""What a replica takes in, it can read again; what a peer says is bounded before it is used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from pydantic import ValidationError

from snapchain.errors import Corrupt, Unsupported
from snapchain.ops.log import log
from snapchain.replica import catalogue, receiver
from snapchain.replica.destination import ReplicaDestination
from snapchain.replica.endpoint import DirectoryEndpoint
from snapchain.replica.stream.messages import HeldPoint, PointOffer
from tests.ops.stacks import Layer, MiB, build, flat, same
from tests.replica.conftest import Place
from tests.replica.test_permissions import say
from tests.replica.test_stream import ALL, HELLO, MAP, OPEN, STOP, end, offer, stream, take

BASE = stream(HELLO, OPEN, offer(), MAP, ALL, end(), STOP)


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalogue, "LARGEST_FILE", 64 << 10)
    monkeypatch.setattr(catalogue, "FOR_A_POINT", 8 << 10)
    monkeypatch.setattr(catalogue, "FOR_CHANGES", 2 << 10)
    monkeypatch.setattr(receiver, "FOR_CHANGES", 2 << 10)


def points(place: Place, labels: list[list[str]]) -> tuple[tuple[int, bytes], ...]:
    layer = place.catalogue()["layers"][-1]
    shown = {"size": layer["size"], "content_id": layer["content_id"]}
    return tuple(
        say(8, time=f"2026-01-01T00:{at // 60:02}:{at % 60:02}Z", labels=each, **shown)
        for at, each in enumerate(labels)
    )


@settings(max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(st.lists(st.lists(st.sampled_from(["x", "\U0001f600" * 100, '"' * 100, "a" * 99]), max_size=60), max_size=60))
def test_what_is_written_can_be_read_again(tmp_path_factory: pytest.TempPathFactory, labels: list[list[str]]) -> None:
    place = Place(tmp_path_factory.mktemp("bounds") / "replica")
    take(place, BASE)
    offered = points(place, labels)
    said: Unsupported | None
    try:
        take(place, stream(HELLO, OPEN, *offered, STOP))
    except Unsupported as error:
        said = error
        taken = len(place.catalogue()["points"])
    else:
        said, taken = None, len(offered)
    if said:
        assert taken < len(offered)
        assert "no more than" in said.message
        assert str(said.subject).endswith("catalogue.json")
        assert "merge points away" in (said.hint or "")
    found = log(ReplicaDestination(DirectoryEndpoint(place.root))).disks[0].points
    assert [list(point.labels) for point in found] == labels[:taken]


def test_a_point_is_refused_before_anything_changes(place: Place) -> None:
    take(place, BASE)
    large = [["a" * 100] * 100] * 20
    with pytest.raises(Unsupported, match="this record would have"):
        take(place, stream(HELLO, OPEN, *points(place, large), STOP))
    before = (place.directory / "catalogue.json").read_bytes()
    with pytest.raises(Unsupported, match="this record would have"):
        take(place, stream(HELLO, OPEN, *points(place, large)[-1:], STOP))
    assert (place.directory / "catalogue.json").read_bytes() == before


def test_a_layer_is_refused_before_its_data(place: Place, tmp_path: Path) -> None:
    """One whose point would find no room."""
    take(place, BASE)
    with pytest.raises(Unsupported, match="this record would have"):
        take(place, stream(HELLO, OPEN, *points(place, [["a" * 100] * 100] * 20), STOP))
    files = sorted(place.directory.iterdir())
    layer = place.catalogue()["layers"][-1]
    with pytest.raises(Unsupported, match="this record would have"):
        take(place, stream(HELLO, OPEN, offer(parent=layer["id"]), MAP))
    assert sorted(place.directory.iterdir()) == files
    shown = tmp_path / "shown"
    image = build(tmp_path / "c", [Layer(MiB, ["write -P 1 0 64k"])])[0]
    assert place.send(image, disk="other").point == 1
    assert same(image, flat(image, shown))


def test_the_number_of_points_is_bounded(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(receiver, "MOST_POINTS", 3)
    take(place, BASE)
    with pytest.raises(Unsupported, match="this disk has 3 points, and no more are allowed"):
        take(place, stream(HELLO, OPEN, *points(place, [[]] * 4), STOP))
    assert len(place.catalogue()["points"]) == 3


TIMES = ("0001-01-01T00:00:00+23:59", "9999-12-31T23:59:59-23:59", "1969-12-31T23:59:59Z", "9991-01-01T00:00:00Z")


@pytest.mark.parametrize("time", TIMES)
def test_times_that_no_calendar_has(place: Place, time: str) -> None:
    take(place, BASE)
    ((kind, body),) = points(place, [[]])
    with pytest.raises(Corrupt, match="message is invalid: time"):
        take(place, stream(HELLO, OPEN, (kind, json.dumps({**json.loads(body), "time": time}).encode()), STOP))
    assert not place.catalogue()["points"]


POINT: dict[str, Any] = {
    "point": 1, "time": "2026-01-01T00:00:00Z", "labels": [], "size": 0, "content_id": "0" * 64, "layers": 1,
}  # fmt: skip


@pytest.mark.parametrize(
    "change",
    [
        {"point": 0}, {"point": (1 << 53) + 1}, {"point": 10**400}, {"labels": ["\x1b[2J"]}, {"labels": ["a\u202eb"]},
        {"labels": ["x"] * 101}, {"labels": ["x" * 101]}, {"size": 1 << 57}, {"layers": 201}, {"time": TIMES[0]},
    ],
)  # fmt: skip
def test_points_that_a_replica_cannot_have(change: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="1 validation error for HeldPoint"):
        HeldPoint.model_validate_json(json.dumps({**POINT, **change}))
    HeldPoint.model_validate_json(json.dumps(POINT))


def test_a_time_is_kept_as_an_instant() -> None:
    offered = {"time": "2026-01-01T00:30:00+02:00", "size": 0, "content_id": "0" * 64}
    assert PointOffer.model_validate(offered).time.isoformat() == "2025-12-31T22:30:00+00:00"
