"""A snapshot of all disks of a guest at one instant.

    web1.qcow2                 ->  web1.qcow2       sealed: it keeps its path, since QEMU reopens a file by its name
                                   web1.1.qcow2     an empty overlay on it, beside it: what the guest writes to now

    record, fsync -> overlays, fsync -> opened in QEMU -> freeze -> one transaction -> thaw -> seen in the graph and in
    the files -> notes of the sealed files -> record removed

Everything that takes time is done before the freeze.  What a killed run leaves, the next run or `doctor` finds by the
record, and judges by the guest's block graph: the overlays are its active layers, all of them, or none is, and then
they are removed.  A guest that is off has images at rest: they are sealed in place (source/sealing.py).
"""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from snapchain.errors import Busy, Conflict, InvalidInput, NotFound, Unavailable, Unsupported
from snapchain.guest import journal, overlays
from snapchain.guest.disks import no_such_disk
from snapchain.guest.protocol import Guest, GuestDisk, JobKind, NewOverlay, Outcome, State
from snapchain.guest.quiesce import Quiesced, frozen, with_hooks
from snapchain.host import files, hooks
from snapchain.host.directory import open_behind
from snapchain.host.os_errors import os_errors
from snapchain.host.path_resolution import place_to_change
from snapchain.image.file import Format
from snapchain.image.qcow2.header import Qcow2Header, read_header
from snapchain.model.consistency import Consistency
from snapchain.model.events import Notice, OnEvent, ignore
from snapchain.model.extents import Extents
from snapchain.model.points import check_label
from snapchain.source.at_rest import ImageAtRest, OfflineSet
from snapchain.source.notes import Notes
from snapchain.source.ownership import check_no_layer

_SLACK = 4 << 20
"""Bytes that a new overlay needs at most, besides what the guest will write: its header and its L1 table."""


_LONG_CHAIN = 50
"""Layers from which on a merge is recommended: QEMU's time for a look at its chains grows with their cube."""


class Quiesce(StrEnum):
    """Whether the guest agent freezes the filesystems."""

    AUTO = "auto"
    """If there is an agent that answers; else the point is crash-consistent."""
    REQUIRE = "require"
    NO = "no"


@dataclass(frozen=True, slots=True, kw_only=True)
class SnapshotRequest:
    """disks: names, empty for all that can be protected; labels: of the sealed files

    freeze_seconds: deadline for the freeze; bound_seconds: the longest that the guest may stay frozen, whatever happens
    pre_freeze, post_thaw: programs of this host, argument lists; hook_seconds: how long each may take
    image_dirs: as `scan` takes them
    """

    disks: Sequence[str] = ()
    quiesce: Quiesce = Quiesce.AUTO
    labels: Sequence[str] = ()
    freeze_seconds: float = 10.0
    bound_seconds: float = 30.0
    pre_freeze: Sequence[str] = ()
    post_thaw: Sequence[str] = ()
    hook_seconds: float = hooks.SECONDS
    image_dirs: Sequence[Path] = ()


class _Shown(BaseModel):
    model_config = ConfigDict(frozen=True)


class DiskToSeal(_Shown):
    """sealed: the active layer, which keeps its path; overlay: what the guest will write to. Sizes in bytes.

    Of a guest that is off it is the other way round: `sealed` is the new name, and the overlay gets the old one.
    """

    disk: str
    sealed: Path
    sealed_format: Format
    overlay: Path
    virtual_size: int
    layers: int


class LeftOut(_Shown):
    """A disk that is not taken, and why, in a word or a sentence."""

    disk: str
    reason: str


class GuestSnapshotPlan(_Shown):
    """What `run` will do. quiesces: whether a freeze will be tried; layers: of each chain afterwards

    is_off: the guest does not run, so its images are sealed at rest
    """

    guest: str
    option: str
    disks: tuple[DiskToSeal, ...]
    left_out: tuple[LeftOut, ...]
    quiesces: bool
    labels: tuple[str, ...]
    is_off: bool = False


class GuestSnapshot(_Shown):
    """What was done. instant: 32 hex digits, one for all disks; consistency: that was reached

    why_not: why it is not filesystem-consistent where that was tried; frozen_seconds: how long the guest was frozen
    starts_with: the guest must be started with the overlays the next time, which snapchain cannot enforce
    """

    guest: str
    instant: str
    time: datetime
    consistency: Consistency
    why_not: str | None = None
    frozen_seconds: float | None = None
    disks: tuple[DiskToSeal, ...]
    left_out: tuple[LeftOut, ...] = ()
    starts_with: tuple[Path, ...] = ()


