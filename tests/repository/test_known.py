"""A store cannot talk a machine out of encryption."""

from __future__ import annotations

import json
import shutil
from datetime import UTC, datetime
from pathlib import Path

import pytest

from snapchain.destinations import create_destination, open_destination
from snapchain.errors import Corrupt
from snapchain.repository.known import Known, Memory
from snapchain.repository.repository import Repository


@pytest.fixture(autouse=True)
def _own_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


def _turn_encryption_off(repository: Path) -> None:
    config = json.loads((repository / "config").read_text())
    (repository / "config").write_text(json.dumps(config | {"encryption": "none"}))


def test_a_repository_that_stops_being_encrypted_is_refused(tmp_path: Path) -> None:
    place = tmp_path / "repo"
    create_destination(str(place), passphrase=lambda: "secret")
    _turn_encryption_off(place)
    with pytest.raises(Corrupt, match="was encrypted when this machine last used it"):
        open_destination(str(place), passphrase=lambda: "secret", writing=True)


def test_what_was_never_encrypted_opens(tmp_path: Path) -> None:
    place = str(tmp_path / "repo")
    create_destination(place, passphrase=lambda: None, encryption="none")
    assert open_destination(place, passphrase=lambda: None).config.encryption == "none"


def test_a_new_repository_in_the_place_of_an_encrypted_one_is_the_users_wish(tmp_path: Path) -> None:
    place = tmp_path / "repo"
    create_destination(str(place), passphrase=lambda: "secret")
    (place / "config").unlink()
    create_destination(str(place), passphrase=lambda: None, encryption="none")
    open_destination(str(place), passphrase=lambda: None, writing=True)


def test_a_machine_without_a_home_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    create_destination(str(tmp_path / "repo"), passphrase=lambda: "secret")
    open_destination(str(tmp_path / "repo"), passphrase=lambda: "secret")


def test_a_passphrase_for_others_does_not_matter_where_there_never_was_one(tmp_path: Path) -> None:
    place = str(tmp_path / "repo")
    create_destination(place, passphrase=lambda: None, encryption="none")
    open_destination(place, passphrase=lambda: "for others")
    shutil.rmtree(tmp_path / "state")
    with pytest.raises(Corrupt, match="says that it is not encrypted") as caught:
        open_destination(place, passphrase=lambda: "secret")
    assert "no passphrase once" in str(caught.value.hint)
    open_destination(place, passphrase=lambda: None)
    open_destination(place, passphrase=lambda: "for others")


# ---- how far a disk had come


def _advance(place: Path, times: int, disk: str = "d") -> Repository:
    opened = open_destination(str(place), passphrase=lambda: "x", writing=True)
    for _ in range(times):
        opened.disk(disk).advance(opened.disk(disk).read(), time=datetime.now(UTC))
    return opened


def _roll_back(place: Path) -> None:
    newest = max(place.glob("disks/*/*"), key=lambda path: path.name)
    newest.unlink()


def test_a_disk_that_lost_its_newest_generation_is_told(tmp_path: Path) -> None:
    place = tmp_path / "repo"
    create_destination(str(place), passphrase=lambda: "x")
    _advance(place, 3)
    _roll_back(place)
    for attempt in (
        lambda: _advance(place, 1),
        lambda: open_destination(str(place), passphrase=lambda: "x").catalogue("d"),
        lambda: open_destination(str(place), passphrase=lambda: "x").catalogues(),
    ):
        with pytest.raises(Corrupt, match="is at generation 2, and was at 3") as caught:
            attempt()
    assert caught.value.hint is not None
    Path(caught.value.hint.rpartition(" ")[2]).unlink()
    assert _advance(place, 1).catalogue("d").generation == 3


def test_a_disk_that_vanished_is_told_and_others_are_not_meant(tmp_path: Path) -> None:
    place = tmp_path / "repo"
    create_destination(str(place), passphrase=lambda: "x")
    _advance(place, 1)
    _roll_back(place)
    _advance(place, 1, "other")
    with pytest.raises(Corrupt, match="is at generation 0"):
        _advance(place, 1)


def test_another_repository_in_its_place_begins_anew(tmp_path: Path) -> None:
    place = tmp_path / "repo"
    for times in (3, 1):
        shutil.rmtree(place, ignore_errors=True)
        create_destination(str(place), passphrase=lambda: "x")
        assert _advance(place, times).catalogue("d").generation == times


def test_what_another_process_publishes_between_looking_and_comparing_is_no_alarm() -> None:
    seen = Known(place="memory:", id="0" * 32, encryption="none")
    mine, other = Memory(seen), Memory(seen)
    floor = mine.floor("d")
    other.note("d", 6, other.floor("d"))
    other.flush()
    mine.note("d", 5, floor)
    mine.flush()
    assert Memory(seen).floor("d") in {5, 6}


def test_a_memory_that_is_damaged_is_none(tmp_path: Path) -> None:
    seen = Known(place="memory:", id="0" * 32, encryption="none")
    memory = Memory(seen)
    memory.note("d", 6, 0)
    memory.flush()
    (path,) = (tmp_path / "state").rglob("*.generations")
    path.write_bytes(path.read_bytes()[:-5])
    assert Memory(seen).floor("d") == 0
