"""An image that is about to move, as it stands here: its files, and whether it was given away already."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from snapchain.errors import Conflict, Unsupported
from snapchain.image import ImageChain, scan
from snapchain.model.fingerprint import Fingerprint
from snapchain.ops.migrate.request import MigrateRequest, Move
from snapchain.replica.endpoint import Endpoint
from snapchain.source import ownership
from snapchain.source.notes import Given, Notes

_RAW_CLUSTER = 64 * 1024


@dataclass(frozen=True, slots=True)
class Look:
    """An image as it stands here. files: with the fingerprint of each; quiet: the top says nothing that is not sealed.

    sealable: its top can become a layer with an overlay in its place; a raw one cannot, and goes as it is
    """

    files: tuple[tuple[Path, Fingerprint], ...]
    top: Path
    size: int
    cluster_size: int
    extended_l2: bool
    sealable: bool
    quiet: bool
    epoch: int
    given: Given | None

    def unchanged(self, now: Look) -> bool:
        """Whether nobody has written to it, or put other files there, up to `now`."""
        return len(self.files) == len(now.files) and all(
            mine[0] == theirs[0] and mine[1].same_content_as(theirs[1])
            for mine, theirs in zip(self.files, now.files, strict=True)
        )


@contextmanager
def opened(request: MigrateRequest, move: Move) -> Iterator[ImageChain]:
    """Its chain. Raises Unsupported, before anything is asked or done, for a disk that is not to be marked."""
    kind = move.format or request.format
    with scan(move.image, format=kind, image_dirs=request.image_dirs, is_written=request.running) as chain:
        chain.top.check_may_be_changed()
        yield chain


def look_at(request: MigrateRequest, move: Move) -> Look:
    with opened(request, move) as chain:
        top, notes = chain.top, Notes()
        if not top.real_path.is_file():
            raise Unsupported(
                "a device cannot be marked as given away", subject=top.path, hint="send it, and move its guest by hand"
            )
        says_nothing = not top.extents.data_bytes and not top.extents.zero_bytes
        return Look(
            files=tuple((file.real_path, file.fingerprint) for file in chain.files),
            top=top.real_path,
            size=chain.size,
            cluster_size=top.cluster_size or _RAW_CLUSTER,
            extended_l2=bool(top.header and top.header.extended_l2),
            sealable=top.header is not None,
            quiet=len(chain.files) > 1 and says_nothing and chain.files[-2].size == top.size,
            epoch=ownership.epoch_of(chain, notes),
            given=ownership.given(chain, notes),
        )


def token_of(request: MigrateRequest, looks: Sequence[Look], endpoint: Endpoint) -> str | None:
    """Of the handover that these disks are in. Raises Conflict for one to elsewhere, or of other disks besides."""
    marks = [(move, look.given) for move, look in zip(request.moves, looks, strict=True) if look.given is not None]
    if not marks:
        return None
    for move, mark in marks:
        if (mark.destination, mark.disk) != (endpoint.url, move.disk):
            raise Conflict(
                f"it was given to {mark.destination}::{mark.disk}, in epoch {mark.epoch}",
                subject=move.image,
                hint="name that destination, to finish the handover or to take it back",
            )
        if mark.token != marks[0][1].token or set(mark.together) != {each.disk for each in request.moves}:
            raise Conflict(
                f"it was given together with {', '.join(sorted(mark.together))}",
                subject=move.image,
                hint="name just these, all of them",
            )
    return marks[0][1].token


def check_was_given(move: Move, mark: Given) -> None:
    """Raises GivenAwayError for a disk that another host took over: this host has begun no handover of it."""
    if mark.taken_over:
        raise ownership.GivenAwayError(
            mark,
            subject=move.image,
            hint="if that host is gone for good, say --take-back --destination-is-gone; the guest then has the bytes "
            "that are here",
        )
