"""The disks of one guest: each image once, each under a name of its own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from snapchain.errors import InvalidInput


def check_disks(disks: Sequence[tuple[Path, str]]) -> None:
    """Raises InvalidInput for none at all, and for an image or a name that comes twice."""
    if not disks:
        raise InvalidInput("no disk is named", hint="name pairs: IMAGE DEST::DISK")
    images = [str(image.resolve()) for image, _ in disks]
    for what, named in (("image", images), ("disk", [name for _, name in disks])):
        twice = next((each for each in named if named.count(each) > 1), None)
        if twice is not None:
            raise InvalidInput(f"the {what} is named twice", subject=twice)
