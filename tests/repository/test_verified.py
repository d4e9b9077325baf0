"""What verify keeps of its progress: turns that cover everything, runs that go on, records that nobody can forge."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from snapchain.destination.records import VerifyReport
from snapchain.errors import Corrupt, Unavailable
from snapchain.model.content import LEAF_BYTES, ZERO_LEAF, leaf_hash
from snapchain.model.events import Event, Notice
from snapchain.objects.memory import MemoryStore
from snapchain.objects.store import Data, ObjectStore, Refused, StoreWrapper
from snapchain.repository import collecting as gc, data_check, pack_reading, packs, verified
from snapchain.repository.catalogue import Point
from snapchain.repository.format import LEAF_ROW, RUN_ROW, pack_name, verified_name
from snapchain.repository.index import IndexedPack, write as write_index
from snapchain.repository.leaf_proof import doubtful, map_of
from snapchain.repository.packs import OpenPack
from snapchain.repository.pages import Page
from snapchain.repository.repository import Repository
from snapchain.repository.verification import verify
from snapchain.testing.faults import crash_points
from tests.repository.counting import CountingStore
from tests.repository.synthetic import LEAF, Drawn, Run, again, drawn, repository, ship, stacks

DISK = "web1/vda"


@pytest.fixture(autouse=True)
def _small_packs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two blobs a pack, and progress after each pack."""
    monkeypatch.setattr(packs, "PACK_BYTES", 2 * LEAF + 4096)
    monkeypatch.setattr(data_check, "_OFTEN", 0.0)
    monkeypatch.setattr(data_check, "_PARTS", 1 << 40)


def published(repo: Repository, stack: Sequence[Drawn], disk: str = DISK) -> Repository:
    """A stack as the points of a disk."""
    layers = ship(stack, repo).layers
    points = tuple(
        Point(
            point=number,
            time=datetime.now(UTC),
            layer=layer.id,
            size=layer.size,
            content_id=layer.header.content_id,
        )
        for number, layer in enumerate(layers, 1)
    )
    below = [None, *(layer.id for layer in layers)]
    parents = {layer.id: lower for layer, lower in zip(layers, below, strict=False)}
    repo.disk(disk).advance(None, time=datetime.now(UTC), next_point=len(points) + 1, points=points, parents=parents)
    return repo


def noise(*blobs: int) -> list[Run]:
    """Leaves that do not compress, one after the other."""
    return [Run(at * LEAF, LEAF, 1000 + seed) for at, seed in enumerate(blobs)]


def made(store: ObjectStore | None = None) -> Repository:
    """Two points, in eight packs or so; the second one has parts of leaves, which records alone cannot prove."""
    root = drawn(10 * LEAF, noise(*range(10)), b"")
    top = drawn(10 * LEAF, [Run(512, 4096, 7), Run(3 * LEAF, LEAF, None), Run(5 * LEAF, 2 * LEAF, 2000)], root.shown)
    return published(repository(store), [root, top])


def copied(repo: Repository) -> MemoryStore:
    store = MemoryStore()
    for info in repo.store.list(""):
        store.put(info.name, repo.store.get(info.name))
    return store


def names(repo: Repository) -> set[str]:
    return {info.name for info in repo.store.list("packs/")}


def records(repo: Repository) -> list[str]:
    return [info.name for info in repo.store.list("verified/")]


def since(repo: Repository) -> datetime | None:
    return verified.last_verified(repo.store, repo.keys).get(DISK)


def read_by(store: CountingStore) -> set[str]:
    """Packs that were read whole."""
    sizes = {info.name: info.size for info in store.inner.list("packs/")}
    return {each.name for each in store.of("get", "packs/") if each.size == sizes[each.name]}


def run(repo: Repository, **options: object) -> tuple[VerifyReport, set[str]]:
    """Verify by a repository opened afresh; the packs that it has read whole."""
    store = CountingStore(repo.store)
    return verify(again(repo, store), **options), read_by(store)  # type: ignore[arg-type]


@pytest.mark.parametrize("share", [0.05, 0.3, 0.5])
def test_shares_take_turns_until_everything_was_read(share: float) -> None:
    repo = made()
    everything, seen = names(repo), set[str]()
    for _ in range(round(1 / share + 0.49)):
        if seen != everything:
            assert since(repo) is None
        report, read = run(repo, share=share)
        assert report.ok
        if seen != everything:
            assert read - seen, "what was read already came before the rest"
        seen |= read
    assert seen == everything
    assert report.verified_since is not None
    assert since(repo) == report.verified_since


