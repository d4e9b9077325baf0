"""restore --instant DEST::GUEST DIR: an overlay for each disk of a guest point, one server, and the definition.

The definition is the one of a restore of a guest, and is written before anything is copied: the guest can be started
then. The disks are copied one after the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from snapchain.destination.reading import ReadableDestination
from snapchain.errors import Conflict, InvalidInput
from snapchain.model.consistency import Consistency
from snapchain.model.events import Notice, OnEvent, ignore
from snapchain.ops.guest_points import GuestView
from snapchain.ops.guest_records import read_record
from snapchain.ops.instant.prepare import Passphrase, WantedImage, prepare
from snapchain.ops.instant.record import InstantRecord, images_in, record_of
from snapchain.ops.instant.run import CopiedImage, UnderGuest, complete, is_detached, served_image
from snapchain.ops.restore.guest import GuestRestoration, GuestRestorePlan, GuestRestoreRequest, PlacedDisk


@dataclass(frozen=True, slots=True, kw_only=True)
class GuestInstantRequest:
    """restore: as of a plain restore, with qcow2 disks; the rest as of `InstantRequest`."""

    restore: GuestRestoreRequest
    located: str
    passphrase: Passphrase
    later: bool = False
    speed: int = 0


class GuestInstantReport(BaseModel):
    """What was done. disks: as an instant restore of one reports them; the rest as `GuestRestoreReport`"""

    model_config = ConfigDict(frozen=True)

    source: str
    guest: str
    guest_point: int
    time: datetime
    consistency: Consistency
    directory: str
    disks: tuple[CopiedImage, ...]
    files: tuple[str, ...]
    definition: str | None
    lacking: tuple[str, ...]
    defined: str | None = None


class GuestInstantRestoration:
    """A guest point, and a directory with images that show it at once."""

    def __init__(
        self,
        destination: ReadableDestination,
        view: GuestView,
        request: GuestInstantRequest,
        *,
        on_event: OnEvent = ignore,
    ) -> None:
        """Raises NotFound for a point that is not there, Conflict for a directory with another one."""
        if request.restore.whole_chain or request.restore.format == "raw":
            raise InvalidInput("an instant restore makes flat qcow2 files", hint="leave out --chain and --format")
        self._destination, self._request, self._on_event = destination, request, on_event
        self._guest = view.name
        directory = request.restore.directory.absolute()
        begun = _begun(directory, request, view.name)
        point = request.restore.point if begun is None else str(begun.guest_point)
        self._point = view.point(point)
        self._record = read_record(destination, self._point, disk=view.record_disk)
        self._restoration = GuestRestoration(
            destination, view, replace(request.restore, point=point, format="qcow2"), on_event=on_event
        )
        self._is_made = begun is not None and self._restoration.has_definition and not self._restoration.is_begun

    def plan(self) -> GuestRestorePlan:
        """What `run` will do; reads maps, and no data. Raises Conflict for files that are there already."""
        return self._restoration.plan(is_made=self._is_made)

    @property
    def is_made(self) -> bool:
        """Whether an earlier run has made all files, so that only copying is left."""
        return self._is_made

    def run(self, *, under_guest: UnderGuest | None = None) -> GuestInstantReport:
        """Make the images and the definition, then copy. What an error or a signal leaves, the next run continues."""
        defined: str | None = None
        if self._is_made:
            self._serve([each for each in self._restoration.disks if record_of(each.path) is not None])
        else:
            defined = self._restoration.run(serve=self._serve).defined
            words = "the guest can be started now. Its disks depend on the destination until they are copied"
            self._on_event(Notice.of(self._request.restore.directory, words))
        disks = tuple(self._completed(each, under_guest) for each in self._restoration.disks)
        return GuestInstantReport(
            source=self._destination.url,
            guest=self._guest,
            guest_point=self._point.point,
            time=self._record.time,
            consistency=self._record.consistency,
            directory=str(self._request.restore.directory),
            disks=disks,
            files=tuple(map(str, self._restoration.definition_files)),
            definition=None if self._restoration.definition is None else str(self._restoration.definition),
            lacking=self._restoration.lacking(),
            defined=defined,
        )

    def _serve(self, disks: Sequence[PlacedDisk]) -> None:
        left = [each for each in disks if (found := record_of(each.path)) is None or not is_detached(each.path, found)]
        if not left:
            return
        prepare(
            self._destination,
            self._request.located,
            [WantedImage(each.path, each.recorded.disk, each.point) for each in left],
            passphrase=self._request.passphrase,
            standing=self._request.restore.standing,
            guest=self._guest,
            guest_point=self._point.point,
            on_event=self._on_event,
        )

    def _completed(self, disk: PlacedDisk, under_guest: UnderGuest | None) -> CopiedImage:
        record = record_of(disk.path)
        if record is None:  # by an earlier run
            return CopiedImage(
                output=str(disk.path),
                disk=disk.recorded.disk,
                point=disk.point.point,
                virtual_size=disk.point.virtual_size,
                state="done",
                content_id=None,
            )
        if self._request.later:
            return served_image(disk.path, record)
        return complete(
            self._destination,
            disk.path,
            record,
            later=False,
            passphrase=self._request.passphrase,
            speed=self._request.speed,
            under_guest=under_guest,
            on_event=lambda event: self._on_event(
                event.within(disk.recorded.name) if isinstance(event, Notice) else event
            ),
        )


def _begun(directory: Path, request: GuestInstantRequest, guest: str) -> InstantRecord | None:
    """The record of one of the guest's images, of an earlier run. Raises Conflict for another guest, or point."""
    records = list(images_in(directory).values())
    if not records:
        return None
    found = next((each for each in records if (each.destination, each.guest) == (request.located, guest)), records[0])
    point = request.restore.point
    is_other_point = point is not None and point.isdecimal() and int(point) != found.guest_point
    if (found.destination, found.guest) != (request.located, guest) or is_other_point:
        there = f"{found.destination}::{found.guest or found.disk}@{found.guest_point or found.point}"
        raise Conflict(
            f"an instant restore of {there} is not finished there",
            subject=directory,
            hint="restore into another directory; or continue that one: name its point",
        )
    return found
