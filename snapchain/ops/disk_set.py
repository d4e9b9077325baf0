"""The disks of one guest: each image once, each under a name of its own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from snapchain.errors import InvalidInput


def check_disks(disks: Sequence[tuple[Path, str]]) -> None:
    """Raises InvalidInput for none at all, and for an image or a name that comes twice."""
    if not disks:
        raise InvalidInput("no disk is named", hint="name pairs: IMAGE DEST::DISK")
    images = [_file(image) for image, _ in disks]
    for what, named in (("image", images), ("disk", [name for _, name in disks])):
        twice = next((at for at, each in enumerate(named) if each in named[:at]), None)
        if twice is not None:
            raise InvalidInput(f"the {what} is named twice", subject=str(disks[twice][what == "disk"]))


def _file(image: Path) -> object:
    """The same for two names of one file."""
    try:
        status = image.stat()
    except OSError:  # told by who opens it
        return image
    return status.st_dev, status.st_ino
