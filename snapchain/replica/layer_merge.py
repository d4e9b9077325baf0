"""Merging the layers of a disk that no kept point needs, where the disk is: which, and around what.

    layers    a   b   c   d   e | f      kept: the points on c and e; f came without a point yet
    become   [a   b   c] [d   e]  f      each under the name and id of its uppermost

Points go from the catalogue before the first file is touched that they need; their layers when the files are one.
Open layers stay, and so do those on which an image of the replica depends, such as the overlay of a
guest; the others are merged around them.  What lies above the newest point is a transfer that was cut off.
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
from snapchain.model.collapse import collapse
from snapchain.model.retention import Decision, Policy, decide
from snapchain.replica import names
from snapchain.replica.catalogue import Catalogue, Layer, Point
from snapchain.replica.holds import reasons
from snapchain.replica.merge_journal import (
    Engine,
    Planned,
    begin,
    conclude,
    is_under_way,
    others_on,
    real_path,
    unlocked,
    where_images_stand,
)
from snapchain.replica.store import ReplicaDisk

NOTHING = "nothing"
_GOES_ROUND = (Busy, Conflict, Unsupported, InvalidInput)
"""What an engine refuses one merge with, before anything is changed; the others are not the worse for it."""
OnBytes = Callable[[int, int], None]
Layers = tuple[Layer, ...]


@dataclass(frozen=True, slots=True)
class Stays:
    """A layer that no kept point needs, and why it is left alone."""

    layer: Layer
    reason: str


@dataclass(frozen=True, slots=True)
class Collapsing:
    """What is to be done to a disk. groups: layers that become one, lowest first, each with what that takes."""

    catalogue: Catalogue
    decisions: tuple[Decision[Point], ...]
    groups: tuple[tuple[Layers, Planned], ...]
    stays: tuple[Stays, ...]
    free_bytes: int

    @property
    def layers_after(self) -> int:
        """How many are left."""
        return len(self.catalogue.layers) - sum(len(members) - 1 for members, _ in self.groups)

    @property
    def strategy(self) -> str:
        """Of all merges."""
        return "+".join(dict.fromkeys(planned.strategy for _, planned in self.groups)) or NOTHING


@dataclass(slots=True)
class Collapsed:
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


def plan(disk: ReplicaDisk, catalogue: Catalogue, policy: Policy, *, zone: tzinfo, engine: Engine) -> Collapsing:
    """Look, and decide; changes nothing.

    Raises Corrupt when the files are not the chain that they should be.
    """
    decisions = decide(catalogue.points, policy, zone=zone, now=datetime.now(UTC), holds=reasons)
    stays: list[Stays] = []
    groups: list[tuple[Layers, Planned]] = []
    for members in _groups(disk, catalogue, decisions, stays):
        try:
            groups.append((members, _planned(disk, catalogue, members, engine)))
        except _GOES_ROUND as error:
            stays += [Stays(layer, error.message) for layer in members[:-1]]
    return Collapsing(catalogue, decisions, tuple(groups), tuple(stays), free_bytes(disk.directory))


def run(disk: ReplicaDisk, planned: Collapsing, *, engine: Engine, on_bytes: OnBytes) -> Collapsed:
    """Do it. The disk is locked since before the plan.

    on_bytes: told how much is moved, and of how much; what it raises ends the work
    Raises Unavailable when there is no room, before the points go that need what would be merged; what the engine
    raises: the next who comes settles that.
    """
    done = Collapsed(planned.catalogue, [], [], list(planned.stays))
    total = sum(each.bytes_to_move for _, each in planned.groups)
    for number, (members, first_look) in enumerate(planned.groups):
        before = done.bytes_moved

        def told(count: int, _of: int, before: int = before) -> None:
            on_bytes(min(before + count, total), total)

        told(0, 0)
        try:
            now = first_look if number == 0 else _planned(disk, done.catalogue, members, engine)
            _merge(disk, members, now, done, engine=engine, on_bytes=told)
        except _GOES_ROUND as error:
            if is_under_way(disk):
                raise  # it was begun, and comes first
            done.stays += [Stays(layer, error.message) for layer in members[:-1]]
    kept = {each.point.point for each in planned.decisions if each.kept}
    _drop_points(disk, done, [point for point in done.catalogue.points if point.point not in kept])
    return done


def _groups(
    disk: ReplicaDisk, catalogue: Catalogue, decisions: Sequence[Decision[Point]], stays: list[Stays]
) -> list[Layers]:
    """The runs of layers that may become one; `stays`: takes in what is gone round."""
    layers = catalogue.layers
    if not decisions or not layers:
        return []
    places = {layer.id: place for place, layer in enumerate(layers)}
    kept = {each.point.layer for each in decisions if each.kept}
    # Above the newest point lies what a transfer has brought so far, which will want its layers as they are.
    newest = max(places[each.point.layer] for each in decisions)
    kept |= {layer.id for layer in layers[newest:]}
    wanted = [members for members in _collapsed(layers, kept) if len(members) > 1]
    lower = [layer for members in wanted for layer in members[:-1]]
    upper = [members[-1] for members in wanted]
    used, opened = _dependents_of(disk, layers, lower), _open(disk, [*lower, *upper])
    stays += [Stays(layer, why) for layer in lower if (why := opened.get(layer.id) or used.get(layer.id))]
    # An open file keeps to itself, so that the one below it is the uppermost of its own.
    alone = {*opened, *(layers[places[layer] - 1].id for layer in opened if places[layer])}
    groups = [members for members in _collapsed(layers, kept | used.keys() | alone) if len(members) > 1]
    gone = {layer.id for members in groups for layer in members[:-1]}
    told = {each.layer.id for each in stays}
    stays += [
        Stays(layer, "the layer above it, into which it would go, is open")
        for layer in lower
        if layer.id not in gone | told
    ]
    return groups


def _collapsed(layers: Layers, keep: set[str]) -> list[Layers]:
    known = {layer.id: layer for layer in layers}
    return [tuple(known[member] for member in group.members) for group in collapse(list(known), keep)]


def _dependents_of(disk: ReplicaDisk, layers: Layers, lower: Sequence[Layer]) -> dict[str, str]:
    """Those of the layers on which an image stands that is no layer, each with the reason."""
    ours: set[tuple[int, int]] = set()
    for path in (*(disk.path(layer.file) for layer in layers), disk.path(names.INCOMING)):
        with suppress(OSError):
            status = path.stat()
            ours.add((status.st_dev, status.st_ino))
    others = others_on(disk, [real_path(disk, layer) for layer in lower], own=ours)
    return {layer.id: why for layer in lower if (why := others.reason(real_path(disk, layer)))}


def _open(disk: ReplicaDisk, layers: Sequence[Layer]) -> dict[str, str]:
    """Those of the layers that somebody has open, each with who."""
    found: dict[str, str] = {}
    open_files = OpenFiles() if layers else None
    for layer in layers:
        try:
            ImageLock(real_path(disk, layer), LockMode.WRITE, open_files=open_files).release()
        except Busy as error:
            found[layer.id] = error.message
    return found


def _planned(disk: ReplicaDisk, catalogue: Catalogue, members: Layers, engine: Engine) -> Planned:
    tip = catalogue.layers[-1]
    return engine.plan(
        real_path(disk, tip),
        [real_path(disk, layer) for layer in members],
        image_dirs=where_images_stand(disk),
    )


def _merge(
    disk: ReplicaDisk, members: Layers, planned: Planned, done: Collapsed, *, engine: Engine, on_bytes: OnBytes
) -> None:
    """One group, from the record that tells of it to the catalogue that has it."""
    room = free_bytes(disk.directory)
    if planned.needs_bytes > room:
        raise Unavailable(
            f"the merged layer needs {planned.needs_bytes} bytes beside those that it is made of, and {room} are free",
            subject=disk.directory,
            hint=f"free {planned.needs_bytes - room} bytes more there, or keep more points",
        )
    begin(disk, members)
    lower = {layer.id for layer in members[:-1]}
    _drop_points(disk, done, [point for point in done.catalogue.points if point.layer in lower])
    paths: list[Path] = [real_path(disk, layer) for layer in members]
    try:
        with unlocked([paths[0], paths[-1]]):
            result = planned.run(on_bytes=on_bytes)
    except SnapchainError:
        if not engine.pending(paths):  # it has changed nothing: the layers are as they were
            done.catalogue = conclude(disk, done.catalogue, members)
        raise
    done.catalogue = conclude(disk, done.catalogue, members)
    done.merged.append(members)
    done.strategies.append(planned.strategy)
    done.bytes_moved += result.bytes_moved
    done.bytes_freed += result.bytes_freed


def _drop_points(disk: ReplicaDisk, done: Collapsed, points: Sequence[Point]) -> None:
    """They are not promised any more, durably."""
    if points:
        gone = {point.point for point in points}
        left = tuple(point for point in done.catalogue.points if point.point not in gone)
        done.catalogue = done.catalogue.after(points=left)
        disk.write(done.catalogue)