# --- Plan.


def plan(guest: Guest, request: SnapshotRequest) -> GuestSnapshotPlan:
    """Look and decide; changes nothing. Raises NotFound, Busy, Unsupported for a disk that cannot be taken."""
    return _planned(guest, request)[0]


def _planned(guest: Guest, request: SnapshotRequest) -> tuple[GuestSnapshotPlan, list[GuestDisk]]:
    """The plan, and its disks as they are."""
    _check_request(request)
    state = guest.state()
    if state is State.INCOMING:
        raise Busy(
            "the guest waits for a migration, or was migrated away: its images are not its own now",
            subject=guest.name,
            hint="run it on the host where the guest runs",
        )
    disks = guest.disks()
    taken, left_out = _chosen(guest, disks, request)
    if state is State.OFF:
        sealed = [_at_rest(disk, request) for disk in taken]
    else:
        _check_idle(guest, disks, taken)
        names: set[Path] = set()
        sealed = [_live(guest, disk, names) for disk in taken]
        _check_room(sealed)
    planned = GuestSnapshotPlan(
        guest=guest.name,
        option=guest.option,
        disks=tuple(sealed),
        left_out=left_out,
        quiesces=request.quiesce is not Quiesce.NO and state is not State.OFF,
        labels=tuple(request.labels),
        is_off=state is State.OFF,
    )
    return planned, taken


def _check_request(request: SnapshotRequest) -> None:
    for label in request.labels:
        check_label(label)
    for seconds in (request.freeze_seconds, request.bound_seconds, request.hook_seconds):
        if not 0 < seconds < float("inf"):
            raise InvalidInput(
                "a time limit must be a positive number of seconds",
                subject=f"{seconds:g}",
                hint="such as --freeze-timeout 10",
            )
    if request.freeze_seconds >= request.bound_seconds:
        raise InvalidInput(
            f"the time limit of the freeze must be less than {request.bound_seconds:g} s, the longest that the guest "
            "may stay frozen",
            subject=f"{request.freeze_seconds:g} s",
            hint="give a shorter --freeze-timeout",
        )
    for which, argv in (("pre_freeze", request.pre_freeze), ("post_thaw", request.post_thaw)):
        if argv and (error := hooks.missing(which, argv)) is not None:
            raise error


def _chosen(
    guest: Guest, disks: Sequence[GuestDisk], request: SnapshotRequest
) -> tuple[list[GuestDisk], tuple[LeftOut, ...]]:
    """The disks to take, and those that are not taken."""
    known = {disk.name: disk for disk in disks}
    for name in request.disks:
        if name not in known:
            raise no_such_disk(guest.name, name, known)
        if known[name].left_out is not None:
            raise Unsupported(
                f"no snapshot can be taken of this disk: {known[name].left_out}",
                subject=f"{guest.name}/{name}",
                hint="leave it out",
            )
    able = [disk.name for disk in disks if disk.left_out is None and disk.obstacle is None]
    taken: list[GuestDisk] = []
    left_out: list[LeftOut] = []
    for disk in disks:
        if request.disks and disk.name not in request.disks:
            left_out.append(LeftOut(disk=disk.name, reason=disk.left_out or "not chosen"))
        elif disk.left_out is not None:
            left_out.append(LeftOut(disk=disk.name, reason=disk.left_out))
        elif disk.obstacle is not None:
            others = " ".join(f"--disk {name}" for name in able)
            raise Unsupported(
                disk.obstacle,
                subject=f"{guest.name}/{disk.name}",
                hint=f"to snapshot the other disks without it: {others}" if others else None,
            )
        else:
            taken.append(disk)
    if not taken:
        raise NotFound(
            "the guest has no disk that can be snapshotted",
            subject=guest.name,
            hint="`snapchain guests` shows its disks",
        )
    return taken, tuple(left_out)


def _check_idle(guest: Guest, disks: Sequence[GuestDisk], taken: Sequence[GuestDisk]) -> None:
    """Raises Busy when something works on the guest or one of the disks, naming it.

    An intermediate commit of ours touches only layers that are sealed already.
    """
    nodes = {node: disk.name for disk in disks for node in _nodes(disk)}
    names = {disk.name for disk in taken}
    for activity in guest.activities():
        disk = None if activity.node is None else nodes.get(activity.node)
        concerns_us = activity.node is None or disk in names
        if concerns_us and not (activity.is_ours and activity.kind == JobKind.COMMIT):
            raise Busy(
                f"something is at work on the {'guest' if disk is None else 'disk'}: {activity.says}",
                subject=guest.name if disk is None else f"{guest.name}/{disk}",
                hint="wait for its end, then run it again",
            )


