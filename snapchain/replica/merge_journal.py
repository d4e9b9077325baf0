"""The record of a merge of a disk's layers that is under way, and what is left to do after a crash.

    .merging.json      which layers become one; written before a file is changed, removed when the catalogue has it

A process that finds the record and gets the disk's lock has met a merge that was killed.  The merge engine finishes
or undoes the work on the files; they then are the old list of layers or the new one.  A reader without the lock may see
the files of one list and the catalogue of the other: what it finds wrong meanwhile does not count, and it looks again.
"""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from snapchain.errors import Busy, Conflict, Corrupt, InvalidInput, NotFound, SnapchainError
from snapchain.host.files import directory_of, remove, set_mode
from snapchain.host.locks import ImageLock, LockMode
from snapchain.host.os_errors import os_errors
from snapchain.host.path_resolution import place_to_change, resolve
from snapchain.image import scan
from snapchain.image.dependents import Dependents, search
from snapchain.model.events import ignore
from snapchain.model.inventory import MAX_LAYERS
from snapchain.replica import names
from snapchain.replica.catalogue import Catalogue, Layer, joined
from snapchain.replica.store import ReplicaDisk, Work
from snapchain.replica.stream.fields import LayerId

_PATIENCE = 60.0
_POLL_SECONDS = 0.1
_ATTEMPTS = 20
"""How often a reader looks again, since a merge changed the files meanwhile. Each look takes milliseconds."""
T = TypeVar("T")


class Merging(BaseModel):
    """The record. members: layers, lowest first, that are merged into the uppermost."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal[1] = 1
    members: tuple[LayerId, ...] = Field(min_length=2, max_length=MAX_LAYERS)


def begin(disk: ReplicaDisk, members: Sequence[Layer]) -> None:
    """Record, durably, that these become one."""
    disk.put(names.MERGING, Merging(members=tuple(layer.id for layer in members)))


def settle_merge(disk: ReplicaDisk, catalogue: Catalogue) -> Catalogue:
    """Finish or undo a merge that was killed; the catalogue as it is then. Under the lock.

    Raises Busy while a member is open elsewhere, and as merge.run.recover: then all is as before.
    """
    record = disk.record(Merging, names.MERGING)
    if record is None:
        return catalogue
    known = {layer.id: layer for layer in catalogue.layers}
    members = [known[layer] for layer in record.members if layer in known]
    if len(members) == len(record.members):
        first = catalogue.layers.index(members[0])
        if members != list(catalogue.layers[first : first + len(members)]):
            raise Corrupt(
                "the record of a merge names layers that are not neighbours in the disk's chain, lowest first",
                subject=disk.path(names.MERGING),
                hint="somebody has changed the record; verify the disk, and remove the record if nothing is wrong",
            )
        paths = [real_path(disk, layer) for layer in members]
        with unlocked([paths[0], paths[-1]]):
            _settle_files(paths[-1])
        return conclude(disk, catalogue, members)
    # Only the end of it is left: the catalogue does not name them any more.
    remove(disk.path(names.MERGING))
    return catalogue


def _settle_files(uppermost: Path) -> None:
    """Finish or undo what a killed merge has done to the files of which this is the uppermost."""
    from snapchain.merge import journal as merge_journal
    from snapchain.merge.run import recover  # inside: few disks have met a merge that was killed

    for journal in merge_journal.unsettled([uppermost]):
        recover(journal, noted=False, on_event=ignore)
    merge_journal.sweep(uppermost)


def is_begun(members: Sequence[Path]) -> bool:
    """Whether a merge of these files, lowest first, was begun and is neither finished nor undone."""
    from snapchain.merge import journal as merge_journal

    return bool(merge_journal.unsettled([members[-1]]))


def conclude(disk: ReplicaDisk, catalogue: Catalogue, members: Sequence[Layer]) -> Catalogue:
    """After the merge of the files has ended, either way: the catalogue of what they are now, and the record gone.

    Raises Corrupt when they are neither the old chain nor the new one; then nothing is changed.
    """
    gone = {layer.id for layer in members[:-1]}
    merged = tuple(layer for layer in catalogue.layers if layer.id not in gone)
    shown = _chain(disk, catalogue.layers[-1], members[-1])
    for layer in members:
        _seal(disk, layer)
    if shown.keys == [_key(layer) for layer in merged]:
        _drop_leftovers(disk, members[:-1], merged)
        at = merged.index(members[-1])
        older, sources = joined(members)
        made = members[-1].model_copy(
            update={
                "cluster_size": shown.cluster_size,
                "data_bytes": shown.data_bytes,
                "older": older,
                "sources": sources,
            }
        )
        points = tuple(point for point in catalogue.points if point.layer not in gone)
        catalogue = catalogue.after(layers=(*merged[:at], made, *merged[at + 1 :]), points=points)
        disk.write(catalogue)
    elif shown.keys != [_key(layer) for layer in catalogue.layers]:
        raise Corrupt(
            "the files of this disk are neither the chain that its catalogue names, nor what a merge made of it",
            subject=disk.directory,
            hint="somebody has rebased, resized or replaced them",
        )
    remove(disk.path(names.MERGING))
    return catalogue


def real_path(disk: ReplicaDisk, layer: Layer) -> Path:
    """Of a layer's file, with no link on the way; the file need not exist.

    Raises Unsupported for a directory that a link of somebody else has chosen.
    """
    return place_to_change(disk.directory) / layer.file


@contextmanager
def unlocked(paths: Sequence[Path]) -> Iterator[None]:
    """Let this user write to some layers' files. Whoever concludes the merge makes them read-only again."""
    for path in paths:
        with os_errors(path), suppress(FileNotFoundError):
            if not os.access(path, os.W_OK):
                set_mode(path, path.stat().st_mode | stat.S_IWUSR)
    yield


