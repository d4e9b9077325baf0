"""ship --domain: a snapshot of a guest's disks, then all that a destination lacks of them, then one guest point.

    snapshot -> ship the sealed layers, disk by disk, while the guest runs -> publish the record

The points of the disks have one `instant`; the record with the guest's definition is the content of the small disk
`GUEST/.guest` (destination/guest_record.py), and is published last.  So a guest point is there as a whole or not at
all.  A run that fails leaves points of some disks without a record; the next run takes a new snapshot, and sends only
what is not there yet.
"""

from __future__ import annotations

import base64
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Literal

from blake3 import blake3
from pydantic import BaseModel, ConfigDict

from snapchain.destination.guest_record import (
    LARGEST,
    RECORD_DISK,
    GuestRecord,
    RecordedDisk,
    RecordedFile,
    record_disk,
)
from snapchain.destination.protocol import Destination
from snapchain.destination.writing import Moment, Opening
from snapchain.errors import Conflict, InvalidInput, NotFound, SnapchainError, Unsupported
from snapchain.guest import overlays, snapshot
from snapchain.guest.protocol import Definition, DefinitionFile, Guest, Layer
from snapchain.guest.snapshot import DiskToSeal, GuestSnapshot, GuestSnapshotPlan, LeftOut, SnapshotRequest
from snapchain.host.os_errors import os_errors
from snapchain.host.path_resolution import resolve
from snapchain.host.private import PrivateDirectory
from snapchain.host.records import key_directory
from snapchain.host.terminal import encodable
from snapchain.image import ImageChain, scan
from snapchain.model.consistency import Consistency
from snapchain.model.disk_name import LARGEST_EPOCH, check_disk_name, is_disk_name
from snapchain.model.events import Event, Notice, OnEvent, ignore
from snapchain.model.points import check_label
from snapchain.ops.fence.mark import mark_after_refusal
from snapchain.ops.ship import run as one_disk
from snapchain.ops.ship.request import Divergence, LayerPlan, ShipPlan, ShipReport, ShipRequest
from snapchain.source.at_rest import ImageAtRest
from snapchain.source.counted_sums import guest_key
from snapchain.source.handed_over import epoch_of_overlay
from snapchain.source.notes import Notes
from snapchain.source.ownership import check_not_given, epoch_of

_RECORD_FILE = "record.raw"
_PLANNED = Moment("0" * 32, Consistency.CRASH)
"""Of a plan, which is refused where a guest point would be."""
_NOT_ENCRYPTED = "not stored, since the destination is not encrypted"


class _Shown(BaseModel):
    model_config = ConfigDict(frozen=True, defer_build=True)


class GuestShipPlan(_Shown):
    """What `run` would do. Sizes in bytes, as far as the disks are written now: the guest goes on.

    guest: its name at the destination; disks: as `ship` plans them, with all that the guest has written so far
    """

    guest: str
    destination: str
    snapshot: GuestSnapshotPlan
    disks: tuple[ShipPlan, ...]
    bytes_to_read: int
    data_bytes: int
    labels: tuple[str, ...]
    left_out: tuple[LeftOut, ...]


class GuestShipReport(_Shown):
    """What `run` did.

    guest: its name at the destination; guest_point: number of the point of its record
    instant: 32 hex digits, as all points of the guest point have it; time: of the snapshot
    why_not: why it is not filesystem-consistent where that was tried; frozen_seconds: how long the guest was frozen
    disks: as `ship` reports them; left_out: disks that were not taken
    starts_with: files with which a guest without libvirt must be started the next time; snapchain cannot enforce this
    record_bytes: of the record; secrets: whether it may hold passwords and the state of a TPM
    """

    guest: str
    destination: str
    guest_point: int
    instant: str
    time: datetime
    consistency: Consistency
    why_not: str | None = None
    frozen_seconds: float | None = None
    disks: tuple[ShipReport, ...]
    left_out: tuple[LeftOut, ...] = ()
    starts_with: tuple[Path, ...] = ()
    record_bytes: int
    secrets: bool
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class GuestShipRequest:
    """What is to be shipped of a guest.

    snapshot: how it is taken; taken: one that was taken before, to be shipped in its place
    name: of the guest at the destination, None for its own
    labels: for the guest point and the points of its disks
    divergence, epoch, limit_rate: as ShipRequest has them
    """

    snapshot: SnapshotRequest = field(default_factory=SnapshotRequest)
    taken: GuestSnapshot | None = None
    name: str | None = None
    labels: Sequence[str] = ()
    divergence: Divergence = Divergence.REFUSE
    epoch: int = 1
    limit_rate: int | None = None

    def name_of(self, guest: Guest) -> str:
        """The guest's name at the destination. Raises InvalidInput for one that cannot name disks."""
        name = self.name or guest.name
        if not name:
            raise InvalidInput(
                "the guest has no name", subject=guest.option, hint="name it at the destination: DEST::NAME"
            )
        if not is_disk_name(f"{name}/{RECORD_DISK}") or name.rpartition("/")[2] == RECORD_DISK:
            raise InvalidInput(
                f"{name[:250]!a} cannot name a guest at a destination",
                hint="name it DEST::NAME, printable text without ':' and '@', such as web1",
            )
        return name

    def check(self) -> None:
        """Raises InvalidInput for labels and epochs that cannot be."""
        for label in self.labels:
            check_label(label)
        if not 1 <= self.epoch <= LARGEST_EPOCH:
            raise InvalidInput(f"{self.epoch} is no epoch", hint=f"a number from 1 to {LARGEST_EPOCH}")