def _nodes(disk: GuestDisk) -> Iterator[str]:
    yield disk.root
    yield from disk.filters
    for layer in disk.chain:
        yield layer.node


def _live(guest: Guest, disk: GuestDisk, taken: set[Path]) -> DiskToSeal:
    """What is made of a disk of a guest that runs. taken: names that other disks have got; gets this one's."""
    subject = f"{guest.name}/{disk.name}"
    layer = disk.active
    if layer.path is None or layer.is_block_device:
        raise Unsupported(
            "the active layer of the disk is no file, so there is no place beside it for an overlay",
            subject=subject,
            hint="make the overlay with libvirt, on a file of your choice",
        )
    sealed_format = _format(layer.image_format, subject=subject)
    real = place_to_change(layer.path, strict=True)
    check_no_layer(real)
    _geometry(layer.path, sealed_format)
    # Under the path by which the guest knows the directory: its security rules and its definition name that.
    beside = real if layer.path.is_symlink() else layer.path
    overlay = _free_name(beside, taken)
    _check_name(overlay, beside)
    taken.add(overlay)
    return DiskToSeal(
        disk=disk.name,
        sealed=layer.path,
        sealed_format=sealed_format,
        overlay=overlay,
        virtual_size=layer.virtual_size,
        layers=len(disk.chain) + 1,
    )


def _check_name(overlay: Path, sealed: Path) -> None:
    """The overlay records the sealed file's name, and names are printed line by line."""
    if any(character < " " or character == "\x7f" for character in sealed.name) or "\n" in str(overlay):
        raise Unsupported(
            "a name with control characters cannot be part of a chain",
            subject=sealed,
            hint="rename the image while the guest is off",
        )


def _free_name(active: Path, taken: set[Path]) -> Path:
    """NAME.N.qcow2 beside it, N above all numbers that are there: a name is given once, also when its file is gone."""
    stem = re.sub(r"\.\d+$", "", active.stem) or active.stem
    numbered = re.compile(re.escape(stem) + r"\.(\d+)\.[^.]+")
    with files.directory_of(active) as home:
        names = home.names()
    numbers = [int(found[1]) for name in names if (found := numbered.fullmatch(name))]
    number = max(numbers, default=0) + 1
    while (path := active.with_name(f"{stem}.{number}.qcow2")) in taken or path.name in names:
        number += 1
    return path


def _geometry(active: Path, image_format: Format) -> Qcow2Header | None:
    """The header of an image that a guest writes; QEMU does not change the geometry meanwhile. None for raw."""
    if image_format != "qcow2":
        return None
    with os_errors(active):
        fd = open_behind(active)
        try:
            return read_header(fd, subject=active)
        finally:
            os.close(fd)


def _check_room(disks: Sequence[DiskToSeal]) -> None:
    """Raises Unavailable where the overlays would fill the filesystem: the guest's first write would fail."""
    needed: dict[Path, int] = {}
    for disk in disks:
        needed[disk.overlay.parent] = needed.get(disk.overlay.parent, 0) + _SLACK + disk.virtual_size // (1 << 22)
    for place, count in needed.items():
        if files.free_bytes(place) < count:
            raise Unavailable(
                f"there are no {count} bytes left for the overlays; a guest that cannot write would stop",
                subject=place,
                hint="free some space there",
            )


def _at_rest(disk: GuestDisk, request: SnapshotRequest) -> DiskToSeal:
    """What is made of a disk of a guest that is off."""
    from snapchain.source import sealing

    layer = disk.active
    if layer.path is None:
        raise Unsupported("the image of the disk is no file", subject=disk.name, hint="leave the disk out")
    image_format = _format(layer.image_format, subject=layer.path)
    planned = sealing.plan(layer.path, image_format=image_format, image_dirs=request.image_dirs)
    return DiskToSeal(
        disk=disk.name,
        sealed=planned.sealed,
        sealed_format=planned.sealed_format,
        overlay=planned.overlay,
        virtual_size=planned.virtual_size,
        layers=planned.layers,
    )


