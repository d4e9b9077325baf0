"""An image at rest as a Source: scanned and locked for reading while no guest can write it, sealed by a rename."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from snapchain.errors import Conflict, InvalidInput
from snapchain.host.directory import open_behind
from snapchain.host.locks import ImageLock, LockMode
from snapchain.host.os_errors import os_errors
from snapchain.host.terminal import shell_word
from snapchain.image import ImageChain, ImageFile, scan
from snapchain.image.file import settle
from snapchain.model.events import Notice, OnEvent, ignore
from snapchain.model.fingerprint import Fingerprint
from snapchain.source import sealing
from snapchain.source.notes import Notes
from snapchain.source.ownership import check_not_given, epoch_of, note_epoch
from snapchain.source.protocol import Scope


class ImageAtRest:
    """A Source: an image that no guest has open. Sealed, the overlay comes in its place, under its path.

    format, image_dirs: as `scan` takes them
    """

    def __init__(
        self, image: Path, *, format: str | None = None, image_dirs: Sequence[Path] = (), on_event: OnEvent = ignore
    ) -> None:
        self.image = image
        self.image_format, self._image_dirs, self._on_event = format, image_dirs, on_event

    @contextmanager
    def opened(self, scope: Scope = Scope.ALL) -> Iterator[ImageChain]:
        """See `Source`. Files are read under QEMU's own locks, so that no guest starts on them meanwhile.

        QEMU writes all that it holds when a guest is paused, its tables too; so of a paused guest the top is not
        locked, and `check_unchanged` is asked at the end.
        Raises what `scan` raises, Busy when somebody has a locked file open for writing, Conflict when one changes
        between look and lock, InvalidInput when nothing is sealed below the top, where only that is meant.
        """
        with ExitStack() as stack:
            is_written = scope is Scope.SEALED
            chain = stack.enter_context(
                scan(self.image, format=self.image_format, image_dirs=self._image_dirs, is_written=is_written)
            )
            count = len(chain.files)
            if scope is Scope.SEALED and count < 2:
                raise InvalidInput(
                    "nothing of it is sealed: it is one file, which a guest will go on writing to",
                    subject=self.image,
                    hint=f"seal it first: snapchain snapshot {shell_word(self.image)}",
                )
            if scope is Scope.SEALED:
                chain = chain.at(count - 2)
            _lock(chain.files if scope is not Scope.PAUSED else chain.files[:-1], stack, self._on_event)
            check_unchanged(chain)
            yield chain

    def plan(self) -> sealing.SnapshotPlan:
        """What `seal` would do. Raises as `sealing.plan`."""
        return sealing.plan(self.image, image_format=self.image_format, image_dirs=self._image_dirs)

    def seal(self) -> Path:
        """See `Sealer`. Raises Busy when somebody has the image open, and as `sealing.plan`."""
        return sealing.run(self.plan(), on_event=self._on_event).sealed

    def check_unchanged(self, chain: ImageChain) -> None:
        """See `Source`."""
        check_unchanged(chain)

    def check_not_given(self, chain: ImageChain) -> None:
        """See `Source`."""
        check_not_given(chain, image=self.image)

    def epoch(self, chain: ImageChain) -> int:
        """See `Source`."""
        return epoch_of(chain, Notes(), image=self.image)

    def note_epoch(self, epoch: int) -> None:
        """See `Source`. Raises as `ownership.note_epoch`."""
        note_epoch(self.image, epoch)


class OfflineSet:
    """A SetSealer of images that no guest has open: at rest all instants are one, as long as nobody writes."""

    def __init__(self, images: Sequence[ImageAtRest]) -> None:
        self._images = images

    def seal(self) -> Sequence[Path]:
        """Raises Busy when somebody has an image open, Conflict when one was written to before all were sealed.

        The files that are sealed then are no moment of the guest; the next run seals all once more.
        """
        planned = [image.plan() for image in self._images]
        with ExitStack() as locks:
            for each in planned:
                locks.enter_context(ImageLock(each.source, LockMode.WRITE))
            before = [_mark(each.source) for each in planned]
        sealed = [image.seal() for image in self._images]
        for path, mark in zip(sealed, before, strict=True):
            now = _mark(path)
            # The ctime does not count: sealing has moved it.
            if (now.inode, now.size, now.mtime_ns) != (mark.inode, mark.size, mark.mtime_ns):
                raise Conflict(
                    "it was written to while the other disks of its guest were being sealed",
                    subject=path,
                    hint="shut the guest down, and run it again",
                )
        return sealed


def check_unchanged(chain: ImageChain) -> None:
    """Raises Conflict when a file of the chain was written to since it was scanned."""
    for file in chain.files:
        if file.changed():
            raise Conflict(
                "the image was written to while it was being read",
                subject=file.path,
                hint="stop what writes to it, and run the command again",
            )


def _lock(files: Sequence[ImageFile], stack: ExitStack, on_event: OnEvent) -> None:
    without: dict[Path, None] = {}
    for file in files:
        lock = stack.enter_context(ImageLock(file.path, LockMode.READ))
        if not lock.enforced:
            without[file.path.parent] = None
    for directory in without:
        on_event(Notice.no_locks(directory))


def _mark(path: Path) -> Fingerprint:
    with os_errors(path):
        fd = open_behind(path)
        try:
            return settle(fd)
        finally:
            os.close(fd)
