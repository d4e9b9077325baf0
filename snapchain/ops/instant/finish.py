"""The last half of an instant restore: an image that has all of its point becomes a plain one.

    complete?  no byte of the image comes from its backing file
    proven?    its content id is that of the point; where it differs, a guest has written there
    plain      one write of one sector: no backing name, no bitmap

All under one lock, so that no guest starts in between. What a guest wrote is known by the bitmap in the image, or was
noted before the copying began. QEMU loses the bitmap when a guest is killed: what differs then cannot be told from
damage, and is reported.
"""

from __future__ import annotations

import base64
import os
import zlib
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import numpy.typing as npt

from snapchain.destination.reading import ReadableDestination
from snapchain.errors import Busy, Corrupt, Unavailable
from snapchain.host.directory import open_behind
from snapchain.host.locks import ImageLock, LockMode
from snapchain.image import ImageChain, ImageFile
from snapchain.image.backing import Place
from snapchain.image.leaves import counted
from snapchain.image.physical import RunBudget
from snapchain.image.qcow2.bitmap import read_bitmap
from snapchain.image.qcow2.header import read_header
from snapchain.merge.amendment import detach
from snapchain.model.content import LEAF_BYTES, content_id, empty_sum
from snapchain.model.events import OnEvent, counting
from snapchain.model.extents import ABSENT
from snapchain.ops.diff import ImageSide, diff
from snapchain.ops.instant.overlay import check_no_snapshots
from snapchain.ops.instant.record import InstantRecord, check_point, record_file

_PHASE = "prove"
Bits = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Proof:
    """What the image shows. guest_bytes: in leaves of 64 KiB, that a guest has written and that differ from the point

    unproven_bytes: that differ too, where nobody knows whether a guest wrote them
    """

    content_id: str
    guest_bytes: int
    unproven_bytes: int


def note_begin(image: Path, record: InstantRecord) -> InstantRecord:
    """Note that the copying begins, and what a guest has written so far.

    QEMU opens the image next; when that is killed, the bitmap is void.
    """
    changes: dict[str, object] = {"copying_since": datetime.now(UTC)}
    with (
        suppress(Busy),
        ImageLock(image, LockMode.READ),
        ImageFile(Place.of(image), open_behind(image), format="qcow2", budget=RunBudget()) as file,
    ):
        changes["copied_before"] = file.size - lacking_bytes(file)
        if (found := _bitmap(image, record)) is not None:
            changes["written"] = _packed(found)
    record = record.model_copy(update=changes)
    record_file(image).write(record)
    return record


def finish(destination: ReadableDestination, image: Path, record: InstantRecord, *, on_event: OnEvent) -> Proof:
    """Prove an image that was copied, and make it a plain one. Idempotent: a plain image is proven again.

    Raises Busy where a program has it open, Unavailable where a part is still lacking, Corrupt where it differs from
    its point although no guest wrote there, Unsupported for internal snapshots: then it is left as it is.
    """
    with ImageLock(image, LockMode.WRITE):
        check_no_snapshots(image)
        fd = open_behind(image, writing=True)
        try:
            with ImageFile(Place.of(image), os.dup(fd), format="qcow2", budget=RunBudget()) as file:
                if (lacking := lacking_bytes(file)) > 0:
                    raise Unavailable(
                        f"{lacking} bytes of its point were not copied yet",
                        subject=image,
                        hint="run the command again: it continues",
                    )
                proof = _proven(destination, file, record, on_event)
            detach(fd, subject=image)
        finally:
            os.close(fd)
    return proof


def lacking_bytes(file: ImageFile) -> int:
    """Guest bytes that an image without its backing file does not have."""
    return sum(length for _, length, value in file.extents.runs() if value == ABSENT)


def _proven(destination: ReadableDestination, file: ImageFile, record: InstantRecord, on_event: OnEvent) -> Proof:
    chain = ImageChain([file], owned=False)
    on_bytes = counting(_PHASE, file.extents.data_bytes, on_event)
    found = content_id(file.size, counted(file.extents, chain, None, empty_sum(), on_bytes=on_bytes))
    if found == record.content_id:
        return Proof(found, 0, 0)
    assert file.header is not None
    marked = _bitmap(file.path, record)
    written = marked if marked is not None else _unpacked(record.written, file.size)
    check_point(destination, file.path, record)
    with destination.leaves(record.disk, str(record.point), on_event=on_event) as point:
        ranges = diff(point, ImageSide(str(file.path), chain)).ranges
    known = unknown = 0
    first: int | None = None
    for each in ranges:
        for at in range(each.offset, each.offset + each.length, LEAF_BYTES):
            length = min(LEAF_BYTES, each.offset + each.length - at)
            if at // LEAF_BYTES < len(written) and written[at // LEAF_BYTES]:
                known += length
            else:
                unknown += length
                first = at if first is None else first
    if unknown and marked is not None:
        raise Corrupt(
            f"it differs from its point in {unknown} bytes that no guest wrote, the first at {first}",
            subject=file.path,
            hint="it is left as it is, with its backing file. Check the disk of this host, then restore to another "
            "file; what a guest wrote here is in this one",
        )
    return Proof(found, known, unknown)


def _bitmap(image: Path, record: InstantRecord) -> Bits | None:
    """bool[leaves]: what was written; None where the image has no valid bitmap."""
    if record.bitmap is None:
        return None
    fd = open_behind(image)
    try:
        found = read_bitmap(fd, read_header(fd, subject=image), record.bitmap, subject=image)
    finally:
        os.close(fd)
    return found[1] if found is not None and found[0] == LEAF_BYTES else None


def _packed(bits: Bits) -> str:
    return base64.b64encode(zlib.compress(np.packbits(bits).tobytes())).decode()


def _unpacked(text: str | None, size: int) -> Bits:
    count = -(-size // LEAF_BYTES)
    if text is None:
        return np.zeros(count, np.bool_)
    data = zlib.decompressobj().decompress(base64.b64decode(text), -(-count // 8))
    return np.unpackbits(np.frombuffer(data, np.uint8))[:count].astype(np.bool_)