def test_each_stored_byte_is_read_once() -> None:
    repo = made()
    store = CountingStore(repo.store)
    assert verify(again(repo, store), share=1.0).read_bytes == sum(info.size for info in repo.store.list("packs/"))
    assert read_by(store) == names(repo)


def test_what_was_read_lately_is_left_out() -> None:
    repo = made()
    before = datetime.now(UTC) - timedelta(days=30)
    assert run(repo, share=1.0, since=before)[1] == names(repo)
    report, read = run(repo, share=1.0, since=before)
    assert (report.ok, report.read_bytes, report.fresh_bytes, read) == (True, 0, report.stored_bytes, set())
    assert run(repo, share=1.0)[1] == names(repo), "without an age everything is read"
    assert run(repo, share=1.0, since=datetime.now(UTC) + timedelta(hours=1))[1] == names(repo)
    published(repo, [drawn(LEAF, noise(77), b"")], "other")
    fresh = run(repo, share=1.0, since=before)[1]
    assert fresh
    assert fresh <= names(repo)
    assert len(fresh) <= 2, "only what is new"


def test_a_run_that_dies_anywhere_is_continued() -> None:
    """At each put and delete; what was kept is not read again, and what was not kept is."""
    whole = made()
    deaths = 0
    for moment, inner in crash_points(lambda: copied(whole), lambda store: verify(again(whole, store), share=1.0)):
        repo = again(whole, inner)
        kept = verified.read(inner, repo.keys).times
        had_finished = any(each.finished for each in verified.read(inner, repo.keys).readings.values())
        report, read = run(repo, share=1.0)
        assert report.ok, moment
        left = {name for name in names(repo) if had_finished or name.rpartition("/")[2] not in kept}
        assert read == left
        assert report.continued == (bool(kept) and not had_finished)
        assert report.verified_since is not None
        assert not run(repo, share=1.0)[0].continued, "it came to its end"
        deaths += 1
    assert deaths > 2 * len(names(whole))


class Cut(StoreWrapper):
    """A store that answers so many reads of packs, and nothing after that."""

    def __init__(self, inner: ObjectStore, reads: int) -> None:
        super().__init__(inner)
        self.left = reads

    def _check(self, name: str) -> None:
        if name.startswith("packs/"):
            self.left -= 1
        if self.left < 0:
            raise Unavailable("the network is gone", subject=name)

    def get(self, name: str, *, offset: int = 0, length: int | None = None) -> bytes:
        self._check(name)
        return super().get(name, offset=offset, length=length)

    def size(self, name: str) -> int | None:
        self._check("")
        return super().size(name)


def test_a_store_that_no_longer_answers_is_no_damage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pack_reading, "WORKERS", 1)
    repo = made()
    with pytest.raises(Unavailable, match="the network is gone"):
        verify(again(repo, Cut(repo.store, 4)), share=1.0)
    assert [info.name for info in repo.store.list("index/damaged-")] == []
    report, read = run(repo, share=1.0)
    assert (report.ok, report.continued) == (True, True)
    assert len(read) == len(names(repo)) - 4


class Bad(StoreWrapper):
    """A sector that cannot be read."""

    def __init__(self, inner: ObjectStore, name: str) -> None:
        super().__init__(inner)
        self.name = name

    def get(self, name: str, *, offset: int = 0, length: int | None = None) -> bytes:
        if name == self.name:
            raise Unavailable("input/output error", subject=name)
        return super().get(name, offset=offset, length=length)


def test_one_object_that_cannot_be_read_is_a_finding() -> None:
    repo = made()
    for name in sorted(names(repo))[:3]:
        report = verify(again(repo, Bad(copied(repo), name)), share=1.0)
        assert {each.kind for each in report.findings} == {"unavailable"}
        assert all(name in str(each.subject) for each in report.findings)
        assert report.verified_since is None


@pytest.mark.parametrize("workers", [1, 2, 7])
def test_threads_find_the_same_as_one(workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pack_reading, "WORKERS", workers)
    repo = made()
    draw = random.Random(5)
    for name in draw.sample(sorted(names(repo)), 4):
        body = bytearray(repo.store.get(name))
        body[draw.randrange(16, len(body))] ^= 1
        repo.store.put(name, bytes(body))
    found = [str(each) for each in verify(again(repo, copied(repo)), share=1.0).findings]
    monkeypatch.setattr(pack_reading, "WORKERS", 1)
    assert found == [str(each) for each in verify(again(repo, copied(repo)), share=1.0).findings]
    assert found


class ReadOnly(StoreWrapper):
    """Nothing can be written, as by a host that may only read."""

    def put(self, name: str, data: Data) -> None:
        _ = data
        raise Refused("no permission to write", subject=name)


