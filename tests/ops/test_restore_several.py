"""restore --match: which disks and guests, where to, and that a run which is cut off or meets a fault is continued."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given, strategies as st

from snapchain.destination.protocol import Destination
from snapchain.destination.records import DiskRecord, PointRecord
from snapchain.errors import NotFound, Unavailable
from snapchain.host.note_file import NoteFile
from snapchain.model.disk_name import is_disk_name
from snapchain.ops.restore.several import SeveralReport, SeveralRequest, SeveralRestoration, choose
from snapchain.ops.ship.request import ShipRequest
from snapchain.ops.ship.run import run as ship
from snapchain.testing.faults import Crash
from snapchain.testing.history import identical
from tests.ops.guest_points import Guest, opened
from tests.ops.stacks import flat, qemu_img, write

BEGIN = datetime(2026, 1, 1, 12, tzinfo=UTC)
URL = "/backup"


# --- which, and where


def disk(name: str, *instants: int | None) -> DiskRecord:
    points = [
        PointRecord(
            point=number,
            time=BEGIN + timedelta(days=number),
            labels=(),
            virtual_size=1 << 20,
            content_id="0" * 64,
            layers=1,
            holds=(),
            instant=None if instant is None else f"{instant:032x}",
        )
        for number, instant in enumerate(instants, 1)
    ]
    return DiskRecord(name=name, epoch=1, points=tuple(points))


DISKS = (
    disk("db", None),
    disk("empty"),
    disk("web1/.guest", 1),
    disk("web1/old", None),
    disk("web1/vda", None, 1),
    disk("web1/vdb", 1),
)


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (["*"], ["db.qcow2", "web1", "web1/old.qcow2"]),
        (["web1"], ["web1"]),
        (["web1/*"], ["web1", "web1/old.qcow2"]),
        (["web1/vd*"], ["web1/vda.qcow2", "web1/vdb.qcow2"]),
        (["db", "web1/vda"], ["db.qcow2", "web1/vda.qcow2"]),
    ],
)
def test_which(patterns: Sequence[str], expected: list[str]) -> None:
    assert [str(each.path) for each in choose(URL, DISKS, patterns)] == expected


@pytest.mark.parametrize("patterns", [["x*"], ["db", "empty"], ["web1/.guest"]])
def test_a_pattern_that_nothing_matches_is_a_mistake(patterns: Sequence[str]) -> None:
    with pytest.raises(NotFound, match="no disk or guest with a point has such a name"):
        choose(URL, DISKS, patterns)


NAMES = st.text("ab./_~\\-$ é\u202e", min_size=1, max_size=12).filter(is_disk_name)


@given(st.sets(NAMES, min_size=1, max_size=8))
def test_every_disk_has_a_file_of_its_own_below_the_directory(names: set[str]) -> None:
    found = [each.path for each in choose(URL, [disk(name, None) for name in sorted(names)], ["*"])]
    assert len(set(found)) == len(names)
    for path in found:
        assert not path.is_absolute()
        assert not any(part.startswith((".", "~", "-$")) or part == ".." for part in path.parts)
        assert str(path).isascii()


# --- all of them


@pytest.fixture
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Destination:
    """Guest web1 with two disks and two points, and disks db and app/vda with one each."""
    destination = opened("directory", request, tmp_path)()
    guest = Guest(tmp_path / "g")
    for number in (1, 2):
        guest.point(destination, number)
    for name, value in (("db", 5), ("app/vda", 6)):
        image = tmp_path / f"{value}.qcow2"
        qemu_img("create", "-q", "-f", "qcow2", image, "1M")
        write(image, f"write -P {value} 0 128k")
        ship(ShipRequest(image=image, disk=name), destination)
        flat(image, tmp_path / f"{value}.raw")
    return destination


def restored(place: Destination, directory: Path, *patterns: str) -> SeveralReport:
    request = SeveralRequest(directory=directory, patterns=patterns or ("*",))
    return SeveralRestoration(place, request).run()


def test_everything_comes_back(place: Destination, tmp_path: Path) -> None:
    out = tmp_path / "out"
    plan = SeveralRestoration(place, SeveralRequest(directory=out, patterns=("*",))).plan()
    assert not out.exists()
    assert (plan.ok, [each.name for each in plan.items]) == (True, ["app/vda", "db", "web1"])
    assert [disk.data_bytes > 0 for each in plan.items for disk in each.disks] == [True] * 4
    assert plan.requests is not None
    assert plan.bytes_to_fetch is not None
    assert plan.seconds is not None
    report = restored(place, out)
    assert report.ok
    assert report.bytes_written == plan.bytes_to_write
    assert {each.name for each in out.iterdir()} == {"app", "db.qcow2", "web1"}, "no note is left"
    assert identical(out / "db.qcow2", tmp_path / "5.raw")
    assert identical(out / "app" / "vda.qcow2", tmp_path / "6.raw")
    assert (out / "web1" / "web1.xml").exists()
    raw = SeveralRequest(directory=tmp_path / "raw", patterns=("web1", "db"), point="1", format="raw")
    assert SeveralRestoration(place, raw).run().guests[0].guest_point == 1
    assert (tmp_path / "raw" / "db.raw").read_bytes() == (tmp_path / "5.raw").read_bytes()


def test_a_file_in_the_way_stays_and_the_others_are_restored(place: Destination, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / "web1").mkdir(parents=True)
    foreign = [out / "db.qcow2", out / "web1" / "vdb.qcow2"]
    for path in foreign:
        path.write_text("mine")
    plan = SeveralRestoration(place, SeveralRequest(directory=out, patterns=("*",))).plan()
    assert [each.name for each in plan.failed] == ["db", "web1"]
    report = restored(place, out)
    assert [(each.name, each.kind) for each in report.failed] == [("db", "conflict"), ("web1", "conflict")]
    assert [each.disk for each in report.disks] == ["app/vda"]
    assert [path.read_text() for path in foreign] == ["mine", "mine"]
    for path in foreign:
        path.unlink()
    inode = (out / "app" / "vda.qcow2").stat().st_ino
    again = restored(place, out)
    assert (again.ok, again.restored_before) == (True, ("app/vda",))
    assert (out / "app" / "vda.qcow2").stat().st_ino == inode
    assert identical(out / "db.qcow2", tmp_path / "5.raw")
    (out / "db.qcow2").write_text("mine")
    assert not restored(place, out).ok, "all of it was there, so the next run is a new one"
    assert (out / "db.qcow2").read_text() == "mine"


def test_a_file_that_was_changed_since_is_not_taken_for_restored(place: Destination, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "db.qcow2").write_text("mine")
    assert [each.disk for each in restored(place, out).disks] == ["app/vda"]
    write(out / "app" / "vda.qcow2", "write -P 9 0 64k")
    (out / "db.qcow2").unlink()
    report = restored(place, out)
    assert [(each.name, each.kind) for each in report.failed] == [("app/vda", "conflict")]


@pytest.mark.parametrize("at", [2, 4, 6])
def test_a_run_that_was_killed_goes_on_with_the_same_points(
    place: Destination, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    """When all files of an item are in place, and before that is noted."""
    out, notes = tmp_path / "out", 0
    written = NoteFile.write

    def write_or_die(self: NoteFile, note: object) -> None:  # type: ignore[type-arg]
        nonlocal notes
        notes += self.purpose == "restored-several"
        if notes == at:
            raise Crash
        written(self, note)

    with monkeypatch.context() as patch:
        patch.setattr(NoteFile, "write", write_or_die)
        with pytest.raises(Crash):
            restored(place, out)
    image = tmp_path / "5.qcow2"
    write(image, "write -P 77 0 64k")
    ship(ShipRequest(image=image, disk="db"), place)
    report = restored(place, out)
    assert report.ok
    assert identical(out / "app" / "vda.qcow2", tmp_path / "6.raw")
    assert identical(out / "db.qcow2", tmp_path / "5.raw") is (at > 2), "the point that the first run has chosen"
    assert (out / "web1" / "web1.xml").exists()
    assert {each.name for each in out.iterdir()} == {"app", "db.qcow2", "web1"}


def test_a_destination_that_is_gone_ends_it(
    place: Destination, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = SeveralRestoration(place, SeveralRequest(directory=tmp_path / "out", patterns=("*",)))

    def gone(*_args: object, **_options: object) -> None:
        raise Unavailable("the server does not answer")

    monkeypatch.setattr(type(place), "reader", gone)
    monkeypatch.setattr(type(place), "disks", gone)
    with pytest.raises(Unavailable, match="does not answer") as caught:
        work.run()
    assert caught.value.hint == "run it again: it continues"
