"""Who may read a replica: its owner, and a group that its directory names; whatever the umask, and what was before."""

from __future__ import annotations

import json
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, strategies as st

from snapchain.errors import Conflict, InvalidInput, NotFound
from snapchain.host.records import state_dir
from snapchain.ops.migrate.run import MigrateRequest, Move, migrate
from snapchain.replica.access import Access, group_number
from snapchain.replica.endpoint import DirectoryEndpoint
from snapchain.replica.names import directory_of
from snapchain.replica.store import open_replica
from tests.ops.stacks import Layer, MiB, build, flat, same
from tests.replica.conftest import DISK, Place, send

GROUP = 54321


@pytest.fixture
def chain(tmp_path: Path) -> list[Path]:
    return build(tmp_path / "c", [Layer(MiB, [f"write -P {n} {n * 64}k 128k"]) for n in range(1, 3)])


@pytest.fixture(params=[0o000, 0o022, 0o027, 0o077])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def modes(root: Path) -> dict[str, int]:
    """Of all directories and files, by what they are."""
    found: dict[str, int] = {}
    for path in (root, *root.rglob("*")):
        kind = "directory" if path.is_dir() else "overlay" if path.parent.name == "active" else path.suffix or path.name
        mode = stat.S_IMODE(path.stat().st_mode)
        assert found.setdefault(kind, mode) == mode, path
    return found


OWNERS = {"directory": 0o700, ".qcow2": 0o400, ".json": 0o600, ".lock": 0o600}


def test_a_replica_is_its_owners_alone(
    place: Place, chain: list[Path], umask: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state of this test"))
    for image in chain:
        place.send(image)
    assert modes(place.root) == OWNERS
    migrate(MigrateRequest(moves=[Move(chain[-1], DISK)]), DirectoryEndpoint(place.root))
    assert modes(place.root) == {**OWNERS, "overlay": 0o600}
    made = [path for path in (state_dir() / "sums").parents if path.is_relative_to(state_dir().parent)]
    assert all(not path.stat().st_mode & 0o077 for path in (state_dir() / "sums", *made)), "what it remembers, too"
    _ = umask


@pytest.mark.root
def test_a_group_may_read_it(open_host: Path, chain: list[Path], umask: int) -> None:
    place = Place(open_host / "replica")  # what the group may write to names only what it can reach
    place.send(chain[0])
    os.chown(place.root, -1, GROUP)
    place.root.chmod(0o750)
    place.send(chain[1])
    shared = {"directory": 0o750, ".qcow2": 0o440, ".json": 0o640, ".lock": 0o600}
    place.root.joinpath("snapchain-replica.json").chmod(0o640)
    assert modes(place.root) == shared
    assert {path.stat().st_gid for path in place.files()} == {GROUP}
    migrate(MigrateRequest(moves=[Move(chain[-1], DISK)]), DirectoryEndpoint(place.root))
    assert modes(place.root) == {**shared, "overlay": 0o660}
    assert (place.directory / "active").stat().st_gid == GROUP
    _ = umask


@pytest.mark.root
def test_a_group_by_option(place: Place) -> None:
    open_replica(place.root, make=True, group=GROUP)
    assert (place.root.stat().st_gid, modes(place.root)) == (GROUP, {"directory": 0o750, ".json": 0o640})
    open_replica(place.root, make=True)
    assert modes(place.root)["directory"] == 0o750, "it stays"


def test_groups_by_name() -> None:
    assert group_number("0") == 0
    assert group_number("root") == 0
    for name in ("", "no such group", "root\0", "12345678901", "-1"):
        with pytest.raises(NotFound, match="no such group"):
            group_number(name)


@given(st.integers(0, 0o7777))
def test_a_mode_never_gives_others_anything(mode: int) -> None:
    access = Access.of(os.stat_result((stat.S_IFDIR | mode, 1, 1, 2, 0, 77, 0, 0, 0, 0)))
    assert (access.gid is not None) == (mode & 0o057 == 0o050)
    for given_mode in (access.directory, access.layer, access.record, access.overlay):
        assert not given_mode & 0o007
        assert access.gid is not None or not given_mode & 0o070


def loosen(root: Path) -> None:
    """As version 0.1 made it."""
    for path in (root, *root.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o444 if path.suffix == ".qcow2" else 0o644)


def test_an_older_replica_is_tightened_when_it_is_written_to(place: Place, chain: list[Path]) -> None:
    place.send(chain[0])
    loosen(place.root)
    place.send(chain[1])
    (place.root / "snapchain-replica.json").chmod(0o600)
    (place.directory / ".lock").chmod(0o600)
    assert modes(place.root) == OWNERS


@pytest.mark.parametrize("mode", [0o777, 0o775])
def test_nobody_else_may_write_there(place: Place, chain: list[Path], mode: int) -> None:
    place.send(chain[0])
    place.root.chmod(mode)
    place.directory.chmod(mode)
    place.send(chain[1])
    assert modes(place.root)["directory"] == 0o700


def test_where_a_guest_may_run_its_files_stay_readable(place: Place, chain: list[Path], tmp_path: Path) -> None:
    """It may run as another user, as version 0.1 let it."""
    image = build(tmp_path / "d", [Layer(MiB, ["write -P 1 0 64k"])])[0]
    migrate(MigrateRequest(moves=[Move(image, DISK)]), DirectoryEndpoint(place.root))
    overlay = next((place.directory / "active").glob("*.qcow2"))
    loosen(place.root)
    send(chain[1], DirectoryEndpoint(place.root), "other")
    assert stat.S_IMODE(place.root.stat().st_mode) == 0o711, "it may be passed through, and not be listed"
    assert stat.S_IMODE(place.directory.stat().st_mode) == 0o755
    assert stat.S_IMODE(place.files()[0].stat().st_mode) == 0o444
    assert stat.S_IMODE((place.root / "other").stat().st_mode) == 0o700
    assert same(overlay, flat(image, tmp_path / "shown"))


def test_a_directory_of_everybody(tmp_path: Path, chain: list[Path]) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o1777)
    with pytest.raises(InvalidInput, match="everybody may make files"):
        send(chain[0], DirectoryEndpoint(shared))
    assert stat.S_IMODE(shared.stat().st_mode) == 0o1777
    assert not list(shared.iterdir())


