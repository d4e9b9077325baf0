"""Guest points at destinations, made without a guest: disks are shipped with one instant, and then a record."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from snapchain.destination.guest_record import GuestRecord, RecordedDisk, record_disk
from snapchain.destination.protocol import Destination
from snapchain.destination.writing import Moment
from snapchain.model.consistency import Consistency
from snapchain.objects import open_store
from snapchain.objects.local import LocalStore
from snapchain.objects.store import ObjectStore
from snapchain.ops.guest_points import GuestPoint, fault_of
from snapchain.ops.ship.request import Divergence
from snapchain.ops.ship.run import ShipRequest, run as ship_disk
from snapchain.replica.destination import ReplicaDestination
from snapchain.replica.endpoint import DirectoryEndpoint
from snapchain.repository.destination import RepositoryDestination
from tests.ops.stacks import qemu_img, write
from tests.repository.synthetic import again, repository
from tests.servers import S3Server

MiB = 1 << 20
Open = Callable[[], Destination]
GUEST = "web1"
BEGIN = datetime(2026, 11, 1, 22, tzinfo=UTC)
DOMAIN = """<domain type='qemu' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>
  <name>web1</name>
  <uuid>6d8eb8a2-0000-4000-8000-000000000001</uuid>
  <memory unit='MiB'>32</memory>
  <os><type arch='x86_64' machine='pc-q35-7.2'>hvm</type></os>
  <devices>
    <emulator>/usr/bin/qemu-system-x86_64</emulator>
    <disk type='file' device='disk'>
      <driver name='qemu' type='qcow2' cache='none' discard='unmap'/>
      <source file='/old/a.3.qcow2'/>
      <backingStore type='file'><format type='qcow2'/><source file='/old/a.qcow2'/><backingStore/></backingStore>
      <target dev='vda' bus='virtio'/>
    </disk>
    <disk type='block' device='disk'>
      <driver name='qemu' type='raw'/>
      <source dev='/dev/vg0/b'/>
      <target dev='vdb' bus='virtio'/>
    </disk>
    <interface type='user'><mac address='52:54:00:00:00:01'/><model type='virtio'/></interface>
  </devices>
  <qemu:commandline><qemu:arg value='-no-user-config'/></qemu:commandline>
</domain>
"""


def instant(number: int) -> str:
    return f"{number:032x}"


@dataclass
class Guest:
    """A guest with disks, without a QEMU: each `point` writes to all of them and ships them.

    shown: by instant and disk, a raw copy of what its point must show
    """

    place: Path
    names: Sequence[str] = ("vda", "vdb")
    guest: str = GUEST
    images: dict[str, Path] = field(default_factory=dict)
    shown: dict[tuple[str, str], Path] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.place.mkdir(parents=True, exist_ok=True)
        for name in self.names:
            self.images[name] = self.place / f"{name}.0.qcow2"
            qemu_img("create", "-q", "-f", "qcow2", self.images[name], str(2 * MiB))

    def disk(self, name: str) -> str:
        return f"{self.guest}/{name}"

    def grow(self, number: int) -> None:
        """Write to all disks what point `number` will show, each in a new overlay."""
        for name, below in list(self.images.items()):
            top = below.with_name(f"{name}.{number}.qcow2")
            qemu_img("create", "-q", "-f", "qcow2", "-b", below.name, "-F", "qcow2", top)
            write(top, f"write -P {number % 255} {number % 16 * 64}k 96k", f"write -P {len(name)} 1M 64k")
            self.images[name] = top
            self.shown[instant(number), name] = top.with_suffix(".raw")
            qemu_img("convert", "-O", "raw", top, self.shown[instant(number), name])

    def point(
        self,
        destination: Destination,
        number: int,
        *,
        names: Sequence[str] | None = None,
        with_record: bool = True,
        labels: Sequence[str] = (),
        time: datetime | None = None,
        **change: Any,
    ) -> GuestRecord:
        """Write to all disks, and ship one guest point. Arguments as `ship`."""
        self.grow(number)
        return self.ship(destination, number, names=names, with_record=with_record, labels=labels, time=time, **change)

    def ship(
        self,
        destination: Destination,
        number: int,
        *,
        names: Sequence[str] | None = None,
        with_record: bool = True,
        labels: Sequence[str] = (),
        time: datetime | None = None,
        **change: Any,
    ) -> GuestRecord:
        """Ship the disks as they are now, as a guest point. names: of disks that arrive; change: of the record."""
        moment = Moment(instant(number), Consistency.CRASH)
        when = time or BEGIN + timedelta(days=number)
        disks = []
        for name in self.names if names is None else names:
            request = ShipRequest(
                image=self.images[name], disk=self.disk(name), labels=labels, time=when, moment=moment
            )
            report = ship_disk(request, destination)
            disks.append(
                RecordedDisk(
                    name=name,
                    disk=self.disk(name),
                    path=f"/old/{name}.qcow2",
                    virtual_size=report.virtual_size,
                    content_id=report.content_id,
                )
            )
        record = self.record(number, disks, when, **change)
        if with_record:
            publish(destination, record, self.place, labels=labels)
        return record

    def record(self, number: int, disks: Sequence[RecordedDisk], when: datetime, **change: Any) -> GuestRecord:
        values: dict[str, Any] = {
            "guest": self.guest,
            "instant": instant(number),
            "time": when,
            "consistency": Consistency.CRASH,
            "host": "kvm1",
            "kind": "libvirt",
            "uuid": "6d8eb8a2-0000-4000-8000-000000000001",
            "inactive": DOMAIN,
            "live": DOMAIN,
            "disks": tuple(disks),
        }
        return GuestRecord(**{**values, **change})


def publish(destination: Destination, record: GuestRecord, place: Path, *, labels: Sequence[str] = ()) -> None:
    """Publish the record of a guest point whose disks are there."""
    publish_bytes(destination, record.encode(), place, record.instant, record.time, guest=record.guest, labels=labels)


def publish_bytes(
    destination: Destination,
    content: bytes,
    place: Path,
    of: str,
    when: datetime,
    *,
    guest: str = GUEST,
    labels: Sequence[str] = (),
) -> None:
    image = place / f"record.{of}.raw"
    image.write_bytes(content)
    request = ShipRequest(
        image=image,
        disk=record_disk(guest),
        labels=labels,
        time=when,
        moment=Moment(of, Consistency.CRASH),
        format="raw",
        divergence=Divergence.COMPARE,
    )
    ship_disk(request, destination)


def opened(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> Open:
    if kind == "replica":
        return lambda: ReplicaDestination(DirectoryEndpoint(tmp_path / "replica"))
    store: ObjectStore
    if kind == "s3":
        server: S3Server = request.getfixturevalue("moto")
        store = open_store(f"s3://{server.new_bucket()}/deep/prefix")
    else:
        store = LocalStore(tmp_path / "repository", make=True)
    made = repository(store)
    return lambda: RepositoryDestination(again(made))


def numbers(destination: Destination, guest: str = GUEST) -> Mapping[str, list[int]]:
    """Of each disk of a guest, whose points' instants it has, as `instant` counts."""
    return {
        disk.name.removeprefix(f"{guest}/"): [int(point.instant or "0", 16) for point in disk.points]
        for disk in destination.disks()
    }


def missing_disks(point: GuestPoint, record: GuestRecord) -> tuple[str, ...]:
    """Disks that a record names, and of which the guest point lacks the recorded point."""
    return tuple(each.disk for each in record.disks if fault_of(point, each, subject="it") is not None)
