"""Where a repository may be made, and what is said where there is none: every kind of place, by every way in."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from snapchain.errors import Conflict, Corrupt, NotFound, SnapchainError
from snapchain.objects.local import LocalStore
from snapchain.objects.memory import MemoryStore
from snapchain.objects.store import ObjectStore
from snapchain.ops import init
from snapchain.replica.store import open_replica
from snapchain.repository import repository as module
from snapchain.repository.format import fresh_id, generation_name, index_name, layer_name, pack_name
from snapchain.repository.opening import create_repository, open_repository
from snapchain.repository.repository import Repository
from tests.ops.shipping import local, ship
from tests.ops.stacks import Layer, MiB, build


def secret() -> str:
    return "secret"


STORED = {
    "disks": generation_name(fresh_id(), 3),
    "layers": layer_name(fresh_id()),
    "packs": pack_name(fresh_id()),
    "index": index_name(7, fresh_id()),
}
OTHERS = ["notes.txt", "photos/one.jpg", "keys/id_rsa", "packs/notes", "index/readme", "disks/web1/vda"]


@pytest.fixture(params=["directory", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> ObjectStore:
    return LocalStore(tmp_path / "place", make=True) if request.param == "directory" else MemoryStore("place")


def cut_off(store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """An init that dies before its last step."""

    def die(*_: object, **__: object) -> bool:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "create_exclusively", die)
        with pytest.raises(KeyboardInterrupt):
            Repository.create(store, passphrase=secret)


def test_what_an_interrupted_init_has_left_is_no_hindrance(store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    cut_off(store, monkeypatch)
    store.put("config.claim.0123456789abcdef", b"")
    store.put("probe/0123456789abcdef/body", b"x")
    with pytest.raises(NotFound, match=r"^no snapchain repository|there is no snapchain repository here$") as raised:
        Repository.open(store, passphrase=secret)
    assert raised.value.hint == f"snapchain init {store.url}"
    Repository.create(store, passphrase=secret)
    Repository.open(store, passphrase=secret)


@pytest.mark.parametrize("folder", STORED)
def test_a_repository_that_has_lost_its_config_is_left_as_it_is(store: ObjectStore, folder: str) -> None:
    Repository.create(store, passphrase=secret)
    store.put(STORED[folder], b"sealed")
    config = store.get("config")
    store.delete("config")
    before = [info.name for info in store.list("")]
    for attempt in (Repository.create, Repository.open):
        with pytest.raises(Corrupt, match=f"`config` of this repository is missing.*: 1 in {folder}/") as raised:
            attempt(store, passphrase=secret)
        assert raised.value.subject == store.url
        assert "put `config` back" in (raised.value.hint or "")
        assert "init" not in (raised.value.hint or "")
    assert [info.name for info in store.list("")] == before
    store.put("config", config)
    Repository.open(store, passphrase=secret)


@pytest.mark.parametrize("name", OTHERS)
def test_other_things_are_not_moved_in_with(store: ObjectStore, name: str) -> None:
    store.put(name, b"theirs")
    top = name.split("/", maxsplit=1)[0]
    with pytest.raises(Conflict, match=f"the place is not empty: .*{top}") as raised:
        Repository.create(store, passphrase=secret)
    assert raised.value.subject == store.url
    assert [info.name for info in store.list("")] == [name]
    with pytest.raises(NotFound, match=f"only other objects: .*{top}") as missing:
        Repository.open(store, passphrase=secret)
    assert "init" not in (missing.value.hint or "")


def strange(place: Path, kind: str) -> None:
    match kind:
        case "hidden file":
            (place / ".profile").write_bytes(b"")
        case "empty directory":
            (place / "mine").mkdir()
        case "link":
            (place / "packs").symlink_to("/nowhere")
        case "capitals":
            (place / "README").write_bytes(b"")
        case "blank":
            (place / "a b").write_bytes(b"")


@pytest.mark.parametrize("kind", ["hidden file", "empty directory", "link", "capitals", "blank"])
def test_names_that_no_object_has_count_as_well(tmp_path: Path, kind: str) -> None:
    strange(tmp_path, kind)
    with pytest.raises(Conflict, match="the place is not empty"):
        create_repository(str(tmp_path), passphrase=secret)
    assert len(list(tmp_path.iterdir())) == 1
    with pytest.raises(NotFound, match="only other objects"):
        open_repository(str(tmp_path), passphrase=secret)


def test_a_new_filesystem_is_empty(tmp_path: Path) -> None:
    (tmp_path / "lost+found").mkdir()
    create_repository(str(tmp_path), passphrase=secret)


def replica(place: Path) -> Path:
    open_replica(place, make=True)
    return place


def disk_of_replica(place: Path) -> Path:
    disk = open_replica(place, make=True).disk("web1/vda").directory
    disk.mkdir()
    (disk / "catalogue.json").write_bytes(b"{}")
    return disk


@pytest.mark.parametrize(("make", "what"), [(replica, "a replica"), (disk_of_replica, "a disk of a replica")])
def test_a_replica_is_named_as_one(tmp_path: Path, make: Callable[[Path], Path], what: str) -> None:
    place = make(tmp_path / "r")
    attempts: list[tuple[type[SnapchainError], Callable[[], object]]] = [
        (NotFound, lambda: open_repository(str(place), passphrase=secret)),
        (Conflict, lambda: create_repository(str(place), passphrase=secret)),
        (Conflict, lambda: init.plan(str(place))),
    ]
    for error, attempt in attempts:
        with pytest.raises(error, match=f"this is {what}, not a repository") as raised:
            attempt()
        assert raised.value.hint == f"use dir:{tmp_path}/r for the replica, or ssh://HOST{tmp_path}/r from another host"


def test_a_plan_tells_what_the_run_would_meet(tmp_path: Path) -> None:
    assert init.plan(str(tmp_path / "new")).destination == str(tmp_path / "new")
    assert not (tmp_path / "new").exists()
    repo = local(tmp_path / "repo")
    ship(build(tmp_path / "c", [Layer(MiB)])[0], repo)
    (tmp_path / "repo" / "config").write_bytes(b"{}")
    with pytest.raises(Conflict, match="a snapchain repository here already"):
        init.plan(str(tmp_path / "repo"))
    (tmp_path / "repo" / "config").unlink()
    with pytest.raises(Corrupt, match=r"1 in disks/, 1 in layers/"):
        init.plan(str(tmp_path / "repo"))
