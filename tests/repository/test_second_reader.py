"""docs/format.md is enough to read a repository: what the package writes, the second reader reads, byte for byte."""

from __future__ import annotations

import json
import random
import shutil
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path

import pytest

from snapchain.model.content import content_id
from snapchain.model.extents import DATA, ZERO, Extents
from snapchain.model.retention import Policy
from snapchain.objects.local import LocalStore
from snapchain.ops import keys as ops
from snapchain.repository import collecting as gc, keys as slots, tidying
from snapchain.repository.catalogue import Point
from snapchain.repository.crypto import AES, CHACHA, NONE, SUITES
from snapchain.repository.envelope import unseal
from snapchain.repository.first_reads import StoredFirstReads
from snapchain.repository.layer_writer import LayerUpload, Origin
from snapchain.repository.layers import StoredLayer
from snapchain.repository.packs import PackReader
from snapchain.repository.pages import Page
from snapchain.repository.points_merge import RepositoryMerge
from snapchain.repository.repository import Repository
from tests.repository import second_keys, second_reader, vectors
from tests.repository.second_keys import Damaged, Keys, Newer, master_key, public_master
from tests.repository.second_reader import Reader

LEAF = 65536
PASSPHRASE = "correct horse battery staple"
Change = tuple[int, int, int]  # start, length, kind


@dataclass
class Guest:
    """A layer to be taken in, and what the guest sees at it."""

    extents: Extents
    disk: bytes

    @property
    def size(self) -> int:
        return self.extents.size

    def read_into(self, offset: int, buffer: memoryview) -> None:
        buffer[:] = self.disk[offset : offset + len(buffer)]


@dataclass
class Shipped:
    """A disk of a real repository: its layers, and the bytes of each point."""

    repository: Repository
    deposit: LayerUpload
    name: str
    seed: int
    layers: list[StoredLayer] = field(default_factory=list)
    expected: dict[int, bytes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)

    def ship(self, size: int, *changes: Change, content: bytes | None = None) -> None:
        """Publish a point: the last one, cut or grown to `size`, with some ranges changed."""
        disk = bytearray(self.expected[max(self.expected)] if self.expected else b"")
        del disk[size:]
        disk += bytes(size - len(disk))
        for start, length, kind in changes:
            plain = self._random.randbytes(length) if content is None else content[:length]
            disk[start : start + length] = plain if kind == DATA else bytes(length)
        guest = Guest(Extents.from_runs(size, sorted(changes)), bytes(disk))
        origin = Origin("disk.qcow2", "qcow2", LEAF, ())
        below = list(self.layers)
        layer = self.deposit.add(guest, below, origin, on_bytes=lambda _: None, confirm=lambda: None)
        self._publish(layer, below[-1].id if below else None)
        self.layers.append(layer)
        self.expected[len(self.layers)] = bytes(disk)

    def _publish(self, layer: StoredLayer, parent: str | None) -> None:
        disk = self.repository.disk(self.name)
        current = disk.read()
        number = current[0].next_point if current else 1
        now = datetime.now(UTC)
        point = Point(
            point=number, time=now, layer=layer.id, size=layer.size, content_id=layer.header.content_id, labels=("x",)
        )
        points = (*(current[0].points if current else ()), point)
        parents = {**(current[0].parents if current else {}), layer.id: parent}
        disk.advance(current, time=now, next_point=number + 1, points=points, parents=parents)


def make(root: Path, suite: str, *, block_size: int = LEAF) -> Repository:
    store = LocalStore(root, make=True)
    return Repository.create(store, passphrase=lambda: PASSPHRASE, encryption=suite, block_size=block_size)


def read(root: Path, suite: str) -> Reader:
    return Reader(root, None if suite == NONE else PASSPHRASE)


def check(reader: Reader, shipped: Shipped, *, points: Sequence[int] | None = None) -> None:
    """Bytes, content ids, and leaves of the points of a disk are what was shipped."""
    catalogue = reader.disks()[shipped.name]
    assert [point["point"] for point in catalogue["points"]] == list(points or shipped.expected)
    for point in catalogue["points"]:
        want = shipped.expected[point["point"]]
        layers = reader.chain(shipped.name, point["point"])
        found = reader.compose(layers)
        assert found == want
        assert point["content_id"] == second_reader.content_id(want)
        assert second_reader.leaves_shown(layers) == second_reader.leaves_of(want)
        assert {tuple(point["labels"])} == {("x",)}
        zero = [run for layer in layers for run in layer.runs if run.where is None]
        assert all((run.blob, run.skip) == (bytes(32), 0) for run in zero)


