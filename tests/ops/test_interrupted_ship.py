"""A shipment that is cut off: what was sent is not sent again, however little it was; and what a small one costs."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from snapchain.errors import SnapchainError, Unavailable
from snapchain.model.events import Event, Progress
from snapchain.objects.memory import MemoryStore
from snapchain.objects.store import Data, ObjectStore
from snapchain.repository import index as indexes, packs
from snapchain.repository.condemned import condemn
from snapchain.repository.damage import list_packs
from snapchain.repository.format import pack_name
from snapchain.repository.mark import mark
from snapchain.repository.packer import UPLOADS
from snapchain.repository.verification import verify
from snapchain.testing.faults import Crash
from tests.ops.shipping import DISK, MiB, restore, ship, shipment
from tests.ops.stacks import Layer, build, flat
from tests.repository.counting import CountingStore
from tests.repository.synthetic import again, repository

PACK = 64 * 1024


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """2 MiB that do not compress: 32 packs."""
    directory = tmp_path_factory.mktemp("interrupted")
    noise = directory / "noise"
    noise.write_bytes(random.Random(1).randbytes(2 * MiB))
    (path,) = build(directory / "chain", [Layer(2 * MiB, [f"write -s {noise} 0 2M"])])
    return path


@pytest.fixture(autouse=True)
def _small_packs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packs, "PACK_BYTES", PACK)


class Dying(CountingStore):
    """Takes `left` packs, and then the network is gone for what is named by `gone`."""

    def __init__(self, inner: ObjectStore, left: int, gone: tuple[str, ...]) -> None:
        super().__init__(inner)
        self.left, self.gone = left, gone

    def put(self, name: str, data: Data) -> None:
        if name.startswith("packs/"):
            self.left -= 1
        if self.left < 0 and name.startswith(self.gone):
            raise Unavailable("the network is gone", subject=name)
        super().put(name, data)


@pytest.mark.parametrize("after", [1, 9, 20])
@pytest.mark.parametrize("why", ["interrupt", "upload"])
def test_what_was_sent_is_not_sent_again(image: Path, tmp_path: Path, after: int, why: str) -> None:
    repo = repository(MemoryStore(), block_size=PACK)
    store = Dying(repo.store, after if why == "upload" else 1000, ("packs/",))

    def heard(event: Event) -> None:
        if why == "interrupt" and isinstance(event, Progress) and len(store.of("put", "packs/")) >= after:
            raise KeyboardInterrupt

    with (
        pytest.raises(
            KeyboardInterrupt if why == "interrupt" else Unavailable, match="^$" if why == "interrupt" else "."
        ),
        shipment(image, again(repo, store), DISK) as work,
    ):
        work.run(on_event=heard)
    there = sum(info.size for info in repo.store.list("packs/"))
    assert there >= after * PACK
    whole = ship(image, repository(MemoryStore(), block_size=PACK)).bytes_stored
    sent = ship(image, repo).bytes_stored
    assert sent <= whole - there + (UPLOADS + 1) * (PACK + 1000)
    restore(repo, tmp_path / "out.raw")
    assert (tmp_path / "out.raw").read_bytes() == flat(image, tmp_path / "flat").read_bytes()


@pytest.mark.parametrize("after", [1, 9, 20])
def test_what_was_sent_before_a_kill_is_not_sent_again(image: Path, tmp_path: Path, after: int) -> None:
    """No index tells of it: the packs do."""
    repo = repository(MemoryStore(), block_size=PACK)

    class Killed(Dying):
        def put(self, name: str, data: Data) -> None:
            if self.left <= 0:
                raise Crash
            super().put(name, data)

    with pytest.raises(Crash):
        ship(image, repo, store=Killed(repo.store, after, ()))
    for info in list(repo.store.list("leases/")):  # as of a process that is known to be gone
        repo.store.delete(info.name)
    assert list(repo.store.list("index/")) == []
    there = sum(info.size for info in repo.store.list("packs/"))
    assert there >= after * PACK
    whole = ship(image, repository(MemoryStore(), block_size=PACK)).bytes_stored
    assert ship(image, repo).bytes_stored <= whole - there + 1000
    assert verify(again(repo), share=1.0).findings == ()
    assert set(indexes.load(repo.store, repo.keys).sizes) == set(list_packs(repo.store)), "all of them are listed now"
    restore(repo, tmp_path / "out.raw")
    assert (tmp_path / "out.raw").read_bytes() == flat(image, tmp_path / "flat").read_bytes()


def test_what_is_condemned_or_damaged_is_sent_again(image: Path) -> None:
    """One pack is to go, one was altered; a killed shipment left them."""
    repo = repository(MemoryStore(), block_size=PACK)
    whole = ship(image, repo).bytes_stored
    first, second, *_ = list_packs(repo.store)
    for info in [info for folder in ("disks/", "index/", "layers/") for info in repo.store.list(folder)]:
        repo.store.delete(info.name)
    condemn(repo.store, repo.keys, [first], [])
    body = repo.store.get(pack_name(second))
    repo.store.put(pack_name(second), body[:-1] + b"x")
    sent = ship(image, repo).bytes_stored
    assert PACK < sent < 3 * PACK < whole
    assert not {pack.pack for pack in mark(again(repo)).usage if len(pack.offsets)} & {first, second}


def test_a_dead_network_says_so_at_once(image: Path) -> None:
    """The index of what was sent cannot be written either: the error is the first one."""
    repo = repository(MemoryStore(), block_size=PACK)
    store = Dying(repo.store, 5, ("packs/", "index/"))
    with pytest.raises(Unavailable, match="the network is gone") as error:
        ship(image, repo, store=store)
    assert str(error.value.subject).startswith("packs/")
    assert isinstance(error.value, SnapchainError)


def test_a_small_shipment_costs_no_more_requests_than_before_packs_were_looked_at(tmp_path: Path) -> None:
    """That costs one listing; but the new record is no longer read back. Only what brings nothing new reads the index
    for its sake. The first shipment from a host asks how the guest stands, for the destination's id: 6 requests, once.
    """
    files = build(tmp_path / "chain", [Layer(MiB, ["write -P 1 0 64k"]), Layer(MiB, ["write -P 2 64k 64k"])])
    repo = repository(MemoryStore(), block_size=PACK)
    counts = []
    for path in (*files, files[-1]):
        store = CountingStore(repo.store)
        ship(path, repo, store=store)
        counts.append(len(store.asked))
        assert len(store.of("list", "packs/")) <= 1
        assert len(store.of("size", "packs/")) == 0
    assert counts == [13 + 6, 16, 14]