def test_a_host_that_may_not_write_keeps_nothing_and_is_told() -> None:
    repo = made()
    said: list[Event] = []
    report = verify(again(repo, ReadOnly(repo.store)), share=1.0, on_event=said.append)
    assert report.ok
    words = [each.text for each in said if isinstance(each, Notice) and "cannot be kept" in each.text]
    assert len(words) == 1
    assert records(repo) == []
    seen = [frozenset(run(again(repo, ReadOnly(repo.store)), share=0.3)[1]) for _ in range(12)]
    assert len(set(seen)) > 1, "a random share, since no turns can be taken"


class NoDelete(StoreWrapper):
    def delete(self, name: str) -> None:
        raise Refused("no permission to delete", subject=name)


@pytest.mark.parametrize("deletes", [True, False])
def test_records_are_put_together(deletes: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_check, "_OFTEN", 60.0)
    repo = made()
    other = repo if deletes else again(repo, NoDelete(repo.store))
    for _ in range(30):
        assert verify(again(other), share=0.1).ok
    assert len(records(repo)) <= (9 if deletes else 30)
    total = sum(info.size for info in repo.store.list("verified/"))
    assert total < 30 * 600
    assert since(repo) is not None
    if deletes:
        repo.store.delete(min(names(repo)))
        for _ in range(10):
            verify(again(repo), share=0.1)
        assert len(verified.read(repo.store, repo.keys).times) <= len(names(repo)) + 2, "rows of what is gone go"


# ---- what somebody with the store can do


def forgeries(repo: Repository) -> Iterator[tuple[str, str, bytes]]:
    """(what, object name, bytes) of records that say that everything was verified, and must not be believed."""
    now = int(time.time())
    every = {name.rpartition("/")[2]: now for name in names(repo)}
    (name,) = verified.write(repo.store, repo.keys, every)
    body = repo.store.get(name)
    repo.store.delete(name)
    yield "another name", verified_name("0" * 32), body
    for at in (9, 20, 60, len(body) - 1):
        yield f"altered at {at}", name, body[:at] + bytes([body[at] ^ 1]) + body[at + 1 :]
    yield "cut", name, body[:-20]
    stranger = repository(MemoryStore())
    (theirs,) = verified.write(stranger.store, stranger.keys, every)
    yield "another repository", theirs, stranger.store.get(theirs)
    (later,) = verified.write(repo.store, repo.keys, dict.fromkeys(every, now + 86400))
    late = repo.store.get(later)
    repo.store.delete(later)
    yield "of the future", later, late


def test_forged_records_are_not_believed() -> None:
    repo = made()
    before = datetime.now(UTC) - timedelta(days=30)
    for what, name, body in forgeries(repo):
        other = again(repo, copied(repo))
        other.store.put(name, body)
        report, read = run(other, share=1.0, since=before)
        assert read == names(repo), what
        assert report.ok


def test_an_old_record_does_not_make_known_damage_good() -> None:
    """The store puts a true record back, after damage was found: of the damaged pack nothing is believed."""
    repo = made()
    verify(again(repo), share=1.0)
    old = {each: repo.store.get(each) for each in records(repo)}
    root = again(repo).layer(next(iter(repo.catalogue(DISK).parents)))
    bad = pack_name(root.pages(0, LEAF)[0].packs[0])
    body = bytearray(repo.store.get(bad))
    body[100] ^= 1
    repo.store.put(bad, bytes(body))
    assert not verify(again(repo), share=1.0).ok
    for each, data in old.items():
        repo.store.put(each, data)
    before = datetime.now(UTC) - timedelta(days=30)
    report = verify(again(repo), share=1.0, since=before)
    assert not report.ok
    assert report.verified_since is None
    assert since(repo) is None


def test_gc_leaves_the_records_and_a_new_pack_counts_as_unread() -> None:
    repo = made()
    verify(again(repo), share=1.0)
    kept = records(repo)
    published(repo, [drawn(LEAF, noise(88), b"")], "other")
    gc.run(again(repo))
    assert records(repo) == kept
    assert since(repo) is not None
    assert verified.last_verified(repo.store, repo.keys) == {DISK: since(repo)}


# ---- what the ids prove


