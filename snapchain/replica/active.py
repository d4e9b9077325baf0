"""The overlay that a live migration writes into: empty, on the newest layer, where no layer's name can be in its way.

ROOT/web1%2Fvda/active/web1.qcow2     names the newest layer by its whole path

libvirt's incremental storage copy wants it there before, with the size of the source's top.  The whole path lets a
symbolic link stand for it anywhere: QEMU takes a relative name from where the link is.  One that is empty may be
replaced by the next; one that anybody has written to, or has open, is never touched.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from snapchain.errors import Conflict, Corrupt, Diverged, InvalidInput, NotFound, SnapchainError, Unsupported
from snapchain.host import files
from snapchain.host.directory import Directory
from snapchain.host.locks import ImageLock, LockMode
from snapchain.host.os_errors import os_errors
from snapchain.host.temporary_names import ACTIVE, temporary_beside
from snapchain.image import ImageChain, scan
from snapchain.image.dependents import SEEN
from snapchain.image.qcow2.header import Backing
from snapchain.image.qcow2.write import write_overlay
from snapchain.replica import names
from snapchain.replica.catalogue import Catalogue
from snapchain.replica.merge_journal import others_on
from snapchain.replica.store import ReplicaDisk
from snapchain.replica.stream.messages import Active, ActiveState, Readiness
from snapchain.replica.verifying import verify_disk

_SECTOR = 512


def look_at_active(disk: ReplicaDisk, catalogue: Catalogue, asked: Active) -> Readiness:
    """What stands there now; with `prove`, whether each layer still shows what it did. Changes nothing.

    Raises Corrupt for a name that no sender of ours would ask for.
    """
    path = _path(disk, asked)
    directory = str(disk.directory.resolve())
    if not directory.isprintable():
        raise Unsupported("its path has characters that no command can be given", subject=ascii(directory))
    return Readiness(
        directory=directory,
        file=f"{names.ACTIVE}/{path.name}",
        state=_state(disk, catalogue, asked, path),
        proven=asked.prove,
        broken=tuple(_broken(disk, catalogue)) if asked.prove else (),
    )


def make_active(disk: ReplicaDisk, catalogue: Catalogue, asked: Active) -> Readiness:
    """Make the overlay unless it is there. The disk is locked.

    Raises Diverged when `asked.on` is not the newest layer, Conflict when the name is taken by what is not to be
    replaced, Busy when somebody has it open, Corrupt when a layer no longer is what it was.
    """
    path = _path(disk, asked)
    tip = catalogue.tip
    if tip is None or tip.id != asked.on:
        raise Diverged(
            "the layer below the overlay is not the newest one here",
            subject=disk.directory,
            hint="another transfer was faster: run it again",
        )
    if path.parent.is_dir():
        files.remove_temporaries(path, purpose=ACTIVE)  # of runs that were killed: we hold the lock
    found = look_at_active(disk, catalogue, asked)
    if found.broken:
        raise Corrupt(
            "it no longer shows what it did when it came", subject=disk.path(found.broken[0]), hint="verify that disk"
        )
    if found.state is ActiveState.READY:
        return found
    if found.state is ActiveState.FOREIGN:
        raise Conflict(
            "it is no empty overlay on this disk: a guest may have written to it",
            subject=path,
            hint="look what it is; if it may go, remove it there and run this again",
        )
    if found.state is ActiveState.STALE:
        with ImageLock(path, LockMode.WRITE):
            check_unused(disk, path)
            files.remove(path)
    _make(disk, disk.path(tip.file).resolve(), asked, path)
    state = _state(disk, catalogue, asked, path)
    if state is not ActiveState.READY:
        raise Corrupt("the overlay that was just made is not what was asked for", subject=path)
    return found.model_copy(update={"state": state})


def check_unused(disk: ReplicaDisk, overlay: Path) -> None:
    """Raises Conflict for an overlay that is to go although other images depend on it."""
    status = overlay.stat()
    why = others_on(disk, [overlay], own=[(status.st_dev, status.st_ino)], opened=overlay).reason(overlay, *SEEN)
    if why is not None:
        raise Conflict(f"it cannot be removed: {why}", subject=overlay, hint="move or remove that image first")


def is_untouched(disk: ReplicaDisk, overlay: Path) -> bool:
    """Whether a file of `active` is an overlay on which nobody has written anything yet."""
    try:
        with scan(overlay, format="qcow2", image_dirs=[disk.directory]) as chain:
            top = chain.top.extents
            return len(chain.files) > 1 and not top.data_bytes and not top.zero_bytes
    except SnapchainError:
        return False


def _path(disk: ReplicaDisk, asked: Active) -> Path:
    return disk.path(names.ACTIVE) / names.check_offered(asked.name, subject=str(disk.directory))


def _make(disk: ReplicaDisk, backing: Path, asked: Active, path: Path) -> None:
    if asked.size % _SECTOR:
        raise InvalidInput(f"a qcow2 overlay cannot have {asked.size} bytes", subject=path)
    with files.directory_of(path.parent) as above:
        if not above.has(names.ACTIVE):
            above.make_directory(names.ACTIVE)
            above.sync()
            with Directory.open(path.parent) as place:
                disk.access.give(place.opened(), disk.access.directory)
    temporary = temporary_beside(path, purpose=ACTIVE).name
    with files.directory_of(path) as place:
        fd = place.create(temporary)
        made = os.fstat(fd)
        try:
            write_overlay(
                fd,
                asked.size,
                Backing(str(backing), "qcow2"),
                cluster_size=asked.cluster_size,
                extended_l2=asked.extended_l2,
                subject=path.parent,
            )
            disk.access.give(fd, disk.access.overlay)
            with os_errors(path.parent):
                os.fsync(fd)
            place.give_name(fd, temporary, path.name, replacing=None)
        finally:
            os.close(fd)
            with suppress(OSError):
                place.remove(temporary, only=made)


def _state(disk: ReplicaDisk, catalogue: Catalogue, asked: Active, path: Path) -> ActiveState:
    if not os.path.lexists(path):
        return ActiveState.ABSENT
    try:
        with scan(path, format="qcow2", image_dirs=[disk.directory]) as chain:
            return _judged(disk, catalogue, asked, chain)
    except NotFound:
        return ActiveState.ABSENT if not os.path.lexists(path) else ActiveState.FOREIGN
    except SnapchainError:
        return ActiveState.FOREIGN


def _judged(disk: ReplicaDisk, catalogue: Catalogue, asked: Active, chain: ImageChain) -> ActiveState:
    top = chain.top
    if top.extents.data_bytes or top.extents.zero_bytes or top.header is None or len(chain.files) < 2:
        return ActiveState.FOREIGN
    stands_on = chain.files[-2].path.resolve()
    place = next((at for at, layer in enumerate(catalogue.layers) if disk.path(layer.file).resolve() == stands_on), -1)
    if place < 0:
        return ActiveState.FOREIGN
    whole = [(file.path.name, file.size, file.format) for file in chain.files[:-1]]
    wanted = [(layer.file, layer.size, "qcow2") for layer in catalogue.layers[: place + 1]]
    exact = (chain.size, top.cluster_size, top.header.extended_l2) == (
        asked.size,
        asked.cluster_size,
        asked.extended_l2,
    )
    # One that the host here has given on to another is read-only (source/ownership.py): the next guest needs its own.
    exact = exact and bool(top.real_path.stat().st_mode & 0o222)
    is_ready = exact and whole == wanted and catalogue.layers[place].id == asked.on == catalogue.layers[-1].id
    return ActiveState.READY if is_ready else ActiveState.STALE


def _broken(disk: ReplicaDisk, catalogue: Catalogue) -> list[str]:
    """Files of the layers that do not show what they should; of all, where the chain cannot even be read."""
    try:
        return [finding.file for finding in verify_disk(disk, on_bytes=lambda _count: None)]
    except SnapchainError:
        return [layer.file for layer in catalogue.layers]
