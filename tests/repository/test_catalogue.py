"""The catalogue of a disk: one writer wins each generation; what is stored is believed as far as it is sound."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

import blake3
import pytest

from snapchain.errors import Conflict, Corrupt, NotFound, Unavailable, Unsupported
from snapchain.objects.local import LocalStore
from snapchain.objects.memory import MemoryStore
from snapchain.objects.store import ObjectStore
from snapchain.repository import catalogue as catalogues
from snapchain.repository.catalogue import Catalogue, Disk, Point
from snapchain.repository.crypto import Keyring
from snapchain.repository.envelope import seal
from snapchain.repository.format import generation_name
from snapchain.testing.faults import Fault, FaultStore, On

KEYS = Keyring("aes-256-gcm", "00" * 16, bytes(32))
NOW = datetime(2026, 1, 31, 22, tzinfo=UTC)


def disk(store: ObjectStore, name: str = "web1/vda", *, conditional: bool = True) -> Disk:
    return Disk(store, KEYS, name, conditional=conditional)


def point(number: int, layer: str = "a" * 32) -> Point:
    return Point(point=number, time=NOW, layer=layer, size=0, content_id="0" * 64)


def publish(target: Disk, layer: str) -> int:
    """As `ship` does: read, add a point, and read again when somebody was faster."""
    while True:
        current = target.read()
        before = current[0] if current else None
        number = before.next_point if before else 1
        try:
            target.advance(
                current,
                time=NOW,
                next_point=number + 1,
                points=(*(before.points if before else ()), point(number, layer)),
                parents={**(before.parents if before else {}), layer: None},
            )
        except Conflict:
            continue
        return number


@pytest.fixture(params=["memory", "local", "unconditional"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Callable[[], ObjectStore], bool]:
    """Opens the same store again and again; whether its `create` may be relied on."""
    if request.param == "local":
        LocalStore(tmp_path / "s", make=True)
        return lambda: LocalStore(tmp_path / "s"), True
    store = MemoryStore()
    return lambda: store, request.param == "memory"


def test_generations_follow_one_another(place: tuple[Callable[[], ObjectStore], bool]) -> None:
    opened, conditional = place
    store = opened()
    mine = disk(store, conditional=conditional)
    assert mine.read() is None
    with pytest.raises(NotFound, match="no disk 'web1/vda'"):
        mine.existing()
    hashes = [""]
    for number in (1, 2, 3):
        current = mine.read()
        made, digest = mine.advance(current, time=NOW, next_point=number + 1, points=())
        assert (made.generation, made.previous) == (number, hashes[-1])
        name = generation_name(KEYS.disk_key("web1/vda"), number)
        assert digest == blake3.blake3(store.get(name)).hexdigest()
        assert mine.existing() == (made, digest)
        hashes.append(digest)


def test_of_many_writers_none_loses_a_point(place: tuple[Callable[[], ObjectStore], bool]) -> None:
    opened, conditional = place
    start = threading.Barrier(4)

    def writer(number: int) -> list[int]:
        mine = disk(opened(), conditional=conditional)
        start.wait()
        return [publish(mine, f"{number:016x}{turn:016x}") for turn in range(6 if conditional else 2)]

    with ThreadPoolExecutor(4) as pool:
        given = [number for numbers in pool.map(writer, range(4)) for number in numbers]
    catalogue = disk(opened(), conditional=conditional).existing()[0]
    assert sorted(given) == [each.point for each in catalogue.points] == list(range(1, len(given) + 1))
    assert len({each.layer for each in catalogue.points}) == len(given)
    assert catalogue.generation == len(given)


def test_no_fork_a_writer_that_did_not_look_again_gets_conflict() -> None:
    store = MemoryStore()
    one, other = disk(store), disk(store)
    one.advance(None, time=NOW)
    current = one.existing()
    one.advance(current, time=NOW, next_point=2, points=(point(1),))
    for stale in (current, None):
        with pytest.raises(Conflict, match="at the same time"):
            other.advance(stale, time=NOW)
    assert [each.point for each in one.existing()[0].points] == [1]


def test_a_lost_reply_to_our_own_write_is_no_conflict() -> None:
    for fault in (Fault.LOST_REPLY, Fault.UNAVAILABLE):
        inner = MemoryStore()
        mine = disk(FaultStore(inner, [On(1, fault, operation="create")]))
        if fault is Fault.UNAVAILABLE:
            with pytest.raises(Unavailable, match="injected"):
                mine.advance(None, time=NOW)
            assert disk(inner).read() is None
        else:
            made, digest = mine.advance(None, time=NOW)
            assert disk(inner).existing() == (made, digest)


def test_disks_do_not_know_each_other() -> None:
    store = MemoryStore()
    disk(store, "a").advance(None, time=NOW)
    assert disk(store, "b").read() is None
    assert disk(store, "A").read() is None


def test_what_is_no_generation_does_not_count() -> None:
    store = MemoryStore()
    mine = disk(store)
    mine.advance(None, time=NOW)
    key = KEYS.disk_key("web1/vda")
    for name in ("9", "00000000000000000002.claim.0123456789abcdef", "000000000000000000002", "x", "2/1"):
        store.put(f"disks/{key}/{name}", b"")
    assert mine.existing()[0].generation == 1
    found = catalogues.read_any(store, KEYS, key)
    assert found is not None
    assert found.generation == 1


# ---- what a store, or who has the key, may have put there


def forged(store: MemoryStore, name: str = "web1/vda", generation: int = 1, **change: object) -> str:
    """A sealed catalogue with anything in it."""
    body = {
        "disk": name,
        "generation": generation,
        "previous": "",
        "nonce": "",
        "time": NOW.isoformat(),
        "epoch": 1,
        "next_point": 2,
        "points": [json.loads(point(1).model_dump_json())],
        "parents": {"a" * 32: None},
    } | change
    where = generation_name(KEYS.disk_key("web1/vda"), generation)
    store.put(where, seal(KEYS, b"C", where, json.dumps(body).encode()))
    return where


@pytest.mark.parametrize(
    "change",
    [
        {"disk": "other"},
        {"generation": 2},
        {"format": 2},
        {"points": [{}]},
        {"points": [json.loads(point(1).model_dump_json())] * 2},
        {"points": [json.loads(point(number).model_dump_json()) for number in (2, 1)], "next_point": 3},
        {"next_point": 1},
        {"next_point": 0},
        {"epoch": -1},
        {"points": [json.loads(point(1).model_dump_json()) | {"instant": "x"}]},
        {"points": [json.loads(point(1).model_dump_json()) | {"consistency": "perfect"}]},
        {"time": "2026-01-31T22:00:00"},
        {"points": [json.loads(point(1).model_dump_json()) | {"time": "2026-01-31T22:00:00"}]},
        {"points": [json.loads(point(1).model_dump_json()) | {"size": -1}]},
        {"parents": []},
        {"more": 1},
    ],
)
def test_catalogues_that_contradict_themselves(change: dict[str, object]) -> None:
    store = MemoryStore()
    body = change | ({"generation": 1} if change.get("generation") != 2 else {})
    where = forged(store, **{key: value for key, value in body.items() if key != "generation"})  # type: ignore[arg-type]
    if "generation" in change:
        text = json.dumps(json.loads(_body(store, where)) | change).encode()
        store.put(where, seal(KEYS, b"C", where, text))
    with pytest.raises((Corrupt, Unsupported), match=r"^disks/\w+/\d+: the catalogue"):
        disk(store).existing()


def _body(store: MemoryStore, where: str) -> bytes:
    from snapchain.repository.envelope import unseal

    return unseal(KEYS, b"C", where, store.get(where))


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b"\xff", b"1" * 5000])
def test_any_body_is_corrupt(body: bytes) -> None:
    store = MemoryStore()
    where = generation_name(KEYS.disk_key("web1/vda"), 1)
    store.put(where, seal(KEYS, b"C", where, body))
    with pytest.raises(Corrupt, match="the catalogue is damaged: JSON"):
        disk(store).existing()


@pytest.mark.parametrize(
    "parents",
    [
        {},
        {"a" * 32: "b" * 32},
        {"a" * 32: "a" * 32},
        {"a" * 32: "b" * 32, "b" * 32: "a" * 32},
        {"a" * 32: "b" * 32, "b" * 32: "c" * 32, "c" * 32: "b" * 32},
    ],
)
def test_chains_that_are_broken_or_go_in_circles(parents: dict[str, str]) -> None:
    store = MemoryStore()
    forged(store, parents=parents)
    with pytest.raises(Corrupt, match="broken at"):
        disk(store).existing()[0].chain("a" * 32)


def test_a_chain_is_given_root_first() -> None:
    parents = {"c": "b", "a": None, "b": "a", "x": "a"}
    catalogue = Catalogue(
        disk="d", generation=1, previous="", nonce="", time=NOW, epoch=1, next_point=1, points=(), parents=parents
    )
    assert catalogue.chain("c") == ("a", "b", "c")
    assert catalogue.chain("x") == ("a", "x")
    assert catalogue.chain("a") == ("a",)


def test_another_disks_catalogue_cannot_be_put_in_the_place_of_this_one() -> None:
    store = MemoryStore()
    disk(store, "other").advance(None, time=NOW)
    disk(store).advance(None, time=NOW)
    theirs = store.get(generation_name(KEYS.disk_key("other"), 1))
    store.put(generation_name(KEYS.disk_key("web1/vda"), 1), theirs)
    with pytest.raises(Corrupt, match="altered or belong elsewhere"):
        disk(store).existing()


def test_an_old_generation_cannot_be_put_in_the_place_of_the_newest() -> None:
    store = MemoryStore()
    mine = disk(store)
    for _ in range(2):
        mine.advance(mine.read(), time=NOW)
    key = KEYS.disk_key("web1/vda")
    store.put(generation_name(key, 2), store.get(generation_name(key, 1)))
    with pytest.raises(Corrupt, match="altered or belong elsewhere"):
        mine.existing()
