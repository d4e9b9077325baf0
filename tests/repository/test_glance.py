"""A catalogue at a glance gives what the whole gives, and refuses the forms that the whole refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest
from hypothesis import given, strategies as st

from snapchain.errors import Corrupt, SnapchainError, Unsupported
from snapchain.model.consistency import Consistency
from snapchain.model.freshness import candidates
from snapchain.repository import glance as glances
from snapchain.repository.catalogue import KIND, Catalogue, Hold, Point, parse
from snapchain.repository.crypto import Keyring
from snapchain.repository.envelope import seal
from snapchain.repository.glance import glance

KEYS = Keyring("aes-256-gcm", "00" * 16, bytes(32))
NOW = datetime(2026, 11, 30, 2, tzinfo=UTC)
NAME = "disks/" + "0" * 32 + "/" + "7".zfill(20)
LAYERS = [f"{number:032x}" for number in range(4)]

TEXT = st.text(st.sampled_from('a]["\\{},:é\u2028 '), max_size=5)
FROM, TO = datetime(2024, 1, 1), datetime(2029, 1, 1)  # noqa: DTZ001 - hypothesis adds the zone
TIMES = st.datetimes(FROM, TO, timezones=st.sampled_from([UTC, timezone(timedelta(hours=2))]))
POINTS = st.builds(
    Point,
    point=st.just(1),
    time=TIMES,
    labels=st.lists(TEXT, max_size=2).map(tuple),
    layer=st.sampled_from(LAYERS),
    size=st.integers(0, 1 << 50),
    content_id=st.just("c" * 64),
    holds=st.lists(st.builds(Hold, tag=TEXT, since=TIMES, reason=TEXT), max_size=1).map(tuple),
    instant=st.sampled_from([None, "ab" * 16]),
    consistency=st.sampled_from([None, *Consistency]),
    made_by=st.sampled_from([None, "snapchain 0.2.0"]),
)


def catalogue(points: list[Point]) -> Catalogue:
    return Catalogue(
        disk="web1/é",
        generation=7,
        previous="",
        nonce="n",
        time=NOW,
        epoch=3,
        next_point=2 * len(points) + 1,
        points=tuple(each.model_copy(update={"point": 2 * number}) for number, each in enumerate(points, 1)),
        parents=dict.fromkeys(LAYERS),
    )


def sealed(body: bytes) -> bytes:
    return seal(KEYS, KIND, NAME, body)


@given(st.lists(POINTS, max_size=6))
def test_it_is_what_the_whole_says(points: list[Point]) -> None:
    whole = catalogue(points).model_copy(update={"next_point": 100})
    found, generation = glance(KEYS, NAME, sealed(whole.encode()), NOW)
    assert (found.name, found.epoch, found.points, found.layers, generation) == ("web1/é", 3, len(points), 4, 7)
    assert [(each.point, each.time, each.virtual_size) for each in found.newest] == [
        (each.point, each.time, each.size) for each in candidates(whole.points, NOW)
    ]
    assert found.guest == ("web1" if any(each.instant for each in points) else None)


def plain(count: int = 3) -> dict[str, Any]:
    points = [
        Point(point=1, time=NOW - timedelta(days=count - at), layer=LAYERS[0], size=1 << 20, content_id="c" * 64)
        for at in range(count)
    ]
    whole = catalogue(points).model_copy(update={"next_point": 100})
    return json.loads(whole.encode())  # type: ignore[no-any-return]


def packed(fields: dict[str, Any]) -> bytes:
    return json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode()


def test_what_snapchain_writes_needs_no_whole_parse(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(glances, "parse_stored", None)
    assert glance(KEYS, NAME, sealed(packed(plain())), NOW)[0].points == 3
    older = plain()
    for point in older["points"]:  # version 0.1 knew none of these
        for field in ("instant", "consistency", "made_by"):
            del point[field]
    assert glance(KEYS, NAME, sealed(packed(older)), NOW)[0].points == 3


def test_numbers_of_all_lengths_and_times_with_and_without_fractions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(glances, "parse_stored", None)
    whole = catalogue([])
    points = tuple(
        Point(
            point=number,
            time=NOW - timedelta(days=abs(number - 1003), microseconds=number % 3),
            labels=("weekly",) if number % 7 == 0 else (),
            layer=LAYERS[0],
            size=number << 20,
            content_id="c" * 64,
            holds=(Hold(tag="a", since=NOW),) if number % 5 == 0 else (),
        )
        for number in range(3, 1100)
    )
    found, _ = glance(KEYS, NAME, sealed(whole.model_copy(update={"points": points, "next_point": 2000}).encode()), NOW)
    assert found.points == len(points)
    assert [(each.point, each.virtual_size >> 20) for each in found.newest] == [(1003, 1003)]


def test_another_writer_may_space_it_otherwise() -> None:
    text = json.dumps(plain(), indent=1).encode()
    assert glance(KEYS, NAME, sealed(text), NOW) == glance(KEYS, NAME, sealed(packed(plain())), NOW)


def _head(fields: dict[str, Any]) -> None:
    fields["colour"] = "red"


def _before(fields: dict[str, Any]) -> None:
    for name in ("points", "parents"):
        fields[name] = fields.pop(name)
    _head(fields)
    for name in ("points", "parents"):
        fields[name] = fields.pop(name)


def _behind(fields: dict[str, Any]) -> None:
    fields["verified"] = {"a": None}


def _point(fields: dict[str, Any]) -> None:
    fields["points"][1]["colour"] = "red"


def _format(fields: dict[str, Any]) -> None:
    fields["format"] = 2


def _order(fields: dict[str, Any]) -> None:
    fields["points"][1]["point"] = 6


def _next(fields: dict[str, Any]) -> None:
    fields["next_point"] = 6


def _zero(fields: dict[str, Any]) -> None:
    fields["points"][0]["point"] = 0


def _naive(fields: dict[str, Any]) -> None:
    for point in fields["points"]:
        point["time"] = point["time"].removesuffix("Z")


def _one_naive(fields: dict[str, Any]) -> None:
    fields["points"][1]["time"] = fields["points"][1]["time"].removesuffix("Z")


def _name(fields: dict[str, Any]) -> None:
    fields["disk"] = "a@b"


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (_head, Unsupported),
        (_before, Unsupported),
        (_behind, Unsupported),
        (_point, Unsupported),
        (_format, Unsupported),
        (_order, Corrupt),
        (_next, Corrupt),
        (_zero, Corrupt),
        (_naive, Corrupt),
        (_one_naive, Corrupt),
        (_name, Corrupt),
    ],
)
def test_a_form_that_the_whole_refuses_is_refused(
    change: Callable[[dict[str, Any]], None], error: type[SnapchainError]
) -> None:
    fields = plain()
    change(fields)
    data = sealed(packed(fields))
    for read in (lambda: parse(KEYS, NAME, data), lambda: glance(KEYS, NAME, data, NOW)):
        with pytest.raises(error, match="the catalogue"):
            read()


def test_text_between_points_is_seen() -> None:
    body = packed(plain()).replace(b'},{"point":4', b'},7,{"point":4')
    with pytest.raises(Corrupt, match="the catalogue is damaged"):
        glance(KEYS, NAME, sealed(body), NOW)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"7",
        b"[" * 5000 + b',"points":[],"parents":{}}',
        b'[,"points":[],"parents":{}}',
        b'{"format":1,"points":[],"parents":{}}',
        b'{"format":1,"disk":7,"generation":"7","next_point":1,"points":[],"parents":{}}',
    ],
)
def test_what_is_no_catalogue_is_damage(body: bytes) -> None:
    with pytest.raises(Corrupt, match="the catalogue is damaged"):
        glance(KEYS, NAME, sealed(body), NOW)


def test_altered_bytes_are_seen() -> None:
    data = bytearray(sealed(packed(plain())))
    data[-1] ^= 1
    with pytest.raises(Corrupt, match="were altered"):
        glance(KEYS, NAME, bytes(data), NOW)