@dataclass(frozen=True, slots=True)
class Described:
    """What the record says of a guest. paths: name of a disk -> its active layer, as the definition names it

    secrets: whether the destination may have them
    """

    kind: Literal["libvirt", "qmp"]
    definition: Definition
    paths: Mapping[str, str]
    secrets: bool


def plan(
    guest: Guest, request: GuestShipRequest, destination: Destination, *, on_event: OnEvent = ignore
) -> GuestShipPlan:
    """What `run` would do; changes nothing on either side. Raises as that does."""
    request.check()
    name = request.name_of(guest)
    check_no_disk(name, destination)
    planned = snapshot.plan(guest, request.snapshot)
    chains = _chains(guest)
    disks: list[ShipPlan] = []
    for disk in planned.disks:
        with naming_disk(name, disk.disk):
            heard = of_disk(disk.disk, on_event)
            disks.append(_planned(guest, chains[disk.disk], disk, planned, request, name, destination, heard))
    return GuestShipPlan(
        guest=name,
        destination=destination.url,
        snapshot=planned,
        disks=tuple(disks),
        bytes_to_read=sum(each.bytes_to_read for each in disks),
        data_bytes=sum(each.data_bytes for each in disks),
        labels=tuple(request.labels),
        left_out=planned.left_out,
    )


def run(
    guest: Guest, request: GuestShipRequest, destination: Destination, *, on_event: OnEvent = ignore
) -> GuestShipReport:
    """Take a snapshot of a guest, ship what a destination lacks of its disks, and publish one guest point.

    Nothing is done to the guest before the destination has answered.
    Raises as `snapshot.run` and, for each disk, as `ops.ship.run.run`, naming the disk: then no guest point is
    published. Raises Busy where another run ships this guest there, Conflict where the destination has an ordinary disk
    of the guest's name.
    """
    begun = time.monotonic()
    request.check()
    name = request.name_of(guest)
    with alone(name, destination.url) as place:
        check_no_disk(name, destination)
        described = describe(guest, destination, on_event=on_event)
        taken = request.taken or _taken(guest, request, name, destination, on_event)
        reports: dict[str, ShipReport] = {}
        epoch, arrived = request.epoch, 0
        for disk in taken.disks:
            with naming_disk(name, disk.disk):
                asked = _request(guest, disk, request, name, image=disk.sealed, taken=taken)
                asked.check()
                heard = of_disk(disk.disk, on_event, arrived=arrived)
                with asked.chain(heard) as chain, _marking(guest, name, destination, request):
                    epoch = max(epoch, one_disk.opening_of(asked, chain).epoch)
                    reports[disk.disk] = one_disk.Shipment(asked, chain, destination, heard).run()
            arrived += reports[disk.disk].bytes_read
        return publish(guest, described, At.of(taken), reports, request, destination, place, epoch=epoch, begun=begun)


@contextmanager
def _marking(guest: Guest, name: str, destination: Destination, request: GuestShipRequest) -> Iterator[None]:
    """Where another host has taken the guest over, its active layers are marked before the refusal is raised."""
    try:
        yield
    except Conflict:
        active = [
            (disk.active.path, f"{name}/{disk.name}")
            for disk in guest.disks()
            if disk.chain and disk.active.path is not None
        ]
        mark_after_refusal(active, destination, image_dirs=request.snapshot.image_dirs)
        raise


