"""Giving up the upper layers of a disk, because its user has decided for the other side of a divergence.

No file in use is dropped: one that is open, or on which another image of the replica depends, stops it
before anything is changed.  The catalogue goes first, then the files: a crash leaves files that nobody names.
"""

from __future__ import annotations

from contextlib import ExitStack

from snapchain.errors import Conflict, NotFound
from snapchain.host.files import remove
from snapchain.host.locks import ImageLock, LockMode
from snapchain.replica.catalogue import Catalogue
from snapchain.replica.merge_journal import others_on
from snapchain.replica.progress import forget
from snapchain.replica.store import ReplicaDisk


def cut(disk: ReplicaDisk, catalogue: Catalogue, keep: str | None) -> Catalogue:
    """Drop all layers above `keep`, and the points that they give. The disk is locked.

    Raises NotFound when there is no such layer, Busy or Conflict when what is to go is in use.
    """
    ids = [layer.id for layer in catalogue.layers]
    if keep is not None and keep not in ids:
        raise NotFound(f"there is no layer {keep}", subject=disk.directory)
    count = 0 if keep is None else ids.index(keep) + 1
    kept, dropped = catalogue.layers[:count], catalogue.layers[count:]
    forget(disk)
    if not dropped:
        return catalogue
    paths = [disk.path(layer.file) for layer in dropped if disk.path(layer.file).exists()]
    with ExitStack() as stack:
        for path in paths:
            stack.enter_context(ImageLock(path, LockMode.WRITE))
        ours = {(status.st_dev, status.st_ino) for status in (path.stat() for path in paths)}
        others = others_on(disk, paths, own=ours)
        for path in paths:
            if why := others.reason(path):
                raise Conflict(f"it cannot be removed: {why}", subject=path, hint="move or remove that image first")
        gone = {layer.id for layer in dropped}
        points = tuple(point for point in catalogue.points if point.layer not in gone)
        catalogue = catalogue.after(layers=kept, points=points)
        disk.write(catalogue)
        for path in reversed(paths):
            remove(path)
    return catalogue
