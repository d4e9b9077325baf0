"""An image chain opened for reading while nobody can write it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from snapchain.errors import Conflict
from snapchain.host.locks import ImageLock, LockMode
from snapchain.image import ImageChain, scan
from snapchain.ops.events import Notice, OnEvent, ignore


@contextmanager
def locked_chain(
    path: Path, *, format: str | None = None, image_dirs: Sequence[Path] = (), on_event: OnEvent = ignore
) -> Iterator[ImageChain]:
    """Scan a chain and hold QEMU's read locks on all its files, so that no guest starts on it meanwhile.

    Raises Busy when somebody has one of them open for writing, Conflict when one changes between look and lock.
    """
    with ExitStack() as stack:
        chain = stack.enter_context(scan(path, format=format, image_dirs=image_dirs))
        for file in chain.files:
            lock = stack.enter_context(ImageLock(file.path, LockMode.READ))
            if not lock.enforced:
                on_event(Notice(f"{file.path}: this filesystem has no locks; make sure that no guest uses it"))
        check_unchanged(chain)
        yield chain


def check_unchanged(chain: ImageChain) -> None:
    """Raises Conflict when a file of the chain was written to since it was scanned."""
    for file in chain.files:
        if file.changed():
            raise Conflict(
                "the image was written to while it was being read",
                subject=file.path,
                hint="stop what writes to it, and run the command again",
            )
