"""A replica as a Destination: what it is sent, asked and fetched under the common names."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, tzinfo
from pathlib import Path
from zoneinfo import ZoneInfo

from snapchain.errors import InvalidInput
from snapchain.host.retry import RetryPolicy
from snapchain.model.events import OnEvent, ignore
from snapchain.model.retention import Policy
from snapchain.ops.inspect import InspectReport
from snapchain.ops.log import LogReport
from snapchain.ops.merge_replica import ReplicaMerge
from snapchain.ops.replica_endpoint import replica_at
from snapchain.ops.replica_inspect import inspect_replica
from snapchain.ops.replica_log import log_replica
from snapchain.ops.replica_verify import verify_replica
from snapchain.ops.restore.from_replica import ReplicaRestoration
from snapchain.ops.restore.target import Format
from snapchain.ops.ship.to_replica import Request, plan_send, send_persistently
from snapchain.ops.ship.to_repository import LayerPlan, ShipPlan, ShipReport
from snapchain.ops.verify import VerifyReport
from snapchain.replica.endpoint import Endpoint


@dataclass(frozen=True, slots=True)
class Delivery:
    """An image on its way to a replica, in the words of `ship`: read is what the maps hold, stored what travelled."""

    request: Request
    endpoint: Endpoint

    def plan(self) -> ShipPlan:
        """What `run` will do. Raises as `plan_send`."""
        plan = plan_send(self.request, self.endpoint)
        last = len(plan.layers) - 1
        return ShipPlan(
            image=plan.image,
            destination=plan.destination,
            disk=plan.disk,
            layers_present=plan.layers_present,
            layers=tuple(
                LayerPlan(
                    files=layer.files,
                    virtual_size=layer.virtual_size,
                    bytes_to_read=layer.data_bytes,
                    publishes=number == last,
                )
                for number, layer in enumerate(plan.layers)
            ),
            bytes_to_read=plan.data_bytes,
            labels=plan.labels,
            note=None,
        )

    def run(self, *, on_event: OnEvent = ignore) -> ShipReport:
        """Send and publish. Raises as `send_persistently`."""
        report = send_persistently(self.request, self.endpoint, policy=RetryPolicy(), on_event=on_event)
        assert report.point is not None, "a replica that answers numbers each point"
        return ShipReport(
            disk=report.disk,
            point=report.point,
            points=(report.point,),
            layers_sent=report.layers_sent,
            layers_present=report.layers_present,
            bytes_read=report.data_bytes,
            bytes_stored=report.carried_bytes,
            virtual_size=report.virtual_size,
            content_id=report.content_id,
        )


class ReplicaDestination:
    """See destination.Destination."""

    def __init__(self, endpoint: Endpoint, *, limit_rate: int | None = None) -> None:
        """limit_rate: bytes a second on the wire."""
        self.endpoint, self._limit_rate = endpoint, limit_rate

    @staticmethod
    def at(url: str, *, limit_rate: int | None = None, connections: int = 1) -> ReplicaDestination:
        """At an address. connections: of ssh. Touches nothing. Raises InvalidInput."""
        return ReplicaDestination(replica_at(url, connections=connections), limit_rate=limit_rate)

    @property
    def url(self) -> str:
        return self.endpoint.url

    @property
    def notices(self) -> Sequence[str]:
        return ()

    @contextmanager
    def deliver(
        self,
        image: Path,
        disk: str,
        *,
        labels: Sequence[str] = (),
        each_layer: bool = False,
        format: str | None = None,
        image_dirs: Sequence[Path] = (),
        on_event: OnEvent = ignore,
    ) -> Iterator[Delivery]:
        """As `send`. Raises InvalidInput for each_layer: a replica gets one point a transfer."""
        _ = on_event
        if each_layer:
            raise InvalidInput(
                "a replica gets one point a transfer, of the image as given",
                subject=f"{self.url}::{disk}",
                hint="snapchain send --each-layer makes each file a layer there",
            )
        request = Request(
            image=image,
            disk=disk,
            labels=labels,
            format=format,
            image_dirs=image_dirs,
            limit_rate=self._limit_rate,
        )
        request.check()
        yield Delivery(request, self.endpoint)

    def log(self, disk: str | None = None) -> LogReport:
        """As `log_replica`."""
        return log_replica(self.endpoint, disk)

    def restoration(
        self,
        disk: str,
        output: Path,
        *,
        point: str | None = None,
        format: Format | None = None,
        whole_chain: bool = False,
        force: bool = False,
    ) -> ReplicaRestoration:
        """As `ReplicaRestoration`."""
        return ReplicaRestoration(
            self.endpoint,
            disk,
            output,
            point=point,
            format=format,
            whole_chain=whole_chain,
            force=force,
            limit_rate=self._limit_rate,
        )

    def verify(self, disk: str | None = None, *, share: float = 0.0, on_event: OnEvent = ignore) -> VerifyReport:
        """As `verify_replica`. Raises InvalidInput for a part of the data, or a rate."""
        if self._limit_rate is not None or share not in (0, 1):
            raise InvalidInput(
                "a replica is read where it is, at once and as a whole",
                subject=self.url,
                hint="leave out --sample and --limit-rate; --read-data reads all data",
            )
        return verify_replica(self.endpoint, disk, read_data=bool(share), on_event=on_event)

    def inspect(self, disk: str, point: str | None = None) -> InspectReport:
        """As `inspect_replica`."""
        return inspect_replica(self.endpoint, disk, point=point)

    def merging(self, disk: str, policy: Policy, *, zone: tzinfo = UTC) -> ReplicaMerge:
        """As `ReplicaMerge`. Raises InvalidInput for a time zone that has no name."""
        return ReplicaMerge(self.endpoint, disk, policy, zone=_name_of(zone))


def _name_of(zone: tzinfo) -> str:
    if zone is UTC:
        return "UTC"
    if isinstance(zone, ZoneInfo) and zone.key is not None:
        return zone.key
    raise InvalidInput("a time zone without a name means nothing to another host", hint="ZoneInfo('Europe/Berlin')")
