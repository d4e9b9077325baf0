"""Dropping the uppermost layers of a disk at a replica, and the points that they give.

    .cutting.json      files that are to go; written before the catalogue that does not name them, removed after them

A file in use stops it before anything is changed: one that is open, or that another image depends on.  A process that
finds the record and gets the disk's lock has met a cut that was killed: the catalogue tells whether the files go.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from snapchain.errors import Conflict, NotFound, SnapchainError
from snapchain.host.files import remove
from snapchain.host.locks import ImageLock, LockMode
from snapchain.host.os_errors import os_errors
from snapchain.model.inventory import MAX_LAYERS
from snapchain.replica import names
from snapchain.replica.catalogue import Catalogue, Layer
from snapchain.replica.merge_journal import others_on
from snapchain.replica.store import ReplicaDisk, is_layer_file
from snapchain.replica.stream.fields import FileName


class Cutting(BaseModel):
    """The record. files: of the layers, lowest first."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal[1] = 1
    files: tuple[FileName, ...] = Field(max_length=MAX_LAYERS)


def cut(disk: ReplicaDisk, catalogue: Catalogue, keep: str | None) -> Catalogue:
    """Drop all layers above `keep` (None: all), and the points that they give. The disk is locked.

    A layer that is arriving must have been forgotten before: it lies on one that goes.

    Raises NotFound when there is no such layer, Busy or Conflict when a file to be removed is in use, Conflict for a
    point that is held.
    """
    ids = [layer.id for layer in catalogue.layers]
    if keep is not None and keep not in ids:
        raise NotFound(f"there is no layer {keep}", subject=disk.directory)
    count = 0 if keep is None else ids.index(keep) + 1
    kept, dropped = catalogue.layers[:count], catalogue.layers[count:]
    gone = {layer.id for layer in dropped}
    for point in catalogue.points:
        if point.layer in gone and point.holds:
            raise Conflict(
                f"point {point.point} would be dropped, and it is held under {point.holds[0].tag!r}",
                subject=disk.directory,
                hint=f"release it first: snapchain release DEST::{disk.name}@{point.point}",
            )
    if not dropped:
        return catalogue
    with cuttable(disk, dropped) as paths:
        disk.put(names.CUTTING, Cutting(files=tuple(layer.file for layer in dropped)))
        points = tuple(point for point in catalogue.points if point.layer not in gone)
        catalogue = catalogue.after(layers=kept, points=points)
        disk.write(catalogue)
        for path in reversed(paths):
            remove(path)
    remove(disk.path(names.CUTTING))
    return catalogue


@contextmanager
def cuttable(disk: ReplicaDisk, layers: Sequence[Layer]) -> Iterator[list[Path]]:
    """The files of some uppermost layers, lowest first, locked: nobody has them open, and nothing depends on them.

    Raises Busy or Conflict otherwise.
    """
    paths = [path for layer in layers if (path := disk.path(layer.file)).exists()]
    with ExitStack() as stack:
        for path in paths:
            stack.enter_context(ImageLock(path, LockMode.WRITE))
        arriving = [path] if (path := disk.path(names.INCOMING)).exists() else []
        with os_errors(disk.directory):
            ours = {(status.st_dev, status.st_ino) for status in (path.stat() for path in [*paths, *arriving])}
        others = others_on(disk, paths, own=ours)
        for path in paths:
            if why := others.reason(path):
                raise Conflict(f"it cannot be removed: {why}", subject=path, hint="move or remove that image first")
        yield paths


def settle_cut(disk: ReplicaDisk, catalogue: Catalogue) -> None:
    """Remove what a killed cut left: files that it named and the catalogue does not. Under the lock.

    What is in use meanwhile stays, and so does the record.
    """
    record = disk.record(Cutting, names.CUTTING)
    if record is None:
        return
    named = {layer.file for layer in catalogue.layers}
    for file in reversed(record.files):
        path = disk.path(file)
        if file in named or not is_layer_file(file) or not path.exists():
            continue
        with suppress(SnapchainError):
            status = path.stat()
            others = others_on(disk, [path], own={(status.st_dev, status.st_ino)})
            if not others.on(path):
                with ImageLock(path, LockMode.WRITE):
                    remove(path)
        if path.exists():
            return  # the others lie below it
    remove(disk.path(names.CUTTING))


__all__ = ["Cutting", "cut", "cuttable", "settle_cut"]
