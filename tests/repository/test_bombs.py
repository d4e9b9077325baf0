"""A repository without encryption in hostile hands: anybody can seal what its records say. Reading stays cheap."""

from __future__ import annotations

import json
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from blake3 import blake3
from hypothesis import given, strategies as st

from snapchain.destination import records
from snapchain.destination.records import Finding, Findings
from snapchain.errors import Corrupt, Unsupported
from snapchain.model.content import content_id, empty_sum, encode_sum
from snapchain.objects.local import LocalStore
from snapchain.objects.memory import MemoryStore
from snapchain.repository import (
    catalogue as catalogues,
    collecting as gc,
    envelope,
    layers,
    mark as collect,
)
from snapchain.repository.catalogue import Catalogue
from snapchain.repository.chain import ChainView
from snapchain.repository.crypto import NONE
from snapchain.repository.envelope import check_density, parse, seal
from snapchain.repository.format import (
    LEAF_ROW,
    PAGE_ROW,
    RUN_ROW,
    damage_name,
    fresh_id,
    generation_name,
    index_name,
    pack_name,
)
from snapchain.repository.layers import LayerHeader, StoredLayer
from snapchain.repository.packs import OpenPack
from snapchain.repository.pages import Page
from snapchain.repository.repository import Repository
from snapchain.repository.verification import verify

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
for place in sys.argv[1:]:
    opened = open_destination(place)
    for act in (log, lambda destination: destination.verify(), lambda destination: destination.repository.index()):
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
    lengths, breaks = found.lengths(), found.breaks()
    for layer in links:
        try:
            length: int | None = len(found.chain(layer))
        except Corrupt as error:
            length = None
            with pytest.raises(Corrupt) as caught:
                found.check_chain(layer, breaks)
            at = str(error).rpartition(" ")[2]
            # A circle is broken anywhere.
            assert at in links or caught.value.message.endswith(f" is broken at {at}")
        else:
            found.check_chain(layer, breaks)
            assert all((layer in found.above([each])) == (each in found.chain(layer)[:-1]) for each in links)
        assert lengths.get(layer) == length


def _chain_of(repository: Repository, disk: str, count: int, points: int, end: str | None) -> Catalogue:
    """A disk of which no layer is there. end: what the lowest of its layers lies on."""
    ids = [f"{number:032x}" for number in range(count)]
    shown = {"time": "2026-01-01T00:00:00Z", "layer": ids[0], "size": 0, "content_id": "0" * 64}
    body = _catalogue(
        repository,
        disk,
        parents=dict(zip(ids, [*ids[1:], end], strict=True)),
        points=[shown | {"point": 1 + number} for number in range(points)],
        next_point=points + 1,
    )
    name = generation_name(repository.keys.disk_key(disk), 1)
    repository.store.put(name, seal(repository.keys, b"C", name, body))
    return repository.catalogue(disk)


def test_many_points_on_a_broken_chain_do_not_follow_it_each(monkeypatch: pytest.MonkeyPatch) -> None:
    repository = Repository.create(MemoryStore(), passphrase=lambda: None, encryption=NONE)
    _chain_of(repository, "x", 30, 20, "f" * 32)
    monkeypatch.setattr(Catalogue, "chain", mock.Mock(side_effect=AssertionError("a chain was followed")))
    report = verify(repository, disk="x")
    broken = [finding for finding in report.findings if finding.message.endswith(f"is broken at {'f' * 32}")]
    assert [finding.points for finding in broken] == [(number,) for number in range(1, 21)]


def test_further_damage_is_counted_and_names_its_points(monkeypatch: pytest.MonkeyPatch) -> None:
    """By verify and gc, which keeps what may be needed all the same."""
    monkeypatch.setattr(records, "MOST_FINDINGS", 3)
    monkeypatch.setattr(collect, "MOST_TOLD", 3)
    repository = Repository.create(MemoryStore(), passphrase=lambda: None, encryption=NONE)
    _chain_of(repository, "x", 10, 2, None)
    for findings in (verify(repository).findings, gc.plan(repository).findings, gc.run(repository).findings):
        assert [finding.message for finding in findings[3:]] == ["there are 7 further errors"]
        assert all("is missing from the store" in finding.message for finding in findings[:3])
        assert {(finding.kind, finding.disk, finding.points) for finding in findings} == {("corrupt", "x", (1, 2))}


