"""gc: give back the space of what no point needs."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from snapchain.ops.events import Notice, OnEvent, Progress, Unit, ignore
from snapchain.repository.collect import mark
from snapchain.repository.leases import Mode
from snapchain.repository.repository import Repository
from snapchain.repository.sweep import estimate, index_objects, sweep


class GcPlan(BaseModel):
    """What `gc` would do, in stored bytes, less the few that new records cost."""

    model_config = ConfigDict(frozen=True)

    destination: str
    bytes_freed: int
    bytes_moved: int
    objects_deleted: int
    packs_deleted: int
    packs_moved: int
    bytes_in_use: int


class GcReport(BaseModel):
    """What `gc` did. bytes_freed: stored bytes less than before; bytes_moved: copied out of mostly wasted packs.

    bytes_added: stored bytes more than before, where new records cost more than what was deleted
    """

    model_config = ConfigDict(frozen=True)

    destination: str
    bytes_freed: int
    bytes_added: int = 0
    bytes_moved: int
    objects_deleted: int
    packs_deleted: int
    packs_moved: int


def plan(repository: Repository) -> GcPlan:
    """Look, and delete nothing. Raises Corrupt when a record in use is missing or unsound."""
    marked = mark(repository)
    would = estimate(marked, index_objects(repository))
    return GcPlan(
        destination=repository.store.url,
        bytes_freed=would.bytes_freed,
        bytes_moved=would.bytes_moved,
        objects_deleted=would.objects_deleted,
        packs_deleted=would.packs_deleted,
        packs_moved=would.packs_moved,
        bytes_in_use=sum(pack.used_bytes for pack in marked.usage),
    )


def run(repository: Repository, *, on_event: OnEvent = ignore) -> GcReport:
    """Collect, alone: waits for writers, and makes them wait. Raises Busy when they take too long.

    Readers go on: what they read is left for another time.  What a plan saw earlier is not relied on.
    """
    deleted = 0

    def on_object() -> None:
        nonlocal deleted
        deleted += 1
        on_event(Progress("gc", deleted, None, Unit.OBJECTS))

    with repository.lease(Mode.COLLECT, "gc", on_wait=lambda words: on_event(Notice(words))) as lease:
        done = sweep(repository, lease, on_object=on_object)
    return GcReport(
        destination=repository.store.url,
        bytes_freed=done.bytes_freed,
        bytes_added=done.bytes_added,
        bytes_moved=done.bytes_moved,
        objects_deleted=done.objects_deleted,
        packs_deleted=done.packs_deleted,
        packs_moved=done.packs_moved,
    )
