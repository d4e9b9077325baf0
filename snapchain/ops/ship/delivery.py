"""Bringing what a destination lacks of an image, and publishing a point of it, whatever the kind of destination."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

from snapchain.destination.protocol import Destination
from snapchain.destination.reading import Work
from snapchain.errors import InvalidInput
from snapchain.host.retry import RetryPolicy
from snapchain.model.events import OnEvent, ignore
from snapchain.ops.ship.to_replica import Request, plan_send, send_persistently
from snapchain.ops.ship.to_repository import LayerPlan, ShipPlan, ShipReport, shipment
from snapchain.replica.destination import ReplicaDestination
from snapchain.replica.endpoint import Endpoint
from snapchain.repository.destination import RepositoryDestination


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


def delivery(
    destination: Destination,
    image: Path,
    disk: str,
    *,
    labels: Sequence[str] = (),
    each_layer: bool = False,
    format: str | None = None,
    image_dirs: Sequence[Path] = (),
    on_event: OnEvent = ignore,
) -> AbstractContextManager[Work[ShipPlan, ShipReport]]:
    """What is lacking of an image, and a point of it.

    Raises Busy when somebody writes to the image, Diverged where the kind keeps one chain a disk and the image does not
    lie on it.
    """
    if isinstance(destination, RepositoryDestination):
        return shipment(
            image,
            destination.repository,
            disk,
            labels=labels,
            each_layer=each_layer,
            format=format,
            image_dirs=image_dirs,
            on_event=on_event,
        )
    assert isinstance(destination, ReplicaDestination)
    if each_layer:
        raise InvalidInput(
            "a replica gets one point a transfer, of the image as given",
            subject=f"{destination.url}::{disk}",
            hint="snapchain send --each-layer makes each file a layer there",
        )
    request = Request(
        image=image,
        disk=disk,
        labels=labels,
        format=format,
        image_dirs=image_dirs,
        limit_rate=destination.limit_rate,
    )
    request.check()
    return _sending(Delivery(request, destination.endpoint))


@contextmanager
def _sending(work: Delivery) -> Iterator[Delivery]:
    yield work
