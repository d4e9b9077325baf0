"""The chain of a running guest's disk, opened for reading while QEMU has it open."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import cast

from snapchain.errors import Conflict, Corrupt, NotFound, Unsupported
from snapchain.guest.disks import find_disk
from snapchain.guest.protocol import Guest, GuestDisk
from snapchain.host.path_resolution import real_path
from snapchain.image import ImageChain, ImageFile, scan
from snapchain.image.backing import Place
from snapchain.image.file import Format
from snapchain.image.opening import open_image
from snapchain.image.physical import RunBudget

_TRIES, _PAUSE = 20, 0.05
"""For the map of a layer that is written to meanwhile: a table may be older than the one that names it."""

_LOOK = "was a file of the chain renamed or replaced while the guest ran? `snapchain guests` shows its chain"


class ActiveFile(ImageFile):
    """The active layer. Its map is of one moment, and lacks what QEMU has not flushed: good for estimates."""

    def changed(self) -> bool:
        """False: a guest writes to it all the time."""
        return False


def disk_to_merge(guest: Guest, name: str) -> GuestDisk:
    """The disk of this name, as it is now. Raises NotFound, Unsupported where its chain cannot be merged."""
    disk = find_disk(guest, name)
    if (why := obstacle(disk)) is not None:
        raise Unsupported(
            f"the disk cannot be merged: {why}",
            subject=f"{guest.name}/{name}",
            hint="leave it out: name others by --disk",
        )
    return disk


def obstacle(disk: GuestDisk) -> str | None:
    """Why the chain of a disk cannot be merged; None where it can."""
    if disk.left_out is None and any(layer.path is None for layer in disk.chain):
        return "a layer of its chain is no local file"
    return disk.left_out


def paths_of(disk: GuestDisk) -> tuple[Path, ...]:
    """The paths of its chain, root first."""
    return tuple(layer.path for layer in disk.chain if layer.path is not None)


@contextmanager
def opened(disk: GuestDisk, *, image_dirs: Sequence[Path] = ()) -> Iterator[ImageChain]:
    """The whole chain as QEMU has it, by our own parser: the sealed layers as they are, the active one as of now.

    Raises Conflict where the headers name other files than QEMU has open, NotFound for a file that was moved, and as
    `scan`.
    """
    paths = paths_of(disk)
    with ExitStack() as stack:
        below: tuple[ImageFile, ...] = ()
        try:
            if len(paths) > 1:
                below = stack.enter_context(
                    scan(paths[-2], format=disk.chain[-2].image_format, image_dirs=_dirs(paths, image_dirs))
                ).files
            active = stack.enter_context(_active(paths[-1], disk.active.image_format))
        except NotFound as error:
            error.hint = _LOOK
            raise
        chain = ImageChain([*below, active], owned=False)
        _check_same(disk, chain)
        yield chain


def _dirs(paths: Sequence[Path], image_dirs: Sequence[Path]) -> tuple[Path, ...]:
    """Where backing files may lie: QEMU has them open already, so their places are accepted."""
    return tuple(dict.fromkeys([*image_dirs, *(real_path(path).parent for path in paths)]))


def _active(path: Path, image_format: str) -> ImageFile:
    if image_format not in {"qcow2", "raw"}:
        raise Unsupported(
            f"the active layer has the format {image_format}", subject=path, hint="snapchain reads qcow2 and raw"
        )
    place = Place.of(path)
    tries = _TRIES
    while True:
        fd = open_image(place.real, subject=place.path, named_by=place.named_by)
        try:
            return ActiveFile(place, fd, format=cast("Format", image_format), budget=RunBudget())
        except Corrupt:
            tries -= 1
            if not tries:
                raise
            time.sleep(_PAUSE)


def _check_same(disk: GuestDisk, chain: ImageChain) -> None:
    mine, theirs = [file.device for file in chain.files], [layer.identity for layer in disk.chain]
    if mine != theirs:
        raise Conflict(
            "the headers of the chain name other files than QEMU has open",
            subject=disk.active.path,
            hint=_LOOK,
        )
    recorded = chain.top.backing
    if (recorded is not None) != (len(chain.files) > 1):
        raise Conflict(
            "the header of the active layer records another chain than QEMU has open",
            subject=chain.top.path,
            hint=_LOOK,
        )