@dataclass(frozen=True, slots=True, kw_only=True)
class At:
    """The moment that a guest point shows. Fields as GuestShipReport has them."""

    instant: str
    time: datetime
    consistency: Consistency
    why_not: str | None = None
    frozen_seconds: float | None = None
    left_out: tuple[LeftOut, ...] = ()
    starts_with: tuple[Path, ...] = ()

    @classmethod
    def of(cls, taken: GuestSnapshot) -> At:
        """Of a snapshot."""
        return cls(
            instant=taken.instant,
            time=taken.time,
            consistency=taken.consistency,
            why_not=taken.why_not,
            frozen_seconds=taken.frozen_seconds,
            left_out=taken.left_out,
            starts_with=taken.starts_with,
        )


def publish(
    guest: Guest,
    described: Described,
    at: At,
    reports: Mapping[str, ShipReport],
    request: GuestShipRequest,
    destination: Destination,
    place: Path,
    *,
    epoch: int,
    begun: float,
) -> GuestShipReport:
    """Publish the record of a guest point, all disks of which are at the destination; what was done.

    reports: name of a disk in the guest -> what was shipped of it; place: a private directory, as `alone` gives it
    epoch: the newest in which one of the disks is written; begun: of time.monotonic
    Raises as `ops.ship.run.run`, with the word that no guest point was published.
    """
    name = request.name_of(guest)
    record = record_of(name, described, at, reports)
    content = record.encode()
    with naming_disk(name, RECORD_DISK), PrivateDirectory(place, make=True) as directory:
        # Private, since it may hold secrets; one that a killed run has left is replaced.
        directory.write(_RECORD_FILE, content)
        try:
            image = place / _RECORD_FILE
            asked = ShipRequest(
                image=image,
                disk=record_disk(name),
                labels=request.labels,
                divergence=Divergence.COMPARE,
                time=at.time,
                moment=Moment(at.instant, at.consistency),
                format="raw",
                limit_rate=request.limit_rate,
                epoch=request.epoch,
                opens=_RecordImage(image, epoch),
                top=guest_key(name, RECORD_DISK),
            )
            shipped = one_disk.run(asked, destination, on_event=ignore)
        finally:
            directory.remove(_RECORD_FILE)
    assert shipped.point is not None, "a destination that can be read gives its points numbers"
    return GuestShipReport(
        guest=name,
        destination=destination.url,
        guest_point=shipped.point,
        instant=at.instant,
        time=at.time,
        consistency=at.consistency,
        why_not=at.why_not,
        frozen_seconds=at.frozen_seconds,
        disks=tuple(reports.values()),
        left_out=at.left_out,
        starts_with=at.starts_with,
        record_bytes=len(content),
        secrets=described.secrets,
        seconds=time.monotonic() - begun,
    )


# --- what the record holds


def describe(guest: Guest, destination: Destination, *, on_event: OnEvent = ignore) -> Described:
    """What a destination may have of a guest's definition: secrets only where it is encrypted, else a notice.

    Raises Unavailable where the guest does not answer.
    """
    definition = guest.definition(with_secrets=True)
    paths = {
        disk.name: encodable(str(disk.active.path))
        for disk in guest.disks()
        if disk.chain and disk.active.path is not None
    }
    secrets = destination.encryption != "none"
    if not secrets:
        definition, left_out = without_secrets(definition, guest.definition(with_secrets=False))
        if left_out:
            on_event(Notice.of(guest.name, f"{_NOT_ENCRYPTED}: {', '.join(left_out)}"))
    return Described(guest.kind, definition, paths, secrets)


def without_secrets(whole: Definition, public: Definition) -> tuple[Definition, tuple[str, ...]]:
    """What of a definition may be stored in the clear, and what was left out.

    public: the definition as it is given without secrets
    """
    files = tuple(each for each in whole.files if not each.secret)
    left_out = [_words(each) for each in whole.files if each.secret]
    if (whole.live, whole.inactive, whole.argv) != (public.live, public.inactive, public.argv):
        left_out.insert(0, "passwords in the definition")
    unreadable = tuple(dict.fromkeys((*whole.unreadable, *(f"{_NOT_ENCRYPTED}: {each}" for each in left_out))))
    return replace(public, files=files, unreadable=unreadable), tuple(left_out)


