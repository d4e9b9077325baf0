"""No object is larger than the pack size, whatever is stored: servers and proxies have limits."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

from snapchain.errors import InvalidInput, Unsupported
from snapchain.model.retention import Policy
from snapchain.objects.memory import MemoryStore
from snapchain.objects.store import Data, StoreWrapper, joined
from snapchain.repository import collecting as gc, index as indexes, sweep
from snapchain.repository.crypto import Keyring
from snapchain.repository.format import MAX_PACK_BYTES, MIN_PACK_BYTES
from snapchain.repository.index import BlobIndex
from snapchain.repository.packer import Packer
from snapchain.repository.packs import LARGEST_BLOB
from snapchain.repository.points_merge import RepositoryMerge
from snapchain.repository.repository import CONFIG, Config, Repository, check_pack_size, parse_config
from snapchain.repository.verification import verify
from tests.ops.shipping import DISK, MiB, shipment
from tests.ops.stacks import Layer, build

KEYS = Keyring("aes-256-gcm", "00" * 16, bytes(32))


class Limited(StoreWrapper):
    """Takes no object above a limit, as nginx does with 413."""

    def __init__(self, inner: MemoryStore, limit: int) -> None:
        super().__init__(inner)
        self.limit = limit

    def put(self, name: str, data: Data) -> None:
        self._check(name, data)
        self.inner.put(name, data)

    def create(self, name: str, data: Data) -> bool:
        self._check(name, data)
        return self.inner.create(name, data)

    def _check(self, name: str, data: Data) -> None:
        if len(joined(data)) > self.limit:
            raise Unsupported(f"an object of {len(joined(data))} bytes", subject=name)


@given(
    limit=st.integers(2_000, 20_000),
    count=st.integers(1, 400),
    largest=st.sampled_from([1, 40, 1_500]),
    seed=st.integers(0, 99),
)
@settings(max_examples=40, deadline=None)
def test_neither_packs_nor_indexes_outgrow_the_limit(limit: int, count: int, largest: int, seed: int) -> None:
    draw = random.Random(seed)
    sizes = [draw.randint(1, largest) for _ in range(count)]
    store = Limited(MemoryStore(), limit)
    with Packer(store, KEYS, BlobIndex(), pack_size=limit) as packer:
        blobs = {draw.randbytes(32): draw.randbytes(size) for size in sizes}
        for blob, payload in blobs.items():
            packer.add(blob, payload, len(payload))
        packer.flush()
    packs = [info.size for info in store.list("packs/")]
    assert len(packs) <= 1 + 2 * sum(size + 70 for size in sizes) // (limit - 1_600), "and are not needlessly small"
    known = indexes.load(store, KEYS)
    assert all(known.find(blob) is not None for blob in blobs)


def test_a_blob_above_the_limit_has_a_pack_of_its_own() -> None:
    store = MemoryStore()
    with Packer(store, KEYS, BlobIndex(), pack_size=1_000) as packer:
        places = [packer.add(bytes([number]) * 32, bytes(size), size) for number, size in enumerate([10, 5_000, 10])]
        packer.flush()
    assert len({place.pack for place in places}) == 3


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Four files, each of noise that overwrites half of the one below, and of much that is tiny when compressed."""
    folder = tmp_path_factory.mktemp("sizes")
    noise = folder / "noise"
    noise.write_bytes(random.Random(1).randbytes(2 * MiB))
    layers = [
        Layer(16 * MiB, [f"write -s {noise} {number}M 2M", f"write -P {number + 1} 8M 4M"]) for number in range(4)
    ]
    return build(folder / "chain", layers)


@pytest.mark.parametrize("where", ["made with it", "given each time"])
def test_everything_goes_through_a_limit_of_one_mebibyte(
    chain: list[Path], where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int | None] = []
    begin = Packer.__init__

    def noted(self: Packer, *arguments: Any, pack_size: int | None = None, **more: Any) -> None:
        sizes.append(pack_size)
        begin(self, *arguments, pack_size=pack_size, **more)

    monkeypatch.setattr(Packer, "__init__", noted)
    monkeypatch.setattr(sweep, "WASTE", 0.0)
    monkeypatch.setattr(sweep, "LEAST_WASTE", 0)
    inner = MemoryStore()
    store = Limited(inner, 1 << 20)
    size = 1 << 20
    Repository.create(
        store, passphrase=lambda: None, encryption="none", pack_size=size if where == "made with it" else None
    )

    def opened() -> Repository:
        repo = Repository.open(store, passphrase=lambda: None, writing=True)
        if where != "made with it":
            assert repo.pack_size is None
            repo.pack_size = size
        assert repo.pack_size == size
        return repo

    for path in chain:
        _shipped(path, opened(), DISK)
    assert RepositoryMerge(opened(), DISK, Policy(last=2)).run().points_kept == (3, 4)
    assert gc.run(opened()).packs_moved > 0
    assert sizes == [size] * 6, "four shipments, a merge and a collection"
    assert verify(opened(), share=1.0).findings == ()
    assert max(info.size for info in inner.list("")) > size // 2, "the packs are filled"
    large = opened()
    large.pack_size = 16 << 20
    for info in [*inner.list("index/"), *inner.list("packs/")]:  # so that there is something to store
        inner.delete(info.name)
    with pytest.raises(Unsupported, match="an object of"):
        _shipped(chain[-1], large, "large")


def _shipped(path: Path, repo: Repository, disk: str) -> None:
    with shipment(path, repo, disk) as work:
        work.run()


def test_a_repository_of_the_default_is_written_as_ever() -> None:
    store = MemoryStore()
    Repository.create(store, passphrase=lambda: None, encryption="none")
    assert sorted(json.loads(store.get(CONFIG))) == [
        "block_size", "conditional_put", "created", "encryption", "format", "id",
    ]  # fmt: skip
    other = MemoryStore()
    Repository.create(other, passphrase=lambda: None, encryption="none", pack_size=1 << 20)
    assert json.loads(other.get(CONFIG))["pack_size"] == 1 << 20
    assert parse_config(other.get(CONFIG), subject="x").pack_size == 1 << 20


@pytest.mark.parametrize("size", [0, MIN_PACK_BYTES - 1, MAX_PACK_BYTES + 1])
def test_sizes_that_no_pack_has(size: int) -> None:
    with pytest.raises(InvalidInput, match=f"the pack size is out of range: {size} bytes"):
        check_pack_size(size)
    with pytest.raises(InvalidInput, match="the pack size is out of range"):
        Repository.create(MemoryStore(), passphrase=lambda: None, encryption="none", pack_size=size)


def test_a_block_must_fit() -> None:
    with pytest.raises(InvalidInput, match="no room for a block of 1048576"):
        check_pack_size(1 << 20, 1 << 20)
    check_pack_size(1 << 20, 512 << 10)
    assert Config.model_fields["block_size"].metadata[1].le < LARGEST_BLOB
