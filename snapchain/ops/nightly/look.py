"""What an image's chain is right now: told under QEMU's read locks, so a running guest shows as Busy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from snapchain.image import ImageChain
from snapchain.image.file import Format
from snapchain.model.chain import Chain
from snapchain.model.events import OnEvent, ignore
from snapchain.model.extents import Extents
from snapchain.model.fingerprint import Fingerprint
from snapchain.model.layer import Layer
from snapchain.source.at_rest import ImageAtRest


@dataclass(frozen=True, slots=True)
class FileFacts:
    """One file of a chain. source: the key by which destinations know it."""

    path: Path
    real_path: Path
    format: Format
    source: Fingerprint


@dataclass(frozen=True, slots=True, eq=False)
class ImageFacts:
    """A chain, root first. fresh: its top says nothing that is not below it; shadowed_bytes: data hidden by layers
    above
    """

    files: tuple[FileFacts, ...]
    fresh: bool
    shadowed_bytes: int


def look(
    image: Path, *, format: str | None = None, image_dirs: Sequence[Path] = (), on_event: OnEvent = ignore
) -> ImageFacts:
    """Raises what `scan` raises for an image that is broken or refused, Busy when somebody writes to it, and Conflict
    for a disk that was given to another host.
    """
    source = ImageAtRest(image, format=format, image_dirs=image_dirs, on_event=on_event)
    with source.opened() as chain:
        source.check_not_given(chain)
        layers = Chain(tuple(_layers(chain)))
        return ImageFacts(
            files=tuple(
                FileFacts(path=file.path, real_path=file.real_path, format=file.format, source=file.fingerprint)
                for file in chain.files
            ),
            fresh=_is_fresh(chain),
            shadowed_bytes=int(layers.shadowed().data.sum()),
        )


def _is_fresh(chain: ImageChain) -> bool:
    below = chain.files[-2] if len(chain.files) > 1 else None
    return below is not None and chain.top.extents == Extents.absent(below.size)


def _layers(chain: ImageChain) -> list[Layer]:
    places = range(len(chain.files))
    return [
        Layer(str(place), file.extents, str(place - 1) if place else None)
        for place, file in zip(places, chain.files, strict=True)
    ]