def record_of(name: str, described: Described, at: At, reports: Mapping[str, ShipReport]) -> GuestRecord:
    """The record of a guest point. Files are left out, the largest first, where it would be larger than LARGEST."""
    definition = described.definition
    record = GuestRecord(
        guest=name,
        instant=at.instant,
        time=at.time,
        consistency=at.consistency,
        host=socket.gethostname(),
        kind=described.kind,
        uuid=definition.uuid,
        machine=definition.machine,
        macs=definition.macs,
        live=definition.live,
        inactive=definition.inactive,
        argv=None if definition.argv is None else tuple(map(encodable, definition.argv)),
        disks=tuple(
            RecordedDisk(
                name=disk,
                disk=report.disk,
                path=described.paths.get(disk, ""),
                virtual_size=report.virtual_size,
                content_id=report.content_id,
            )
            for disk, report in reports.items()
        ),
        left_out=tuple((each.disk, each.reason) for each in at.left_out),
        media=tuple(map(encodable, definition.media)),
        immovable=definition.immovable,
    )
    kept = sorted(definition.files, key=lambda each: len(each.data))
    unreadable = definition.unreadable
    while True:
        files = tuple(
            RecordedFile(role=each.role, name=each.name, data=base64.b64encode(each.data))
            for each in definition.files
            if each in kept
        )
        found = record.model_copy(update={"files": files, "unreadable": unreadable})
        if len(found.encode()) <= LARGEST:
            return found
        if not kept:
            raise Unsupported(
                f"the definition of the guest has more than {LARGEST} bytes", subject=name, hint="report this"
            )
        unreadable = (*unreadable, f"not stored, since it is too large: {_words(kept.pop())}")


def _words(file: DefinitionFile) -> str:
    return f"{'firmware variables' if file.role == 'nvram' else 'the state of the TPM'} ({file.name})"


# --- steps


def _taken(
    guest: Guest, request: GuestShipRequest, name: str, destination: Destination, on_event: OnEvent
) -> GuestSnapshot:
    """A snapshot, once it is known that the destination takes it: else each night would leave an overlay more."""
    overlays.settle(guest, on_event=on_event)
    planned = snapshot.plan(guest, request.snapshot)
    chains = _chains(guest)
    epoch = request.epoch
    for disk in planned.disks:
        with naming_disk(name, disk.disk):
            check_disk_name(f"{name}/{disk.disk}")
            epoch = max(epoch, _epoch(chains[disk.disk], request.snapshot.image_dirs))
    opening = Opening(
        disk=record_disk(name),
        epoch=epoch,
        epoch_named=request.epoch == epoch,
        limit_rate=request.limit_rate,
        of_guest=True,
    )
    with destination.look(opening, on_event=on_event):
        pass
    unwritten = snapshot.sealed_already(planned, request.snapshot)
    return unwritten or snapshot.run(guest, planned, request.snapshot, on_event=on_event)


def _request(
    guest: Guest,
    disk: DiskToSeal,
    request: GuestShipRequest,
    name: str,
    *,
    image: Path,
    taken: GuestSnapshot | None = None,
) -> ShipRequest:
    """What is shipped of one disk: the sealed file of this very snapshot, whatever was sealed since."""
    return ShipRequest(
        image=image,
        disk=f"{name}/{disk.disk}",
        labels=request.labels,
        divergence=request.divergence,
        time=None if taken is None else taken.time,
        moment=_PLANNED if taken is None else Moment(taken.instant, taken.consistency),
        format=disk.sealed_format,
        image_dirs=request.snapshot.image_dirs,
        limit_rate=request.limit_rate,
        epoch=request.epoch,
        top=guest_key(guest.name, disk.disk),
    )


def _chains(guest: Guest) -> dict[str, tuple[Layer, ...]]:
    """By the name of a disk, root first."""
    return {disk.name: disk.chain for disk in guest.disks()}


def _below(chain: Sequence[Layer]) -> Path | None:
    """The uppermost file that nobody writes to; None where there is none. The active layer is not to be parsed."""
    return chain[-2].path if len(chain) > 1 else None


