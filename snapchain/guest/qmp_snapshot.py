"""Overlays in a bare QEMU: opened there first, switched to in one transaction, closed where nobody uses them.

New overlays are opened in QEMU first (`blockdev-add` with no backing), which may take a while.  One transaction then
makes them the active layers of all disks, in about a millisecond.  Their nodes have names of ours, which carry the
process that opened them: what a snapchain that died left open is found, and closed.
"""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from snapchain.errors import Busy, Conflict, SnapchainError, Unavailable, Unsupported
from snapchain.guest import graph
from snapchain.guest.graph import DiskView
from snapchain.guest.protocol import Activity, GuestDisk, Layer, NewOverlay, Outcome
from snapchain.guest.qemu_files import QemuFiles, drive_options
from snapchain.guest.qmp import Monitor, Refused
from snapchain.guest.qmp_activities import OURS, at_work
from snapchain.guest.qmp_graph import QmpGraph, named, word
from snapchain.guest.qmp_jobs import in_the_way
from snapchain.host.files import identity_of
from snapchain.host.process_identity import identity
from snapchain.image.backing import Place
from snapchain.image.file import ImageFile
from snapchain.image.opening import open_image
from snapchain.image.physical import RunBudget
from snapchain.model.events import Notice, OnEvent
from snapchain.model.extents import ABSENT

_OVERLAY_NODE = re.compile(r"sc-([0-9a-f]{1,8})-[0-9a-f]{12}")


class QmpOverlays:
    """Those of one QEMU. guest: its name"""

    def __init__(self, monitor: Monitor, block_graph: QmpGraph, guest: str, on_event: OnEvent) -> None:
        self._monitor, self._graph, self._guest, self._on_event = monitor, block_graph, guest, on_event
        self._opened: set[str] = set()

    @contextmanager
    def prepared(self, overlays: Sequence[NewOverlay]) -> Iterator[QmpSwitch]:
        """See `Guest`. Raises Conflict for an overlay that is not empty, or not of the disk's exact size.

        Raises Busy, Unsupported for a disk with an obstacle, NotFound for one that is not there.
        """
        self.close_orphans()
        process = self._graph.process()
        views = self._graph.views(process=process)
        chosen = [named(views, each.disk, self._guest) for each in overlays]
        self._check_idle([view.disk for view in chosen], at_work(self._monitor, views))
        switch = QmpSwitch(self._monitor, self._graph, self._guest, self._on_event)
        try:
            for overlay, view in zip(overlays, chosen, strict=True):
                self._open(overlay, view, process, switch)
            yield switch
        finally:
            switch.close()
            self._opened.clear()

    def _check_idle(self, disks: Sequence[GuestDisk], activities: Sequence[Activity]) -> None:
        """Raises Busy for what others do in a disk, and Unsupported for its obstacles."""
        for disk in disks:
            if disk.left_out is not None or disk.obstacle is not None:
                why = disk.obstacle or f"it is not a disk to protect ({disk.left_out})"
                raise Unsupported(f"no snapshot of a running guest can be taken: {why}", subject=self._label(disk))
        for activity in activities:
            if activity.is_ours or activity.kind == "export":  # whether an export is in the way, QEMU decides
                continue
            for disk in disks:
                if activity.node is None or activity.node in {layer.node for layer in disk.chain}:
                    raise Busy(activity.says, subject=self._label(disk), hint="wait until it has ended, or end it")

    def _label(self, disk: GuestDisk) -> str:
        return f"{self._guest}/{disk.name}"

    def _open(self, overlay: NewOverlay, view: DiskView, process: QemuFiles, switch: QmpSwitch) -> None:
        identity = _check_overlay(overlay, view.disk)
        options = drive_options(process.argv, {text for layer in view.disk.chain for text in _mentions(layer)})
        node = f"{OURS}{os.getpid():x}-{secrets.token_hex(6)}"
        switch.add(_Opened(node, view.disk.active.node, identity))
        self._opened.add(node)
        description = overlay_node(node, overlay.path, view, options)
        try:
            self._monitor.execute("blockdev-add", description)
        except Refused as refused:
            if "aio" not in options:
                raise _not_opened(refused, overlay.path) from refused
            # This QEMU, or the filesystem of the new file, lacks what the old one has.
            description["file"].pop("aio")
            try:
                self._monitor.execute("blockdev-add", description)
            except Refused as again:
                raise _not_opened(again, overlay.path) from again
        opened = QemuFiles(process.pid).open_files
        if opened is not None and identity not in opened:
            raise Conflict(
                "QEMU opened another file under this path",
                subject=overlay.path,
                hint="QEMU sees other directories than snapchain does, as in a container: run snapchain there",
            )

    def close_orphans(self) -> None:
        """Close overlays that a snapchain which is no more opened in QEMU, and layers of ours that left their chains.

        QEMU refuses to close what something still uses.
        """
        nodes = self._graph.nodes()
        ours = [name for each in nodes or () if (name := word(each, "node-name")).startswith(OURS)]
        if not ours:
            return
        used = self._graph.nodes_in_use()
        for name in ours:
            made_by = _OVERLAY_NODE.fullmatch(name)
            if made_by is None or name in used or name in self._opened:
                continue
            pid = int(made_by[1], 16)
            if pid == os.getpid() or identity(pid) is None:
                self._close(name)

    def release(self, unused: Sequence[Path]) -> None:
        """See `Guest`. Also closes what any snapchain that is no more left open.

        A merged layer that QEMU opened under a name, such as the image of its command line, stays open until then.
        """
        self.close_orphans()
        files = {identity_of(each) for each in unused} - {None}
        used = self._graph.nodes_in_use()
        # A format node before the node of its file, which it uses.
        for node in sorted(self._graph.nodes() or (), key=lambda each: each.get("drv") in {"file", "host_device"}):
            name, path = word(node, "node-name"), graph.source_of(word(node, "file")).path
            if name not in used and path is not None and identity_of(Path(path)) in files:
                self._close(name)

    def _close(self, node: str) -> None:
        with suppress(Refused):  # something still uses it
            self._monitor.execute("blockdev-del", {"node-name": node})


