"""The fence: who stood still since before it can no longer publish what a collection is about to take away.

A writer asks for its lease, and then creates the next generation of its disk.  Between the two it may be frozen for any
time (a stopped virtual machine, a request on its way), and no clock of its own tells.  So a collector first says that
the lease has ended: whoever asks from then on gives up.  Then it takes the number that the writer is about to create:
it publishes the disk's newest catalogue once more, as it is.  Who was faster is seen by the look at all generations
that follows; who is slower finds its number taken, and asks for its lease again.

Writers that live are not disturbed: they find a newer generation with the same content, and go on.
"""

from __future__ import annotations

from collections.abc import Collection
from datetime import UTC, datetime

from snapchain.errors import Conflict
from snapchain.repository.catalogue import ATTEMPTS, Disk
from snapchain.repository.leases import Holder, Lease, Mode
from snapchain.repository.repository import Repository


def bury(repository: Repository, lease: Lease) -> None:
    """Make an end of all dead leases that a collector's lease has found. Raises as the store, and Conflict.

    Where it is interrupted, the leases are still there, and the next collector does it again.
    """
    writers = {name: holder for name, holder in lease.dead.items() if _may_publish(name, holder)}
    for name, holder in writers.items():
        if holder is None or not holder.is_gone:  # a process that is gone puts nothing any more
            lease.end(name)
    for disk in _disks(repository, writers.values()):
        _take_number(repository.disk(disk), lease)
    for name in lease.dead:
        lease.bury(name)


def bury_harmless(lease: Lease) -> int:
    """Delete those dead leases whose holders publish nothing: this needs no room. Gives how many."""
    harmless = [name for name, holder in lease.dead.items() if not _may_publish(name, holder)]
    for name in harmless:
        lease.bury(name)
    return len(harmless)


def _may_publish(name: str, holder: Holder | None) -> bool:
    """Whether a holder may be about to create a generation. What a collector moves, it moves under a writer's lease."""
    if name.startswith(Mode.READ.prefix):
        return False
    return not (name.startswith(Mode.COLLECT.prefix) and holder is not None and holder.beside_writers)


def _disks(repository: Repository, holders: Collection[Holder | None]) -> list[str]:
    """The names of the disks to which they may publish."""
    named = {disk for holder in holders if holder is not None for disk in holder.disks}
    if any(holder is None or not holder.disks for holder in holders):
        named.update(catalogue.disk for catalogue in repository.catalogues())
    return sorted(named)


def _take_number(disk: Disk, lease: Lease) -> None:
    for attempt in range(ATTEMPTS):
        lease.check()
        try:
            disk.advance(disk.read(), time=datetime.now(UTC))
        except Conflict:  # somebody was faster: what it published counts, and the next number is to be taken
            if attempt == ATTEMPTS - 1:
                raise
        else:
            return
