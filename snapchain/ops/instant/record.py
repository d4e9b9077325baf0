"""The record of an instant restore, beside its image while the image depends on a destination.

    web1.qcow2                        the overlay; its backing name is the URI of an export behind a unix socket
    .web1.qcow2.snapchain-instant     the record: destination, disk, point, socket; the next run continues by it

The images of a guest are served by one process, behind one socket: their records name each other.
"""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from snapchain.destination.address import PointAddress
from snapchain.destination.reading import ReadableDestination
from snapchain.errors import Conflict
from snapchain.host.note_file import NoteFile
from snapchain.model.points import chosen_point

_SUFFIX = ".snapchain-instant"
_PURPOSE = "instant-restore"
_CAP = 16 << 20
RECONNECT_SECONDS = 60
"""For which requests of a guest wait for the server to be started again. Later ones fail."""
HOLD = "instant-restore-"
"""How the tags of the holds begin."""


class InstantRecord(BaseModel):
    """What an image depends on.

    token: of all images that are served together; socket: of their server; beside: file names of these images
    destination: as `open_destination` takes it; disk, point: there, on hold under `hold` where that was allowed
    guest: of which the disk is one, with the number of its guest point
    virtual_size, content_id: of the point; begun: when
    made: whether the image was made: then it is missed when it is gone
    bitmap: name of the image's bitmap of what was written to it, None for none
    copying_since, copied_before: when the copying began last, and how many guest bytes the image had then
    written: the content of that bitmap before the copying began last, packed, deflated, in base64
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: Literal[1] = 1
    token: str
    socket: str
    beside: tuple[str, ...]
    destination: str
    disk: str
    point: int
    virtual_size: int
    content_id: str
    begun: datetime
    guest: str | None = None
    guest_point: int | None = None
    hold: str | None = None
    made: bool = False
    bitmap: str | None = None
    written: str | None = None
    copying_since: datetime | None = None
    copied_before: int = 0

    @property
    def address(self) -> PointAddress:
        """The point, by its number."""
        return PointAddress(self.destination, self.disk, str(self.point))

    @property
    def export(self) -> str:
        """Under which it is served."""
        return f"{self.disk}@{self.point}"

    @property
    def backing_name(self) -> str:
        """What the image's header names: without the server nobody can open the image, so nobody reads zeroes.

        Not a URI: it could not say for how long QEMU shall wait for a server that is started again.
        """
        server = {"type": "unix", "path": self.socket}
        nbd = {"driver": "nbd", "server": server, "export": self.export, "reconnect-delay": RECONNECT_SECONDS}
        return "json:" + json.dumps({"driver": "raw", "file": nbd}, separators=(",", ":"))


def record_file(image: Path) -> NoteFile[InstantRecord]:
    """Where the record of an image is."""
    return NoteFile(image.parent, f".{image.name}{_SUFFIX}", InstantRecord, _PURPOSE, _CAP)


def record_of(image: Path) -> InstantRecord | None:
    """None for an image that is no instant restore, or is finished."""
    return record_file(image).read()


def images_in(directory: Path) -> dict[Path, InstantRecord]:
    """The images of a directory that are not finished, with their records."""
    try:
        names = sorted(each.name for each in directory.iterdir())
    except OSError:
        return {}
    records = [name for name in names if name.startswith(".") and name.endswith(_SUFFIX)]
    images = [directory / name[1:].removesuffix(_SUFFIX) for name in records]
    return {image: found for image in images if (found := record_of(image)) is not None}


def served_with(image: Path, record: InstantRecord) -> dict[Path, InstantRecord]:
    """The images that the same server serves, and that still depend on it, with their records."""
    found = {image.with_name(name): record_of(image.with_name(name)) for name in record.beside}
    return {path: each for path, each in found.items() if each is not None and each.token == record.token}


def check_point(destination: ReadableDestination, image: Path, record: InstantRecord) -> None:
    """Raises Conflict where the destination has another content under this number, NotFound where it has no such point.

    A repository that was made anew counts from 1 again: the image would get parts of two points.
    """
    (disk,) = destination.disks(record.disk)
    if chosen_point(disk.name, disk.points, str(record.point)).content_id == record.content_id:
        return
    raise Conflict(
        f"{record.address} is not the point that it was begun with: its content is another one",
        subject=image,
        hint="nothing was copied from it. Bring back the repository or replica of that time; or remove the image to "
        "give it up",
    )