def test_each_finding_is_compared_with_few_others() -> None:
    compared = 0

    def counted(one: Finding, other: object) -> bool:
        nonlocal compared
        compared += 1
        return str(one) == str(other)

    found = Findings()
    with mock.patch.object(Finding, "__eq__", counted):
        for number in [*range(300), *range(300)]:
            found.add(Finding.of(Corrupt("gone", subject=number), None, ()))
    assert len(found.all()) == 300
    assert compared <= 300


def test_gc_keeps_few_errors_of_what_is_lost_and_no_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    repository = Repository.create(MemoryStore(), passphrase=lambda: None, encryption=NONE)
    _chain_of(repository, "x", 10, 1, None)
    monkeypatch.setattr(collect, "MOST_TOLD", 7)
    lost = [error for errors in collect.mark(repository).lost.values() for error in errors]
    assert len(lost) == 7
    assert [held for error in lost for held in (error.__traceback__, error.__cause__, error.__context__) if held] == []


def _zeroes(repository: Repository, size: int) -> list[StoredLayer]:
    """A chain of two layers, each one run of zeroes, and one of a few bytes."""
    runs = np.zeros(1, RUN_ROW)
    runs["length"] = size
    body = Page(runs, np.empty(0, LEAF_ROW), []).encode()
    pack = OpenPack(repository.keys)
    where = pack.add(blake3(body).digest(), body, len(body))
    closed = pack.close()
    repository.store.put(pack_name(closed.pack), b"".join(closed.parts))
    table = np.zeros(1, PAGE_ROW)
    table["stop"], table["offset"], table["stored"], table["raw"] = size, where.offset, where.stored, where.raw
    table["pack"] = np.frombuffer(bytes.fromhex(where.pack), np.uint8)
    table["id"] = np.frombuffer(blake3(body).digest(), np.uint8)
    parents: dict[str, str | None] = {}
    points = []
    for number, (end, rows) in enumerate([(size, table), (size, table), (65536, table[:0])], 1):
        layer = f"{number:032x}"
        header = LayerHeader(
            id=layer, size=end, time=NOW, name="x", image_format="raw", cluster_size=65536, data_bytes=0,
            zero_bytes=end, content_sum=encode_sum(empty_sum()), content_id=content_id(end, empty_sum()),
        )  # fmt: skip
        layers.write(repository.store, repository.keys, header, rows)
        parents[layer] = f"{number - 1:032x}" if number > 1 else None
        points.append(
            {"point": number, "time": "2026-01-01T00:00:00Z", "layer": layer, "size": end}
            | {"content_id": header.content_id}
        )
    name = generation_name(repository.keys.disk_key("x"), 1)
    body = _catalogue(repository, "x", parents=parents, points=points, next_point=4)
    repository.store.put(name, seal(repository.keys, b"C", name, body))
    return [repository.layer(layer) for layer in parents]


def test_a_disk_of_nothing_costs_nothing_however_large(monkeypatch: pytest.MonkeyPatch) -> None:
    repository = Repository.create(MemoryStore(), passphrase=lambda: None, encryption=NONE)
    _zeroes(repository, layers.LARGEST_DISK)
    count = mock.Mock(wraps=layers._leaves_said)
    monkeypatch.setattr(layers, "_leaves_said", count)
    assert verify(repository, share=1.0).ok
    assert count.call_count < 20
    assert sum(call.args[3] for call in count.call_args_list) < 1 << 20, "leaves"


