"""Which disks of a guest are meant: pairs of an image here and its address at one replica."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from snapchain.errors import InvalidInput

DiskPairs = Annotated[
    list[str],
    typer.Argument(
        metavar="IMAGE DEST::DISK...",
        help="The top of a chain, and a disk at a replica: ssh://\\[user@]host/path or dir:/path. More such pairs: the "
        "other disks of the same guest, at the same replica.",
    ),
]


def disk_pairs(words: Sequence[str]) -> tuple[str, list[tuple[Path, str]]]:
    """The replica, and each image with its disk's name there. Raises InvalidInput."""
    from snapchain.destination.address import parse_disk_address

    if len(words) % 2:
        raise InvalidInput(f"{words[-1]} stands alone", hint="name pairs, an image and where it goes: IMAGE DEST::DISK")
    pairs = [(Path(image), parse_disk_address(target)) for image, target in zip(words[::2], words[1::2], strict=True)]
    dests = {address.dest for _, address in pairs}
    if len(dests) > 1:
        raise InvalidInput(
            "the disks of one guest go to one replica", subject=", ".join(sorted(dests)), hint="name one DEST for all"
        )
    return dests.pop(), [(image, address.disk) for image, address in pairs]
