"""One disk of a sync: ship what is sealed, measure that, and say what is left."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from snapchain.host.retry import RetryPolicy, retry
from snapchain.model.convergence import Verdict
from snapchain.model.events import Event, Notice, OnEvent, Progress
from snapchain.ops.ship import run as ship
from snapchain.ops.ship.run import ShipReport
from snapchain.ops.sync.look import look_at_top
from snapchain.ops.sync.request import Destination, Round, SyncReport, SyncRequest
from snapchain.replica.disk_writer import ReplicaWriting
from snapchain.replica.endpoint import Endpoint

MiB = 1 << 20
_LOOK = RetryPolicy(give_up_after=30.0)
"""For questions, in which nothing moves: an sshd that many call at once drops some of them (MaxStartups)."""
Answer = TypeVar("Answer")


def patiently(attempt: Callable[[], Answer], on_event: OnEvent) -> Answer:
    """Ask the replica, again after a pause while the link is bad."""
    return retry(attempt, policy=_LOOK, progress=lambda: 0, on_retry=lambda notice: on_event(Notice(str(notice))))


class Run:
    """The rounds of one disk, and what they have measured. rate: data bytes a second, of the longest of them."""

    def __init__(self, request: SyncRequest, endpoint: Endpoint, on_event: OnEvent) -> None:
        self.request, self._endpoint, self._on_event = request, endpoint, on_event
        self.rounds: list[Round] = []
        self._point: int | None = None
        self._present: int | None = None
        self.measured_bytes = 0
        self.rate: float | None = None

    def round(self, sealed: Path | None) -> int:
        """Ship what is sealed, and measure; the bytes that are left."""
        begun = time.monotonic()
        sent = self._ship(self._told, known_to_lack=sealed is not None)
        seconds = time.monotonic() - begun
        moved = 0 if sent is None else sent.data_bytes
        # Without the start of the other side: what is left will not wait for that.
        rate = sent.data_bytes / sent.seconds if sent is not None and moved else None
        if rate is not None and moved >= self.measured_bytes:
            # The longest run says most about the link: a short one is all closing.
            self.measured_bytes, self.rate = moved, rate
        top = look_at_top(self.request)
        predicted = seconds_for(top.data_bytes, self.rate)
        done = Round(
            number=len(self.rounds) if sealed is None or self.rounds else 1,
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
        self.rounds.append(done)
        told = "" if predicted is None else f", which will take {predicted:.1f} s"
        sizes = f"{moved / MiB:.1f} MiB sent, {done.bytes_left / MiB:.1f} MiB left"
        self._on_event(Notice.of(self.request.send.disk, f"round {done.number}: {sizes}{told}"))
        return done.bytes_left

    def _told(self, event: Event) -> None:
        """Report each round with its own rate and end."""
        if isinstance(event, Progress) and self.rounds:
            event = replace(event, phase=f"{event.phase} {len(self.rounds)}")
        self._on_event(event)

    def _ship(self, on_event: OnEvent, *, known_to_lack: bool) -> ShipReport | None:
        """Send what the replica lacks; None when that is nothing, and no point is needed of it."""
        send = self.request.send
        if not known_to_lack:
            to = ReplicaWriting(self._endpoint)
            planned = patiently(lambda: ship.plan(send, to, on_event=on_event), on_event)
            self._present = planned.layers_present
            if not planned.layers:
                return None
        sent = ship.run(send, ReplicaWriting(self._endpoint, policy=RetryPolicy()), on_event=on_event)
        self._point = sent.point
        if self._present is None:
            self._present = sent.layers_present
        return sent

    def report(self, stands: Destination, outcome: Verdict | None, *, seconds: float) -> SyncReport:
        """The report of all rounds."""
        moved, wire = sum(r.data_bytes for r in self.rounds), sum(r.bytes_sent for r in self.rounds)
        predicted = seconds_for(stands.bytes_left, self.rate)
        target = self.request.target_downtime
        return SyncReport(
            image=stands.image,
            destination=stands.destination,
            disk=stands.disk,
            ready=stands.ready,
            missing=stands.missing,
            point=self._point,
            layers_sent=sum(r.layers_sent for r in self.rounds),
            layers_present=self._present or 0,
            data_bytes=moved,
            bytes_sent=wire,
            bytes_left=stands.bytes_left,
            wire_bytes_left=stands.bytes_left * wire // moved if moved else None,
            rate=self.rate,
            predicted_cutover_seconds=predicted,
            target_downtime=target,
            on_target=self.request.is_met(stands.bytes_left, predicted),
            outcome=outcome,
            rounds=tuple(self.rounds),
            layers=stands.layers,
            overlay=stands.overlay,
            proof=stands.proof,
            commands=stands.commands,
            virsh_command=stands.virsh_command,
            seconds=seconds,
        )


def seconds_for(count: int, rate: float | None) -> float | None:
    """Seconds for that many bytes; None if no rate was measured."""
    if not count:
        return 0.0
    return count / rate if rate else None
