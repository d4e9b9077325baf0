"""A repository without encryption in hostile hands: anybody can seal what its records say. Reading stays cheap."""

from __future__ import annotations

import json
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, strategies as st

from snapchain.errors import Corrupt, Unsupported
from snapchain.objects.local import LocalStore
from snapchain.objects.memory import MemoryStore
from snapchain.repository import catalogue as catalogues, envelope
from snapchain.repository.catalogue import Catalogue
from snapchain.repository.crypto import NONE
from snapchain.repository.envelope import seal
from snapchain.repository.format import LEAF_ROW, PAGE_ROW, RUN_ROW, damage_name, fresh_id, generation_name, index_name
from snapchain.repository.pages import Page
from snapchain.repository.repository import Repository
from snapchain.repository.stored import check_density, parse

MOST_MIB = 400
MIB = 1 << 20
NOW = datetime.now(UTC)


def _sealed(repository: Repository, kind: bytes, name: str, body: bytes) -> None:
    """Store a record as an attacker does, who keeps to no limit."""
    free = envelope.Expansion(1 << 40, 1 << 20, 1 << 40)
    with (
        mock.patch.object(envelope, "EXPANSIONS", dict.fromkeys(envelope.EXPANSIONS, free)),
        mock.patch.object(envelope, "largest", return_value=1 << 40),
    ):
        data = seal(repository.keys, kind, name, body)
    assert len(data) < MIB
    repository.store.put(name, data)


def _catalogue(repository: Repository, disk: str, **change: object) -> bytes:
    fields = {
        "format": 1, "disk": disk, "generation": 1, "previous": "", "nonce": "0" * 32, "time": "2026-01-01T00:00:00Z",
        "next_point": 1, "points": [], "parents": {},
    }  # fmt: skip
    return json.dumps(fields | change).encode()


