"""Three writers that tidy up and a collector that ends an era go on call by call, in a drawn order.

Listings come in two pieces, between which others go on.  Whatever happens, no index that counts lists a pack that the
collector has deleted, and none that stays is forgotten.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator, Sequence

import pytest

from snapchain.objects.memory import MemoryStore
from snapchain.objects.store import Data, ObjectInfo, ObjectStore, StoreWrapper
from snapchain.repository import condemned, eras, index as indexes, sparse, sweep, tidying
from snapchain.repository.crypto import NONE
from snapchain.repository.format import pack_name
from snapchain.repository.repository import Config, Repository
from tests.exhaustive import examples
from tests.repository.test_sparse import KEYS, blob, listed, pack

pytestmark = pytest.mark.sampled

Job = Callable[[ObjectStore], None]
HANG = 60.0


class Turns:
    """Lets one job go on at a time. Which one is drawn anew at every fifth call."""

    def __init__(self, draw: random.Random) -> None:
        self.draw = draw
        self.errors: list[Exception] = []
        self._changed = threading.Condition()
        self._left: set[int] = set()
        self._turn: int | None = None

    def run(self, jobs: Sequence[Job], store: ObjectStore) -> None:
        self._left = set(range(len(jobs)))
        threads = [threading.Thread(target=self._run, args=(*each, store), daemon=True) for each in enumerate(jobs)]
        for thread in threads:
            thread.start()
        with self._changed:
            self._pass_on()
        for thread in threads:
            thread.join(HANG)
            assert not thread.is_alive()

    def _run(self, number: int, job: Job, store: ObjectStore) -> None:
        with self._changed:
            self._wait(number)
        try:
            job(CallByCall(store, self, number))
        except Exception as error:  # noqa: BLE001 - shown by the test
            self.errors.append(error)
        with self._changed:
            self._left.discard(number)
            self._pass_on()

    def step(self, number: int) -> None:
        """Before each call of a job."""
        with self._changed:
            if self.draw.random() < 0.2:
                self._pass_on()
            self._wait(number)

    def _pass_on(self) -> None:
        self._turn = self.draw.choice(sorted(self._left)) if self._left else None
        self._changed.notify_all()

    def _wait(self, number: int) -> None:
        assert self._changed.wait_for(lambda: self._turn == number, HANG)


class CallByCall(StoreWrapper):
    """The store of one job."""

    def __init__(self, inner: ObjectStore, turns: Turns, number: int) -> None:
        super().__init__(inner)
        self._turns, self._number = turns, number

    def _step(self) -> None:
        self._turns.step(self._number)

    def put(self, name: str, data: Data) -> None:
        self._step()
        super().put(name, data)

    def create(self, name: str, data: Data) -> bool:
        self._step()
        return super().create(name, data)

    def get(self, name: str, *, offset: int = 0, length: int | None = None) -> bytes:
        self._step()
        return super().get(name, offset=offset, length=length)

    def size(self, name: str) -> int | None:
        self._step()
        return super().size(name)

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        self._step()
        whole = list(super().list(prefix))
        if not whole:
            return iter(whole)
        middle = self._turns.draw.choice(whole).name
        self._step()
        later = super().list(prefix)
        return iter([info for info in whole if info.name < middle] + [info for info in later if info.name >= middle])

    def delete(self, name: str) -> None:
        self._step()
        super().delete(name)


def writer(number: int) -> Job:
    """Stores one pack, and tidies up."""

    def job(store: ObjectStore) -> None:
        index = sparse.load(store, KEYS)
        one = listed(number)
        store.put(pack_name(one.pack), bytes(one.size))
        index.find(blob(10**9))
        indexes.write(store, KEYS, [one], era=index.era)
        tidying.tidy(store, KEYS, index, pack_size=None)

    return job


def collector(config: Config, gone: set[str], records: Sequence[str]) -> Job:
    """Deletes packs that were condemned before any of the writers began."""

    def job(store: ObjectStore) -> None:
        there = [info.name.rpartition("/")[2] for info in store.list("packs/")]
        stay = {each: 1000 + int(each, 16) for each in there if each not in gone}
        made = sweep._write_index(Repository(store, config, KEYS, conditional=True), stay, set(), alone=False)
        old = (*made.taken, *made.samples)
        ends = [name for name in old if eras.is_end_of_era(name)]
        for name in (*(each for each in old if each not in ends), *map(pack_name, gone), *ends, *records):
            store.delete(name)

    return job


def in_order(store: ObjectStore, found: Sequence[ObjectInfo]) -> Iterator[tuple[str, bytes]]:
    """In the thread of the job."""
    return ((info.name, store.get(info.name)) for info in found)


@pytest.mark.parametrize("seed", range(examples(100, times=20)))
def test_nothing_is_forgotten_and_nothing_that_is_gone_is_listed(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = random.Random(seed)
    monkeypatch.setattr(tidying, "LOOSE", 3)
    monkeypatch.setattr(indexes, "_read_ahead", in_order)
    monkeypatch.setattr(eras, "_ONE_LISTING", 1)
    monkeypatch.setattr(sparse, "WHOLE_BYTES", draw.choice([0, 1 << 20]))
    config = Config.model_validate(
        {
            "id": "00" * 16,
            "created": "2026-01-01T00:00:00Z",
            "encryption": NONE,
            "block_size": 65536,
            "conditional_put": True,
        }
    )
    store = MemoryStore()
    packs = range(draw.randrange(4, 9))
    for number in packs:
        one = listed(number)
        store.put(pack_name(one.pack), bytes(one.size))
        indexes.write(store, KEYS, [one], era=0)
    if draw.random() < 0.5:
        writer(50)(store)
    if draw.random() < 0.4:  # a collector that has died
        eras.begin_era(store, KEYS, [info.name for info in store.list("index/")], conditional=True)
    gone = set(map(pack, draw.sample(packs, draw.randrange(3))))
    records = list(condemned.condemn(store, KEYS, gone, ())) if gone else []
    jobs = [writer(100 + number) for number in range(3)]
    if draw.random() < 0.8:
        jobs.append(collector(config, gone, records))
    turns = Turns(draw)
    turns.run(jobs, store)
    assert turns.errors == []
    known = indexes.load(store, KEYS)
    assert not known.unreadable
    there = {info.name.rpartition("/")[2] for info in store.list("packs/")}
    assert known.sizes.keys() <= there | known.condemned.all_packs
    assert {pack(number) for number in packs} - gone <= known.sizes.keys()
    monkeypatch.setattr(sparse, "WHOLE_BYTES", 1 << 20)
    assert sparse.load(store, KEYS).sizes.keys() - gone == known.sizes.keys() - gone
