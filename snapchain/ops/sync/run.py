"""sync: make a replica ready for a live migration, and say how long its cutover would take.

    ship what is sealed -> measure -> (seal -> ship -> measure)* -> the empty overlay -> the commands

Everything sealed goes over as `send` sends it, each file as a layer under its own name; what a guest has written since
stays in the active top, and libvirt copies that.  The overlay for it comes last: where it is not, nothing is ready.
With rounds the top is sealed again and again, until what is left is small enough or further rounds would not help.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from snapchain.destinations import replica_at
from snapchain.errors import InvalidInput
from snapchain.model.convergence import Verdict, judge
from snapchain.model.events import OnEvent, ignore
from snapchain.ops.disk_set import check_disks
from snapchain.ops.ship.run import Divergence, Files, Scope, ShipRequest
from snapchain.ops.sync.look import ActiveTop, asked, look_at_top, not_ready, stand
from snapchain.ops.sync.request import Destination, Proof, SetDestination, SetReport, SyncReport, SyncRequest
from snapchain.ops.sync.rounds import Run, patiently, seconds_for
from snapchain.ops.sync.virsh import Guest, guest_of, migrate_commands
from snapchain.replica.endpoint import Endpoint
from snapchain.source.at_rest import ImageAtRest, OfflineSet
from snapchain.source.protocol import SetSealer, Source


def sealed_request(
    image: Path,
    disk: str,
    *,
    labels: Sequence[str] = (),
    divergence: Divergence = Divergence.REFUSE,
    format: str | None = None,
    image_dirs: Sequence[Path] = (),
    limit_rate: int | None = None,
    opens: Source | None = None,
) -> ShipRequest:
    """What `sync` sends of an image: its sealed files, each under its own name. opens: where it is not at rest."""
    return ShipRequest(
        image=image,
        disk=disk,
        labels=labels,
        files=Files.EACH,
        scope=Scope.SEALED,
        divergence=divergence,
        format=format,
        image_dirs=image_dirs,
        limit_rate=limit_rate,
        opens=opens,
    )


def check(request: SyncRequest, endpoint: Endpoint, *, on_event: OnEvent = ignore) -> Destination:
    """Whether a destination is ready, and what is missing; changes nothing on either side.

    Raises what opening the image and reaching the replica raise; that the two have diverged is an answer, not an error.
    """
    request.check()
    top = look_at_top(request)
    if not top.sealed:
        nothing = "nothing of the image is sealed: it is one file"
        return not_ready(request, endpoint, top, nothing, *patiently(lambda: asked(request, endpoint), on_event))
    return patiently(lambda: stand(request, endpoint, top, on_event=on_event, make=False), on_event)


def check_set(requests: Sequence[SyncRequest], endpoint: Endpoint, *, on_event: OnEvent = ignore) -> SetDestination:
    """The same for the disks of one guest."""
    check_together(requests)
    disks = tuple(check(request, endpoint, on_event=on_event) for request in requests)
    ready = all(disk.ready for disk in disks)
    commands = commands_for(requests, disks) if ready else ()
    return SetDestination(
        destination=endpoint.url, ready=ready, disks=disks, bytes_left=_left(disks), commands=commands
    )


def sync_set(
    requests: Sequence[SyncRequest], endpoint: Endpoint, *, sealer: SetSealer | None = None, on_event: OnEvent = ignore
) -> SetReport:
    """Ship, measure, make ready; with rounds or a target, seal and ship again until that is met or in vain.

    Each round seals all disks of a guest, at one instant, before any is shipped. What is left, the target and the
    verdict are of all together; rules, rounds and target as the first request says.
    sealer: of all images, in the order of the requests; for images at rest by default
    Raises InvalidInput when nothing is sealed and nothing may be, Diverged, Conflict when what stands in an overlay's
    place is not to be replaced, Busy when an image is to be sealed and somebody has it open, Unavailable when the link
    stays broken. What is durable over there stays: the next run goes on from it.
    """
    check_together(requests)
    begun = time.monotonic()
    first = requests[0]
    tops = [look_at_top(request) for request in requests]
    for request, top in zip(requests, tops, strict=True):
        if not top.sealed and not request.seals:
            raise InvalidInput(
                "nothing of the image is sealed: it is one file, which a guest will go on writing to",
                subject=request.send.image,
                hint="say --rounds 1 to seal it now, or seal it with snapchain snapshot",
            )
    runs = [Run(request, endpoint, on_event) for request in requests]
    for run, top in zip(runs, tops, strict=True):
        if top.sealed:
            run.round(None)
    outcome = None
    if first.seals:
        outcome = _rounds(runs, sealer or OfflineSet([_sealer(run.request.send, on_event) for run in runs]), tops)
    stands = [_made_ready(request, endpoint, on_event) for request in requests]
    seconds = time.monotonic() - begun
    rate = _rate(runs)
    left = _left(stands)
    predicted = seconds_for(left, rate)
    target = first.target_downtime
    ready = all(each.ready for each in stands)
    commands = commands_for(requests, stands) if ready else ()
    return SetReport(
        destination=endpoint.url,
        ready=ready,
        disks=tuple(run.report(each, outcome, seconds=seconds) for run, each in zip(runs, stands, strict=True)),
        bytes_left=left,
        rate=rate,
        predicted_cutover_seconds=predicted,
        target_downtime=target,
        on_target=first.is_met(left, predicted),
        outcome=outcome,
        commands=commands,
        virsh_command=commands[-1] if commands else None,
        seconds=seconds,
    )


def _sealer(send: ShipRequest, on_event: OnEvent) -> ImageAtRest:
    return ImageAtRest(send.image, format=send.format, image_dirs=send.image_dirs, on_event=on_event)


def _made_ready(request: SyncRequest, endpoint: Endpoint, on_event: OnEvent) -> Destination:
    top = look_at_top(request)
    return patiently(lambda: stand(request, endpoint, top, on_event=on_event, make=True), on_event)


def _rounds(runs: Sequence[Run], sealer: SetSealer, before: Sequence[ActiveTop]) -> Verdict:
    """Seal and ship until there is a verdict."""

    def once() -> int:
        sealed = sealer.seal()
        return sum(run.round(path) for run, path in zip(runs, sealed, strict=True))

    left = [
        sum(run.rounds[-1].bytes_left if run.rounds else top.data_bytes for run, top in zip(runs, before, strict=True))
    ]
    if not all(run.rounds for run in runs):
        # One file that nobody has sealed: it has to be, however little it holds.
        left.append(once())
    request = runs[0].request
    while not (verdict := judge(left, _enough(request, _rate(runs)), request.rules)).ends:
        left.append(once())
    return verdict


def _rate(runs: Sequence[Run]) -> float | None:
    """Of the disk that moved most in one go: they share the link."""
    return max(runs, key=lambda run: run.measured_bytes).rate


def _enough(request: SyncRequest, rate: float | None) -> int:
    if request.target_downtime is None:
        return 0
    return max(request.rest, int(request.target_downtime * (rate or 0.0)))


def _left(disks: Sequence[Destination]) -> int:
    return sum(disk.bytes_left for disk in disks)


__all__ = [
    "Destination",
    "Divergence",
    "Endpoint",
    "Guest",
    "Proof",
    "SetDestination",
    "SetReport",
    "SyncReport",
    "SyncRequest",
    "check",
    "check_set",
    "guest_of",
    "replica_at",
    "sealed_request",
    "sync_set",
]


# --- The disks of one guest, together: which requests make a set, and the commands that move them all.


def check_together(requests: Sequence[SyncRequest]) -> None:
    """Raises InvalidInput for requests that mean nothing, alone or together."""
    check_disks([(request.send.image, request.send.disk) for request in requests])
    for request in requests:
        request.check()
    guests = {(request.guest.domain, request.guest.uri) for request in requests if request.guest is not None}
    if len(guests) > 1:
        names = ", ".join(sorted({domain for domain, _ in guests}))
        raise InvalidInput(
            f"these are disks of several guests: {names}", hint="name the disks of one guest, or --domain"
        )
    targets = [request.guest.target for request in requests if request.guest is not None]
    if len(set(targets)) < len(targets):
        raise InvalidInput("two disks would be one disk of the guest", subject=", ".join(targets))


def commands_for(requests: Sequence[SyncRequest], disks: Sequence[Destination]) -> tuple[str, ...]:
    """One migration of all disks; nothing where a disk's place in the guest, or its overlay, is not known."""
    found = [
        (request.guest, disk.names, disk.overlay)
        for request, disk in zip(requests, disks, strict=True)
        if request.guest is not None and disk.overlay is not None
    ]
    return migrate_commands(found) if len(found) == len(disks) else ()