def _filled(text: bytes, field: bytes, item: bytes, size: int) -> bytes:
    return text.replace(b'"%b": []' % field, b'"%b": [%b1]' % (field, item * (size // len(item))))


def _layer_of_nothing(repository: Repository) -> None:
    layer = "a" * 32
    _sealed(repository, b"L", f"layers/{layer}", bytes(PAGE_ROW.itemsize * 1_500_000))
    name = generation_name(repository.keys.disk_key("x"), 1)
    _sealed(repository, b"C", name, _catalogue(repository, "x", parents={layer: None}))


BOMBS: dict[str, Callable[[Repository], None]] = {
    "numbers for points": lambda repository: _sealed(
        repository,
        b"C",
        generation_name(repository.keys.disk_key("x"), 1),
        _filled(_catalogue(repository, "x"), b"points", b"1,", 16 * MIB - 1000),
    ),
    "objects for points": lambda repository: _sealed(
        repository,
        b"C",
        generation_name(repository.keys.disk_key("x"), 1),
        _filled(_catalogue(repository, "x"), b"points", b"{},", 16 * MIB - 1000),
    ),
    "a catalogue of 70 MiB": lambda repository: _sealed(
        repository, b"C", generation_name(repository.keys.disk_key("x"), 1), b" " * (70 * MIB)
    ),
    "an index of nothing": lambda repository: _sealed(
        repository, b"I", index_name(0, fresh_id()), struct.pack("<II", 1_500_000, 1_500_000) + bytes(72 * 1_500_000)
    ),
    "a damage record": lambda repository: _sealed(repository, b"D", damage_name(fresh_id()), b"[" * (70 * MIB)),
    "a lease": lambda repository: _sealed(repository, b"E", f"leases/r-{fresh_id()}", b"[" * (70 * MIB)),
    "a layer of nothing": _layer_of_nothing,
}
_CHILD = """
import re, resource, sys
from snapchain.destinations import open_destination
from snapchain.errors import SnapchainError
from snapchain.ops.log import log
from snapchain.ops.verify import verify
for place in sys.argv[1:]:
    opened = open_destination(place, passphrase=lambda: None)
    for act in (log, verify, lambda repository: repository.index()):
        try:
            act(opened)
        except SnapchainError:
            pass
# Not ru_maxrss: that of the process that started this one counts in it.
peak = int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
print(peak >> 10, resource.getrusage(resource.RUSAGE_SELF).ru_utime)
"""


def test_forged_records_cost_little_memory_and_time(tmp_path: Path) -> None:
    """One process reads them all, so that each of them is bounded by what the largest takes."""
    places = []
    Repository.create(LocalStore(tmp_path / "made", make=True), passphrase=lambda: None, encryption=NONE).store.close()
    for number, forge in enumerate(BOMBS.values()):
        place = tmp_path / str(number)
        shutil.copytree(tmp_path / "made", place)
        repository = Repository.open(LocalStore(place), passphrase=lambda: None)
        forge(repository)
        repository.store.close()
        places.append(str(place))
    done = subprocess.run([sys.executable, "-c", _CHILD, *places], check=True, capture_output=True, text=True)
    mebibytes, seconds = done.stdout.split()
    assert int(mebibytes) < MOST_MIB
    assert float(seconds) < 10 * len(BOMBS), "of the processor"


@pytest.mark.parametrize("text", [b"[" * 50_000, b"{}," * 50_000, b'"a":1,' * 30_000])
def test_json_of_too_many_values_is_refused_before_it_is_parsed(text: bytes) -> None:
    with pytest.raises(Corrupt, match=r"values in .* bytes are not plausible"):
        check_density(text, what="the catalogue", subject="x")


def test_a_list_stops_at_its_first_error_and_an_object_at_its_fields() -> None:
    store = MemoryStore()
    repository = Repository.create(store, passphrase=lambda: None, encryption=NONE)
    few = json.loads(_catalogue(repository, "x"))
    for change in (
        {"points": [1] * 3000},
        {"parents": {str(number): 1 for number in range(3000)}},
        {f"field{number}": 1 for number in range(3000)},
    ):
        with pytest.raises(Corrupt, match="the catalogue is damaged") as caught:
            parse(Catalogue, json.dumps(few | change).encode(), what="the catalogue", subject="x")
        assert caught.value.__cause__ is not None
        assert caught.value.__cause__.error_count() == 1  # type: ignore[attr-defined]


def test_a_disk_of_too_many_layers_is_refused_by_writer_and_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalogues, "MOST_LAYERS", 3)
    repository = Repository.create(MemoryStore(), passphrase=lambda: None, encryption=NONE)
    parents = {f"{number:032x}": None for number in range(4)}
    with pytest.raises(Unsupported, match=r"^x: the disk would have more than 3 layers"):
        repository.disk("x").advance(None, time=NOW, parents=parents)
    name = generation_name(repository.keys.disk_key("x"), 1)
    repository.store.put(name, seal(repository.keys, b"C", name, _catalogue(repository, "x", parents=parents)))
    with pytest.raises(Corrupt, match="it has 4 layers; at most 3 are plausible"):
        repository.catalogue("x")


@pytest.mark.parametrize("name", ["", "x\x1b[2J", "../../etc", "a:b", "/x", "x" * 201, "\ud800"])
def test_a_forged_name_of_a_disk_is_damage(name: str) -> None:
    """It is printed, and part of addresses in hints."""
    repository = Repository.create(MemoryStore(), passphrase=lambda: None, encryption=NONE)
    key = repository.keys.disk_key("x")
    stored = generation_name(key, 1)
    body = _catalogue(repository, name)
    repository.store.put(stored, seal(repository.keys, b"C", stored, body))
    if name == "../../etc":  # a name like any other: no path is made of it
        assert repository.catalogues()[0].disk == name
        return
    with pytest.raises(Corrupt, match="the catalogue is damaged"):
        repository.catalogues()


def test_a_page_names_no_more_packs_than_it_has_runs() -> None:
    runs = np.zeros(1, RUN_ROW)
    runs["length"] = 512
    body = Page(runs, np.empty(0, LEAF_ROW), ["0" * 32, "1" * 32]).encode()
    with pytest.raises(Corrupt, match=r"^x: a page of the layer record contradicts itself: it names more packs"):
        Page.decode(body, 0, 512, subject="x")


@given(st.dictionaries(st.integers(0, 12), st.none() | st.integers(0, 14), max_size=12))
def test_lengths_of_chains_are_those_of_the_chains(parents: dict[int, int | None]) -> None:
    fields = _catalogue(mock.Mock(), "x", parents={str(layer): None for layer in parents})
    found = Catalogue.model_validate_json(fields)
    links = {str(layer): None if below is None else str(below) for layer, below in parents.items()}
    found = found.model_copy(update={"parents": links})
    lengths = found.lengths()
    for layer in links:
        try:
            length: int | None = len(found.chain(layer))
        except Corrupt:
            length = None
        assert lengths.get(layer) == length
