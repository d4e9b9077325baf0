"""The first half of an instant restore: images that can be used, and the server that they depend on.

    record -> hold at the destination -> server -> overlay

The record is written first. Whatever is killed after that, the next run reads the record, and continues with the same
point, the same socket and the same overlay, also where `latest` would mean a newer point by then.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from snapchain.destination.reading import ReadableDestination
from snapchain.destination.records import PointRecord
from snapchain.errors import Conflict, InvalidInput, NotFound, SnapchainError
from snapchain.host.directory import Directory
from snapchain.host.files import UNCHANGED, Standing, remove_temporaries
from snapchain.host.os_errors import os_errors
from snapchain.host.path_resolution import place_to_change
from snapchain.host.temporary_names import NEW
from snapchain.model.events import Notice, OnEvent, ignore
from snapchain.model.points import chosen_point
from snapchain.ops.instant import server
from snapchain.ops.instant.overlay import BITMAP, backing_of, make_overlay
from snapchain.ops.instant.record import (
    HOLD,
    InstantRecord,
    check_point,
    record_file,
    record_of,
    served_with,
)

Passphrase = Callable[[], str | None]
_TOKEN_BYTES = 6


@dataclass(frozen=True, slots=True)
class WantedImage:
    """An image, and the point that it is to show. The image lies in a directory that exists when it is made."""

    image: Path
    disk: str
    point: PointRecord


class PreparedImage(BaseModel):
    """An image that can be used. backing: what its header names"""

    model_config = ConfigDict(frozen=True)

    output: str
    disk: str
    point: int
    virtual_size: int
    content_id: str
    backing: str


@dataclass(frozen=True, slots=True)
class Prepared:
    """Images that can be used, with their records; served: whether the server had to be started"""

    records: Mapping[Path, InstantRecord]
    started: bool

    @property
    def images(self) -> tuple[PreparedImage, ...]:
        """For a report."""
        return tuple(
            PreparedImage(
                output=str(path),
                disk=each.disk,
                point=each.point,
                virtual_size=each.virtual_size,
                content_id=each.content_id,
                backing=each.backing_name,
            )
            for path, each in self.records.items()
        )


def image_of(output: Path) -> Path:
    """The path of an image that is to be made, links of its directory resolved.

    Raises InvalidInput for another format than qcow2, NotFound for a missing directory.
    """
    if output.suffix.lower() not in (".qcow2", ".qcow"):
        raise InvalidInput("an instant restore makes a qcow2 file", subject=output, hint="name one, such as web1.qcow2")
    with os_errors(output.parent):
        if not output.parent.is_dir():
            raise NotFound("there is no such directory", subject=output.parent)
    return place_to_change(output.absolute())


def begun(image: Path, destination: str, disk: str, point: str | None) -> InstantRecord | None:
    """The record of an earlier run for the same image; None where none has begun.

    destination: located; point: the text after '@', if it was named
    Raises Conflict for one of another disk, or another point than the one that is named.
    """
    record = record_of(image)
    if record is None:
        return None
    other = f"{record.destination}::{record.disk}@{record.point}"
    is_other_point = point is not None and point.isdecimal() and int(point) != record.point
    if (record.destination, record.disk) != (destination, disk) or is_other_point:
        raise Conflict(
            f"it is an instant restore of {other}, which is not finished",
            subject=image,
            hint="name another file; or continue that one: name the same point; or remove the file to give it up",
        )
    return record


def check_new(image: Path) -> None:
    """Raises Conflict where something has the name of an image that no record knows."""
    if not os.path.lexists(image):
        return
    hint = "name another file, or remove this one"
    name = None
    if image.is_file():
        try:
            found = backing_of(image)
            name = found.name if found is not None else None
        except SnapchainError:
            pass
    if name is not None and name.startswith("json:") and "instant-" in name:
        raise Conflict(
            "it is an instant restore whose record is gone, or belongs to another user",
            subject=image,
            hint="run the command as the user that began it; without the record, serve its point again "
            f"behind the same socket: {name}",
        )
    raise Conflict("it exists already", subject=image, hint=hint)


def wanted(destination: ReadableDestination, disk: str, image: Path, point: str | None) -> WantedImage:
    """A disk's point for an image. Raises NotFound."""
    (found,) = destination.disks(disk)
    return WantedImage(image, found.name, chosen_point(found.name, found.points, point))


