"""HOLD and RELEASE: a held point of a replica stays whatever the rules say, and no program drops it unknowingly."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from snapchain.errors import Conflict, InvalidInput, NotFound, Unsupported
from snapchain.replica import client
from snapchain.replica.permissions import EVERYTHING
from snapchain.replica.stream import session
from tests.ops.stacks import Layer, build
from tests.replica.conftest import DISK, Place
from tests.replica.merging import Pointed, endpoint
from tests.replica.test_permissions import ask, say
from tests.replica.test_stream import stream

MiB = 1 << 20


@pytest.fixture
def pointed(tmp_path: Path, place: Place) -> Pointed:
    found = Pointed(place, tmp_path / "shots")
    for path in build(tmp_path / "c", [Layer(MiB, [f"write -P {n} {n * 64}k 64k"]) for n in range(1, 5)]):
        found.send(path)
    return found


def test_a_held_point_outlives_every_rule(pointed: Pointed) -> None:
    there = endpoint(pointed.place.root)
    held = client.hold_at(there, DISK, "2", "audit", reason="year end")
    assert (held.point, [(each.tag, each.reason) for each in held.holds]) == (2, [("audit", "year end")])
    again = client.hold_at(there, DISK, "2", "audit", reason="longer")
    assert [(each.since, each.reason) for each in again.holds] == [(held.holds[0].since, "longer")]
    listed = client.points_at(there, DISK)[0].points
    assert [len(point.holds) for point in listed] == [0, 1, 0, 0]
    pointed.merge(last=1)
    pointed.check(kept=[2, 4])
    assert client.release_at(there, DISK, "2", "audit").holds == ()
    pointed.merge(last=1)
    pointed.check(kept=[4])


def test_a_program_that_knows_no_holds_cannot_read_the_catalogue(pointed: Pointed) -> None:
    """It would drop the point. Once nothing is held, the file is as such programs know it."""
    there = endpoint(pointed.place.root)
    before = pointed.place.catalogue()
    client.hold_at(there, DISK, None, "audit")
    held = pointed.place.catalogue()
    assert (before["format"], held["format"], held["points"][-1]["holds"][0]["tag"]) == (1, 2, "audit")
    client.release_at(there, DISK, None, "audit")
    assert {**pointed.place.catalogue(), "generation": 0, "time": 0} == {**before, "generation": 0, "time": 0}


def test_a_dry_run_changes_nothing(pointed: Pointed) -> None:
    there, file = endpoint(pointed.place.root), pointed.place.directory / "catalogue.json"
    before = file.read_bytes()
    assert client.hold_at(there, DISK, "1", "audit", dry_run=True).holds[0].tag == "audit"
    assert file.read_bytes() == before
    client.hold_at(there, DISK, "1", "audit")
    before = file.read_bytes()
    assert client.release_at(there, DISK, "1", "audit", dry_run=True).holds == ()
    assert file.read_bytes() == before


def test_what_is_not_there(pointed: Pointed) -> None:
    there = endpoint(pointed.place.root)
    with pytest.raises(NotFound, match="point 1 is not held under 'audit'"):
        client.release_at(there, DISK, "1", "audit")
    with pytest.raises(NotFound, match="no disk 'gone'"):
        client.hold_at(there, "gone", "1", "audit")
    with pytest.raises(NotFound, match="no point 9"):
        client.hold_at(there, DISK, "9", "audit")
    with pytest.raises(InvalidInput, match="tag cannot be used"):
        client.hold_at(there, DISK, "1", "a\nb")


def test_a_cut_drops_no_held_point(pointed: Pointed) -> None:
    client.hold_at(endpoint(pointed.place.root), DISK, "3", "audit")
    before = pointed.place.catalogue()
    with pytest.raises(Conflict, match="point 3 would be dropped, and it is held under 'audit'"):
        ask(pointed.place, stream(LISTENS, OPEN, say(12, keep=before["layers"][0]["id"])), EVERYTHING)
    assert pointed.place.catalogue() == before
    pointed.check()


LISTENS = (1, b'{"first":1,"last":1,"software":"test","features":[],"answers":true}')
OPEN = (2, json.dumps({"disk": DISK}).encode())


def test_no_more_than_a_hundred(pointed: Pointed, monkeypatch: pytest.MonkeyPatch) -> None:
    from snapchain.replica import holds

    monkeypatch.setattr(holds, "MOST_HOLDS", 1)
    there = endpoint(pointed.place.root)
    client.hold_at(there, DISK, "1", "a")
    client.hold_at(there, DISK, "1", "a", reason="the same one")
    with pytest.raises(Unsupported, match="point 1 has 1 holds"):
        client.hold_at(there, DISK, "1", "b")


def test_a_side_that_is_older(pointed: Pointed, monkeypatch: pytest.MonkeyPatch) -> None:
    there = endpoint(pointed.place.root)
    client.hold_at(there, DISK, "1", "audit")
    monkeypatch.setattr(session, "FEATURES", ("ask",))
    assert [point.holds for point in client.points_at(there, DISK)[0].points] == [()] * 4, "it knows no such field"
    with pytest.raises(Unsupported, match="does not support 'hold'"):
        client.hold_at(there, DISK, "1", "audit")
    with pytest.raises(Unsupported, match="does not support 'sample'"):
        client.soundness_at(there, DISK, share=0.5, on_bytes=lambda _done, _total: None)


@pytest.mark.parametrize(("drawn", "read"), [(0.4, 4), (0.6, 0)])
def test_a_share_of_the_data_is_read(
    pointed: Pointed, monkeypatch: pytest.MonkeyPatch, drawn: float, read: int
) -> None:
    monkeypatch.setattr("random.random", lambda: drawn)
    there = endpoint(pointed.place.root)
    verdicts, findings = client.soundness_at(there, DISK, share=0.5, on_bytes=lambda _done, _total: None)
    assert ([each.checked_bytes for each in verdicts], findings) == ([read * 64 << 10], [])
    victim = pointed.place.files()[1]
    victim.chmod(0o600)
    victim.write_bytes(victim.read_bytes().replace(b"\2" * 512, b"\3" * 512))
    _, findings = client.soundness_at(there, DISK, share=0.5, on_bytes=lambda _done, _total: None)
    assert [finding.points for finding in findings] == ([(2, 3, 4)] if read else [])
