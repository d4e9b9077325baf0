"""What a merge in a repository writes is known beforehand."""

from __future__ import annotations

from pathlib import Path

import pytest

from snapchain.model.retention import Policy
from snapchain.objects.memory import MemoryStore
from snapchain.repository.points_merge import RepositoryMerge
from tests.ops.shipping import DISK, ship
from tests.ops.stacks import Layer, build
from tests.repository.counting import CountingStore
from tests.repository.synthetic import again, repository

LAYERS = 6


@pytest.mark.parametrize(
    "policy", [Policy(last=1), Policy(last=2), Policy(labels=frozenset({"l1", "l4"})), Policy(last=LAYERS)]
)
def test_the_plan_counts_the_objects_that_are_written(tmp_path: Path, policy: Policy) -> None:
    repo = repository(MemoryStore(), block_size=256 * 1024)
    chain = build(tmp_path / "vm", [Layer(writes=[f"write -P {n + 1} {n * 64}k 128k"]) for n in range(LAYERS)])
    for number, path in enumerate(chain):
        ship(path, repo, labels=[f"l{number}"])
    store = CountingStore(repo.store)
    work = RepositoryMerge(again(repo, store), DISK, policy)
    planned = work.plan().requests
    store.asked.clear()
    work.run()
    assert len(store.of("put")) + len(store.of("create")) == planned
