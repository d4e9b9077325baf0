"""A store cannot talk a machine out of encryption."""

from __future__ import annotations

import errno
import json
import os
import shutil
import stat
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

import pytest

from snapchain.destination.address import located
from snapchain.errors import Corrupt, InvalidInput, WrongPassphrase
from snapchain.host.private import PrivateDirectory
from snapchain.objects.s3_client import canonical
from snapchain.ops.log import log
from snapchain.repository import collecting as gc
from snapchain.repository.destination import RepositoryDestination
from snapchain.repository.known import Known, SeenGenerations
from snapchain.repository.opening import create_repository, open_repository
from snapchain.repository.repository import Repository
from snapchain.repository.verification import verify


@pytest.fixture(autouse=True)
def _own_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


def _turn_encryption_off(repository: Path) -> None:
    config = json.loads((repository / "config").read_text())
    (repository / "config").write_text(json.dumps(config | {"encryption": "none"}))


def test_a_repository_that_stops_being_encrypted_is_refused(tmp_path: Path) -> None:
    place = tmp_path / "repo"
    create_repository(str(place), passphrase=lambda: "secret")
    _turn_encryption_off(place)
    with pytest.raises(Corrupt, match="was encrypted when this machine last used it"):
        open_repository(str(place), passphrase=lambda: "secret", writing=True)


def test_what_was_never_encrypted_opens(tmp_path: Path) -> None:
    place = str(tmp_path / "repo")
    create_repository(place, passphrase=lambda: None, encryption="none")
    assert open_repository(place, passphrase=lambda: None).config.encryption == "none"


def test_a_new_repository_in_the_place_of_an_encrypted_one_is_the_users_wish(tmp_path: Path) -> None:
    place = tmp_path / "repo"
    create_repository(str(place), passphrase=lambda: "secret")
    (place / "config").unlink()
    create_repository(str(place), passphrase=lambda: None, encryption="none")
    open_repository(str(place), passphrase=lambda: None, writing=True)


def test_a_machine_without_a_home_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    create_repository(str(tmp_path / "repo"), passphrase=lambda: "secret")
    open_repository(str(tmp_path / "repo"), passphrase=lambda: "secret")


def test_a_passphrase_for_others_does_not_matter_where_there_never_was_one(tmp_path: Path) -> None:
    place = str(tmp_path / "repo")
    create_repository(place, passphrase=lambda: None, encryption="none")
    open_repository(place, passphrase=lambda: "for others")
    shutil.rmtree(tmp_path / "state")
    with pytest.raises(Corrupt, match="says that it is not encrypted") as caught:
        open_repository(place, passphrase=lambda: "secret")
    assert "no passphrase once" in str(caught.value.hint)
    open_repository(place, passphrase=lambda: None)
    open_repository(place, passphrase=lambda: "for others")


# ---- how far a disk had come


def _advance(place: Path, times: int, disk: str = "d") -> Repository:
    opened = open_repository(str(place), passphrase=lambda: "x", writing=True)
    for _ in range(times):
        opened.disk(disk).advance(opened.disk(disk).read(), time=datetime.now(UTC))
    return opened


def _roll_back(place: Path) -> None:
    newest = max(place.glob("disks/*/*"), key=lambda path: path.name)
    newest.unlink()


def test_a_disk_that_lost_its_newest_generation_is_told(tmp_path: Path) -> None:
    place = tmp_path / "repo"
    create_repository(str(place), passphrase=lambda: "x")
    _advance(place, 3)
    _roll_back(place)
    for attempt in (
        lambda: _advance(place, 1),
        lambda: open_repository(str(place), passphrase=lambda: "x").catalogue("d"),
        lambda: open_repository(str(place), passphrase=lambda: "x").catalogues(),
    ):
        with pytest.raises(Corrupt, match="is at generation 2, and was at 3") as caught:
            attempt()
    assert caught.value.hint is not None
    accepted = caught.value.hint.rpartition("--accept-repository ")[2]
    open_repository(str(place), passphrase=lambda: "x", accept=accepted)
    assert _advance(place, 1).catalogue("d").generation == 3


def test_a_disk_that_vanished_is_told_and_others_are_not_meant(tmp_path: Path) -> None:
    place = tmp_path / "repo"
    create_repository(str(place), passphrase=lambda: "x")
    _advance(place, 1)
    _roll_back(place)
    _advance(place, 1, "other")
    with pytest.raises(Corrupt, match="is at generation 0"):
        _advance(place, 1)