@pytest.mark.parametrize("below", [DISK.replace("/", "%2F"), "web1%2Fvda/active", "new", "new/active", ".lock.d"])
def test_no_replica_in_a_replica(place: Place, chain: list[Path], below: str) -> None:
    place.send(chain[0])
    root = place.root / below
    root.parent.mkdir(exist_ok=True)
    before = sorted(place.root.rglob("*"))
    with pytest.raises(InvalidInput, match=r"lies in the replica|holds other things"):
        send(chain[0], DirectoryEndpoint(root))
    assert sorted(place.root.rglob("*")) == before


def test_no_replica_around_a_replica(tmp_path: Path, chain: list[Path]) -> None:
    """The other order: what would be the disk's directory is a replica already."""
    place = Place(tmp_path / "outer")
    place.send(chain[0])
    inner = Place(tmp_path / "inner")
    inner.send(chain[0])
    shutil.move(inner.root, place.root / "inner")
    with pytest.raises(Conflict, match="is a replica of its own"):
        place.send(chain[0], disk="inner")
    outside = tmp_path / "above"
    outside.mkdir()
    shutil.move(place.root, outside / "outer")
    with pytest.raises(InvalidInput, match="holds other things"):
        send(chain[0], DirectoryEndpoint(outside))


def test_a_strangers_mark_above_is_nothing(tmp_path: Path, chain: list[Path]) -> None:
    (tmp_path / "snapchain-replica.json").symlink_to("nowhere")
    assert Place(tmp_path / "replica").send(chain[0]).point == 1


@pytest.mark.parametrize("disk", ["snapchain-replica.json", "catalogue.json", "active"])
def test_names_of_a_replicas_own_files(place: Place, chain: list[Path], disk: str) -> None:
    with pytest.raises(InvalidInput, match="cannot be a new disk's name"):
        place.send(chain[0], disk=disk)
    if disk != "snapchain-replica.json":
        place.send(chain[0], disk="web1")
        (place.root / "web1").rename(place.root / disk)
        record = place.root / disk / "catalogue.json"
        said = json.loads(record.read_text())
        said.pop("check")
        record.write_text(json.dumps({**said, "disk": disk}))
        assert place.send(chain[1], disk=disk).layers_sent == 1, "one that is there goes on"


@given(st.text(max_size=60), st.text(max_size=60))
def test_directories_of_disks_are_apart(one: str, other: str) -> None:
    """No name leads into the directory of another, or to a file of the replica's own."""
    found = []
    for name in (one, other):
        try:
            found.append(directory_of(name))
        except InvalidInput:
            return
    assert all("/" not in name and name[0] not in ".-" for name in found)
    assert (found[0] == found[1]) == (one == other)
