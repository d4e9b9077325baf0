"""Planning a merge of a badly fragmented chain, as a whole process: `make bench ARGS='-k merge_plan'`.

A disk of 1 TiB, a root and seven overlays, 2 million extents in them together, strewn all over: each layer has all of
its L2 tables. The data themselves are holes: planning reads none.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from snapchain.image.qcow2.header import Backing
from snapchain.image.qcow2.layout import plan
from snapchain.image.qcow2.write import Qcow2Writer
from snapchain.model.extents import ABSENT, DATA, Extents
from tests.bench.measure import Cost, MiB, snapchain

pytestmark = [pytest.mark.bench, pytest.mark.timeout(900)]

SIZE = 1 << 40
CLUSTER = 64 << 10
LAYERS = 8
EXTENTS = 2_000_000
MOST_SECONDS = 5.0
MOST_MEMORY = 500 * MiB


def strewn(path: Path, *, extents: int, seed: int, backing: str | None) -> None:
    """A layer of lone clusters at random places."""
    draw = np.random.default_rng(seed)
    # Even places only: no two of them are one extent.
    places = np.sort(draw.choice(SIZE // CLUSTER // 2, extents, replace=False)).astype(np.int64) * 2 * CLUSTER
    at = np.stack([places, places + CLUSTER], axis=1).reshape(-1)
    val = np.tile(np.array([DATA, ABSENT]), extents)
    if at[0]:
        at, val = np.append(0, at), np.append(ABSENT, val)
    inside = at < SIZE
    layout = plan(
        Extents.from_starts(SIZE, at[inside], val[inside]),
        cluster_size=CLUSTER,
        backing=None if backing is None else Backing(backing, "qcow2"),
    )
    with path.open("x+b") as file, Qcow2Writer(file.fileno(), layout):
        os.truncate(file.fileno(), layout.file_bytes)


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fragmented")
    below = None
    for number in range(LAYERS):
        name = "top.qcow2" if number == LAYERS - 1 else f"{number}.qcow2"
        strewn(folder / name, extents=EXTENTS // LAYERS, seed=number, backing=below)
        below = name
    warm_tables(folder)
    return folder / "top.qcow2"


def warm_tables(folder: Path) -> None:
    """The tables lie in front, the data are holes: reading all of it costs little."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_NORMAL)
            while file.tell() < path.stat().st_blocks * 512 and file.read(16 * MiB):
                pass


@pytest.mark.parametrize(
    "words",
    [[], ["--flatten"], ["--max-layers", "4"], ["--budget-bytes", "100G", "--budget-seconds", "600"]],
    ids=["all above the root", "flatten", "a cap", "budgets"],
)
def test_a_fragmented_terabyte_is_planned_at_once(chain: Path, words: list[str]) -> None:
    costs = [snapchain(chain.parent, "merge", chain, "--dry-run", "--json", *words) for _ in range(2)]
    planned = json.loads(costs[-1].out)["plan"]
    best: Cost = min(costs, key=lambda cost: cost.seconds)
    print(
        f"\nplan of {EXTENTS} extents in {LAYERS} layers, {' '.join(words) or 'no rule'}: "
        f"{planned['layers_after']} layers, wall {best.seconds:.2f} s, cpu {best.cpu:.2f} s, "
        f"peak {best.peak / MiB:.0f} MiB (promised {MOST_SECONDS} s, {MOST_MEMORY // MiB} MiB)",
        flush=True,
    )
    assert sum(layer["data_bytes"] for layer in planned["layers"]) == EXTENTS * CLUSTER
    assert best.seconds < MOST_SECONDS
    assert max(cost.peak for cost in costs) < MOST_MEMORY
