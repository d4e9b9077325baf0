"""What a nightly shipment costs in requests and bytes where the repository is large: promise 10, counted."""

from __future__ import annotations

import secrets
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from snapchain.objects.cache import CachedStore
from snapchain.objects.memory import MemoryStore
from snapchain.objects.store import ObjectInfo, ObjectStore
from snapchain.repository import damage, index as indexes
from snapchain.repository.format import BLOB_ROW
from snapchain.repository.index import IndexedPack
from tests.bench.measure import KiB, MiB
from tests.ops.shipping import shipment
from tests.ops.stacks import Layer, build
from tests.repository.counting import CountingStore
from tests.repository.synthetic import again, repository

pytestmark = [pytest.mark.bench, pytest.mark.timeout(600)]

PACKS, BLOBS = 10_000, 100
A_SHIPMENT = 64
"""Packs."""
CHAIN = 30


def fake(count: int, draw: np.random.Generator) -> list[IndexedPack]:
    """Packs that do not exist, of blobs of a block each."""
    rows = np.zeros(BLOBS, BLOB_ROW)
    rows["offset"], rows["stored"], rows["raw"] = np.arange(BLOBS) * 160 * KiB + 16, 160 * KiB, 256 * KiB
    return [
        IndexedPack(secrets.token_hex(16), 16 * MiB, draw.integers(0, 256, (BLOBS, 32), dtype=np.uint8), rows.copy())
        for _ in range(count)
    ]


def _listed(store: ObjectStore, _sizes: object) -> tuple[frozenset[str], dict[str, ObjectInfo]]:
    """The listing alone: the packs do not exist."""
    list(store.list("packs/"))
    return frozenset(), {}


@pytest.mark.parametrize("after", ["shipments", "gc"])
def test_a_nightly_shipment_into_a_million_blobs(tmp_path: Path, after: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(damage, "compare", _listed)
    repo = repository(MemoryStore(), block_size=256 * KiB)
    draw = np.random.default_rng(1)
    every = A_SHIPMENT if after == "shipments" else PACKS // 2
    for first in range(0, PACKS, every):
        indexes.write(repo.store, repo.keys, fake(min(every, PACKS - first), draw), era=0)
    size = 256 * MiB
    files = build(
        tmp_path / "chain",
        [Layer(size, ["write -P 1 0 64M"]), *(Layer(size, [f"write -P {n} {n}M 1M"]) for n in range(2, CHAIN + 2))],
    )
    for path in files[:-1]:
        with shipment(path, again(repo), "disk") as work:
            work.run()
    print()
    bare: dict[str, int] = {}
    for cache in ("cold", "warm"):
        copy = MemoryStore()
        for info in repo.store.list(""):
            copy.put(info.name, repo.store.get(info.name))
        store = CountingStore(copy)
        watched = again(repo, CachedStore(store, tmp_path / "cache", prefix="index/"))
        with shipment(files[-1], watched, "disk") as work:
            work.run()
        asked = Counter((each.operation, each.name.split("/")[0]) for each in store.asked)
        bare[cache] = sum(each.size for each in store.asked)
        told = ", ".join(f"{count} {verb} {kind}" for (verb, kind), count in sorted(asked.items()))
        print(f"  after {after}, {cache} cache: {len(store.asked)} requests, {bare[cache] / MiB:.1f} MiB: {told}")
    assert bare["cold"] < 8 * MiB, "what others have shipped is known by samples"
    assert bare["warm"] < MiB, "what costs by the repository is fetched once"
