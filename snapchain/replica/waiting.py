"""Waiting for one's turn at a disk: a transfer waits for a merge, which ends soon, and a merge a little for a transfer.

Two transfers do not wait for each other: the second would find the disk other than its sender thinks.  Who waits
changes nothing meanwhile, and the beats of the stream tell the other side that it is alive.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from snapchain.errors import Busy
from snapchain.model.events import Notice, OnEvent
from snapchain.replica.endpoint import Endpoint
from snapchain.replica.store import ReplicaDisk, Work

LIMITS = {(Work.TRANSFER, Work.MERGE): 900.0, (Work.MERGE, Work.TRANSFER): 60.0, (Work.MERGE, Work.MERGE): 60.0}
"""Seconds that one kind of work waits for another."""
GRACE = 2.0
"""For all others, and until who has just got the disk has said for what."""
_POLL_SECONDS = 0.1


@contextmanager
def in_turn(disk: ReplicaDisk, work: Work, *, make: bool = False) -> Iterator[None]:
    """Hold the disk as `ReplicaDisk.locked` does, once those who hold it now are done.

    Raises Busy when that takes too long.
    """
    began = time.monotonic()
    with ExitStack() as stack:
        while True:
            try:
                stack.enter_context(disk.locked(make=make, work=work))
                break
            except Busy as error:
                theirs = disk.held_for()
                limit = LIMITS.get((work, theirs), GRACE)
                if time.monotonic() - began >= limit:
                    raise Busy(
                        f"another snapchain is changing this disk (a {theirs.value})",
                        subject=disk.directory,
                        hint="wait for it to end",
                    ) from error
            time.sleep(_POLL_SECONDS)
        yield


def waiting(endpoint: Endpoint, on_event: OnEvent) -> Callable[[], None]:
    """What to call at each sign of life that says nothing; it is told once."""
    told = False

    def tell() -> None:
        nonlocal told
        if not told:
            told = True
            on_event(Notice(f"{endpoint.url} makes us wait: another snapchain may be at work on that disk"))

    return tell
