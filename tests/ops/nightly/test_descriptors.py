"""No more disks at once than there are descriptors for."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from snapchain.image.scan import MAX_DEPTH
from snapchain.ops.nightly.run import Descriptors, needed
from tests.waiting import HANG


@pytest.mark.parametrize(("limit", "together"), [(64 + 100, 1), (64 + 299, 2), (64 + 800, 8), (10, 1)])
def test_as_many_disks_at_once_as_there_is_room_for(limit: int, together: int) -> None:
    """All have their turn, also where one alone needs more than there is."""
    room, lock = Descriptors(limit), threading.Lock()
    all_there = threading.Barrier(together)
    at_work, most = 0, 0

    def work() -> None:
        nonlocal at_work, most
        with room.taken(100):
            with lock:
                at_work += 1
                most = max(most, at_work)
            all_there.wait(HANG)
            with lock:
                at_work -= 1

    with ThreadPoolExecutor(8) as pool:
        for each in [pool.submit(work) for _ in range(8)]:
            each.result()
    assert most == together


def test_what_was_never_seen_may_be_as_deep_as_can_be() -> None:
    assert needed(None) >= needed(MAX_DEPTH - 1)
    assert needed(3) < needed(190)
