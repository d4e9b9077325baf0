"""`send` as tests call it: to an endpoint, in one attempt or persistently."""

from __future__ import annotations

from snapchain.host.retry import RetryPolicy
from snapchain.model.events import OnEvent, ignore
from snapchain.ops.ship.run import ShipPlan, ShipReport, ShipRequest, plan, run
from snapchain.replica.disk_writer import ReplicaWriting
from snapchain.replica.endpoint import Endpoint


def plan_send(request: ShipRequest, endpoint: Endpoint, *, on_event: OnEvent = ignore) -> ShipPlan:
    return plan(request, ReplicaWriting(endpoint), on_event=on_event)


def send_to_replica(request: ShipRequest, endpoint: Endpoint, *, on_event: OnEvent = ignore) -> ShipReport:
    return run(request, ReplicaWriting(endpoint), on_event=on_event)


def send_persistently(
    request: ShipRequest, endpoint: Endpoint, *, policy: RetryPolicy, on_event: OnEvent = ignore
) -> ShipReport:
    return run(request, ReplicaWriting(endpoint, policy=policy), on_event=on_event)
