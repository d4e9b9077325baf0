"""The loop of a watch: look, decide (rounds.py), do, note what was reached, wait.

Every step may fail without ending the loop: a guest that does not answer is asked again, and a destination that is away
is tried again.  Only a mistake in the request ends it, since every round would be in vain.  SIGTERM and Ctrl-C are the
way to end it; what was begun is as good as before, and the next start goes on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Literal, Protocol

from pydantic import BaseModel, ConfigDict

from snapchain.errors import InvalidInput, SnapchainError
from snapchain.guest.snapshot import GuestSnapshot
from snapchain.merge.run import MergeReport
from snapchain.model.consistency import Consistency
from snapchain.model.events import Notice, OnEvent, ignore
from snapchain.model.fingerprint import Fingerprint
from snapchain.model.inventory import Held
from snapchain.ops.watch.rounds import DiskSight, Range, Round, Rules, Sight, TargetSight, next_round, retry_pause
from snapchain.ops.watch.state import HeldLayer, TargetState, WatchState, read_state, write_state

GUEST_PAUSE = 15.0
"""Seconds before a guest that did not answer is asked again."""

HeldAt = Mapping[str, Sequence[Held]]
"""disk -> layers of its newest point at one destination, root first."""


class _Shown(BaseModel):
    model_config = ConfigDict(frozen=True)


class Shipped(_Shown):
    """A guest point that a destination has now. bytes: read of the guest, and new at the destination."""

    guest_point: int
    bytes_read: int
    bytes_stored: int


class Work(Protocol):
    """What a watch does to a guest and to destinations. Every call may raise a SnapchainError."""

    def look(self, held: Mapping[str, HeldAt], snapshot: GuestSnapshot | None) -> Look:
        """The guest as it is. held: destination -> what it holds; snapshot: the newest, as far as is known."""
        ...

    def snapshot(self) -> GuestSnapshot: ...

    def ship(self, snapshot: GuestSnapshot, target: str) -> Shipped: ...

    def held(self, target: str) -> HeldAt:
        """What a destination holds of the guest's disks now."""
        ...

    def keep(self, target: str) -> None:
        """Let the rules of retention go over its guest points."""
        ...

    def squeeze(self, each: Range) -> MergeReport: ...

    def settle(self, disk: str, held: Mapping[str, HeldAt], *, max_layers: int) -> MergeReport: ...


@dataclass(frozen=True, slots=True)
class Look:
    """guest: its name at the destinations; disks: as rounds.py wants them

    is_newest: whether the active layers lie on what the known snapshot sealed
    """

    guest: str
    disks: tuple[DiskSight, ...]
    is_newest: bool


class TargetReport(_Shown):
    """A destination after a round.

    guest_point: its newest; lag_seconds: how old what it holds is, None where it holds nothing
    behind_bytes: bytes of local layers that it lacks, the active ones too; error: why the last attempt failed
    retry_seconds: until the next attempt
    """

    destination: str
    guest_point: int | None
    captured: datetime | None
    lag_seconds: float | None
    behind_bytes: int | None
    shipped: Shipped | None = None
    failures: int = 0
    error: str | None = None
    retry_seconds: float | None = None
    left_behind: bool = False


LeaseState = Literal["none", "held", "paused", "taken"]


class LeaseReport(_Shown):
    """none: there is no lease yet; held: the guest runs under it; paused: it was not renewed; taken: by another host

    left_seconds: until the guest is stopped, without a further renewal; faults: of places that do not renew it
    """

    state: LeaseState
    seconds: int
    left_seconds: float | None = None
    faults: tuple[str, ...] = ()


class RoundReport(_Shown):
    """One round.

    snapshot: of this round, its instant; consistency, frozen_seconds, why_not: of it
    last_frozen_seconds: of the newest snapshot, whichever round has made it
    held_back: why no snapshot was made although one was due; merged: files that are gone by merges
    chain_lengths: disk -> files; waiting_bytes: of sealed layers that no destination holds
    faults: what failed beside destinations; wait_seconds: until the next round
    lease: under which the guest runs, where one was asked for
    is_news: whether anything was tried, or is not as after the round before
    """

    guest: str
    number: int
    time: datetime
    is_news: bool = True
    snapshot: str | None = None
    consistency: Consistency | None = None
    frozen_seconds: float | None = None
    last_frozen_seconds: float | None = None
    why_not: str | None = None
    held_back: str | None = None
    merged: int = 0
    chain_lengths: dict[str, int] = {}
    waiting_bytes: int | None = None
    active_bytes: int | None = None
    destinations: tuple[TargetReport, ...] = ()
    faults: tuple[str, ...] = ()
    wait_seconds: float = 0.0
    lease: LeaseReport | None = None


