"""What is at work in a bare QEMU besides its guest: block jobs, exports, backups by a filter, a migration."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from snapchain.guest.graph import DiskView
from snapchain.guest.protocol import Activity
from snapchain.guest.qmp import Monitor
from snapchain.guest.qmp_graph import word

OURS = "sc-"
"""Ids of jobs and names of nodes that snapchain made begin so."""
_MIGRATING = {
    "setup", "active", "pre-switchover", "device", "postcopy-active", "postcopy-paused", "postcopy-recover",
    "postcopy-recover-setup", "wait-unplug", "cancelling", "colo",
}  # fmt: skip


def at_work(monitor: Monitor, views: Sequence[DiskView]) -> list[Activity]:
    """All of it. views: the disks, looked at now"""
    return [*_jobs(monitor, views), *_exports(monitor), *_fleecing(views), *_migration(monitor)]


def _jobs(monitor: Monitor, views: Sequence[DiskView]) -> Iterator[Activity]:
    jobs = monitor.rows("query-jobs")
    linked = _nodes_of_jobs(monitor, views) if jobs else {}
    for each in jobs:
        name, kind = word(each, "id"), word(each, "type")
        yield _activity(name, kind, linked.get(name), f"block job {name} ({kind}, {word(each, 'status')})")


def _nodes_of_jobs(monitor: Monitor, views: Sequence[DiskView]) -> dict[str, str]:
    """Of each block job, a node that it works on, by QEMU's debugging view, where it has that one."""
    if not monitor.has("x-debug-query-block-graph"):
        return {}
    seen = monitor.fields("x-debug-query-block-graph")
    nodes, edges = seen.get("nodes"), seen.get("edges")
    if not isinstance(nodes, list) or not isinstance(edges, list):
        return {}
    named = {word(each, "id"): each for each in nodes if isinstance(each, Mapping)}
    chains = {layer.node for view in views for layer in view.disk.chain}
    found: dict[str, str] = {}
    for edge in edges:
        job = named.get(word(edge, "parent"), {}) if isinstance(edge, Mapping) else {}
        if job.get("type") == "block-job":
            node = word(named.get(word(edge, "child"), {}), "name")
            if node in chains:
                found.setdefault(word(job, "name"), node)
    return found


def _exports(monitor: Monitor) -> Iterator[Activity]:
    for each in monitor.rows("query-block-exports") if monitor.has("query-block-exports") else ():
        name, node = word(each, "id"), word(each, "node-name")
        yield _activity(name, "export", node, f"{word(each, 'type')} export {name} of node {node}")


def _migration(monitor: Monitor) -> Iterator[Activity]:
    status = word(monitor.fields("query-migrate"), "status")
    if status in _MIGRATING:
        yield Activity("migration", "migration", False, None, f"migration ({status})")


def _fleecing(views: Sequence[DiskView]) -> Iterator[Activity]:
    """Backups that are no jobs: a filter that copies what the guest is about to overwrite."""
    for view in views:
        for node, driver in zip(view.disk.filters, view.filter_drivers, strict=True):
            if driver == "copy-before-write":
                says = f"backup of {view.disk.name} (copy-before-write filter {node})"
                yield _activity(node, "backup", view.disk.chain[-1].node if view.disk.chain else None, says)


def _activity(name: str, kind: str, node: str | None, says: str) -> Activity:
    ours = name.startswith(OURS)
    return Activity(name, kind, ours, node, f"{says}, of {'snapchain' if ours else 'another program'}")
