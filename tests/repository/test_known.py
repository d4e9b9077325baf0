"""A store cannot talk a machine out of encryption."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from snapchain.destinations import create_destination, open_destination
from snapchain.errors import Corrupt


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