@dataclass(frozen=True, slots=True)
class _Opened:
    """An overlay that is open in QEMU as `node`, for the disk whose active layer was `under`."""

    node: str
    under: str
    identity: tuple[int, int]


class QmpSwitch:
    """See `Switch`."""

    def __init__(self, monitor: Monitor, block_graph: QmpGraph, guest: str, on_event: OnEvent) -> None:
        self._monitor, self._graph, self._guest, self._on_event = monitor, block_graph, guest, on_event
        self._overlays: list[_Opened] = []

    def add(self, overlay: _Opened) -> None:
        """One more, before it is opened: its answer may be lost."""
        self._overlays.append(overlay)

    def run(self) -> None:
        """See `Switch`. The graph is looked at later: the guest's filesystems may be frozen now."""
        actions = [
            {"type": "blockdev-snapshot", "data": {"node": each.under, "overlay": each.node}} for each in self._overlays
        ]
        try:
            self._monitor.execute("transaction", {"actions": actions})
        except Refused as refused:
            raise in_the_way(refused) from refused

    def outcome(self) -> Outcome:
        """See `Switch`. DONE as soon as one overlay is part of a chain: a transaction does all or nothing."""
        in_use = {layer.identity for view in self._graph.views() for layer in view.disk.chain}
        return Outcome.DONE if any(each.identity in in_use for each in self._overlays) else Outcome.NOT_DONE

    def close(self) -> None:
        """Close what the guest does not use. What cannot be closed now, the next snapshot closes."""
        try:
            used = self._graph.nodes_in_use()
            for each in self._overlays:
                if each.node not in used:
                    with suppress(Refused):  # it was never opened
                        self._monitor.execute("blockdev-del", {"node-name": each.node})
        except SnapchainError as error:
            self._on_event(Notice.of(self._guest, f"new overlays may still be open in QEMU: {error}"))


def overlay_node(node: str, path: Path, view: DiskView, options: Mapping[str, str]) -> dict[str, Any]:
    """The arguments of `blockdev-add` for an overlay: cached, read and discarded as the active layer it will cover.

    options: aio and discard, from the command line
    """
    cache = {"direct": view.direct, "no-flush": view.no_flush}
    file = {"driver": "file", "filename": str(path), "cache": cache}
    if "aio" in options:
        file["aio"] = options["aio"]
    discard = options.get("discard", "unmap")
    zeroes = view.detect_zeroes if discard == "unmap" or view.detect_zeroes != "unmap" else "on"
    return {
        "driver": "qcow2",
        "node-name": node,
        "backing": None,
        "cache": cache,
        "discard": discard,
        "detect-zeroes": zeroes,
        "file": file,
    }


def _check_overlay(overlay: NewOverlay, disk: GuestDisk) -> tuple[int, int]:
    """The identity of an overlay that fits the disk. QEMU would take one that is smaller, or holds data. Raises."""
    active = disk.active
    try:
        str(overlay.path).encode()
    except UnicodeEncodeError as error:
        raise Unsupported(
            "QMP cannot name a path that is not UTF-8",
            subject=overlay.path,
            hint="rename the image while the guest is off",
        ) from error
    if identity_of(overlay.backing) != active.identity or active.identity is None:
        raise Conflict(
            f"the active layer of {disk.name} is {active.path}, not {overlay.backing}",
            subject=overlay.path,
            hint="something changed the chain meanwhile: run the command again",
        )
    place = Place.of(overlay.path)
    fd = open_image(place.real, subject=overlay.path)
    with ImageFile(place, fd, format="qcow2", budget=RunBudget()) as file:
        backing = file.backing
        if file.size != active.virtual_size:
            raise Conflict(
                f"the overlay has {file.size} bytes, and the disk {active.virtual_size}", subject=overlay.path
            )
        if backing is None or ":" in backing.name.split("/", 1)[0]:
            raise Conflict("the overlay names no backing file", subject=overlay.path)
        if identity_of(overlay.path.parent / backing.name) != active.identity or backing.format != active.image_format:
            raise Conflict(
                f"the overlay is based on {backing.name} ({backing.format}), not on {active.path}"
                f" ({active.image_format})",
                subject=overlay.path,
            )
        if (file.extents.val != ABSENT).any():
            raise Conflict("the overlay is not empty", subject=overlay.path)
        return file.device


def _not_opened(refused: Refused, path: Path) -> SnapchainError:
    hint = "give the new file the owner and mode of the old one" if "denied" in refused.words.lower() else None
    return Unavailable(f"QEMU cannot open the new overlay: {refused.words}", subject=path, hint=hint)


def _mentions(layer: Layer) -> Iterator[str]:
    yield layer.node
    if layer.path is not None:
        yield str(layer.path)
