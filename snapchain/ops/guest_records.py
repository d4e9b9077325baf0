"""Reading the records of guest points: how a guest was defined, and what its disks were."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from snapchain.destination.guest_record import LARGEST, GuestRecord, decode, guest_of, taken_for
from snapchain.destination.reading import ReadableDestination, Sink
from snapchain.errors import Corrupt
from snapchain.model.content import LEAF_BYTES, ZERO_LEAF, content_id, leaf_hash, sum_of
from snapchain.ops.guest_points import GuestPoint

_ROOM = 1 << 20
"""By so much a disk may be larger than what it holds: images are rounded up."""

_OTHER = "take another guest point; `snapchain verify DEST::GUEST` tells which are whole"


def read_record(destination: ReadableDestination, point: GuestPoint, *, disk: str) -> GuestRecord:
    """The record of a guest point. disk: that holds it.

    Raises NotFound, Corrupt for what is no record or not the recorded bytes, Unavailable.
    """
    subject = f"{destination.url}::{disk}@{point.point}"
    if point.record.virtual_size > LARGEST + _ROOM:
        raise Corrupt(f"the record of a guest has more than {LARGEST} bytes", subject=subject, hint=_OTHER)
    content = memoryview(bytearray(point.record.virtual_size))

    def write(pieces: Sequence[tuple[int, memoryview]]) -> None:
        for offset, piece in pieces:
            content[offset : offset + len(piece)] = piece[: len(content) - offset]

    with destination.reader(disk, str(point.point), clusters=False) as reader:
        for layer in reader.layers():
            layer.copy(Sink(write), on_copied=lambda _offset, _count: None)
        size = reader.point.virtual_size
    if size != len(content) or _content_id(content) != point.record.content_id:
        raise Corrupt("the record has other bytes than its point", subject=subject, hint=_OTHER)
    record = decode(bytes(content).rstrip(b"\0"), subject=subject)
    if record.instant != point.instant:
        raise Corrupt("the record is one of another guest point", subject=subject, hint=_OTHER)
    guest = guest_of(disk)
    return record if guest is None else taken_for(record, guest)


def _content_id(content: memoryview) -> str:
    leaves = [leaf_hash(content[at : at + LEAF_BYTES]) for at in range(0, len(content), LEAF_BYTES)]
    index = [place for place, digest in enumerate(leaves) if digest != ZERO_LEAF]
    hashes = np.frombuffer(b"".join(leaves[place] for place in index), np.uint8).reshape(-1, len(ZERO_LEAF))
    return content_id(len(content), sum_of(np.array(index, np.int64), hashes))
