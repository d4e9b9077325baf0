"""An image chain opened for reading while nobody can write it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from snapchain.errors import Conflict, InvalidInput
from snapchain.host.locks import ImageLock, LockMode
from snapchain.host.terminal import shell_word
from snapchain.image import ImageChain, scan
from snapchain.model.events import Notice, OnEvent, ignore


@contextmanager
def sealed_chain(
    path: Path, *, format: str | None = None, image_dirs: Sequence[Path] = (), on_event: OnEvent = ignore
) -> Iterator[ImageChain]:
    """All of a chain but its top, locked as by `locked_chain`; a guest may write to the top meanwhile.

    Raises InvalidInput when there is nothing below the top.
    """
    with ExitStack() as stack:
        chain = stack.enter_context(scan(path, format=format, image_dirs=image_dirs))
        if len(chain.files) < 2:
            raise InvalidInput(
                "nothing of it is sealed: it is one file, which a guest will go on writing to",
                subject=path,
                hint=f"seal it first: snapchain snapshot {shell_word(path)}",
            )
        sealed = chain.at(len(chain.files) - 2)
        _lock(sealed, stack, on_event)
        yield sealed


@contextmanager
def paused_chain(
    path: Path, *, format: str | None = None, image_dirs: Sequence[Path] = (), on_event: OnEvent = ignore
) -> Iterator[ImageChain]:
    """A chain of which the top may be open elsewhere, by a guest that its user has paused; the rest is locked.

    QEMU writes all that it holds when a guest is paused, its tables too. Whoever reads says `check_unchanged` at the
    end. Errors as `locked_chain`.
    """
    with ExitStack() as stack:
        chain = stack.enter_context(scan(path, format=format, image_dirs=image_dirs))
        if len(chain.files) > 1:
            _lock(chain.at(len(chain.files) - 2), stack, on_event)
        check_unchanged(chain)
        yield chain


@contextmanager
def locked_chain(
    path: Path, *, format: str | None = None, image_dirs: Sequence[Path] = (), on_event: OnEvent = ignore
) -> Iterator[ImageChain]:
    """Scan a chain and hold QEMU's read locks on all its files, so that no guest starts on it meanwhile.

    Raises Busy when somebody has one of them open for writing, Conflict when one changes between look and lock.
    """
    with ExitStack() as stack:
        chain = stack.enter_context(scan(path, format=format, image_dirs=image_dirs))
        _lock(chain, stack, on_event)
        yield chain


def _lock(chain: ImageChain, stack: ExitStack, on_event: OnEvent) -> None:
    without: dict[Path, None] = {}
    for file in chain.files:
        lock = stack.enter_context(ImageLock(file.path, LockMode.READ))
        if not lock.enforced:
            without[file.path.parent] = None
    for directory in without:
        on_event(Notice.no_locks(directory))
    check_unchanged(chain)


def check_unchanged(chain: ImageChain) -> None:
    """Raises Conflict when a file of the chain was written to since it was scanned."""
    for file in chain.files:
        if file.changed():
            raise Conflict(
                "the image was written to while it was being read",
                subject=file.path,
                hint="stop what writes to it, and run the command again",
            )
