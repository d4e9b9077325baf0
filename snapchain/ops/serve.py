"""serve: points of a destination as read-only block devices, over NBD.

    plan     which points, under which names: `web1/vda` for the newest one, `web1/vda@7` for one that was named
    run      opens them, listens, and serves until it is stopped

A point that is named is opened, with its lease, before the first client comes. With `all_points` the older points of a
disk are listed too, and each is open while a client reads it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from snapchain.destination.address import PointAddress
from snapchain.destination.reading import ReadableDestination
from snapchain.destination.records import PointRecord
from snapchain.errors import InvalidInput, NotFound
from snapchain.host.shared_cache import SharedCache
from snapchain.model.events import OnEvent, ignore
from snapchain.model.points import chosen_point
from snapchain.nbd.exports import Export, Exports
from snapchain.nbd.listening import (
    default_socket,
    parse_place,
    tcp_listener,
    tcp_uri,
    tls_context,
    unix_listener,
    unix_uri,
)
from snapchain.nbd.server import Server
from snapchain.ops.guest_points import fault_of, guest_named
from snapchain.ops.guest_records import read_record
from snapchain.ops.readings import CACHE_BYTES, LEAST_CACHE, PATIENCE, PointReadings, ReadLog, check_cache

SHARED_CACHE_BYTES = 4 << 30
_LOOK_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class ServeRequest:
    """What is served, and where.

    addresses: disks or guests, with their points
    socket: None for the default path, unless `listen` (HOST:PORT) is given
    tls: the directory with the certificates; all_points: list all points of the disks
    cache: bytes; patience: seconds
    once: end when the last client has gone
    block_status: clients may ask which ranges hold data; a guest that streams from the export must not: decision 0163
    prefetch: fetch what clients of the disk have read first before, and record what they read first now, if `records`
    cache_dir: a directory for blobs as they are stored, which processes share; shared_cache: its bytes
    """

    addresses: Sequence[PointAddress]
    socket: Path | None = None
    listen: str | None = None
    tls: Path | None = None
    all_points: bool = False
    cache: int = CACHE_BYTES
    patience: float = PATIENCE
    once: bool = False
    block_status: bool = True
    prefetch: bool = True
    records: bool = True
    cache_dir: Path | None = None
    shared_cache: int = SHARED_CACHE_BYTES


@dataclass(frozen=True, slots=True)
class ServedPoint:
    """One export. uri: how clients name it"""

    export: str
    destination: str
    disk: str
    point: int
    time: datetime
    virtual_size: int
    content_id: str
    uri: str


@dataclass(frozen=True, slots=True)
class ServePlan:
    """What is served. socket, listen: where, one of them; tls: whether clients need a certificate; cache: bytes"""

    exports: tuple[ServedPoint, ...]
    socket: str | None
    listen: str | None
    tls: bool
    cache: int


@dataclass(frozen=True, slots=True)
class ServeReport:
    """What was done. clients: that had an export; failed_reads: which were answered with an error"""

    clients: int
    requests: int
    bytes_sent: int
    failed_reads: int
    seconds: float


@dataclass(frozen=True, slots=True)
class _Chosen:
    """A point, and how it is reached. stays: it was named, and is opened at once"""

    export: str
    destination: ReadableDestination
    disk: str
    record: PointRecord
    stays: bool


class Serving:
    """Points of opened destinations. destinations: by DEST as the addresses have it"""

    def __init__(self, request: ServeRequest, destinations: dict[str, ReadableDestination]) -> None:
        """Looks up the points.

        Raises NotFound, InvalidInput, Unsupported where points cannot be read at any offset, and as `disks`.
        """
        if request.socket is not None and request.listen is not None:
            raise InvalidInput("--socket and --listen are both given", hint="a server listens in one place")
        if request.tls is not None and request.listen is None:
            raise InvalidInput(
                "--tls is for --listen: a unix socket stays on this host",
                subject=request.tls,
                hint="say --listen HOST:PORT too, or leave --tls out",
            )
        check_cache(request.cache)
        if request.shared_cache < LEAST_CACHE:
            raise InvalidInput(f"--cache-dir has at least {LEAST_CACHE >> 20} MiB", hint="--cache-dir-size 1G")
        self._request = request
        self._destinations = destinations
        self._place = None if request.listen is None else parse_place(request.listen)
        self._socket = None if self._place else (request.socket or default_socket()).absolute()
        self._chosen = _without_doubles(
            each
            for address in request.addresses
            for each in _chosen(destinations[address.dest], address, all_points=request.all_points)
        )
        for each in self._chosen:
            each.destination.whole(each.disk, str(each.record.point))  # is not entered: raises where it cannot be done

    def plan(self) -> ServePlan:
        """What `run` will serve; nothing is opened. The default socket has PID for the number of the later process."""
        if self._place is not None:
            return self._plan(self._place[1], None)
        return self._plan(None, self._socket if self._request.socket else default_socket(of="PID"))

    def run(self, on_ready: Callable[[ServePlan], None], *, on_event: OnEvent = ignore) -> ServeReport:
        """Serve until SIGTERM or Ctrl-C, or as the request says. on_ready: called when clients can connect

        Raises what keeps a point from being opened, and Busy, Conflict and InvalidInput for the place to listen.
        """
        began = time.monotonic()
        log = ReadLog(on_event)
        with ExitStack() as stack:
            tls = None if self._request.tls is None else tls_context(self._request.tls)
            shared: SharedCache | None = None
            if self._request.cache_dir is not None:
                shared = stack.enter_context(SharedCache(self._request.cache_dir, self._request.shared_cache))
            readings = stack.enter_context(
                PointReadings(
                    cache=self._request.cache,
                    patience=self._request.patience,
                    prefetch=self._request.prefetch,
                    records=self._request.records,
                    shared=shared,
                    on_event=on_event,
                )
            )
            exports = stack.enter_context(Exports(self._exports(readings)))
            port = None
            if self._place is None:
                assert self._socket is not None
                listening = stack.enter_context(unix_listener(self._socket))
            else:
                listening = stack.enter_context(tcp_listener(*self._place, has_tls=tls is not None))
                port = int(listening.getsockname()[1])
            plan = self._plan(port, self._socket)
            server = Server(exports, [listening], on_fault=log.fault, on_note=log.note, tls=tls)
            with suppress(KeyboardInterrupt), server:
                on_ready(plan)
                if self._request.once:
                    server.wait_for_last()
                else:
                    while True:  # a signal that another thread gets does not wake this one
                        time.sleep(_LOOK_SECONDS)
        return ServeReport(
            clients=server.clients,
            requests=server.tally.requests,
            bytes_sent=server.tally.bytes_sent,
            failed_reads=server.tally.failed,
            seconds=time.monotonic() - began,
        )

    def _exports(self, readings: PointReadings) -> list[Export]:
        return [
            readings.export(
                each.export,
                each.destination,
                each.disk,
                each.record,
                stays=each.stays,
                block_status=self._request.block_status,
            )
            for each in self._chosen
        ]

    def _plan(self, port: int | None, socket: Path | None) -> ServePlan:
        def uri(export: str) -> str:
            if self._place is None:
                assert socket is not None
                return unix_uri(socket, export)
            assert port is not None
            return tcp_uri(self._place[0], port, export, tls=self._request.tls is not None)

        return ServePlan(
            exports=tuple(
                ServedPoint(
                    export=each.export,
                    destination=each.destination.url,
                    disk=each.disk,
                    point=each.record.point,
                    time=each.record.time,
                    virtual_size=each.record.virtual_size,
                    content_id=each.record.content_id,
                    uri=uri(each.export),
                )
                for each in self._chosen
            ),
            socket=None if socket is None else str(socket),
            listen=None if self._place is None else f"{self._place[0]}:{port}",
            tls=self._request.tls is not None,
            cache=self._request.cache,
        )


def _chosen(destination: ReadableDestination, address: PointAddress, *, all_points: bool) -> Iterator[_Chosen]:
    """The exports of an address: of a disk, or of each disk of a guest."""
    try:
        disks = destination.disks(address.disk)
    except NotFound:
        every = destination.disks()
        guest = guest_named(every, address.disk)
        if guest is None:
            raise
        if all_points:
            raise InvalidInput("all points are those of a disk, and this is a guest", subject=str(address)) from None
        point = guest.point(address.point)
        for recorded in read_record(destination, point, disk=guest.record_disk).disks:
            if (fault := fault_of(point, recorded, subject=str(address))) is not None:
                raise fault from None
            name, record = recorded.disk, point.disks[recorded.disk]
            yield _Chosen(_name(name, record, address), destination, name, record, stays=True)
        return
    for each in disks:
        record = chosen_point(each.name, each.points, address.point)
        yield _Chosen(_name(each.name, record, address), destination, each.name, record, stays=True)
        if all_points:
            if address.point is not None:
                raise InvalidInput("a point is named, and all points are asked for", subject=str(address))
            for other in each.points:
                yield _Chosen(f"{each.name}@{other.point}", destination, each.name, other, stays=False)


def _name(disk: str, record: PointRecord, address: PointAddress) -> str:
    """By its number, whatever named it: a label may move."""
    return disk if address.point is None else f"{disk}@{record.point}"


def _without_doubles(found: Iterator[_Chosen]) -> list[_Chosen]:
    """Raises InvalidInput for two exports of one name."""
    names: dict[str, _Chosen] = {}
    for each in found:
        other = names.setdefault(each.export, each)
        if other is not each:
            if other.destination.url == each.destination.url:
                raise InvalidInput(
                    f"the export {each.export} is named twice", subject=each.destination.url, hint="name it once"
                )
            raise InvalidInput(
                f"two points would have the name {each.export}",
                subject=f"{other.destination.url} and {each.destination.url}",
                hint="serve them by two commands",
            )
    return list(names.values())
