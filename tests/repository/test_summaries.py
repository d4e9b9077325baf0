"""All disks at a glance: unchanged disks cost the listing, and what is wrong with one disk hides no other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from snapchain.errors import Corrupt, NotFound, Unavailable
from snapchain.host.records import cache_dir
from snapchain.model.freshness import newest_of
from snapchain.objects.memory import MemoryStore
from snapchain.objects.store import ObjectStore
from snapchain.repository.catalogue import KIND, Point, generation_names
from snapchain.repository.envelope import seal
from snapchain.repository.guest_states import look
from snapchain.repository.known import Known, SeenGenerations
from snapchain.repository.repository import Repository
from snapchain.repository.summaries import summaries
from snapchain.testing.faults import Fault, FaultStore, On
from tests.repository.counting import CountingStore
from tests.repository.synthetic import again, repository

NOW = datetime(2026, 11, 30, 2, tzinfo=UTC)
LAYER = "a" * 32


def publish(repo: Repository, disk: str, days: Sequence[float], *, instant: str | None = None) -> None:
    """The next generation, with a point so many days before NOW, each."""
    points = tuple(
        Point(
            point=number,
            time=NOW - timedelta(days=ago),
            layer=LAYER,
            size=number << 20,
            content_id="c" * 64,
            instant=instant,
        )
        for number, ago in enumerate(days, 1)
    )
    catalogue = repo.disk(disk)
    catalogue.advance(catalogue.read(), time=NOW, points=points, next_point=len(points) + 1, parents={LAYER: None})


@pytest.fixture
def repo() -> Repository:
    repo = repository(MemoryStore())
    publish(repo, "web1/vda", [3, 2, 1])
    publish(repo, "web2/vda", [2])
    return repo


def newest(repo: Repository, now: datetime = NOW) -> dict[str, int | None]:
    shown = {}
    for each in summaries(repo, now):
        point, _ = newest_of(each.newest, now)
        shown[each.name] = None if point is None else point.point
    return shown


def test_unchanged_disks_cost_the_listing_alone(repo: Repository) -> None:
    first = summaries(again(repo), NOW)
    store = CountingStore(repo.store)
    assert summaries(again(repo, store), NOW) == first
    assert store.of("get") == []
    assert [each.name for each in store.of("list")] == ["disks/"]
    publish(repo, "web2/vda", [2, 0.5])
    store = CountingStore(repo.store)
    assert newest(again(repo, store)) == {"web1/vda": 3, "web2/vda": 2}
    assert len(store.of("get")) == 1


def test_an_object_that_was_replaced_is_read_anew(repo: Repository) -> None:
    """A copy of the repository was put back and went on: the same generation is another object."""
    summaries(repo, NOW)
    (name,) = generation_names(repo.store, repo.keys.disk_key("web2/vda"))
    repo.store.delete(name)
    publish(repo, "web2/vda", [2, 0.5, 0.25])
    assert newest(again(repo)) == {"web1/vda": 3, "web2/vda": 3}


@pytest.mark.parametrize("damage", ["flipped", "empty", "of another key", "directory"])
def test_the_cache_is_never_needed(repo: Repository, damage: str) -> None:
    first = summaries(repo, NOW)
    (kept,) = (cache_dir() / "summaries").iterdir()
    assert b"web1" not in kept.read_bytes()
    if damage == "flipped":
        kept.write_bytes(kept.read_bytes()[:-1] + b"x")
    elif damage == "empty":
        kept.write_bytes(b"")
    elif damage == "directory":
        kept.unlink()
        kept.mkdir()
    else:
        other = repository(MemoryStore())
        publish(other, "web1/vda", [1])
        summaries(other, NOW)
        kept.write_bytes(kept.with_name(other.config.id).read_bytes())
    store = CountingStore(repo.store)
    assert summaries(again(repo, store), NOW) == first
    assert len(store.of("get")) == 2


def test_a_clock_that_goes_back_reads_anew(repo: Repository) -> None:
    assert newest(repo)["web1/vda"] == 3
    assert newest(repo, NOW - timedelta(days=1.5))["web1/vda"] == 2
    assert newest(repo, NOW - timedelta(days=4))["web1/vda"] is None
    assert newest(repo)["web1/vda"] == 3


def test_points_of_the_future_are_never_the_newest(repo: Repository) -> None:
    publish(repo, "web1/vda", [3, 2, -400, -1])
    for _ in range(2):
        assert newest(repo)["web1/vda"] == 2
        assert newest(repo, NOW + timedelta(days=1))["web1/vda"] == 4


@pytest.mark.parametrize("known", [True, False])
def test_a_damaged_catalogue_is_a_line_with_its_name(repo: Repository, known: bool) -> None:
    if known:
        summaries(repo, NOW)
    publish(repo, "web1/vda", [3, 2, 1, 0.5])
    *_, name = generation_names(repo.store, repo.keys.disk_key("web1/vda"))
    repo.store.put(name, repo.store.get(name)[:-1])
    broken, sound = summaries(again(repo), NOW)
    assert (sound.name, sound.points, sound.trouble) == ("web2/vda", 1, None)
    assert (broken.name, broken.points, broken.newest) == ("web1/vda", 0, ())
    assert broken.trouble is not None
    assert (broken.trouble.kind, broken.trouble.subject) == ("corrupt", name)


def test_a_disk_of_which_nothing_can_be_read_has_a_line(repo: Repository) -> None:
    key = repo.keys.disk_key("web1/vda")
    (name,) = generation_names(repo.store, key)
    repo.store.put(name, b"?")
    assert [each.name for each in summaries(again(repo), NOW)] == [f"unknown disk {key}", "web2/vda"]


def test_a_catalogue_of_another_disk_is_not_believed(repo: Repository) -> None:
    """Sealed for its place, as a broken writer that has the key could do it."""
    key = repo.keys.disk_key("web1/vda")
    name = f"disks/{key}/{2:020d}"
    other = repo.catalogue("web2/vda").model_copy(update={"generation": 2})
    repo.store.put(name, seal(repo.keys, KIND, name, other.model_dump_json().encode()))
    broken, sound = summaries(again(repo), NOW)
    assert (broken.name, sound.name, sound.points) == ("web1/vda", "web2/vda", 1)
    assert broken.trouble is not None
    assert broken.trouble.message == "the catalogue belongs to another disk or generation"


def test_a_disk_that_was_rolled_back_is_noticed(repo: Repository, tmp_path: Path) -> None:
    def opened() -> Repository:
        made = again(repo)
        made.memory = SeenGenerations(Known(place=str(tmp_path), id=repo.config.id, encryption="none"))
        made.memory.begin()
        return made

    publish(repo, "web1/vda", [3, 2, 1, 0.5])
    assert newest(opened()) == {"web1/vda": 4, "web2/vda": 1}
    *_, last = generation_names(repo.store, repo.keys.disk_key("web1/vda"))
    kept = repo.store.get(last)
    repo.store.delete(last)
    broken, sound = summaries(opened(), NOW)
    assert (broken.name, broken.points) == ("web1/vda", 0)
    assert broken.trouble is not None
    assert "its newest points were taken away" in broken.trouble.message
    assert sound.trouble is None
    (only,) = generation_names(repo.store, repo.keys.disk_key("web2/vda"))
    repo.store.delete(only)
    assert [(each.name, each.trouble is None) for each in summaries(opened(), NOW)] == [
        ("web1/vda", False),
        ("web2/vda", False),
    ]
    repo.store.put(last, kept)


def remote(store: ObjectStore) -> ObjectStore:
    store.properties = replace(store.properties, is_remote=True)
    return store


def test_a_store_that_is_down_is_no_trouble_of_disks(repo: Repository) -> None:
    down = FaultStore(remote(repo.store), [On(nth, Fault.UNAVAILABLE, operation="get") for nth in (1, 2)])
    with pytest.raises(Unavailable, match="overloaded"):
        summaries(again(repo, down), NOW)


def test_a_remote_store_of_many_disks_is_listed_in_shares(repo: Repository, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("snapchain.repository.summaries._MANY", 1)
    store = CountingStore(remote(repo.store))
    first = summaries(again(repo, store), NOW)
    assert summaries(again(repo, store), NOW) == first
    assert sorted(each.name for each in store.of("list"))[1:] == [f"disks/{digit:x}" for digit in range(16)]
    assert len(store.of("get")) == 2


def test_a_generation_that_was_collected_meanwhile(repo: Repository) -> None:
    """It was listed, and is gone when it is read: many were made since."""

    class Late(CountingStore):
        def get(self, name: str, *, offset: int = 0, length: int | None = None) -> bytes:
            if name == first and not self.of("get", first):
                self._note("get", name)
                publish(repo, "web2/vda", [2, 0.5])
                repo.store.delete(first)
            return super().get(name, offset=offset, length=length)

    (first,) = generation_names(repo.store, repo.keys.disk_key("web2/vda"))
    assert newest(again(repo, Late(repo.store))) == {"web1/vda": 3, "web2/vda": 2}
    assert newest(again(repo)) == {"web1/vda": 3, "web2/vda": 2}

    class Lost(CountingStore):
        def get(self, name: str, *, offset: int = 0, length: int | None = None) -> bytes:
            return super().get(f"{name}x" if name == lost else name, offset=offset, length=length)

    publish(repo, "web2/vda", [2, 0.5, 0.2])
    *_, lost = generation_names(repo.store, repo.keys.disk_key("web2/vda"))
    (trouble,) = (each.trouble for each in summaries(again(repo, Lost(repo.store)), NOW) if each.trouble)
    assert trouble.message == "the store lists the catalogue and does not have it"
    assert trouble.kind == Corrupt.kind


def test_disks_of_guests_are_told_apart(repo: Repository) -> None:
    publish(repo, "web1/vdb", [1], instant="ab" * 16)
    publish(repo, "web1/vdc/x", [1])
    publish(repo, "web3/.guest", [1])
    for _ in range(2):
        assert {each.name: each.guest for each in summaries(again(repo), NOW)} == {
            "web1/vda": "web1",
            "web1/vdb": "web1",
            "web1/vdc/x": None,
            "web2/vda": None,
            "web3/.guest": "web3",
        }


def test_the_state_of_a_guest_reads_no_other_disks(repo: Repository) -> None:
    publish(repo, "web1/vdb", [1], instant="ab" * 16)
    summaries(repo, NOW)
    store = CountingStore(repo.store)
    assert look(again(repo, store), "web1").guest == "web1"
    read = {each.name.split("/")[1] for each in store.of("get", "disks/")}
    assert read == {repo.keys.disk_key(name) for name in ("web1/vda", "web1/vdb")}
    with pytest.raises(NotFound, match="no guest 'web9'"):
        look(again(repo), "web9")
    *_, name = generation_names(repo.store, repo.keys.disk_key("web2/vda"))
    repo.store.put(name, b"?")
    with pytest.raises(Corrupt, match="is not the snapchain object"):
        look(again(repo), "web1")