@pytest.mark.parametrize("whole", [False, True], ids=["newest", "all"])
def test_a_disk_that_is_not_named_is_told_as_well(tmp_path: Path, *, whole: bool) -> None:
    """By what looks at all disks: a list of them, and gc, which would take away what only the newer state needs."""
    place = tmp_path / "repo"
    create_repository(str(place), passphrase=lambda: "x")
    _advance(place, 2)
    _advance(place, 1, "other")
    key = open_repository(str(place), passphrase=lambda: "x").keys.disk_key("d")
    generations = sorted((place / "disks" / key).iterdir())
    for gone in generations if whole else generations[1:]:
        gone.unlink()
    opened = open_repository(str(place), passphrase=lambda: "x")
    assert any(
        f"is at generation {0 if whole else 1}, and was at 2" in each.message for each in verify(opened).findings
    )
    for look in (lambda found: log(RepositoryDestination(found)), gc.plan, gc.run):
        with pytest.raises(Corrupt, match=f"is at generation {0 if whole else 1}, and was at 2"):
            look(open_repository(str(place), passphrase=lambda: "x", writing=True))


def test_another_repository_in_its_place_begins_anew(tmp_path: Path) -> None:
    place = tmp_path / "repo"
    for times in (3, 1):
        shutil.rmtree(place, ignore_errors=True)
        create_repository(str(place), passphrase=lambda: "x")
        assert _advance(place, times).catalogue("d").generation == times


def test_what_another_process_publishes_between_looking_and_comparing_is_no_alarm() -> None:
    seen = Known(place="memory:", id="0" * 32, encryption="none")
    mine, other = SeenGenerations(seen), SeenGenerations(seen)
    floor = mine.floor("d")
    other.note("d", 6, other.floor("d"))
    other.flush()
    mine.note("d", 5, floor)
    mine.flush()
    assert SeenGenerations(seen).floor("d") in {5, 6}


def test_a_memory_that_is_damaged_is_told_and_stays(tmp_path: Path) -> None:
    seen = Known(place="memory:", id="0" * 32, encryption="none")
    memory = SeenGenerations(seen)
    memory.note("d", 6, 0)
    memory.flush()
    (path,) = (tmp_path / "state").rglob("*.generations")
    path.write_bytes(path.read_bytes()[:-5])
    before = path.read_bytes()
    with pytest.raises(Corrupt, match="this file is damaged") as caught:
        SeenGenerations(seen).floor("d")
    assert caught.value.subject == str(path)
    assert path.read_bytes() == before


# ---- another repository at a known address


def _swapped(tmp_path: Path) -> tuple[Path, str, str]:
    """A repository that this machine has used, in whose place the store has put another one of the same passphrase."""
    place = tmp_path / "repo"
    create_repository(str(tmp_path / "other"), passphrase=lambda: "x")
    mine = create_repository(str(place), passphrase=lambda: "x").config.id
    place.rename(tmp_path / "mine")
    (tmp_path / "other").rename(place)
    return place, mine, json.loads((place / "config").read_text())["id"]


def test_another_repository_at_a_known_address_is_refused_until_it_is_accepted(tmp_path: Path) -> None:
    place, mine, other = _swapped(tmp_path)

    def unasked() -> str:
        raise AssertionError("the passphrase is for the repository that was known")

    for writing in (False, True):
        with pytest.raises(Corrupt, match=f"another repository is here .* {other}, and was {mine}") as caught:
            open_repository(str(place), passphrase=unasked, writing=writing)
        assert caught.value.subject == str(place)
        assert caught.value.hint is not None
        assert caught.value.hint.endswith(f"snapchain log {place} --accept-repository {other}")
    with pytest.raises(InvalidInput, match=f"the id of the repository here is {other}, not {mine}"):
        open_repository(str(place), passphrase=lambda: "x", accept=mine)
    opened = open_repository(str(place), passphrase=lambda: "x", accept=other)
    assert opened.notices == []
    assert open_repository(str(place), passphrase=lambda: "x").config.id == other


def test_a_wrong_passphrase_accepts_nothing(tmp_path: Path) -> None:
    place, _, other = _swapped(tmp_path)
    with pytest.raises(WrongPassphrase, match="wrong passphrase"):
        open_repository(str(place), passphrase=lambda: "y", accept=other)
    with pytest.raises(Corrupt, match="another repository is here"):
        open_repository(str(place), passphrase=lambda: "x")


