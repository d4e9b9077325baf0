"""A key without s3:DeleteObject, or a bucket under object lock: work succeeds, only gc needs more."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest

from snapchain.errors import Busy, Conflict
from snapchain.model.events import Event, Notice
from snapchain.model.retention import Policy
from snapchain.objects.exclusive import RETIRED, Clockwork, create_exclusively, is_retired
from snapchain.objects.memory import MemoryStore
from snapchain.objects.store import Data, ObjectStore, Refused, StoreWrapper
from snapchain.repository import collecting as gc
from snapchain.repository.leases import Lease, Mode
from snapchain.repository.points_merge import RepositoryMerge
from snapchain.repository.repository import Repository
from snapchain.repository.verification import verify
from tests.ops.shipping import DISK, MiB, ship, shipment
from tests.ops.stacks import Layer, build, flat
from tests.ops.test_crash import reads
from tests.repository.synthetic import again, repository


class NoDelete(StoreWrapper):
    """Refuses to delete anything, there or not, as S3 does."""

    def delete(self, name: str) -> None:
        raise Refused("access denied (AccessDenied)", subject=name, hint="the access key needs s3:DeleteObject")


class Overwriting(NoDelete):
    """And ignores conditions."""

    def create(self, name: str, data: Data) -> bool:
        self.inner.put(name, data)
        return True


@dataclass
class Clock:
    now: float = 1_000_000.0
    slept: list[float] = field(default_factory=list)

    def read(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    layers = [Layer(MiB, [f"write -P {n + 1} {n * 64}k 64k"]) for n in range(2)]
    return build(tmp_path_factory.mktemp("nodelete") / "chain", layers)


def notes(said: list[Event]) -> list[str]:
    return [each.message for each in said if isinstance(each, Notice)]


def leases(store: ObjectStore) -> list[bool]:
    """Of each lease, whether it counts as gone."""
    return [is_retired(info) for info in store.list("leases/")]


def test_work_succeeds_with_a_note_and_blocks_nobody(files: list[Path], tmp_path: Path) -> None:
    whole = repository(MemoryStore(), block_size=64 * 1024)
    ship(files[0], whole)
    weak = again(whole, NoDelete(whole.store))
    said: list[Event] = []
    with shipment(files[1], weak, DISK) as work:
        assert work.run(on_event=said.append).point == 2
    (note,) = notes(said)
    assert "was not removed: access denied" in note
    assert "s3:DeleteObject" in note
    said.clear()
    assert RepositoryMerge(weak, DISK, Policy(last=1)).run(on_event=said.append).points_kept == (2,)
    assert len(notes(said)) == 1
    said.clear()
    weak.hold(DISK, 2, "tag", on_wait=lambda words: said.append(Notice(words)))
    assert len(notes(said)) == 1
    assert verify(weak, share=1.0, on_event=said.append).findings == ()
    assert reads(weak, 2) == flat(files[1], tmp_path / "flat").read_bytes()
    assert leases(whole.store)
    assert all(leases(whole.store))
    assert gc.run(again(whole)).objects_deleted > 0, "a key that may delete waits for none of these leases"
    assert leases(whole.store) == [], "and takes them away"


def test_gc_says_what_it_needs_before_it_writes_anything(files: list[Path]) -> None:
    whole = repository(MemoryStore(), block_size=64 * 1024)
    for path in files:
        ship(path, whole)
    RepositoryMerge(whole, DISK, Policy(last=1)).run()
    before = list(whole.store.list(""))
    with pytest.raises(Refused, match="gc must delete objects and is not allowed to: access denied") as caught:
        gc.run(again(whole, NoDelete(whole.store)))
    assert "s3:DeleteObject" in str(caught.value.hint)
    assert caught.value.subject == whole.store.url
    assert list(whole.store.list("")) == before


def _lease(repo: Repository, mode: Mode, patience: float = 0) -> Lease:
    return repo.lease(mode, "a test", patience=patience, on_wait=lambda _: None)


@pytest.mark.parametrize("first", Mode)
@pytest.mark.parametrize("second", Mode)
def test_leases_that_stay_exclude_as_others_do_and_are_over_when_they_end(first: Mode, second: Mode) -> None:
    repo = repository(MemoryStore())
    weak = again(repo, NoDelete(repo.store))
    with _lease(weak, first):
        if first is second is Mode.COLLECT:
            with pytest.raises(Busy, match="a test on"):
                _lease(weak, second).__enter__()
        else:
            with _lease(weak, second):
                pass
    for mode in Mode:
        with _lease(weak, mode):
            pass
    assert all(leases(repo.store))


def test_a_lease_that_others_retired_is_lost() -> None:
    repo = repository(MemoryStore())
    with _lease(repo, Mode.WRITE) as mine:
        (name,) = [info.name for info in repo.store.list("leases/")]
        repo.store.put(name, RETIRED)
        with pytest.raises(Conflict, match="stood still"):
            mine.check()


def test_claims_that_stay_block_nobody() -> None:
    store, clock = Overwriting(MemoryStore()), Clock()
    clockwork = Clockwork(clock.read, clock.sleep)
    assert create_exclusively(store, "a", b"mine", conditional=False, clockwork=clockwork)
    store.inner.delete("a")
    assert create_exclusively(store, "a", b"other", conditional=False, clockwork=clockwork)
    assert store.get("a") == b"other"
    store.inner.delete("a")
    store.inner.put("a.claim.0000000000000000", b"")
    with pytest.raises(Conflict, match="hold claims"):
        create_exclusively(store, "a", b"third", conditional=False, clockwork=clockwork)
    assert clock.now < 1_000_000 + 60
