"""restore --instant DEST::DISK OUT.qcow2: an image that can be used at once, and is a plain copy of its point later.

    prepare    the record, the hold, the server, the overlay         the image can be used
    hydrate    what the image lacks is copied                        by us, or under a running guest
    finish     proven, a plain qcow2 file; hold, record and server are gone

Each step is idempotent, and the next run begins with what is there.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from snapchain.destination.reading import ReadableDestination
from snapchain.errors import Busy, Conflict, Unavailable
from snapchain.host.files import UNCHANGED, Standing, free_bytes
from snapchain.host.locks import ImageLock, LockMode
from snapchain.host.openers import OpenFiles
from snapchain.model.events import Notice, OnEvent, ignore
from snapchain.ops.instant.finish import Proof, finish, note_begin
from snapchain.ops.instant.hydrate import hydrate
from snapchain.ops.instant.overlay import backing_of, check_no_snapshots
from snapchain.ops.instant.prepare import (
    Passphrase,
    WantedImage,
    begun,
    check_new,
    forget,
    image_of,
    prepare,
    wanted,
)
from snapchain.ops.instant.record import InstantRecord, record_of

_LOOK_SECONDS = 2.0

UnderGuest = Callable[[Path, InstantRecord], bool]
"""Copies under the guest that has the image open; False where it cannot be reached, or has ended."""


@dataclass(frozen=True, slots=True, kw_only=True)
class InstantRequest:
    """located: the destination as `open_destination` takes it, from any directory; disk, point: there

    output: the image; standing: its owner and mode; later: make it usable, and copy nothing
    passphrase: for the server; speed: bytes a second, 0 for no limit
    """

    located: str
    disk: str
    point: str | None
    output: Path
    passphrase: Passphrase
    standing: Standing = UNCHANGED
    later: bool = False
    speed: int = 0


class InstantPlan(BaseModel):
    """What would be done. begun: whether an earlier run has begun it; data_bytes: of the point, to be copied"""

    model_config = ConfigDict(frozen=True)

    source: str
    disk: str
    point: int
    time: str
    virtual_size: int
    content_id: str
    output: str
    begun: bool
    data_bytes: int
    copies: bool


class CopiedImage(BaseModel):
    """An image. state: served: it can be used, and depends on the server; done: it is a plain qcow2 file

    content_id: of the point; of what it shows, when it is done, and None where a guest writes to it
    guest_bytes: that a guest wrote, and that differ from the point, in units of 64 KiB
    unproven_bytes: that differ, and nobody knows whether a guest wrote them
    """

    model_config = ConfigDict(frozen=True)

    output: str
    disk: str
    point: int
    virtual_size: int
    state: Literal["served", "done"]
    content_id: str | None
    guest_bytes: int = 0
    unproven_bytes: int = 0
    backing: str | None = None


class InstantReport(CopiedImage):
    """What was done, of one disk. source: the destination"""

    source: str


class InstantRestoration:
    """A point of a disk, and the image that shows it at once."""

    def __init__(self, destination: ReadableDestination, request: InstantRequest) -> None:
        """Looks, and changes nothing. Raises NotFound, InvalidInput, and Conflict for a file that is in the way."""
        self._destination, self._request = destination, request
        self._image = image_of(request.output)
        self._record = begun(self._image, request.located, request.disk, request.point)
        if self._record is None:
            check_new(self._image)
        point = request.point if self._record is None else str(self._record.point)
        self._wanted: WantedImage = wanted(destination, request.disk, self._image, point)

    def plan(self) -> InstantPlan:
        """What `run` will do; reads maps, and no data."""
        each = self._wanted
        with self._destination.reader(each.disk, str(each.point.point), maps_only=True) as reader:
            data_bytes = reader.data_bytes
        return InstantPlan(
            source=self._destination.url,
            disk=each.disk,
            point=each.point.point,
            time=each.point.time.isoformat(),
            virtual_size=each.point.virtual_size,
            content_id=each.point.content_id,
            output=str(self._image),
            begun=self._record is not None,
            data_bytes=data_bytes,
            copies=not self._request.later,
        )

    def run(self, *, under_guest: UnderGuest | None = None, on_event: OnEvent = ignore) -> InstantReport:
        """Make the image usable, copy, prove. What an error or a signal leaves, the next run continues.

        under_guest: for an image that a guest has open
        """
        request, image = self._request, self._image
        if self._record is None:
            self._check_space()
        if self._record is None or not is_detached(image, self._record):
            prepared = prepare(
                self._destination,
                request.located,
                [self._wanted],
                passphrase=request.passphrase,
                standing=request.standing,
                on_event=on_event,
            )
            self._record = prepared.records[image]
            on_event(Notice.of(image, "it can be used now, and depends on the destination until it is copied"))
        found = complete(
            self._destination,
            image,
            self._record,
            later=request.later,
            passphrase=request.passphrase,
            speed=request.speed,
            under_guest=under_guest,
            on_event=on_event,
        )
        return InstantReport(source=self._destination.url, **found.model_dump())

    def _check_space(self) -> None:
        needed, free = self.plan().data_bytes, free_bytes(self._image.parent)
        if not self._request.later and needed > free:
            raise Unavailable(
                f"the copy needs up to {needed} bytes, but only {free} are free",
                subject=self._image.parent,
                hint="make room, or restore elsewhere",
            )


def is_detached(image: Path, record: InstantRecord) -> bool:
    """Whether an image of a record names no export any more: all was copied, and the end was cut off.

    Raises Conflict for an image that names another one: it is not done, whoever has it open; as reading its header.
    """
    if not os.path.lexists(image):
        return False
    found = backing_of(image)
    if found is not None and found.name != record.backing_name:
        raise Conflict(
            "it depends on something else than its record says, so it is not the image of this instant restore",
            subject=image,
            hint=f"it depends on {found.name}, the record on {record.backing_name}; restore to another file",
        )
    return found is None


def complete(
    destination: ReadableDestination,
    image: Path,
    record: InstantRecord,
    *,
    later: bool,
    passphrase: Passphrase,
    speed: int,
    under_guest: UnderGuest | None,
    on_event: OnEvent,
) -> CopiedImage:
    """Copy, prove and let go of an image that can be used; with `later` only say how it stands."""
    if later:
        return served_image(image, record)
    while not is_detached(image, record):
        check_no_snapshots(image)
        if _waited(image, record, under_guest, on_event):
            continue
        record = note_begin(image, record)
        try:
            hydrate(image, record, passphrase=passphrase, speed=speed, on_event=on_event)
        except Busy:
            if not _guests(image):
                raise
            continue  # a guest was faster
        break
    proof = _finished(destination, image, record, under_guest, on_event)
    forget(destination, image, record, on_event)
    done = served_image(image, record).model_copy(update={"state": "done", "content_id": None, "backing": None})
    if proof is None:
        return done
    return done.model_copy(
        update={
            "content_id": proof.content_id,
            "guest_bytes": proof.guest_bytes,
            "unproven_bytes": proof.unproven_bytes,
        }
    )


def _finished(
    destination: ReadableDestination,
    image: Path,
    record: InstantRecord,
    under_guest: UnderGuest | None,
    on_event: OnEvent,
) -> Proof | None:
    """None for an image that was copied under a guest which still has it open."""
    try:
        return finish(destination, image, record, on_event=on_event)
    except Busy:
        if not is_detached(image, record):
            raise
        if under_guest is not None:
            under_guest(image, record)  # a run that was killed may have left the bitmap in it
        on_event(Notice.of(image, "all of its point is in it. A guest writes to it, so it is not compared with it"))
        return None


def served_image(image: Path, record: InstantRecord) -> CopiedImage:
    """An image that can be used, and depends on its server."""
    return CopiedImage(
        output=str(image),
        disk=record.disk,
        point=record.point,
        virtual_size=record.virtual_size,
        state="served",
        content_id=record.content_id,
        backing=record.backing_name,
    )


def _guests(image: Path) -> list[str]:
    """Programs other than a copying of ours that have the image open for writing."""
    found = OpenFiles().openers(image.stat())
    return [str(each) for each in found if each.writing and not each.command.startswith("qemu-storage-d")]


def _waited(image: Path, record: InstantRecord, under_guest: UnderGuest | None, on_event: OnEvent) -> bool:
    """Whether a guest had the image open: it was copied under it, or it has closed it.

    Raises Busy where another run copies it, Conflict where the image is gone.
    """
    try:
        ImageLock(image, LockMode.WRITE).release()
    except Busy:
        guests = _guests(image)
        if not guests:
            raise
    else:
        return False
    if under_guest is not None and under_guest(image, record):
        return True
    on_event(
        Notice.of(
            image,
            f"it is open in {', '.join(guests)}: that works, and the copying begins when it is closed. Waiting",
        )
    )
    while _guests(image):
        time.sleep(_LOOK_SECONDS)
        if record_of(image) is None or not os.path.lexists(image):
            raise Conflict("it was removed meanwhile", subject=image, hint="run the command again to begin anew")
    return True
