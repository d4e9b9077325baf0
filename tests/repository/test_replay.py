"""Reading a stored layer back finds every leaf that does not read as recorded, whichever side has something to say."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pytest

from snapchain.destination.reading import Sink
from snapchain.errors import Corrupt
from snapchain.model.content import content_id, encode_sum, leaf_hash, sum_of
from snapchain.repository import layers as records, tasks as worklist
from snapchain.repository.chain import ChainView
from snapchain.repository.format import LEAF_ROW, layer_name
from snapchain.repository.ingest import store_page_body
from snapchain.repository.layers import StoredLayer
from snapchain.repository.packer import Packer
from snapchain.repository.pages import Page, Rows
from snapchain.repository.replay import Replay
from tests.repository.synthetic import LEAF, Run, Shipped, again, drawn, nothing, ship
from tests.waiting import HANG


def forged(shipped: Shipped, change: Callable[[Page], Page]) -> StoredLayer:
    """The only layer with another page, and a record that is sound for what that page says."""
    repository, (layer,) = shipped.repository, shipped.layers
    (page,) = layer.pages(0, layer.size)
    page = change(page)
    with Packer(repository.store, repository.keys, repository.index()) as packer:
        row = store_page_body(0, layer.size, page, keys=repository.keys, packer=packer)
        packer.flush()
    total = sum_of(page.index, page.leaves["hash"])
    content = {"content_sum": encode_sum(total), "content_id": content_id(layer.size, total)}
    records.write(repository.store, repository.keys, layer.header.model_copy(update=content), row)
    return again(repository).layer(layer.id)


def leaf_rows(**leaves: bytes) -> Rows:
    rows = np.zeros(len(leaves), LEAF_ROW)
    for row, (name, content) in zip(rows, sorted(leaves.items()), strict=True):
        row["index"] = int(name.removeprefix("leaf"))
        row["hash"] = np.frombuffer(leaf_hash(memoryview(content)), np.uint8)
    return rows


ONES, TWOS = b"\1" * LEAF, b"\2" * LEAF


@dataclass(frozen=True)
class Case:
    """What the runs of a disk of three leaves say of its middle one, and what is recorded of its leaves."""

    middle: Run
    recorded: Rows


CASES = {
    "data, recorded as zeroes": Case(Run(LEAF, LEAF, 1), leaf_rows(leaf0=ONES, leaf2=ONES)),
    "data, recorded otherwise": Case(Run(LEAF, LEAF, 1), leaf_rows(leaf0=ONES, leaf1=TWOS, leaf2=ONES)),
    "a leaf of zeroes, recorded as data": Case(Run(LEAF, LEAF, None), leaf_rows(leaf0=ONES, leaf1=TWOS, leaf2=ONES)),
    "a part that is zero, recorded as data": Case(Run(LEAF, 512, None), leaf_rows(leaf0=ONES, leaf1=TWOS, leaf2=ONES)),
}


@pytest.mark.parametrize("name", CASES)
def test_a_leaf_that_does_not_read_as_recorded_is_found(name: str) -> None:
    case = CASES[name]
    ends = [Run(0, LEAF, 1), Run(2 * LEAF, LEAF, 1)]
    shipped = ship([drawn(3 * LEAF, [*ends, case.middle], b"")])
    layer = forged(shipped, lambda page: Page(page.runs, case.recorded, page.packs))
    replay = Replay(ChainView([layer], again(shipped.repository).blobs), layer.extents())
    bad = replay.find_bad()
    assert [(each.start, each.stop) for each in bad] == [(LEAF, 2 * LEAF)]
    with pytest.raises(Corrupt, match=f"bytes {LEAF} to {2 * LEAF} are lost: .*not those that were shipped") as caught:
        Replay(ChainView([layer], again(shipped.repository).blobs), layer.extents()).run(nothing)
    assert caught.value.subject == layer_name(layer.id)


def test_a_replay_counts_only_what_a_shortened_disk_has() -> None:
    """On the sum of the chain below, less the leaves that the end cuts off, and grown again without them."""
    stack = [drawn(3 * LEAF, [Run(0, 3 * LEAF, 1)], b"")]
    for size in (LEAF + 100, 4 * LEAF):
        stack.append(drawn(size, [Run(0, 512, 2)], stack[-1].shown))
    shipped = ship(stack)
    for count in range(1, 4):
        chain = shipped.layers[:count]
        replay = Replay(ChainView(chain, again(shipped.repository).blobs), chain[-1].extents())
        assert replay.on(chain[:-1]).run(nothing) == chain[-1].header.content_id


class Waiting(ChainView):
    """Its first leaf cannot be read; all others wait until they may."""

    def __init__(self, shipped: Shipped) -> None:
        super().__init__(shipped.layers, again(shipped.repository).blobs)
        self.go_on = threading.Event()

    def read_pieces(self, pieces: Sequence[tuple[int, memoryview]]) -> None:
        if not pieces[0][0]:
            raise Corrupt("damaged", subject="x")
        assert self.go_on.wait(HANG)
        super().read_pieces(pieces)


def test_nothing_is_written_after_an_error_was_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    """The caller closes the file then, and its descriptor's number will be another file's."""
    monkeypatch.setattr(worklist, "WINDOW", LEAF)
    view = Waiting(ship([drawn(8 * LEAF, [Run(0, 8 * LEAF, 1)], b"")]))
    written: list[object] = []
    before = set(threading.enumerate())
    with pytest.raises(Corrupt, match=f"bytes 0 to {LEAF} are lost: damaged"):
        Replay(view, view.extents.owned_by(0), Sink(written.append)).run(nothing)
    written.clear()
    view.go_on.set()
    workers = set(threading.enumerate()) - before
    assert workers
    for worker in workers:
        worker.join(HANG)
    assert written == []
