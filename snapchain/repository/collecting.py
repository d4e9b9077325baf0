"""Collecting: free the space of data that no point needs."""

from __future__ import annotations

from snapchain.destination.records import Finding, Findings, GcLimits, GcPlan, GcReport
from snapchain.model.events import Notice, OnEvent, Progress, Unit, ignore
from snapchain.objects.store import ObjectStore, Refused
from snapchain.repository.format import fresh_id
from snapchain.repository.leases import Mode
from snapchain.repository.locked import Locked
from snapchain.repository.mark import Marked, mark
from snapchain.repository.repository import Repository
from snapchain.repository.sweep import ANY, deletable, estimate, index_objects, sweep
from snapchain.repository.verification import points_on

PATIENCE = 60.0
"""Seconds that gc waits for writers that may need what is to go: what it cannot delete then goes the next time."""


def plan(repository: Repository, limits: GcLimits = ANY) -> GcPlan:
    """Look, and delete nothing. Raises Corrupt when the catalogue of a disk is unsound."""
    marked = mark(repository)
    locked = Locked(repository.store).among(deletable(marked, limits))
    would = estimate(marked, limits, index_objects(repository), locked)
    return GcPlan(
        destination=repository.store.url,
        bytes_freed=would.bytes_freed,
        bytes_moved=would.bytes_moved,
        objects_deleted=would.objects_deleted,
        packs_deleted=would.packs_deleted,
        packs_moved=would.packs_moved,
        bytes_in_use=sum(pack.used_bytes for pack in marked.usage),
        bytes_locked=would.bytes_locked,
        objects_locked=would.objects_locked,
        locked_until=would.locked_until,
        findings=_findings(marked),
    )


def run(repository: Repository, limits: GcLimits = ANY, *, on_event: OnEvent = ignore) -> GcReport:
    """Collect beside writers and readers: what they may need is left for the next run. No earlier plan is relied on.

    Raises Refused, and moves nothing, where objects cannot be deleted, and Busy while another collector is at work, or
    a writer of a program that knows collectors as working alone.
    """
    deleted = 0

    def on_wait(words: str) -> None:
        on_event(Notice(words))

    def on_object() -> None:
        nonlocal deleted
        deleted += 1
        on_event(Progress("gc", deleted, None, Unit.OBJECTS))

    _check_deletes(repository.store)
    with repository.lease(Mode.COLLECT, "gc", on_wait=on_wait, spends=True) as lease:
        done = sweep(repository, lease, limits, patience=PATIENCE, on_object=on_object, on_wait=on_wait)
    return GcReport(
        destination=repository.store.url,
        bytes_freed=done.bytes_freed,
        bytes_added=done.bytes_added,
        bytes_moved=done.bytes_moved,
        objects_deleted=done.objects_deleted,
        packs_deleted=done.packs_deleted,
        packs_moved=done.packs_moved,
        bytes_left=done.bytes_left,
        waits_for=done.waits_for,
        bytes_locked=done.bytes_locked,
        objects_locked=done.objects_locked,
        locked_until=done.locked_until,
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
