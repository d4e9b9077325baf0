"""What only a newer snapchain writes is Unsupported, and says so; what nobody writes is Corrupt."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from datetime import UTC, datetime

import pytest

from snapchain.errors import Corrupt, Unsupported
from snapchain.model.consistency import Consistency
from snapchain.objects.memory import MemoryStore
from snapchain.repository import keys as slots
from snapchain.repository.catalogue import Hold, Point
from snapchain.repository.envelope import made_by, seal, unseal
from snapchain.repository.format import generation_name, layer_name
from snapchain.repository.repository import Repository, parse_config
from tests.repository.synthetic import LEAF, Run, again, drawn, repository, ship

NOW = datetime(2026, 1, 31, 22, tzinfo=UTC)
Change = Callable[[dict[str, object]], None]


def _put(**fields: object) -> Change:
    return lambda body: body.update(fields)


NEWER: list[Change] = [_put(format=2), _put(format=2, size="?"), _put(sparkle=True), _put(format=99, sparkle=1)]
DAMAGED: list[Change] = [_put(format="x"), _put(format=0), _put(format=True, id=7, disk=7, kdf=7), _put(format=None)]


@pytest.mark.parametrize(("change", "error"), [*((c, Unsupported) for c in NEWER), *((c, Corrupt) for c in DAMAGED)])
@pytest.mark.parametrize("kind", ["config", "slot", "layer", "catalogue"])
def test_newer_and_damaged(kind: str, change: Change, error: type[Exception]) -> None:
    with pytest.raises(error, match="written by a newer snapchain" if error is Unsupported else None):
        DOORS[kind](change)


def _config(change: Change) -> None:
    body = json.loads(repository().config.model_dump_json())
    change(body)
    parse_config(json.dumps(body).encode(), subject="memory:")


def _slot(change: Change) -> None:
    body = json.loads(slots.KeySlot(memory_kib=64, iterations=1, lanes=1, salt="", wrapped="").model_dump_json())
    change(body)
    slots.parse(json.dumps(body).encode(), subject="keys/x")


def _layer(change: Change) -> None:
    shipped = ship([drawn(LEAF, [Run(0, 512, 7)], b"")])
    repo, name = shipped.repository, layer_name(shipped.layers[0].id)
    body = unseal(repo.keys, b"L", name, repo.store.get(name))
    (length,) = struct.unpack_from("<I", body)
    header = json.loads(body[4 : 4 + length])
    change(header)
    text = json.dumps(header).encode()
    repo.store.put(name, seal(repo.keys, b"L", name, struct.pack("<I", len(text)) + text + body[4 + length :]))
    again(repo).layer(shipped.layers[0].id)


def _catalogue(change: Change) -> None:
    repo = repository()
    repo.disk("d").advance(None, time=NOW)
    name = generation_name(repo.keys.disk_key("d"), 1)
    body = json.loads(unseal(repo.keys, b"C", name, repo.store.get(name)))
    change(body)
    repo.store.put(name, seal(repo.keys, b"C", name, json.dumps(body).encode()))
    repo.catalogue("d")


DOORS: dict[str, Callable[[Change], None]] = {
    "config": _config,
    "slot": _slot,
    "layer": _layer,
    "catalogue": _catalogue,
}


@pytest.mark.parametrize(
    ("kind", "field", "word"),
    [("config", "encryption", "rot13"), ("slot", "kdf", "scrypt"), ("layer", "image_format", "vhdx")],
)
def test_an_unknown_word_is_of_a_newer_snapchain(kind: str, field: str, word: str) -> None:
    with pytest.raises(Unsupported, match="newer"):
        DOORS[kind](_put(**{field: word}))


def test_a_slot_that_is_too_new_does_not_matter_when_another_one_opens() -> None:
    store = MemoryStore()
    Repository.create(store, passphrase=lambda: "x")
    store.put("keys/" + "0" * 32, b'{"format": 2}')
    Repository.open(store, passphrase=lambda: "x")
    with pytest.raises(Unsupported, match="newer"):
        Repository.open(store, passphrase=lambda: "y")


def test_what_a_point_may_say_comes_back() -> None:
    hold = Hold(tag="audit", since=NOW, reason="case 7")
    point = Point(
        point=1,
        time=NOW,
        layer="a" * 32,
        size=0,
        content_id="0" * 64,
        holds=(hold,),
        instant="1" * 32,
        consistency=Consistency.FILESYSTEM,
    )
    repo = repository()
    repo.disk("d").advance(None, time=NOW, points=(point,), next_point=2, owner="host a", epoch=3)
    found = repo.catalogue("d")
    assert found.points == (point.model_copy(update={"made_by": made_by()}),)
    assert (found.owner, found.epoch) == ("host a", 3)
    assert made_by().startswith("snapchain ")


def test_fields_that_may_be_missing() -> None:
    def strip(body: dict[str, object]) -> None:
        least = {"point": 1, "time": NOW.isoformat(), "layer": "a" * 32, "size": 0, "content_id": "0" * 64}
        body.pop("epoch")
        body.pop("owner")
        body.update(points=[least], next_point=2)

    DOORS["catalogue"](strip)
