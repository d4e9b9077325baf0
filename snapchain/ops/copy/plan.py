"""What a copy would do: it reads records only, and changes nothing."""

from __future__ import annotations

from snapchain.destination.protocol import Destination
from snapchain.destination.reading import ReadableDestination
from snapchain.destination.records import DiskRecord, PointRecord
from snapchain.errors import Corrupt
from snapchain.model.copying import Lacking
from snapchain.ops.copy.amounts import read_amounts, refusal
from snapchain.ops.copy.choose import (
    OF_ONE_DISK,
    ChosenDisk,
    check_epoch,
    check_places,
    choose,
    disk_there,
    found_lacking,
    too_old,
)
from snapchain.ops.copy.request import CopyPlan, CopyRequest, DiskPlan, PointToCopy, RefusedPoint


def plan(request: CopyRequest, source: Destination, destination: Destination) -> CopyPlan:
    """What `run` would do; reads records only, and changes nothing. Raises as that does."""
    check_places(source, destination)
    disks = tuple(_disk_plan(source, destination, chosen) for chosen in choose(request, source))
    return CopyPlan(
        source=source.url,
        destination=destination.url,
        disks=disks,
        points=sum(len(disk.points) for disk in disks),
        data_bytes=sum(point.data_bytes for disk in disks for point in disk.points),
    )


def _disk_plan(source: Destination, destination: Destination, chosen: ChosenDisk) -> DiskPlan:
    try:
        if chosen.failed is not None:
            raise chosen.failed
        there = disk_there(destination, chosen.name)
        check_epoch(chosen.record, there, source.url)
        found = found_lacking(chosen, there)
        points, refused = _amounts(source, chosen, there, found)
    except OF_ONE_DISK as error:
        return DiskPlan(disk=chosen.name, failed=str(error))
    return DiskPlan(
        disk=chosen.name,
        points=tuple(points),
        present=len(found.present),
        keeps_numbers=found.keeps_numbers,
        refused=(*too_old(found), *refused),
    )


def _amounts(
    source: ReadableDestination, chosen: ChosenDisk, there: DiskRecord | None, found: Lacking[PointRecord]
) -> tuple[list[PointToCopy], list[RefusedPoint]]:
    points: list[PointToCopy] = []
    refused: list[RefusedPoint] = []
    if not found.points:
        return points, refused
    with source.copying(chosen.name) as reader:
        for point, amount in read_amounts(reader, chosen.record, there, found.points):
            if isinstance(amount, Corrupt):
                reader.check_there()
                refused.append(refusal(point, amount))
            else:
                points.append(PointToCopy(point=point.point, time=point.time, labels=point.labels, data_bytes=amount))
    return points, refused
