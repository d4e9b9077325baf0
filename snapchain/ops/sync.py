"""sync: make a replica ready for a live migration, and say how long its cutover would take.

    ship what is sealed -> measure -> (seal -> ship -> measure)* -> the empty overlay -> the commands

Everything sealed goes over as `send` sends it, each file as a layer under its own name; what a guest has written since
stays in the active top, and libvirt copies that.  The overlay for it comes last: where it is not, nothing is ready.
With rounds the top is sealed again and again, until what is left is small enough or further rounds would not help.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from snapchain.errors import InvalidInput
from snapchain.host.remote_retry import Persistence, persist
from snapchain.model.convergence import Verdict, judge
from snapchain.ops.events import Event, Notice, OnEvent, Progress, ignore
from snapchain.ops.sealer import OfflineSealer, Sealer
from snapchain.ops.send import Divergence, Files, Request, Scope, SendReport, plan_send, replica_at, send_persistently
from snapchain.ops.sync_look import ActiveTop, look_at_top, not_ready, stand
from snapchain.ops.sync_request import Destination, Proof, Round, SyncReport, SyncRequest
from snapchain.ops.sync_virsh import Guest, guest_of
from snapchain.replica.endpoint import Endpoint

_LOOK = Persistence(give_up_after=30.0)
"""For questions, in which nothing moves: an sshd that many call at once drops some of them (MaxStartups)."""
Answer = TypeVar("Answer")


def sealed_request(
    image: Path,
    disk: str,
    *,
    labels: Sequence[str] = (),
    divergence: Divergence = Divergence.REFUSE,
    format: str | None = None,
    image_dirs: Sequence[Path] = (),
    limit_rate: int | None = None,
) -> Request:
    """What `sync` sends of an image: its sealed files, each under its own name."""
    return Request(
        image=image,
        disk=disk,
        labels=labels,
        files=Files.EACH,
        scope=Scope.SEALED,
        divergence=divergence,
        format=format,
        image_dirs=image_dirs,
        limit_rate=limit_rate,
    )


def check(request: SyncRequest, endpoint: Endpoint, *, on_event: OnEvent = ignore) -> Destination:
    """Whether a destination is ready, and what is missing; changes nothing on either side.

    Raises what opening the image and reaching the replica raise; that the two have diverged is an answer, not an error.
    """
    request.check()
    top = look_at_top(request.send)
    if not top.sealed:
        return not_ready(request, endpoint, top, "nothing of the image is sealed: it is one file")
    return _patiently(lambda: stand(request, endpoint, top, on_event=on_event, make=False), on_event)


def sync(
    request: SyncRequest, endpoint: Endpoint, *, sealer: Sealer | None = None, on_event: OnEvent = ignore
) -> SyncReport:
    """Ship, measure, make ready; with rounds or a target, seal and ship again until that is met or in vain.

    sealer: of the image; one for images at rest by default
    Raises InvalidInput when nothing is sealed and nothing may be, Diverged, Conflict when what stands in the overlay's
    place is not to be replaced, Busy when the image is to be sealed and somebody has it open, Unavailable when the link
    stays broken. What is durable over there stays: the next run goes on from it.
    """
    request.check()
    begun = time.monotonic()
    run = _Run(request, endpoint, on_event)
    top = look_at_top(request.send)
    if top.sealed:
        run.round(None)
    elif not request.seals:
        raise InvalidInput(
            "nothing of the image is sealed: it is one file, which a guest will go on writing to",
            subject=request.send.image,
            hint="say --rounds 1 to seal it now, or seal it with snapchain snapshot",
        )
    outcome = run.rounds(sealer or _sealer(request.send, on_event), top) if request.seals else None
    top = look_at_top(request.send)
    stands = _patiently(lambda: stand(request, endpoint, top, on_event=on_event, make=True), on_event)
    return run.report(stands, outcome, seconds=time.monotonic() - begun)


def _sealer(send: Request, on_event: OnEvent) -> Sealer:
    return OfflineSealer(send.image, format=send.format, image_dirs=send.image_dirs, on_event=on_event)


def _patiently(attempt: Callable[[], Answer], on_event: OnEvent) -> Answer:
    return persist(attempt, policy=_LOOK, moved=lambda: 0, told=lambda retry: on_event(Notice(str(retry))))


class _Run:
    """The rounds of one sync, and what they have measured."""

    def __init__(self, request: SyncRequest, endpoint: Endpoint, on_event: OnEvent) -> None:
        self._request, self._endpoint, self._on_event = request, endpoint, on_event
        self._rounds: list[Round] = []
        self._point: int | None = None
        self._present: int | None = None
        self._measured_bytes = 0
        self._rate: float | None = None

    def rounds(self, sealer: Sealer, before: ActiveTop) -> Verdict:
        """Seal and ship until there is a verdict."""
        left = [self._rounds[-1].bytes_left if self._rounds else before.data_bytes]
        if not self._rounds:
            # One file that nobody has sealed: it has to be, however little it holds.
            left.append(self.round(sealer.seal()))
        while not (verdict := judge(left, self._enough(), self._request.rules)).ends:
            left.append(self.round(sealer.seal()))
        return verdict

    def _enough(self) -> int | None:
        target = self._request.target_downtime
        if target is None:
            return 0
        return None if self._rate is None else int(target * self._rate)

    def round(self, sealed: Path | None) -> int:
        """Ship what is sealed, and measure; the bytes that are left."""
        begun = time.monotonic()
        sent = self._ship(self._told, known_to_lack=sealed is not None)
        seconds = time.monotonic() - begun
        moved = 0 if sent is None else sent.data_bytes
        # Without the start of the other side: what is left will not wait for that.
        rate = sent.data_bytes / sent.seconds if sent is not None and moved else None
        if rate is not None and moved >= self._measured_bytes:
            # The longest run says most about the link: a short one is all closing.
            self._measured_bytes, self._rate = moved, rate
        top = look_at_top(self._request.send)
        predicted = _seconds(top.data_bytes, self._rate)
        done = Round(
            number=len(self._rounds) if sealed is None or self._rounds else 1,
            sealed=None if sealed is None else str(sealed),
            layers_sent=0 if sent is None else sent.layers_sent,
            data_bytes=moved,
            bytes_sent=0 if sent is None else sent.bytes_sent,
            seconds=seconds,
            rate=rate,
            bytes_left=top.data_bytes,
            dirty_rate=None if sealed is None else top.data_bytes / seconds,
            predicted_cutover_seconds=predicted,
        )
        self._rounds.append(done)
        told = "not measured" if predicted is None else f"{predicted:.1f} s at the measured rate"
        self._on_event(Notice(f"round {done.number}: {moved} bytes shipped, {done.bytes_left} left: {told}"))
        return done.bytes_left

    def _told(self, event: Event) -> None:
        """Each round has a rate and an end of its own."""
        if isinstance(event, Progress) and self._rounds:
            event = replace(event, phase=f"{event.phase} {len(self._rounds)}")
        self._on_event(event)

    def _ship(self, on_event: OnEvent, *, known_to_lack: bool) -> SendReport | None:
        """Send what the replica lacks; None when that is nothing, and no point is needed of it."""
        send = self._request.send
        if not known_to_lack:
            planned = _patiently(lambda: plan_send(send, self._endpoint, on_event=on_event), on_event)
            self._present = planned.layers_present
            if not planned.layers:
                return None
        sent = send_persistently(send, self._endpoint, policy=Persistence(), on_event=on_event)
        self._point = sent.point
        if self._present is None:
            self._present = sent.layers_present
        return sent

    def report(self, stands: Destination, outcome: Verdict | None, *, seconds: float) -> SyncReport:
        """What came of it all."""
        moved, wire = sum(r.data_bytes for r in self._rounds), sum(r.bytes_sent for r in self._rounds)
        predicted = _seconds(stands.bytes_left, self._rate)
        target = self._request.target_downtime
        return SyncReport(
            image=stands.image,
            destination=stands.destination,
            disk=stands.disk,
            ready=stands.ready,
            missing=stands.missing,
            point=self._point,
            layers_sent=sum(r.layers_sent for r in self._rounds),
            layers_present=self._present or 0,
            data_bytes=moved,
            bytes_sent=wire,
            bytes_left=stands.bytes_left,
            wire_bytes_left=stands.bytes_left * wire // moved if moved else None,
            rate=self._rate,
            predicted_cutover_seconds=predicted,
            target_downtime=target,
            on_target=None if target is None else predicted is not None and predicted <= target,
            outcome=outcome,
            rounds=tuple(self._rounds),
            layers=stands.layers,
            overlay=stands.overlay,
            proof=stands.proof,
            commands=stands.commands,
            virsh_command=stands.virsh_command,
            seconds=seconds,
        )


def _seconds(count: int, rate: float | None) -> float | None:
    if not count:
        return 0.0
    return count / rate if rate else None


__all__ = [
    "Destination",
    "Divergence",
    "Guest",
    "Proof",
    "SyncReport",
    "SyncRequest",
    "check",
    "guest_of",
    "replica_at",
    "sealed_request",
    "sync",
]
