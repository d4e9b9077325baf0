"""Filling gives a sink the DATA of a map as the chain shows it, no more and no less, whatever the order of packs."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from snapchain.destination.reading import Sink
from snapchain.errors import Corrupt
from snapchain.model.extents import DATA
from snapchain.repository import filling
from snapchain.repository.chain import ChainView
from snapchain.repository.filling import Filling
from snapchain.repository.packs import Location
from tests.repository.counting import CountingStore
from tests.repository.synthetic import LEAF, Drawn, Run, Shipped, again, drawn, nothing, ship, stacks


@settings(deadline=None, max_examples=30)
@given(
    stack=stacks(units=(512, 4096, LEAF)),
    start=st.integers(0, 6 * LEAF),
    batch=st.sampled_from([700, LEAF, filling.BATCH_BYTES]),
    portion=st.sampled_from([1, 2000, filling.PORTION_BYTES]),
)
def test_the_sink_gets_all_data_and_nothing_else(stack: list[Drawn], start: int, batch: int, portion: int) -> None:
    shipped = ship(stack)
    view = ChainView(shipped.layers, again(shipped.repository).blobs)
    extents, shown = view.extents.owned_by(0), stack[-1].shown
    wanted = np.zeros(len(shown), np.bool_)
    for begin, length, val in extents.runs():
        wanted[max(begin, start) : begin + length] = val >= DATA
    wanted[:start] = False
    got, done = np.zeros(len(shown), np.uint8), np.zeros(len(shown), np.bool_)
    told = 0

    def write(pieces: Sequence[tuple[int, memoryview]]) -> None:
        assert [offset for offset, _ in pieces] == sorted(offset for offset, _ in pieces)
        for offset, data in pieces:
            got[offset : offset + len(data)] = np.frombuffer(data, np.uint8)
            done[offset : offset + len(data)] = True

    def zero(offset: int, length: int) -> None:
        write([(offset, memoryview(bytes(length)))])

    def on_copied(offset: int, count: int) -> None:
        nonlocal told
        told += count
        assert not (wanted & ~done)[:offset].any(), "all below the offset was given"

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(filling, "BATCH_BYTES", batch)
        patch.setattr(filling, "PORTION_BYTES", portion)
        Filling(view, extents, start=start).run(Sink(write, zero), on_copied)
    assert np.array_equal(done, wanted)
    assert np.array_equal(got, np.where(wanted, np.frombuffer(shown, np.uint8), 0))
    assert told == wanted.sum()


class Waiting(ChainView):
    """The blob at guest offset 0 cannot be read; all others wait until they may."""

    def __init__(self, shipped: Shipped) -> None:
        super().__init__(shipped.layers, again(shipped.repository).blobs)
        self.go_on = threading.Event()
        (self.bad,) = self.locations([(0, LEAF)])

    def blobs(self, wanted: Sequence[tuple[bytes, Location]], *, shown: int) -> Iterator[tuple[int, bytes]]:
        if wanted[0][1] == self.bad:
            raise Corrupt("damaged", subject="x")
        assert self.go_on.wait(20)
        yield from super().blobs(wanted, shown=shown)


def test_nothing_is_given_after_an_error_was_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    """The caller closes the file then, and its descriptor's number will be another file's."""
    monkeypatch.setattr(filling, "PORTION_BYTES", 1)
    view = Waiting(ship([drawn(8 * LEAF, [Run(at * LEAF, LEAF, at + 1) for at in range(8)], b"")]))
    written: list[object] = []
    before = set(threading.enumerate())
    with pytest.raises(Corrupt, match="damaged"):
        Filling(view, view.extents.owned_by(0)).run(Sink(written.append), nothing)
    assert written == []
    view.go_on.set()
    workers = set(threading.enumerate()) - before
    assert workers
    for worker in workers:
        worker.join(20)
    assert written == []


def test_a_batch_is_fetched_in_the_order_of_packs() -> None:
    """Two generations whose blobs alternate on the disk are two requests, not one for each blob."""
    runs = [Run(at * LEAF, LEAF, 300 + at) for at in range(32)]
    stack = [drawn(32 * LEAF, runs, b"")]
    stack.append(drawn(32 * LEAF, [Run(at * LEAF, LEAF, 400 + at) for at in range(0, 32, 2)], stack[-1].shown))
    shipped = ship(stack)
    store = CountingStore(shipped.repository.store)
    view = ChainView(shipped.layers, again(shipped.repository, store).blobs)
    work = Filling(view, view.extents.owned_by(0))
    requests, stored = work.cost()
    store.asked.clear()
    work.run(Sink(nothing), nothing)
    assert len(store.of("get", "packs/")) == requests <= 3
    assert store.bytes_of("get", "packs/") == stored
