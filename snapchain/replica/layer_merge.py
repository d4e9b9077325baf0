"""Which layers of a replica's disk are merged when points are dropped, and the merges themselves, where the disk is.

    layers    a   b   c   d   e | f      kept: the points on c and e; f came without a point yet
    become   [a   b   c] [d   e]  f      each under the name and id of its uppermost

A point is removed from the catalogue before any file that it needs is changed; its layers are when the files are one.
Open layers stay, and so do layers on which an image of the replica depends, such as the overlay of a guest; the others
are merged around them.  What lies above the newest point is a transfer that was cut off.

Where the newest point itself is dropped, no kept point needs the layers above the highest kept one.  These are cut off,
first of all: while one of them is in use, nothing is changed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, tzinfo
from pathlib import Path

from snapchain.errors import Busy, Conflict, InvalidInput, SnapchainError, Unavailable, Unsupported
from snapchain.host.files import free_bytes
from snapchain.host.locks import ImageLock, LockMode
from snapchain.host.openers import OpenFiles
from snapchain.host.os_errors import os_errors
from snapchain.merge.request import MergeRequest
from snapchain.merge.run import StepReport, run_step
from snapchain.merge.step import MergeStep, plan_step
from snapchain.model.collapse import collapse
from snapchain.model.events import Event, Progress
from snapchain.model.holds import hold_reasons
from snapchain.model.retention import Decision, Rules, decide_by
from snapchain.replica import names
from snapchain.replica.arrival import forget
from snapchain.replica.catalogue import Catalogue, Layer, Point
from snapchain.replica.layer_cut import cut, cuttable
from snapchain.replica.merge_journal import (
    begin,
    conclude,
    is_begun,
    is_under_way,
    others_on,
    real_path,
    unlocked,
    where_images_stand,
)
from snapchain.replica.store import ReplicaDisk

NOTHING = "nothing"
_REFUSALS = (Busy, Conflict, Unsupported, InvalidInput)
"""What one merge is refused with before anything is changed; the other merges are done all the same."""
OnBytes = Callable[[int, int], None]
Layers = tuple[Layer, ...]


@dataclass(frozen=True, slots=True)
class Stays:
    """A layer that no kept point needs and that stays, with the reason."""

    layer: Layer
    reason: str


@dataclass(frozen=True, slots=True)
class LayerMergePlan:
    """What is to be done to a disk.

    groups: layers that become one, lowest first, each with its merge; cut: uppermost layers that go
    cut_bytes: allocated by the files of these
    """

    catalogue: Catalogue
    decisions: tuple[Decision[Point], ...]
    groups: tuple[tuple[Layers, MergeStep], ...]
    stays: tuple[Stays, ...]
    free_bytes: int
    cut: Layers = ()
    cut_bytes: int = 0

    @property
    def layers_after(self) -> int:
        """How many are left."""
        return len(self.catalogue.layers) - len(self.cut) - sum(len(members) - 1 for members, _ in self.groups)

    @property
    def strategy(self) -> str:
        """Of all merges."""
        return "+".join(dict.fromkeys(planned.strategy.value for _, planned in self.groups)) or NOTHING


@dataclass(slots=True)
class LayerMergeResult:
    """What was done."""

    catalogue: Catalogue
    merged: list[Layers]
    strategies: list[str]
    stays: list[Stays]
    bytes_moved: int = 0
    bytes_freed: int = 0

    @property
    def strategy(self) -> str:
        """Of all merges."""
        return "+".join(dict.fromkeys(self.strategies)) or NOTHING


def plan(disk: ReplicaDisk, catalogue: Catalogue, rules: Rules, *, zone: tzinfo) -> LayerMergePlan:
    """Decide; changes nothing.

    Raises Corrupt when the files are not the chain that the catalogue names, Busy or Conflict where a layer would be
    cut off that is in use.
    """
    decisions = decide_by(
        catalogue.points, rules, disk=catalogue.disk, zone=zone, now=datetime.now(UTC), holds=hold_reasons
    )
    cut = _needless_top(catalogue, decisions)
    below = catalogue.layers[: len(catalogue.layers) - len(cut)]
    with cuttable(disk, cut) as files, os_errors(disk.directory):
        cut_bytes = sum(path.stat().st_blocks * 512 for path in files)
    stays: list[Stays] = []
    groups: list[tuple[Layers, MergeStep]] = []
    for members in _groups(disk, below, decisions, stays):
        try:
            groups.append((members, _planned(disk, catalogue, members)))
        except _REFUSALS as error:
            stays += [Stays(layer, error.message) for layer in members[:-1]]
    return LayerMergePlan(catalogue, decisions, tuple(groups), tuple(stays), free_bytes(disk.directory), cut, cut_bytes)


def _needless_top(catalogue: Catalogue, decisions: Sequence[Decision[Point]]) -> Layers:
    """The layers above the highest one that a kept point needs, where the layer of the newest point is among them."""
    places = {layer.id: place for place, layer in enumerate(catalogue.layers)}
    given = [places[each.point.layer] for each in decisions]
    needed = 1 + max((places[each.point.layer] for each in decisions if each.kept), default=-1)
    return catalogue.layers[needed:] if given and max(given) >= needed else ()


def run(disk: ReplicaDisk, planned: LayerMergePlan, *, on_bytes: OnBytes) -> LayerMergeResult:
    """Do it. The disk is locked since before the plan.

    on_bytes: called with the bytes moved so far, and their total; what it raises ends the work
    What is cut off is gone before anything is merged. Raises as `cut`, with nothing changed.
    Raises Unavailable when there is no room, before points are dropped; and as `run_step`: the next process that takes
    the lock settles that merge.
    """
    done = LayerMergeResult(planned.catalogue, [], [], list(planned.stays))
    if planned.cut:
        below = done.catalogue.layers[: -len(planned.cut)]
        forget(disk)
        done.catalogue = cut(disk, done.catalogue, below[-1].id if below else None)
        done.bytes_freed += planned.cut_bytes
    total = sum(each.bytes_to_move for _, each in planned.groups)
    for number, (members, first_look) in enumerate(planned.groups):
        before = done.bytes_moved

        def counted(count: int, _of: int, before: int = before) -> None:
            on_bytes(min(before + count, total), total)

        counted(0, 0)
        try:
            now = first_look if number == 0 and not planned.cut else _planned(disk, done.catalogue, members)
            _merge(disk, members, now, done, on_bytes=counted)
        except _REFUSALS as error:
            if is_under_way(disk):
                raise  # it was begun: it is settled before anything else
            done.stays += [Stays(layer, error.message) for layer in members[:-1]]
    kept = {each.point.point for each in planned.decisions if each.kept}
    _drop_points(disk, done, [point for point in done.catalogue.points if point.point not in kept])
    return done


def _groups(
    disk: ReplicaDisk, layers: Layers, decisions: Sequence[Decision[Point]], stays: list[Stays]
) -> list[Layers]:
    """The runs of layers that may become one. layers: without those that are cut off; stays: gets those left out."""
    if not decisions or not layers:
        return []
    places = {layer.id: place for place, layer in enumerate(layers)}
    kept = {each.point.layer for each in decisions if each.kept}
    # Above the newest point lies a transfer that was cut off; it goes on from its layers as they are.
    newest = max(places.get(each.point.layer, -1) for each in decisions)
    kept |= {layer.id for layer in layers[newest:]}
    wanted = [members for members in _grouped(layers, kept) if len(members) > 1]
    lower = [layer for members in wanted for layer in members[:-1]]
    upper = [members[-1] for members in wanted]
    used, opened = _dependents_of(disk, layers, lower), _open(disk, [*lower, *upper])
    stays += [Stays(layer, why) for layer in lower if (why := opened.get(layer.id) or used.get(layer.id))]
    # An open file is not merged, and the file below it is the uppermost of its own group.
    alone = {*opened, *(layers[places[layer] - 1].id for layer in opened if places[layer])}
    groups = [members for members in _grouped(layers, kept | used.keys() | alone) if len(members) > 1]
    gone = {layer.id for members in groups for layer in members[:-1]}
    known = {each.layer.id for each in stays}
    stays += [
        Stays(layer, "the layer above it, into which it would go, is open")
        for layer in lower
        if layer.id not in gone | known
    ]
    return groups


def _grouped(layers: Layers, keep: set[str]) -> list[Layers]:
    known = {layer.id: layer for layer in layers}
    return [tuple(known[member] for member in group.members) for group in collapse(list(known), keep)]


def _dependents_of(disk: ReplicaDisk, layers: Layers, lower: Sequence[Layer]) -> dict[str, str]:
    """The layers on which an image depends that is no layer itself, each with the reason."""
    ours: set[tuple[int, int]] = set()
    for path in (*(disk.path(layer.file) for layer in layers), disk.path(names.INCOMING)):
        with suppress(OSError):
            status = path.stat()
            ours.add((status.st_dev, status.st_ino))
    others = others_on(disk, [real_path(disk, layer) for layer in lower], own=ours)
    return {layer.id: why for layer in lower if (why := others.reason(real_path(disk, layer)))}


def _open(disk: ReplicaDisk, layers: Sequence[Layer]) -> dict[str, str]:
    """The layers that are open elsewhere, each with what has it open."""
    found: dict[str, str] = {}
    open_files = OpenFiles() if layers else None
    for layer in layers:
        try:
            ImageLock(real_path(disk, layer), LockMode.WRITE, open_files=open_files).release()
        except Busy as error:
            found[layer.id] = error.message
    return found


def _planned(disk: ReplicaDisk, catalogue: Catalogue, members: Layers) -> MergeStep:
    """Raises Conflict, Busy, Unsupported or InvalidInput for layers that cannot be merged."""
    step = plan_step(
        MergeRequest(
            image=real_path(disk, catalogue.layers[-1]),
            image_format="qcow2",
            image_dirs=tuple(where_images_stand(disk)),
            from_layer=str(real_path(disk, members[0])),
            to_layer=str(real_path(disk, members[-1])),
            unlocks=True,
        )
    )
    if step.keep:
        raise Conflict(step.keep[0].reason, subject=step.keep[0].path)
    return step


def _run(step: MergeStep, on_bytes: OnBytes) -> StepReport:
    """Merge the files, without notes beside them: the catalogue records the same."""
    moved = 0

    def on_event(event: Event) -> None:
        nonlocal moved
        if isinstance(event, Progress):
            # The proof moves nothing, but it too is reported, as a sign of life.
            moved = event.done if event.phase == "merge" else moved
            on_bytes(moved, step.bytes_to_move)

    return run_step(step, noted=False, on_event=on_event)


def _merge(
    disk: ReplicaDisk, members: Layers, planned: MergeStep, done: LayerMergeResult, *, on_bytes: OnBytes
) -> None:
    """Merge one group: its record, its points, its files, and the catalogue."""
    room = free_bytes(disk.directory)
    if planned.needs_bytes > room:
        raise Unavailable(
            f"the merged layer needs {planned.needs_bytes} bytes beside its inputs, and {room} are free",
            subject=disk.directory,
            hint=f"free {planned.needs_bytes - room} bytes more there, or keep more points",
        )
    begin(disk, members)
    lower = {layer.id for layer in members[:-1]}
    _drop_points(disk, done, [point for point in done.catalogue.points if point.layer in lower])
    paths: list[Path] = [real_path(disk, layer) for layer in members]
    try:
        with unlocked([paths[0], paths[-1]]):
            result = _run(planned, on_bytes)
    except SnapchainError:
        if not is_begun(paths):  # it has changed nothing: the layers are as they were
            done.catalogue = conclude(disk, done.catalogue, members)
        raise
    done.catalogue = conclude(disk, done.catalogue, members)
    done.merged.append(members)
    done.strategies.append(planned.strategy.value)
    done.bytes_moved += result.bytes_moved
    done.bytes_freed += result.bytes_freed


def _drop_points(disk: ReplicaDisk, done: LayerMergeResult, points: Sequence[Point]) -> None:
    """Remove points from the catalogue, durably."""
    if points:
        gone = {point.point for point in points}
        left = tuple(point for point in done.catalogue.points if point.point not in gone)
        done.catalogue = done.catalogue.after(points=left)
        disk.write(done.catalogue)