def _epoch(chain: Sequence[Layer], image_dirs: Sequence[Path]) -> int:
    """In which epoch this host writes a disk, as far as notes tell. Raises Conflict for one that was given away."""
    active, below = chain[-1].path, _below(chain)
    assert active is not None, "a disk that can be sealed is a file"
    if below is None:
        with os_errors(active):
            found = resolve(active)
        return max(Notes().of(found).epoch, epoch_of_overlay(found.real))
    with scan(below, format=chain[-2].known_format, image_dirs=image_dirs) as sealed:
        check_not_given(sealed, image=active)
        return epoch_of(sealed, Notes(), image=active)


def _planned(
    guest: Guest,
    chain: Sequence[Layer],
    disk: DiskToSeal,
    planned: GuestSnapshotPlan,
    request: GuestShipRequest,
    name: str,
    destination: Destination,
    on_event: OnEvent,
) -> ShipPlan:
    """What is shipped of a disk: what is sealed already, and the active layer as large as its file is now."""
    active, below = chain[-1].path, _below(chain)
    assert active is not None, "a disk that can be sealed is a file"
    if planned.is_off:
        return one_disk.plan(_request(guest, disk, request, name, image=active), destination, on_event=on_event)
    asked = _request(guest, disk, request, name, image=active)
    present, note = 0, None
    layers: tuple[LayerPlan, ...] = ()
    if below is None:
        with destination.look(Opening(disk=asked.disk, epoch=asked.epoch, of_guest=True), on_event=on_event):
            pass
    else:
        sealed = replace(asked, image=below, format=chain[-2].known_format)
        found = one_disk.plan(sealed, destination, on_event=on_event)
        present, layers, note = found.layers_present, found.layers, found.note
    with os_errors(active):
        allocated = min(active.stat().st_blocks * 512, disk.virtual_size)
    top = LayerPlan(
        files=(str(active),),
        virtual_size=disk.virtual_size,
        bytes_to_read=allocated,
        data_bytes=allocated,
        publishes=True,
    )
    layers = (*(each.model_copy(update={"publishes": False}) for each in layers), top)
    return ShipPlan(
        image=str(active),
        destination=destination.url,
        disk=asked.disk,
        layers_present=present,
        layers=layers,
        bytes_to_read=sum(each.bytes_to_read for each in layers),
        data_bytes=sum(each.data_bytes for each in layers),
        labels=tuple(request.labels),
        note=note,
    )


class _RecordImage(ImageAtRest):
    """A record on its way: no disk of this host, so its epoch is the one of the guest's disks."""

    def __init__(self, image: Path, epoch: int) -> None:
        super().__init__(image, format="raw")
        self._epoch = epoch

    def epoch(self, chain: ImageChain) -> int:
        """See `Source`."""
        _ = chain
        return self._epoch

    def note_epoch(self, epoch: int) -> None:
        """See `Source`: the disks have the note."""


@contextmanager
def alone(name: str, destination: str) -> Iterator[Path]:
    """The one run that ships a guest to a destination. A private directory of its own. Raises Busy."""
    digest = blake3(f"{destination}::{name}".encode()).hexdigest(length=8)
    path = key_directory() / "guests" / f"ship-{digest}"
    what = f"another run ships guest {name} to {destination}"
    with PrivateDirectory(path, make=True) as directory, directory.held(what):
        yield path


def check_no_disk(name: str, destination: Destination) -> None:
    """An address could mean either."""
    try:
        destination.disks(name)
    except NotFound:
        return
    raise Conflict(
        f"{name!r} is a disk there, and no guest",
        subject=destination.url,
        hint="name the guest otherwise there: DEST::NAME",
    )


@contextmanager
def naming_disk(name: str, disk: str) -> Iterator[None]:
    """Errors name the disk, and what became of the guest point."""
    try:
        yield
    except SnapchainError as error:
        which = "its record" if disk == RECORD_DISK else f"disk {disk}"
        error.message = f"no guest point of {name} is published, since {which} could not be shipped: {error.message}"
        error.hint = error.hint or "run it again: what was sent is not sent twice"
        raise


def of_disk(disk: str, on_event: OnEvent, *, arrived: int = 0) -> OnEvent:
    """Notices name the disk, and progress counts on over all disks. arrived: bytes of the disks before."""

    def heard(event: Event) -> None:
        if isinstance(event, Notice):
            on_event(event.within(disk))
        else:
            on_event(replace(event, done=event.done + arrived, total=event.total and event.total + arrived))

    return heard
