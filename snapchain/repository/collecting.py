"""Collecting: free the space of data that no point needs."""

from __future__ import annotations

from snapchain.destination.records import Finding, Findings, GcPlan, GcReport
from snapchain.model.events import Notice, OnEvent, Progress, Unit, ignore
from snapchain.objects.store import ObjectStore, Refused
from snapchain.repository.format import fresh_id
from snapchain.repository.leases import Mode
from snapchain.repository.mark import Marked, mark
from snapchain.repository.repository import Repository
from snapchain.repository.sweep import estimate, index_objects, sweep
from snapchain.repository.verification import points_on


def plan(repository: Repository) -> GcPlan:
    """Look, and delete nothing. Raises Corrupt when the catalogue of a disk is unsound."""
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
        findings=_findings(marked),
    )


def run(repository: Repository, *, on_event: OnEvent = ignore) -> GcReport:
    """Collect, alone: waits for writers, and makes them wait. Raises Busy when they take too long.

    Readers continue: data that they read is left for the next run.  An earlier plan is not relied on.
    Raises Refused, and moves nothing, where objects cannot be deleted.
    """
    deleted = 0

    def on_object() -> None:
        nonlocal deleted
        deleted += 1
        on_event(Progress("gc", deleted, None, Unit.OBJECTS))

    _check_deletes(repository.store)
    with repository.lease(Mode.COLLECT, "gc", on_wait=lambda words: on_event(Notice(words)), spends=True) as lease:
        done = sweep(repository, lease, on_object=on_object)
    return GcReport(
        destination=repository.store.url,
        bytes_freed=done.bytes_freed,
        bytes_added=done.bytes_added,
        bytes_moved=done.bytes_moved,
        objects_deleted=done.objects_deleted,
        packs_deleted=done.packs_deleted,
        packs_moved=done.packs_moved,
        findings=_findings(done.marked) if done.marked else (),
    )


def _check_deletes(store: ObjectStore) -> None:
    """Ask whether objects may be deleted, by one that is not there. Raises Refused when not."""
    try:
        store.delete(f"probe/{fresh_id()}")
    except Refused as error:
        raise Refused(
            f"gc must delete objects and is not allowed to: {error.message}", subject=store.url, hint=error.hint
        ) from error


def _findings(marked: Marked) -> tuple[Finding, ...]:
    """What is lost, by disk and layer, each thing once."""
    found = Findings()
    for catalogue in marked.catalogues:
        affected = points_on(catalogue)
        for layer in catalogue.parents:
            if layer in marked.lost and not marked.lost[layer]:
                found.add_further(catalogue.disk, affected.get(layer, ()))
            for error in marked.lost.get(layer, ()):
                found.add(Finding.of(error, catalogue.disk, affected.get(layer, ())))
    return found.all()