class WatchReport(_Shown):
    """A whole watch, when it was ended. last: its last round."""

    guest: str
    rounds: int
    snapshots: int
    points: int
    last: RoundReport | None


Clock = Callable[[], datetime]
Waiter = Callable[[float], None]


def now_utc() -> datetime:
    """The clock of real watches."""
    return datetime.now(UTC)


class Watch:
    """One guest, watched until an interrupt. on_round: called after each round."""

    def __init__(
        self,
        guest: str,
        work: Work,
        targets: Sequence[str],
        rules: Rules,
        state: Path,
        *,
        on_round: Callable[[RoundReport], None],
        clock: Clock = now_utc,
        wait: Waiter = time.sleep,
        on_event: OnEvent = ignore,
    ) -> None:
        self._guest, self._work, self._targets, self._rules = guest, work, targets, rules
        self._path, self._on_round, self._clock, self._wait, self._on_event = state, on_round, clock, wait, on_event
        self._state = read_state(state)
        self._rounds = self._snapshots = self._points = 0
        self._report: RoundReport | None = None

    def run(self) -> WatchReport:
        """Until SIGTERM or Ctrl-C. Raises InvalidInput for what no further round can mend."""
        try:
            while True:
                self._wait(self.round())
        except KeyboardInterrupt:
            return WatchReport(
                guest=self._guest,
                rounds=self._rounds,
                snapshots=self._snapshots,
                points=self._points,
                last=self._report,
            )

    def round(self) -> float:
        """One round; seconds to wait before the next."""
        self._rounds += 1
        began = self._clock()
        try:
            sight = self._sight()
        except InvalidInput:
            raise
        except SnapchainError as error:
            report = RoundReport(guest=self._guest, number=self._rounds, time=began, faults=(str(error),))
            self._say(report.model_copy(update={"wait_seconds": GUEST_PAUSE}))
            return GUEST_PAUSE
        report = RoundReport(guest=self._guest, number=self._rounds, time=began)
        todo = next_round(sight, self._rules, self._clock().timestamp())
        report = report.model_copy(update={"held_back": todo.held_back, "wait_seconds": todo.wait})
        if not todo.does_something:
            before = self._report
            is_news = before is None or (before.held_back is None) != (todo.held_back is None)
            self._say(report.model_copy(update={"is_news": is_news}), sight)
            return todo.wait
        report, shipped = self._do(todo, sight, report)
        with suppress(SnapchainError):  # the next round reports it
            sight = self._sight()
        self._say(report, sight, shipped=shipped, left_behind=todo.left_behind)
        return report.wait_seconds

    def _sight(self) -> Sight:
        state = self._state
        held = {name: _held(state.target(name)) for name in self._targets}
        look = self._work.look(held, state.snapshot)
        self._guest = look.guest
        snapshot = state.snapshot if look.is_newest else None
        return Sight(
            snapshot_at=None if snapshot is None else snapshot.time.timestamp(),
            disks=look.disks,
            targets=tuple(self._target_sight(name, snapshot) for name in self._targets),
            merge_at=state.merge_at,
        )

    def _target_sight(self, name: str, snapshot: GuestSnapshot | None) -> TargetSight:
        known = self._state.target(name)
        return TargetSight(
            name=name,
            is_current=snapshot is not None and known.instant == snapshot.instant,
            failures=known.failures,
            retry_at=known.retry_at,
        )

    def _do(self, todo: Round, sight: Sight, report: RoundReport) -> tuple[RoundReport, dict[str, Shipped]]:
        faults: list[str] = []
        shipped: dict[str, Shipped] = {}
        values: dict[str, object] = {}
        merged = sum(self._merge(partial(self._work.squeeze, each), faults) for each in todo.squeeze)
        ship_to = todo.ship_to
        if todo.snapshot:
            moment = self._clock()  # before: whatever was written until now is in it
            try:
                made = self._work.snapshot().model_copy(update={"time": moment})
            except InvalidInput:
                raise
            except SnapchainError as error:
                faults.append(str(error))
                values["wait_seconds"] = GUEST_PAUSE
                pending = {each.name for each in sight.targets if sight.snapshot_at is not None and not each.is_current}
                ship_to = tuple(name for name in ship_to if name in pending)
            else:
                self._snapshots += 1
                self._keep(self._state.model_copy(update={"snapshot": made}))
                values |= {
                    "snapshot": made.instant,
                    "consistency": made.consistency,
                    "frozen_seconds": made.frozen_seconds,
                    "why_not": made.why_not,
                }
        for name in ship_to:
            if (there := self._ship(name)) is not None:
                shipped[name] = there
        held = {name: _held(self._state.target(name)) for name in self._targets if name not in todo.left_behind}
        for disk, most in todo.settle:
            merged += self._merge(partial(self._work.settle, disk, held, max_layers=most), faults)
        return report.model_copy(update={**values, "merged": merged, "faults": tuple(faults)}), shipped

    def _ship(self, name: str) -> Shipped | None:
        snapshot = self._state.snapshot
        assert snapshot is not None
        try:
            shipped = self._work.ship(snapshot, name)
            self._points += 1
            held = {disk: _stored(layers) for disk, layers in self._work.held(name).items()}
            self._keep(
                self._state.with_target(
                    name,
                    captured=snapshot.time,
                    instant=snapshot.instant,
                    point=shipped.guest_point,
                    failures=0,
                    retry_at=0.0,
                    error=None,
                    held=held,
                )
            )
            self._work.keep(name)
        except SnapchainError as error:
            known = self._state.target(name)
            if isinstance(error, InvalidInput) and known.captured is None:
                raise
            failures = known.failures + 1
            retry_at = self._clock().timestamp() + retry_pause(failures, self._rules)
            words = error.message if error.subject == name else str(error)
            self._keep(self._state.with_target(name, failures=failures, retry_at=retry_at, error=words))
            return None
        return shipped

    def _merge(self, merge: Callable[[], MergeReport], faults: list[str]) -> int:
        """Files that are gone by a merge. After one that failed or changed nothing, none is tried for an interval."""
        gone = 0
        try:
            report = merge()
        except SnapchainError as error:
            faults.append(str(error))
        else:
            gone = report.layers_before - report.layers_after
            faults += [each.message for each in report.failed]
        if not gone:
            again = self._clock().timestamp() + self._rules.every
            self._keep(self._state.model_copy(update={"merge_at": again}))
        return gone

    def _keep(self, state: WatchState) -> None:
        self._state = state
        try:
            write_state(self._path, state)
        except SnapchainError as error:
            self._on_event(Notice(f"the state of this watch cannot be written: {error}"))

    def _say(
        self,
        report: RoundReport,
        sight: Sight | None = None,
        *,
        shipped: Mapping[str, Shipped] | None = None,
        left_behind: Collection[str] = (),
    ) -> None:
        now = self._clock()
        snapshot = self._state.snapshot
        values: dict[str, object] = {"last_frozen_seconds": None if snapshot is None else snapshot.frozen_seconds}
        if sight is not None:
            values |= {
                "chain_lengths": {disk.name: disk.files for disk in sight.disks},
                "waiting_bytes": sight.waiting,
                "active_bytes": sight.active,
            }
        values["destinations"] = tuple(
            self._row(name, sight, now, shipped=(shipped or {}).get(name), left_behind=name in left_behind)
            for name in self._targets
        )
        self._report = report.model_copy(update=values)
        self._on_round(self._report)

    def _row(
        self, name: str, sight: Sight | None, now: datetime, *, shipped: Shipped | None, left_behind: bool
    ) -> TargetReport:
        state = self._state.target(name)
        return TargetReport(
            destination=name,
            guest_point=state.point,
            captured=state.captured,
            lag_seconds=None if state.captured is None else max((now - state.captured).total_seconds(), 0.0),
            behind_bytes=None if sight is None else sight.lacking(name) + sight.active,
            shipped=shipped,
            failures=state.failures,
            error=state.error,
            retry_seconds=max(state.retry_at - now.timestamp(), 0.0) if state.failures else None,
            left_behind=left_behind,
        )


def _held(state: TargetState) -> HeldAt:
    return {disk: state.held_of(disk) for disk in state.held}


def _stored(layers: Sequence[Held]) -> tuple[HeldLayer, ...]:
    return tuple(
        HeldLayer(layer_id=each.layer_id, sources=tuple(part for part in each.sources if isinstance(part, Fingerprint)))
        for each in layers
    )