def _format(name: str, *, subject: object = None) -> Format:
    known: dict[str, Format] = {"qcow2": "qcow2", "raw": "raw"}
    if name in known:
        return known[name]
    raise Unsupported(
        f"the format is {name}; snapchain reads qcow2 and raw", subject=subject, hint="leave the disk out"
    )


# --- Run.


def run(
    guest: Guest, planned: GuestSnapshotPlan, request: SnapshotRequest, *, on_event: OnEvent = ignore
) -> GuestSnapshot:
    """Do it. All disks or none. Raises Busy, Conflict, Unavailable.

    Where a quiesced snapshot is required and the freeze ended early, the snapshot is made, and Unavailable says so.
    """
    overlays.settle(guest, on_event=on_event)
    now, disks = _planned(guest, request)
    if _but_names(now) != _but_names(planned):
        raise Conflict("the guest was changed after the snapshot was planned", subject=guest.name, hint="run it again")
    if now.is_off:
        return _run_at_rest(now, request, on_event)
    return _run_live(guest, now, disks, request, on_event)


def _started_below(guest: Guest, planned: GuestSnapshotPlan) -> Iterator[Notice]:
    """Notices of active layers that were sealed before: a guest that is started by its old path writes to them again.

    A merge of ours that makes a sealed layer the active one removes that note.
    """
    notes = Notes()
    for disk in planned.disks:
        sealed = notes.of(disk.sealed).sealed
        if sealed is not None:
            time = sealed.time.isoformat(timespec="seconds")
            yield Notice.of(
                disk.sealed,
                f"disk {disk.disk} of guest {guest.name} writes to a layer that was sealed at {time}; what was written "
                "to the layers above it is not part of the disk any more. If that is not wanted, stop the guest, and "
                "start it with the newest layer",
            )


def _but_names(planned: GuestSnapshotPlan) -> GuestSnapshotPlan:
    """A plan without the names of new files: a killed run's may have been removed since, so that theirs are free."""
    disks = (disk.model_copy(update={"overlay": disk.overlay.parent}) for disk in planned.disks)
    return planned.model_copy(update={"disks": tuple(disks)})


def _run_at_rest(planned: GuestSnapshotPlan, request: SnapshotRequest, on_event: OnEvent) -> GuestSnapshot:
    images = [
        ImageAtRest(disk.overlay, format=_format(disk.sealed_format), image_dirs=request.image_dirs, on_event=on_event)
        for disk in planned.disks
    ]
    sealed = OfflineSet(images).seal()
    time = datetime.now(UTC)
    disks = [disk.model_copy(update={"sealed": path}) for disk, path in zip(planned.disks, sealed, strict=True)]
    overlays.note_sealed(sealed, planned.labels, time, on_event)
    return _report(planned, disks, time, Quiesced(Consistency.OFFLINE))


def sealed_already(planned: GuestSnapshotPlan, request: SnapshotRequest) -> GuestSnapshot | None:
    """Of a guest that is off, and was since its last snapshot: what was sealed then is what its disks show now.

    None for any other guest. Without this, each night would put one more empty overlay on a guest that nobody starts.
    Raises Busy as ImageAtRest.opened, Conflict for a disk that was given to another host.
    """
    if not planned.is_off:
        return None
    sealed: list[DiskToSeal] = []
    for disk in planned.disks:
        image = ImageAtRest(disk.overlay, format=disk.sealed_format, image_dirs=request.image_dirs)
        with image.opened() as chain:
            image.check_not_given(chain)
            below = chain.files[-2] if len(chain.files) > 1 else None
            if below is None or chain.top.extents != Extents.absent(below.size):
                return None
            change = {"sealed": below.path, "sealed_format": below.format, "layers": len(chain.files)}
            sealed.append(disk.model_copy(update=change))
    return _report(planned, sealed, datetime.now(UTC), Quiesced(Consistency.OFFLINE))


