"""The fence: after it, nobody who stood still since before can publish what a collection is about to take away.

A writer asks for its lease, and then creates the next generation of its disk.  Between the two it may be frozen for any
time (a stopped virtual machine, a request on its way), and no clock of its own tells.  So the collector takes the
number that the writer is about to create: it publishes each disk's catalogue once more, as it is, based on the very
generation that it has marked.  Who was faster is seen as a conflict, and marked; who is slower gets one, and asks
for its lease again, which is gone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from datetime import UTC, datetime

from snapchain.repository.collect import Marked
from snapchain.repository.repository import Repository


def fence(repository: Repository, marked: Marked, dead_disks: Iterable[str], check: Callable[[], None]) -> None:
    """Publish the next generation of every disk that was marked, and the first of others.

    dead_disks: names of those that holders of dead leases may be about to make; check: see `sweep`.
    Raises Conflict when a disk was changed since it was marked: mark again.
    """
    check()
    for place, current in enumerate(marked.newest):
        disk = repository.disk(current[0].disk)
        marked.newest[place] = disk.advance(current, time=datetime.now(UTC))
    known = {catalogue.disk for catalogue in marked.catalogues}
    for name in set(dead_disks) - known:
        marked.newest.append(repository.disk(name).advance(None, time=datetime.now(UTC)))