@given(stacks(), st.randoms(use_true_random=False))
@settings(max_examples=60)
def test_what_is_not_doubtful_is_proven(stack: list[Drawn], draw: random.Random) -> None:
    """A leaf that need not be read has the hash that its record says; with another hash there it must be read."""
    shipped = ship(stack)
    keys = shipped.repository.keys
    for number, layer in enumerate(shipped.layers):
        shown = shipped.shows(shipped.layers[: number + 1])
        for page in layer.each_page(0, layer.size):
            trusted = np.ones(len(page.runs), np.bool_)
            left = map_of(layer.size, [doubtful(page, layer.size, trusted, keys.blob_id)])
            known = dict(zip(page.index.tolist(), map(bytes, page.leaves["hash"]), strict=True))
            for first, length, val in page.extents(layer.size).runs():
                if val == -2:
                    continue
                for leaf in range(first // LEAF_BYTES, -(-(first + length) // LEAF_BYTES)):
                    if left.val[np.searchsorted(left.at, leaf * LEAF_BYTES, side="right") - 1] == 0:
                        continue
                    actual = leaf_hash(shown[leaf * LEAF_BYTES : (leaf + 1) * LEAF_BYTES])
                    assert known.get(leaf, ZERO_LEAF) == actual
            if not len(page.leaves):
                continue
            wrong = page.leaves.copy()
            at = draw.randrange(len(wrong))
            wrong["hash"][at][0] ^= 1
            forged = Page(page.runs, wrong, page.packs)
            left = map_of(layer.size, [doubtful(forged, layer.size, trusted, keys.blob_id)])
            place = int(wrong["index"][at]) * LEAF_BYTES
            assert left.val[np.searchsorted(left.at, place, side="right") - 1] == 0


def test_of_zeroes_only_leaves_that_are_listed_as_something_else_are_doubtful() -> None:
    """The run may be as long as the longest disk: it is never read."""
    runs, leaves = np.zeros(2, RUN_ROW), np.zeros(2, LEAF_ROW)
    runs["start"], runs["length"] = [512, 1 << 40], [1 << 39, (1 << 55) + 100]
    leaves["index"] = [5, (1 << 50) // LEAF]
    size = (1 << 40) + (1 << 55) + 100
    first, stop = doubtful(Page(runs, leaves, []), size, np.zeros(2, np.bool_), lambda _: b"")
    inner, edge = 1 << 39, (1 << 39) + LEAF
    assert sorted(zip(first.tolist(), stop.tolist(), strict=True)) == [
        (0, LEAF),
        (5 * LEAF, 6 * LEAF),
        (inner, edge),
        (1 << 50, (1 << 50) + LEAF),
    ]


def test_a_blob_of_other_bytes_than_its_id_says_is_found() -> None:
    """Sealed by a writer whose memory had failed it: every tag fits."""
    repo = made()
    pack = OpenPack(repo.keys)
    blob = repo.keys.blob_id(leaf_hash(b"a" * LEAF))
    pack.add(blob, b"b" * LEAF, LEAF)
    closed = pack.close()
    repo.store.put(pack_name(closed.pack), closed.parts)
    write_index(repo.store, repo.keys, [IndexedPack(closed.pack, closed.size, closed.ids, closed.rows)], era=0)
    assert verify(again(repo)).ok
    report = verify(again(repo), share=1.0)
    assert [each.message for each in report.findings] == ["the bytes are not those of the blob's id"]
    assert repo.store.size(pack_name(closed.pack))


def test_a_record_that_names_another_place_is_found_though_all_packs_were_read() -> None:
    """The layer's turn comes with its packs read long ago: what they hold is told by their directories."""
    root = drawn(4 * LEAF, noise(1, 2, 3, 4), b"")

    repo = repository()
    real = Page.encode

    def shifted(page: Page) -> bytes:
        rows = page.runs.copy()
        assert rows.dtype == RUN_ROW
        rows["offset"][0] += 1
        return real(Page(rows, page.leaves, page.packs))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Page, "encode", shifted)
        published(repo, [root])
    before = datetime.now(UTC) - timedelta(days=30)
    verified.write(repo.store, repo.keys, {name.rpartition("/")[2]: int(time.time()) for name in names(repo)})
    for options in ({"share": 1.0, "since": before}, {"share": 1.0}):
        report, _ = run(again(repo, copied(repo)), **options)
        assert [each.points for each in report.findings] == [(1,)]
        assert "guest bytes 0 to 65536" in report.findings[0].message
    assert verify(again(repo)).ok, "records alone do not tell"


def test_a_damaged_record_of_what_was_verified_says_nothing() -> None:
    repo = made()
    (name,) = verified.write(repo.store, repo.keys, {"0" * 32: 5})
    repo.store.put(name, b"SNAPCHV\x01" + bytes(8))
    with pytest.raises(Corrupt, match="the record is cut short"):
        verified.parse(repo.keys, name, repo.store.get(name))
    assert verified.read(repo.store, repo.keys).times == {}
    assert run(repo, share=1.0)[0].ok