def _run_live(
    guest: Guest,
    planned: GuestSnapshotPlan,
    now: Sequence[GuestDisk],
    request: SnapshotRequest,
    on_event: OnEvent,
) -> GuestSnapshot:
    for notice in _started_below(guest, planned):
        on_event(notice)
    wanted = [
        overlays.WantedOverlay(disk.overlay, disk.sealed, disk.sealed_format, disk.virtual_size)
        for disk in planned.disks
    ]
    made = overlays.make(guest, wanted, planned.labels, on_event=on_event)
    try:
        reached, time = _switch(guest, planned, request, on_event)
        _check_graph(guest, planned)
        for disk in planned.disks:
            overlays.check(disk.overlay, disk.sealed, disk.sealed_format)
        overlays.note_sealed([disk.sealed for disk in planned.disks], planned.labels, time, on_event)
    except BaseException:
        overlays.settle_or_leave(guest, made, on_event)
        raise
    journal.remove(made.path)
    for disk in planned.disks:
        if disk.layers >= _LONG_CHAIN:
            on_event(
                Notice.of(
                    f"{guest.name}/{disk.disk}",
                    f"its chain has {disk.layers} layers now, and the guest waits for each look at it; "
                    f"merge it: snapchain merge {guest.option}",
                )
            )
    for each in now:
        if names := [bitmap.name for bitmap in each.active.bitmaps if bitmap.persistent]:
            name = "" if each.active.path is None else f" {each.active.path.name}"
            on_event(Notice(f"persistent bitmaps stay in the sealed file{name}: {', '.join(names)}"))
    if request.quiesce is Quiesce.REQUIRE and reached.consistency is Consistency.CRASH:
        raise Unavailable(
            f"the snapshot is made, but it is only crash-consistent: {reached.why_not}",
            subject=guest.name,
            hint="run it again for a quiesced one",
        )
    return _report(planned, planned.disks, time, reached, starts_with=guest.kind == "qmp")


def _switch(
    guest: Guest, planned: GuestSnapshotPlan, request: SnapshotRequest, on_event: OnEvent
) -> tuple[Quiesced, datetime]:
    """Make the overlays the active layers; how the guest stood, and when. Raises when they are not."""
    new = [NewOverlay(disk=disk.disk, path=disk.overlay, backing=disk.sealed) for disk in planned.disks]
    lost: Unavailable | None = None
    with ExitStack() as stack:
        switch = stack.enter_context(guest.prepared(new))
        tell = stack.enter_context(
            with_hooks(
                pre_freeze=tuple(request.pre_freeze),
                post_thaw=tuple(request.post_thaw),
                facts={"guest": guest.name, "disks": " ".join(disk.disk for disk in planned.disks)},
                timeout=request.hook_seconds,
                on_event=on_event,
            )
        )
        with _quiesced(guest, request, on_event) as reached:
            try:
                switch.run()
            except Unavailable as error:
                # Asking what became of it may take long, and the guest is frozen: that comes after the thaw.
                lost, reached.may_be_late = error, True
            time = datetime.now(UTC)
        if lost is not None and switch.outcome() is Outcome.NOT_DONE:
            raise lost
        tell(consistency=reached.consistency)
    return reached, time


@contextmanager
def _quiesced(guest: Guest, request: SnapshotRequest, on_event: OnEvent) -> Iterator[Quiesced]:
    if request.quiesce is Quiesce.NO:
        yield Quiesced()
        return
    with frozen(
        guest,
        required=request.quiesce is Quiesce.REQUIRE,
        freeze_seconds=request.freeze_seconds,
        bound_seconds=request.bound_seconds,
        on_event=on_event,
    ) as reached:
        yield reached


def _check_graph(guest: Guest, planned: GuestSnapshotPlan) -> None:
    """Raises Conflict unless each overlay is the active layer now, on the file that it sealed."""
    disks = {disk.name: disk for disk in guest.disks()}
    for each in planned.disks:
        chain = disks[each.disk].chain if each.disk in disks else ()
        shown = [layer.identity for layer in chain[-2:]]
        if shown != [files.identity_of(each.sealed), files.identity_of(each.overlay)]:
            raise Conflict(
                "after the snapshot the guest does not have the new overlay as its active layer",
                subject=f"{planned.guest}/{each.disk}",
                hint=f"another program changed its chain meanwhile: `snapchain guests` shows it ({planned.option})",
            )


def _report(
    planned: GuestSnapshotPlan,
    disks: Sequence[DiskToSeal],
    time: datetime,
    reached: Quiesced,
    *,
    starts_with: bool = False,
) -> GuestSnapshot:
    return GuestSnapshot(
        guest=planned.guest,
        instant=secrets.token_hex(16),
        time=time,
        consistency=reached.consistency,
        why_not=reached.why_not,
        frozen_seconds=reached.frozen_seconds,
        disks=tuple(disks),
        left_out=planned.left_out,
        starts_with=tuple(disk.overlay for disk in disks) if starts_with else (),
    )