@pytest.fixture(params=SUITES)
def suite(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_every_point_of_a_chain_that_grows_and_shrinks(tmp_path: Path, suite: str) -> None:
    repository = make(tmp_path, suite)
    with LayerUpload(repository) as deposit:
        disk = Shipped(repository, deposit, "web1/vda", seed=1)
        disk.ship(10 * LEAF + 512, (0, 5 * LEAF, DATA), (7 * LEAF + 100, 1000, DATA))
        disk.ship(10 * LEAF + 512, (LEAF, LEAF, ZERO), (3 * LEAF + 512, 70000, DATA), (10 * LEAF, 512, DATA))
        disk.ship(4 * LEAF + 4096)  # hides what is above for ever after
        disk.ship(12 * LEAF + 1, (12 * LEAF, 1, DATA))
        disk.ship(12 * LEAF + 1, (0, 12 * LEAF, ZERO))
        disk.ship(0)
        disk.ship(2 * LEAF, (512, 512, DATA))
    reader = read(tmp_path, suite)
    check(reader, disk)
    assert [catalogue["generation"] for catalogue in reader.generations("web1/vda")] == [1, 2, 3, 4, 5, 6, 7]


def test_merged_layers(tmp_path: Path, suite: str) -> None:
    repository = make(tmp_path, suite)
    rng = random.Random(7)
    with LayerUpload(repository) as deposit:
        disk = Shipped(repository, deposit, "web1/vda", seed=2)
        disk.ship(40 * LEAF, (0, 30 * LEAF, DATA), (35 * LEAF, LEAF, ZERO))
        for size in (40 * LEAF, 33 * LEAF + 512, 40 * LEAF, 40 * LEAF, 40 * LEAF):
            start = sorted(rng.sample(range(0, size - 8 * LEAF, 512), 4))
            room = [*(stop - at for at, stop in pairwise(start)), 8 * LEAF]
            kinds = (DATA, ZERO, DATA, DATA)
            disk.ship(size, *((at, min(gap, 100_352), kind) for at, gap, kind in zip(start, room, kinds, strict=True)))
    check(read(tmp_path, suite), disk)
    kept = RepositoryMerge(repository, "web1/vda", Policy(last=1)).run()
    assert kept.points_kept == (6,)
    reader = read(tmp_path, suite)
    check(reader, disk, points=[6])
    (layer,) = reader.chain("web1/vda", 6)
    assert layer.header["replaces"] == [each.id for each in disk.layers]
    assert all(run.where for run in layer.runs)  # at the root nothing need be said about zeroes
    before = set(reader.directories())
    gc.run(repository)
    reader = read(tmp_path, suite)
    check(reader, disk, points=[6])
    assert reader.generations("web1/vda")[-1] == reader.disks()["web1/vda"]
    there = set(reader.directories())
    assert set(reader.indexed()) == there
    assert len(there) < len(before)


def test_a_merge_in_the_middle_keeps_zeroes(tmp_path: Path) -> None:
    repository = make(tmp_path, CHACHA)
    with LayerUpload(repository) as deposit:
        disk = Shipped(repository, deposit, "d", seed=3)
        disk.ship(8 * LEAF, (0, 8 * LEAF, DATA))
        disk.ship(8 * LEAF, (LEAF, LEAF, DATA))
        disk.ship(8 * LEAF, (LEAF + 512, LEAF, ZERO))
    catalogue, digest = repository.disk("d").existing()
    keep = tuple(point for point in catalogue.points if point.point != 2)
    repository.disk("d").advance((catalogue, digest), time=datetime.now(UTC), points=keep)
    RepositoryMerge(repository, "d", Policy(last=2)).run()
    reader = read(tmp_path, CHACHA)
    check(reader, disk, points=[1, 3])
    assert [len(reader.chain("d", number)) for number in (1, 3)] == [1, 2]
    assert any(run.where is None for run in reader.chain("d", 3)[-1].runs)


def test_samples_lead_to_the_indexes_that_have_the_ids(
    tmp_path: Path, suite: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tidying, "LOOSE", 2)
    repository = make(tmp_path, suite, block_size=LEAF)
    content = random.Random(6).randbytes(512 * LEAF)
    for number in range(8):
        with LayerUpload(repository) as deposit:
            disk = Shipped(repository, deposit, f"d{number}", seed=number)
            disk.ship(64 * LEAF, (0, 64 * LEAF, DATA), content=content[64 * number * LEAF :])
    reader = read(tmp_path, suite)
    found = set(reader.sampled())
    for name in {name for _, name in found}:
        listed = {blob[:5] for blob, _ in reader.indexed(only=name) if blob[-1] % 32 == 0}
        assert {key for key, other in found if other == name} == listed
    assert found  # of some 400 ids
    assert set(reader.indexed()) == set(reader.directories())


def test_equal_data_is_stored_once_and_found_through_index_and_directories(tmp_path: Path, suite: str) -> None:
    repository = make(tmp_path, suite, block_size=4 * LEAF)
    same = random.Random(4).randbytes(8 * LEAF)
    with LayerUpload(repository) as deposit:
        one = Shipped(repository, deposit, "one", seed=4)
        one.ship(16 * LEAF, (0, 8 * LEAF, DATA), (8 * LEAF, 8 * LEAF, DATA), content=same)
        stored = deposit.bytes_stored
        two = Shipped(repository, deposit, "two", seed=5)
        two.ship(8 * LEAF, (0, 8 * LEAF, DATA), content=same)
        two.ship(8 * LEAF, (0, 4 * LEAF, DATA), content=b"repeated " * LEAF)
        assert deposit.bytes_stored - stored < 2 * LEAF
    reader = read(tmp_path, suite)
    check(reader, one)
    check(reader, two)
    there = set(reader.directories())
    assert set(reader.indexed()) == there
    for disk in (one, two):
        for layer in (layer for number in disk.expected for layer in reader.chain(disk.name, number)):
            assert {(run.blob, run.where) for run in layer.runs if run.where} <= there
            assert {where for _, _, where in layer.pages} <= {where for _, where in there}
    for blob, where in there:
        assert reader.keys.blob_id(reader.blob(blob, where)) == blob
    assert any(where.stored < where.raw for _, where in there)
    assert any(where.stored == where.raw + 16 for _, where in there)


def test_many_pages(tmp_path: Path) -> None:
    repository = make(tmp_path, NONE)
    size = 300 * LEAF
    with LayerUpload(repository) as deposit:
        disk = Shipped(repository, deposit, "d", seed=6)
        disk.ship(size, *((at, 512, DATA) for at in range(0, size, 4096)))
        disk.ship(size, *((at, 512, ZERO) for at in range(0, size, 40960)))
    reader = read(tmp_path, NONE)
    assert len(reader.chain("d", 1)[0].pages) > 1
    check(reader, disk)


def test_other_passphrases_open_nothing(tmp_path: Path) -> None:
    repository = make(tmp_path, AES)
    with pytest.raises(Damaged, match="no slot"):
        Reader(tmp_path, "another")
    config = repository.store.get("config")
    another = slots.wrap(bytes(32), "another", config).model_dump_json().encode()
    repository.store.put("keys/" + "0" * 32, another)
    assert Reader(tmp_path, PASSPHRASE).disks() == {}


def test_what_clients_read_first(tmp_path: Path, suite: str) -> None:
    repository = make(tmp_path, suite)
    assert read(tmp_path, suite).first_reads("web1/vda") == []
    record = StoredFirstReads(repository.store, repository.keys, "web1/vda")
    record.write(((7, 2), (1, 1)))
    assert read(tmp_path, suite).first_reads("web1/vda") == [(7, 2), (1, 1)]
    (path,) = (tmp_path / "reads").iterdir()
    path.chmod(0o600)
    path.write_bytes(_flipped(path.read_bytes()))
    assert read(tmp_path, suite).first_reads("web1/vda") == []


def _flipped(body: bytes) -> bytes:
    return body[:-1] + bytes([body[-1] ^ 1])


def _respaced(body: bytes) -> bytes:
    return json.dumps(json.loads(body)).encode()


def _newer(body: bytes) -> bytes:
    return json.dumps(json.loads(body) | {"format": 2}).encode()


def _more(body: bytes) -> bytes:
    return json.dumps(json.loads(body) | {"unheard_of": 1}).encode()


def _newer_head(body: bytes) -> bytes:
    return body[:7] + b"\2" + body[8:]


def _rekeyed_head(body: bytes) -> bytes:
    return body[:8] + b"\1" + body[9:]


@pytest.mark.parametrize(
    ("where", "change", "error", "words"),
    [
        ("config", _respaced, Damaged, "no slot opens"),
        ("config", _newer, Newer, "format"),
        ("config", _more, Newer, "json"),
        ("keys/*", _newer, Newer, "format|json"),
        ("index/*", _flipped, Damaged, "tag"),
        ("layers/*", _flipped, Damaged, "tag"),
        ("layers/*", _newer_head, Newer, "head"),
        ("layers/*", _rekeyed_head, Newer, "head"),
        ("disks/*/*", _flipped, Damaged, "tag"),
        ("packs/*/*", _flipped, Damaged, "tag|trailer"),
        ("packs/*/*", _newer_head, Newer, "head"),
        ("packs/*/*", _rekeyed_head, Newer, "head"),
        ("packs/*/*", lambda body: body[:40] + b"\0\0" + body[42:], Damaged, "tag|trailer|blob"),
    ],
)
def test_what_was_altered_is_refused(
    tmp_path: Path, where: str, change: Callable[[bytes], bytes], error: type[Exception], words: str
) -> None:
    repository = make(tmp_path, AES)
    with LayerUpload(repository) as deposit:
        disk = Shipped(repository, deposit, "d", seed=8)
        disk.ship(LEAF, (0, 512, DATA))
    for path in tmp_path.glob(where):
        path.write_bytes(change(path.read_bytes()))
    with pytest.raises(error, match=words):
        _read_all(tmp_path, disk)


def test_an_object_in_the_place_of_another_is_refused(tmp_path: Path) -> None:
    repository = make(tmp_path, AES)
    with LayerUpload(repository) as deposit:
        disk = Shipped(repository, deposit, "d", seed=9)
        disk.ship(LEAF, (0, 512, DATA))
        disk.ship(LEAF, (0, 512, DATA))
    one, two = sorted(tmp_path.glob("layers/*"))
    one.write_bytes(two.read_bytes())
    with pytest.raises(Damaged, match="tag"):
        _read_all(tmp_path, disk)


def _read_all(root: Path, disk: Shipped) -> None:
    reader = read(root, AES)
    check(reader, disk)
    assert set(reader.indexed()) == set(reader.directories())


# ---------------------------------------------------------------------------------------------- known answers


@pytest.fixture(scope="module")
def written() -> dict[str, str]:
    return vectors.read_document()


def test_the_document_shows_what_the_package_makes(written: dict[str, str]) -> None:
    """Frames are made by zstd, whose versions may differ: those are held against what they unpack to."""
    made = vectors.vectors()
    assert list(written) == list(made)
    frames = {name for name in made if name.startswith(("record ", "pack ")) and not name.endswith(" root")}
    assert {name: written[name] for name in made if name not in frames} == {
        name: made[name] for name in made if name not in frames
    }


def _keys(written: dict[str, str], suite: str) -> Keys:
    master = written["none.master" if suite == NONE else "master"]
    return Keys(suite, bytes.fromhex(written["repository"]), bytes.fromhex(master))


def test_keys_and_ids(written: dict[str, str]) -> None:
    config = written["config"].encode()
    master = bytes.fromhex(written["master"])
    assert master_key(written["slot"].encode(), PASSPHRASE, config) == master
    assert master_key(written["slot"].encode(), PASSPHRASE, config + b"\n") is None
    assert slots.unwrap(slots.parse(written["slot"].encode(), subject=""), PASSPHRASE, config, subject="") == master
    assert public_master(bytes.fromhex(written["repository"])).hex() == written["none.master"]
    keys = _keys(written, AES)
    roots = [keys.pack_root, keys.record_root, keys.id_key, keys.name_key]
    assert [root.hex() for root in roots] == [written[n] for n in ("pack root", "record root", "id key", "name key")]
    assert keys.folder("web1/vda") == written["DISK of web1/vda"]
    for count in (1, 65536, 65537, 200000):
        assert keys.blob_id(vectors.pattern(count)).hex() == written[f"id of pattern({count})"]


def test_records(written: dict[str, str], suite: str) -> None:
    sealed = bytes.fromhex(written[f"record {suite}"])
    assert _keys(written, suite).unseal(b"C", vectors.RECORD_NAME, sealed) == b"snapchain"
    assert unseal(vectors.keyring(suite), b"C", vectors.RECORD_NAME, sealed) == b"snapchain"
    for other in (vectors.RECORD_NAME[:-1] + "2", "disks/01/00000000000000000001"):
        with pytest.raises(Damaged, match="tag"):
            _keys(written, suite).unseal(b"C", other, sealed)


def test_packs(written: dict[str, str], suite: str) -> None:
    pack = written["pack.id"]
    body = bytes.fromhex(written[f"pack {suite}"])
    keys = _keys(written, suite)
    plain = []
    for blob, where in keys.directory(pack, body):
        text = body[where.offset : where.offset + where.stored]
        plain.append(keys.blob(blob, where, text))
        assert PackReader(vectors.keyring(suite), pack).blob(blob, where.offset, where.raw, text) == plain[-1]
        assert keys.blob_id(plain[-1]) == blob
    assert tuple(plain) == vectors.BLOBS


def test_page(written: dict[str, str]) -> None:
    body = bytes.fromhex(written["page"])
    blobs = _keys(written, AES).directory(written["pack.id"], bytes.fromhex(written[f"pack {AES}"]))
    runs, leaves = second_reader.parse_page(body)
    assert [(run.start, run.length, run.skip) for run in runs] == [(0, 4096, 0), (65536, 9, 0), (131072, 100, 100)]
    assert [(run.blob, run.where) for run in runs] == [(bytes(32), None), *blobs]
    assert leaves == {1: second_reader.leaf_hash(b"snapchain")}
    assert len(Page.decode(body, 0, 3 * LEAF, subject="").runs) == 3


def test_content_ids(written: dict[str, str]) -> None:
    for name, size, disk in vectors.disks():
        want = written[f"content id of {name}"]
        assert second_reader.content_id(disk) == want
        assert content_id(size, vectors.content_sum(disk)) == want
    lanes = second_reader.sum_of(second_reader.leaves_of(vectors.pattern(200000)))[:8]
    assert struct.pack("<8H", *lanes).hex() == written["first lanes of the last sum"]


def test_the_second_reader_shares_no_code_with_the_package() -> None:
    for module in (second_reader, second_keys):
        text = Path(str(module.__file__)).read_text()
        assert "import snapchain" not in text
        assert "from snapchain" not in text


def test_it_reads_the_list_of_key_slots_and_refuses_a_removed_one(tmp_path: Path) -> None:
    repository = Repository.create(LocalStore(tmp_path, make=True), passphrase=lambda: PASSPHRASE)
    old = tmp_path / (repository.slot or "")
    text = old.read_bytes()
    ops.add(repository, ops.NewKey(passphrase=ops.recovery_key, recovery=True, label="paper"))
    ops.change(repository, ops.NewKey(passphrase=lambda: "another one"), secret=lambda: PASSPHRASE)
    found = Reader(tmp_path, "another one").slots()
    assert found is not None
    assert [(each["label"], each["recovery"]) for each in found["slots"]] == [("paper", True), ("", False)]
    assert [each["slot"] for each in found["removed"]] == [old.name]
    for each in found["slots"]:
        assert second_keys.digest_of((tmp_path / "keys" / each["slot"]).read_bytes()) == each["digest"]
    (tmp_path / "keys" / ("0" * 32)).write_bytes(text)
    with pytest.raises(Damaged, match="no slot opens"):
        Reader(tmp_path, PASSPHRASE)
    shutil.rmtree(tmp_path / "slots")
    assert Reader(tmp_path, PASSPHRASE).slots() is None, "as a repository of 0.1"


def test_a_recovery_key_is_what_the_document_says() -> None:
    letters = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
    for _ in range(20):
        for place, group in enumerate(ops.recovery_key().split("-")):
            a, b, c, d, check = map(letters.index, group)
            assert check == (place + 1 + a + 3 * b + 5 * c + 7 * d) % 32