@pytest.mark.parametrize("spelling", ["link", "relative", "file", "dots", "slash"])
def test_every_spelling_of_a_known_address_is_known(
    spelling: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, _, _ = _swapped(tmp_path)
    (tmp_path / "link").symlink_to(place)
    monkeypatch.chdir(tmp_path)
    address = {
        "link": str(tmp_path / "link"),
        "relative": located("repo"),
        "file": f"file://{place}",
        "dots": f"{tmp_path}/mine/../repo",
        "slash": f"{place}/",
    }[spelling]
    with pytest.raises(Corrupt, match="another repository is here"):
        open_repository(address, passphrase=lambda: "x")


def test_a_link_that_leads_elsewhere_now_is_another_repository_at_a_known_address(tmp_path: Path) -> None:
    link = tmp_path / "link"
    for name in ("one", "two"):
        create_repository(str(tmp_path / name), passphrase=lambda: "x")
    link.symlink_to(tmp_path / "one")
    open_repository(str(link), passphrase=lambda: "x")
    link.unlink()
    link.symlink_to(tmp_path / "two")
    with pytest.raises(Corrupt, match="another repository is here"):
        open_repository(str(link), passphrase=lambda: "x")


@pytest.mark.parametrize(
    ("endpoint", "same"),
    [
        ("http://s3.example", "HTTP://S3.Example:80/"),
        ("https://s3.example:443", "https://s3.example."),
        ("https://s3.eu-central-1.amazonaws.com", "https://s3.amazonaws.com"),
    ],
)
def test_one_endpoint_is_one_place_however_it_is_written(endpoint: str, same: str) -> None:
    assert canonical(endpoint) == canonical(same)
    assert canonical(endpoint) != canonical("https://s3.example:9000")
    assert canonical("http://s3.example") != canonical("https://s3.example")


# ---- when nothing can be remembered, somebody is told


def _notices(place: Path) -> str:
    return " ".join(open_repository(str(place), passphrase=lambda: "x").notices)


def test_a_machine_that_knows_nothing_of_an_address_says_so_once(tmp_path: Path) -> None:
    place = tmp_path / "repo"
    assert create_repository(str(place), passphrase=lambda: "x").notices == []
    assert _notices(place) == ""
    shutil.rmtree(tmp_path / "state")
    assert "does not know the repository" in _notices(place)
    assert _notices(place) == ""
    (generations,) = (tmp_path / "state").rglob("*.generations")
    generations.unlink()
    assert "no longer knows how far the disks" in _notices(place)


@pytest.mark.parametrize("how", ["file", "foreign", "link", "read-only"])
def test_state_that_cannot_be_used_is_told_each_time(how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "repo"
    create_repository(str(place), passphrase=lambda: "x")
    state = tmp_path / "state" / "snapchain"
    if how == "file":
        shutil.rmtree(state)
        state.write_text("")
    elif how == "foreign":
        monkeypatch.setattr("snapchain.host.private.os.geteuid", lambda: os.getuid() + 1)
    elif how == "link":
        (state / "repositories").rename(tmp_path / "elsewhere")
        (state / "repositories").symlink_to(tmp_path / "elsewhere")
    else:

        def full(*_: object, **__: object) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr("snapchain.host.private.os.rename", full)
    for _ in range(2):
        assert "is not noticed" in _notices(place)


@pytest.mark.parametrize("suffix", [".json", ".generations"])
@pytest.mark.parametrize("bad", [b"", b"{", b"[]", b"\0" * 100, b'{"id": 1}'])
def test_damaged_state_is_told_with_its_file_and_stays_until_it_is_accepted(
    bad: bytes, suffix: str, tmp_path: Path
) -> None:
    place = tmp_path / "repo"
    made = create_repository(str(place), passphrase=lambda: "x").config.id
    (path,) = (tmp_path / "state").rglob(f"*{suffix}")
    path.write_bytes(bad)
    for _ in range(2):
        with pytest.raises(Corrupt, match="this file is damaged") as caught:
            open_repository(str(place), passphrase=lambda: "x")
        assert caught.value.subject == str(path)
        assert str(caught.value.hint).endswith(f"--accept-repository {made}")
        assert path.read_bytes() == bad
    open_repository(str(place), passphrase=lambda: "x", accept=made)
    assert _notices(place) == ""


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o777])
def test_state_is_private_whatever_the_umask(umask: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        with PrivateDirectory(tmp_path / "a" / "b", make=True) as state:
            state.write("file", b"x")
            assert state.read("file", cap=10) == b"x"
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "a").rglob("*")}
    assert modes == {"b": 0o700, "file": 0o600}
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o700
    (tmp_path / "a" / "b").chmod(0o777)
    with PrivateDirectory(tmp_path / "a" / "b"):
        assert stat.S_IMODE((tmp_path / "a" / "b").stat().st_mode) == 0o700


def test_processes_that_remember_at_once_lose_nothing(tmp_path: Path) -> None:
    seen = Known(place="memory:", id="0" * 32, encryption="none")

    def see(number: int) -> None:
        memory = SeenGenerations(seen)
        memory.floor("d")
        barrier.wait()
        memory.note(f"disk{number}", number + 1, 0)
        memory.flush()

    barrier = threading.Barrier(8)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(see, range(8)))
    assert {number: SeenGenerations(seen).floor(f"disk{number}") for number in range(8)} == {n: n + 1 for n in range(8)}