@given(st.integers(1, 6), st.data())
def test_a_giant_range_is_cut_where_its_leaves_are(most: int, data: st.DataObject) -> None:
    """All of it, in order, and no layer records more leaves than may be in one range."""
    leaf = 65536
    chain = []
    for numbers in data.draw(st.lists(st.lists(st.integers(0, 40), unique=True), max_size=3)):
        rows = np.zeros(len(numbers), LEAF_ROW)
        rows["index"] = sorted(numbers)
        chain.append(
            mock.Mock(size=41 * leaf, each_page=mock.Mock(return_value=[Page(np.empty(0, RUN_ROW), rows, [])]))
        )
    with mock.patch.multiple(layers, LEAVES_AT_ONCE=most, _LONGEST_PLAUSIBLE=0):
        ranges = list(layers.bounded_ranges(chain, 3 * leaf, 41 * leaf))
    assert [first for first, _ in ranges] == [3 * leaf, *(stop for _, stop in ranges[:-1])]
    assert ranges[-1][1] == 41 * leaf
    for first, stop in ranges:
        for layer in chain:
            index = layer.each_page(0, 0)[0].index
            assert ((index >= first // leaf) & (index < stop // leaf)).sum() <= most


@given(st.data())
def test_leaves_of_a_long_range_are_those_of_a_short_one(data: st.DataObject) -> None:
    """Leaf by leaf, or only those that some layer records: the same."""
    leaf = 65536
    chain = []
    for _ in range(data.draw(st.integers(1, 3))):
        size = data.draw(st.integers(1, 12 * leaf))
        cuts = sorted(data.draw(st.sets(st.integers(0, size), max_size=8)))
        pairs = list(zip(cuts[::2], cuts[1::2], strict=False))
        runs = np.zeros(len(pairs), RUN_ROW)
        runs["start"], runs["length"] = [a for a, _ in pairs], [b - a for a, b in pairs]
        touched = sorted({number for a, b in pairs for number in range(a // leaf, -(-b // leaf))})
        kept = [number for number in touched if data.draw(st.booleans())]
        rows = np.zeros(len(kept), LEAF_ROW)
        rows["index"] = kept
        rows["hash"] = np.frombuffer(data.draw(st.binary(min_size=32, max_size=32)), np.uint8)
        page = Page(runs, rows, [])
        chain.append(mock.Mock(size=size, each_page=mock.Mock(return_value=[page])))
    first = data.draw(st.integers(0, 11)) * leaf
    stop = data.draw(st.integers(first + 1, 12 * leaf))
    expected = layers.leaves_shown(chain, first, stop)
    with mock.patch.object(layers, "_DENSE_LEAVES", 0):
        found = layers.leaves_shown(chain, first, stop)
    assert found[0].tolist() == expected[0].tolist()
    assert found[1].tolist() == expected[1].tolist()


def _mosaic(runs: int, length: int, raw: int) -> mock.Mock:
    """A layer of which each run is of another blob."""
    rows = np.zeros(runs, RUN_ROW)
    rows["start"], rows["length"] = np.arange(runs) * length, length
    rows["offset"], rows["stored"], rows["raw"] = np.arange(runs) + 16, 1, raw
    page = Page(rows, np.empty(0, LEAF_ROW), ["0" * 32])
    size = runs * length
    return mock.Mock(
        id="a" * 32, size=size, each_page=mock.Mock(return_value=[page]), extents=lambda: page.extents(size)
    )


def test_a_blob_of_mebibytes_for_each_byte_is_not_unpacked() -> None:
    blobs = mock.Mock()
    view = ChainView([_mosaic(4096, 16, 4 * MIB)], blobs)
    with pytest.raises(Corrupt, match=r"^layers/a+: unpacking 17179869184 bytes to read 65536 is not plausible"):
        view.read_into(0, memoryview(bytearray(65536)))
    blobs.read_all.assert_not_called()


@pytest.mark.parametrize(("length", "raw"), [(512, 256 << 10), (4096, 2 * MIB)])
def test_a_disk_of_which_each_sector_is_of_another_blob_can_be_read(length: int, raw: int) -> None:
    """However large; and one leaf of it even where blobs are as large as they can be."""
    blobs = mock.Mock()
    blobs.read_all.return_value = ()
    view = ChainView([_mosaic(65536 // length * 100, length, raw)], blobs)
    for leaf in range(100):
        view.read_into(leaf * 65536, memoryview(bytearray(65536)))
    ChainView([_mosaic(128, 512, 4 * MIB)], blobs).read_into(0, memoryview(bytearray(65536)))
    assert blobs.read_all.call_count == 101


def test_a_chain_of_which_layers_are_missing_is_not_looked_for_to_its_end() -> None:
    repository = Repository.create(MemoryStore(), passphrase=lambda: None, encryption=NONE)
    catalogue = _chain_of(repository, "x", 1000, 1, None)
    with (
        mock.patch.object(ThreadPoolExecutor, "submit", autospec=True, side_effect=ThreadPoolExecutor.submit) as submit,
        pytest.raises(Corrupt, match="the layer record is missing"),
    ):
        repository.layers(catalogue.chain(catalogue.points[0].layer))
    assert submit.call_count < 100
