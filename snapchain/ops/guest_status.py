"""status: how the guests of destinations stand: who may run each, how far behind each destination is, what is owed."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime

from pydantic import BaseModel, ConfigDict

from snapchain.destination.protocol import Destination
from snapchain.destination.records import DiskRecord
from snapchain.errors import NotFound, SnapchainError
from snapchain.model.consistency import Consistency
from snapchain.model.guest_checks import GuestCheck, GuestChecks
from snapchain.model.guest_state import GuestStanding, GuestState, Place, Vouched, describe
from snapchain.model.lease import Lease
from snapchain.ops.failover.choose import loss_of
from snapchain.ops.guest_points import GuestView, guest_named, guests_of
from snapchain.ops.other_destinations import OtherDestinations, Reach


class _Shown(BaseModel):
    model_config = ConfigDict(frozen=True, defer_build=True)


class GuestStatus(_Shown):
    """A guest at a destination.

    state, epoch, master, former, since, vouched, lease: as the destination records them
    guest_point, time, consistency: of the newest guest point; torn: newer moments that are no guest point
    lag_seconds: since its time; lag_bytes: what the guest wrote since, by the rate between its last two points, or None
    ahead_bytes: DATA that the destination has beyond it
    taken_at: the other destination at which the master took the guest over; others: all other destinations that are
    known; silent: those of them that did not answer, and why; gone: those that never come back, and who said so
    verified, booted: what came of the last verification of the guest, and of the last boot of a clone (failover --test)
    owed: what must still be done about it, sentences; fault: why it could not be asked
    """

    guest: str
    destination: str
    state: GuestState | None = None
    epoch: int | None = None
    master: str | None = None
    former: str | None = None
    since: datetime | None = None
    vouched: Vouched | None = None
    lease: Lease | None = None
    guest_point: int | None = None
    time: datetime | None = None
    consistency: Consistency | None = None
    torn: int = 0
    lag_seconds: float | None = None
    lag_bytes: int | None = None
    ahead_bytes: int = 0
    taken_at: str | None = None
    others: tuple[str, ...] = ()
    silent: tuple[str, ...] = ()
    gone: tuple[str, ...] = ()
    verified: GuestCheck | None = None
    booted: GuestCheck | None = None
    owed: tuple[str, ...] = ()
    fault: str | None = None

    @property
    def is_recorded(self) -> bool:
        """Whether the destination has a record of its state."""
        return self.since is not None


class StatusReport(_Shown):
    """All guests by name, at each destination in the order in which these were named."""

    guests: tuple[GuestStatus, ...]


def status(
    places: Sequence[tuple[Destination, str | None]], *, now: datetime | None = None, reach: Reach | None = None
) -> StatusReport:
    """Ask destinations, each about one guest or about all. now: for ages; reach: how other destinations are asked, too

    A guest whose state cannot be asked is a row with the reason. Raises NotFound for a guest that a destination lacks.
    """
    now = now or datetime.now(UTC)
    rows: list[GuestStatus] = []
    for place, name in places:
        disks = place.disks()
        asked = _all(place, disks, now) if name is None else [_one(place, disks, name, now)]
        for row, standing in asked:
            rows.append(row if reach is None or standing is None else _with_others(row, standing, place, reach))
    return StatusReport(guests=tuple(sorted(rows, key=lambda row: row.guest)))


_Row = tuple[GuestStatus, GuestStanding | None]


def _all(place: Destination, disks: Sequence[DiskRecord], now: datetime) -> list[_Row]:
    """Guests with points, and those of which only a state is recorded: a guest that was moved there has no points."""
    views = guests_of(disks)
    others = {disk.name.rpartition("/")[0] for disk in disks} - {"", *(view.name for view in views)}
    rows = [_row(place, view.name, view, now) for view in views]
    return rows + [found for found in (_row(place, name, None, now) for name in sorted(others)) if found[0].is_recorded]


def _one(place: Destination, disks: Sequence[DiskRecord], name: str, now: datetime) -> _Row:
    view = guest_named(disks, name)
    row, standing = _row(place, name, view, now)
    if view is None and not row.is_recorded:
        raise NotFound("there is no such guest", subject=f"{place.url}::{name}")
    return row, standing


def _row(place: Destination, name: str, view: GuestView | None, now: datetime) -> _Row:
    row, standing = GuestStatus(guest=name, destination=place.url), None
    try:
        standing, checks = place.guest_state(name), place.guest_checks(name)
        row = row.model_copy(
            update={
                "state": standing.state,
                "epoch": standing.epoch,
                "master": standing.master,
                "former": standing.former,
                "since": standing.time,
                "vouched": standing.vouched,
                "lease": standing.lease,
                "verified": checks.verified,
                "booted": checks.booted,
                "owed": owed(standing) + owed_by_checks(checks),
            }
        )
        if view is not None and view.points:
            newest = view.points[-1]
            loss = loss_of(place, view, newest, now=now)
            row = row.model_copy(
                update={
                    "guest_point": newest.point,
                    "time": newest.time,
                    "consistency": newest.consistency,
                    "torn": sum(each.time > newest.time for each in view.leftovers),
                    "lag_seconds": loss.seconds,
                    "lag_bytes": loss.likely_bytes,
                    "ahead_bytes": loss.known_bytes,
                }
            )
    except SnapchainError as error:
        return row.model_copy(update={"fault": str(error)}), standing
    return row, standing


def _with_others(row: GuestStatus, standing: GuestStanding, place: Destination, reach: Reach) -> GuestStatus:
    """What the guest's other destinations say. Where one has a newer master, that is what is shown."""
    known = [*standing.others, *([] if standing.at is None else [standing.at])]
    own = [Place(url=place.url), *([] if standing.here is None else [standing.here])]
    others = OtherDestinations(row.guest, known, reach, own=own, gone=standing.gone)
    newest = others.newest(standing)
    found: dict[str, object] = {
        "taken_at": None if standing.at is None else str(standing.at),
        "others": tuple(map(str, others.places)),
        "gone": tuple(f"{each.place}: {each}" for each in others.gone),
        "silent": tuple(f"{each.place}: {each.fault}" for each in others.answers if each.standing is None),
    }
    if newest.epoch > standing.epoch:
        where = newest.at or newest.here
        found["owed"] = (*row.owed, f"it was taken over since: it is {describe(newest)}, at {where}")
    return row.model_copy(update=found)