def is_under_way(disk: ReplicaDisk) -> bool:
    """Whether a merge is, or was when it was killed."""
    return disk.path(names.MERGING).exists()


def undisturbed(disk: ReplicaDisk, look: Callable[[], T], *, is_fine: Callable[[T], bool]) -> T:
    """What `look` finds, without the lock, when no merge has changed files under it; errors, too, count only then.

    is_fine: what a merge cannot have spoilt. A merge that was killed is settled. Raises Busy when it never is quiet.
    """
    for _ in range(_ATTEMPTS):
        wait_for_merge(disk)
        before = disk.read()
        try:
            found = look()
        except SnapchainError:
            if not is_under_way(disk) and disk.read() == before:
                raise
            continue
        if is_fine(found) or (not is_under_way(disk) and disk.read() == before):
            return found
    raise Busy("the disk changes while it is looked at", subject=disk.directory, hint="run it again")


def wait_for_merge(disk: ReplicaDisk, *, patience: float | None = None) -> None:
    """Return when none is under way; one that was killed is settled.

    Raises Busy when it takes longer than `patience`, in seconds (by default a minute), and as `settle_merge`.
    """
    deadline = time.monotonic() + (_PATIENCE if patience is None else patience)
    while is_under_way(disk):
        try:
            with disk.locked(make=False, work=Work.MERGE):
                catalogue = disk.read()
                if catalogue is not None:
                    settle_merge(disk, catalogue)
                return
        except Busy as error:
            if time.monotonic() > deadline:
                raise Busy(
                    "its layers are being merged", subject=disk.directory, hint="wait for that to end"
                ) from error
        time.sleep(_POLL_SECONDS)


_Key = tuple[str, int, str]


@dataclass(frozen=True, slots=True)
class _Shown:
    """The chain that is there, root first, and what one of its files holds."""

    keys: list[_Key]
    cluster_size: int
    data_bytes: int


def _key(layer: Layer) -> _Key:
    return (layer.file, layer.size, "qcow2")


def _chain(disk: ReplicaDisk, tip: Layer, of: Layer) -> _Shown:
    path = real_path(disk, tip)
    with scan(path, format="qcow2") as chain:
        if any(file.real_path.parent != path.parent for file in chain.files):
            raise Corrupt("a file of this disk has a backing file elsewhere", subject=disk.directory)
        held = [(file.cluster_size or 0, file.extents.data_bytes) for file in chain.files if file.path.name == of.file]
        cluster_size, data_bytes = held[0] if held else (0, 0)
        return _Shown([(file.path.name, file.size, file.format) for file in chain.files], cluster_size, data_bytes)


def _seal(disk: ReplicaDisk, layer: Layer) -> None:
    """Make its file read-only again, unless a link leads out of the disk's directory."""
    named = real_path(disk, layer)
    with os_errors(named):
        found = resolve(named)
    path = found.real
    if found.chosen_by is not None or path.parent != named.parent:
        return
    with suppress(NotFound), directory_of(path) as directory:
        fd = directory.open_file(path.name)
        try:
            before = os.fstat(fd)
            with directory.changing(fd):
                disk.access.give(fd, disk.layer_mode())
            if os.fstat(fd).st_mode != before.st_mode:
                os.fsync(fd)
        finally:
            os.close(fd)


def _drop_leftovers(disk: ReplicaDisk, lower: Sequence[Layer], merged: Sequence[Layer]) -> None:
    """Remove files of merged layers that no journal names, where no image depends on them."""
    named = {layer.file for layer in merged}
    paths = [real_path(disk, layer) for layer in lower if layer.file not in named]
    paths = [path for path in paths if path.exists()]
    if not paths:
        return
    ours = {(status.st_dev, status.st_ino) for status in (path.stat() for path in paths)}
    others = others_on(disk, paths, own=ours)
    for number in range(len(paths) - 1, -1, -1):
        if any(others.on(path) for path in paths[number:]):
            return  # the others lie below it
        with suppress(Busy, Conflict, InvalidInput), ImageLock(paths[number], LockMode.WRITE):
            remove(paths[number])


def others_on(
    disk: ReplicaDisk, paths: Sequence[Path], *, own: Collection[tuple[int, int]], opened: Path | None = None
) -> Dependents:
    """What else depends on files of a disk: images anywhere in this replica, and domains of the host's libvirt.

    own: (device, inode) of images that do not count; opened: the one that the guest of this disk opens
    """
    near = where_images_stand(disk)
    return search(paths, [*near, disk.directory.resolve().parent], near=near, own=own, disk=opened)


def where_images_stand(disk: ReplicaDisk) -> list[Path]:
    """Directories in which images may depend on layers."""
    directory = disk.directory.resolve()
    active = directory / names.ACTIVE
    return [directory, active] if active.is_dir() else [directory]
