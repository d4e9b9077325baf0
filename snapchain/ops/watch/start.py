"""A watch from its request: one at a time for a guest, its state on this host, its metrics after each round."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from hashlib import sha256
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from snapchain.destination.protocol import Destination
from snapchain.errors import Conflict, SnapchainError
from snapchain.guest.address import GuestAddress, open_guest
from snapchain.host.deadman import may_stand_still
from snapchain.host.private import make_private
from snapchain.model.events import Notice, OnEvent, ignore
from snapchain.ops import exposition
from snapchain.ops.lease_notes import NAME, directories, read_note
from snapchain.ops.ship.guest import GuestShipPlan, GuestShipRequest, plan as plan_shipment
from snapchain.ops.single_run import only_run
from snapchain.ops.watch import metrics as texts
from snapchain.ops.watch.door import GuestDoor
from snapchain.ops.watch.guest_work import GuestWork, WatchRequest
from snapchain.ops.watch.lease import LeaseHolder
from snapchain.ops.watch.lease_places import LeaseRequest
from snapchain.ops.watch.rounds import Rules
from snapchain.ops.watch.run import Clock, RoundReport, Waiter, Watch, WatchReport, now_utc

_VIRTUAL = (
    "this host is a virtual machine: while it is paused, or restored from a snapshot, its clock stands still, and no "
    "lease stops a guest on it in time"
)


def directory_of(guest: GuestAddress) -> Path:
    """Where the state of a watch of this guest lies: of root where a service keeps it, as nightly's does."""
    mark = sha256(f"{guest.connect or ''} {guest.option}".encode()).hexdigest()[:12]
    name = guest.domain or (guest.qmp.stem if guest.qmp is not None else "")
    plain = "".join(each if each.isalnum() and each.isascii() else "-" for each in name)[:60]
    return directories()[0] / f"{plain}-{mark}"


class WatchPlan(BaseModel):
    """What the first round would do. shipments: to each destination; the first of them takes the snapshot for all."""

    model_config = ConfigDict(frozen=True, defer_build=True)

    guest: str
    every: float
    shipments: tuple[GuestShipPlan, ...]


def plan(
    request: WatchRequest,
    destinations: Mapping[str, Callable[[], Destination]],
    rules: Rules,
    *,
    on_event: OnEvent = ignore,
) -> WatchPlan:
    """The plan of the first round; changes nothing. Raises what opening raises, and as a shipment's plan."""
    shipment = GuestShipRequest(snapshot=request.snapshot, name=request.name, labels=request.snapshot.labels)
    with open_guest(request.guest, on_event=on_event) as guest:
        return WatchPlan(
            guest=request.name or guest.name,
            every=rules.every,
            shipments=tuple(
                plan_shipment(guest, shipment, opened(), on_event=on_event) for opened in destinations.values()
            ),
        )


def start(
    request: WatchRequest,
    destinations: Mapping[str, Callable[[], Destination]],
    rules: Rules,
    *,
    lease: LeaseRequest | None = None,
    metrics: Path | None = None,
    on_round: Callable[[RoundReport], None],
    clock: Clock = now_utc,
    wait: Waiter = time.sleep,
    on_event: OnEvent = ignore,
) -> WatchReport:
    """Watch until an interrupt. Raises Busy where another watch of this guest runs, and as `Watch.run`.

    lease: the guest runs only as long as this watch renews it. Raises Unavailable where it cannot be ended at the end,
    Conflict where another host has taken the guest over, and without one where an earlier watch has left one.
    """
    directory = directory_of(request.guest)
    make_private(directory)
    file = None if metrics is None else metrics.absolute()

    holder: LeaseHolder | None = None

    def told(report: RoundReport) -> None:
        if holder is not None:
            report = report.model_copy(update={"lease": holder.report()})
        on_round(report)
        if file is not None:
            try:
                exposition.write(file, texts.encode(report))
            except SnapchainError as error:
                on_event(Notice(f"the metrics cannot be written: {error}"))

    with only_run(directory / "lock", wait=0.0, on_wait=lambda words: on_event(Notice(words))):
        door = GuestDoor(request.guest, on_event=on_event)
        work = GuestWork(request, destinations, door=door, on_event=on_event)
        name = request.name or request.guest.domain or request.guest.name or request.guest.option
        watch = Watch(
            name,
            work,
            list(destinations),
            rules,
            directory / "state.json",
            on_round=told,
            clock=clock,
            wait=wait,
            on_event=on_event,
        )
        if lease is None:
            _check_no_lease(directory / NAME)
            return watch.run()
        if may_stand_still():
            on_event(Notice(_VIRTUAL))
        with LeaseHolder(request, door, lease, directory / NAME, on_event=on_event) as holder:
            return watch.run()


def _check_no_lease(path: Path) -> None:
    """Raises Conflict where an earlier watch has left a lease: without renewals the guest would stay stopped."""
    note = read_note(path)
    if note is not None and note.lease is not None:
        raise Conflict(
            f"an earlier watch of it has left a lease at {note.destination}, which was not ended",
            subject=note.guest,
            hint="start the watch with --lease, as then, and end it in order; then start it without",
        )