def owed(standing: GuestStanding) -> tuple[str, ...]:
    """What a state leaves to be done, and by whom."""
    master, former = standing.master or "the new host", standing.former or "the old host"
    match standing.state:
        case GuestState.MOVING:
            return (f"a move from {master} is under way: it must be finished or aborted there",)
        case GuestState.SWITCHED:
            return (f"the guest is not known to run on {master} yet: finish the move, or start it there",)
        case GuestState.PROMOTING:
            return (f"a failover to {master} is under way: run it again there, or --withdraw",)
        case GuestState.SUSPECT:
            return (f"{former} has come back: run `snapchain fence` there, to see what it holds",)
        case GuestState.DIVERGED:
            return (f"{former} holds data that no point has: `snapchain fence --keep-tail` there keeps it",)
        case GuestState.ACTIVE if standing.vouched is not None:
            return (f"{former} must not start it: run `snapchain fence` there before its guests start",)
        case GuestState.ACTIVE | GuestState.PROTECTED:
            return ()


def owed_by_checks(checks: GuestChecks) -> tuple[str, ...]:
    """What the last checks have found to be wrong."""
    found = []
    if checks.verified is not None and not checks.verified.ok:
        found.append(f"the last verification found damage: {checks.verified.words}")
    if checks.booted is not None and not checks.booted.ok:
        found.append(f"the last boot of a clone failed: {checks.booted.words}")
    return tuple(found)