def prepare(
    destination: ReadableDestination,
    located: str,
    images: Sequence[WantedImage],
    *,
    passphrase: Passphrase,
    standing: Standing = UNCHANGED,
    guest: str | None = None,
    guest_point: int | None = None,
    on_event: OnEvent = ignore,
) -> Prepared:
    """Make images on served points, or continue with those that earlier runs began: idempotent.

    located: the destination as `open_destination` takes it, from any directory
    images: in one directory, all of one guest or one disk; passphrase: for the server
    Raises Conflict for files that are there, Unsupported where points are read in one go, Unavailable where the point
    cannot be served: what was begun for new images is undone then.
    """
    for each in images:
        destination.whole(each.disk, str(each.point.point))  # is not entered: raises where it cannot be done
    with _alone_in(images[0].image.parent):
        records = _recorded(located, images, guest, guest_point)
        for path, record in records.items():
            check_point(destination, path, record)
        records = {path: _held(destination, path, record, on_event) for path, record in records.items()}
        first = next(iter(records))
        try:
            started = server.ensure(first, passphrase)
        except SnapchainError:
            if not any(os.path.lexists(path) for path in records):  # nothing depends on it yet
                for path, record in records.items():
                    forget(destination, path, record, on_event)
            raise
        for path, record in records.items():
            make_overlay(path, record, standing)
            if not record.made:
                records[path] = record.model_copy(update={"made": True})
                record_file(path).write(records[path])
        started |= server.ensure(first, passphrase)  # one that served images which are gone may have ended meanwhile
        return Prepared(records, started)


@contextmanager
def _alone_in(directory: Path) -> Iterator[None]:
    """No other run makes images in the directory meanwhile: it would undo what this one has begun.

    A lock on the directory; none where the file system has none.
    """
    with os_errors(directory), Directory.open(directory) as here:
        fd = here.opened()
        try:
            with suppress(OSError):
                fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            with suppress(OSError):
                fcntl.flock(fd, fcntl.LOCK_UN)


def _recorded(
    located: str, images: Sequence[WantedImage], guest: str | None, guest_point: int | None
) -> dict[Path, InstantRecord]:
    """The records of all images, those of earlier runs and new ones."""
    found = {each.image: record_of(each.image) for each in images}
    known = next((each for each in found.values() if each is not None), None)
    token = known.token if known is not None else secrets.token_hex(_TOKEN_BYTES)
    path = known.socket if known is not None else str(server.new_socket(token))
    names = tuple(each.image.name for each in images)
    for each in images:
        if found[each.image] is None:
            check_new(each.image)
    records = {}
    for each in images:
        record = found[each.image]
        if record is None:
            record = InstantRecord(
                token=token,
                socket=path,
                beside=names,
                destination=located,
                disk=each.disk,
                point=each.point.point,
                virtual_size=each.point.virtual_size,
                content_id=each.point.content_id,
                begun=datetime.now(UTC),
                guest=guest,
                guest_point=guest_point,
                bitmap=BITMAP,
            )
            record_file(each.image).write(record)
        elif record.made and not os.path.lexists(each.image):
            # It is made anew: until then its server waits for it, and no guest has written to it.
            record = record.model_copy(update={"made": False, "begun": datetime.now(UTC), "written": None})
            record_file(each.image).write(record)
        records[each.image] = record
    return records


def _held(destination: ReadableDestination, image: Path, record: InstantRecord, on_event: OnEvent) -> InstantRecord:
    """The record with its hold at the destination: without one the rules could drop the point while nobody serves it.

    A destination that takes no hold is used all the same: a server keeps what it serves, as long as it runs.
    """
    if record.hold is not None:
        return record
    tag = f"{HOLD}{record.token}"
    reason = f"{image} on {socket.gethostname()} depends on it"
    try:
        destination.hold(record.disk, str(record.point), tag, reason=reason)
    except NotFound:
        raise
    except SnapchainError as error:
        on_event(
            Notice.of(
                record.address,
                "the point could not be held. It is kept only while it is served: let no merge, forget or gc run "
                f"there before {image} is finished ({error.message})",
            )
        )
        return record
    record = record.model_copy(update={"hold": tag})
    record_file(image).write(record)
    return record


def forget(destination: ReadableDestination, image: Path, record: InstantRecord, on_event: OnEvent) -> None:
    """An image does not depend on its point any more: release the hold, remove the record, and end the last server.

    Idempotent. destination: opened to write
    """
    if record.hold is not None:
        try:
            destination.release(record.disk, str(record.point), record.hold)
        except NotFound:
            pass  # an earlier run has released it, or somebody has
        except SnapchainError as error:
            on_event(
                Notice.of(
                    record.address, f"its hold could not be released: snapchain release --tag {record.hold} ({error})"
                )
            )
    note = record_file(image)
    note.remove()
    for path in (image, note.directory / note.name):  # what killed runs have left
        remove_temporaries(path, purpose=NEW)
    if not any(each.token == record.token for each in served_with(image, record).values()):
        server.end(record)
        server.clear(record)
